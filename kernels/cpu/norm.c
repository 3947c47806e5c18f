/* norm.c - norms, a row at a time in f32. */
#include "kernels/norm.h"
#include "kernels/cpu/cpu.h"
#include "kernels/elementwise.h"

#define COLS_MAX 32768

void CPU(rmsnorm_forward)(Tensor y, Tensor rstd, Tensor x, Tensor weight, Tensor residual,
                          float eps) {
    int64_t D = tensor_cols(x), N = tensor_rows(x);
#pragma omp parallel if (N * D > 16384)
    {
        float weights[COLS_MAX], buffer[COLS_MAX], other[COLS_MAX];
        const float *w = weight.data ? load_f32(weights, weight, 0, D) : NULL;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++) {
            const float *row = load_f32(buffer, x, n * D, D);
            float r = 1.0f / sqrtf(dot(row, row, D) / (float)D + eps);
            if (rstd.data) ((float *)rstd.data)[n] = r;
            scale_row(buffer, row, r, w, D);
            if (residual.data) {
                const float *base = load_f32(other, residual, n * D, D);
                round_to(x.dtype, buffer, D);
#pragma omp simd
                for (int64_t i = 0; i < D; i++) buffer[i] += base[i];
            }
            store_f32(y, n * D, D, buffer);
        }
    }
}

static void make_next(const NextNorm *next, Tensor y, float eps) {
    if (next->y.data)
        CPU(rmsnorm_forward)(next->y, next->rstd, y, next->weight, tensor_absent(), eps);
}

void CPU(rmsnorm_pair)(Tensor y, Tensor rstd, Tensor x, Tensor weight, Tensor residual, float scale,
                       const NextNorm *next, float eps) {
    CPU(rmsnorm_forward)(y, rstd, x, weight, residual, eps);
    if (scale != 1.0f) CPU(scale_copy)(y, SET, y, scale);
    make_next(next, y, eps);
}

void CPU(rmsnorm_apply)(Tensor y, Tensor rstd, Tensor x, Tensor weight) {
    int64_t D = tensor_cols(x), N = tensor_rows(x);
#pragma omp parallel if (N * D > 16384)
    {
        float weights[COLS_MAX], buffer[COLS_MAX];
        const float *w = weight.data ? load_f32(weights, weight, 0, D) : NULL;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++) {
            const float *row = load_f32(buffer, x, n * D, D);
            scale_row(buffer, row, ((const float *)rstd.data)[n], w, D);
            store_f32(y, n * D, D, buffer);
        }
    }
}

void CPU(rmsnorm_backward)(Tensor dx, Write write, Tensor dweight, Tensor dy, Tensor x, Tensor rstd,
                           Tensor weight) {
    int64_t D = tensor_cols(x), N = tensor_rows(x);
    const float *r = rstd.data;
    /* dweight first: it reads dy, which dx may overwrite. Columns are split, rows go in order. */
    if (dweight.data) {
        float *out = dweight.data;
#pragma omp parallel for schedule(static)
        for (int64_t first = 0; first < D; first += CHUNK) {
            int64_t n_cols = D - first < CHUNK ? D - first : CHUNK;
            float a[CHUNK], b[CHUNK];
            for (int64_t n = 0; n < N; n++) {
                const float *g = load_f32(a, dy, n * D + first, n_cols);
                const float *row = load_f32(b, x, n * D + first, n_cols);
#pragma omp simd
                for (int64_t i = 0; i < n_cols; i++) out[first + i] += g[i] * (row[i] * r[n]);
            }
        }
    }
    if (!dx.data) return;
#pragma omp parallel if (N * D > 16384)
    {
        float weights[COLS_MAX], a[COLS_MAX], b[COLS_MAX], c[COLS_MAX];
        const float *w = weight.data ? load_f32(weights, weight, 0, D) : NULL;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++) {
            const float *g = load_f32(a, dy, n * D, D), *row = load_f32(b, x, n * D, D);
            if (w) {
#pragma omp simd
                for (int64_t i = 0; i < D; i++) a[i] = g[i] * w[i];
                g = a;
            }
            float mean = dot(g, row, D) / (float)D * r[n] * r[n];
            if (write == ADD) {
                const float *old = load_f32(c, dx, n * D, D);
#pragma omp simd
                for (int64_t i = 0; i < D; i++) c[i] = old[i] + r[n] * (g[i] - row[i] * mean);
            } else {
#pragma omp simd
                for (int64_t i = 0; i < D; i++) c[i] = r[n] * (g[i] - row[i] * mean);
            }
            store_f32(dx, n * D, D, c);
        }
    }
}

