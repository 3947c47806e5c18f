/* flash_hopper.h - attention of bf16 heads of 256 and 512 on Hopper's tensor cores, forward
 * (after Dao 2023 and Shah et al. 2024): flash.h's twin, wgmma.h in place of mma.h.
 *
 * As there the rows of a tile are the heads that share keys, of a few queries. Two warpgroups make
 * a block. Heads of 256: each has 64 rows of its own, and the next scores are made while the last
 * weights meet their values. Heads of 512: they share 64 rows, each makes the scores of half of the
 * keys and the results of half of the columns. The way back is gradients_hopper.h. */
#ifndef CUDA_FLASH_HOPPER_H
#define CUDA_FLASH_HOPPER_H

#include "kernels/cuda/flash.h"
#include "kernels/cuda/wgmma.h"

#define HOPPER_KEYS 64 /* keys of a tile */

/* ---- tiles ---- */

/* A thread copies one column of chunks of a tile: rows START, START + STEP, ... */
template <int C> struct Column {
    static constexpr int STEP = FLASH_THREADS / (C / 8);
    int start, column;
    DEVICE_MEMBER Column() : start(threadIdx.x / (C / 8)), column(threadIdx.x % (C / 8) * 8) {}
    /* Where in a tile of ROWS rows its row START + i STEP goes: START < STEP, both of other bits.
     */
    template <int ROWS> DEVICE_MEMBER int at(int i) const {
        return (tile_at(start, column, ROWS) ^ i * STEP % 8 * 8) + i * STEP * 64;
    }
};

/* Where row r of a tile is behind the first of its query, for each of ROWS: what a tile's first row
 * is does not change it. */
template <int ROWS> DEVICE_FUNCTION void row_places(int *places, const Heads &heads) {
    int r = threadIdx.x;
    if (r < ROWS) places[r] = (r / heads.group * heads.H + r % heads.group) * heads.C;
}

/* Rows of q (or dy) from query n0 on, for one head of keys; zeros beyond the last query. */
template <int C, int ROWS>
DEVICE_FUNCTION void hopper_rows(bf16 *tile, const bf16 *q, const int *places, const Heads &heads,
                                 int n0, int kv) {
    Column<C> mine;
    const bf16 *from = q + ((int64_t)n0 * heads.H + kv * heads.group) * C + mine.column;
    int left = (int)min((int64_t)ROWS, (heads.N - n0) * heads.group);
#pragma unroll 4
    for (int i = 0; i < ROWS / Column<C>::STEP; i++) {
        int r = mine.start + i * Column<C>::STEP;
        copy_16(tile + mine.template at<ROWS>(i), from + (r < left ? places[r] : 0), r < left);
    }
}

/* Keys s0 .. s0 + KEYS - 1 of k (or v), of the sequence of query n; zeros from `end` on. */
template <int C, int KEYS>
DEVICE_FUNCTION void hopper_keys(bf16 *tile, const bf16 *k, const Heads &heads, const Sight &see,
                                 int n, int s0, int end, int kv) {
    Column<C> mine;
    int left = min(KEYS, end - s0);
    int64_t width = (int64_t)heads.K * C;
    const bf16 *from = k + kv * C + mine.column;
    if (see.pages) {
#pragma unroll 1
        for (int i = 0; i < KEYS / Column<C>::STEP; i++) {
            int r = mine.start + i * Column<C>::STEP;
            copy_16(tile + mine.template at<KEYS>(i),
                    from + key_row(see, n, s0 + (r < left ? r : 0)) * width, r < left);
        }
        return;
    }
    int step = (int)(Column<C>::STEP * width);
    from += (int64_t)(s0 + mine.start) * width;
#pragma unroll
    for (int i = 0; i < KEYS / Column<C>::STEP; i++) {
        bool here = mine.start + i * Column<C>::STEP < left;
        copy_16(tile + mine.template at<KEYS>(i), from + (here ? i * step : 0), here);
    }
}

