/* heads.c - a head at a time in f32. */
#include "kernels/heads.h"
#include "kernels/cpu/cpu.h"

#define HEAD_MOST 4096

static void head_row(const HeadSet *set, int64_t n, const float *weight, const float *c,
                     const float *s, float eps) {
    int64_t heads = set->x.shape[1], C = set->x.shape[2];
    int64_t to = set->rows.data ? ((const int32_t *)set->rows.data)[n] : n;
    float buffer[HEAD_MOST], out[HEAD_MOST];
    for (int64_t h = 0; h < heads; h++) {
        const float *row = load_f32(buffer, set->x, (n * heads + h) * C, C);
        float r = 1.0f / sqrtf(dot(row, row, C) / (float)C + eps);
        if (set->rstd.data) ((float *)set->rstd.data)[n * heads + h] = r;
        scale_row(out, row, r, weight, C);
        if (set->turns) {
            round_to(set->x.dtype, out, C);
            turn_row(buffer, out, c, s, C / 2, 1);
        }
        store_f32(set->y, (to * heads + h) * C, C, set->turns ? buffer : out);
    }
}

static void head_row_back(const HeadGradient *set, int64_t n, const float *weight, const float *c,
                          const float *s) {
    int64_t heads = set->x.shape[1], C = set->x.shape[2];
    float own[HEAD_MOST], dy[HEAD_MOST], g[HEAD_MOST];
    for (int64_t h = 0; h < heads; h++) {
        int64_t at = (n * heads + h) * C;
        const float *x = load_f32(own, set->x, at, C), *d = load_f32(dy, set->dy, at, C);
        const float *also = set->also.data ? (const float *)set->also.data + at : NULL;
        float r = ((const float *)set->rstd.data)[n * heads + h];
        if (set->turns)
            turn_row(g, d, c, s, C / 2, -1);
        else
            memcpy(g, d, (size_t)C * sizeof *g);
        for (int64_t i = 0; i < C; i++)
            g[i] = g[i] * (weight ? weight[i] : 1) + (also ? also[i] : 0);
        float mean = dot(g, x, C) / (float)C * r * r;
        for (int64_t i = 0; i < C; i++) g[i] = r * (g[i] - x[i] * mean);
        store_f32(set->dx, at, C, g);
    }
}

/* A weight in f32, into `buffer` where it is not; NULL where there is none. */
static const float *load_weight(float *buffer, Tensor weight, int64_t C) {
    CHECK(C <= HEAD_MOST, "heads of %lld", (long long)C);
    return weight.data ? load_f32(buffer, weight, 0, C) : NULL;
}

void CPU(heads_forward)(const HeadSet *sets, int count, Tensor cos_table, Tensor sin_table,
                        float eps) {
    int64_t N = sets->x.shape[0], half = sets->x.shape[2] / 2;
    float buffers[HEAD_SETS][HEAD_MOST];
    const float *weight[HEAD_SETS];
    for (int i = 0; i < count; i++) weight[i] = load_weight(buffers[i], sets[i].weight, 2 * half);
#pragma omp parallel for schedule(static) if (N > 4)
    for (int64_t n = 0; n < N; n++)
        for (int i = 0; i < count; i++)
            head_row(&sets[i], n, weight[i], (const float *)cos_table.data + n * half,
                     (const float *)sin_table.data + n * half, eps);
}

void CPU(heads_backward)(const HeadGradient *sets, int count, Tensor cos_table, Tensor sin_table) {
    int64_t N = sets->x.shape[0], half = sets->x.shape[2] / 2;
    float buffers[HEAD_SETS][HEAD_MOST];
    const float *weight[HEAD_SETS];
    for (int i = 0; i < count; i++) weight[i] = load_weight(buffers[i], sets[i].weight, 2 * half);
#pragma omp parallel for schedule(static) if (N > 4)
    for (int64_t n = 0; n < N; n++)
        for (int i = 0; i < count; i++)
            head_row_back(&sets[i], n, weight[i], (const float *)cos_table.data + n * half,
                          (const float *)sin_table.data + n * half);
}
