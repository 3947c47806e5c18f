/* picture_files.c - JPEG, PNG, WebP and PPM to red, green and blue. Which of them a build reads is
 * decided where it is built (HAVE_JPEG, HAVE_PNG, HAVE_WEBP); PPM always. */
#include "data/picture_files.h"
#include "formats/file.h"

#include <ctype.h>
#include <inttypes.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>

#ifdef HAVE_JPEG
#include <stdio.h>

#include <jpeglib.h>
#endif
#ifdef HAVE_PNG
#include <png.h>
#endif
#ifdef HAVE_WEBP
#include <webp/decode.h>
#include <webp/demux.h>
#endif

/* Takes the pixels' memory, once the size is known to be sane. */
static Status take_pixels(Picture *p, int64_t width, int64_t height, const char *name) {
    if (width < 1 || height < 1)
        FAIL(ERR_FORMAT, "%s: a picture of %" PRId64 " x %" PRId64 " pixels", name, width, height);
    if (width > PICTURE_PIXELS_MAX || height > PICTURE_PIXELS_MAX / width)
        FAIL(ERR_FORMAT, "%s: a picture of %" PRId64 " x %" PRId64 " pixels, expected %d at most",
             name, width, height, PICTURE_PIXELS_MAX);
    p->width = width;
    p->height = height;
    p->pixels = malloc((size_t)(width * height) * 3);
    if (!p->pixels) FAIL(ERR_IO, "%s: out of memory for its pixels", name);
    return OK;
}

/* ---- EXIF ---- */

typedef struct Exif {
    const uint8_t *bytes;
    size_t size;
    bool big; /* endian */
} Exif;

static uint32_t exif_number(const Exif *e, size_t at, int bytes) {
    uint32_t value = 0;
    if (at > e->size || e->size - at < (size_t)bytes) return 0;
    for (int i = 0; i < bytes; i++)
        value |= (uint32_t)e->bytes[at + (size_t)i] << 8 * (e->big ? bytes - 1 - i : i);
    return value;
}

/* Tag 0x0112 of the first directory of a TIFF header; 1 where there is none. */
static int exif_orientation(const uint8_t *bytes, size_t size) {
    if (size >= 6 && !memcmp(bytes, "Exif\0\0", 6)) bytes += 6, size -= 6;
    if (size < 8 || (memcmp(bytes, "II", 2) && memcmp(bytes, "MM", 2))) return 1;
    Exif e = {bytes, size, bytes[0] == 'M'};
    size_t at = exif_number(&e, 4, 4);
    uint32_t count = exif_number(&e, at, 2);
    for (uint32_t i = 0; i < count && at + 2 + 12 * (size_t)(i + 1) <= size; i++) {
        size_t entry = at + 2 + 12 * (size_t)i;
        if (exif_number(&e, entry, 2) != 0x0112) continue;
        uint32_t value = exif_number(&e, entry + 8, 2);
        return value >= 1 && value <= 8 ? (int)value : 1;
    }
    return 1;
}

/* ---- JPEG ---- */

#ifdef HAVE_JPEG

typedef struct JpegReader {
    struct jpeg_decompress_struct info;
    struct jpeg_error_mgr errors;
    jmp_buf out;
    char message[JMSG_LENGTH_MAX];
    bool ended;    /* before the picture was whole */
    uint8_t *line; /* of inks */
} JpegReader;

static void jpeg_fails(j_common_ptr info) {
    JpegReader *r = (JpegReader *)info->client_data;
    info->err->format_message(info, r->message);
    longjmp(r->out, 1);
}

static void jpeg_warns(j_common_ptr info, int level) {
    JpegReader *r = (JpegReader *)info->client_data;
    char text[JMSG_LENGTH_MAX];
    if (level >= 0) return;
    info->err->format_message(info, text);
    if (strstr(text, "Premature end")) r->ended = true;
}

