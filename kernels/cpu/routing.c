/* routing.c - router softmax and top-A, the sorted order, and the weighted join of expert outputs.
 */
#include "kernels/routing.h"
#include "kernels/cpu/cpu.h"

void CPU(router_forward)(Tensor probs, Tensor share, Tensor experts, Tensor logits) {
    int64_t N = tensor_rows(logits), E = tensor_cols(logits), A = tensor_cols(share);
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        float buffer[1024], *p = (float *)probs.data + n * E, *s = (float *)share.data + n * A;
        int32_t *chosen = (int32_t *)experts.data + n * A;
        const float *z = load_f32(buffer, logits, n * E, E);
        float top = z[0], sum = 0;
        for (int64_t e = 1; e < E; e++) top = z[e] > top ? z[e] : top;
        for (int64_t e = 0; e < E; e++) sum += p[e] = expf(z[e] - top);
        for (int64_t e = 0; e < E; e++) p[e] /= sum;
        bool taken[1024] = {0};
        float total = 0;
        for (int64_t a = 0; a < A; a++) {
            int32_t best = -1;
            for (int64_t e = 0; e < E; e++)
                if (!taken[e] && (best < 0 || p[e] > p[best])) best = (int32_t)e;
            taken[best] = true;
            chosen[a] = best;
            total += s[a] = p[best];
        }
        for (int64_t a = 0; a < A; a++) s[a] /= total;
    }
}

void CPU(router_backward)(Tensor dlogits, Tensor dshare, Tensor probs, Tensor share, Tensor experts,
                          Tensor balance) {
    int64_t N = tensor_rows(probs), E = tensor_cols(probs), A = tensor_cols(share);
    const float *a_e = balance.data;
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const float *p = (const float *)probs.data + n * E, *s = (const float *)share.data + n * A;
        const float *ds = (const float *)dshare.data + n * A;
        const int32_t *chosen = (const int32_t *)experts.data + n * A;
        float out[1024] = {0}, mean = 0;
        for (int64_t a = 0; a < A; a++) mean += s[a] * ds[a];
        for (int64_t a = 0; a < A; a++) out[chosen[a]] = s[a] * (ds[a] - mean);
        if (a_e) {
            float average = 0;
            for (int64_t e = 0; e < E; e++) average += p[e] * a_e[e];
            for (int64_t e = 0; e < E; e++) out[e] += p[e] * (a_e[e] - average);
        }
        store_f32(dlogits, n * E, E, out);
    }
}

void CPU(combine_forward)(Tensor y, Tensor rows, Tensor slot, Tensor share, Tensor experts,
                          Tensor scale) {
    int64_t N = tensor_rows(y), D = tensor_cols(y), A = tensor_cols(slot);
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++)
        for (int64_t first = 0; first < D; first += CHUNK) {
            int64_t count = D - first < CHUNK ? D - first : CHUNK;
            float out[CHUNK] = {0}, buffer[CHUNK], one;
            for (int64_t a = 0; a < A; a++) {
                int32_t expert = ((const int32_t *)experts.data)[n * A + a];
                float weight =
                    ((const float *)share.data)[n * A + a] * *load_f32(&one, scale, expert, 1);
                const float *row = load_f32(
                    buffer, rows, ((const int32_t *)slot.data)[n * A + a] * D + first, count);
#pragma omp simd
                for (int64_t i = 0; i < count; i++) out[i] += weight * row[i];
            }
            store_f32(y, n * D + first, count, out);
        }
}

void CPU(row_weights)(Tensor weights, Tensor slot, Tensor source, Tensor share, Tensor experts,
                      Tensor scale) {
    float *to = weights.data, one;
    for (int64_t m = 0; m < tensor_count(source); m++)
        if (((const int32_t *)source.data)[m] < 0) to[m] = 0;
    for (int64_t i = 0; i < tensor_count(slot); i++)
        to[((const int32_t *)slot.data)[i]] =
            ((const float *)share.data)[i] *
            *load_f32(&one, scale, ((const int32_t *)experts.data)[i], 1);
}

void CPU(row_weights_backward)(Tensor dshare, Tensor dscale, Tensor dweights, Tensor slot,
                               Tensor share, Tensor experts, Tensor scale) {
    for (int64_t i = 0; i < tensor_count(slot); i++) {
        int32_t e = ((const int32_t *)experts.data)[i];
        float one, product = ((const float *)dweights.data)[((const int32_t *)slot.data)[i]];
        if (dscale.data) ((float *)dscale.data)[e] += ((const float *)share.data)[i] * product;
        ((float *)dshare.data)[i] = product * *load_f32(&one, scale, e, 1);
    }
}

/* A few thousand integers: one thread. */
void CPU(routing_sort)(Tensor offsets, Tensor counts, Tensor slot, Tensor source, Tensor experts) {
    int64_t E = tensor_count(counts), A = tensor_cols(experts), N = tensor_rows(experts);
    int32_t *offset = offsets.data, *count = counts.data, *place = slot.data, *from = source.data;
    const int32_t *expert = experts.data;
    memset(count, 0, (size_t)E * sizeof *count);
    for (int64_t i = 0; i < N * A; i++) count[expert[i]]++;
    offset[0] = 0;
    for (int64_t e = 0; e < E; e++)
        offset[e + 1] = offset[e] + (count[e] + ROUTING_ALIGN - 1) / ROUTING_ALIGN * ROUTING_ALIGN;
    for (int64_t m = 0; m < tensor_count(source); m++) from[m] = -1;
    int32_t next[1024];
    memcpy(next, offset, (size_t)E * sizeof *next);
    for (int64_t i = 0; i < N * A; i++) {
        int32_t m = next[expert[i]]++;
        place[i] = m;
        from[m] = (int32_t)(i / A);
    }
}
