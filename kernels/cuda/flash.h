/* flash.h - attention of bf16 heads of 256 and 512 on tensor cores (after Dao 2023).
 *
 * The rows of a tile are the heads that share keys, of a few queries: row r is query r / group,
 * head r % group. Keys go by in tiles of 32. Forward, 64 rows: the scores of a tile never leave the
 * block; while they are made the tile's values arrive, and while those are added up the next keys.
 * Backward, 32 rows: scores are made again from lse; one kernel has the gradients of a tile of keys
 * and sees all rows, the other those of rows and sees all keys, so nothing is added in an order of
 * chance. Eight warps share each product. */
#ifndef CUDA_FLASH_H
#define CUDA_FLASH_H

#include "kernels/cuda/attention.h"
#include "kernels/cuda/mma.h"

#define FLASH_THREADS 256
#define FLASH_KEYS    32
#define FORWARD_ROWS  64
#define BACKWARD_ROWS 32

/* Elements from row to row of a tile in shared memory: eight rows begin in different banks. */
template <int C> struct Flash {
    static constexpr int STRIDE = C + 8, SCORES = FLASH_KEYS + 8;
    static constexpr int KEY_TILE = FLASH_KEYS * STRIDE;
};

/* Shared memory of the kernels, in bytes. */
static inline size_t flash_forward_bytes(int C) {
    size_t rows = FORWARD_ROWS + 2 * FLASH_KEYS;
    return (rows * (size_t)(C + 8) + FORWARD_ROWS * (FLASH_KEYS + 8)) * sizeof(bf16);
}
static inline size_t flash_backward_bytes(int C) {
    size_t rows = 2 * BACKWARD_ROWS + 2 * FLASH_KEYS;
    return (rows * (size_t)(C + 8) + 2 * BACKWARD_ROWS * (FLASH_KEYS + 8)) * sizeof(bf16);
}

/* The smallest and the largest of a warp's numbers. */
DEVICE_FUNCTION int warp_least(int x) {
#pragma unroll
    for (int d = 16; d; d /= 2) x = min(x, __shfl_xor_sync(0xffffffffu, x, d));
    return x;
}
DEVICE_FUNCTION int warp_most(int x) {
    return -warp_least(-x);
}

/* ---- tiles ---- */

/* Rows of q (or dy) from query n0 on, for one head of keys; zeros beyond the last query. */
template <int C, int ROWS>
DEVICE_FUNCTION void load_rows(bf16 *tile, const bf16 *q, const Heads &heads, int64_t n0, int kv) {
    for (int c = threadIdx.x; c < ROWS * (C / 8); c += FLASH_THREADS) {
        int r = c / (C / 8), col = c % (C / 8) * 8;
        int64_t n = n0 + r / heads.group;
        bool here = n < heads.N;
        const bf16 *from =
            q + ((here ? n : 0) * heads.H + kv * heads.group + r % heads.group) * C + col;
        copy_16(tile + r * Flash<C>::STRIDE + col, from, here);
    }
}

/* Keys s0 .. s0 + 31 of k (or v), of the sequence of query n; zeros from `end` on. */
template <int C>
DEVICE_FUNCTION void load_keys(bf16 *tile, const bf16 *k, const Heads &heads, const Sight &see,
                               int64_t n, int64_t s0, int64_t end, int kv) {
    for (int c = threadIdx.x; c < FLASH_KEYS * (C / 8); c += FLASH_THREADS) {
        int64_t s = s0 + c / (C / 8);
        int col = c % (C / 8) * 8;
        bool here = s < end;
        const bf16 *from = k + (key_row(see, n, here ? s : s0) * heads.K + kv) * C + col;
        copy_16(tile + c / (C / 8) * Flash<C>::STRIDE + col, from, here);
    }
}

/* sums += a b for sixteen rows of a warp: b lies in shared memory with K as rows, its sixteen rows
 * from `b` on, eight columns to each tile of sums. */
template <int C, int TILES>
DEVICE_FUNCTION void add_product(float (&sums)[TILES][4], const unsigned (&a)[4], const bf16 *b) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < TILES; j += 2) {
        unsigned x[4];
        load_turned_tiles(x, b + lane % 16 * Flash<C>::STRIDE + 8 * j + lane / 16 * 8);
        unsigned left[2] = {x[0], x[1]}, right[2] = {x[2], x[3]};
        mma_bf16(sums[j], a, left);
        mma_bf16(sums[j + 1], a, right);
    }
}

/* ---- forward ---- */

