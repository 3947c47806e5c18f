/* loss.c - softcap and cross-entropy, a row of the vocabulary at a time. */
#include "kernels/loss.h"
#include "kernels/cpu/cpu.h"

static void cap_row(float *row, int64_t V, float cap) {
    float inverse = 1.0f / cap;
#pragma omp simd
    for (int64_t i = 0; i < V; i++) row[i] = cap * fast_tanh(row[i] * inverse);
}

void CPU(softcap_forward)(Tensor logits, float cap) {
    int64_t R = tensor_rows(logits), V = tensor_cols(logits);
    if (cap == 0) return;
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t r = 0; r < R; r++)
        for (int64_t first = 0; first < V; first += 8192)
            cap_row((float *)logits.data + r * V + first, V - first < 8192 ? V - first : 8192, cap);
}

void CPU(cross_entropy)(Tensor nll, Tensor dlogits, Tensor logits, Tensor targets, Tensor weights,
                        float cap) {
    int64_t R = tensor_rows(logits), V = tensor_cols(logits);
    const int32_t *target = targets.data;
#pragma omp parallel for schedule(dynamic)
    for (int64_t r = 0; r < R; r++) {
        float *row = (float *)logits.data + r * V;
        if (cap != 0) cap_row(row, V, cap);
        float top = -INFINITY;
#pragma omp simd reduction(max : top)
        for (int64_t i = 0; i < V; i++) top = row[i] > top ? row[i] : top;
        double total = 0;
        for (int64_t first = 0; first < V; first += 4096) { /* blocks keep f32 sums accurate */
            int64_t n = V - first < 4096 ? V - first : 4096;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < n; i++) sum += fast_exp(row[first + i] - top);
            total += sum;
        }
        float lse = top + (float)log(total);
        bool counted = target[r] >= 0;
        ((float *)nll.data)[r] = counted ? lse - row[target[r]] : 0.0f;
        if (!dlogits.data) continue;
        float weight = counted ? ((const float *)weights.data)[r] : 0.0f;
        float slope_factor = cap != 0 ? 1.0f / (cap * cap) : 0.0f;
        float hit = counted ? weight * (fast_exp(row[target[r]] - lse) - 1.0f) *
                                  (1.0f - row[target[r]] * row[target[r]] * slope_factor)
                            : 0.0f;
        for (int64_t first = 0; first < V; first += CHUNK) {
            int64_t n = V - first < CHUNK ? V - first : CHUNK;
            float out[CHUNK];
#pragma omp simd
            for (int64_t i = 0; i < n; i++) {
                float c = row[first + i];
                out[i] = weight * fast_exp(c - lse) * (1.0f - c * c * slope_factor);
            }
            if (counted && target[r] >= first && target[r] < first + n)
                out[target[r] - first] = hit;
            store_f32(dlogits, r * V + first, n, out);
        }
    }
}
