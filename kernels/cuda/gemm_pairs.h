/* gemm_pairs.h - products of many bf16 rows with bf16 weights on Hopper, whole or in groups; sums
 * of several, and with what adapters add to them.
 *
 * Two blocks share the rows of a tile, 256 or 384 of them, and have 128 columns of the result each;
 * where columns are left for one block alone, each has half of the rows. In each a warpgroup brings
 * tiles, K by 64 at a time: every second 64 rows, to both blocks, and its own part of b. Two others
 * multiply, of the 64 rows every second too. What is multiplied at once, a stage, takes of the
 * shared memory what its rows need: three stages of 384 rows lie there, four of 256, six of 128;
 * the next tile's come while the last one's results are written. A block goes on from tile to tile,
 * those of most rows first. */
#ifndef CUDA_GEMM_PAIRS_H
#define CUDA_GEMM_PAIRS_H

#include "kernels/cuda/bulk.h"
#include "kernels/cuda/gemm.h"

#define PAIRS_ROWS    64 /* of one product of a warpgroup */
#define PAIRS_COLUMNS 128
#define PAIRS_DEPTH   64
#define PAIRS_FACTORS (MATRICES_MOST + 1) /* products of one sum: several, and adapters' */

/* K goes through a[0] b[0], then a[1] b[1]; steps: of K, how many each has. y: where it is bf16. */
struct PairMaps {
    TileMap a[PAIRS_FACTORS], b[PAIRS_FACTORS], y;
    int steps[PAIRS_FACTORS];
};

/* A block's rows first .. first + rows - 1 of group g, and from where on its columns. `turns`: of
 * the rows of both blocks. APART: the other block has the same columns, but rows of its own. */
struct PairTile {
    int g, rows, column, turns;
    bool apart;
    int64_t first;
};

/* Stages lie in units, each b's 128 columns or twice 64 rows of a: a stage is one of b and as many
 * of a as the tile has. */
#define PAIRS_UNITS  12
#define PAIRS_STAGES (PAIRS_UNITS / 2)
#define PAIRS_TOLD   (PAIRS_STAGES + 2) /* tiles, each of a stage or more, that may be under way */
struct PairMemory {
    bf16 units[PAIRS_UNITS][PAIRS_COLUMNS * PAIRS_DEPTH];
    bf16 results[2][PAIRS_ROWS * PAIRS_COLUMNS]; /* of each warpgroup, on their way */
    Barrier full[PAIRS_STAGES], empty[PAIRS_STAGES], told[PAIRS_TOLD];
    PairTile tile[PAIRS_TOLD];      /* what the copying thread tells of them */
    int count, pairs, tiles, steps; /* groups, pairs of columns, tiles, stages of a tile */
    int starts[];                   /* see count_pair_tiles */
};
template <int BLOCKS> static size_t gemm_pairs_bytes(int groups) {
    return sizeof(PairMemory) + (size_t)(BLOCKS * groups + 1) * sizeof(int);
}

/* Rows of a tile whose warpgroups have BLOCKS times 64 each. */
template <int BLOCKS> static constexpr int PAIRS_TILE = 2 * BLOCKS *PAIRS_ROWS;

/* How many products of 64 rows the busier warpgroup has of so many rows. */
DEVICE_FUNCTION int turns_of(int64_t rows) {
    return (int)((rows + 2 * PAIRS_ROWS - 1) / (2 * PAIRS_ROWS));
}

/* Tiles of rows, long ones first, so that blocks end together and stages change their size seldom:
 * entry c count + g of `starts` says how many there are before group g's tiles of BLOCKS - c turns:
 * all that are whole, then its last. The entry behind them: how many there are. By one warp. */
template <int BLOCKS>
DEVICE_FUNCTION void count_pair_tiles(int *starts, const Groups &groups, int count, int64_t M) {
    constexpr int ROWS = PAIRS_TILE<BLOCKS>;
    int lane = threadIdx.x % 32, before = 0;
    for (int base = 0; base < BLOCKS * count; base += 32) {
        int e = base + lane, g = e % count, tiles = 0;
        if (e < BLOCKS * count) {
            int64_t rows = group_end(groups, g, M) - group_begin(groups, g);
            tiles =
                (turns_of(rows % ROWS) == BLOCKS - e / count) + (e < count) * (int)(rows / ROWS);
        }
        int sum = warp_running_sum(tiles);
        if (e < BLOCKS * count) starts[e] = before + sum - tiles;
        before += __shfl_sync(0xffffffffu, sum, 31);
    }
    if (!lane) starts[BLOCKS * count] = before;
}

