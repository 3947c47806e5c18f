/* gemm_hopper.h - grouped products of bf16 rows on Hopper's tensor cores: gemm16's twin.
 *
 * Two warpgroups share a tile of 128 by 256, K goes by 64 at a time. Four stages of both operands
 * lie in shared memory: two are multiplied, one behind the other, while two arrive. */
#ifndef CUDA_GEMM_HOPPER_H
#define CUDA_GEMM_HOPPER_H

#include "kernels/cuda/gemm.h"
#include "kernels/cuda/wgmma.h"

#define HOPPER_THREADS (2 * WARPGROUP)
#define HOPPER_ROWS    128
#define HOPPER_COLUMNS 256
#define HOPPER_DEPTH   64
#define HOPPER_STAGES  4

static inline size_t gemm_hopper_bytes() {
    return (size_t)HOPPER_STAGES * (HOPPER_ROWS + HOPPER_COLUMNS) * HOPPER_DEPTH * sizeof(bf16);
}

/* One operand of a block's tile: LENGTH rows (or columns, where it is TURNED and K are its rows in
 * memory) i0 .. i_end - 1, rows in memory `cols` long. */
template <int LENGTH, bool TURNED> struct Side {
    static constexpr int ROWS = TURNED ? HOPPER_DEPTH : LENGTH, TILE = LENGTH * HOPPER_DEPTH,
                         CHUNKS = TILE / ROWS / 8, STEP = HOPPER_THREADS / CHUNKS,
                         EACH =
                             TILE / 8 / HOPPER_THREADS; /* chunks of a stage that a thread brings */
    const bf16 *data;
    int64_t base, i0, cols;
    int left, row, col; /* rows or columns that are there; this thread's first chunk */

    DEVICE_MEMBER Side(const bf16 *data, int64_t base, int64_t i0, int64_t i_end, int64_t cols)
        : data(data), base(base), i0(i0), cols(cols), left((int)min((int64_t)LENGTH, i_end - i0)),
          row(threadIdx.x / CHUNKS), col(threadIdx.x % CHUNKS * 8) {}

    /* The stage of K from k0 on; zeros from k_end on, and where no rows are. */
    DEVICE_MEMBER void fetch(bf16 *tile, int64_t k0, int64_t k_end) const {
        int depth = (int)min((int64_t)HOPPER_DEPTH, k_end - k0);
        int rows = TURNED ? depth : left, columns = TURNED ? left : depth;
        int64_t at = base + ((TURNED ? k0 : i0) + row) * cols + (TURNED ? i0 : k0) + col;
        bf16 *to = tile + tile_at(row, col, ROWS);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            bool here = row + i * STEP < rows && col < columns;
            copy_16(to + i * STEP * 64, data + (here ? at + i * STEP * cols : 0), here);
        }
    }
};

/* y (=|+=) alpha a b for the rows or group that is the block's; shapes as in gemm16, all a multiple
 * of 8 along the rows of memory. */
template <bool TA, bool TB, typename Y>
static __global__ void __launch_bounds__(HOPPER_THREADS, 1)
    gemm_hopper(Y *y, Write write, const bf16 *a, const bf16 *b, Shape shape, Groups groups,
                float alpha) {
#if ON_HOPPER
    DYNAMIC_SHARED(memory);
    typedef Side<HOPPER_ROWS, TA> Left;
    typedef Side<HOPPER_COLUMNS, TB> Right;
    bf16 *a_tiles = (bf16 *)memory, *b_tiles = a_tiles + HOPPER_STAGES * Left::TILE;
    int64_t M = shape.M, N = shape.N, n0 = (int64_t)blockIdx.x * HOPPER_COLUMNS, m0, m_end, k0 = 0,
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
    Left a_side(a, 0, m0, m_end, TA ? M : shape.K);
    Right b_side(b, base, n0, N, TB ? N : shape.K);
    auto fetch = [&](int64_t k, int stage) {
        if (k < k_end) {
            a_side.fetch(a_tiles + stage * Left::TILE, k, k_end);
            b_side.fetch(b_tiles + stage * Right::TILE, k, k_end);
        }
        copies_close_group();
    };
    int group = threadIdx.x / WARPGROUP, stage = 0;
    float sums[HOPPER_COLUMNS / 2] = {};
    fetch(k0, 0);
    fetch(k0 + HOPPER_DEPTH, 1);
    for (int64_t k = k0; k < k_end; k += HOPPER_DEPTH) {
        copies_wait<1>();
        shared_for_products();
        __syncthreads(); /* and the stage two before this one has been multiplied */
        const bf16 *left = a_tiles + stage * Left::TILE, *right = b_tiles + stage * Right::TILE;
        wgmma_begin();
#pragma unroll
        for (int kk = 0; kk < HOPPER_DEPTH; kk += 16)
            wgmma<TA, TB>(sums,
                          TA ? operand(left, kk, 64 * group, Left::ROWS)
                             : operand(left, 64 * group, kk, Left::ROWS),
                          TB ? operand(right, kk, 0, Right::ROWS)
                             : operand(right, 0, kk, Right::ROWS));
        wgmma_close_group();
        fetch(k + 2 * HOPPER_DEPTH, (stage + 2) % HOPPER_STAGES);
        wgmma_wait<1>();
        stage = (stage + 1) % HOPPER_STAGES;
    }
    wgmma_wait<0>();
    wgmma_results(sums);
    copies_wait<0>();
    int warp = threadIdx.x % WARPGROUP / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < HOPPER_COLUMNS / 8; j++)
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
