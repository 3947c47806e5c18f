/* metrics.c - plain sums in the harness's order. */
#include "eval/metrics.h"
#include "eval/mersenne.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static double deviation(const double *values, int64_t n) {
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < n; i++) sum += values[i];
    double mean = sum / (double)n;
    for (int64_t i = 0; i < n; i++) squares += (values[i] - mean) * (values[i] - mean);
    return sqrt(squares / (double)(n - 1));
}

Estimate estimate_mean(const double *values, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += values[i];
    return (Estimate){n ? sum / (double)n : NAN,
                      n > 1 ? deviation(values, n) / sqrt((double)n) : NAN, n};
}

Estimate estimate_group(const Estimate *parts, int64_t count, bool weighted) {
    double sum = 0, variance = 0;
    int64_t n = 0;
    for (int64_t i = 0; i < count; i++) {
        double size = (double)parts[i].n, square = parts[i].stderr_ * parts[i].stderr_;
        n += parts[i].n;
        sum += weighted ? parts[i].mean * size : parts[i].mean;
        variance += weighted ? (size - 1) * square * size : square;
    }
    if (!weighted) return (Estimate){sum / (double)count, sqrt(variance) / (double)count, n};
    return (Estimate){sum / (double)n, sqrt(variance / (double)(n - count) / (double)n), n};
}

void wilson_interval(double share, int64_t n, double *low, double *high) {
    double z = 1.959963984540054, size = (double)n;
    double middle = share + z * z / (2 * size), width;
    width = z * sqrt(share * (1 - share) / size + z * z / (4 * size * size));
    *low = (middle - width) / (1 + z * z / size);
    *high = (middle + width) / (1 + z * z / size);
}

double bootstrap_error(Statistic *statistic, const double *values, int64_t n, int64_t iterations) {
    int64_t block = iterations < 1000 ? iterations : 1000, blocks = iterations / block;
    double *results = must_malloc((size_t)(block * blocks) * sizeof *results),
           *drawn = must_malloc((size_t)n * sizeof *drawn);
    int64_t *picked = must_malloc((size_t)n * sizeof *picked);
    for (int64_t i = 0; i < blocks; i++) {
        Mersenne m;
        mersenne_seed(&m, (uint64_t)i);
        for (int64_t j = 0; j < block; j++) {
            mersenne_choices(&m, picked, n, n);
            for (int64_t k = 0; k < n; k++) drawn[k] = values[picked[k]];
            results[i * block + j] = statistic(drawn, n);
        }
    }
    double error = deviation(results, block * blocks);
    free(results);
    free(drawn);
    free(picked);
    return error;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

double median_of(const double *values, int64_t n) {
    double *sorted = must_malloc((size_t)n * sizeof *sorted);
    memcpy(sorted, values, (size_t)n * sizeof *sorted);
    qsort(sorted, (size_t)n, sizeof *sorted, by_value);
    double median = n % 2 ? sorted[n / 2] : (sorted[n / 2 - 1] + sorted[n / 2]) / 2;
    free(sorted);
    return median;
}

double pass_at_k(int64_t n, int64_t c, int64_t k) {
    double none = 1;
    if (n - c < k) return 1;
    for (int64_t i = n - c + 1; i <= n; i++) none *= 1 - (double)k / (double)i;
    return 1 - none;
}

int64_t majority_vote(const Slice *answers, int64_t n) {
    int64_t best = 0, most = 0;
    for (int64_t i = 0; i < n; i++) {
        int64_t votes = 0;
        for (int64_t j = 0; j < n; j++)
            votes += answers[i].size == answers[j].size &&
                     !memcmp(answers[i].bytes, answers[j].bytes, answers[i].size);
        if (votes > most) best = i, most = votes;
    }
    return best;
}

static int64_t characters(Slice s) {
    int64_t count = 0;
    for (size_t i = 0; i < s.size; i++) count += (s.bytes[i] & 0xc0) != 0x80;
    return count;
}

Choosing choose(const double *lls, const Slice *choices, int64_t n) {
    Choosing best = {0, 0, 0};
#define BETTER(field, length)                                                                      \
    if (lls[i] / (double)length(choices[i]) >                                                      \
        lls[best.field] / (double)length(choices[best.field]))                                     \
    best.field = i
#define BYTES(slice) (slice).size
    for (int64_t i = 1; i < n; i++) {
        if (lls[i] > lls[best.by_sum]) best.by_sum = i;
        BETTER(by_characters, characters);
        BETTER(by_bytes, BYTES);
    }
    return best;
}

int64_t count_words(Slice text) {
    int64_t pieces = 1;
    bool space = false;
    uint32_t point;
    for (size_t i = 0; i < text.size;) {
        int size = utf8_next(text.bytes + i, text.size - i, &point);
        if (!size) size = 1, point = 0xfffd;
        bool now = slice_strip((Slice){text.bytes + i, (size_t)size}).size == 0;
        pieces += now && !space;
        space = now;
        i += (size_t)size;
    }
    return pieces;
}

int64_t rolling_window(Window *w, int64_t i, int64_t n, int64_t most, int64_t context) {
    int64_t first = most < n ? most : n, step = most - context + 1;
    if (i == 0) {
        *w = (Window){0, first, 1}; /* after the prefix token, and what it predicts itself */
    } else {
        int64_t begin = first + (i - 1) * step;
        int64_t count = n - begin < step ? n - begin : step;
        *w = (Window){begin, count, most + 1 - count};
        if (count <= 0) w->count = 0;
    }
    return w->count;
}