template <int C>
static __global__ void __launch_bounds__(FLASH_THREADS)
    flash_forward(bf16 *y, float *lse, const bf16 *q, const bf16 *k, const bf16 *v, Heads heads,
                  Sight see) {
    constexpr int STRIDE = Flash<C>::STRIDE, SCORES = Flash<C>::SCORES, TILES = C / 16;
    DYNAMIC_SHARED(memory);
    __shared__ float tops[2][FORWARD_ROWS], totals[2][FORWARD_ROWS];
    __shared__ int sights[2][FORWARD_ROWS], whose[FORWARD_ROWS];
    bf16 *rows = (bf16 *)memory, *keys = rows + FORWARD_ROWS * STRIDE,
         *values = keys + Flash<C>::KEY_TILE, *weights = values + Flash<C>::KEY_TILE;

    int queries = FORWARD_ROWS / heads.group, kv = blockIdx.y;
    int64_t n0 = (int64_t)(gridDim.x - 1 - blockIdx.x) * queries; /* long sights first */
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int m0 = warp / 2 * 16, half = warp % 2;
    if ((int)threadIdx.x < queries) {
        int64_t n = n0 + threadIdx.x;
        bool here = n < heads.N;
        sights[0][threadIdx.x] = here ? see.first[n] : 1;
        sights[1][threadIdx.x] = here ? see.last[n] : 0;
        whose[threadIdx.x] = here && see.pages ? see.sequence[n] : 0;
    }
    load_rows<C, FORWARD_ROWS>(rows, q, heads, n0, kv);
    copies_close_group();

    float sums[TILES][4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
    int64_t n_end = n0 + queries < heads.N ? n0 + queries : heads.N;
    for (int64_t from = n0, to; from < n_end; from = to) { /* a sequence after the other */
        __syncthreads();
        int owner = whose[from - n0], low = sights[0][from - n0], high = sights[1][from - n0];
        for (to = from; to < n_end && whose[to - n0] == owner; to++) {
            low = min(low, sights[0][to - n0]);
            high = max(high, sights[1][to - n0]);
        }
        int64_t s0 = low / FLASH_KEYS * FLASH_KEYS, end = high + 1;
        load_keys<C>(keys, k, heads, see, from, s0, end, kv);
        copies_close_group();
        load_keys<C>(values, v, heads, see, from, s0, end, kv);
        copies_close_group();
        for (; s0 < end; s0 += FLASH_KEYS) {
            copies_wait<1>();
            __syncthreads();
            float scores[2][4] = {};
#pragma unroll 4
            for (int c = 0; c < C; c += 16) {
                unsigned a[4], b[4];
                load_tiles(a, rows + (m0 + lane % 16) * STRIDE + c + lane / 16 * 8);
                load_tiles(b, keys + (half * 16 + lane % 8 + lane / 16 * 8) * STRIDE + c +
                                  lane / 8 % 2 * 8);
                unsigned b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
                mma_bf16(scores[0], a, b0);
                mma_bf16(scores[1], a, b1);
            }
            /* rows g and g + 8 of this warp's sixteen; what a row does not see is -inf */
            float best[2] = {-INFINITY, -INFINITY};
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int p = 0; p < 4; p++) {
                    int query = (m0 + g + p / 2 * 8) / heads.group;
                    int64_t s = s0 + half * 16 + 8 * i + 2 * t + p % 2;
                    bool seen = n0 + query >= from && n0 + query < to && s >= sights[0][query] &&
                                s <= sights[1][query];
                    if (!seen) scores[i][p] = -INFINITY;
                    best[p / 2] = fmaxf(best[p / 2], scores[i][p]);
                }
#pragma unroll
            for (int p = 0; p < 2; p++) {
                best[p] = fmaxf(best[p], __shfl_xor_sync(0xffffffffu, best[p], 1));
                best[p] = fmaxf(best[p], __shfl_xor_sync(0xffffffffu, best[p], 2));
                if (!t) tops[half][m0 + g + 8 * p] = best[p];
            }
            __syncthreads(); /* the keys have been read as well */
            if (s0 + FLASH_KEYS < end)
                load_keys<C>(keys, k, heads, see, from, s0 + FLASH_KEYS, end, kv);
            copies_close_group();
            float fade[2];
#pragma unroll
            for (int p = 0; p < 2; p++) {
                int row = m0 + g + 8 * p;
                float now = fmaxf(top[p], fmaxf(tops[0][row], tops[1][row]));
                fade[p] = now == -INFINITY ? 1.0f : quick_exp(top[p] - now);
                total[p] *= fade[p];
                top[p] = now;
            }
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int p = 0; p < 2; p++) {
                    float x = scores[i][2 * p], z = scores[i][2 * p + 1];
                    x = x == -INFINITY ? 0.0f : quick_exp(x - top[p]);
                    z = z == -INFINITY ? 0.0f : quick_exp(z - top[p]);
                    total[p] += x + z;
                    *(unsigned *)(weights + (m0 + g + 8 * p) * SCORES + half * 16 + 8 * i + 2 * t) =
                        pack_bf16(x, z);
                }
#pragma unroll
            for (int j = 0; j < TILES; j++)
#pragma unroll
                for (int p = 0; p < 4; p++) sums[j][p] *= fade[p / 2];
            copies_wait<1>();
            __syncthreads();
#pragma unroll
            for (int kk = 0; kk < FLASH_KEYS; kk += 16) {
                unsigned a[4];
                load_tiles(a, weights + (m0 + lane % 16) * SCORES + kk + lane / 16 * 8);
                add_product<C>(sums, a, values + kk * STRIDE + half * (C / 2));
            }
            __syncthreads();
            if (s0 + FLASH_KEYS < end)
                load_keys<C>(values, v, heads, see, from, s0 + FLASH_KEYS, end, kv);
            copies_close_group();
        }
    }
