/* sound.c - decoding, resampling, and features: frames of 320 samples every 160, the first begun
 * 160 before the recording; a periodic Hann window, 512 points of Fourier transform, magnitudes
 * through 128 HTK mel filters from 0 to 8000 Hz, and the logarithm of that plus 0.001. */
#include "data/sound.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#ifdef HAVE_SNDFILE
#include <sndfile.h>
#endif
#ifdef HAVE_SOXR
#include <soxr.h>
#endif

#define RATE_MAX  768000
#define PARTS_MAX 256 /* channels */

/* ---- features ---- */

#define FRAME  320
#define HOP    160
#define POINTS 512
#define BINS   (POINTS / 2 + 1)
#define MELS   128

int64_t mel_frames(int64_t count) {
    return count > 0 ? (count - 1) / HOP : 0;
}

/* Of POINTS complex numbers, in place: iterative, by powers of two. */
static void fourier(double *re, double *im, const double *cosines, const double *sines) {
    for (int i = 1, j = 0; i < POINTS; i++) {
        int bit = POINTS >> 1;
        for (; j & bit; bit >>= 1) j ^= bit;
        j |= bit;
        if (i >= j) continue;
        double t = re[i];
        re[i] = re[j], re[j] = t;
        t = im[i];
        im[i] = im[j], im[j] = t;
    }
    for (int half = 1; half < POINTS; half *= 2)
        for (int at = 0; at < POINTS; at += 2 * half)
            for (int k = 0; k < half; k++) {
                double c = cosines[k * (POINTS / 2 / half)], s = -sines[k * (POINTS / 2 / half)];
                double *a = &re[at + k], *b = &im[at + k];
                double x = a[half] * c - b[half] * s, y = a[half] * s + b[half] * c;
                a[half] = *a - x, b[half] = *b - y;
                *a += x, *b += y;
            }
}

typedef struct Mel {
    double window[FRAME], cosines[POINTS / 2], sines[POINTS / 2];
    float filters[MELS][BINS];
} Mel;

static double mel_of(double hertz) {
    return 2595.0 * log10(1.0 + hertz / 700.0);
}

static Mel *mel_make(void) {
    Mel *m = must_calloc(1, sizeof *m);
    double edges[MELS + 2], top = mel_of(SOUND_RATE / 2.0);
    for (int i = 0; i < FRAME; i++) m->window[i] = 0.5 - 0.5 * cos(2.0 * M_PI * i / FRAME);
    for (int i = 0; i < POINTS / 2; i++) {
        m->cosines[i] = cos(2.0 * M_PI * i / POINTS);
        m->sines[i] = sin(2.0 * M_PI * i / POINTS);
    }
    for (int i = 0; i < MELS + 2; i++)
        edges[i] = 700.0 * (pow(10.0, top * i / (MELS + 1) / 2595.0) - 1.0);
    for (int j = 0; j < MELS; j++)
        for (int b = 0; b < BINS; b++) {
            double f = (double)b * SOUND_RATE / POINTS;
            double up = (f - edges[j]) / (edges[j + 1] - edges[j]),
                   down = (edges[j + 2] - f) / (edges[j + 2] - edges[j + 1]);
            m->filters[j][b] = (float)fmax(0.0, fmin(up, down));
        }
    return m;
}

static void mel_frame(float *out, const Mel *m, const float *samples, int64_t count,
                      int64_t frame) {
    double re[POINTS] = {0}, im[POINTS] = {0};
    float magnitude[BINS];
    for (int i = 0; i < FRAME; i++) {
        int64_t at = frame * HOP - HOP + i;
        if (at >= 0 && at < count) re[i] = (double)samples[at] * m->window[i];
    }
    fourier(re, im, m->cosines, m->sines);
    for (int b = 0; b < BINS; b++) magnitude[b] = (float)sqrt(re[b] * re[b] + im[b] * im[b]);
    for (int j = 0; j < MELS; j++) {
        float sum = 0;
        for (int b = 0; b < BINS; b++) sum += magnitude[b] * m->filters[j][b];
        out[j] = logf(sum + 0.001f);
    }
}