void CPU(rmsnorm_forward_several)(const Tensor *y, Tensor rstd, Tensor x, const NormWeight *weight,
                                  int count, float eps) {
    for (int i = 0; i < count; i++) {
        const NormWeight *w = &weight[i];
        CPU(rmsnorm_forward)
        (y[i], rstd, x, w->factor ? tensor_absent() : w->weight, tensor_absent(), eps);
        if (w->factor) CPU(scale_columns)(y[i], SET, y[i], w->weight, w->factor);
    }
}

void CPU(rmsnorm_backward_several)(Tensor dx, Write write, const Tensor *dy, Tensor x, Tensor rstd,
                                   const NormWeight *weight, int count) {
    int64_t D = tensor_cols(x);
    float scaled[COLS_MAX], buffer[COLS_MAX];
    for (int i = 0; i < count; i++) {
        Tensor w = weight[i].weight;
        if (weight[i].factor) {
            const float *own = load_f32(buffer, w, 0, D);
            for (int64_t d = 0; d < D; d++) scaled[d] = weight[i].factor * own[d];
            w = TENSOR(scaled, F32, D);
        }
        CPU(rmsnorm_backward)(dx, i ? ADD : write, tensor_absent(), dy[i], x, rstd, w);
    }
}

/* out <- the join of row n, in the places of buffer; r of both branches given or made. */
static void join_row(const NormJoin *j, float *out, float *buffer, const float *const *weights,
                     float *r, int64_t n, bool given, float eps) {
    int64_t D = tensor_cols(j->x[0]);
    for (int i = 0; i < 2; i++) {
        const float *row = load_f32(buffer, j->x[i], n * D, D);
        if (!given) r[i] = 1.0f / sqrtf(dot(row, row, D) / (float)D + eps);
        scale_row(buffer, row, r[i], weights[i], D);
        round_to(j->x[0].dtype, buffer, D);
        if (!i) memcpy(out, buffer, (size_t)D * sizeof *out);
    }
#pragma omp simd
    for (int64_t d = 0; d < D; d++) out[d] += buffer[d];
    round_to(j->x[0].dtype, out, D);
}

void CPU(rmsnorm_join)(Tensor y, const NormJoin *j, Tensor residual, float scale,
                       const NextNorm *next, float eps) {
    int64_t D = tensor_cols(y), N = tensor_rows(y);
#pragma omp parallel if (N * D > 16384)
    {
        float copies[3][COLS_MAX], fed[COLS_MAX], buffer[COLS_MAX], other[COLS_MAX], own[3];
        const float *weights[3];
        for (int i = 0; i < 3; i++) weights[i] = load_f32(copies[i], j->weight[i], 0, D);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++) {
            join_row(j, fed, buffer, weights, own, n, false, eps);
            own[2] = 1.0f / sqrtf(dot(fed, fed, D) / (float)D + eps);
            for (int i = 0; j->rstd.data && i < 3; i++) ((float *)j->rstd.data)[i * N + n] = own[i];
            scale_row(buffer, fed, own[2], weights[2], D);
            round_to(y.dtype, buffer, D);
            const float *base = load_f32(other, residual, n * D, D);
#pragma omp simd
            for (int64_t d = 0; d < D; d++) buffer[d] += base[d];
            if (scale != 1.0f) {
                round_to(y.dtype, buffer, D);
#pragma omp simd
                for (int64_t d = 0; d < D; d++) buffer[d] *= scale;
            }
            store_f32(y, n * D, D, buffer);
        }
    }
    make_next(next, y, eps);
}

/* r (g - row mean(g row) r^2), with g = dy weight. */
static void norm_back(float *out, const float *dy, const float *row, const float *weight, float r,
                      int64_t D) {
#pragma omp simd
    for (int64_t d = 0; d < D; d++) out[d] = dy[d] * weight[d];
    float mean = dot(out, row, D) / (float)D * r * r;
#pragma omp simd
    for (int64_t d = 0; d < D; d++) out[d] = r * (out[d] - row[d] * mean);
}

