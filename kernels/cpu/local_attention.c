/* local_attention.c - attention over the last few rows, a row and head at a time. */
#include "kernels/local_attention.h"
#include "kernels/cpu/cpu.h"

#define KEYS_MAX 32

static void add(float *y, const float *x, float factor, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) y[i] += factor * x[i];
}

void CPU(local_attention_forward)(Tensor y, Tensor kept, Tensor q, Tensor k, Tensor v,
                                  Tensor relative, float cap) {
    int64_t T = q.shape[0], H = q.shape[1], C = q.shape[2], W = relative.shape[0];
    const float *queries = q.data, *keys = k.data, *values = v.data, *places = relative.data;
    float *out = y.data, *probs = kept.data, *slopes = probs + T * H * W;
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < T; t++)
        for (int64_t h = 0; h < H; h++) {
            const float *mine = queries + (t * H + h) * C;
            int64_t at = (t * H + h) * W, n = t + 1 < W ? t + 1 : W;
            float score[KEYS_MAX], most = -cap, sum = 0;
            for (int64_t r = 0; r < n; r++) {
                float a = dot(mine, keys + ((t - r) * H + h) * C, C) +
                          dot(mine, places + (r * H + h) * C, C);
                float turn = tanhf(a / cap);
                slopes[at + r] = 1.0f - turn * turn;
                score[r] = cap * turn;
                if (score[r] > most) most = score[r];
            }
            for (int64_t r = 0; r < n; r++) sum += score[r] = expf(score[r] - most);
            float *row = out + (t * H + h) * C;
            memset(row, 0, (size_t)C * sizeof *row);
            for (int64_t r = 0; r < W; r++) {
                probs[at + r] = r < n ? score[r] / sum : 0;
                if (r < n) add(row, values + ((t - r) * H + h) * C, probs[at + r], C);
            }
        }
}

void CPU(local_attention_backward)(Tensor dq, Tensor dk, Tensor dv, Tensor drelative, Tensor scores,
                                   Tensor dy, Tensor kept, Tensor q, Tensor k, Tensor v,
                                   Tensor relative) {
    int64_t T = q.shape[0], H = q.shape[1], C = q.shape[2], W = relative.shape[0];
    const float *queries = q.data, *keys = k.data, *values = v.data, *places = relative.data;
    const float *probs = kept.data, *slopes = probs + T * H * W, *g = dy.data;
    float *da = scores.data, *dqueries = dq.data, *dkeys = dk.data, *dvalues = dv.data;
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < T; t++)
        for (int64_t h = 0; h < H; h++) {
            int64_t row = (t * H + h) * C, at = (t * H + h) * W, n = t + 1 < W ? t + 1 : W;
            float mean = 0;
            for (int64_t r = 0; r < n; r++) {
                da[at + r] = dot(g + row, values + ((t - r) * H + h) * C, C);
                mean += probs[at + r] * da[at + r];
            }
            memset(dqueries + row, 0, (size_t)C * sizeof(float));
            for (int64_t r = 0; r < W; r++) {
                da[at + r] = r < n ? probs[at + r] * (da[at + r] - mean) * slopes[at + r] : 0;
                if (r >= n) continue;
                add(dqueries + row, keys + ((t - r) * H + h) * C, da[at + r], C);
                add(dqueries + row, places + (r * H + h) * C, da[at + r], C);
            }
        }
#pragma omp parallel for schedule(static)
    for (int64_t s = 0; s < T; s++)
        for (int64_t h = 0; h < H; h++) {
            int64_t row = (s * H + h) * C;
            memset(dkeys + row, 0, (size_t)C * sizeof(float));
            memset(dvalues + row, 0, (size_t)C * sizeof(float));
            for (int64_t r = 0; r < W && s + r < T; r++) {
                int64_t from = (s + r) * H + h;
                add(dkeys + row, queries + from * C, da[from * W + r], C);
                add(dvalues + row, g + from * C, probs[from * W + r], C);
            }
        }
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t r = 0; r < W; r++)
        for (int64_t h = 0; h < H; h++) {
            float *row = (float *)drelative.data + (r * H + h) * C;
            memset(row, 0, (size_t)C * sizeof *row);
            for (int64_t t = r; t < T; t++)
                add(row, queries + (t * H + h) * C, da[(t * H + h) * W + r], C);
        }
}
