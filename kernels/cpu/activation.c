/* activation.c - the gated GELU. */
#include "kernels/activation.h"
#include "kernels/cpu/cpu.h"

#define GELU_FACTOR 0.7978845608028654f /* sqrt(2 / pi) */
#define GELU_CUBE   0.044715f

void CPU(gelu_mul_forward)(Tensor y, Tensor gate, Tensor up) {
    int64_t count = tensor_count(y);
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < count; first += CHUNK) {
        int64_t n = count - first < CHUNK ? count - first : CHUNK;
        float a[CHUNK], b[CHUNK], out[CHUNK];
        const float *g = load_f32(a, gate, first, n), *u = load_f32(b, up, first, n);
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            float t = fast_tanh(GELU_FACTOR * (g[i] + GELU_CUBE * g[i] * g[i] * g[i]));
            out[i] = 0.5f * g[i] * (1.0f + t);
        }
        round_to(y.dtype, out, n);
#pragma omp simd
        for (int64_t i = 0; i < n; i++) out[i] *= u[i];
        store_f32(y, first, n, out);
    }
}

void CPU(gelu_mul_backward)(Tensor dgate, Tensor dup, Tensor dy, Tensor gate, Tensor up) {
    int64_t count = tensor_count(dy);
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < count; first += CHUNK) {
        int64_t n = count - first < CHUNK ? count - first : CHUNK;
        float a[CHUNK], b[CHUNK], c[CHUNK], gate_out[CHUNK], up_out[CHUNK];
        const float *g = load_f32(a, gate, first, n), *u = load_f32(b, up, first, n);
        const float *d = load_f32(c, dy, first, n);
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            float x = g[i], t = fast_tanh(GELU_FACTOR * (x + GELU_CUBE * x * x * x));
            float slope = 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * GELU_FACTOR *
                                                  (1.0f + 3.0f * GELU_CUBE * x * x);
            gate_out[i] = d[i] * u[i] * slope;
            up_out[i] = d[i] * (0.5f * x * (1.0f + t));
        }
        store_f32(dgate, first, n, gate_out);
        if (dup.data) store_f32(dup, first, n, up_out);
    }
}
