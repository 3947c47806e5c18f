/* video.c - containers and codecs by libav, where a build has it (HAVE_LIBAV). Every frame is
 * decoded in order and the chosen ones are kept: right for any file, and short clips are what
 * models take. */
#include "data/video.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

void video_free(Video *v) {
    for (int i = 0; i < v->count; i++) picture_free(&v->frames[i]);
    free(v->frames);
    free(v->times);
    *v = (Video){0};
}

#ifdef HAVE_LIBAV

#include <libavcodec/avcodec.h>
#include <libavformat/avformat.h>
#include <libavutil/imgutils.h>
#include <libswscale/swscale.h>

#define UNKNOWN_FPS 24.0
#define BUFFER      65536

typedef struct Source {
    const uint8_t *bytes;
    size_t size, at;
} Source;

static int source_read(void *user, uint8_t *to, int n) {
    Source *s = user;
    if (s->at == s->size) return AVERROR_EOF;
    if ((size_t)n > s->size - s->at) n = (int)(s->size - s->at);
    memcpy(to, s->bytes + s->at, (size_t)n);
    s->at += (size_t)n;
    return n;
}

static int64_t source_seek(void *user, int64_t offset, int whence) {
    Source *s = user;
    if (whence == AVSEEK_SIZE) return (int64_t)s->size;
    int64_t at = whence == SEEK_SET   ? offset
                 : whence == SEEK_CUR ? (int64_t)s->at + offset
                                      : (int64_t)s->size + offset;
    if (at < 0 || at > (int64_t)s->size) return -1;
    s->at = (size_t)at;
    return at;
}

typedef struct Reader {
    Source source;
    AVIOContext *io;
    AVFormatContext *format;
    AVCodecContext *codec;
    AVPacket *packet;
    AVFrame *frame;
    struct SwsContext *scale;
    int stream;
    const char *name;
} Reader;

static void reader_close(Reader *r) {
    sws_freeContext(r->scale);
    av_frame_free(&r->frame);
    av_packet_free(&r->packet);
    avcodec_free_context(&r->codec);
    avformat_close_input(&r->format);
    if (r->io) av_freep(&r->io->buffer);
    avio_context_free(&r->io);
}

static Status reader_open(Reader *r, const uint8_t *bytes, size_t size, const char *name) {
    const AVCodec *codec = NULL;
    *r = (Reader){.source = {bytes, size, 0}, .name = name};
    av_log_set_level(AV_LOG_QUIET);
    uint8_t *buffer = av_malloc(BUFFER);
    r->io = avio_alloc_context(buffer, BUFFER, 0, &r->source, source_read, NULL, source_seek);
    r->format = avformat_alloc_context();
    if (!r->io || !r->format) FAIL(ERR_IO, "%s: out of memory", name);
    r->format->pb = r->io;
    if (avformat_open_input(&r->format, NULL, NULL, NULL) < 0)
        FAIL(ERR_FORMAT, "%s: is no video that can be read", name);
    if (avformat_find_stream_info(r->format, NULL) < 0)
        FAIL(ERR_FORMAT, "%s: the video's streams cannot be read", name);
    r->stream = av_find_best_stream(r->format, AVMEDIA_TYPE_VIDEO, -1, -1, &codec, 0);
    if (r->stream < 0 || !codec) FAIL(ERR_FORMAT, "%s: has no frames that can be decoded", name);
    r->codec = avcodec_alloc_context3(codec);
    r->packet = av_packet_alloc();
    r->frame = av_frame_alloc();
    if (!r->codec || !r->packet || !r->frame) FAIL(ERR_IO, "%s: out of memory", name);
    if (avcodec_parameters_to_context(r->codec, r->format->streams[r->stream]->codecpar) < 0 ||
        avcodec_open2(r->codec, codec, NULL) < 0)
        FAIL(ERR_FORMAT, "%s: its codec cannot be opened", name);
    return OK;
}

