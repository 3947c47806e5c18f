/* embedding.c - gathering and scattering table rows. */
#include "kernels/embedding.h"
#include "kernels/cpu/cpu.h"

void CPU(embedding_forward)(Tensor y, Tensor table, int64_t first_col, Tensor ids, float scale) {
    int64_t N = tensor_rows(y), D = tensor_cols(y), W = tensor_cols(table);
    const int32_t *id = ids.data;
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++)
        for (int64_t first = 0; first < D; first += CHUNK) {
            int64_t count = D - first < CHUNK ? D - first : CHUNK;
            float buffer[CHUNK];
            const float *row = load_f32(buffer, table, id[n] * W + first_col + first, count);
            float out[CHUNK];
#pragma omp simd
            for (int64_t i = 0; i < count; i++) out[i] = row[i] * scale;
            store_f32(y, n * D + first, count, out);
        }
}

void CPU(embedding_backward)(Tensor dtable, int64_t first_col, Tensor dy, Tensor ids, float scale,
                             int32_t skip) {
    int64_t N = tensor_rows(dy), D = tensor_cols(dy), W = tensor_cols(dtable);
    const int32_t *id = ids.data;
    float *table = dtable.data;
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < D; first += CHUNK) {
        int64_t count = D - first < CHUNK ? D - first : CHUNK;
        float buffer[CHUNK];
        for (int64_t n = 0; n < N; n++) {
            if (id[n] == skip) continue;
            const float *row = load_f32(buffer, dy, n * D + first, count);
            float *out = table + id[n] * W + first_col + first;
#pragma omp simd
            for (int64_t i = 0; i < count; i++) out[i] += row[i] * scale;
        }
    }
}