/* A place in a tile of 64 columns for the two results that a lane has of columns 8 j .. 8 j + 7. */
DEVICE_FUNCTION unsigned *pair_at(bf16 *tile, int row, int j, int t) {
    return (unsigned *)(tile + tile_at(row, 8 * j, 64) + 2 * t);
}

/* ---- forward ---- */

/* What the rows of a tile see, and of which sequence; of rows beyond the last query nothing. */
template <int ROWS> struct RowSights { int first[ROWS], last[ROWS], whose[ROWS], places[ROWS]; };

template <int ROWS>
DEVICE_FUNCTION void read_sights(RowSights<ROWS> *sights, const Heads &heads, const Sight &see,
                                 int64_t n0) {
    int r = threadIdx.x;
    if (r >= ROWS) return;
    int64_t n = n0 + r / heads.group;
    bool here = n < heads.N;
    sights->first[r] = here ? see.first[n] : 1;
    sights->last[r] = here ? see.last[n] : 0;
    sights->whose[r] = here && see.pages ? see.sequence[n] : 0;
}

/* Rows of one sequence from `row` on, and the keys any of them sees. */
struct Stretch {
    int row, end, low, high;
};
template <int ROWS>
DEVICE_FUNCTION Stretch stretch_of(const RowSights<ROWS> *sights, int row, int rows) {
    int lane = threadIdx.x % 32, end = rows, low = 0x7fffffff, high = -1;
    for (int i = lane; i < rows; i += 32)
        if (i > row && sights->whose[i] != sights->whose[row]) end = min(end, i);
    end = warp_least(end);
    for (int i = lane; i < end; i += 32) {
        if (i < row) continue;
        low = min(low, sights->first[i]);
        high = max(high, sights->last[i]);
    }
    return Stretch{row, end, warp_least(low), warp_most(high)};
}

/* What rows r and r + 8 see of a stretch: nothing where they are not of it. */
template <int ROWS>
DEVICE_FUNCTION void sights_within(int (&low)[2], int (&high)[2], const RowSights<ROWS> *sights,
                                   const Stretch &part, int r) {
#pragma unroll
    for (int p = 0; p < 2; p++) {
        bool mine = r + 8 * p >= part.row && r + 8 * p < part.end;
        low[p] = mine ? sights->first[r + 8 * p] : 1;
        high[p] = mine ? sights->last[r + 8 * p] : 0;
    }
}

/* Scores of rows g and g + 8: what a row does not see becomes -inf; the largest of each row among
 * this quad's. low, high: what the two rows see. */
template <int COUNT>
DEVICE_FUNCTION void mask_scores(float (&best)[2], float (&scores)[COUNT], int s0,
                                 const int (&low)[2], const int (&high)[2]) {
    int mine = s0 + threadIdx.x % 4 * 2;
    int from[2] = {low[0] - mine, low[1] - mine}, to[2] = {high[0] - mine, high[1] - mine};
    if (max(from[0], from[1]) > 0 || min(to[0], to[1]) < 2 * COUNT)
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            int p = i / 2 % 2, s = i / 4 * 8 + i % 2;
            if (s < from[p] || s > to[p]) scores[i] = -INFINITY;
        }
    best[0] = best[1] = -INFINITY;
#pragma unroll
    for (int i = 0; i < COUNT; i++) best[i / 2 % 2] = fmaxf(best[i / 2 % 2], scores[i]);
#pragma unroll
    for (int p = 0; p < 2; p++) {
        best[p] = fmaxf(best[p], __shfl_xor_sync(0xffffffffu, best[p], 1));
        best[p] = fmaxf(best[p], __shfl_xor_sync(0xffffffffu, best[p], 2));
    }
}

/* Rows' largest scores and sums so far take in a tile whose largest are `best`; scores become
 * weights, and fade is what earlier results are to be multiplied by. */
