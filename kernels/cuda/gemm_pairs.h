/* gemm_pairs.h - products of many bf16 rows with bf16 weights on Hopper, whole or in groups, and
 * with what adapters add to them.
 *
 * Two blocks share 256 rows of a and have 128 columns of the result each. In each a warpgroup
 * brings tiles, K by 64 at a time: half of the rows, to both blocks, and its own part of b. Two
 * others multiply, 128 rows each. Four stages lie in shared memory, and the next tile's come while
 * the last one's results are written. A block goes on from tile to tile. */
#ifndef CUDA_GEMM_PAIRS_H
#define CUDA_GEMM_PAIRS_H

#include "kernels/cuda/bulk.h"
#include "kernels/cuda/gemm.h"

#define PAIRS_THREADS (3 * WARPGROUP)
#define PAIRS_ROWS    256
#define PAIRS_HALF    (PAIRS_ROWS / 2)
#define PAIRS_COLUMNS 128
#define PAIRS_DEPTH   64
#define PAIRS_STAGES  4

/* a, b and, of adapters, what K goes on with: rows of a that are u and columns of b that are B. */
struct PairMaps {
    TileMap a, b, more_a, more_b;
};

/* The shared memory of a block. */
struct PairStage {
    bf16 a[PAIRS_ROWS * PAIRS_DEPTH], b[PAIRS_COLUMNS * PAIRS_DEPTH];
};
struct PairMemory {
    PairStage stages[PAIRS_STAGES];
    Barrier full[PAIRS_STAGES], empty[PAIRS_STAGES];
    int starts[]; /* of each group: how many tiles of rows those before it have; and of all */
};
static inline size_t gemm_pairs_bytes(int groups) {
    return sizeof(PairMemory) + (size_t)(groups + 1) * sizeof(int);
}

DEVICE_FUNCTION int64_t group_begin(const Groups &groups, int g) {
    return groups.offsets ? groups.offsets[g] : 0;
}
DEVICE_FUNCTION int64_t group_end(const Groups &groups, int g, int64_t M) {
    if (!groups.offsets) return M;
    return groups.counts ? groups.offsets[g] + groups.counts[g] : groups.offsets[g + 1];
}

/* By one warp. */
DEVICE_FUNCTION void count_row_tiles(int *starts, const Groups &groups, int count, int64_t M) {
    int lane = threadIdx.x % 32, before = 0;
    for (int base = 0; base < count; base += 32) {
        int g = base + lane, tiles = 0;
        if (g < count)
            tiles = (int)((group_end(groups, g, M) - group_begin(groups, g) + PAIRS_ROWS - 1) /
                          PAIRS_ROWS);
        int sum = tiles;
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            int other = __shfl_up_sync(0xffffffffu, sum, d);
            if (lane >= d) sum += other;
        }
        if (g < count) starts[g] = before + sum - tiles;
        before += __shfl_sync(0xffffffffu, sum, 31);
    }
    if (!lane) starts[count] = before;
}

/* Rows first .. first + rows - 1 of group g, and which columns. */
struct PairTile {
    int g, rows;
    int64_t first, column;
};

/* Tile number t: a group's tiles of rows, for each pair of columns. */
DEVICE_FUNCTION PairTile find_pair_tile(const int *starts, const Groups &groups, int count,
                                        int64_t M, int pairs, int64_t t, unsigned rank) {
    int low = 0, high = count, row_tile = (int)(t / pairs);
    while (high - low > 1) {
        int middle = (low + high) / 2;
        (starts[middle] <= row_tile ? low : high) = middle;
    }
    int tiles = starts[low + 1] - starts[low], i = (int)(t - (int64_t)starts[low] * pairs);
    int64_t first = group_begin(groups, low) + (int64_t)(i % tiles) * PAIRS_ROWS;
    int64_t rows = group_end(groups, low, M) - first;
    return PairTile{low, (int)(rows < PAIRS_ROWS ? rows : PAIRS_ROWS), first,
                    ((int64_t)(i / tiles) * PAIR + rank) * PAIRS_COLUMNS};
}

/* Which stage is next, and the parity of its phase. */
struct Ring {
    int stage;
    unsigned parity;
    DEVICE_MEMBER void next() {
        if (++stage < PAIRS_STAGES) return;
        stage = 0;
        parity ^= 1;
    }
};