void mel_features(float *out, const float *samples, int64_t count) {
    int64_t frames = mel_frames(count);
    Mel *m = mel_make();
#pragma omp parallel for schedule(static)
    for (int64_t f = 0; f < frames; f++) mel_frame(out + f * MELS, m, samples, count, f);
    free(m);
}

void sound_chunks(float *out, const float *samples, int64_t count, int64_t width) {
    int64_t padded = (count + width - 1) / width * width;
    memcpy(out, samples, (size_t)count * sizeof *out);
    memset(out + count, 0, (size_t)(padded - count) * sizeof *out);
}

/* ---- resampling ---- */

#ifdef HAVE_SOXR

static Status resample(Sound *s, double rate, const char *name) {
    size_t most = (size_t)ceil((double)s->count * SOUND_RATE / rate) + 64, made = 0, used = 0;
    float *out = malloc(most * sizeof *out);
    soxr_quality_spec_t quality = soxr_quality_spec(SOXR_HQ, 0);
    if (!out) FAIL(ERR_IO, "%s: out of memory for its samples", name);
    soxr_error_t error = soxr_oneshot(rate, SOUND_RATE, 1, s->samples, (size_t)s->count, &used, out,
                                      most, &made, NULL, &quality, NULL);
    if (error) {
        free(out);
        FAIL(ERR_FORMAT, "%s: cannot be resampled from %g Hz: %s", name, rate, error);
    }
    free(s->samples);
    s->samples = out;
    s->count = (int64_t)made;
    return OK;
}

#else

static Status resample(Sound *s, double rate, const char *name) {
    (void)s;
    FAIL(ERR_CONFIG,
         "%s: is sampled at %g Hz and this build resamples nothing (libsoxr was not "
         "there when it was built), expected %d Hz",
         name, rate, SOUND_RATE);
}

#endif

/* Samples of the file that are worth reading: the seconds used, and one more for the filter. */
static int64_t samples_wanted(int64_t rate) {
    return (SOUND_MOST / SOUND_RATE + 1) * rate;
}

/* `frames` of interleaved channels to their mean. */
static Status mix(Sound *s, const float *values, int64_t frames, int channels, const char *name) {
    s->samples = malloc((size_t)(frames + 1) * sizeof *s->samples);
    if (!s->samples) FAIL(ERR_IO, "%s: out of memory for its samples", name);
    s->count = frames;
    for (int64_t n = 0; n < frames; n++) {
        float sum = 0;
        for (int c = 0; c < channels; c++) {
            float v = values[n * channels + c];
            sum += isfinite(v) ? v : 0;
        }
        s->samples[n] = sum / (float)channels;
    }
    return OK;
}

/* ---- files ---- */

#ifdef HAVE_SNDFILE

typedef struct Memory {
    const uint8_t *bytes;
    sf_count_t size, at;
} Memory;

static sf_count_t memory_length(void *user) {
    return ((Memory *)user)->size;
}
static sf_count_t memory_seek(sf_count_t offset, int whence, void *user) {
    Memory *m = user;
    sf_count_t at = whence == SEEK_SET   ? offset
                    : whence == SEEK_CUR ? m->at + offset
                                         : m->size + offset;
    m->at = at < 0 ? 0 : at > m->size ? m->size : at;
    return m->at;
}
static sf_count_t memory_read(void *to, sf_count_t n, void *user) {
    Memory *m = user;
    if (n > m->size - m->at) n = m->size - m->at;
    memcpy(to, m->bytes + m->at, (size_t)n);
    m->at += n;
    return n;
}
static sf_count_t memory_write(const void *from, sf_count_t n, void *user) {
    (void)from, (void)n, (void)user;
    return 0;
}
static sf_count_t memory_tell(void *user) {
    return ((Memory *)user)->at;
}

