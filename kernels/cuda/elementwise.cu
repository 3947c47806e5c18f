/* elementwise.cu - copies, sums, gathers and masks. */
#include "kernels/cuda/columns.h"
#include "kernels/cuda/packed.h"

extern "C" {
#include "kernels/elementwise.h"
}

/* ---- copies ---- */

/* WHOLE: all is in packs of eight. */
template <typename Y, int D, bool WHOLE>
static __global__ void copy(Y *y, Write write, PackedView x, float alpha, int64_t count) {
    FOR_GRID(i, (count + 7) / 8) {
        float a[8], b[8];
        read_up_to_8<D>(a, x, 8 * i, count);
        if constexpr (WHOLE) {
            if (write == ADD) load(b, y + 8 * i);
#pragma unroll
            for (int j = 0; j < 8; j++) a[j] = write == ADD ? b[j] + alpha * a[j] : alpha * a[j];
            store(y + 8 * i, a);
        } else {
            (void)b;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                int64_t k = 8 * i + j;
                if (k < count)
                    y[k] = from_float<Y>((write == ADD ? to_float(y[k]) : 0.0f) + alpha * a[j]);
            }
        }
    }
}

/* The common case, in packs: floats to floats. */
template <typename Y, typename X>
static __global__ void copy_packs(Y *y, Write write, const X *x, float alpha, int64_t packs) {
    wait_for_last();
    FOR_GRID(i, packs) {
        float a[4], b[4];
        load(a, x + 4 * i);
        if (write == ADD) load(b, y + 4 * i);
#pragma unroll
        for (int j = 0; j < 4; j++) a[j] = write == ADD ? b[j] + alpha * a[j] : alpha * a[j];
        store(y + 4 * i, a);
    }
}

extern "C" void cuda_scale_copy(Tensor y, Write write, Tensor x, float alpha) {
    int64_t count = tensor_count(y);
    if (!count) return;
    bool floats = (x.dtype == F32 || x.dtype == BF16) && fits_packs(count, y, x);
    unsigned grid = grid_for(y.device, floats ? count / 4 : (count + 7) / 8, 256);
    if (floats)
        WITH_FLOAT(y.dtype, Y, WITH_FLOAT(x.dtype, X, {
                       LAUNCH_NEXT(y.device, (copy_packs<Y, X>), grid, 256, data_of<Y>(y), write,
                                   data_of<X>(x), alpha, count / 4);
                   }));
    else
        WITH_FLOAT(y.dtype, Y, WITH_ANY(x.dtype, D, {
                       if (count % 8 == 0 && (uintptr_t)y.data % 32 == 0)
                           LAUNCH(y.device, (copy<Y, D, true>), grid, 256, 0, data_of<Y>(y), write,
                                  view_of(x), alpha, count);
                       else
                           LAUNCH(y.device, (copy<Y, D, false>), grid, 256, 0, data_of<Y>(y), write,
                                  view_of(x), alpha, count);
                   }));
}

template <typename T> static __global__ void set(T *y, float value, int64_t count) {
    FOR_GRID(i, count) y[i] = from_float<T>(value);
}

extern "C" void cuda_fill(Tensor y, float value) {
    int64_t count = tensor_count(y);
    if (!count) return;
    if (value == 0) {
        cuda_check(cudaMemsetAsync(y.data, 0, tensor_bytes(y), cuda_stream(y.device)), "fill");
        return;
    }
    WITH_FLOAT(y.dtype, T, {
        LAUNCH(y.device, (set<T>), grid_for(y.device, count, 256), 256, 0, data_of<T>(y), value,
               count);
    });
}

