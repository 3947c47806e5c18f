/* gemm_thin.h - products of a bf16 matrix with f32 ones of few columns: what adapters make of their
 * linear's input and of its gradient, and their own gradients.
 *
 * They take as long as reading the bf16 matrix does, so that is read once, from memory into the
 * registers of the products, and the f32 numbers are taken apart into two bf16 each (17 bits of
 * them) as they are read. What is summed over is shared out to blocks; of those with the same
 * results the last to be done adds up their sums, in the blocks' order. */
#ifndef CUDA_GEMM_THIN_H
#define CUDA_GEMM_THIN_H

#include "kernels/cuda/mma.h"

extern "C" {
#include "kernels/matmul.h"
}

#define THIN_WARPS 8
#define THIN_ROWS  (16 * THIN_WARPS) /* of a block of thin_rows */
#define THIN_DEPTH 64                /* of K that a warp takes at a time; columns of thin_columns */
#define THIN_TILES 6                 /* times 8 columns in all, at most */
#define THIN_MOST  4096              /* results' tiles, of which each has a counter */

/* Blocks of a tile of results that are done; 0 between kernels. */
static __device__ int thin_done[THIN_MOST];

/* Whether this block is the last of its tile; what the others wrote before they asked can be read
 * then. Of all threads. */
DEVICE_FUNCTION bool is_last_of(int tile, int blocks) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (!threadIdx.x) {
        last = atomicAdd(&thin_done[tile], 1) + 1 == blocks;
        if (last) thin_done[tile] = 0;
    }
    __syncthreads();
    __threadfence();
    return last;
}

/* Two f32 as two words of two bf16 each: what is big of them and what is left. */
DEVICE_FUNCTION void take_pair_apart(unsigned &big, unsigned &small, float x, float y) {
    big = pack_bf16(x, y);
    small = pack_bf16(x - __uint_as_float(big << 16), y - __uint_as_float(big & 0xffff0000u));
}

/* ---- rows: y (M, r) = a (M, K) b ---- */

/* Matrices beside each other: i has columns up to ends[i] of all; absent ones end where the last
 * does. */
struct ThinMatrices {
    const float *b[MATRICES_MOST];
    float *y[MATRICES_MOST];
    int ends[MATRICES_MOST];
};

static_assert(MATRICES_MOST == 3, "thin_matrix");

/* The matrix that has column n, and where that one begins. */
DEVICE_FUNCTION int thin_matrix(const ThinMatrices &all, int n, int *begin) {
    int i = (n >= all.ends[0]) + (n >= all.ends[1]);
    *begin = i == 0 ? 0 : i == 1 ? all.ends[0] : all.ends[1];
    return i;
}

/* y_i (M, r_i) (=|+=) alpha a (M, K) b_i^T of b_i (r_i, K); TB: of one b (K, 8 TILES), b not
 * turned. r_i multiples of 8, TILES times 8 in all or fewer; K one of THIN_DEPTH. sums: of each of
 * the grid's rows of blocks (M, 8 TILES). A warp has 16 rows; in the order in which K lies in its
 * operands lane t of four has 16 neighbours of 64. */