#pragma unroll
    for (int p = 0; p < 2; p++) {
        total[p] += __shfl_xor_sync(0xffffffffu, total[p], 1);
        total[p] += __shfl_xor_sync(0xffffffffu, total[p], 2);
        if (!t) totals[half][m0 + g + 8 * p] = total[p];
    }
    __syncthreads();
#pragma unroll
    for (int p = 0; p < 2; p++) {
        int row = m0 + g + 8 * p;
        int64_t n = n0 + row / heads.group;
        if (n >= heads.N) continue;
        int64_t item = n * heads.H + kv * heads.group + row % heads.group;
        float sum = totals[0][row] + totals[1][row], inverse = 1.0f / sum;
        if (!t && !half) lse[item] = top[p] + logf(sum);
#pragma unroll
        for (int j = 0; j < TILES; j++)
            *(unsigned *)(y + item * C + half * (C / 2) + 8 * j + 2 * t) =
                pack_bf16(sums[j][2 * p] * inverse, sums[j][2 * p + 1] * inverse);
    }
}

/* ---- backward ---- */

/* What the rows of a tile bring: the keys they see, `count` from `first` on, lse and delta. */
template <int ROWS> struct RowFacts {
    int first[ROWS], count[ROWS];
    float lse[ROWS], delta[ROWS];
};

template <int ROWS>
DEVICE_FUNCTION void read_facts(RowFacts<ROWS> *facts, const Heads &heads, const Sight &see,
                                const float *lse, const float *delta, int64_t n0, int kv,
                                int first = 0) {
    int r = (int)threadIdx.x - first;
    if (r >= ROWS) return;
    int64_t n = n0 + r / heads.group, item = n * heads.H + kv * heads.group + r % heads.group;
    bool here = n < heads.N;
    facts->first[r] = here ? see.first[n] : 0;
    facts->count[r] = here ? see.last[n] - see.first[n] + 1 : 0;
    facts->lse[r] = here ? lse[item] : 0;
    facts->delta[r] = here ? delta[item] : 0;
}

/* The weight of a score that is `ahead` keys behind the first that is seen, of `count`. */
DEVICE_FUNCTION float weight_of(float score, float lse, int ahead, int count) {
    return ahead >= 0 && ahead < count ? quick_exp(score - lse) : 0.0f;
}

/* Sixteen rows from m0 on by eight keys from k0 on of a b^T, over C. */
template <int C>
DEVICE_FUNCTION void score_tile(float (&out)[4], const bf16 *a_tile, const bf16 *b_tile, int m0,
                                int k0) {
    constexpr int STRIDE = Flash<C>::STRIDE;
    int lane = threadIdx.x % 32;
#pragma unroll 4
    for (int c = 0; c < C; c += 32) {
        unsigned a[4], b[4];
        load_tiles(b, b_tile + (k0 + lane % 8) * STRIDE + c + lane / 8 * 8);
        unsigned b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
        load_tiles(a, a_tile + (m0 + lane % 16) * STRIDE + c + lane / 16 * 8);
        mma_bf16(out, a, b0);
        load_tiles(a, a_tile + (m0 + lane % 16) * STRIDE + c + 16 + lane / 16 * 8);
        mma_bf16(out, a, b1);
    }
}