static Status decode(Sound *s, double *rate, const uint8_t *bytes, size_t size, const char *name) {
    SF_VIRTUAL_IO io = {memory_length, memory_seek, memory_read, memory_write, memory_tell};
    SF_INFO info = {0};
    Memory memory = {bytes, (sf_count_t)size, 0};
    SNDFILE *file = sf_open_virtual(&io, SFM_READ, &info, &memory);
    float *values = NULL;
    Status status = OK;
    if (!file) FAIL(ERR_FORMAT, "%s: is no sound that can be read: %s", name, sf_strerror(NULL));
    if (info.channels < 1 || info.channels > PARTS_MAX || info.samplerate < 1 ||
        info.samplerate > RATE_MAX)
        FAIL_DONE(ERR_FORMAT, "%s: %d channels at %d Hz", name, info.channels, info.samplerate);
    int64_t wanted = samples_wanted(info.samplerate);
    values = malloc((size_t)(wanted * info.channels) * sizeof *values);
    if (!values) FAIL_DONE(ERR_IO, "%s: out of memory for its samples", name);
    sf_count_t got = sf_readf_float(file, values, wanted);
    if (got < 0 || (sf_error(file) && !got))
        FAIL_DONE(ERR_FORMAT, "%s: cannot be decoded: %s", name, sf_strerror(file));
    *rate = info.samplerate;
    TRY_DONE(mix(s, values, got, info.channels, name));
done:
    free(values);
    sf_close(file);
    return status;
}

#else

static uint32_t number(const uint8_t *p, int bytes) {
    uint32_t value = 0;
    for (int i = 0; i < bytes; i++) value |= (uint32_t)p[i] << 8 * i;
    return value;
}

/* WAV with samples of 16 bits, without a library. */
static Status decode(Sound *s, double *rate, const uint8_t *bytes, size_t size, const char *name) {
    int channels = 0;
    if (size < 12 || memcmp(bytes, "RIFF", 4) || memcmp(bytes + 8, "WAVE", 4))
        FAIL(ERR_CONFIG,
             "%s: this build reads WAV alone (libsndfile was not there when it was "
             "built)",
             name);
    for (size_t at = 12; at + 8 <= size;) {
        size_t length = number(bytes + at + 4, 4);
        const uint8_t *chunk = bytes + at + 8;
        if (length > size - at - 8) length = size - at - 8;
        if (!memcmp(bytes + at, "fmt ", 4) && length >= 16) {
            channels = (int)number(chunk + 2, 2);
            *rate = number(chunk + 4, 4);
            if (number(chunk, 2) != 1 || number(chunk + 14, 2) != 16 || channels < 1 ||
                channels > PARTS_MAX || *rate < 1 || *rate > RATE_MAX)
                FAIL(ERR_CONFIG, "%s: this build reads WAV of 16 bits alone", name);
        } else if (!memcmp(bytes + at, "data", 4) && channels) {
            int64_t frames = (int64_t)length / (2 * channels),
                    most = samples_wanted((int64_t)*rate);
            if (frames > most) frames = most;
            float *values = malloc((size_t)(frames * channels + 1) * sizeof *values);
            if (!values) FAIL(ERR_IO, "%s: out of memory for its samples", name);
            for (int64_t i = 0; i < frames * channels; i++)
                values[i] = (float)(int16_t)number(chunk + 2 * i, 2) / 32768.0f;
            Status status = mix(s, values, frames, channels, name);
            free(values);
            return status;
        }
        at += 8 + length + (length & 1);
    }
    FAIL(ERR_FORMAT, "%s: a WAV without samples", name);
}

#endif

Status sound_decode(Sound *s, const uint8_t *bytes, size_t size, const char *name) {
    double rate = SOUND_RATE;
    *s = (Sound){0};
    if (!size) FAIL(ERR_FORMAT, "%s: is empty", name);
    Status status = decode(s, &rate, bytes, size, name);
    if (status == OK && s->count && rate != SOUND_RATE) status = resample(s, rate, name);
    if (status != OK) sound_free(s);
    if (s->count > SOUND_MOST) s->count = SOUND_MOST;
    return status;
}

void sound_free(Sound *s) {
    free(s->samples);
    *s = (Sound){0};
}