/* The next frame, in order; false at the end, or where the rest cannot be decoded. */
static bool next_frame(Reader *r) {
    for (;;) {
        int got = avcodec_receive_frame(r->codec, r->frame);
        if (!got) return true;
        if (got != AVERROR(EAGAIN)) return false;
        int read = av_read_frame(r->format, r->packet);
        if (read < 0) {
            avcodec_send_packet(r->codec, NULL);
            continue;
        }
        if (r->packet->stream_index == r->stream) avcodec_send_packet(r->codec, r->packet);
        av_packet_unref(r->packet);
    }
}

static Status take_frame(Reader *r, Picture *p) {
    int64_t width = r->frame->width, height = r->frame->height;
    if (width < 1 || height < 1 || width > PICTURE_PIXELS_MAX / height)
        FAIL(ERR_FORMAT, "%s: frames of %" PRId64 " x %" PRId64 " pixels", r->name, width, height);
    r->scale = sws_getCachedContext(r->scale, (int)width, (int)height, r->frame->format, (int)width,
                                    (int)height, AV_PIX_FMT_RGB24, SWS_BICUBIC, NULL, NULL, NULL);
    *p = (Picture){height, width, malloc((size_t)(height * width) * 3 + 64)};
    if (!r->scale || !p->pixels) FAIL(ERR_FORMAT, "%s: a frame cannot be converted", r->name);
    uint8_t *planes[4] = {p->pixels};
    int strides[4] = {(int)width * 3};
    sws_scale(r->scale, (const uint8_t *const *)r->frame->data, r->frame->linesize, 0, (int)height,
              planes, strides);
    return OK;
}

/* A header may count a few frames more than there are; this share of them is a file that was cut.
 */
#define LEAST_SHARE 0.95

/* How many frames there are: decoded once to count them, since headers may not say. */
static Status count_frames(int64_t *total, double *fps, const uint8_t *bytes, size_t size,
                           const char *name) {
    Reader r;
    Status status = reader_open(&r, bytes, size, name);
    int64_t promised = 0;
    *total = 0;
    if (status == OK) {
        AVRational rate = av_guess_frame_rate(r.format, r.format->streams[r.stream], NULL);
        *fps = rate.num > 0 && rate.den > 0 ? av_q2d(rate) : UNKNOWN_FPS;
        promised = r.format->streams[r.stream]->nb_frames;
        while (next_frame(&r)) ++*total;
    }
    reader_close(&r);
    if (status == OK && !*total) FAIL(ERR_FORMAT, "%s: has no frames", name);
    if (status == OK && (double)*total < LEAST_SHARE * (double)promised)
        FAIL(ERR_FORMAT, "%s: ends after %" PRId64 " of %" PRId64 " frames", name, *total,
             promised);
    return status;
}

Status video_decode(Video *v, const uint8_t *bytes, size_t size, int64_t most, const char *name) {
    Reader r = {0};
    int64_t total;
    double fps;
    *v = (Video){0};
    if (!size) FAIL(ERR_FORMAT, "%s: is empty", name);
    TRY(count_frames(&total, &fps, bytes, size, name));
    int64_t n = most < total ? most : total;
    v->frames = must_calloc((size_t)n, sizeof *v->frames);
    v->times = must_calloc((size_t)n, sizeof *v->times);
    Status status = reader_open(&r, bytes, size, name);
    for (int64_t at = 0; status == OK && v->count < n && next_frame(&r); at++) {
        if (at != v->count * total / n) continue;
        v->times[v->count] = (double)at / fps;
        status = take_frame(&r, &v->frames[v->count++]);
    }
    reader_close(&r);
    if (status == OK && v->count < n)
        status = status_fail(ERR_FORMAT, "%s: %d of %" PRId64 " frames came the second time", name,
                             v->count, n);
    if (status != OK) video_free(v);
    return status;
}

#else

Status video_decode(Video *v, const uint8_t *bytes, size_t size, int64_t most, const char *name) {
    (void)bytes, (void)size, (void)most;
    *v = (Video){0};
    FAIL(ERR_CONFIG,
         "%s: this build reads no videos: libav was not there when it was built (make "
         "deps-all)",
         name);
}

#endif
