/* activation.c - the gated GELU. */
#include "kernels/activation.h"
#include "kernels/cpu/cpu.h"

#define GELU_FACTOR 0.7978845608028654f /* sqrt(2 / pi) */
#define GELU_CUBE   0.044715f

/* n <= CHUNK elements of y from `first` on, of the gate from `g` on and of up from `u` on. */
static void forward(Tensor y, int64_t first, Tensor gate, int64_t g, Tensor up, int64_t u,
                    int64_t n) {
    float a[CHUNK], b[CHUNK], out[CHUNK];
    const float *x = load_f32(a, gate, g, n), *factor = load_f32(b, up, u, n);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float t = fast_tanh(GELU_FACTOR * (x[i] + GELU_CUBE * x[i] * x[i] * x[i]));
        out[i] = 0.5f * x[i] * (1.0f + t);
    }
    round_to(y.dtype, out, n);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) out[i] *= factor[i];
    store_f32(y, first, n, out);
}

/* The same places of the gradients; of dy from `first` on. */
static void backward(Tensor dgate, Tensor dup, Tensor dy, int64_t first, Tensor gate, int64_t g,
                     Tensor up, int64_t u, int64_t n) {
    float a[CHUNK], b[CHUNK], c[CHUNK], gate_out[CHUNK], up_out[CHUNK];
    const float *in = load_f32(a, gate, g, n), *factor = load_f32(b, up, u, n);
    const float *d = load_f32(c, dy, first, n);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float x = in[i], t = fast_tanh(GELU_FACTOR * (x + GELU_CUBE * x * x * x));
        float slope = 0.5f * (1.0f + t) +
                      0.5f * x * (1.0f - t * t) * GELU_FACTOR * (1.0f + 3.0f * GELU_CUBE * x * x);
        gate_out[i] = d[i] * factor[i] * slope;
        up_out[i] = d[i] * (0.5f * x * (1.0f + t));
    }
    store_f32(dgate, g, n, gate_out);
    if (dup.data) store_f32(dup, u, n, up_out);
}

void CPU(gelu_mul_forward)(Tensor y, Tensor gate, Tensor up) {
    int64_t count = tensor_count(y);
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < count; first += CHUNK)
        forward(y, first, gate, first, up, first, count - first < CHUNK ? count - first : CHUNK);
}

void CPU(gelu_mul_backward)(Tensor dgate, Tensor dup, Tensor dy, Tensor gate, Tensor up) {
    int64_t count = tensor_count(dy);
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < count; first += CHUNK)
        backward(dgate, dup, dy, first, gate, first, up, first,
                 count - first < CHUNK ? count - first : CHUNK);
}

void CPU(gelu_mul_joined_forward)(Tensor y, Tensor both) {
    int64_t M = tensor_rows(y), F = tensor_cols(y);
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t m = 0; m < M; m++)
        for (int64_t first = 0; first < F; first += CHUNK)
            forward(y, m * F + first, both, 2 * m * F + first, both, (2 * m + 1) * F + first,
                    F - first < CHUNK ? F - first : CHUNK);
}

void CPU(gelu_mul_joined_backward)(Tensor dboth, Tensor dy, Tensor both) {
    int64_t M = tensor_rows(dy), F = tensor_cols(dy);
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t m = 0; m < M; m++)
        for (int64_t first = 0; first < F; first += CHUNK)
            backward(dboth, dboth, dy, m * F + first, both, 2 * m * F + first, both,
                     (2 * m + 1) * F + first, F - first < CHUNK ? F - first : CHUNK);
}
