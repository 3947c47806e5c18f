/* gemm_hopper.h - groups' sums over rows of bf16 (TN) on Hopper's tensor cores.
 *
 * Two warpgroups share a tile of 128 by 256, K goes by 64 at a time. Of a tile's columns, what
 * there is not half of is not multiplied. Four stages of both operands lie in shared memory: two
 * are multiplied, one behind the other, while two arrive. */
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

    /* `rows` rows of `columns` elements as they lie in memory, `width` apart; zeros in the rest of
     * the tile: of no bytes copy_16 reads none, wherever they would be. */
    DEVICE_MEMBER void fetch(bf16 *tile, const bf16 *data, int rows, int columns,
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

/* Products of a block's tile, 128 by 256, as their stages come by; K are rows of both operands. */
struct Product {
    typedef Side<HOPPER_ROWS, true> Left;
    typedef Side<HOPPER_COLUMNS, true> Right;
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
        int own = same_in_warp((int)threadIdx.x / WARPGROUP) * 64;
        for (int i = 0; i < steps; i++) {
            copies_wait<1>();
            shared_for_products();
            __syncthreads(); /* and the stage two before this one has been multiplied */
            int here = same_in_warp(stage);
            Operand a = operand(left_tiles + here * Left::TILE, 0, own, Left::ROWS),
                    b = operand(right_tiles + here * Right::TILE, 0, 0, Right::ROWS);
            if (busy) {
                wgmma_begin();
#pragma unroll
                for (int kk = 0; kk < HOPPER_DEPTH; kk += 16)
                    wgmma<true, true>(sums, further(a, kk, 0, Left::ROWS),
                                      further(b, kk, 0, Right::ROWS));
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

/* y[g] (=|+=) alpha a^T b over the rows of group g (TN, as in gemm16); M and N multiples of 8.
 * Grid: (tiles of N, tiles of M, groups). */
template <typename Y>
static __global__ void __launch_bounds__(HOPPER_THREADS, 1)
    gemm_hopper(Y *y, Write write, const bf16 *a, const bf16 *b, int64_t M, int64_t N,
                const int32_t *offsets, float alpha) {
#if ON_HOPPER
    DYNAMIC_SHARED(memory);
    int64_t n0 = (int64_t)blockIdx.x * HOPPER_COLUMNS, m0 = (int64_t)blockIdx.y * HOPPER_ROWS,
            k = offsets[blockIdx.z], k_end = offsets[blockIdx.z + 1];
    int left_rows = (int)min((int64_t)HOPPER_ROWS, M - m0),
        right_rows = (int)min((int64_t)HOPPER_COLUMNS, N - n0),
        steps = (int)((k_end - k + HOPPER_DEPTH - 1) / HOPPER_DEPTH);
    y += blockIdx.z * M * N;
    a += k * M + m0;
    b += k * N + n0;
    Product product(memory);
    auto fetch = [&](bf16 *left_tile, bf16 *right_tile) {
        if (k >= k_end) return;
        int depth = (int)min((int64_t)HOPPER_DEPTH, k_end - k);
        product.left.fetch(left_tile, a, depth, left_rows, M);
        product.right.fetch(right_tile, b, depth, right_rows, N);
        a += HOPPER_DEPTH * M;
        b += HOPPER_DEPTH * N;
        k += HOPPER_DEPTH;
    };
    float sums[HOPPER_COLUMNS / 2] = {};
    int own = (int)threadIdx.x / WARPGROUP * 64;
    bool busy = own < left_rows;
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
            int64_t m = m0 + own + result_row() + 8 * p, n = n0 + 8 * j + threadIdx.x % 4 * 2;
            if (m >= M || n >= N) continue;
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
