/* gradients_hopper.h - attention's way back on Hopper's tensor cores, for heads of 256 and 512:
 * five products.
 *
 * As in flash.h the rows of a tile are the heads that share keys, of a few queries. First the
 * weights and the slopes of the scores are made, from scores made again, and written to memory in
 * bf16, as many queries at a time as fit: reading them twice takes less time than making them
 * twice. Then each gradient is one product, of which only the tiles are multiplied that rows see:
 *   S = q k^T, W = exp(S - lse), Z = W (dy v^T - delta);  dq = Z k, dk += Z^T q, dv += W^T dy
 * The copy engine brings what is multiplied, and takes weights and slopes away (bulk.h). */
#ifndef CUDA_GRADIENTS_HOPPER_H
#define CUDA_GRADIENTS_HOPPER_H

#include "kernels/cuda/bulk.h"
#include "kernels/cuda/flash.h"
#include "kernels/cuda/gemm_hopper.h"

/* What attention_backward is given. */
struct GradientSides {
    bf16 *dq;
    float *dk, *dv;
    const bf16 *dy;
    const float *delta, *lse;
    const bf16 *q, *k, *v;
};

/* The queries whose weights are there at one time: their rows, from query n0 on, in `tiles` tiles.
 */
struct Slab {
    const int *spans; /* of each tile of rows from n0 on: the first and last key they see */
    int64_t n0;
    int tiles, group_bits; /* group_bits: log2(group) */
    bool adds;             /* to dk and dv, or their parts, as they are */
};

/* Keys of a row of weights: whole tiles. */
static inline int64_t slab_width(const Heads &heads) {
    return ceil_div(heads.S, HOPPER_COLUMNS) * HOPPER_COLUMNS;
}

/* The keys that each tile of rows sees, first > last: none; a warp for each tile. */
static __global__ void find_spans(int *spans, Heads heads, Sight see, int64_t tiles) {
    int64_t tile = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    int queries = HOPPER_ROWS / heads.group, low = 0x7fffffff, high = -1;
    if (tile >= tiles) return;
    for (int i = threadIdx.x % 32; i < queries; i += 32) {
        int64_t n = tile * queries + i;
        if (n >= heads.N || see.first[n] > see.last[n]) continue;
        low = min(low, see.first[n]);
        high = max(high, see.last[n]);
    }
    low = warp_least(low);
    high = warp_most(high);
    if (threadIdx.x % 32) return;
    spans[2 * tile] = low;
    spans[2 * tile + 1] = high;
}

/* Whether a tile of rows sees any of so many keys. */
DEVICE_FUNCTION bool sees_any(const Slab &slab, int tile, int64_t s0, int keys) {
    return slab.spans[2 * tile] < s0 + keys && slab.spans[2 * tile + 1] >= s0;
}

/* Where row r of a tile lies behind the tile's first, in q, dy and dq. */
struct RowPlaces {
    int shift, mask, query, C; /* log2(group); group - 1; elements of a query and of a head */
    DEVICE_MEMBER RowPlaces(const Heads &heads, const Slab &slab)
        : shift(slab.group_bits), mask(heads.group - 1), query(heads.H * heads.C), C(heads.C) {}
    DEVICE_MEMBER int operator()(int r) const { return (r >> shift) * query + (r & mask) * C; }
};

/* ---- products of tiles that the copy engine brings ---- */

/* Stages of a product of 128 by 256. */
template <int STAGES> struct Brought {
    bf16 left[STAGES][HOPPER_ROWS * HOPPER_DEPTH], right[STAGES][HOPPER_COLUMNS * HOPPER_DEPTH];
    Barrier full[STAGES], empty[STAGES];
};

/* By all threads, before the first product. */
template <int STAGES> DEVICE_FUNCTION void begin_products(Brought<STAGES> *memory) {
    if (!threadIdx.x)
        for (int i = 0; i < STAGES; i++) {
            barrier_begin(&memory->full[i], 1);
            barrier_begin(&memory->empty[i], 2);
        }
    __syncthreads();
}

