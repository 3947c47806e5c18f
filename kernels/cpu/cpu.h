/* cpu.h - what the CPU twins share: the level's vectors, converting rows, and fast exponentials.
 *
 * Every file here is compiled once per level (LEVEL is its name, LANES the f32 lanes of a register,
 * LEVEL_PLAIN whether it is the generic one), except onednn.c, which has its own
 * dispatch, and what goes by tiles (amx*.c), which is for avx512 alone. */
#ifndef CPU_H
#define CPU_H

#include "kernels/tensor.h"

#include <math.h>
#include <omp.h>
#include <string.h>
#ifndef __aarch64__
#include <xmmintrin.h>
#endif

#define CPU_PASTE(name, level)  cpu_##name##_##level
#define CPU_EXPAND(name, level) CPU_PASTE(name, level)
#define CPU(name)               CPU_EXPAND(name, LEVEL)

typedef float Vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

/* Elements converted at a time by kernels that work on any dtype; stays in the first cache. */
#define CHUNK 512

/* Elements of a packed tensor as f32 (quantize.c). */
void CPU(load_packed)(float *buffer, Tensor t, int64_t first, int64_t n);

/* panel (count, cols) f32 | bf16 = rows first .., columns col .. of a packed matrix (unpack.c); col
 * and cols are multiples of 64. */
void CPU(unpack)(Tensor panel, Tensor packed, int64_t first, int64_t col);

/* Elements first .. first + n - 1 of a tensor as f32: in place when they are f32, else through
 * buffer. */
static inline const float *load_f32(float *buffer, Tensor t, int64_t first, int64_t n) {
    if (t.dtype == F32) return (const float *)t.data + first;
    const uint16_t *bits = (const uint16_t *)t.data + first;
    if (t.dtype == BF16) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) buffer[i] = bf16_to_f32(bits[i]);
    } else if (t.dtype == F16) {
        for (int64_t i = 0; i < n; i++) buffer[i] = f16_to_f32(bits[i]);
    } else {
        CPU(load_packed)(buffer, t, first, n);
    }
    return buffer;
}

static inline void store_f32(Tensor t, int64_t first, int64_t n, const float *values) {
    if (t.dtype == F32) {
        float *out = (float *)t.data + first;
        if (out != values) memcpy(out, values, (size_t)n * sizeof *out);
        return;
    }
    uint16_t *out = (uint16_t *)t.data + first;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) out[i] = f32_to_bf16(values[i]);
}

/* From here on this thread's results below 1.2e-38 are 0, until what this returns is put back:
 * x86-64 takes a hundred cycles over one that is not. Operands keep their values. */
static inline unsigned flush_subnormals(void) {
#ifdef __aarch64__ /* where they cost nothing */
    return 0;
#else
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | _MM_FLUSH_ZERO_ON);
    return before;
#endif
}

static inline void put_back_subnormals(unsigned before) {
#ifdef __aarch64__
    (void)before;
#else
    _mm_setcsr(before);
#endif
}

static inline float dot(const float *a, const float *b, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* x times its norm's factor, and a weight unless that is NULL. */
static inline void scale_row(float *out, const float *x, float rstd, const float *weight,
                             int64_t n) {
    if (weight) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) out[i] = x[i] * rstd * weight[i];
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) out[i] = x[i] * rstd;
    }
}

/* Pairs half a row apart turned by angles of cosines c and sines s; sign -1: back. */
static inline void turn_row(float *out, const float *x, const float *c, const float *s,
                            int64_t half, float sign) {
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        float turn = sign * s[i];
        out[i] = x[i] * c[i] - x[i + half] * turn;
        out[i + half] = x[i + half] * c[i] + x[i] * turn;
    }
}

/* values <- what a tensor of this dtype would hold. */
static inline void round_to(DType dtype, float *values, int64_t n) {
    if (dtype != BF16) return;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) values[i] = bf16_to_f32(f32_to_bf16(values[i]));
}

/* exp to 2 ulp in straight-line code that vectorises: 2^k e^r with |r| <= ln2/2, a degree-6 series
 * of e^r (Cephes' coefficients); arguments clamp to [-87.3, 88.3]. */
static inline float fast_exp(float x) {
    x = x < -87.3f ? -87.3f : x > 88.3f ? 88.3f : x;
    float k = x * 1.44269504088896341f;
    k = (k + 12582912.0f) - 12582912.0f; /* round to nearest */
    float r = x - k * 0.693359375f + k * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union {
        uint32_t u;
        float f;
    } two = {(uint32_t)((int32_t)k + 127) << 23};
    return p * two.f;
}

/* tanh to 1e-7 absolute: 1 - 2 / (e^2x + 1). */
static inline float fast_tanh(float x) {
    return 1.0f - 2.0f / (fast_exp(2.0f * x) + 1.0f);
}

#endif
