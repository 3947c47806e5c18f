/* rows.h - norms' rows: a warp each where they are short, else a block. */
#ifndef CUDA_ROWS_H
#define CUDA_ROWS_H

#include "kernels/cuda/cuda.h"

#define THREADS   256
#define WARP_COLS 1024 /* rows up to here go to one warp */
#define MANY      128  /* threads of a row where rows are many: more of those are under way */

/* Threads of a block, ROW of them for each row; and which row is this thread's. */
template <int ROW> __host__ __device__ constexpr int threads_of() {
    return ROW == 32 ? THREADS : ROW;
}
template <int ROW> DEVICE_FUNCTION int64_t row_of() {
    return (int64_t)blockIdx.x * (threads_of<ROW>() / ROW) + threadIdx.x / ROW;
}
template <int ROW> DEVICE_FUNCTION float row_sum(float x, float *space) {
    return ROW == 32 ? warp_sum(x) : block_sum(x, space);
}

/* Packs of a row that a thread holds where rows are few, and the most where they are many; of
 * longer ones what is added and written is read again. */
#define HELD_MANY 3
#define FEW_ROWS  64
#define LONG      768 /* threads of a long row where they are few */
template <typename T, int ROW> __host__ __device__ constexpr int held_of() {
    return ROW == 32 ? 4 : sizeof(T) / sizeof(bf16);
}

/* x rstd weight, which nothing that is added later joins in one rounding: as in pairs, so alone. */
DEVICE_FUNCTION float normed(float x, float rstd, float weight) {
    return __fmul_rn(x * rstd, weight);
}

/* y = scale (residual + x), rounded where tensors would be. A scale of 1 changes nothing. */
template <typename T, int V>
DEVICE_FUNCTION void add_scaled(Kept<T, V> &y, float (&x)[V], const Kept<T, V> &residual,
                                float scale) {
    round_all<T>(x);
#pragma unroll
    for (int j = 0; j < V; j++) x[j] += residual[j];
    round_all<T>(x);
#pragma unroll
    for (int j = 0; j < V; j++) x[j] *= scale;
    y.keep(x);
}

/* Runs the statements with ROW the threads of a row, where rows are many or nobody waits for few.
 */
#define WITH_MANY(D, ROW, ...)                                                                     \
    do {                                                                                           \
        if ((D) <= WARP_COLS) {                                                                    \
            constexpr int ROW = 32;                                                                \
            __VA_ARGS__;                                                                           \
        } else {                                                                                   \
            constexpr int ROW = MANY;                                                              \
            __VA_ARGS__;                                                                           \
        }                                                                                          \
    } while (0)

/* The same of N rows. */
#define WITH_ROW(N, D, ROW, ...)                                                                   \
    do {                                                                                           \
        if ((D) <= WARP_COLS || (N) > FEW_ROWS) {                                                  \
            WITH_MANY(D, ROW, __VA_ARGS__);                                                        \
        } else if ((D) <= 8 * THREADS) {                                                           \
            constexpr int ROW = THREADS;                                                           \
            __VA_ARGS__;                                                                           \
        } else {                                                                                   \
            constexpr int ROW = LONG;                                                              \
            __VA_ARGS__;                                                                           \
        }                                                                                          \
    } while (0)

/* y = scale (residual + norm(x)), each of weight and residual NULL or there; `given`: rstd is read.
 */
void norm_rows(Tensor y, Tensor rstd, Tensor x, Tensor weight, Tensor residual, float scale,
               float eps, bool given);

#endif