/* The bringing warpgroup: bring(step, left tile, right tile, barrier) asks for a step's. */
template <int STAGES, typename Bring>
DEVICE_FUNCTION void bring_steps(Brought<STAGES> *memory, int steps, Bring bring) {
    registers_fewer<40>();
    if (threadIdx.x) return;
    for (int i = 0; i < steps; i++) {
        int stage = i % STAGES;
        barrier_wait(&memory->empty[stage], (i / STAGES & 1) ^ 1);
        barrier_announce(&memory->full[stage],
                         (int)(sizeof memory->left[0] + sizeof memory->right[0]));
        bring(i, memory->left[stage], memory->right[stage], &memory->full[stage]);
    }
}

/* They add steps first .. first + steps - 1; TA, TB: K are the rows of that operand. */
template <bool TA, bool TB, int STAGES>
DEVICE_FUNCTION void multiply_steps(float (&sums)[HOPPER_COLUMNS / 2], Brought<STAGES> *memory,
                                    int first, int steps) {
    typedef Side<HOPPER_ROWS, TA> Left;
    typedef Side<HOPPER_COLUMNS, TB> Right;
    int own = same_in_warp(brought_half()) * 64,
        last = -1; /* last: the stage before, still in use */
    auto release = [&] {
        if (last >= 0 && threadIdx.x % WARPGROUP == 0) barrier_arrive(&memory->empty[last], 0);
    };
    for (int i = first; i < first + steps; i++) {
        int stage = same_in_warp(i % STAGES);
        Operand left = operand(memory->left[stage], TA ? 0 : own, TA ? own : 0, Left::ROWS),
                right = operand(memory->right[stage], 0, 0, Right::ROWS);
        barrier_wait(&memory->full[stage], i / STAGES & 1);
        wgmma_begin();
#pragma unroll
        for (int kk = 0; kk < HOPPER_DEPTH; kk += 16)
            wgmma<TA, TB>(sums, further(left, TA ? kk : 0, TA ? 0 : kk, Left::ROWS),
                          further(right, TB ? kk : 0, TB ? 0 : kk, Right::ROWS));
        wgmma_close_group();
        wgmma_wait<1>();
        release();
        last = stage;
    }
    wgmma_wait<0>();
    wgmma_results(sums);
    release();
}

/* ---- weights and slopes ---- */

/* Blocks that share the tiles of keys which a tile of rows sees. */
#define SLOPE_BLOCKS 2

/* Rows of q and dy, of k and v; where weights and slopes go, 64 rows at a time. */
struct SlopeMaps {
    TileMap rows[2], keys[2], results[2];
};

/* Results of each half on their way out, which weights leave before slopes come. */
struct SlopeMemory {
    bf16 results[2][64 * HOPPER_COLUMNS];
    Brought<3> tiles;
};

/* Weights and slopes of a tile of rows and the tiles of HOPPER_COLUMNS keys that it sees, every
 * SLOPE_BLOCKS-th. Grid: (SLOPE_BLOCKS, tiles of rows, K). */
