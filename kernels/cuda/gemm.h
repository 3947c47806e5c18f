/* gemm.h - products on tensor cores that cuBLASLt has not: grouped by rows, of packed weights, of
 * f32 operands into bf16, and of groups to f32 accuracy. Tiles of both operands lie in shared
 * memory, two of each by turns: while one is multiplied the next comes into registers. */
#ifndef CUDA_GEMM_H
#define CUDA_GEMM_H

#include "kernels/cuda/mma.h"
#include "kernels/cuda/packed.h"

extern "C" {
#include "kernels/matmul.h"
}

/* Rows sorted by group; offsets NULL: one group of all rows. Where counts is given counts[g] rows
 * from offsets[g] on belong to g, else all up to offsets[g + 1]. */
struct Groups {
    const int32_t *offsets;
    int count;
    const int32_t *counts;
};

/* What a product is of. Row-major; of operands in groups `b` (or, where rows are summed over, y)
 * has one matrix behind the other. NT, NN  y (M, N), a (M, K), b (N, K) or (K, N) TN      y (M, N),
 * a (K, M), b (K, N), K the rows */
struct Shape {
    int64_t M, N, K;
};

/* ---- which tile is a block's ---- */

/* Rows of group g of M: first and behind the last. */
DEVICE_FUNCTION int64_t group_begin(const Groups &groups, int g) {
    return groups.offsets ? groups.offsets[g] : 0;
}
DEVICE_FUNCTION int64_t group_end(const Groups &groups, int g, int64_t M) {
    if (!groups.offsets) return M;
    return groups.counts ? groups.offsets[g] + groups.counts[g] : groups.offsets[g + 1];
}

/* Rows first .. last - 1 of group g. */
struct RowTile {
    int g;
    int64_t first, last;
};

/* Tile number `tile` of BM rows, groups not sharing one; first == last when there are fewer. All
 * threads of the block get the same. */
template <int BM> DEVICE_FUNCTION RowTile find_rows(const Groups &groups, int64_t M, int64_t tile) {
    __shared__ int64_t found[3];
    if (!groups.offsets) {
        int64_t first = tile * BM;
        return RowTile{0, first, first + BM < M ? first + BM : M};
    }
    int lane = threadIdx.x % 32;
    if (!threadIdx.x) found[0] = found[1] = found[2] = 0;
    __syncthreads();
    if (threadIdx.x < 32) {
        int before = 0;
        for (int base = 0; base < groups.count; base += 32) {
            int g = base + lane;
            int begin = 0, end = 0;
            if (g < groups.count)
                begin = (int)group_begin(groups, g), end = (int)group_end(groups, g, M);
            int tiles = (end - begin + BM - 1) / BM, sum = warp_running_sum(tiles);
            int64_t mine = tile - (before + sum - tiles);
            if (mine >= 0 && mine < tiles) {
                found[0] = g;
                found[1] = begin + mine * BM;
                found[2] = found[1] + BM < end ? found[1] + BM : end;
            }
            before += __shfl_sync(0xffffffffu, sum, 31);
        }
    }
    __syncthreads();
    return RowTile{(int)found[0], found[1], found[2]};
}

/* The most tiles of BM rows that M rows in groups can make. */
static inline int64_t most_row_tiles(const Groups &groups, int64_t M, int BM) {
    int64_t tiles = ceil_div(M, BM);
    return groups.offsets ? tiles + groups.count : tiles;
}

/* ---- bf16 ---- */

/* Eight elements of row `row`, from column `col` on, as bf16; zeros outside (rows, cols). `base`:
 * elements before the matrix. */
template <int D>
DEVICE_FUNCTION uint4 load_chunk(const PackedView &t, int64_t base, int64_t row, int64_t col,
                                 int64_t rows, int64_t cols, bool aligned) {
    uint4 out = {0, 0, 0, 0};
    if (row >= rows || col >= cols) return out;
    int64_t at = base + row * cols + col;
    if constexpr (D == BF16) {
        const bf16 *from = (const bf16 *)t.data + at;
        if (aligned && col + 8 <= cols) return *(const uint4 *)from;
        unsigned x[4] = {0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (col + i < cols) x[i / 2] |= (unsigned)from[i].bits << (i % 2 * 16);
        return uint4{x[0], x[1], x[2], x[3]};
    } else {
        float x[8];
        read8<D>(x, t, at);
        return uint4{pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]),
                     pack_bf16(x[6], x[7])};
    }
}