template <int TILES, bool TB>
static __global__ void __launch_bounds__(32 * THIN_WARPS, TILES > 2 ? 2 : 3)
    thin_rows(ThinMatrices all, Write write, const bf16 *a, int64_t M, int64_t K, float alpha,
              float *sums_of_blocks) {
    constexpr int R = 8 * TILES;
    wait_for_last();
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int64_t begin_row = (int64_t)blockIdx.x * THIN_ROWS, m0 = begin_row + 16 * warp;
    int64_t chunks = K / THIN_DEPTH, chunk = chunks * blockIdx.y / gridDim.y,
            end = chunks * (blockIdx.y + 1) / gridDim.y;
    float sums[TILES][4] = {};
    const float *from[TILES];
#pragma unroll
    for (int j = 0; j < TILES; j++) {
        int begin, i = thin_matrix(all, 8 * j, &begin);
        from[j] = TB                    ? all.b[0]
                  : 8 * j < all.ends[2] ? (i == 0   ? all.b[0]
                                           : i == 1 ? all.b[1]
                                                    : all.b[2]) +
                                              (8 * j - begin + g) * K
                                        : NULL;
    }
    for (; chunk < end; chunk++) {
        int64_t k = chunk * THIN_DEPTH + 16 * t;
        uint4 rows[2][2];
#pragma unroll
        for (int p = 0; p < 2; p++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int64_t m = m0 + g + 8 * p;
                rows[p][h] = uint4{0, 0, 0, 0};
                if (m < M) rows[p][h] = *(const uint4 *)(a + m * K + k + 8 * h);
            }
#pragma unroll
        for (int s = 0; s < 4; s++) {
            const uint4 &low = rows[0][s / 2], &high = rows[1][s / 2];
            const unsigned x[4] = {s % 2 ? low.z : low.x, s % 2 ? high.z : high.x,
                                   s % 2 ? low.w : low.y, s % 2 ? high.w : high.y};
            float turned[4][TILES];
            if constexpr (TB)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    load<TILES>(turned[i], from[0] + (k + 4 * s + i) * R + g * TILES);
#pragma unroll
            for (int j = 0; j < TILES; j++) {
                float w[4];
                if (!TB && !from[j]) continue;
                if constexpr (TB)
#pragma unroll
                    for (int i = 0; i < 4; i++) w[i] = turned[i][j];
                else
                    load<4>(w, from[j] + k + 4 * s);
                unsigned big[2], small[2];
                take_pair_apart(big[0], small[0], w[0], w[1]);
                take_pair_apart(big[1], small[1], w[2], w[3]);
                mma_bf16(sums[j], x, small);
                mma_bf16(sums[j], x, big);
            }
        }
    }
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int p = 0; p < 2; p++) {
            int64_t m = m0 + g + 8 * p;
            const float pair[2] = {sums[j][2 * p], sums[j][2 * p + 1]};
            if (m < M) store(sums_of_blocks + (blockIdx.y * M + m) * R + 8 * j + 2 * t, pair);
        }
    if (!is_last_of((int)blockIdx.x, (int)gridDim.y)) return;
    for (int i = threadIdx.x; i < THIN_ROWS * R; i += 32 * THIN_WARPS) {
        int64_t m = begin_row + i / R;
        int n = i % R, begin, column = TB ? n % 8 * TILES + n / 8 : n;
        int which = thin_matrix(all, column, &begin);
        if (m >= M || column >= all.ends[2]) continue;
        float sum = 0;
        for (unsigned s = 0; s < gridDim.y; s++) sum += sums_of_blocks[(s * M + m) * R + n];
        float *y = which == 0 ? all.y[0] : which == 1 ? all.y[1] : all.y[2];
        int end = which == 0 ? all.ends[0] : which == 1 ? all.ends[1] : all.ends[2];
        float *to = y + m * (end - begin) + column - begin;
        *to = (write == ADD ? *to : 0.0f) + alpha * sum;
    }
}

/* ---- columns: y (r, C) or (C, r) = u^T x ---- */

/* Up to 16 columns, from `first` on, of a matrix u (M, rank), and the results that they are for. */
struct ThinGroup {
    const float *u;
    float *y;
    int first, rank;
};
struct ThinGroups {
    ThinGroup at[MATRICES_MOST];
};

/* y (rank, C), or TURNED (C, rank), (=|+=) alpha u^T x of x (M, C), of all groups; ranks multiples
 * of 8, C one of THIN_DEPTH. sums: of each of the grid's rows of blocks (GROUPS, 16, C). A warp has
 * 16 rows of 64 columns at a time; in its operands lane t of four has four rows side by side, lane
 * g of eight has eight columns, and two of u's. */