template <int C>
static __global__ void __launch_bounds__(BROUGHT_THREADS, 1)
    attention_slopes(GradientSides of, const __grid_constant__ SlopeMaps maps, Heads heads,
                     Sight see, Slab slab) {
#if ON_HOPPER
    constexpr int COUNT = HOPPER_COLUMNS / 2, STEPS = C / HOPPER_DEPTH;
    DYNAMIC_SHARED(bytes);
    SlopeMemory *memory = (SlopeMemory *)bytes;
    __shared__ RowFacts<HOPPER_ROWS> facts;
    int kv = blockIdx.z, row_tile = (int)(gridDim.y - 1 - blockIdx.y); /* long sights first */
    int low = slab.spans[2 * row_tile], high = slab.spans[2 * row_tile + 1];
    int key_tile = low / HOPPER_COLUMNS + (int)blockIdx.x, last = high / HOPPER_COLUMNS;
    if (low > high || key_tile > last) return;
    int64_t n0 = slab.n0 + (int64_t)row_tile * (HOPPER_ROWS / heads.group);
    begin_products(&memory->tiles);
    if (threadIdx.x < WARPGROUP) {
        int tiles = (last - key_tile) / SLOPE_BLOCKS + 1;
        bring_steps(&memory->tiles, tiles * 2 * STEPS,
                    [&](int i, bf16 *left, bf16 *right, Barrier *full) {
                        int which = i / STEPS % 2, c = i % STEPS * HOPPER_DEPTH;
                        int s0 = (key_tile + i / (2 * STEPS) * SLOPE_BLOCKS) * HOPPER_COLUMNS;
                        copy_tile<false>(left, full, maps.rows[which], n0, kv * heads.group, c);
                        copy_tile<false>(right, full, maps.keys[which], 0, s0, kv * C + c);
                    });
        return;
    }
    registers_more<232>();
    read_facts(&facts, heads, see, of.lse, of.delta, n0, kv, WARPGROUP);
    multipliers_sync();
    int own = brought_half(), r = brought_row(), line = result_row(), t = threadIdx.x % 4, step = 0;
    bf16 *room = memory->results[own];
    int64_t to = ((int64_t)kv * slab.tiles + row_tile) * HOPPER_ROWS + own * 64;
    bool leads = threadIdx.x % WARPGROUP == 0;
    auto pair_at = [&](int p, int j) {
        return (unsigned *)(room + tile_at(line + 8 * p, 8 * j, 64) + 2 * t);
    };
    auto wait_for_room = [&] {
        if (leads) stores_have_read();
        warpgroup_sync(own);
    };
    auto send = [&](const TileMap &map, int s0) {
        shared_for_products();
        warpgroup_sync(own);
        for (int c = 0; c < HOPPER_COLUMNS && leads; c += TILE_COLUMNS)
            store_tile(map, room + c * 64, 0, to, s0 + c);
    };
    for (; key_tile <= last; key_tile += SLOPE_BLOCKS, step += 2 * STEPS) {
        int s0 = key_tile * HOPPER_COLUMNS;
        float sums[COUNT] = {};
        multiply_steps<false, false>(sums, &memory->tiles, step, STEPS);
        wait_for_room();
#pragma unroll
        for (int p = 0; p < 2; p++) {
            float lse = facts.lse[r + 8 * p];
            int ahead = s0 + 2 * t - facts.first[r + 8 * p], count = facts.count[r + 8 * p];
#pragma unroll
            for (int j = 0; j < COUNT / 4; j++) {
                int i = 4 * j + 2 * p;
                *pair_at(p, j) = pack_bf16(weight_of(sums[i], lse, ahead + 8 * j, count),
                                           weight_of(sums[i + 1], lse, ahead + 8 * j + 1, count));
                sums[i] = sums[i + 1] = 0;
            }
        }
        send(maps.results[0], s0);
        multiply_steps<false, false>(sums, &memory->tiles, step + STEPS, STEPS);
        wait_for_room();
#pragma unroll
        for (int p = 0; p < 2; p++) {
            float delta = facts.delta[r + 8 * p];
#pragma unroll
            for (int j = 0; j < COUNT / 4; j++) {
                unsigned pair = *pair_at(p, j);
                *pair_at(p, j) = pack_bf16(
                    __uint_as_float(pair << 16) * (sums[4 * j + 2 * p] - delta),
                    __uint_as_float(pair & 0xffff0000u) * (sums[4 * j + 2 * p + 1] - delta));
            }
        }
        send(maps.results[1], s0);
    }
    if (leads) stores_have_read();
#endif
}

/* ---- gradients ---- */

/* What is cut into tiles: slopes and weights, (rows, keys); what they meet. */
struct GradientMaps {
    TileMap left[2], right[2];
};
typedef Brought<HOPPER_STAGES> GradientMemory;