template <int COUNT>
DEVICE_FUNCTION void weigh(float (&top)[2], float (&total)[2], float (&fade)[2],
                           float (&scores)[COUNT], const float (&best)[2]) {
    float base[2];
#pragma unroll
    for (int p = 0; p < 2; p++) {
        float now = fmaxf(top[p], best[p]);
        base[p] = now == -INFINITY ? 0.0f : now;
        fade[p] = quick_exp(top[p] - base[p]);
        total[p] *= fade[p];
        top[p] = now;
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        int p = i / 2 % 2;
        scores[i] = quick_exp(scores[i] - base[p]);
        total[p] += scores[i];
    }
}

/* Earlier results under a new largest score. */
template <int COUNT>
DEVICE_FUNCTION void fade_results(float (&sums)[COUNT], const float (&fade)[2]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) sums[i] *= fade[i / 2 % 2];
}

/* Results of rows r and r + 8 over their sums: columns column + 8 j + 2 t. */
template <int C, int COUNT>
DEVICE_FUNCTION void write_results(bf16 *y, float *lse, const float (&sums)[COUNT],
                                   const float (&top)[2], const float (&total)[2],
                                   const Heads &heads, int n0, int kv, int r, int column) {
    int t = threadIdx.x % 4;
#pragma unroll
    for (int p = 0; p < 2; p++) {
        int row = r + 8 * p, n = n0 + row / heads.group;
        if (n >= heads.N) continue;
        int64_t item = (int64_t)n * heads.H + kv * heads.group + row % heads.group;
        float inverse = 1.0f / total[p];
        if (!t && !column) lse[item] = top[p] + logf(total[p]);
#pragma unroll
        for (int j = 0; j < COUNT / 4; j++)
            *(unsigned *)(y + item * C + column + 8 * j + 2 * t) =
                pack_bf16(sums[4 * j + 2 * p] * inverse, sums[4 * j + 2 * p + 1] * inverse);
    }
}

#define ROWS_256 128
#define ROWS_512 64

static inline size_t hopper_forward_bytes(int C) {
    size_t tiles = C == 256 ? ROWS_256 + 4 * HOPPER_KEYS : ROWS_512 + 2 * HOPPER_KEYS;
    return tiles * (size_t)C * sizeof(bf16) +
           (C == 256 ? sizeof(RowSights<ROWS_256>)
                     : ROWS_512 * HOPPER_KEYS * sizeof(bf16) + sizeof(RowSights<ROWS_512>) +
                           2 * ROWS_512 * sizeof(float));
}

