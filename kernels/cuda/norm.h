/* norm.h - a row's norm among the threads of a warp or a block; and two norms that follow each
 * other, as a kernel of their own and as the end of another make them. */
#ifndef CUDA_NORM_H
#define CUDA_NORM_H

#include "kernels/cuda/codes.h"

extern "C" {
#include "kernels/norm.h"
}

#define NORM_THREADS 256
#define WARP_COLS    1024 /* rows up to here go to one warp */
#define MANY         128  /* threads of a row where rows are many: more of those are under way */

/* Threads of a block, ROW of them for each row; and which row is this thread's. */
template <int ROW> __host__ __device__ constexpr int threads_of() {
    return ROW == 32 ? NORM_THREADS : ROW;
}
template <int ROW> DEVICE_FUNCTION int64_t row_of() {
    return (int64_t)blockIdx.x * (threads_of<ROW>() / ROW) + threadIdx.x / ROW;
}
template <int ROW> DEVICE_FUNCTION float row_sum(float x, float *space) {
    return ROW == 32 ? warp_sum(x) : block_sum(x, space);
}

/* Packs of a row that a thread holds where rows are few, and the most where they are many; of
 * longer ones what is added and written is read again. */
#define HELD      4
#define HELD_MANY 3
#define FEW_ROWS  64

/* x rstd weight, which nothing that is added later joins in one rounding: as in pairs, so alone. */
DEVICE_FUNCTION float normed(float x, float rstd, float weight) {
    return __fmul_rn(x * rstd, weight);
}

/* ---- in pairs ---- */

/* A NormPair of rows of D. */
template <typename T, typename W> struct PairOf {
    T *y, *next;
    Codes codes;
    const T *x, *residual;
    const W *weight, *next_weight;
    float scale, eps;
    int64_t D;
};

template <typename T, typename W> static PairOf<T, W> pair_of(const NormPair &p) {
    Codes codes = p.codes.data ? codes_in(p.codes.data, tensor_count(p.next)) : Codes{};
    return PairOf<T, W>{data_of<T>(p.y),
                        data_of<T>(p.next),
                        codes,
                        data_of<T>(p.x),
                        data_of<T>(p.residual),
                        data_of<W>(p.weight),
                        data_of<W>(p.next_weight),
                        p.scale,
                        p.eps,
                        tensor_cols(p.x)};
}

/* Whether normalise_pair takes it: rows are few, and their threads hold them. */
static inline bool pair_is_one(const NormPair &p) {
    int64_t D = tensor_cols(p.x), each = (int64_t)(16 / dtype_size(p.x.dtype)),
            longest = HELD * (D <= WARP_COLS ? 32 : NORM_THREADS) * each;
    return tensor_rows(p.x) <= FEW_ROWS && fits_packs(D, p.y, p.x, p.weight, p.residual) &&
           fits_packs(D, p.next, p.next_weight) && D % each == 0 && D <= longest &&
           p.weight.dtype == p.next_weight.dtype;
}

/* Row n, by ROW threads, which hold it in registers from one norm to the next. STARTS: it begins a
 * kernel, and waits for the last one. */
template <int V, int ROW, bool STARTS, typename T, typename W>
DEVICE_FUNCTION void normalise_pair(const PairOf<T, W> &p, int64_t n, bool here) {
    __shared__ float space[2][32];
    int lane = threadIdx.x % ROW;
    int64_t D = p.D;
    Kept<W, V> factors[HELD] = {}, others[HELD] = {};
#pragma unroll
    for (int i = 0; i < HELD; i++) { /* weights are there before the last kernel ends */
        int64_t d = (lane + i * ROW) * V;
        if (!here || d >= D) break;
        factors[i].read(p.weight + d);
        others[i].read(p.next_weight + d);
    }
    if (STARTS) wait_for_last();
    Kept<T, V> held[HELD] = {}, more[HELD] = {};
    float sum = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int64_t d = (lane + i * ROW) * V;
        if (!here || d >= D) break;
        held[i].read(p.x + n * D + d);
        more[i].read(p.residual + n * D + d);
    }
#pragma unroll
    for (int i = 0; i < HELD; i++)
#pragma unroll
        for (int j = 0; j < V; j++) sum += held[i][j] * held[i][j];
    float r = 1.0f / sqrtf(row_sum<ROW>(sum, space[0]) / (float)D + p.eps);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int64_t d = (lane + i * ROW) * V;
        if (!here || d >= D) break;
        float out[V];
#pragma unroll
        for (int j = 0; j < V; j++) {
            float one = normed(held[i][j], r, factors[i][j]);
            out[j] = rounded<T>(rounded<T>(one) + more[i][j]);
            if (p.scale != 1.0f) out[j] = rounded<T>(p.scale * out[j]);
            squares += out[j] * out[j];
        }
        store(p.y + n * D + d, out);
        held[i].keep(out);
    }
    r = 1.0f / sqrtf(row_sum<ROW>(squares, space[1]) / (float)D + p.eps);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int64_t d = (lane + i * ROW) * V;
        bool inside = here && d < D;
        if (!p.codes.scales && !inside) break;
        float out[V];
#pragma unroll
        for (int j = 0; j < V; j++) out[j] = rounded<T>(normed(held[i][j], r, others[i][j]));
        if (inside) store(p.next + n * D + d, out);
        if (p.codes.scales) store_codes(p.codes, n * D + d, out, inside);
    }
}

#endif