/* Tile number t: of an entry all tiles of rows, for each pair of columns. */
template <int BLOCKS>
DEVICE_FUNCTION PairTile find_pair_tile(const PairMemory *memory, const Groups &groups, int64_t M,
                                        int64_t N, int t) {
    constexpr int ROWS = PAIRS_TILE<BLOCKS>;
    const int *starts = memory->starts;
    int count = memory->count, pairs = memory->pairs, rank = (int)pair_rank();
    int low = 0, high = BLOCKS * count, row_tile = t / pairs;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        (starts[middle] <= row_tile ? low : high) = middle;
    }
    int g = low % count, tiles = starts[low + 1] - starts[low], i = t - starts[low] * pairs;
    int64_t begin = group_begin(groups, g), rows = group_end(groups, g, M) - begin;
    int64_t first = low < count ? (int64_t)(i % tiles) * ROWS : rows / ROWS * ROWS;
    int left = (int)min(rows - first, (int64_t)ROWS), column = i / tiles * PAIR * PAIRS_COLUMNS;
    PairTile tile = {g, left, column, turns_of(left), column + PAIRS_COLUMNS >= N, begin + first};
    if (tile.apart) {
        int half = tile.turns * PAIRS_ROWS;
        tile.rows = max(0, min(half, left - rank * half));
        tile.first += rank * half;
    } else {
        tile.column += rank * PAIRS_COLUMNS;
    }
    return tile;
}

/* Which stage is next, of `count` of so many units, and the parity of the next phase of each. */
struct Ring {
    int stage, units, count;
    unsigned parities;
    DEVICE_MEMBER void begin(int stage_units) {
        stage = 0;
        units = stage_units;
        count = PAIRS_UNITS / units;
    }
    DEVICE_MEMBER unsigned parity(int i) const { return parities >> i & 1; }
    DEVICE_MEMBER void next() {
        parities ^= 1u << stage;
        if (++stage == count) stage = 0;
    }
};

/* What a warpgroup has of the products: the first COUNT of its 64 rows. */
template <bool TB, int COUNT, int BLOCKS>
DEVICE_FUNCTION void multiply_stages(float (&sums)[BLOCKS][PAIRS_COLUMNS / 2], PairMemory *memory,
                                     Ring &ring, int steps, int own) {
    int last = -1;
    auto release = [&](int stage) {
        if (threadIdx.x % WARPGROUP < PAIR)
            barrier_arrive(&memory->empty[stage], threadIdx.x % WARPGROUP);
    };
    for (int i = 0; i < steps; i++) {
        int unit = same_in_warp(ring.stage * ring.units);
        const bf16 *b = memory->units[unit];
        const bf16 *a = memory->units[unit + 1] + own * PAIRS_ROWS * PAIRS_DEPTH;
        barrier_wait(&memory->full[ring.stage], ring.parity(ring.stage));
        if constexpr (COUNT > 0) {
            constexpr int RIGHT = TB ? PAIRS_DEPTH : PAIRS_COLUMNS; /* rows of b's tile */
            Operand left = operand(a, 0, 0, PAIRS_ROWS), right = operand(b, 0, 0, RIGHT);
            wgmma_begin();
#pragma unroll
            for (int kk = 0; kk < PAIRS_DEPTH; kk += 16)
#pragma unroll
                for (int j = 0; j < COUNT; j++)
                    wgmma<false, TB>(sums[j], further(left, j * 2 * PAIRS_ROWS, kk, PAIRS_ROWS),
                                     further(right, TB ? kk : 0, TB ? 0 : kk, RIGHT));
            wgmma_close_group();
            wgmma_wait<1>();
        }
        if (last >= 0) release(last);
        last = ring.stage;
        ring.next();
    }
    if constexpr (COUNT > 0) {
        wgmma_wait<0>();
#pragma unroll
        for (int j = 0; j < COUNT; j++) wgmma_results(sums[j]);
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

/* Rows of f32. */
DEVICE_FUNCTION void store_line(float *y, Write write, const float (&sums)[PAIRS_COLUMNS / 2],
                                int p, bool here, int columns, float alpha) {
#pragma unroll
    for (int j = 0; j < PAIRS_COLUMNS / 8; j++) {
        int n = 8 * j + threadIdx.x % 4 * 2;
        if (!here || n >= columns) continue;
        float pair[2] = {alpha * sums[4 * j + 2 * p], alpha * sums[4 * j + 2 * p + 1]};
        if (write == ADD) {
            float old[2];
            load<2>(old, y + n);
            pair[0] += old[0];
            pair[1] += old[1];
        }
        store<2>(y + n, pair);
    }
}

/* Of bf16: four lanes have a row, of which each reads and writes every fourth chunk of 16 bytes. */
DEVICE_FUNCTION void store_line(bf16 *y, Write write, const float (&sums)[PAIRS_COLUMNS / 2], int p,
                                bool here, int columns, float alpha) {
    constexpr int CHUNKS = PAIRS_COLUMNS / 32;
    int t = threadIdx.x % 4;
    unsigned words[CHUNKS][4] = {};
    if (write == ADD) {
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            int n = 32 * c + 8 * t;
            uint4 old = {0, 0, 0, 0};
            if (here && n < columns) old = *(const uint4 *)(y + n);
            words[c][0] = old.x, words[c][1] = old.y, words[c][2] = old.z, words[c][3] = old.w;
        }
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) turn_quad(words[c]);
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        int n = 32 * c + 8 * t;
#pragma unroll
        for (int q = 0; q < 4; q++) {
            const float *x = &sums[16 * c + 4 * q + 2 * p];
            words[c][q] = pack_bf16(alpha * x[0] + __uint_as_float(words[c][q] << 16),
                                    alpha * x[1] + __uint_as_float(words[c][q] & 0xffff0000u));
        }
        turn_quad(words[c]);
        if (here && n < columns)
            *(uint4 *)(y + n) = uint4{words[c][0], words[c][1], words[c][2], words[c][3]};
    }
}

