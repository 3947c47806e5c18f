/* update.c - optimizer updates. */
#include "kernels/update.h"
#include "kernels/blocks.h"
#include "kernels/cpu/cpu.h"
#include "kernels/dynamic.h"
#include "kernels/random.h"

#define SUM_BLOCK 65536

/* ---- states ---- */

/* `n` states from element `first` of a block on: in place, or unpacked into `buffer`. */
static float *load_state(float *buffer, Tensor t, int64_t first, int64_t n) {
    if (t.dtype == F32) return (float *)t.data + first;
    CPU(load_packed)(buffer, t, first, n);
    return buffer;
}

/* The way back for states that were unpacked. What is stored of a second moment above zero stays
 * above it: the update divides by its root. */
static void store_state(Tensor t, int64_t first, int64_t n, const float *x) {
    if (t.dtype == F32) return;
    BlockDynamic8 *b = (BlockDynamic8 *)t.data + first / DYNAMIC_BLOCK;
    const float *levels = dynamic_levels(t.dtype == DYNAMIC8);
    float most = 0;
    for (int64_t i = 0; i < n; i++) most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
    float inverse = most > 0 ? 1.0f / most : 0.0f;
    b->absmax = most;
    for (int64_t i = 0; i < n; i++) {
        b->codes[i] = dynamic_code(levels, x[i] * inverse);
        if (t.dtype == DYNAMIC8_UNSIGNED && x[i] > 0 && !b->codes[i]) b->codes[i] = 1;
    }
}

/* Values from element `first` on: in place, or a copy in f32. */
static float *load_values(float *buffer, Tensor t, int64_t first, int64_t n) {
    if (t.dtype == F32) return (float *)t.data + first;
    return (float *)load_f32(buffer, t, first, n);
}

static void store_values(Tensor t, int64_t first, int64_t n, const float *x, uint64_t key) {
    if (t.dtype == F32) return;
    uint16_t *out = (uint16_t *)t.data + first;
    for (int64_t i = 0; i < n; i++) out[i] = random_bf16(x[i], key, (uint64_t)(first + i));
}

/* ---- updates ---- */

typedef struct Adam {
    float scale, shrink, beta1, beta2, step, root, eps;
} Adam;

static void adamw_block(float *w, const float *g, float *first, float *second, int64_t n,
                        const Adam *a) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float gradient = g[i] * a->scale;
        first[i] += (1.0f - a->beta1) * (gradient - first[i]);
        second[i] = a->beta2 * second[i] + (1.0f - a->beta2) * gradient * gradient;
        w[i] = w[i] * a->shrink - a->step * first[i] / (sqrtf(second[i]) * a->root + a->eps);
    }
}

void CPU(adamw_update)(Tensor value, Tensor grad, Tensor m, Tensor v, float scale, float lr,
                       float beta1, float beta2, float eps, float decay, int64_t t, uint64_t key) {
    int64_t n = tensor_count(value);
    Adam a = {scale, 1.0f - lr * decay, beta1, beta2, 0, 0, eps};
    a.step = (float)(lr / (1.0 - pow(beta1, (double)t)));
    a.root = (float)(1.0 / sqrt(1.0 - pow(beta2, (double)t)));
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < n; first += DYNAMIC_BLOCK) {
        int64_t count = n - first < DYNAMIC_BLOCK ? n - first : DYNAMIC_BLOCK;
        float buffers[3][DYNAMIC_BLOCK];
        float *x = load_state(buffers[0], m, first, count),
              *y = load_state(buffers[1], v, first, count),
              *w = load_values(buffers[2], value, first, count);
        adamw_block(w, (const float *)grad.data + first, x, y, count, &a);
        store_values(value, first, count, w, key);
        store_state(m, first, count, x);
        store_state(v, first, count, y);
    }
}

void CPU(sgd_update)(Tensor value, Tensor grad, Tensor buffer, float scale, float lr,
                     float momentum, float decay, int64_t t, uint64_t key) {
    int64_t n = tensor_count(value);
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < n; first += DYNAMIC_BLOCK) {
        int64_t count = n - first < DYNAMIC_BLOCK ? n - first : DYNAMIC_BLOCK;
        float unpacked[DYNAMIC_BLOCK], values[DYNAMIC_BLOCK];
        float *w = load_values(values, value, first, count);
        const float *g = (const float *)grad.data + first;
        float *velocity = momentum != 0 ? load_state(unpacked, buffer, first, count) : NULL;
        for (int64_t i = 0; i < count; i++) {
            float gradient = g[i] * scale + decay * w[i];
            if (velocity)
                velocity[i] = gradient = t == 1 ? gradient : momentum * velocity[i] + gradient;
            w[i] -= lr * gradient;
        }
        store_values(value, first, count, w, key);
        if (velocity) store_state(buffer, first, count, velocity);
    }
}

void CPU(sum_of_squares)(double *sum, Tensor x) {
    int64_t n = tensor_count(x), blocks = (n + SUM_BLOCK - 1) / SUM_BLOCK;
    const float *value = x.data;
    double total = 0;
    for (int64_t group = 0; group < blocks; group += 256) { /* partials add in order of blocks */
        double partial[256];
        int64_t count = blocks - group < 256 ? blocks - group : 256;
#pragma omp parallel for schedule(static)
        for (int64_t b = 0; b < count; b++) {
            int64_t first = (group + b) * SUM_BLOCK,
                    last = first + SUM_BLOCK < n ? first + SUM_BLOCK : n;
            double block = 0;
#pragma omp simd reduction(+ : block)
            for (int64_t i = first; i < last; i++) block += (double)value[i] * value[i];
            partial[b] = block;
        }
        for (int64_t b = 0; b < count; b++) total += partial[b];
    }
    *sum = total;
}