/* Adobe writes its inks inverted, so what is stored is what is left of the light. */
static void from_inks(uint8_t *rgb, const uint8_t *cmyk, int64_t n, bool inverted) {
    for (int64_t i = 0; i < n; i++) {
        int black = inverted ? cmyk[4 * i + 3] : 255 - cmyk[4 * i + 3];
        for (int c = 0; c < 3; c++) {
            int ink = inverted ? cmyk[4 * i + c] : 255 - cmyk[4 * i + c];
            rgb[3 * i + c] = (uint8_t)((ink * black + 127) / 255);
        }
    }
}

static Status jpeg_rows(JpegReader *r, Picture *p, int *orientation, const char *name) {
    struct jpeg_decompress_struct *info = &r->info;
    for (jpeg_saved_marker_ptr m = info->marker_list; m; m = m->next)
        if (m->data_length >= 6 && !memcmp(m->data, "Exif\0\0", 6))
            *orientation = exif_orientation(m->data, m->data_length);
    bool inks = info->jpeg_color_space == JCS_CMYK || info->jpeg_color_space == JCS_YCCK;
    info->out_color_space = inks ? JCS_CMYK : JCS_RGB;
    TRY(take_pixels(p, info->image_width, info->image_height, name));
    jpeg_start_decompress(info);
    if (inks) r->line = must_malloc((size_t)p->width * 4);
    while (info->output_scanline < info->output_height) {
        uint8_t *row = p->pixels + (size_t)info->output_scanline * (size_t)p->width * 3;
        uint8_t *to = inks ? r->line : row;
        jpeg_read_scanlines(info, &to, 1);
        if (inks) from_inks(row, to, p->width, info->saw_Adobe_marker);
    }
    jpeg_finish_decompress(info);
    if (r->ended) FAIL(ERR_FORMAT, "%s: the JPEG ends before its last row", name);
    return OK;
}

static Status decode_jpeg(Picture *p, int *orientation, const uint8_t *bytes, size_t size,
                          const char *name) {
    JpegReader *r = must_calloc(1, sizeof *r);
    Status status;
    r->info.err = jpeg_std_error(&r->errors);
    r->errors.error_exit = jpeg_fails;
    r->errors.emit_message = jpeg_warns;
    r->info.client_data = r;
    if (setjmp(r->out)) {
        status = status_fail(ERR_FORMAT, "%s: %s", name, r->message);
    } else {
        jpeg_create_decompress(&r->info);
        jpeg_mem_src(&r->info, bytes, (unsigned long)size);
        jpeg_save_markers(&r->info, JPEG_APP0 + 1, 0xffff);
        jpeg_read_header(&r->info, TRUE);
        status = jpeg_rows(r, p, orientation, name);
    }
    jpeg_destroy_decompress(&r->info);
    free(r->line);
    free(r);
    return status;
}

#endif

/* ---- PNG ---- */

#ifdef HAVE_PNG

typedef struct PngReader {
    png_structp png;
    png_infop info;
    const uint8_t *bytes;
    size_t size, at;
    char message[200];
    png_bytep *rows;
} PngReader;

static void png_fails(png_structp png, png_const_charp text) {
    PngReader *r = png_get_error_ptr(png);
    snprintf(r->message, sizeof r->message, "%s", text);
    longjmp(png_jmpbuf(png), 1);
}

static void png_warns(png_structp png, png_const_charp text) {
    (void)png, (void)text;
}

static void png_takes(png_structp png, png_bytep to, size_t n) {
    PngReader *r = png_get_io_ptr(png);
    if (n > r->size - r->at) png_error(png, "the file ends early");
    memcpy(to, r->bytes + r->at, n);
    r->at += n;
}