/* 64 rows of results, by way of shared memory: the next products do not wait for them. */
DEVICE_FUNCTION void send_results(const TileMap &y, bf16 *room,
                                  const float (&sums)[PAIRS_COLUMNS / 2], int64_t first, int column,
                                  int columns, float alpha, int own) {
    bool leads = threadIdx.x % WARPGROUP == 0;
    int row = result_row(), t = threadIdx.x % 4;
    if (leads) stores_have_read();
    warpgroup_sync(own);
#pragma unroll
    for (int p = 0; p < 2; p++)
#pragma unroll
        for (int j = 0; j < PAIRS_COLUMNS / 8; j++)
            *(unsigned *)(room + tile_at(row + 8 * p, 8 * j, PAIRS_ROWS) + 2 * t) =
                pack_bf16(alpha * sums[4 * j + 2 * p], alpha * sums[4 * j + 2 * p + 1]);
    shared_for_products();
    warpgroup_sync(own);
    for (int c = 0; c < PAIRS_COLUMNS && c < columns && leads; c += TILE_COLUMNS)
        store_tile(y, room + c * PAIRS_ROWS, 0, first, column + c);
}

/* y (=|+=) alpha times the sum of a b over the maps' factors; shapes as in gemm16 (NT, NN), one
 * factor where there are groups, and SET where BLOCKS is 3. Rows of y a multiple of 16 bytes.
 * Launched in pairs of blocks, any number. */
