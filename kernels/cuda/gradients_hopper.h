/* gradients_hopper.h - attention's way back on Hopper's tensor cores, for heads of 256 and 512:
 * five products.
 *
 * As in flash.h the rows of a tile are the heads that share keys, of a few queries. First the
 * weights and the slopes of the scores are made, from scores made again, and written to memory in
 * bf16, as many queries at a time as fit: reading them twice takes less time than making them
 * twice. Then each gradient is one product, of which only the tiles are multiplied that rows see:
 *   S = q k^T, W = exp(S - lse), Z = W (dy v^T - delta);  dq = Z k, dk += Z^T q, dv += W^T dy
 * The copy engine brings what those multiply (bulk.h). */
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
    bf16 *weights, *slopes; /* (K, tiles * HOPPER_ROWS, width) */
    const int *spans;       /* of each tile of rows from n0 on: the first and last key they see */
    int64_t n0, width;      /* keys, rounded up to whole tiles */
    int tiles, group_bits;  /* group_bits: log2(group) */
    bool first;             /* of all slabs */
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

/* Column c of a tile of scores is this key of the tile: a lane's eight in 32 columns lie side by
 * side. 32 columns further it is 32 keys further. */
DEVICE_FUNCTION int key_of_column(int c) {
    return (c & ~31) + c % 8 / 2 * 8 + c / 8 % 4 * 2 + c % 2;
}

/* Blocks that share the tiles of keys which a tile of rows sees: where rows see all keys a block
 * has several, and where they see a window few have none. */
#define SLOPE_BLOCKS 4

/* Weights and slopes of a tile of rows and every SLOPE_BLOCKS-th tile of HOPPER_COLUMNS keys that
 * it sees. Grid: (SLOPE_BLOCKS, tiles of rows, K). */
template <int C>
static __global__ void __launch_bounds__(HOPPER_THREADS, 1)
    attention_slopes(GradientSides of, Heads heads, Sight see, Slab slab) {
#if ON_HOPPER
    constexpr int COUNT = HOPPER_COLUMNS / 2, STEPS = C / HOPPER_DEPTH;
    DYNAMIC_SHARED(memory);
    __shared__ RowFacts<HOPPER_ROWS> facts;
    int kv = blockIdx.z, row_tile = (int)(gridDim.y - 1 - blockIdx.y); /* long sights first */
    int low = slab.spans[2 * row_tile], high = slab.spans[2 * row_tile + 1];
    int key_tile = low / HOPPER_COLUMNS + (int)blockIdx.x;
    if (low > high || key_tile > high / HOPPER_COLUMNS) return;
    int64_t n0 = slab.n0 + (int64_t)row_tile * (HOPPER_ROWS / heads.group);
    read_facts(&facts, heads, see, of.lse, of.delta, n0, kv);
    int64_t row_at = (n0 * heads.H + kv * heads.group) * C;
    int rows = (int)min((int64_t)HOPPER_ROWS, (heads.N - n0) * heads.group), width = heads.K * C;
    RowPlaces places(heads, slab);
    for (; key_tile <= high / HOPPER_COLUMNS; key_tile += SLOPE_BLOCKS) {
        Product<false, false> product(memory);
        int s0 = key_tile * HOPPER_COLUMNS, keys = (int)min((int64_t)HOPPER_COLUMNS, heads.S - s0);
        int64_t key_at = ((int64_t)s0 * heads.K + kv) * C;
        int step = 0, own = key_of_column(product.right.row) - product.right.row;
        auto fetch = [&](bf16 *left_tile, bf16 *right_tile) {
            if (step == 2 * STEPS) return;
            int c = step % STEPS * HOPPER_DEPTH, from = known_here(own);
            product.left.fetch(left_tile, (step < STEPS ? of.q : of.dy) + row_at + c, rows,
                               HOPPER_DEPTH, places);
            /* rows of the tile that are no keys are keys' once more: what they make is not seen */
            product.right.fetch(right_tile, (step < STEPS ? of.k : of.v) + key_at + c,
                                HOPPER_COLUMNS, HOPPER_DEPTH,
                                [=](int r) { return min(r + from, keys - 1) * width; });
            step++;
        };
        float sums[COUNT] = {};
        unsigned packs[COUNT / 2];
        int r = result_row(), t = threadIdx.x % 4;
        bf16 *to = slab.weights +
                   (((int64_t)kv * slab.tiles + row_tile) * HOPPER_ROWS + r) * slab.width + s0 +
                   8 * t;
        auto write = [&](bf16 *matrix) {
#pragma unroll
            for (int m = 0; m < HOPPER_COLUMNS / 32; m++)
#pragma unroll
                for (int p = 0; p < 2; p++)
                    *(uint4 *)(matrix + 8 * p * slab.width + 32 * m) =
                        uint4{packs[8 * m + p], packs[8 * m + 2 + p], packs[8 * m + 4 + p],
                              packs[8 * m + 6 + p]};
        };
        product.start(fetch);
        product.run(sums, STEPS, true, fetch);
#pragma unroll
        for (int p = 0; p < 2; p++) {
            float lse = facts.lse[r + 8 * p];
            int ahead = s0 + 8 * t - facts.first[r + 8 * p], count = facts.count[r + 8 * p];
#pragma unroll
            for (int j = 0; j < COUNT / 4; j++) {
                int i = 4 * j + 2 * p, key = ahead + j / 4 * 32 + j % 4 * 2;
                packs[2 * j + p] = pack_bf16(weight_of(sums[i], lse, key, count),
                                             weight_of(sums[i + 1], lse, key + 1, count));
                sums[i] = sums[i + 1] = 0;
            }
        }
        write(to);
        product.run(sums, STEPS, true, fetch);
#pragma unroll
        for (int p = 0; p < 2; p++) {
            float delta = facts.delta[r + 8 * p];
#pragma unroll
            for (int j = 0; j < COUNT / 4; j++) {
                unsigned pair = packs[2 * j + p];
                packs[2 * j + p] = pack_bf16(
                    __uint_as_float(pair << 16) * (sums[4 * j + 2 * p] - delta),
                    __uint_as_float(pair & 0xffff0000u) * (sums[4 * j + 2 * p + 1] - delta));
            }
        }
        write(to + (slab.slopes - slab.weights));
        copies_wait<0>();
        __syncthreads(); /* the last stage has been multiplied */
    }
#endif
}