/* Pairs of normal numbers as random_normal makes them. */
template <typename T>
static __global__ void set_normal(T *y, uint64_t key, float factor, int64_t count) {
    FOR_GRID(pair, (count + 1) / 2) {
        uint64_t bits = random_u64(key, (uint64_t)pair);
        float u = ((float)(bits >> 40) + 0.5f) * 0x1p-24f;
        float angle = (float)(bits & 0xffffff) * (6.2831853071795865f * 0x1p-24f);
        float radius = factor * sqrtf(-2.0f * logf(u));
        y[2 * pair] = from_float<T>(radius * cosf(angle));
        if (2 * pair + 1 < count) y[2 * pair + 1] = from_float<T>(radius * sinf(angle));
    }
}

extern "C" void cuda_fill_normal(Tensor y, uint64_t key, float factor) {
    int64_t count = tensor_count(y);
    if (!count) return;
    WITH_FLOAT(y.dtype, T, {
        LAUNCH(y.device, (set_normal<T>), grid_for(y.device, (count + 1) / 2, 256), 256, 0,
               data_of<T>(y), key, factor, count);
    });
}

template <typename T, int V>
static __global__ void add(T *y, const T *a, const T *b, float alpha, int64_t packs) {
    FOR_GRID(i, packs) {
        float u[V], v[V];
        load(u, a + V * i);
        load(v, b + V * i);
#pragma unroll
        for (int j = 0; j < V; j++) u[j] = rounded<T>(u[j] + v[j]) * alpha;
        store(y + V * i, u);
    }
}

extern "C" void cuda_add_scaled(Tensor y, Tensor a, Tensor b, float alpha) {
    int64_t count = tensor_count(y);
    bool fits = fits_packs(count, y, a, b);
    if (!count) return;
    WITH_FLOAT(y.dtype, T, WITH_PACKS(fits, V, {
                   LAUNCH(y.device, (add<T, V>), grid_for(y.device, count / V, 256), 256, 0,
                          data_of<T>(y), data_of<T>(a), data_of<T>(b), alpha, count / V);
               }));
}

/* ---- rows ---- */

/* Rows move as words of type U: y[m] = x[rows[m]], a warp a row. */
template <typename U>
static __global__ void __launch_bounds__(256)
    gather(U *y, const U *x, const int32_t *rows, int64_t M, int64_t words) {
    constexpr int HELD = 4; /* words that are read at once */
    int64_t m = (int64_t)blockIdx.x * 8 + threadIdx.x / 32;
    if (m >= M) return;
    int64_t from = rows[m];
    for (int64_t first = threadIdx.x % 32; first < words; first += HELD * 32) {
        U held[HELD] = {};
#pragma unroll
        for (int k = 0; k < HELD; k++)
            if (from >= 0 && first + k * 32 < words) held[k] = x[from * words + first + k * 32];
#pragma unroll
        for (int k = 0; k < HELD; k++)
            if (first + k * 32 < words) store_past(y + m * words + first + k * 32, held[k]);
    }
}

/* A warp reads a row once and writes all its copies; and it clears the row of y of its number. */
template <typename U>
static __global__ void __launch_bounds__(256)
    spread(U *y, const U *x, const int32_t *slot, const int32_t *source, int64_t N, int64_t A,
           int64_t M, int64_t words) {
    constexpr int HELD = 4;
    int64_t m = (int64_t)blockIdx.x * 8 + threadIdx.x / 32;
    for (int64_t first = threadIdx.x % 32; m < N && first < words; first += HELD * 32) {
        U held[HELD] = {};
#pragma unroll
        for (int k = 0; k < HELD; k++)
            if (first + k * 32 < words) held[k] = x[m * words + first + k * 32];
        for (int64_t a = 0; a < A; a++) {
            U *to = y + slot[m * A + a] * words + first;
#pragma unroll
            for (int k = 0; k < HELD; k++)
                if (first + k * 32 < words) store_past(to + k * 32, held[k]);
        }
    }
    if (m >= M || source[m] >= 0) return;
    for (int64_t i = threadIdx.x % 32; i < words; i += 32) store_past(y + m * words + i, U{});
}