template <int GROUPS, bool TURNED>
static __global__ void __launch_bounds__(32 * THIN_WARPS, GROUPS > 1 ? 1 : 2)
    thin_columns(ThinGroups groups, Write write, const bf16 *x, int64_t M, int64_t C, float alpha,
                 float *sums_of_blocks) {
    __shared__ float parts[THIN_WARPS][16 * THIN_DEPTH];
    wait_for_last();
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int64_t c0 = (int64_t)blockIdx.x * THIN_DEPTH, chunks = (M + 15) / 16;
    int64_t chunk = chunks * blockIdx.y / gridDim.y + warp,
            end = chunks * (blockIdx.y + 1) / gridDim.y;
    float sums[GROUPS][8][4] = {};
    for (; chunk < end; chunk += THIN_WARPS) {
        int64_t m = chunk * 16 + 4 * t;
        uint4 rows[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            rows[i] = uint4{0, 0, 0, 0};
            if (m + i < M) rows[i] = *(const uint4 *)(x + (m + i) * C + c0 + 8 * g);
        }
        unsigned big[GROUPS][4], small[GROUPS][4];
#pragma unroll
        for (int q = 0; q < GROUPS; q++) {
            const ThinGroup &group = groups.at[q];
            float u[4][2] = {};
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (m + i < M && group.first + 2 * g < group.rank)
                    load<2>(u[i], group.u + (m + i) * group.rank + group.first + 2 * g);
#pragma unroll
            for (int p = 0; p < 4; p++)
                take_pair_apart(big[q][p], small[q][p], u[p / 2 * 2][p % 2],
                                u[p / 2 * 2 + 1][p % 2]);
        }
#pragma unroll
        for (int j = 0; j < 8; j++) {
            auto word = [&](const uint4 &row) {
                return j / 2 == 0 ? row.x : j / 2 == 1 ? row.y : j / 2 == 2 ? row.z : row.w;
            };
            auto pair = [&](const uint4 &first, const uint4 &second) {
                return __byte_perm(word(first), word(second), j % 2 ? 0x7632 : 0x5410);
            };
            const unsigned columns[2] = {pair(rows[0], rows[1]), pair(rows[2], rows[3])};
#pragma unroll
            for (int q = 0; q < GROUPS; q++) {
                mma_bf16(sums[q][j], small[q], columns);
                mma_bf16(sums[q][j], big[q], columns);
            }
        }
    }
#pragma unroll
    for (int q = 0; q < GROUPS; q++) {
        __syncthreads();
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int p = 0; p < 4; p++)
                parts[warp][(2 * g + p / 2) * THIN_DEPTH + 8 * (2 * t + p % 2) + j] = sums[q][j][p];
        __syncthreads();
        for (int i = threadIdx.x; i < 16 * THIN_DEPTH; i += 32 * THIN_WARPS) {
            float sum = 0;
            for (int w = 0; w < THIN_WARPS; w++) sum += parts[w][i];
            int row = (int)(blockIdx.y * GROUPS + q) * 16 + i / THIN_DEPTH;
            sums_of_blocks[row * C + c0 + i % THIN_DEPTH] = sum;
        }
    }
    if (!is_last_of((int)blockIdx.x, (int)gridDim.y)) return;
#pragma unroll
    for (int q = 0; q < GROUPS; q++) {
        const ThinGroup &group = groups.at[q];
        for (int i = threadIdx.x; i < 16 * THIN_DEPTH; i += 32 * THIN_WARPS) {
            int r = TURNED ? i % 16 : i / THIN_DEPTH;
            int64_t c = c0 + (TURNED ? i / 16 : i % THIN_DEPTH);
            if (group.first + r >= group.rank) continue;
            float sum = 0;
            for (unsigned s = 0; s < gridDim.y; s++)
                sum += sums_of_blocks[((s * GROUPS + q) * 16 + r) * C + c];
            float *to = group.y + (TURNED ? c * group.rank + group.first + r
                                          : (int64_t)(group.first + r) * C + c);
            *to = (write == ADD ? *to : 0.0f) + alpha * sum;
        }
    }
}

#endif