/* ---- gradients: products of tiles that the copy engine brings ---- */

#define BROUGHT_THREADS (3 * WARPGROUP) /* one warpgroup brings, two multiply 64 rows each */

/* Stages of a product of 128 by 256. */
struct Brought {
    bf16 left[HOPPER_STAGES][HOPPER_ROWS * HOPPER_DEPTH];
    bf16 right[HOPPER_STAGES][HOPPER_COLUMNS * HOPPER_DEPTH];
    Barrier full[HOPPER_STAGES], empty[HOPPER_STAGES];
};

/* What is cut into tiles: slopes and weights, (rows, keys); what they meet. */
struct GradientMaps {
    TileMap left[2], right[2];
};

/* By all threads, before the product. */
DEVICE_FUNCTION void begin_product(Brought *memory) {
    if (!threadIdx.x)
        for (int i = 0; i < HOPPER_STAGES; i++) {
            barrier_begin(&memory->full[i], 1);
            barrier_begin(&memory->empty[i], 2);
        }
    __syncthreads();
}

/* The bringing warpgroup: bring(left tile, right tile, barrier) asks for a step's. */
template <typename Bring>
DEVICE_FUNCTION void bring_steps(Brought *memory, int steps, Bring bring) {
    registers_fewer<40>();
    if (threadIdx.x) return;
    for (int i = 0; i < steps; i++) {
        int stage = i % HOPPER_STAGES;
        barrier_wait(&memory->empty[stage], (i / HOPPER_STAGES & 1) ^ 1);
        barrier_announce(&memory->full[stage],
                         (int)(sizeof memory->left[0] + sizeof memory->right[0]));
        bring(memory->left[stage], memory->right[stage], &memory->full[stage]);
    }
}

/* The others; TA: K are the rows of the left operand, as they are of the right. */
template <bool TA>
DEVICE_FUNCTION void multiply_steps(float (&sums)[HOPPER_COLUMNS / 2], Brought *memory, int steps) {
    typedef Side<HOPPER_ROWS, TA> Left;
    typedef Side<HOPPER_COLUMNS, true> Right;
    int own = ((int)threadIdx.x / WARPGROUP - 1) * 64;
    registers_more<232>();
    for (int i = 0; i < steps; i++) {
        int stage = i % HOPPER_STAGES;
        const bf16 *a = memory->left[stage], *b = memory->right[stage];
        barrier_wait(&memory->full[stage], i / HOPPER_STAGES & 1);
        wgmma_begin();
#pragma unroll
        for (int kk = 0; kk < HOPPER_DEPTH; kk += 16)
            wgmma<TA, true>(sums,
                            TA ? operand(a, kk, own, Left::ROWS) : operand(a, own, kk, Left::ROWS),
                            operand(b, kk, 0, Right::ROWS));
        wgmma_close_group();
        wgmma_wait<1>();
        if (i && threadIdx.x % WARPGROUP == 0)
            barrier_arrive(&memory->empty[(i - 1) % HOPPER_STAGES], 0);
    }
    wgmma_wait<0>();
    wgmma_results(sums);
}

