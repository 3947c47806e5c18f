/* picture.c - target sizes, resampling, and turning upright. Decoders are in picture_files.c. */
#include "data/picture.h"
#include "data/picture_files.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

Status picture_target(int64_t *to_height, int64_t *to_width, int64_t height, int64_t width,
                      const VisionConfig *c, int64_t soft_tokens, const char *name) {
    int64_t cell = c->pooling_kernel_size, side = c->patch_size * cell;
    double target = (double)(soft_tokens * cell * cell * c->patch_size * c->patch_size);
    double factor = sqrt(target / (double)(height * width));
    int64_t h = (int64_t)floor(factor * (double)height / (double)side) * side;
    int64_t w = (int64_t)floor(factor * (double)width / (double)side) * side;
    int64_t most = soft_tokens * side;
    if (!h && !w)
        FAIL(ERR_FORMAT,
             "%s: a picture of %" PRId64 " x %" PRId64 " has no size of %" PRId64 " soft tokens",
             name, width, height, soft_tokens);
    if (!h) {
        h = side;
        w = width / height * side;
        if (w > most) w = most;
    } else if (!w) {
        w = side;
        h = height / width * side;
        if (h > most) h = most;
    }
    if ((double)h * (double)w > target)
        FAIL(ERR_FORMAT,
             "%s: a picture of %" PRId64 " x %" PRId64 " exceeds %" PRId64 " soft tokens", name,
             width, height, soft_tokens);
    *to_height = h;
    *to_width = w;
    return OK;
}

/* ---- bicubic, as Pillow has it ---- */

#define FRACTION 22 /* bits of the weights behind the point */

/* What one line of output points reads: weights, from `first` on. */
typedef struct Taps {
    int64_t first, count;
    int32_t *weight;
} Taps;