/* The weights of a tile of rows and keys and the slopes of their scores, in shared memory. */
template <int C>
DEVICE_FUNCTION void make_slopes(bf16 *weights, bf16 *slopes, const bf16 *rows, const bf16 *douts,
                                 const bf16 *keys, const bf16 *values,
                                 const RowFacts<BACKWARD_ROWS> *facts, int64_t s0) {
    constexpr int SCORES = Flash<C>::SCORES;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int m0 = warp / 4 * 16, k0 = warp % 4 * 8;
    float scores[4] = {}, douts_values[4] = {};
    score_tile<C>(scores, rows, keys, m0, k0);
    score_tile<C>(douts_values, douts, values, m0, k0);
#pragma unroll
    for (int p = 0; p < 2; p++) {
        int r = m0 + g + 8 * p;
        float w[2], d[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int ahead = (int)s0 + k0 + 2 * t + i - facts->first[r];
            w[i] = weight_of(scores[2 * p + i], facts->lse[r], ahead, facts->count[r]);
            d[i] = w[i] * (douts_values[2 * p + i] - facts->delta[r]);
        }
        *(unsigned *)(weights + r * SCORES + k0 + 2 * t) = pack_bf16(w[0], w[1]);
        *(unsigned *)(slopes + r * SCORES + k0 + 2 * t) = pack_bf16(d[0], d[1]);
    }
}

/* The first and last query that see any of a tile's `keys` keys; first > last: none. */
static __global__ void __launch_bounds__(FLASH_THREADS)
    find_queries(int *ranges, Heads heads, Sight see, int keys) {
    __shared__ int lows[FLASH_THREADS], highs[FLASH_THREADS];
    int64_t s0 = (int64_t)blockIdx.x * keys;
    int low = 0x7fffffff, high = -1;
    for (int64_t n = threadIdx.x; n < heads.N; n += FLASH_THREADS) {
        if (see.first[n] >= s0 + keys || see.last[n] < s0) continue;
        low = min(low, (int)n);
        high = max(high, (int)n);
    }
    lows[threadIdx.x] = low;
    highs[threadIdx.x] = high;
    for (int half = FLASH_THREADS / 2; half; half /= 2) {
        __syncthreads();
        if ((int)threadIdx.x >= half) continue;
        lows[threadIdx.x] = min(lows[threadIdx.x], lows[threadIdx.x + half]);
        highs[threadIdx.x] = max(highs[threadIdx.x], highs[threadIdx.x + half]);
    }
    if (threadIdx.x) return;
    ranges[2 * blockIdx.x] = lows[0];
    ranges[2 * blockIdx.x + 1] = highs[0];
}

template <int C>
static __global__ void __launch_bounds__(FLASH_THREADS)
    flash_keys_backward(float *dk, float *dv, const bf16 *dy, const float *delta, const float *lse,
                        const bf16 *q, const bf16 *k, const bf16 *v, const int *ranges, Heads heads,
                        Sight see) {
    constexpr int STRIDE = Flash<C>::STRIDE, SCORES = Flash<C>::SCORES, TILES = C / 32;
    DYNAMIC_SHARED(memory);
    __shared__ RowFacts<BACKWARD_ROWS> facts;
    bf16 *rows = (bf16 *)memory, *douts = rows + BACKWARD_ROWS * STRIDE,
         *keys = douts + BACKWARD_ROWS * STRIDE, *values = keys + Flash<C>::KEY_TILE,
         *weights = values + Flash<C>::KEY_TILE, *slopes = weights + BACKWARD_ROWS * SCORES;
    int kv = blockIdx.y, queries = BACKWARD_ROWS / heads.group;
    int64_t s0 = (int64_t)blockIdx.x * FLASH_KEYS;
    int first = ranges[2 * blockIdx.x], last = ranges[2 * blockIdx.x + 1];
    if (first > last) return;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int m0 = warp / 4 * 16, c0 = warp % 4 * (C / 4); /* keys and columns of this warp */
    load_keys<C>(keys, k, heads, see, 0, s0, heads.S, kv);
    load_keys<C>(values, v, heads, see, 0, s0, heads.S, kv);
    float sums_k[TILES][4] = {}, sums_v[TILES][4] = {};
    for (int64_t n0 = first / queries * queries; n0 <= last; n0 += queries) {
        load_rows<C, BACKWARD_ROWS>(rows, q, heads, n0, kv);
        load_rows<C, BACKWARD_ROWS>(douts, dy, heads, n0, kv);
        read_facts(&facts, heads, see, lse, delta, n0, kv);
        copies_close_group();
        copies_wait<0>();
        __syncthreads();
        make_slopes<C>(weights, slopes, rows, douts, keys, values, &facts, s0);
        __syncthreads();
#pragma unroll
        for (int rr = 0; rr < BACKWARD_ROWS; rr += 16) {
            unsigned w[4], d[4];
            int at = (rr + lane % 8 + lane / 16 * 8) * SCORES + m0 + lane / 8 % 2 * 8;
            load_turned_tiles(w, weights + at);
            load_turned_tiles(d, slopes + at);
            add_product<C>(sums_v, w, douts + rr * STRIDE + c0);
            add_product<C>(sums_k, d, rows + rr * STRIDE + c0);
        }
        __syncthreads();
    }
#pragma unroll
    for (int p = 0; p < 4; p++) {
        int64_t s = s0 + m0 + g + p / 2 * 8;
        if (s >= heads.S) continue;
        int64_t at = (s * heads.K + kv) * C + c0 + 2 * t + p % 2;
#pragma unroll
        for (int j = 0; j < TILES; j++) {
            dk[at + 8 * j] += sums_k[j][p];
            dv[at + 8 * j] += sums_v[j][p];
        }
    }
}