/* How big tiles are and how warps share one. */
template <int BM_, int BN_, int WM_, int WN_> struct Tiles {
    static constexpr int BM = BM_, BN = BN_, BK = 32, WM = WM_, WN = WN_;
    static constexpr int THREADS = 32 * WM * WN;
    static constexpr int MT = BM / WM / 16, NT = BN / WN / 8; /* of a warp: tiles of the product */
};

/* Elements from one row of a tile in shared memory to the next: 16 bytes more than its length, so
 * that eight rows begin in different banks. */
template <bool TURNED, int LENGTH> __host__ __device__ constexpr int tile_stride() {
    return TURNED ? LENGTH + 8 : 32 + 8;
}

/* y (=|+=) alpha a b for the rows or group that is the block's. TA, TB: tiles lie in memory with K
 * as rows. DB: dtype of b. */
template <typename S, bool TA, bool TB, int DB, typename Y>
static __global__ void __launch_bounds__(S::THREADS, S::THREADS > 128 ? 2 : 6)
    gemm16(Y *y, Write write, PackedView a, PackedView b, Shape shape, Groups groups, float alpha,
           bool a_aligned, bool b_aligned) {
    constexpr int BM = S::BM, BN = S::BN, BK = S::BK;
    constexpr int A_STRIDE = tile_stride<TA, BM>(), B_STRIDE = tile_stride<TB, BN>();
    constexpr int A_TILE = (TA ? BK : BM) * A_STRIDE, B_TILE = (TB ? BK : BN) * B_STRIDE;
    constexpr int A_CHUNKS = BM * BK / 8, B_CHUNKS = BN * BK / 8;
    constexpr int A_EACH = (A_CHUNKS + S::THREADS - 1) / S::THREADS,
                  B_EACH = (B_CHUNKS + S::THREADS - 1) / S::THREADS;
    __shared__ __align__(16) bf16 a_tiles[2][A_TILE];
    __shared__ __align__(16) bf16 b_tiles[2][B_TILE];

    int64_t M = shape.M, N = shape.N, n0 = (int64_t)blockIdx.x * BN, m0, m_end, k0, k_end, b_base;
    int g;
    if (TA) { /* one matrix of sums for each group */
        g = blockIdx.z;
        m0 = (int64_t)blockIdx.y * BM;
        m_end = M;
        k0 = groups.offsets ? groups.offsets[g] : 0;
        k_end = groups.offsets ? groups.offsets[g + 1] : shape.K;
        y += g * M * N;
        b_base = 0;
    } else {
        RowTile rows = find_rows<BM>(groups, M, blockIdx.y);
        if (rows.first == rows.last) return;
        g = rows.g;
        m0 = rows.first;
        m_end = rows.last;
        k0 = 0;
        k_end = shape.K;
        b_base = g * N * shape.K;
    }

    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int wm = warp / S::WN * (BM / S::WM), wn = warp % S::WN * (BN / S::WN);
    float sums[S::MT][S::NT][4] = {};
    uint4 a_next[A_EACH], b_next[B_EACH];

    auto fetch = [&](int64_t k) {
#pragma unroll
        for (int i = 0; i < A_EACH; i++) {
            int c = threadIdx.x + i * S::THREADS;
            if (A_CHUNKS % S::THREADS && c >= A_CHUNKS) break;
            a_next[i] =
                TA ? load_chunk<BF16>(a, 0, k + c / (BM / 8), m0 + c % (BM / 8) * 8, k_end, M,
                                      a_aligned)
                   : load_chunk<BF16>(a, 0, m0 + c / 4, k + c % 4 * 8, m_end, shape.K, a_aligned);
        }
#pragma unroll
        for (int i = 0; i < B_EACH; i++) {
            int c = threadIdx.x + i * S::THREADS;
            if (B_CHUNKS % S::THREADS && c >= B_CHUNKS) break;
            b_next[i] =
                TB ? load_chunk<DB>(b, b_base, k + c / (BN / 8), n0 + c % (BN / 8) * 8, k_end, N,
                                    b_aligned)
                   : load_chunk<DB>(b, b_base, n0 + c / 4, k + c % 4 * 8, N, shape.K, b_aligned);
        }
    };
    auto put = [&](int turn) {
#pragma unroll
        for (int i = 0; i < A_EACH; i++) {
            int c = threadIdx.x + i * S::THREADS, width = TA ? BM / 8 : 4;
            if (A_CHUNKS % S::THREADS && c >= A_CHUNKS) break;
            *(uint4 *)&a_tiles[turn][c / width * A_STRIDE + c % width * 8] = a_next[i];
        }
#pragma unroll
        for (int i = 0; i < B_EACH; i++) {
            int c = threadIdx.x + i * S::THREADS, width = TB ? BN / 8 : 4;
            if (B_CHUNKS % S::THREADS && c >= B_CHUNKS) break;
            *(uint4 *)&b_tiles[turn][c / width * B_STRIDE + c % width * 8] = b_next[i];
        }
    };

    if (k0 < k_end) {
        fetch(k0);
        put(0);
    }
    __syncthreads();
    int turn = 0;
    for (int64_t k = k0; k < k_end; k += BK, turn ^= 1) {
        if (k + BK < k_end) fetch(k + BK);
#pragma unroll
        for (int kk = 0; kk < BK; kk += 16) {
            unsigned x[S::MT][4], w[S::NT / 2][4];
#pragma unroll
            for (int i = 0; i < S::MT; i++) {
                if (TA)
                    load_turned_tiles(x[i],
                                      &a_tiles[turn][(kk + lane % 8 + lane / 16 * 8) * A_STRIDE +
                                                     wm + 16 * i + lane / 8 % 2 * 8]);
                else
                    load_tiles(
                        x[i],
                        &a_tiles[turn][(wm + 16 * i + lane % 16) * A_STRIDE + kk + lane / 16 * 8]);
            }
#pragma unroll
            for (int j = 0; j < S::NT / 2; j++) {
                if (TB)
                    load_turned_tiles(
                        w[j],
                        &b_tiles[turn][(kk + lane % 16) * B_STRIDE + wn + 16 * j + lane / 16 * 8]);
                else
                    load_tiles(w[j],
                               &b_tiles[turn][(wn + 16 * j + lane % 8 + lane / 16 * 8) * B_STRIDE +
                                              kk + lane / 8 % 2 * 8]);
            }
#pragma unroll
            for (int i = 0; i < S::MT; i++)
#pragma unroll
                for (int j = 0; j < S::NT; j++) {
                    unsigned pair[2] = {w[j / 2][j % 2 * 2], w[j / 2][j % 2 * 2 + 1]};
                    mma_bf16(sums[i][j], x[i], pair);
                }
        }
        if (k + BK < k_end) put(turn ^ 1);
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < S::MT; i++)
#pragma unroll
        for (int j = 0; j < S::NT; j++)
#pragma unroll
            for (int part = 0; part < 4; part++) {
                int64_t m = m0 + wm + 16 * i + lane / 4 + part / 2 * 8,
                        n = n0 + wn + 8 * j + lane % 4 * 2 + part % 2;
                if (m >= m_end || n >= N) continue;
                float old = write == ADD ? to_float(y[m * N + n]) : 0.0f;
                y[m * N + n] = from_float<Y>(old + alpha * sums[i][j][part]);
            }
}