static __global__ void __launch_bounds__(FLASH_THREADS, 1)
    hopper_forward_256(bf16 *y, float *lse, const bf16 *q, const bf16 *k, const bf16 *v,
                       Heads heads, Sight see) {
#if ON_HOPPER
    constexpr int C = 256, KEYS = HOPPER_KEYS, TILE = KEYS * C;
    DYNAMIC_SHARED(memory);
    bf16 *rows = (bf16 *)memory, *keys = rows + ROWS_256 * C, *values = keys + 2 * TILE;
    RowSights<ROWS_256> *sights = (RowSights<ROWS_256> *)(values + 2 * TILE);
    int queries = ROWS_256 / heads.group, kv = blockIdx.y;
    int n0 = (int)(gridDim.x - 1 - blockIdx.x) * queries;           /* long sights first */
    int own = threadIdx.x / WARPGROUP * 64, r = own + result_row(); /* rows r and r + 8 */
    int row_end = (int)min((int64_t)ROWS_256, (heads.N - n0) * heads.group);
    read_sights(sights, heads, see, n0);
    row_places<ROWS_256>(sights->places, heads);
    __syncthreads();
    hopper_rows<C, ROWS_256>(rows, q, sights->places, heads, n0, kv);
    copies_close_group();

    float sums[C / 2] = {}, scores[KEYS / 2], top[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
    for (Stretch part = {0, 0, 0, 0}; part.end < row_end;) { /* a sequence after the other */
        part = stretch_of(sights, part.end, row_end);
        int n = n0 + part.row / heads.group, end = part.high + 1;
        int low[2], high[2];
        sights_within(low, high, sights, part, r);
        __syncthreads(); /* what the last sequence left has been read */
        hopper_keys<C, KEYS>(keys, k, heads, see, n, part.low, end, kv);
        copies_close_group();
        float best[2], fade[2];
        unsigned weights[KEYS / 16][4];
        auto score = [&](const bf16 *tile) {
#pragma unroll
            for (int i = 0; i < KEYS / 2; i++) scores[i] = 0.0f;
            wgmma_begin();
#pragma unroll
            for (int c = 0; c < C; c += 16)
                wgmma<false, false>(scores, operand(rows, own, c, ROWS_256),
                                    operand(tile, 0, c, KEYS));
            wgmma_close_group();
        };
        copies_wait<0>();
        shared_for_products();
        __syncthreads();
        hopper_keys<C, KEYS>(values, v, heads, see, n, part.low, end, kv);
        if (part.low + KEYS < end)
            hopper_keys<C, KEYS>(keys + TILE, k, heads, see, n, part.low + KEYS, end, kv);
        copies_close_group();
        score(keys);
        wgmma_wait<0>();
        wgmma_results(scores);
        mask_scores(best, scores, part.low, low, high);
        weigh(top, total, fade, scores, best);
        fade_results(sums, fade);
        /* These values, and the next keys, are there; what was multiplied last is free. */
        auto pack_and_wait = [&] {
#pragma unroll
            for (int i = 0; i < KEYS / 4; i++)
                weights[i / 4][i % 4] = pack_bf16(scores[2 * i], scores[2 * i + 1]);
            copies_wait<0>();
            shared_for_products();
            __syncthreads();
        };
        auto add_values = [&](const bf16 *tile) {
            wgmma_begin();
#pragma unroll
            for (int kk = 0; kk < KEYS; kk += 16)
                wgmma<true>(sums, weights[kk / 16], operand(tile, kk, 0, KEYS));
            wgmma_close_group();
        };
        int turn = 0;
        for (int s = part.low + KEYS; s < end; s += KEYS, turn ^= 1) {
            pack_and_wait();
            hopper_keys<C, KEYS>(values + (turn ^ 1) * TILE, v, heads, see, n, s, end, kv);
            if (s + KEYS < end)
                hopper_keys<C, KEYS>(keys + turn * TILE, k, heads, see, n, s + KEYS, end, kv);
            copies_close_group();
            score(keys + (turn ^ 1) * TILE);
            add_values(values + turn * TILE);
            wgmma_wait<1>();
            wgmma_results(scores);
            mask_scores(best, scores, s, low, high);
            weigh(top, total, fade, scores, best);
            wgmma_wait<0>();
            wgmma_results(sums);
            fade_results(sums, fade);
        }
        pack_and_wait();
        add_values(values + turn * TILE);
        wgmma_wait<0>();
        wgmma_results(sums);
    }
#pragma unroll
    for (int p = 0; p < 2; p++) {
        total[p] += __shfl_xor_sync(0xffffffffu, total[p], 1);
        total[p] += __shfl_xor_sync(0xffffffffu, total[p], 2);
    }
    write_results<C>(y, lse, sums, top, total, heads, n0, kv, r, 0);
#endif
}

static __global__ void __launch_bounds__(FLASH_THREADS, 1)
    hopper_forward_512(bf16 *y, float *lse, const bf16 *q, const bf16 *k, const bf16 *v,
                       Heads heads, Sight see) {
#if ON_HOPPER
    constexpr int C = 512, KEYS = HOPPER_KEYS, HALF = KEYS / 2;
    DYNAMIC_SHARED(memory);
    bf16 *rows = (bf16 *)memory, *keys = rows + ROWS_512 * C, *values = keys + KEYS * C,
         *weights = values + KEYS * C;
    float *tops = (float *)(weights + ROWS_512 * KEYS);
    RowSights<ROWS_512> *sights = (RowSights<ROWS_512> *)(tops + 2 * ROWS_512);
    int queries = ROWS_512 / heads.group, kv = blockIdx.y, group = threadIdx.x / WARPGROUP;
    int n0 = (int)(gridDim.x - 1 - blockIdx.x) * queries; /* long sights first */
    int lane = threadIdx.x % 32, r = result_row();
    int row_end = (int)min((int64_t)ROWS_512, (heads.N - n0) * heads.group);
    read_sights(sights, heads, see, n0);
    row_places<ROWS_512>(sights->places, heads);
    __syncthreads();
    hopper_rows<C, ROWS_512>(rows, q, sights->places, heads, n0, kv);
    copies_close_group();

    float sums[C / 4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
    for (Stretch part = {0, 0, 0, 0}; part.end < row_end;) { /* a sequence after the other */
        part = stretch_of(sights, part.end, row_end);
        int n = n0 + part.row / heads.group, end = part.high + 1;
        int low[2], high[2];
        sights_within(low, high, sights, part, r);
        __syncthreads(); /* what the last sequence left has been read */
        hopper_keys<C, KEYS>(keys, k, heads, see, n, part.low, end, kv);
        copies_close_group();
        hopper_keys<C, KEYS>(values, v, heads, see, n, part.low, end, kv);
        copies_close_group();
        for (int s = part.low; s < end; s += KEYS) {
            float scores[HALF / 2] = {}, best[2], fade[2];
            copies_wait<1>();
            shared_for_products();
            __syncthreads();
            wgmma_begin();
#pragma unroll
            for (int c = 0; c < C; c += 16)
                wgmma<false, false>(scores, operand(rows, 0, c, ROWS_512),
                                    operand(keys, HALF * group, c, KEYS));
            wgmma_close_group();
            wgmma_wait<0>();
            wgmma_results(scores);
            mask_scores(best, scores, s + HALF * group, low, high);
            if (lane % 4 == 0)
                for (int p = 0; p < 2; p++) tops[group * ROWS_512 + r + 8 * p] = best[p];
            __syncthreads(); /* the keys have been read as well */
            if (s + KEYS < end) hopper_keys<C, KEYS>(keys, k, heads, see, n, s + KEYS, end, kv);
            copies_close_group();
            for (int p = 0; p < 2; p++)
                best[p] = fmaxf(tops[r + 8 * p], tops[ROWS_512 + r + 8 * p]);
            weigh(top, total, fade, scores, best);
#pragma unroll
            for (int i = 0; i < HALF / 4; i++)
                *pair_at(weights, r + 8 * (i % 2), HALF / 8 * group + i / 2, lane % 4) =
                    pack_bf16(scores[2 * i], scores[2 * i + 1]);
            fade_results(sums, fade);
            copies_wait<1>();
            shared_for_products();
            __syncthreads();
            wgmma_begin();
#pragma unroll
            for (int kk = 0; kk < KEYS; kk += 16)
                wgmma<false, true>(sums, operand(weights, 0, kk, ROWS_512),
                                   operand(values, kk, C / 2 * group, KEYS));
            wgmma_close_group();
            wgmma_wait<0>();
            wgmma_results(sums);
            __syncthreads();
            if (s + KEYS < end) hopper_keys<C, KEYS>(values, v, heads, see, n, s + KEYS, end, kv);
            copies_close_group();
        }
    }
    /* The sums of both halves of the keys. */
#pragma unroll
    for (int p = 0; p < 2; p++) {
        total[p] += __shfl_xor_sync(0xffffffffu, total[p], 1);
        total[p] += __shfl_xor_sync(0xffffffffu, total[p], 2);
        if (lane % 4 == 0) tops[group * ROWS_512 + r + 8 * p] = total[p];
    }
    __syncthreads();
    for (int p = 0; p < 2; p++) total[p] = tops[r + 8 * p] + tops[ROWS_512 + r + 8 * p];
    write_results<C>(y, lse, sums, top, total, heads, n0, kv, r, C / 2 * group);
#endif
}

#endif
