/* elementwise.c - copies, sums, gathers and masks. */
#include "kernels/elementwise.h"
#include "kernels/cpu/cpu.h"
#include "kernels/random.h"

#define FOR_CHUNKS(count)                                                                          \
    for (int64_t first = 0, n = 0;                                                                 \
         n = count - first < CHUNK ? count - first : CHUNK, first < count; first += CHUNK)

void CPU(scale_copy)(Tensor y, Write write, Tensor x, float alpha) {
    int64_t count = tensor_count(y), blocks = (count + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) if (blocks > 16)
    for (int64_t block = 0; block < blocks; block++) {
        int64_t first = block * CHUNK, n = count - first < CHUNK ? count - first : CHUNK;
        float a[CHUNK], b[CHUNK];
        const float *in = load_f32(a, x, first, n),
                    *old = write == ADD ? load_f32(b, y, first, n) : NULL;
        if (old) {
#pragma omp simd
            for (int64_t i = 0; i < n; i++) b[i] = old[i] + alpha * in[i];
        } else {
#pragma omp simd
            for (int64_t i = 0; i < n; i++) b[i] = alpha * in[i];
        }
        store_f32(y, first, n, b);
    }
}

void CPU(fill)(Tensor y, float value) {
    int64_t count = tensor_count(y), blocks = (count + CHUNK - 1) / CHUNK;
    float line[CHUNK];
    for (int64_t i = 0; i < CHUNK; i++) line[i] = value;
#pragma omp parallel for schedule(static) if (blocks > 16)
    for (int64_t block = 0; block < blocks; block++)
        store_f32(y, block * CHUNK, count - block * CHUNK < CHUNK ? count - block * CHUNK : CHUNK,
                  line);
}

void CPU(fill_normal)(Tensor y, uint64_t key, float factor) {
    int64_t count = tensor_count(y), blocks = (count + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        int64_t first = block * CHUNK, n = count - first < CHUNK ? count - first : CHUNK;
        float line[CHUNK];
        random_normal(line, key, (uint64_t)first, n);
        for (int64_t i = 0; i < n; i++) line[i] *= factor;
        store_f32(y, first, n, line);
    }
}

void CPU(add_scaled)(Tensor y, Tensor a, Tensor b, float alpha) {
    int64_t count = tensor_count(y), blocks = (count + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) if (blocks > 16)
    for (int64_t block = 0; block < blocks; block++) {
        int64_t first = block * CHUNK, n = count - first < CHUNK ? count - first : CHUNK;
        float p[CHUNK], q[CHUNK], out[CHUNK];
        const float *u = load_f32(p, a, first, n), *v = load_f32(q, b, first, n);
#pragma omp simd
        for (int64_t i = 0; i < n; i++) out[i] = u[i] + v[i];
        if (alpha != 1.0f) {
            round_to(y.dtype, out, n);
#pragma omp simd
            for (int64_t i = 0; i < n; i++) out[i] *= alpha;
        }
        store_f32(y, first, n, out);
    }
}

void CPU(gather_rows)(Tensor y, Tensor x, Tensor rows) {
    int64_t M = tensor_rows(y);
    size_t bytes = (size_t)tensor_cols(y) * dtype_size(y.dtype);
    const int32_t *from = rows.data;
#pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < M; m++) {
        char *out = (char *)y.data + (size_t)m * bytes;
        if (from[m] < 0)
            memset(out, 0, bytes);
        else
            memcpy(out, (const char *)x.data + (size_t)from[m] * bytes, bytes);
    }
}

void CPU(spread_rows)(Tensor y, Tensor x, Tensor slot, Tensor source) {
    (void)slot;
    CPU(gather_rows)(y, x, source);
}

static void add_row(Tensor y, int64_t to, Tensor x, int64_t from) {
    int64_t D = tensor_cols(y);
    FOR_CHUNKS(D) {
        float a[CHUNK], b[CHUNK];
        const float *old = load_f32(a, y, to * D + first, n),
                    *in = load_f32(b, x, from * D + first, n);
#pragma omp simd
        for (int64_t i = 0; i < n; i++) a[i] = old[i] + in[i];
        store_f32(y, to * D + first, n, a);
    }
}

void CPU(scatter_rows)(Tensor y, Write write, Tensor x, Tensor rows) {
    int64_t M = tensor_rows(x);
    size_t bytes = (size_t)tensor_cols(y) * dtype_size(y.dtype);
    const int32_t *to = rows.data;
    if (write == SET) memset(y.data, 0, tensor_bytes(y));
#pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < M; m++) {
        if (to[m] < 0) continue;
        if (write == SET)
            memcpy((char *)y.data + (size_t)to[m] * bytes, (const char *)x.data + (size_t)m * bytes,
                   bytes);
        else
            add_row(y, to[m], x, m);
    }
}