template <typename U>
static __global__ void scatter(U *y, const U *x, const int32_t *rows, int64_t M, int64_t words) {
    FOR_GRID(i, M * words) {
        RowPack word = row_pack(i, words);
        int64_t to = rows[word.row];
        if (to >= 0) y[to * words + word.at] = x[i];
    }
}

template <typename T>
static __global__ void scatter_add(T *y, const T *x, const int32_t *rows, int64_t M, int64_t D) {
    FOR_GRID(i, M * D) {
        int64_t to = rows[i / D];
        if (to < 0) continue;
        T *at = y + to * D + i % D;
        *at = from_float<T>(to_float(*at) + to_float(x[i]));
    }
}

/* Runs the statements with U the widest word that rows of `bytes` at both addresses divide into. */
#define WITH_WORDS(bytes, a, b, U, ...)                                                            \
    do {                                                                                           \
        uintptr_t places = (uintptr_t)(a) | (uintptr_t)(b) | (uintptr_t)(bytes);                   \
        if (places % 16 == 0) {                                                                    \
            typedef uint4 U;                                                                       \
            __VA_ARGS__;                                                                           \
        } else if (places % 4 == 0) {                                                              \
            typedef uint32_t U;                                                                    \
            __VA_ARGS__;                                                                           \
        } else {                                                                                   \
            typedef uint16_t U;                                                                    \
            __VA_ARGS__;                                                                           \
        }                                                                                          \
    } while (0)

extern "C" void cuda_gather_rows(Tensor y, Tensor x, Tensor rows) {
    int64_t M = tensor_rows(y), bytes = tensor_cols(y) * (int64_t)dtype_size(y.dtype);
    if (!M || !bytes) return;
    WITH_WORDS(bytes, y.data, x.data, U, {
        int64_t words = bytes / (int64_t)sizeof(U);
        LAUNCH(y.device, (gather<U>), (unsigned)ceil_div(M, 8), 256, 0, data_of<U>(y),
               data_of<U>(x), data_of<int32_t>(rows), M, words);
    });
}

extern "C" void cuda_spread_rows(Tensor y, Tensor x, Tensor slot, Tensor source) {
    int64_t M = tensor_rows(y), N = tensor_rows(x), A = tensor_cols(slot),
            bytes = tensor_cols(y) * (int64_t)dtype_size(y.dtype);
    if (!M || !bytes) return;
    WITH_WORDS(bytes, y.data, x.data, U, {
        int64_t words = bytes / (int64_t)sizeof(U);
        LAUNCH(y.device, (spread<U>), (unsigned)ceil_div(M > N ? M : N, 8), 256, 0, data_of<U>(y),
               data_of<U>(x), data_of<int32_t>(slot), data_of<int32_t>(source), N, A, M, words);
    });
}

extern "C" void cuda_scatter_rows(Tensor y, Write write, Tensor x, Tensor rows) {
    int64_t M = tensor_rows(x), D = tensor_cols(y), bytes = D * (int64_t)dtype_size(y.dtype);
    if (write == SET)
        cuda_check(cudaMemsetAsync(y.data, 0, tensor_bytes(y), cuda_stream(y.device)), "scatter");
    if (!M || !D) return;
    if (write == SET)
        WITH_WORDS(bytes, y.data, x.data, U, {
            int64_t words = bytes / (int64_t)sizeof(U);
            LAUNCH(y.device, (scatter<U>), grid_for(y.device, M * words, 256), 256, 0,
                   data_of<U>(y), data_of<U>(x), data_of<int32_t>(rows), M, words);
        });
    else
        WITH_FLOAT(y.dtype, T, {
            LAUNCH(y.device, (scatter_add<T>), grid_for(y.device, M * D, 256), 256, 0,
                   data_of<T>(y), data_of<T>(x), data_of<int32_t>(rows), M, D);
        });
}