/* The row of a tile that this lane has results of, behind those who bring. */
DEVICE_FUNCTION int brought_row() {
    return (threadIdx.x - WARPGROUP) / 32 * 16 + threadIdx.x % 32 / 4;
}

/* dq of a tile of rows and 256 columns. Maps: slopes, k. Grid: (C / 256, tiles of rows, K). */
template <int C>
static __global__ void __launch_bounds__(BROUGHT_THREADS, 1)
    query_products(GradientSides of, const __grid_constant__ GradientMaps maps, Heads heads,
                   Slab slab) {
#if ON_HOPPER
    DYNAMIC_SHARED(bytes);
    Brought *memory = (Brought *)bytes;
    int tile = (int)(gridDim.y - 1 - blockIdx.y), kv = blockIdx.z; /* long sights first */
    int low = slab.spans[2 * tile], end = slab.spans[2 * tile + 1] + 1;
    int column = (int)blockIdx.x * HOPPER_COLUMNS;
    int s = low < end ? low / HOPPER_DEPTH * HOPPER_DEPTH : end;
    int steps = (end - s + HOPPER_DEPTH - 1) / HOPPER_DEPTH;
    begin_product(memory);
    if (threadIdx.x < WARPGROUP) {
        bring_steps(memory, steps, [&](bf16 *left, bf16 *right, Barrier *full) {
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
    multiply_steps<false>(sums, memory, steps);
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
 * see them. With one part they are added to what is there; else part z is at z * (S, K, C), where
 * the first slab's takes the place of what was there. Maps: slopes and weights, q and dy. Grid:
 * (2 C / 256, tiles of keys * K, parts). */
template <int C>
static __global__ void __launch_bounds__(BROUGHT_THREADS, 1)
    key_products(GradientSides of, const __grid_constant__ GradientMaps maps, Heads heads,
                 Slab slab) {
#if ON_HOPPER
    constexpr int COLUMNS = C / HOPPER_COLUMNS;
    DYNAMIC_SHARED(bytes);
    Brought *memory = (Brought *)bytes;
    constexpr int WARPS = BROUGHT_THREADS / 32;
    __shared__ int firsts[WARPS], lasts[WARPS], counts[WARPS];
    int values = blockIdx.x >= COLUMNS;
    int kv = (int)blockIdx.y % heads.K, column = (int)blockIdx.x % COLUMNS * HOPPER_COLUMNS;
    int64_t s0 = (int64_t)(blockIdx.y / heads.K) * HOPPER_ROWS; /* keys that many see first */
    bool adds = slab.first ? gridDim.z == 1 : true;
    /* This part's tiles of rows: tile .. end - 1, of which `count` see a key. */
    int warp = threadIdx.x / 32, first = slab.tiles, last = -1, count = 0;
    for (int i = threadIdx.x; i < slab.tiles; i += BROUGHT_THREADS) {
        if (!sees_any(slab, i, s0, HOPPER_ROWS)) continue;
        first = min(first, i);
        last = max(last, i);
    }
    firsts[warp] = warp_least(first);
    lasts[warp] = warp_most(last);
    __syncthreads();
    for (int w = 0; w < WARPS; w++) {
        first = min(first, firsts[w]);
        last = max(last, lasts[w]);
    }
    int each = (last - first + (int)gridDim.z) / (int)gridDim.z,
        tile = first + (int)blockIdx.z * each, end = min(last + 1, tile + each);
    for (int i = tile + (int)threadIdx.x; i < end; i += BROUGHT_THREADS)
        count += sees_any(slab, i, s0, HOPPER_ROWS);
    counts[warp] = (int)warp_sum((float)count);
    __syncthreads();
    count = 0;
    for (int w = 0; w < WARPS; w++) count += counts[w];
    if (!count && adds) return;

    begin_product(memory);
    int steps = count * (HOPPER_ROWS / HOPPER_DEPTH);
    if (threadIdx.x < WARPGROUP) {
        int half = 0;
        bring_steps(memory, steps, [&](bf16 *left, bf16 *right, Barrier *full) {
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
    multiply_steps<true>(sums, memory, steps);
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
            if (adds) old = *at;
            *at = float2{old.x + sums[4 * j + 2 * p], old.y + sums[4 * j + 2 * p + 1]};
        }
    }
#endif
}

/* The parts of dk, and of dv behind them, added in order. */
static __global__ void join_gradients(float *dk, float *dv, const float *parts, int64_t count,
                                      int splits) {
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
        load(x, to);
#pragma unroll
        for (int j = 0; j < 4; j++) sum[j] += x[j];
        store(to, sum);
    }
}

#endif