void CPU(rmsnorm_join_backward)(const Tensor *dx, Tensor dresidual, Tensor fed, Tensor dfed,
                                Tensor dy, const NormJoin *j, float scale) {
    int64_t D = tensor_cols(dy), N = tensor_rows(dy);
    const float *rstd = j->rstd.data;
#pragma omp parallel if (N * D > 16384)
    {
        float copies[3][COLS_MAX], sum[COLS_MAX], g[COLS_MAX], buffer[COLS_MAX], out[COLS_MAX];
        const float *weights[3];
        for (int i = 0; i < 3; i++) weights[i] = load_f32(copies[i], j->weight[i], 0, D);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++) {
            float r[] = {rstd[n], rstd[N + n], rstd[2 * N + n]};
            const float *given = load_f32(buffer, dy, n * D, D);
#pragma omp simd
            for (int64_t d = 0; d < D; d++) g[d] = scale * given[d];
            round_to(dy.dtype, g, D);
            store_f32(dresidual, n * D, D, g);
            join_row(j, sum, buffer, weights, r, n, true, 0);
            if (fed.data) store_f32(fed, n * D, D, sum);
            norm_back(out, g, sum, weights[2], r[2], D);
            round_to(dy.dtype, out, D);
            if (dfed.data) store_f32(dfed, n * D, D, out);
            for (int i = 0; i < 2; i++) {
                norm_back(g, out, load_f32(buffer, j->x[i], n * D, D), weights[i], r[i], D);
                store_f32(dx[i], n * D, D, g);
            }
        }
    }
}

void CPU(layernorm_forward)(Tensor y, Tensor mean, Tensor rstd, Tensor x, Tensor weight,
                            Tensor bias, float eps) {
    int64_t D = tensor_cols(x), N = tensor_rows(x);
#pragma omp parallel if (N * D > 16384)
    {
        float weights[COLS_MAX], biases[COLS_MAX], buffer[COLS_MAX];
        const float *w = load_f32(weights, weight, 0, D);
        const float *b = bias.data ? load_f32(biases, bias, 0, D) : NULL;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++) {
            const float *row = load_f32(buffer, x, n * D, D);
            float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < D; i++) sum += row[i];
            float m = sum / (float)D;
#pragma omp simd reduction(+ : squares)
            for (int64_t i = 0; i < D; i++) squares += (row[i] - m) * (row[i] - m);
            float r = 1.0f / sqrtf(squares / (float)D + eps);
            ((float *)mean.data)[n] = m;
            ((float *)rstd.data)[n] = r;
#pragma omp simd
            for (int64_t i = 0; i < D; i++) buffer[i] = (row[i] - m) * r * w[i];
            for (int64_t i = 0; b && i < D; i++) buffer[i] += b[i];
            store_f32(y, n * D, D, buffer);
        }
    }
}

/* The sums of layernorm_backward over the rows, columns first .. first + n - 1. */
static void add_layernorm_columns(Tensor dweight, Tensor dbias, Tensor dy, Tensor x,
                                  const float *mean, const float *rstd, int64_t first, int64_t n) {
    int64_t D = tensor_cols(x), N = tensor_rows(x);
    float a[CHUNK], b[CHUNK], *dw = dweight.data, *db = dbias.data;
    for (int64_t r = 0; r < N; r++) {
        const float *g = load_f32(a, dy, r * D + first, n);
        const float *row = load_f32(b, x, r * D + first, n);
        for (int64_t i = 0; dw && i < n; i++) dw[first + i] += g[i] * (row[i] - mean[r]) * rstd[r];
        for (int64_t i = 0; db && i < n; i++) db[first + i] += g[i];
    }
}

void CPU(layernorm_backward)(Tensor dx, Tensor dweight, Tensor dbias, Tensor dy, Tensor x,
                             Tensor mean, Tensor rstd, Tensor weight) {
    int64_t D = tensor_cols(x), N = tensor_rows(x);
    const float *m = mean.data, *r = rstd.data;
    if (dweight.data || dbias.data) { /* first: it reads dy, which dx may overwrite */
#pragma omp parallel for schedule(static)
        for (int64_t first = 0; first < D; first += CHUNK)
            add_layernorm_columns(dweight, dbias, dy, x, m, r, first,
                                  D - first < CHUNK ? D - first : CHUNK);
    }
    if (!dx.data) return;
#pragma omp parallel if (N * D > 16384)
    {
        float weights[COLS_MAX], a[COLS_MAX], b[COLS_MAX];
        const float *w = load_f32(weights, weight, 0, D);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++) {
            const float *g = load_f32(a, dy, n * D, D), *row = load_f32(b, x, n * D, D);
            float sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
            for (int64_t i = 0; i < D; i++) {
                float u = g[i] * w[i];
                sum += u;
                product += u * (row[i] - m[n]) * r[n];
            }
            sum /= (float)D;
            product /= (float)D;
#pragma omp simd
            for (int64_t i = 0; i < D; i++)
                a[i] = r[n] * (g[i] * w[i] - sum - (row[i] - m[n]) * r[n] * product);
            store_f32(dx, n * D, D, a);
        }
    }
}
