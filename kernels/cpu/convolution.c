/* convolution.c - unfolding, depthwise convolution, means over rows. */
#include "kernels/convolution.h"
#include "kernels/cpu/cpu.h"

#define TAPS_MAX 16

/* D elements of x go to every ninth of y; NULL: zeros. */
#define SPREAD(type, y, to, x, from, D)                                                            \
    do {                                                                                           \
        type *out = (type *)(y) + (to);                                                            \
        const type *in = (x) ? (const type *)(x) + (from) : NULL;                                  \
        for (int64_t d = 0; d < (D); d++) out[9 * d] = in ? in[d] : 0;                             \
    } while (0)

void CPU(unfold_forward)(Tensor y, Tensor x) {
    int64_t T = x.shape[0], F = x.shape[1], D = x.shape[2];
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t t = 0; t < y.shape[0]; t++)
        for (int64_t f = 0; f < y.shape[1]; f++)
            for (int64_t tap = 0; tap < 9; tap++) {
                int64_t s = 2 * t + tap / 3 - 1, e = 2 * f + tap % 3 - 1;
                bool inside = s >= 0 && s < T && e >= 0 && e < F;
                int64_t to = (t * y.shape[1] + f) * 9 * D + tap, from = (s * F + e) * D;
                if (y.dtype == F32)
                    SPREAD(float, y.data, to, inside ? x.data : NULL, from, D);
                else
                    SPREAD(uint16_t, y.data, to, inside ? x.data : NULL, from, D);
            }
}

void CPU(unfold_backward)(Tensor dx, Tensor dy) {
    int64_t T = dx.shape[0], F = dx.shape[1], D = dx.shape[2];
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t s = 0; s < T; s++)
        for (int64_t e = 0; e < F; e++)
            for (int64_t d = 0; d < D; d++) {
                float sum = 0, one;
                for (int64_t i = 0; i < 3; i++)
                    for (int64_t j = 0; j < 3; j++) {
                        int64_t t = s + 1 - i, f = e + 1 - j; /* twice the place it went to */
                        if (t < 0 || f < 0 || t % 2 || f % 2) continue;
                        if (t / 2 >= dy.shape[0] || f / 2 >= dy.shape[1]) continue;
                        int64_t row = (t / 2 * dy.shape[1] + f / 2) * 9 * D;
                        sum += *load_f32(&one, dy, row + 9 * d + 3 * i + j, 1);
                    }
                store_f32(dx, (s * F + e) * D + d, 1, &sum);
            }
}

/* y[t] = sum over j of weight[j] x[t + step (J - 1 - j)], zeros outside: step -1 forward, 1 back.
 */
static void slide(Tensor y, Tensor x, Tensor weight, int64_t step) {
    int64_t T = tensor_rows(x), D = tensor_cols(x), J = tensor_cols(weight);
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t t = 0; t < T; t++)
        for (int64_t first = 0; first < D; first += CHUNK) {
            int64_t n = D - first < CHUNK ? D - first : CHUNK;
            float w[CHUNK * TAPS_MAX], a[CHUNK], sum[CHUNK] = {0};
            const float *taps = load_f32(w, weight, first * J, n * J);
            for (int64_t j = 0; j < J; j++) {
                int64_t s = t + step * (J - 1 - j);
                if (s < 0 || s >= T) continue;
                const float *in = load_f32(a, x, s * D + first, n);
                for (int64_t i = 0; i < n; i++) sum[i] += taps[i * J + j] * in[i];
            }
            store_f32(y, t * D + first, n, sum);
        }
}

void CPU(depthwise_forward)(Tensor y, Tensor x, Tensor weight) {
    slide(y, x, weight, -1);
}

void CPU(depthwise_backward)(Tensor dx, Tensor dweight, Tensor dy, Tensor x, Tensor weight) {
    int64_t T = tensor_rows(x), D = tensor_cols(x), J = tensor_cols(weight);
    if (tensor_present(dx)) slide(dx, dy, weight, 1);
    if (!dweight.data) return;
    float *out = dweight.data;
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < D; first += CHUNK) {
        int64_t n = D - first < CHUNK ? D - first : CHUNK;
        float a[CHUNK], b[CHUNK];
        for (int64_t t = 0; t < T; t++) {
            const float *g = load_f32(a, dy, t * D + first, n);
            for (int64_t j = 0; j < J; j++) {
                int64_t s = t + j - (J - 1);
                if (s < 0) continue;
                const float *in = load_f32(b, x, s * D + first, n);
                for (int64_t i = 0; i < n; i++) out[(first + i) * J + j] += g[i] * in[i];
            }
        }
    }
}

void CPU(pool_rows_forward)(Tensor y, Tensor x, float alpha) {
    int64_t M = tensor_rows(y), D = tensor_cols(y), k = tensor_rows(x) / M;
    float *out = y.data;
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t m = 0; m < M; m++)
        for (int64_t first = 0; first < D; first += CHUNK) {
            int64_t n = D - first < CHUNK ? D - first : CHUNK;
            float a[CHUNK], sum[CHUNK] = {0};
            for (int64_t i = 0; i < k; i++) {
                const float *in = load_f32(a, x, (m * k + i) * D + first, n);
                for (int64_t d = 0; d < n; d++) sum[d] += in[d];
            }
            for (int64_t d = 0; d < n; d++) sum[d] /= (float)k;
            round_to(x.dtype, sum, n);
            for (int64_t d = 0; d < n; d++) out[m * D + first + d] = alpha * sum[d];
        }
}

void CPU(pool_rows_backward)(Tensor dx, Tensor dy, float alpha) {
    int64_t M = tensor_rows(dy), D = tensor_cols(dy), k = tensor_rows(dx) / M;
    const float *g = dy.data;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < M * k; r++)
        for (int64_t first = 0; first < D; first += CHUNK) {
            int64_t n = D - first < CHUNK ? D - first : CHUNK;
            float a[CHUNK];
            for (int64_t d = 0; d < n; d++) a[d] = alpha / (float)k * g[r / k * D + first + d];
            store_f32(dx, r * D + first, n, a);
        }
}

void CPU(standardize)(Tensor y, Tensor x, Tensor shift, Tensor scale) {
    int64_t N = tensor_rows(x), D = tensor_cols(x);
    const float *in = x.data;
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++)
        for (int64_t first = 0; first < D; first += CHUNK) {
            int64_t count = D - first < CHUNK ? D - first : CHUNK;
            float a[CHUNK], b[CHUNK], out[CHUNK];
            const float *s = load_f32(a, shift, first, count),
                        *f = load_f32(b, scale, first, count);
            for (int64_t d = 0; d < count; d++) out[d] = (in[n * D + first + d] - s[d]) * f[d];
            store_f32(y, n * D + first, count, out);
        }
}