template <bool TB, int BLOCKS, typename Y>
static __global__ void __launch_bounds__(BROUGHT_THREADS, 1)
    gemm_pairs(Y *y, Write write, const __grid_constant__ PairMaps maps, int64_t M, int64_t N,
               Groups groups, float alpha) {
#if ON_HOPPER
    if (BLOCKS > 2) write = SET; /* and there are registers enough */
    DYNAMIC_SHARED(bytes);
    PairMemory *memory = (PairMemory *)bytes;
    if (!threadIdx.x) {
        for (int i = 0; i < PAIRS_STAGES; i++) {
            barrier_begin(&memory->full[i], 1);
            barrier_begin(&memory->empty[i], 2 * PAIR);
        }
        for (int i = 0; i < PAIRS_TOLD; i++) barrier_begin(&memory->told[i], 1);
    }
    wait_for_last();
    if (threadIdx.x < 32) {
        int count = groups.offsets ? groups.count : 1;
        count_pair_tiles<BLOCKS>(memory->starts, groups, count, M);
        if (!threadIdx.x) {
            memory->count = count;
            memory->pairs = (int)((N + PAIR * PAIRS_COLUMNS - 1) / (PAIR * PAIRS_COLUMNS));
            memory->tiles = memory->starts[BLOCKS * count] * memory->pairs;
            memory->steps = 0;
            for (int f = 0; f < PAIRS_FACTORS; f++) memory->steps += maps.steps[f];
        }
    }
    pair_sync();
    Ring ring = {0, 1 + BLOCKS, PAIRS_UNITS / (1 + BLOCKS), 0};
    int turn = 0; /* tiles that were this block's */
    if (threadIdx.x < WARPGROUP) {
        registers_fewer<40>();
        for (int t = (int)blockIdx.x / PAIR; !threadIdx.x && t < memory->tiles;
             t += (int)gridDim.x / PAIR) {
            PairTile tile = find_pair_tile<BLOCKS>(memory, groups, M, N, t);
            memory->tile[turn % PAIRS_TOLD] = tile;
            barrier_announce(&memory->told[turn++ % PAIRS_TOLD], 0);
            int steps = memory->steps, factor = 0, k = 0;
            int blocks = (tile.rows + PAIRS_ROWS - 1) / PAIRS_ROWS;
            int apart = tile.apart ? 1 : PAIR, begin = tile.apart ? 0 : (int)pair_rank();
            int arrive = (int)sizeof memory->units[0] * (2 + blocks) / 2;
            if (ring.units != 1 + tile.turns) { /* all that lies there has been used */
                for (int i = 0; i < ring.count; i++)
                    barrier_wait(&memory->empty[i], ring.parity(i) ^ 1);
                ring.begin(1 + tile.turns);
            }
            for (int i = 0; i < steps; i++) {
                Barrier *full = &memory->full[ring.stage];
                bf16 *to = memory->units[ring.stage * ring.units];
                while (k == maps.steps[factor] * PAIRS_DEPTH) factor++, k = 0;
                const TileMap &a = maps.a[factor], &b = maps.b[factor];
                barrier_wait(&memory->empty[ring.stage], ring.parity(ring.stage) ^ 1);
                barrier_announce(full, arrive);
                for (int j = begin; j < blocks; j += apart) {
                    bf16 *rows = to + PAIRS_COLUMNS * PAIRS_DEPTH + j * PAIRS_ROWS * PAIRS_DEPTH;
                    int64_t row = tile.first + j * PAIRS_ROWS;
                    if (tile.apart)
                        copy_tile<false>(rows, full, a, 0, row, k);
                    else
                        copy_tile<true>(rows, full, a, 0, row, k);
                }
                if (TB)
                    for (int j = 0; j < PAIRS_COLUMNS; j += TILE_COLUMNS)
                        copy_tile<false>(to + j * PAIRS_DEPTH, full, b, tile.g, k, tile.column + j);
                else
                    copy_tile<false>(to, full, b, tile.g, tile.column, k);
                k += PAIRS_DEPTH;
                ring.next();
            }
        }
    } else {
        registers_more<232>();
        int own = same_in_warp(brought_half());
        for (int t = (int)blockIdx.x / PAIR; t < memory->tiles; t += (int)gridDim.x / PAIR) {
            const PairTile &tile = memory->tile[turn % PAIRS_TOLD];
            barrier_wait(&memory->told[turn % PAIRS_TOLD], turn / PAIRS_TOLD % 2);
            turn++;
            float sums[BLOCKS][PAIRS_COLUMNS / 2] = {};
            int blocks = turns_of(tile.rows - own * PAIRS_ROWS);
            if (ring.units != 1 + tile.turns) ring.begin(1 + tile.turns);
            if (BLOCKS > 2 && blocks > 2)
                multiply_stages<TB, BLOCKS>(sums, memory, ring, memory->steps, own);
            else if (blocks > 1)
                multiply_stages<TB, 2>(sums, memory, ring, memory->steps, own);
            else if (blocks > 0)
                multiply_stages<TB, 1>(sums, memory, ring, memory->steps, own);
            else
                multiply_stages<TB, 0>(sums, memory, ring, memory->steps, own);
            int columns = (int)N - tile.column;
#pragma unroll
            for (int j = 0; j < BLOCKS; j++) {
                if (j >= blocks) continue;
                int row = (own + 2 * j) * PAIRS_ROWS, rows = tile.rows - row;
                if constexpr (sizeof(Y) == sizeof(bf16))
                    if (write == SET && rows >= PAIRS_ROWS) {
                        send_results(maps.y, memory->results[own], sums[j], tile.first + row,
                                     tile.column, columns, alpha, own);
                        continue;
                    }
#pragma unroll
                for (int p = 0; p < 2; p++) { /* a lane's two of 64 rows */
                    int line = result_row() + 8 * p;
                    store_line(y + (tile.first + row + known_here(line)) * N + tile.column, write,
                               sums[j], p, line < rows, columns, alpha);
                }
            }
        }
        if (threadIdx.x % WARPGROUP == 0) stores_have_read();
    }
    pair_sync(); /* neither ends while the other writes to it */
#endif
}

#endif