template <typename T, int V>
static __global__ void add_gathered(T *y, const T *x, const int32_t *slot, int64_t N, int64_t A,
                                    int64_t D) {
    FOR_GRID(i, N * (D / V)) {
        RowPack pack = row_pack(i, D / V);
        float sum[V] = {0}, a[V];
#pragma unroll 4
        for (int64_t k = 0; k < A; k++) {
            load(a, x + slot[pack.row * A + k] * D + pack.at * V);
#pragma unroll
            for (int j = 0; j < V; j++) sum[j] += a[j];
        }
        store(y + i * V, sum);
    }
}

extern "C" void cuda_gather_sums(Tensor y, Tensor x, Tensor slot) {
    int64_t N = tensor_rows(y), D = tensor_cols(y), A = tensor_cols(slot);
    bool fits = fits_packs(D, y, x);
    if (!N || !D) return;
    WITH_FLOAT(y.dtype, T, WITH_LONG_PACKS(T, D, fits, V, {
                   LAUNCH(y.device, (add_gathered<T, V>), grid_for(y.device, N * (D / V), 256), 256,
                          0, data_of<T>(y), data_of<T>(x), data_of<int32_t>(slot), N, A, D);
               }));
}

template <typename U>
static __global__ void swap(U *y, const U *x, int64_t I, int64_t J, int64_t words) {
    FOR_GRID(k, I * J * words) {
        RowPack word = row_pack(k, words), row = row_pack(word.row, I);
        y[k] = x[(row.at * J + row.row) * words + word.at];
    }
}

extern "C" void cuda_swap_outer(Tensor y, Tensor x) {
    int64_t I = x.shape[0], J = x.shape[1], bytes = x.shape[2] * (int64_t)dtype_size(x.dtype);
    if (!tensor_count(x)) return;
    WITH_WORDS(bytes, y.data, x.data, U, {
        int64_t words = bytes / (int64_t)sizeof(U);
        LAUNCH(x.device, (swap<U>), grid_for(x.device, I * J * words, 256), 256, 0, data_of<U>(y),
               data_of<U>(x), I, J, words);
    });
}

/* ---- masks and factors ---- */

template <typename T>
static __global__ void drop(T *y, const T *x, float p, float keep, uint64_t key, int64_t count) {
    FOR_GRID(i, count)
    y[i] = random_uniform(key, (uint64_t)i) >= p ? from_float<T>(to_float(x[i]) * keep)
                                                 : from_float<T>(0.0f);
}

extern "C" void cuda_dropout(Tensor y, Tensor x, float p, uint64_t key) {
    int64_t count = tensor_count(y);
    if (!count) return;
    WITH_FLOAT(y.dtype, T, {
        LAUNCH(y.device, (drop<T>), grid_for(y.device, count, 256), 256, 0, data_of<T>(y),
               data_of<T>(x), p, 1.0f / (1.0f - p), key, count);
    });
}

template <typename T, typename W>
static __global__ void shift(T *y, const T *x, const W *more, int64_t D, int64_t count) {
    FOR_GRID(i, count) y[i] = from_float<T>(to_float(x[i]) + to_float(more[i % D]));
}

extern "C" void cuda_shift_columns(Tensor y, Tensor x, Tensor more) {
    int64_t count = tensor_count(y);
    if (!count) return;
    WITH_FLOAT(y.dtype, T, WITH_FLOAT(more.dtype, W, {
                   LAUNCH(y.device, (shift<T, W>), grid_for(y.device, count, 256), 256, 0,
                          data_of<T>(y), data_of<T>(x), data_of<W>(more), tensor_cols(x), count);
               }));
}

template <typename Y, typename X, typename W, int V>
static __global__ void times_columns(Y *y, Write write, const X *x, const W *weight, float alpha,
                                     int64_t count, int64_t D) {
    FOR_GRID(i, count / V) {
        float out[V], w[V], old[V];
        load(out, x + i * V);
        load(w, weight + i * V % D);
        if (write == ADD) load(old, y + i * V);
#pragma unroll
        for (int j = 0; j < V; j++) {
            out[j] *= w[j];
            if (alpha != 1.0f) out[j] = alpha * rounded<X>(out[j]);
            if (write == ADD) out[j] += old[j];
        }
        store(y + i * V, out);
    }
}