void CPU(gather_sums)(Tensor y, Tensor x, Tensor slot) {
    int64_t N = tensor_rows(y), D = tensor_cols(y), A = tensor_cols(slot);
    const int32_t *from = slot.data;
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++)
        for (int64_t first = 0; first < D; first += CHUNK) {
            int64_t count = D - first < CHUNK ? D - first : CHUNK;
            float sum[CHUNK] = {0}, buffer[CHUNK];
            for (int64_t a = 0; a < A; a++) {
                const float *row = load_f32(buffer, x, from[n * A + a] * D + first, count);
#pragma omp simd
                for (int64_t i = 0; i < count; i++) sum[i] += row[i];
            }
            store_f32(y, n * D + first, count, sum);
        }
}

void CPU(dropout)(Tensor y, Tensor x, float p, uint64_t key) {
    int64_t count = tensor_count(y), blocks = (count + CHUNK - 1) / CHUNK;
    float keep = 1.0f / (1.0f - p);
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        int64_t first = block * CHUNK, n = count - first < CHUNK ? count - first : CHUNK;
        float a[CHUNK], out[CHUNK];
        const float *in = load_f32(a, x, first, n);
        for (int64_t i = 0; i < n; i++)
            out[i] = random_uniform(key, (uint64_t)(first + i)) >= p ? in[i] * keep : 0.0f;
        store_f32(y, first, n, out);
    }
}

void CPU(shift_columns)(Tensor y, Tensor x, Tensor shift) {
    int64_t N = tensor_rows(x), D = tensor_cols(x);
#pragma omp parallel for schedule(static) if (N > 4)
    for (int64_t r = 0; r < N; r++) FOR_CHUNKS(D) {
            float a[CHUNK], b[CHUNK], out[CHUNK];
            const float *in = load_f32(a, x, r * D + first, n),
                        *more = load_f32(b, shift, first, n);
#pragma omp simd
            for (int64_t i = 0; i < n; i++) out[i] = in[i] + more[i];
            store_f32(y, r * D + first, n, out);
        }
}

void CPU(scale_columns)(Tensor y, Write write, Tensor x, Tensor weight, float alpha) {
    int64_t N = tensor_rows(x), D = tensor_cols(x);
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < N; row++) FOR_CHUNKS(D) {
            float a[CHUNK], b[CHUNK], c[CHUNK];
            const float *in = load_f32(a, x, row * D + first, n),
                        *w = load_f32(b, weight, first, n);
            for (int64_t i = 0; i < n; i++) c[i] = in[i] * w[i];
            if (alpha != 1.0f) {
                round_to(x.dtype, c, n);
                for (int64_t i = 0; i < n; i++) c[i] *= alpha;
            }
            const float *old = write == ADD ? load_f32(a, y, row * D + first, n) : NULL;
            for (int64_t i = 0; old && i < n; i++) c[i] += old[i];
            store_f32(y, row * D + first, n, c);
        }
}

void CPU(dot_columns)(Tensor y, Tensor a, Tensor b) {
    int64_t N = tensor_rows(a), D = tensor_cols(a);
    float *out = y.data;
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < D; first += CHUNK) {
        int64_t n = D - first < CHUNK ? D - first : CHUNK;
        float p[CHUNK], q[CHUNK];
        for (int64_t row = 0; row < N; row++) {
            const float *u = load_f32(p, a, row * D + first, n),
                        *v = b.data ? load_f32(q, b, row * D + first, n) : NULL;
#pragma omp simd
            for (int64_t i = 0; i < n; i++) out[first + i] += v ? u[i] * v[i] : u[i];
        }
    }
}

void CPU(scale_rows)(Tensor y, Tensor x, Tensor weight) {
    int64_t N = tensor_rows(x), D = tensor_cols(x);
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < N; row++) FOR_CHUNKS(D) {
            float a[CHUNK], out[CHUNK], w = ((const float *)weight.data)[row];
            const float *in = load_f32(a, x, row * D + first, n);
            for (int64_t i = 0; i < n; i++) out[i] = in[i] * w;
            store_f32(y, row * D + first, n, out);
        }
}

void CPU(row_norms)(Tensor y, Tensor x) {
    int64_t N = tensor_rows(x), D = tensor_cols(x);
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < N; row++) {
        const float *in = (const float *)x.data + row * D;
        double square = 0;
        for (int64_t i = 0; i < D; i++) square += (double)in[i] * in[i];
        ((float *)y.data)[row] = (float)sqrt(square);
    }
}

void CPU(quotient)(Tensor y, Write write, Tensor a, Tensor b) {
    float *out = y.data;
    const float *top = a.data, *bottom = b.data;
    for (int64_t i = 0; i < tensor_count(y); i++)
        out[i] = (write == ADD ? out[i] : 0.0f) + (bottom[i] != 0 ? top[i] / bottom[i] : 0.0f);
}

void CPU(swap_outer)(Tensor y, Tensor x) {
    int64_t I = x.shape[0], J = x.shape[1];
    size_t bytes = (size_t)x.shape[2] * dtype_size(x.dtype);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < I; i++)
        for (int64_t j = 0; j < J; j++)
            memcpy((char *)y.data + (size_t)(j * I + i) * bytes,
                   (const char *)x.data + (size_t)(i * J + j) * bytes, bytes);
}