template <int C>
static __global__ void __launch_bounds__(FLASH_THREADS)
    flash_rows_backward(bf16 *dq, const bf16 *dy, const float *delta, const float *lse,
                        const bf16 *q, const bf16 *k, const bf16 *v, Heads heads, Sight see) {
    constexpr int STRIDE = Flash<C>::STRIDE, SCORES = Flash<C>::SCORES, TILES = C / 32;
    DYNAMIC_SHARED(memory);
    __shared__ RowFacts<BACKWARD_ROWS> facts;
    bf16 *rows = (bf16 *)memory, *douts = rows + BACKWARD_ROWS * STRIDE,
         *keys = douts + BACKWARD_ROWS * STRIDE, *values = keys + Flash<C>::KEY_TILE,
         *weights = values + Flash<C>::KEY_TILE, *slopes = weights + BACKWARD_ROWS * SCORES;
    int kv = blockIdx.y, queries = BACKWARD_ROWS / heads.group;
    int64_t n0 = (int64_t)(gridDim.x - 1 - blockIdx.x) * queries;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int m0 = warp / 4 * 16, c0 = warp % 4 * (C / 4);
    load_rows<C, BACKWARD_ROWS>(rows, q, heads, n0, kv);
    load_rows<C, BACKWARD_ROWS>(douts, dy, heads, n0, kv);
    read_facts(&facts, heads, see, lse, delta, n0, kv);
    __syncthreads();
    int low = 0x7fffffff, high = -1;
    for (int r = 0; r < BACKWARD_ROWS; r++) {
        if (facts.count[r] <= 0) continue;
        low = min(low, facts.first[r]);
        high = max(high, facts.first[r] + facts.count[r] - 1);
    }
    float sums[TILES][4] = {};
    for (int64_t s0 = low / FLASH_KEYS * FLASH_KEYS; s0 <= high; s0 += FLASH_KEYS) {
        load_keys<C>(keys, k, heads, see, 0, s0, heads.S, kv);
        load_keys<C>(values, v, heads, see, 0, s0, heads.S, kv);
        copies_close_group();
        copies_wait<0>();
        __syncthreads();
        make_slopes<C>(weights, slopes, rows, douts, keys, values, &facts, s0);
        __syncthreads();
#pragma unroll
        for (int kk = 0; kk < FLASH_KEYS; kk += 16) {
            unsigned a[4];
            load_tiles(a, slopes + (m0 + lane % 16) * SCORES + kk + lane / 16 * 8);
            add_product<C>(sums, a, keys + kk * STRIDE + c0);
        }
        __syncthreads();
    }
#pragma unroll
    for (int p = 0; p < 2; p++) {
        int r = m0 + g + 8 * p;
        int64_t n = n0 + r / heads.group;
        if (n >= heads.N) continue;
        bf16 *to = dq + (n * heads.H + kv * heads.group + r % heads.group) * C + c0 + 2 * t;
#pragma unroll
        for (int j = 0; j < TILES; j++)
            *(unsigned *)(to + 8 * j) = pack_bf16(sums[j][2 * p], sums[j][2 * p + 1]);
    }
}

#endif