/* The products of so many blocks of 64 rows of this warpgroup's half. */
template <bool TB, int BLOCKS>
DEVICE_FUNCTION void multiply_stages(float (&sums)[2][PAIRS_COLUMNS / 2], PairMemory *memory,
                                     Ring &ring, int steps, int own) {
    int last = -1;
    auto release = [&](int stage) {
        if (threadIdx.x % WARPGROUP < PAIR)
            barrier_arrive(&memory->empty[stage], threadIdx.x % WARPGROUP);
    };
    for (int i = 0; i < steps; i++) {
        const PairStage *s = &memory->stages[ring.stage];
        barrier_wait(&memory->full[ring.stage], ring.parity);
        if constexpr (BLOCKS > 0) {
            wgmma_begin();
#pragma unroll
            for (int kk = 0; kk < PAIRS_DEPTH; kk += 16)
#pragma unroll
                for (int j = 0; j < BLOCKS; j++)
                    wgmma<false, TB>(sums[j], operand(s->a, own + 64 * j, kk, PAIRS_ROWS),
                                     TB ? operand(s->b, kk, 0, PAIRS_DEPTH)
                                        : operand(s->b, 0, kk, PAIRS_COLUMNS));
            wgmma_close_group();
            wgmma_wait<1>();
        }
        if (last >= 0) release(last);
        last = ring.stage;
        ring.next();
    }
    if constexpr (BLOCKS > 0) {
        wgmma_wait<0>();
#pragma unroll
        for (int j = 0; j < BLOCKS; j++) wgmma_results(sums[j]);
    }
    if (last >= 0) release(last);
}

/* Word i of lane t among four lanes becomes word t of lane i. */
DEVICE_FUNCTION void turn_quad(unsigned (&w)[4]) {
    int t = threadIdx.x % 4;
#pragma unroll
    for (int d = 1; d < 4; d *= 2) {
        bool upper = t & d;
#pragma unroll
        for (int k = 0; k < 2; k++) {
            int low = d == 1 ? 2 * k : k, high = low + d;
            unsigned got = __shfl_xor_sync(0xffffffffu, upper ? w[low] : w[high], d);
            (upper ? w[low] : w[high]) = got;
        }
    }
}

/* y (=|+=) alpha sums of 64 rows, of which `rows` are there: y is the first of this tile's. */
template <typename Y>
DEVICE_FUNCTION void store_results(Y *y, Write write, const float (&sums)[PAIRS_COLUMNS / 2],
                                   int rows, int64_t columns, int64_t N, float alpha) {
    int t = threadIdx.x % 4, row = threadIdx.x % WARPGROUP / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
    for (int p = 0; p < 2; p++) {
        int m = row + 8 * p;
        if constexpr (sizeof(Y) == sizeof(float)) {
#pragma unroll
            for (int j = 0; j < PAIRS_COLUMNS / 8; j++) {
                int n = 8 * j + 2 * t;
                if (m >= rows || n >= columns) continue;
                float pair[2] = {alpha * sums[4 * j + 2 * p], alpha * sums[4 * j + 2 * p + 1]};
                if (write == ADD) {
                    float old[2];
                    load<2>(old, y + m * N + n);
                    pair[0] += old[0];
                    pair[1] += old[1];
                }
                store<2>(y + m * N + n, pair);
            }
        } else {
#pragma unroll
            for (int j = 0; j < PAIRS_COLUMNS / 8; j += 4) { /* a lane writes one of four chunks */
                int n = 8 * (j + t);
                bool here = m < rows && n < columns;
                uint4 *to = (uint4 *)(y + m * N + n);
                unsigned old[4] = {}, out[4];
                if (write == ADD) {
                    if (here) {
                        uint4 there = *to;
                        old[0] = there.x, old[1] = there.y, old[2] = there.z, old[3] = there.w;
                    }
                    turn_quad(old);
                }
#pragma unroll
                for (int q = 0; q < 4; q++) {
                    const float *x = &sums[4 * (j + q) + 2 * p];
                    float low = alpha * x[0], high = alpha * x[1];
                    if (write == ADD) {
                        low += __uint_as_float(old[q] << 16);
                        high += __uint_as_float(old[q] & 0xffff0000u);
                    }
                    out[q] = pack_bf16(low, high);
                }
                turn_quad(out);
                if (here) *to = uint4{out[0], out[1], out[2], out[3]};
            }
        }
    }
}