/* ---- f32 into bf16 ---- */

/* Limited by y where K is small, as that of adapters is. A warp has 16 rows by 128 columns, K goes
 * by 16; each float is the sum of two bf16 numbers, the product of both small ones left out: 16
 * bits of the significand, before y rounds to 8. */
#define NARROW_THREADS 128
#define NARROW_ROWS    64
#define NARROW_COLUMNS 128
#define NARROW_STRIDE  24 /* elements from row to row of a tile of 16 columns: banks differ */

/* Where column n of b is kept among its 32: a lane is to have columns 8 t .. 8 t + 7 of the result,
 * where a product has 2 t and 2 t + 1 of eight. */
DEVICE_FUNCTION int narrow_row(int n) {
    return n / 32 * 32 + n % 8 / 2 * 8 + n % 32 / 8 * 2 + n % 2;
}

/* ROWS by 16 of an operand, big and small parts; zeros outside. TURNED: K are its rows. */
template <int ROWS, bool TURNED, bool OF_B>
DEVICE_FUNCTION void load_narrow(bf16 *big, bf16 *small, const float *p, int64_t i0, int64_t k0,
                                 int64_t i_end, int64_t k_end) {
    constexpr int EACH = ROWS * 16 / NARROW_THREADS, WIDTH = TURNED ? ROWS : 16,
                  STEP = NARROW_THREADS / WIDTH; /* a thread has one column, rows STEP apart */
    int row = threadIdx.x / WIDTH, column = threadIdx.x % WIDTH;
    int rows = (int)min((int64_t)(TURNED ? 16 : ROWS), TURNED ? k_end - k0 : i_end - i0) - row;
    bool here = column < (TURNED ? i_end - i0 : k_end - k0);
    int64_t width = TURNED ? i_end : k_end;
    const float *from = p + ((TURNED ? k0 : i0) + row) * width + (TURNED ? i0 : k0) + column;
    float x[EACH];
#pragma unroll
    for (int e = 0; e < EACH; e++) { /* all on their way at once */
        x[e] = here && e * STEP < rows ? *from : 0.0f;
        from += STEP * width;
    }
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        int i = TURNED ? column : row + e * STEP, k = TURNED ? row + e * STEP : column;
        int at = (OF_B ? narrow_row(i) : i) * NARROW_STRIDE + k;
        bf16 high = to_bf16(x[e]);
        big[at] = high;
        small[at] = to_bf16(x[e] - to_float(high));
    }
}