/* dq of a tile of rows and 256 columns. Maps: slopes, k. Grid: (C / 256, tiles of rows, K). */
template <int C>
static __global__ void __launch_bounds__(BROUGHT_THREADS, 1)
    query_products(GradientSides of, const __grid_constant__ GradientMaps maps, Heads heads,
                   Slab slab) {
#if ON_HOPPER
    DYNAMIC_SHARED(bytes);
    GradientMemory *memory = (GradientMemory *)bytes;
    int tile = (int)(gridDim.y - 1 - blockIdx.y), kv = blockIdx.z; /* long sights first */
    int low = slab.spans[2 * tile], end = slab.spans[2 * tile + 1] + 1;
    int column = (int)blockIdx.x * HOPPER_COLUMNS;
    int s = low < end ? low / HOPPER_DEPTH * HOPPER_DEPTH : end;
    int steps = (end - s + HOPPER_DEPTH - 1) / HOPPER_DEPTH;
    begin_products(memory);
    if (threadIdx.x < WARPGROUP) {
        bring_steps(memory, steps, [&](int, bf16 *left, bf16 *right, Barrier *full) {
            copy_tile<false>(left, full, maps.left[0], 0,
                             ((int64_t)kv * slab.tiles + tile) * HOPPER_ROWS, s);
            for (int c = 0; c < HOPPER_COLUMNS; c += TILE_COLUMNS)
                copy_tile<false>(right + c * HOPPER_DEPTH, full, maps.right[0], 0, s,
                                 kv * C + column + c);
            s += HOPPER_DEPTH;
        });
        return;
    }
    float sums[HOPPER_COLUMNS / 2] = {};
    registers_more<232>();
    wgmma_results(sums); /* zeros are there before the first product */
    multiply_steps<false, true>(sums, memory, 0, steps);
    int64_t n0 = slab.n0 + (int64_t)tile * (HOPPER_ROWS / heads.group);
    int rows = (int)min((int64_t)HOPPER_ROWS, (heads.N - n0) * heads.group);
    RowPlaces places(heads, slab);
    bf16 *dq = of.dq + (n0 * heads.H + kv * heads.group) * C + column + threadIdx.x % 4 * 2;
#pragma unroll
    for (int p = 0; p < 2; p++) {
        int r = brought_row() + 8 * p;
        if (r >= rows) continue;
#pragma unroll
        for (int j = 0; j < HOPPER_COLUMNS / 8; j++)
            *(unsigned *)(dq + places(r) + 8 * j) =
                pack_bf16(sums[4 * j + 2 * p], sums[4 * j + 2 * p + 1]);
    }
#endif
}

/* dk and dv of a tile of HOPPER_ROWS keys and 256 columns, from part blockIdx.z of the rows that
 * see them; part z is at z * (S, K, C). Maps: slopes and weights, q and dy. Grid:
 * (2 C / 256, tiles of keys * K, parts). */