static Status png_rows(PngReader *r, Picture *p, int *orientation, const char *name) {
    png_read_info(r->png, r->info);
    TRY(take_pixels(p, png_get_image_width(r->png, r->info), png_get_image_height(r->png, r->info),
                    name));
    png_set_strip_16(r->png);
    png_set_expand(r->png);
    png_set_strip_alpha(r->png);
    png_set_gray_to_rgb(r->png);
    png_set_interlace_handling(r->png);
    png_read_update_info(r->png, r->info);
    if (png_get_rowbytes(r->png, r->info) != (size_t)p->width * 3)
        FAIL(ERR_FORMAT, "%s: a PNG of an unknown kind", name);
    r->rows = must_malloc((size_t)p->height * sizeof *r->rows);
    for (int64_t y = 0; y < p->height; y++) r->rows[y] = p->pixels + y * p->width * 3;
    png_read_image(r->png, r->rows);
    png_read_end(r->png, r->info);
    png_uint_32 size = 0;
    png_bytep exif = NULL;
    if (png_get_eXIf_1(r->png, r->info, &size, &exif)) *orientation = exif_orientation(exif, size);
    return OK;
}

static Status decode_png(Picture *p, int *orientation, const uint8_t *bytes, size_t size,
                         const char *name) {
    PngReader *r = must_calloc(1, sizeof *r);
    Status status;
    r->bytes = bytes;
    r->size = size;
    r->png = png_create_read_struct(PNG_LIBPNG_VER_STRING, r, png_fails, png_warns);
    if (r->png) r->info = png_create_info_struct(r->png);
    if (!r->info) {
        status = status_fail(ERR_IO, "%s: out of memory", name);
    } else if (setjmp(png_jmpbuf(r->png))) {
        status = status_fail(ERR_FORMAT, "%s: %s", name, r->message);
    } else {
        png_set_user_limits(r->png, PICTURE_PIXELS_MAX, PICTURE_PIXELS_MAX);
        png_set_read_fn(r->png, r, png_takes);
        status = png_rows(r, p, orientation, name);
    }
    png_destroy_read_struct(&r->png, &r->info, NULL);
    free(r->rows);
    free(r);
    return status;
}

Status picture_write(const Picture *p, const char *path) {
    png_image image = {.version = PNG_IMAGE_VERSION,
                       .width = (png_uint_32)p->width,
                       .height = (png_uint_32)p->height,
                       .format = PNG_FORMAT_RGB};
    png_alloc_size_t size = PNG_IMAGE_PNG_SIZE_MAX(image);
    void *bytes = malloc(size);
    if (!bytes || !png_image_write_to_memory(&image, bytes, &size, 0, p->pixels, 0, NULL)) {
        free(bytes);
        FAIL(ERR_IO, "%s: cannot be encoded: %s", path, bytes ? image.message : "out of memory");
    }
    Status status = file_write(path, bytes, size);
    free(bytes);
    return status;
}

#else

Status picture_write(const Picture *p, const char *path) {
    (void)p;
    FAIL(ERR_CONFIG, "%s: this build writes no PNG: libpng was not there when it was built", path);
}

#endif

/* ---- WebP ---- */

#ifdef HAVE_WEBP

static void webp_exif(const WebPData *data, int *orientation) {
    WebPDemuxer *demux = WebPDemux(data);
    WebPChunkIterator chunk;
    if (demux && WebPDemuxGetChunk(demux, "EXIF", 1, &chunk)) {
        *orientation = exif_orientation(chunk.chunk.bytes, chunk.chunk.size);
        WebPDemuxReleaseChunkIterator(&chunk);
    }
    WebPDemuxDelete(demux);
}

static Status first_frame(Picture *p, const WebPData *data, const char *name) {
    WebPAnimDecoder *decoder = WebPAnimDecoderNew(data, NULL);
    uint8_t *rgba = NULL;
    int time;
    bool done = decoder && WebPAnimDecoderGetNext(decoder, &rgba, &time);
    for (int64_t i = 0; done && i < p->width * p->height; i++)
        memcpy(p->pixels + 3 * i, rgba + 4 * i, 3);
    WebPAnimDecoderDelete(decoder);
    if (!done) FAIL(ERR_FORMAT, "%s: the WebP's first frame cannot be decoded", name);
    return OK;
}