extern "C" void cuda_scale_columns(Tensor y, Write write, Tensor x, Tensor weight, float alpha) {
    int64_t count = tensor_count(y), D = tensor_cols(x);
    bool fits = fits_packs(D, y, x, weight);
    if (!count) return;
    WITH_FLOAT(y.dtype, Y,
               WITH_FLOAT(x.dtype, X, WITH_FLOAT(weight.dtype, W, WITH_PACKS(fits, V, {
                                                     LAUNCH(y.device, (times_columns<Y, X, W, V>),
                                                            grid_for(y.device, count / V, 256), 256,
                                                            0, data_of<Y>(y), write, data_of<X>(x),
                                                            data_of<W>(weight), alpha, count, D);
                                                 }))));
}

template <typename Y, typename X>
static __global__ void times_rows(Y *y, const X *x, const float *weight, int64_t count, int64_t D) {
    FOR_GRID(i, count) y[i] = from_float<Y>(to_float(x[i]) * weight[i / D]);
}

extern "C" void cuda_scale_rows(Tensor y, Tensor x, Tensor weight) {
    int64_t count = tensor_count(y), D = tensor_cols(x);
    if (!count) return;
    WITH_FLOAT(y.dtype, Y, WITH_FLOAT(x.dtype, X, {
                   LAUNCH(y.device, (times_rows<Y, X>), grid_for(y.device, count, 256), 256, 0,
                          data_of<Y>(y), data_of<X>(x), data_of<float>(weight), count, D);
               }));
}

namespace {
template <typename A, typename B> struct Product {
    const A *a;
    const B *b; /* NULL: ones */
    int64_t D;
    __device__ float operator()(int64_t n, int64_t d) const {
        return to_float(a[n * D + d]) * (b ? to_float(b[n * D + d]) : 1.0f);
    }
};
} // namespace

extern "C" void cuda_dot_columns(Tensor y, Tensor a, Tensor b) {
    int64_t D = tensor_cols(a);
    WITH_FLOAT(a.dtype, A, WITH_FLOAT(b.data ? b.dtype : F32, B, {
                   add_column_sums(a.device, data_of<float>(y), tensor_rows(a), D,
                                   Product<A, B>{data_of<A>(a), data_of<B>(b), D});
               }));
}

static __global__ void norms(float *y, const float *x, int64_t D) {
    __shared__ float space[32];
    float sum = 0;
    for (int64_t d = threadIdx.x; d < D; d += blockDim.x) {
        float a = x[blockIdx.x * D + d];
        sum += a * a;
    }
    sum = block_sum(sum, space);
    if (!threadIdx.x) y[blockIdx.x] = sqrtf(sum);
}

extern "C" void cuda_row_norms(Tensor y, Tensor x) {
    if (!tensor_rows(x)) return;
    LAUNCH(x.device, (norms), (unsigned)tensor_rows(x), 256, 0, data_of<float>(y),
           data_of<float>(x), tensor_cols(x));
}

static __global__ void divide(float *y, Write write, const float *a, const float *b,
                              int64_t count) {
    FOR_GRID(i, count)
    y[i] = (write == ADD ? y[i] : 0.0f) + (b[i] != 0 ? a[i] / b[i] : 0.0f);
}

extern "C" void cuda_quotient(Tensor y, Write write, Tensor a, Tensor b) {
    int64_t count = tensor_count(y);
    if (!count) return;
    LAUNCH(y.device, (divide), grid_for(y.device, count, 256), 256, 0, data_of<float>(y), write,
           data_of<float>(a), data_of<float>(b), count);
}
