/* update.c - optimizer updates. */
#include "kernels/update.h"
#include "kernels/cpu/cpu.h"

#define SUM_BLOCK 65536

void CPU(adamw_update)(Tensor value, Tensor grad, Tensor m, Tensor v, float scale, float lr,
                       float beta1, float beta2, float eps, float decay, int64_t t) {
    int64_t n = tensor_count(value);
    float *w = value.data, *first = m.data, *second = v.data;
    const float *g = grad.data;
    float step = (float)(lr / (1.0 - pow(beta1, (double)t)));
    float root = (float)(1.0 / sqrt(1.0 - pow(beta2, (double)t))), shrink = 1.0f - lr * decay;
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < n; i++) {
        float gradient = g[i] * scale;
        first[i] += (1.0f - beta1) * (gradient - first[i]);
        second[i] = beta2 * second[i] + (1.0f - beta2) * gradient * gradient;
        w[i] = w[i] * shrink - step * first[i] / (sqrtf(second[i]) * root + eps);
    }
}

void CPU(sgd_update)(Tensor value, Tensor grad, Tensor buffer, float scale, float lr,
                     float momentum, float decay, int64_t t) {
    int64_t n = tensor_count(value);
    float *w = value.data, *velocity = buffer.data;
    const float *g = grad.data;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++) {
        float gradient = g[i] * scale + decay * w[i];
        if (momentum != 0)
            velocity[i] = gradient = t == 1 ? gradient : momentum * velocity[i] + gradient;
        w[i] -= lr * gradient;
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