static Status decode_webp(Picture *p, int *orientation, const uint8_t *bytes, size_t size,
                          const char *name) {
    WebPBitstreamFeatures features;
    WebPData data = {bytes, size};
    if (WebPGetFeatures(bytes, size, &features) != VP8_STATUS_OK)
        FAIL(ERR_FORMAT, "%s: a WebP without a readable header", name);
    TRY(take_pixels(p, features.width, features.height, name));
    webp_exif(&data, orientation);
    if (features.has_animation) return first_frame(p, &data, name);
    if (!WebPDecodeRGBInto(bytes, size, p->pixels, (size_t)(p->width * p->height) * 3,
                           (int)p->width * 3))
        FAIL(ERR_FORMAT, "%s: the WebP is broken or ends early", name);
    return OK;
}

#endif

/* ---- PPM ---- */

/* The next number of a PPM header; comments run from # to the line's end. */
static bool ppm_number(const uint8_t *bytes, size_t size, size_t *at, int64_t *value) {
    while (*at < size && (isspace(bytes[*at]) || bytes[*at] == '#'))
        if (bytes[(*at)++] == '#')
            while (*at < size && bytes[*at] != '\n') ++*at;
    *value = 0;
    size_t first = *at;
    while (*at < size && isdigit(bytes[*at]) && *value < 1 << 30)
        *value = 10 * *value + bytes[(*at)++] - '0';
    return *at > first;
}

static Status decode_ppm(Picture *p, const uint8_t *bytes, size_t size, const char *name) {
    size_t at = 2;
    int64_t width, height, most;
    if (!ppm_number(bytes, size, &at, &width) || !ppm_number(bytes, size, &at, &height) ||
        !ppm_number(bytes, size, &at, &most) || most != 255 || at >= size)
        FAIL(ERR_FORMAT, "%s: a PPM header is three numbers, the last 255", name);
    TRY(take_pixels(p, width, height, name));
    size_t needed = (size_t)(width * height) * 3;
    if (size - at - 1 < needed) FAIL(ERR_FORMAT, "%s: the PPM ends before its last row", name);
    memcpy(p->pixels, bytes + at + 1, needed);
    return OK;
}

/* ---- which is which ---- */

Status picture_file_decode(Picture *p, int *orientation, const uint8_t *bytes, size_t size,
                           const char *name) {
    const char *kind = NULL;
    *orientation = 1;
    if (!size) FAIL(ERR_FORMAT, "%s: is empty", name);
    if (size > 2 && !memcmp(bytes, "P6", 2)) return decode_ppm(p, bytes, size, name);
    if (size > 3 && !memcmp(bytes, "\xff\xd8\xff", 3)) kind = "JPEG";
    if (size > 8 && !memcmp(bytes, "\x89PNG\r\n\x1a\n", 8)) kind = "PNG";
    if (size > 12 && !memcmp(bytes, "RIFF", 4) && !memcmp(bytes + 8, "WEBP", 4)) kind = "WebP";
    if (!kind) FAIL(ERR_FORMAT, "%s: is no picture, expected JPEG, PNG, WebP or PPM", name);
#ifdef HAVE_JPEG
    if (!strcmp(kind, "JPEG")) return decode_jpeg(p, orientation, bytes, size, name);
#endif
#ifdef HAVE_PNG
    if (!strcmp(kind, "PNG")) return decode_png(p, orientation, bytes, size, name);
#endif
#ifdef HAVE_WEBP
    if (!strcmp(kind, "WebP")) return decode_webp(p, orientation, bytes, size, name);
#endif
    FAIL(ERR_CONFIG, "%s: this build reads no %s: its library was not there when it was built",
         name, kind);
}
