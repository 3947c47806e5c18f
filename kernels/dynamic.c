/* dynamic.c - building the levels: decades 1e-6 .. 1, decade i in 2^i (signed) or 2^(i+1) means of
 * equal steps between 0.1 and 1, and then 0 and 1. */
#include "kernels/dynamic.h"

#include <math.h>
#include <stdlib.h>

#define DECADES 7

static int ascending(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return x < y ? -1 : x > y;
}

/* Step i of n from 0.1 to 1, in f32 from the nearer end: how torch.linspace computes it. */
static float boundary(int i, int n) {
    float step = (1.0f - 0.1f) / (float)n;
    return i < (n + 1) / 2 ? fmaf(step, (float)i, 0.1f) : fmaf(-step, (float)(n - i), 1.0f);
}

static void build(float levels[256], bool is_signed) {
    int count = 0;
    for (int i = 0; i < DECADES; i++) {
        int n = 1 << (is_signed ? i : i + 1);
        float decade = (float)pow(10, i - (DECADES - 1));
        for (int k = 0; k < n; k++) {
            float mean = (boundary(k, n) + boundary(k + 1, n)) / 2.0f;
            levels[count++] = decade * mean;
            if (is_signed) levels[count++] = -decade * mean;
        }
    }
    levels[count++] = 0;
    levels[count++] = 1;
    qsort(levels, 256, sizeof *levels, ascending);
}

/* A table of levels, and for every leading 15 bits of a float (sign, exponent, 6 bits of the
 * significand) the highest level that no such float lies below: from there a few steps up find the
 * level of any. */
typedef struct Table {
    float levels[256];
    uint8_t start[1 << 15];
} Table;

static float from_bits(uint32_t bits) {
    union {
        uint32_t u;
        float f;
    } value = {bits};
    return value.f;
}

static void build_table(Table *t, bool is_signed) {
    build(t->levels, is_signed);
    for (uint32_t lead = 0; lead < 1 << 15; lead++) {
        bool negative = lead >> 14;
        float least = from_bits(lead << 17 | (negative ? 0x1ffffu : 0));
        int level = 0;
        while (level < 255 && t->levels[level + 1] <= least) level++; /* NaN stays at 0 */
        t->start[lead] = (uint8_t)level;
    }
}

static Table tables[2];

const float *dynamic_levels(bool is_signed) {
    static int ready;
    if (!__atomic_load_n(&ready, __ATOMIC_ACQUIRE)) {
#pragma omp critical(dynamic_levels)
        if (!__atomic_load_n(&ready, __ATOMIC_ACQUIRE)) {
            build_table(&tables[0], false);
            build_table(&tables[1], true);
            __atomic_store_n(&ready, 1, __ATOMIC_RELEASE);
        }
    }
    return tables[is_signed].levels;
}

uint8_t dynamic_code(const float *levels, float x) {
    if (!(x > levels[0])) return 0;
    if (x >= levels[255]) return 255;
    union {
        float f;
        uint32_t u;
    } bits = {x};
    int low = tables[levels == tables[1].levels].start[bits.u >> 17];
    while (levels[low + 1] <= x) low++;
    return (uint8_t)(levels[low + 1] - x < x - levels[low] ? low + 1 : low);
}

uint8_t dynamic_code_grid(const float *levels, float x) {
    int point = (int)((x + 1.0f) * 32767.5f + 0.5f);
    return dynamic_code(levels, -1.0f + (float)point * (2.0f / 65535.0f));
}