/* Operands of a product as in gemm16, and its K; those of a sum of some. */
struct NarrowTerm {
    const float *a, *b;
    int64_t K;
};
struct NarrowTerms {
    NarrowTerm at[MATRICES_MOST];
    int count;
};

/* y (M, N) (=|+=) alpha times the sum of the terms a b. packs: eight columns of y can be read at a
 * time. */
template <bool TA, bool TB>
static __global__ void __launch_bounds__(NARROW_THREADS, 4)
    gemm_narrow(bf16 *y, Write write, NarrowTerms terms, int64_t M, int64_t N, float alpha,
                bool packs) {
    __shared__ __align__(16) bf16 a_tiles[2][NARROW_ROWS * NARROW_STRIDE];
    __shared__ __align__(16) bf16 b_tiles[2][NARROW_COLUMNS * NARROW_STRIDE];
    int64_t m0 = (int64_t)blockIdx.y * NARROW_ROWS, n0 = (int64_t)blockIdx.x * NARROW_COLUMNS;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float sums[NARROW_COLUMNS / 32][4][4] = {}; /* [..][j]: columns 8 t + 2 j and 8 t + 2 j + 1 */
    for (int64_t k = 0, term = 0; term < terms.count;) {
        NarrowTerm one = term == 0 ? terms.at[0] : term == 1 ? terms.at[1] : terms.at[2];
        if (term || k) __syncthreads();
        load_narrow<NARROW_ROWS, TA, false>(a_tiles[0], a_tiles[1], one.a, m0, k, M, one.K);
        load_narrow<NARROW_COLUMNS, TB, true>(b_tiles[0], b_tiles[1], one.b, n0, k, N, one.K);
        k += 16;
        if (k >= one.K) k = 0, term++;
        __syncthreads();
        unsigned x[2][4];
#pragma unroll
        for (int p = 0; p < 2; p++)
            load_tiles(x[p], &a_tiles[p][(16 * warp + lane % 16) * NARROW_STRIDE + lane / 16 * 8]);
#pragma unroll
        for (int i = 0; i < NARROW_COLUMNS / 32; i++)
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                unsigned w[2][4];
                int row = 32 * i + 8 * j + lane % 8 + lane / 16 * 8;
#pragma unroll
                for (int p = 0; p < 2; p++)
                    load_tiles(w[p], &b_tiles[p][row * NARROW_STRIDE + lane / 8 % 2 * 8]);
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    unsigned big[2] = {w[0][2 * h], w[0][2 * h + 1]},
                             small[2] = {w[1][2 * h], w[1][2 * h + 1]};
                    mma_bf16(sums[i][j + h], x[1], big);
                    mma_bf16(sums[i][j + h], x[0], small);
                    mma_bf16(sums[i][j + h], x[0], big);
                }
            }
    }
#pragma unroll
    for (int p = 0; p < 2; p++) {
        int64_t m = m0 + 16 * warp + g + 8 * p;
        if (m >= M) continue;
        uint4 old[NARROW_COLUMNS / 32];
#pragma unroll
        for (int i = 0; i < NARROW_COLUMNS / 32; i++) {
            old[i] = uint4{0, 0, 0, 0};
            if (packs && write == ADD && n0 + 32 * i + 8 * t < N)
                old[i] = *(const uint4 *)(y + m * N + n0 + 32 * i + 8 * t);
        }
#pragma unroll
        for (int i = 0; i < NARROW_COLUMNS / 32; i++) {
            int64_t n = n0 + 32 * i + 8 * t;
            bf16 *to = y + m * N + n;
            if (packs && n < N) {
                unsigned was[4] = {old[i].x, old[i].y, old[i].z, old[i].w}, now[4];
#pragma unroll
                for (int j = 0; j < 4; j++)
                    now[j] = pack_bf16(__uint_as_float(was[j] << 16) + alpha * sums[i][j][2 * p],
                                       __uint_as_float(was[j] & 0xffff0000u) +
                                           alpha * sums[i][j][2 * p + 1]);
                *(uint4 *)to = uint4{now[0], now[1], now[2], now[3]};
                continue;
            }
#pragma unroll
            for (int c = 0; c < 8; c++) {
                if (n + c >= N) break;
                float sum = alpha * sums[i][c / 2][2 * p + c % 2];
                to[c] = to_bf16(write == ADD ? to_float(to[c]) + sum : sum);
            }
        }
    }
}

