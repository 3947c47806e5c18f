/* gemm_hopper.h - grouped products of bf16 rows on Hopper's tensor cores: gemm16's twin.
 *
 * Two warpgroups share a tile of 128 by 128, K goes by 64 at a time. Three stages of both operands
 * lie in shared memory: while one is multiplied two arrive. Two blocks share a multiprocessor, one
 * multiplies while the other waits; packed weights take registers for themselves. */
#ifndef CUDA_GEMM_HOPPER_H
#define CUDA_GEMM_HOPPER_H

#include "kernels/cuda/gemm.h"
#include "kernels/cuda/wgmma.h"

#define HOPPER_THREADS (2 * WARPGROUP)
#define HOPPER_ROWS    128
#define HOPPER_DEPTH   64
#define HOPPER_STAGES  3
#define HOPPER_TILE    (HOPPER_ROWS * HOPPER_DEPTH) /* elements of one operand's stage */

static inline size_t gemm_hopper_bytes() {
    return (size_t)HOPPER_STAGES * 2 * HOPPER_TILE * sizeof(bf16);
}

/* A stage of one operand. TURNED: K are its rows in memory, 64 of 128 columns; else 128 rows of 64.
 * Rows `i` end at i_end and are `cols` long in memory; zeros outside. */
template <bool TURNED, int D>
DEVICE_FUNCTION void load_stage(bf16 *tile, const PackedView &t, int64_t base, int64_t i0,
                                int64_t i_end, int64_t k0, int64_t k_end, int64_t cols) {
    constexpr int ROWS = TURNED ? HOPPER_DEPTH : HOPPER_ROWS, CHUNKS = HOPPER_TILE / ROWS / 8;
#pragma unroll
    for (int i = 0; i < HOPPER_TILE / 8 / HOPPER_THREADS; i++) {
        int c = threadIdx.x + i * HOPPER_THREADS, row = c / CHUNKS, col = c % CHUNKS * 8;
        int64_t r = (TURNED ? k0 : i0) + row, x = (TURNED ? i0 : k0) + col;
        bool here = r < (TURNED ? k_end : i_end) && x < (TURNED ? i_end : k_end);
        bf16 *to = tile + tile_at(row, col, ROWS);
        if constexpr (D == BF16)
            copy_16(to, (const bf16 *)t.data + (here ? base + r * cols + x : 0), here);
        else
            *(uint4 *)to = load_chunk<D>(t, base, here ? r : 0, here ? x : cols, r + 1, cols, true);
    }
}

/* y (=|+=) alpha a b for the rows or group that is the block's; shapes as in gemm16, all a multiple
 * of 8 along the rows of memory. */
template <bool TA, bool TB, int DB, typename Y>
static __global__ void __launch_bounds__(HOPPER_THREADS, DB == BF16 ? 2 : 1)
    gemm_hopper(Y *y, Write write, PackedView a, PackedView b, Shape shape, Groups groups,
                float alpha) {
#if ON_HOPPER
    DYNAMIC_SHARED(memory);
    constexpr int A_ROWS = TA ? HOPPER_DEPTH : HOPPER_ROWS,
                  B_ROWS = TB ? HOPPER_DEPTH : HOPPER_ROWS;
    bf16 *a_tiles = (bf16 *)memory, *b_tiles = a_tiles + HOPPER_STAGES * HOPPER_TILE;
    int64_t M = shape.M, N = shape.N, n0 = (int64_t)blockIdx.x * HOPPER_ROWS, m0, m_end, k0 = 0,
            k_end = shape.K, base = 0;
    if (TA) { /* one matrix of sums for each group */
        m0 = (int64_t)blockIdx.y * HOPPER_ROWS;
        m_end = M;
        k0 = groups.offsets[blockIdx.z];
        k_end = groups.offsets[blockIdx.z + 1];
        y += blockIdx.z * M * N;
    } else {
        RowTile rows = find_rows<HOPPER_ROWS>(groups, M, blockIdx.y);
        if (rows.first == rows.last) return;
        m0 = rows.first;
        m_end = rows.last;
        base = rows.g * N * shape.K;
    }
    auto fetch = [&](int64_t k, int stage) {
        if (k < k_end) {
            load_stage<TA, BF16>(a_tiles + stage * HOPPER_TILE, a, 0, m0, m_end, k, k_end,
                                 TA ? M : shape.K);
            load_stage<TB, DB>(b_tiles + stage * HOPPER_TILE, b, base, n0, N, k, k_end,
                               TB ? N : shape.K);
        }
        copies_close_group();
    };
    int group = threadIdx.x / WARPGROUP, stage = 0;
    float sums[HOPPER_ROWS / 2] = {};
    fetch(k0, 0);
    fetch(k0 + HOPPER_DEPTH, 1);
    for (int64_t k = k0; k < k_end; k += HOPPER_DEPTH) {
        copies_wait<HOPPER_STAGES - 2>();
        shared_for_products();
        __syncthreads(); /* and the stage before this one has been multiplied */
        const bf16 *left = a_tiles + stage * HOPPER_TILE, *right = b_tiles + stage * HOPPER_TILE;
        wgmma_begin();
#pragma unroll
        for (int kk = 0; kk < HOPPER_DEPTH; kk += 16)
            wgmma<TA, TB>(sums,
                          TA ? operand(left, kk, 64 * group, A_ROWS)
                             : operand(left, 64 * group, kk, A_ROWS),
                          TB ? operand(right, kk, 0, B_ROWS) : operand(right, 0, kk, B_ROWS));
        wgmma_close_group();
        fetch(k + 2 * HOPPER_DEPTH, (stage + 2) % HOPPER_STAGES);
        wgmma_wait<0>();
        wgmma_results(sums);
        stage = (stage + 1) % HOPPER_STAGES;
    }
    copies_wait<0>();
    int warp = threadIdx.x % WARPGROUP / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < HOPPER_ROWS / 8; j++)
#pragma unroll
        for (int p = 0; p < 2; p++) {
            int64_t m = m0 + 64 * group + 16 * warp + lane / 4 + 8 * p,
                    n = n0 + 8 * j + lane % 4 * 2;
            if (m >= m_end || n >= N) continue;
            float pair[2] = {alpha * sums[4 * j + 2 * p], alpha * sums[4 * j + 2 * p + 1]};
            if (write == ADD) {
                float old[2];
                load<2>(old, y + m * N + n);
                pair[0] += old[0];
                pair[1] += old[1];
            }
            store<2>(y + m * N + n, pair);
        }
#endif
}

#endif
