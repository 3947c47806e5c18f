/* gemm_hopper.h - products of bf16 rows on Hopper's tensor cores: gemm16's twin for groups, and the
 * loop of any such product.
 *
 * Two warpgroups share a tile of 128 by 256, K goes by 64 at a time. At the end of a group, or of
 * the columns, what a tile has not half of is not multiplied. Four stages of both operands
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

/* One operand of a block's tile: LENGTH of its rows by a stage of K; TURNED: in memory K are rows.
 */
template <int LENGTH, bool TURNED> struct Side {
    /* Rows in memory, and how many threads share one, eight columns each; a thread brings EACH. */
    static constexpr int ROWS = TURNED ? HOPPER_DEPTH : LENGTH, TILE = LENGTH * HOPPER_DEPTH,
                         CHUNKS = TILE / ROWS / 8, STEP = HOPPER_THREADS / CHUNKS,
                         EACH = TILE / 8 / HOPPER_THREADS;
    int row, col; /* in memory, of this thread's first */

    DEVICE_MEMBER Side() : row(threadIdx.x / CHUNKS), col(threadIdx.x % CHUNKS * 8) {}

    /* `rows` rows of `columns` elements as they lie in memory, row r from data + at(r) on; zeros in
     * the rest of the tile: of no bytes copy_16 reads none, wherever they would be. */
    template <typename At>
    DEVICE_MEMBER void fetch(bf16 *tile, const bf16 *data, int rows, int columns, At at) const {
        bf16 *to = tile + tile_at(row, col, ROWS);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int r = row + i * STEP;
            copy_16(to + i * STEP * 64, data + at(r) + col, r < rows && col < columns);
        }
    }

    /* The same of rows that lie `width` elements apart. */
    DEVICE_MEMBER void fetch_lines(bf16 *tile, const bf16 *data, int rows, int columns,
                                   int64_t width) const {
        const bf16 *from = data + row * width + col;
        bf16 *to = tile + tile_at(row, col, ROWS);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            copy_16(to + i * STEP * 64, from, row + i * STEP < rows && col < columns);
            from += STEP * width;
        }
    }
};

/* Products of a block's tile, 128 by 256, as their stages come by. */
template <bool TA, bool TB> struct Product {
    typedef Side<HOPPER_ROWS, TA> Left;
    typedef Side<HOPPER_COLUMNS, TB> Right;
    Left left;
    Right right;
    bf16 *left_tiles, *right_tiles;
    int stage; /* of the next step */

    DEVICE_MEMBER Product(unsigned char *memory)
        : left_tiles((bf16 *)memory), right_tiles(left_tiles + HOPPER_STAGES * Left::TILE),
          stage(0) {}

    template <typename Fetch> DEVICE_MEMBER void bring(int to, Fetch fetch) {
        fetch(left_tiles + to * Left::TILE, right_tiles + to * Right::TILE);
        copies_close_group();
    }

    /* fetch(left tile, right tile) brings the next step's, or nothing behind the last. */
    template <typename Fetch> DEVICE_MEMBER void start(Fetch fetch) {
        bring(0, fetch);
        bring(1, fetch);
    }

    /* Adds so many further steps to the sums: of all columns, or of as many of the first as these
     * are for. Not `busy`: this warpgroup has no rows, and only helps to bring the others'. */
    template <int COUNT, typename Fetch>
    DEVICE_MEMBER void run(float (&sums)[COUNT], int steps, bool busy, Fetch fetch) {
        int own = threadIdx.x / WARPGROUP * 64;
        for (int i = 0; i < steps; i++) {
            copies_wait<1>();
            shared_for_products();
            __syncthreads(); /* and the stage two before this one has been multiplied */
            const bf16 *a = left_tiles + stage * Left::TILE, *b = right_tiles + stage * Right::TILE;
            if (busy) {
                wgmma_begin();
#pragma unroll
                for (int kk = 0; kk < HOPPER_DEPTH; kk += 16)
                    wgmma<TA, TB>(
                        sums,
                        TA ? operand(a, kk, own, Left::ROWS) : operand(a, own, kk, Left::ROWS),
                        TB ? operand(b, kk, 0, Right::ROWS) : operand(b, 0, kk, Right::ROWS));
                wgmma_close_group();
            }
            bring((stage + 2) % HOPPER_STAGES, fetch);
            wgmma_wait<1>();
            stage = (stage + 1) % HOPPER_STAGES;
        }
        wgmma_wait<0>();
        wgmma_results(sums);
    }
};

/* Of the first half of the columns. */
DEVICE_FUNCTION float (&first_half(float (&sums)[HOPPER_COLUMNS / 2]))[HOPPER_COLUMNS / 4] {
    return *(float(*)[HOPPER_COLUMNS / 4]) sums;
}

/* The row of a tile that this lane has results of; the other is eight further. */
DEVICE_FUNCTION int result_row() {
    return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
}

/* y (=|+=) alpha a b for the rows or group that is the block's; shapes as in gemm16, all a multiple
 * of 8 along the rows of memory. */
template <bool TA, bool TB, typename Y>
static __global__ void __launch_bounds__(HOPPER_THREADS, 1)
    gemm_hopper(Y *y, Write write, const bf16 *a, const bf16 *b, Shape shape, Groups groups,
                float alpha) {
#if ON_HOPPER
    DYNAMIC_SHARED(memory);
    int64_t M = shape.M, N = shape.N, n0 = (int64_t)blockIdx.x * HOPPER_COLUMNS, m0, m_end, k0 = 0,
            k_end = shape.K;
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
        b += rows.g * N * shape.K;
    }
    int left_rows = (int)min((int64_t)HOPPER_ROWS, m_end - m0),
        right_rows = (int)min((int64_t)HOPPER_COLUMNS, N - n0);
    int64_t left_width = TA ? M : shape.K, right_width = TB ? N : shape.K, k = k0;
    a += TA ? k0 * M + m0 : m0 * shape.K;
    b += TB ? k0 * N + n0 : n0 * shape.K;
    Product<TA, TB> product(memory);
    auto fetch = [&](bf16 *left_tile, bf16 *right_tile) {
        if (k >= k_end) return;
        int depth = (int)min((int64_t)HOPPER_DEPTH, k_end - k);
        product.left.fetch_lines(left_tile, a, TA ? depth : left_rows, TA ? left_rows : depth,
                                 left_width);
        product.right.fetch_lines(right_tile, b, TB ? depth : right_rows, TB ? right_rows : depth,
                                  right_width);
        a += HOPPER_DEPTH * (TA ? M : 1);
        b += HOPPER_DEPTH * (TB ? N : 1);
        k += HOPPER_DEPTH;
    };
    float sums[HOPPER_COLUMNS / 2] = {};
    int steps = (int)((k_end - k0 + HOPPER_DEPTH - 1) / HOPPER_DEPTH);
    bool busy = (int)threadIdx.x / WARPGROUP * 64 < left_rows;
    product.start(fetch);
    if (right_rows > HOPPER_COLUMNS / 2)
        product.run(sums, steps, busy, fetch);
    else
        product.run(first_half(sums), steps, busy, fetch);
    copies_wait<0>();
#pragma unroll
    for (int j = 0; j < HOPPER_COLUMNS / 8; j++)
#pragma unroll
        for (int p = 0; p < 2; p++) {
            int64_t m = m0 + result_row() + 8 * p, n = n0 + 8 * j + threadIdx.x % 4 * 2;
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