/* y (=|+=) alpha (a b + more_a more_b), K of the second `more` elements; shapes as in gemm16 (NT,
 * NN). Rows of y, a and b a multiple of 16 bytes. Launched in pairs of blocks, any number. */
template <bool TB, typename Y>
static __global__ void __launch_bounds__(PAIRS_THREADS, 1)
    gemm_pairs(Y *y, Write write, const __grid_constant__ PairMaps maps, Shape shape, int more,
               Groups groups, float alpha) {
#if ON_HOPPER
    DYNAMIC_SHARED(bytes);
    PairMemory *memory = (PairMemory *)bytes;
    int count = groups.offsets ? groups.count : 1;
    if (threadIdx.x < 32) count_row_tiles(memory->starts, groups, count, shape.M);
    if (!threadIdx.x)
        for (int i = 0; i < PAIRS_STAGES; i++) {
            barrier_begin(&memory->full[i], 1);
            barrier_begin(&memory->empty[i], 2 * PAIR);
        }
    pair_sync();
    unsigned rank = pair_rank();
    int pairs = (int)((shape.N + PAIR * PAIRS_COLUMNS - 1) / (PAIR * PAIRS_COLUMNS)),
        first_steps = (int)((shape.K + PAIRS_DEPTH - 1) / PAIRS_DEPTH),
        steps = first_steps + (more + PAIRS_DEPTH - 1) / PAIRS_DEPTH;
    int64_t tiles = (int64_t)memory->starts[count] * pairs;
    Ring ring = {0, 0};
    if (threadIdx.x < WARPGROUP) {
        registers_fewer<40>();
        for (int64_t t = blockIdx.x / PAIR; !threadIdx.x && t < tiles; t += gridDim.x / PAIR) {
            PairTile tile = find_pair_tile(memory->starts, groups, count, shape.M, pairs, t, rank);
            bool both = tile.rows > PAIRS_HALF; /* else the first block brings all rows there are */
            int arrive = (int)sizeof(PairStage::b) + (int)sizeof(PairStage::a) / (both ? 1 : 2);
            for (int i = 0; i < steps; i++) {
                PairStage *s = &memory->stages[ring.stage];
                Barrier *full = &memory->full[ring.stage];
                bool first = i < first_steps;
                int64_t k = (int64_t)(first ? i : i - first_steps) * PAIRS_DEPTH;
                barrier_wait(&memory->empty[ring.stage], ring.parity ^ 1);
                barrier_announce(full, arrive);
                if (both || !rank)
                    copy_tile<true>(s->a + rank * PAIRS_HALF * PAIRS_DEPTH, full,
                                    first ? maps.a : maps.more_a, 0, tile.first + rank * PAIRS_HALF,
                                    k);
                const TileMap &b = first ? maps.b : maps.more_b;
                if (TB)
                    for (int j = 0; j < PAIRS_COLUMNS; j += TILE_COLUMNS)
                        copy_tile<false>(s->b + j * PAIRS_DEPTH, full, b, tile.g, k,
                                         tile.column + j);
                else
                    copy_tile<false>(s->b, full, b, tile.g, tile.column, k);
                ring.next();
            }
        }
    } else {
        registers_more<232>();
        int own = ((int)threadIdx.x / WARPGROUP - 1) * PAIRS_HALF;
        for (int64_t t = blockIdx.x / PAIR; t < tiles; t += gridDim.x / PAIR) {
            PairTile tile = find_pair_tile(memory->starts, groups, count, shape.M, pairs, t, rank);
            int rows = tile.column < shape.N ? tile.rows - own : 0;
            float sums[2][PAIRS_COLUMNS / 2] = {};
            if (rows > 64)
                multiply_stages<TB, 2>(sums, memory, ring, steps, own);
            else if (rows > 0)
                multiply_stages<TB, 1>(sums, memory, ring, steps, own);
            else
                multiply_stages<TB, 0>(sums, memory, ring, steps, own);
            Y *to = y + (tile.first + own) * shape.N + tile.column;
#pragma unroll
            for (int j = 0; j < 2; j++)
                if (rows > 64 * j)
                    store_results(to + 64 * j * shape.N, write, sums[j], rows - 64 * j,
                                  shape.N - tile.column, shape.N, alpha);
        }
    }
    pair_sync(); /* neither ends while the other writes to it */
#endif
}

#endif