template <int C>
static __global__ void __launch_bounds__(BROUGHT_THREADS, 1)
    key_products(GradientSides of, const __grid_constant__ GradientMaps maps, Heads heads,
                 Slab slab) {
#if ON_HOPPER
    constexpr int COLUMNS = C / HOPPER_COLUMNS;
    DYNAMIC_SHARED(bytes);
    GradientMemory *memory = (GradientMemory *)bytes;
    constexpr int WARPS = BROUGHT_THREADS / 32;
    __shared__ int firsts[WARPS], lasts[WARPS], counts[WARPS];
    int values = blockIdx.x >= COLUMNS;
    int kv = (int)blockIdx.y % heads.K, column = (int)blockIdx.x % COLUMNS * HOPPER_COLUMNS;
    int64_t s0 = (int64_t)(blockIdx.y / heads.K) * HOPPER_ROWS; /* keys that many see first */
    /* This part's tiles of rows: tile .. end - 1, of which `count` see a key. */
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = slab.tiles, last = -1, count = 0;
    for (int i = threadIdx.x; i < slab.tiles; i += BROUGHT_THREADS) {
        if (!sees_any(slab, i, s0, HOPPER_ROWS)) continue;
        first = min(first, i);
        last = max(last, i);
    }
    first = warp_least(first);
    last = warp_most(last);
    if (!lane) firsts[warp] = first, lasts[warp] = last;
    __syncthreads();
    for (int w = 0; w < WARPS; w++) {
        first = min(first, firsts[w]);
        last = max(last, lasts[w]);
    }
    int each = (last - first + (int)gridDim.z) / (int)gridDim.z,
        tile = first + (int)blockIdx.z * each, end = min(last + 1, tile + each);
    for (int i = tile + (int)threadIdx.x; i < end; i += BROUGHT_THREADS)
        count += sees_any(slab, i, s0, HOPPER_ROWS);
    count = (int)warp_sum((float)count);
    if (!lane) counts[warp] = count;
    __syncthreads();
    count = 0;
    for (int w = 0; w < WARPS; w++) count += counts[w];
    if (!count && slab.adds) return;

    begin_products(memory);
    int steps = count * (HOPPER_ROWS / HOPPER_DEPTH);
    if (threadIdx.x < WARPGROUP) {
        int half = 0;
        bring_steps(memory, steps, [&](int, bf16 *left, bf16 *right, Barrier *full) {
            while (!half && !sees_any(slab, tile, s0, HOPPER_ROWS)) tile++;
            int row = tile * HOPPER_ROWS + half;
            for (int c = 0; c < HOPPER_ROWS; c += TILE_COLUMNS)
                copy_tile<false>(left + c * HOPPER_DEPTH, full, maps.left[values], 0,
                                 (int64_t)kv * slab.tiles * HOPPER_ROWS + row, s0 + c);
            for (int c = 0; c < HOPPER_COLUMNS; c += TILE_COLUMNS)
                copy_tile<false>(right + c * HOPPER_DEPTH, full, maps.right[values],
                                 slab.n0 + (row >> slab.group_bits), kv * heads.group, column + c);
            half ^= HOPPER_DEPTH;
            tile += !half;
        });
        return;
    }
    float sums[HOPPER_COLUMNS / 2] = {};
    registers_more<232>();
    wgmma_results(sums); /* zeros are there before the first product */
    multiply_steps<true, true>(sums, memory, 0, steps);
    int64_t line = (int64_t)heads.K * C;
    float *to = (values ? of.dv : of.dk) + ((int64_t)blockIdx.z * heads.S + s0) * line + kv * C +
                column + threadIdx.x % 4 * 2;
#pragma unroll
    for (int p = 0; p < 2; p++) {
        int r = brought_row() + 8 * p;
        if (s0 + r >= heads.S) continue;
#pragma unroll
        for (int j = 0; j < HOPPER_COLUMNS / 8; j++) {
            float2 *at = (float2 *)(to + r * line + 8 * j), old = {0, 0};
            if (slab.adds) old = *at;
            *at = float2{old.x + sums[4 * j + 2 * p], old.y + sums[4 * j + 2 * p + 1]};
        }
    }
#endif
}

/* The parts of dk, and of dv behind them, added in order. */
static __global__ void join_gradients(float *dk, float *dv, Write write, const float *parts,
                                      int64_t count, int splits) {
    wait_for_last();
    FOR_GRID(i, 2 * count / 4) {
        bool values = 4 * i >= count;
        int64_t at = 4 * i - (values ? count : 0);
        float *to = (values ? dv : dk) + at, sum[4] = {}, x[4];
        for (int p = 0; p < splits; p++) {
            load(x, parts + ((values ? splits : 0) + p) * count + at);
#pragma unroll
            for (int j = 0; j < 4; j++) sum[j] += x[j];
        }
        if (write == ADD) {
            load(x, to);
#pragma unroll
            for (int j = 0; j < 4; j++) sum[j] += x[j];
        }
        store(to, sum);
    }
}

#endif