static double cubic(double x) {
    const double a = -0.5;
    x = fabs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

static Taps *taps_make(int64_t in, int64_t out) {
    double scale = (double)in / (double)out, stretch = scale < 1 ? 1 : scale, reach = 2 * stretch;
    int64_t most = (int64_t)ceil(reach) * 2 + 1;
    Taps *taps = must_malloc((size_t)out * sizeof *taps);
    int32_t *weights = must_malloc((size_t)(out * most) * sizeof *weights);
    double *line = must_malloc((size_t)most * sizeof *line);
    for (int64_t x = 0; x < out; x++) {
        double centre = ((double)x + 0.5) * scale, sum = 0, inverse = 1.0 / stretch;
        int64_t first = (int64_t)(centre - reach + 0.5), end = (int64_t)(centre + reach + 0.5);
        if (first < 0) first = 0;
        if (end > in) end = in;
        Taps *t = &taps[x];
        *t = (Taps){first, end - first, weights + x * most};
        for (int64_t i = 0; i < t->count; i++)
            sum += line[i] = cubic(((double)(i + first) - centre + 0.5) * inverse);
        for (int64_t i = 0; i < t->count; i++) {
            double w = (sum != 0 ? line[i] / sum : line[i]) * (1 << FRACTION);
            t->weight[i] = (int32_t)(w < 0 ? w - 0.5 : w + 0.5);
        }
    }
    free(line);
    return taps;
}

static void taps_free(Taps *taps) {
    free(taps[0].weight);
    free(taps);
}

static inline uint8_t rounded(int32_t sum) {
    int32_t value = sum >> FRACTION;
    return (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
}

/* out (rows, to, 3) from in (rows, from, 3). */
static void resize_columns(uint8_t *out, const uint8_t *in, int64_t rows, int64_t from,
                           int64_t to) {
    Taps *taps = taps_make(from, to);
#pragma omp parallel for schedule(static)
    for (int64_t y = 0; y < rows; y++)
        for (int64_t x = 0; x < to; x++) {
            const uint8_t *line = in + (y * from + taps[x].first) * 3;
            int32_t sum[3] = {1 << (FRACTION - 1), 1 << (FRACTION - 1), 1 << (FRACTION - 1)};
            for (int64_t i = 0; i < taps[x].count; i++)
                for (int c = 0; c < 3; c++) sum[c] += taps[x].weight[i] * line[3 * i + c];
            for (int c = 0; c < 3; c++) out[(y * to + x) * 3 + c] = rounded(sum[c]);
        }
    taps_free(taps);
}

/* out (to, bytes) from in (from, bytes). */
static void resize_rows(uint8_t *out, const uint8_t *in, int64_t from, int64_t to, int64_t bytes) {
    Taps *taps = taps_make(from, to);
#pragma omp parallel
    {
        int32_t *sum = must_malloc((size_t)bytes * sizeof *sum);
#pragma omp for schedule(static)
        for (int64_t y = 0; y < to; y++) {
            for (int64_t k = 0; k < bytes; k++) sum[k] = 1 << (FRACTION - 1);
            for (int64_t i = 0; i < taps[y].count; i++) {
                const uint8_t *line = in + (taps[y].first + i) * bytes;
                int32_t weight = taps[y].weight[i];
#pragma omp simd
                for (int64_t k = 0; k < bytes; k++) sum[k] += weight * line[k];
            }
            for (int64_t k = 0; k < bytes; k++) out[y * bytes + k] = rounded(sum[k]);
        }
        free(sum);
    }
    taps_free(taps);
}

/* One pass: columns of every row, or rows. out is new; the same picture where nothing changes. */
static Status resize_pass(Picture *out, const Picture *in, int64_t height, int64_t width) {
    *out = (Picture){height, width, malloc((size_t)(height * width) * 3)};
    if (!out->pixels)
        FAIL(ERR_IO, "out of memory for a picture of %" PRId64 " x %" PRId64, width, height);
    if (width != in->width)
        resize_columns(out->pixels, in->pixels, height, in->width, width);
    else if (height != in->height)
        resize_rows(out->pixels, in->pixels, in->height, height, width * 3);
    else
        memcpy(out->pixels, in->pixels, (size_t)(height * width) * 3);
    return OK;
}

Status picture_resize(Picture *out, const Picture *in, int64_t height, int64_t width) {
    /* Pillow 13 takes rows first where that leaves less to do; older ones always columns. */
    bool rows_first = in->height > height && in->height - height > 2 * (in->width - width);
    Picture between;
    TRY(resize_pass(&between, in, rows_first ? height : in->height,
                    rows_first ? in->width : width));
    Status status = resize_pass(out, &between, height, width);
    picture_free(&between);
    return status;
}

/* ---- files ---- */

/* Where the pixel (y, x) of the upright picture lies in the stored one, by EXIF orientation 1..8.
 */
static const uint8_t *stored_pixel(const Picture *p, int orientation, int64_t y, int64_t x) {
    bool swapped = orientation >= 5;
    int64_t row = swapped ? x : y, column = swapped ? y : x;
    if (orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7)
        row = p->height - 1 - row;
    if (orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8)
        column = p->width - 1 - column;
    return p->pixels + (row * p->width + column) * 3;
}

static void turn_upright(Picture *p, int orientation) {
    if (orientation < 2 || orientation > 8) return;
    bool swapped = orientation >= 5;
    Picture turned = {swapped ? p->width : p->height, swapped ? p->height : p->width, NULL};
    turned.pixels = must_malloc((size_t)(turned.height * turned.width) * 3);
    for (int64_t y = 0; y < turned.height; y++)
        for (int64_t x = 0; x < turned.width; x++)
            memcpy(turned.pixels + (y * turned.width + x) * 3, stored_pixel(p, orientation, y, x),
                   3);
    free(p->pixels);
    *p = turned;
}

Status picture_decode(Picture *p, const uint8_t *bytes, size_t size, const char *name) {
    int orientation = 1;
    *p = (Picture){0};
    Status status = picture_file_decode(p, &orientation, bytes, size, name);
    if (status == OK)
        turn_upright(p, orientation);
    else
        picture_free(p);
    return status;
}

void picture_free(Picture *p) {
    free(p->pixels);
    *p = (Picture){0};
}