/* ---- f32 ---- */

/* Each operand as a sum of two TF32 numbers, the product of both small parts left out: 21 bits of
 * the significand. A bf16 operand is one TF32 number. Tiles of 64 by 64, 16 of K at a time. */
#define BLOCK32   64
#define DEPTH32   16
#define STRIDE32  (DEPTH32 + 4)
#define THREADS32 128

/* Element (i, k) of a tile's operand, 0 outside. TURNED: K are its rows in memory. */
template <bool TURNED, typename T>
DEVICE_FUNCTION float element(const T *p, int64_t i, int64_t k, int64_t i_end, int64_t k_end,
                              int64_t length) {
    if (i >= i_end || k >= k_end) return 0.0f;
    return to_float(TURNED ? p[k * length + i] : p[i * length + k]);
}

template <bool TA, bool TB, typename Y, typename A, typename B>
static __global__ void __launch_bounds__(THREADS32, 4)
    gemm32(Y *y, Write write, const A *a, const B *b, Shape shape, Groups groups, float alpha) {
    __shared__ float a_tile[BLOCK32 * STRIDE32], b_tile[BLOCK32 * STRIDE32];
    constexpr bool a_exact = sizeof(A) == 2, b_exact = sizeof(B) == 2;
    int64_t M = shape.M, N = shape.N, n0 = (int64_t)blockIdx.x * BLOCK32, m0, m_end, k0, k_end;
    if (TA) {
        int g = blockIdx.z;
        m0 = (int64_t)blockIdx.y * BLOCK32;
        m_end = M;
        k0 = groups.offsets[g];
        k_end = groups.offsets[g + 1];
        y += g * M * N;
    } else {
        RowTile rows = find_rows<BLOCK32>(groups, M, blockIdx.y);
        if (rows.first == rows.last) return;
        m0 = rows.first;
        m_end = rows.last;
        k0 = 0;
        k_end = shape.K;
        b += rows.g * N * shape.K;
    }
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, column = lane % 4;
    int wm = warp / 2 * 32, wn = warp % 2 * 32;
    float sums[2][4][4] = {};
    for (int64_t k = k0; k < k_end; k += DEPTH32) {
        for (int c = threadIdx.x; c < BLOCK32 * DEPTH32; c += THREADS32) {
            int ai = TA ? c % BLOCK32 : c / DEPTH32, ak = TA ? c / BLOCK32 : c % DEPTH32;
            int bi = TB ? c % BLOCK32 : c / DEPTH32, bk = TB ? c / BLOCK32 : c % DEPTH32;
            a_tile[ai * STRIDE32 + ak] =
                element<TA>(a, m0 + ai, k + ak, m_end, k_end, TA ? M : shape.K);
            b_tile[bi * STRIDE32 + bk] =
                element<TB>(b, n0 + bi, k + bk, N, k_end, TB ? N : shape.K);
        }
        __syncthreads();
#pragma unroll
        for (int kk = 0; kk < DEPTH32; kk += 8) {
            unsigned big[2][4], small[2][4];
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int p = 0; p < 4; p++) {
                    float x = a_tile[(wm + 16 * i + row + p % 2 * 8) * STRIDE32 + kk + column +
                                     p / 2 * 4];
                    big[i][p] = to_tf32(x);
                    small[i][p] = to_tf32(x - __uint_as_float(big[i][p]));
                }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                unsigned high[2], low[2];
#pragma unroll
                for (int p = 0; p < 2; p++) {
                    float x = b_tile[(wn + 8 * j + row) * STRIDE32 + kk + column + p * 4];
                    high[p] = to_tf32(x);
                    low[p] = to_tf32(x - __uint_as_float(high[p]));
                }
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    if (!a_exact) mma_tf32(sums[i][j], small[i], high);
                    if (!b_exact) mma_tf32(sums[i][j], big[i], low);
                    mma_tf32(sums[i][j], big[i], high);
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int p = 0; p < 4; p++) {
                int64_t m = m0 + wm + 16 * i + row + p / 2 * 8,
                        n = n0 + wn + 8 * j + 2 * column + p % 2;
                if (m >= m_end || n >= N) continue;
                float old = write == ADD ? to_float(y[m * N + n]) : 0.0f;
                y[m * N + n] = from_float<Y>(old + alpha * sums[i][j][p]);
            }
}

#endif
