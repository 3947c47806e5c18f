/* gradients_hopper.h - attention's way back on Hopper's tensor cores, for heads of 256 and 512:
 * five products.
 *
 * As in flash.h the rows of a tile are the heads that share keys, of a few queries. First the
 * weights and the slopes of the scores are made, from scores made again, and written to memory in
 * bf16, as many queries at a time as fit: reading them twice takes less time than making them
 * twice. Then each gradient is one product, of which only the tiles are multiplied that rows see:
 *   S = q k^T, W = exp(S - lse), Z = W (dy v^T - delta);  dq = Z k, dk += Z^T q, dv += W^T dy */
#ifndef CUDA_GRADIENTS_HOPPER_H
#define CUDA_GRADIENTS_HOPPER_H

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

/* dq of a tile of rows and 256 columns. Grid: (C / 256, tiles of rows, K). */
template <int C>
static __global__ void __launch_bounds__(HOPPER_THREADS, 1)
    query_products(GradientSides of, Heads heads, Slab slab) {
#if ON_HOPPER
    DYNAMIC_SHARED(memory);
    int tile = (int)(gridDim.y - 1 - blockIdx.y), kv = blockIdx.z; /* long sights first */
    int low = slab.spans[2 * tile], end = slab.spans[2 * tile + 1] + 1;
    int column = (int)blockIdx.x * HOPPER_COLUMNS, width = heads.K * C;
    int s = low < end ? low / HOPPER_DEPTH * HOPPER_DEPTH : end;
    int steps = (end - s + HOPPER_DEPTH - 1) / HOPPER_DEPTH, S = (int)heads.S;
    const bf16 *slopes = slab.slopes + ((int64_t)kv * slab.tiles + tile) * HOPPER_ROWS * slab.width,
               *k = of.k + kv * C + column;
    Product<false, true> product(memory);
    auto fetch = [&](bf16 *left_tile, bf16 *right_tile) {
        if (s >= end) return;
        product.left.fetch_lines(left_tile, slopes + s, HOPPER_ROWS, HOPPER_DEPTH, slab.width);
        product.right.fetch_lines(right_tile, k + (int64_t)s * width, min(HOPPER_DEPTH, S - s),
                                  HOPPER_COLUMNS, width);
        s += HOPPER_DEPTH;
    };
    float sums[HOPPER_COLUMNS / 2] = {};
    product.start(fetch);
    product.run(sums, steps, true, fetch);
    copies_wait<0>();
    int64_t n0 = slab.n0 + (int64_t)tile * (HOPPER_ROWS / heads.group);
    int rows = (int)min((int64_t)HOPPER_ROWS, (heads.N - n0) * heads.group);
    RowPlaces places(heads, slab);
    bf16 *dq = of.dq + (n0 * heads.H + kv * heads.group) * C + column + threadIdx.x % 4 * 2;
#pragma unroll
    for (int p = 0; p < 2; p++) {
        int r = result_row() + 8 * p;
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
 * the first slab's takes the place of what was there. Grid: (2 C / 256, tiles of keys * K, parts).
 */
template <int C>
static __global__ void __launch_bounds__(HOPPER_THREADS, 1)
    key_products(GradientSides of, Heads heads, Slab slab) {
#if ON_HOPPER
    constexpr int COLUMNS = C / HOPPER_COLUMNS;
    DYNAMIC_SHARED(memory);
    constexpr int WARPS = HOPPER_THREADS / 32;
    __shared__ int firsts[WARPS], lasts[WARPS], counts[WARPS];
    bool values = blockIdx.x >= COLUMNS;
    int kv = (int)blockIdx.y % heads.K, column = (int)blockIdx.x % COLUMNS * HOPPER_COLUMNS;
    int64_t s0 = (int64_t)(blockIdx.y / heads.K) * HOPPER_ROWS; /* keys that many see first */
    bool adds = slab.first ? gridDim.z == 1 : true;
    /* This part's tiles of rows: tile .. end - 1, of which `count` see a key. */
    int warp = threadIdx.x / 32, first = slab.tiles, last = -1, count = 0;
    for (int i = threadIdx.x; i < slab.tiles; i += HOPPER_THREADS) {
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
    for (int i = tile + (int)threadIdx.x; i < end; i += HOPPER_THREADS)
        count += sees_any(slab, i, s0, HOPPER_ROWS);
    counts[warp] = (int)warp_sum((float)count);
    __syncthreads();
    count = 0;
    for (int w = 0; w < WARPS; w++) count += counts[w];
    if (!count && adds) return;

    int queries = HOPPER_ROWS / heads.group, half = 0;
    const bf16 *rows =
        (values ? of.dy : of.q) + (slab.n0 * heads.H + kv * heads.group) * C + column;
    const bf16 *left = (values ? slab.weights : slab.slopes) +
                       (int64_t)kv * slab.tiles * HOPPER_ROWS * slab.width + s0;
    int64_t width = slab.width, there = (heads.N - slab.n0) * heads.group;
    RowPlaces places(heads, slab);
    Product<true, true> product(memory);
    auto fetch = [&](bf16 *left_tile, bf16 *right_tile) {
        while (!half && tile < end && !sees_any(slab, tile, s0, HOPPER_ROWS)) tile++;
        if (tile >= end) return;
        int64_t row = (int64_t)tile * HOPPER_ROWS + half;
        product.left.fetch_lines(left_tile, left + row * width, HOPPER_DEPTH, HOPPER_ROWS, width);
        product.right.fetch(right_tile, rows + (int64_t)tile * queries * heads.H * C,
                            (int)min((int64_t)HOPPER_DEPTH, there - row), HOPPER_COLUMNS,
                            [=](int r) { return places(half + r); });
        half ^= HOPPER_DEPTH;
        tile += !half;
    };
    float sums[HOPPER_COLUMNS / 2] = {};
    product.start(fetch);
    product.run(sums, count * (HOPPER_ROWS / HOPPER_DEPTH), true, fetch);
    copies_wait<0>();
    int64_t line = (int64_t)heads.K * C;
    float *to = (values ? of.dv : of.dk) + ((int64_t)blockIdx.z * heads.S + s0) * line + kv * C +
                column + threadIdx.x % 4 * 2;
#pragma unroll
    for (int p = 0; p < 2; p++) {
        int r = result_row() + 8 * p;
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
