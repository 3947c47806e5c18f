/* flash_hopper.h - attention of bf16 heads of 256 and 512 on Hopper's tensor cores, forward
 * (after Dao 2023 and Shah et al. 2024): flash.h's twin, wgmma.h in place of mma.h.
 *
 * As there the rows of a tile are the heads that share keys, of a few queries; here 128. One
 * warpgroup brings tiles (bulk.h), two multiply, and the next scores are made before the last
 * weights meet their values, so that the tensor cores have work while weights are made. Heads of
 * 256: each of the two has 64 rows. Heads of 512: a pair of blocks has a tile, each block 64 rows,
 * and what one brings of keys and values goes to both; the two warpgroups of a block share its
 * rows, each makes the scores of half of the keys and the results of half of the columns. The way
 * back is gradients_hopper.h. */
#ifndef CUDA_FLASH_HOPPER_H
#define CUDA_FLASH_HOPPER_H

#include "kernels/cuda/bulk.h"
#include "kernels/cuda/flash.h"

#define SEEN_ROWS 128 /* of a tile: of a block, or of a pair of them */

/* What tiles are cut from: rows of q, and of y, 64 of them, a query's after the other's; k, and v.
 */
struct SeenMaps {
    TileMap rows, results, keys, values;
};

/* What the rows of a tile see, and of which sequence; of rows beyond the last query nothing. */
template <int ROWS> struct RowSights { int first[ROWS], last[ROWS], whose[ROWS]; };

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
#pragma unroll 1
    for (int i = lane; i < rows; i += 32)
        if (i > row && sights->whose[i] != sights->whose[row]) end = min(end, i);
    end = warp_least(end);
#pragma unroll 1
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

/* Earlier results under a new largest score, where there is one. */
template <int COUNT>
DEVICE_FUNCTION void fade_results(float (&sums)[COUNT], const float (&fade)[2]) {
    if (fade[0] == 1 && fade[1] == 1) return;
#pragma unroll
    for (int i = 0; i < COUNT; i++) sums[i] *= fade[i / 2 % 2];
}

/* Results of a warpgroup's 64 rows over their sums, columns `column` and on of the head, by way of
 * the tile of ROWS that q lay in, which nobody reads any more. n0: the query of the first of the
 * 64; r: this lane's row in the tile. */
template <int ROWS, int COUNT>
DEVICE_FUNCTION void write_results(const TileMap &y, float *lse, bf16 *tile,
                                   const float (&sums)[COUNT], const float (&top)[2],
                                   const float (&total)[2], const Heads &heads, int n0, int kv,
                                   int r, int column) {
    int t = threadIdx.x % 4, first = r / 64 * 64;
#pragma unroll
    for (int p = 0; p < 2; p++) {
        int row = r - first + 8 * p, n = n0 + row / heads.group;
        float inverse = 1.0f / total[p];
        if (!t && !column && n < heads.N)
            lse[(int64_t)n * heads.H + kv * heads.group + row % heads.group] =
                top[p] + logf(total[p]);
#pragma unroll
        for (int j = 0; j < COUNT / 4; j++)
            *(unsigned *)(tile + column * ROWS + tile_at(r + 8 * p, 8 * j, ROWS) + 2 * t) =
                pack_bf16(sums[4 * j + 2 * p] * inverse, sums[4 * j + 2 * p + 1] * inverse);
    }
    shared_for_products();
    warpgroup_sync(brought_half());
    if (threadIdx.x % WARPGROUP) return;
    for (int c = column; c < column + 2 * COUNT; c += TILE_COLUMNS)
        store_tile(y, tile + c * ROWS + first * TILE_COLUMNS, n0, kv * heads.group, c);
    stores_have_read();
}

/* The keys that a stretch goes through begin with a page's, where they lie in pages. */
DEVICE_FUNCTION int first_key(const Stretch &part, const Sight &see) {
    return see.pages ? part.low - part.low % PAGE_KEYS : part.low;
}

/* Where key s and those after it lie. Behind the last that is seen come others, of the stretch's
 * beginning: a tile has so many. */
DEVICE_FUNCTION int64_t key_place(const Stretch &part, const Sight &see, int64_t n, int s) {
    return key_row(see, n, s <= part.high ? s : first_key(part, see));
}

/* Pages may hold anything behind the last key that is seen, which no weight of zero takes away:
 * values `left` and on of a tile of ROWS by C become zeros. By all that multiply. */
template <int ROWS, int C> DEVICE_FUNCTION void clear_values(bf16 *tile, int left) {
    int first = max(left, 0), i = known_here((int)threadIdx.x - WARPGROUP);
#pragma unroll 1
    for (; i < (ROWS - first) * (C / 8); i += 2 * WARPGROUP)
        *(uint4 *)(tile + tile_at(first + i / (C / 8), i % (C / 8) * 8, ROWS)) = uint4{0, 0, 0, 0};
    shared_for_products();
    multipliers_sync();
}

/* ---- heads of 256 ---- */

#define SEEN_KEYS 64 /* of a tile */

struct Seen256 {
    bf16 rows[SEEN_ROWS * 256], keys[2][SEEN_KEYS * 256], values[2][SEEN_KEYS * 256];
    RowSights<SEEN_ROWS> sights;
    Barrier rows_full, keys_full[2], keys_empty[2], values_full[2], values_empty[2];
};

/* Grid: (tiles of rows, K). */
static __global__ void __launch_bounds__(BROUGHT_THREADS, 1)
    hopper_forward_256(float *lse, const __grid_constant__ SeenMaps maps, Heads heads, Sight see) {
#if ON_HOPPER
    constexpr int C = 256, KEYS = SEEN_KEYS;
    DYNAMIC_SHARED(bytes);
    Seen256 *memory = (Seen256 *)bytes;
    int queries = SEEN_ROWS / heads.group, kv = blockIdx.y;
    int n0 = (int)(gridDim.x - 1 - blockIdx.x) * queries; /* long sights first */
    int row_end = (int)min((int64_t)SEEN_ROWS, (heads.N - n0) * heads.group);
    if (!threadIdx.x) {
        barrier_begin(&memory->rows_full, 1);
        shared_for_products(); /* the copy engine counts there before all have met */
        barrier_announce(&memory->rows_full, (int)sizeof memory->rows);
        for (int c = 0; c < C; c += TILE_COLUMNS)
            copy_tile<false>(memory->rows + c * SEEN_ROWS, &memory->rows_full, maps.rows, n0,
                             kv * heads.group, c);
        for (int i = 0; i < 2; i++) {
            barrier_begin(&memory->keys_full[i], 1);
            barrier_begin(&memory->values_full[i], 1);
            barrier_begin(&memory->keys_empty[i], 2);
            barrier_begin(&memory->values_empty[i], 2);
        }
    }
    read_sights(&memory->sights, heads, see, n0);
    __syncthreads();
    int turn = 0; /* tiles of keys so far */
    Stretch part = {0, 0, 0, 0};
    if (threadIdx.x < WARPGROUP) {
        registers_fewer<40>();
        if (threadIdx.x >= 32) return;
        bool leads = !threadIdx.x;
        auto bring = [&](bf16 *to, Barrier *full, Barrier *empty, const TileMap &map, int64_t row) {
            barrier_wait(empty, (turn / 2 & 1) ^ 1);
            barrier_announce(full, (int)sizeof memory->keys[0]);
            for (int c = 0; c < C; c += TILE_COLUMNS)
                copy_tile<false>(to + c * KEYS, full, map, 0, row, kv * C + c);
        };
        while (part.end < row_end) {
            part = stretch_of(&memory->sights, part.end, row_end);
            int n = n0 + part.row / heads.group;
            for (int s = first_key(part, see); leads && s <= part.high; s += KEYS, turn++) {
                int64_t row = key_place(part, see, n, s);
                int i = turn % 2;
                bring(memory->keys[i], &memory->keys_full[i], &memory->keys_empty[i], maps.keys,
                      row);
                bring(memory->values[i], &memory->values_full[i], &memory->values_empty[i],
                      maps.values, row);
            }
            __syncwarp();
        }
        return;
    }
    registers_more<232>();
    int own = same_in_warp(brought_half()) * 64, r = brought_row(); /* rows r and r + 8 */
    bool leads = threadIdx.x % WARPGROUP == 0;
    float sums[C / 2] = {}, scores[KEYS / 2], top[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0},
                   best[2], fade[2];
    unsigned weights[KEYS / 16][4];
    int low[2], high[2];
    /* The scores of tile t, asked for. */
    auto score = [&](int t) {
#pragma unroll
        for (int i = 0; i < KEYS / 2; i++) scores[i] = 0.0f;
        barrier_wait(&memory->keys_full[t % 2], t / 2 & 1);
        Operand left = operand(memory->rows, same_in_warp(own), 0, SEEN_ROWS),
                right = operand(memory->keys[same_in_warp(t % 2)], 0, 0, KEYS);
        wgmma_begin();
#pragma unroll
        for (int c = 0; c < C; c += 16)
            wgmma<false, false>(scores, further(left, 0, c, SEEN_ROWS), further(right, 0, c, KEYS));
        wgmma_close_group();
    };
    auto weigh_scores = [&](int t, int s) {
        wgmma_results(scores);
        if (leads) barrier_arrive(&memory->keys_empty[t % 2], 0);
        mask_scores(best, scores, s, low, high);
        weigh(top, total, fade, scores, best);
    };
    /* The weights there are meet the values of tile t, of keys from s on. */
    auto add_values = [&](int t, int s) {
        bf16 *tile = memory->values[same_in_warp(t % 2)];
        barrier_wait(&memory->values_full[t % 2], t / 2 & 1);
        if (see.pages && s + KEYS > part.high + 1) clear_values<KEYS, C>(tile, part.high + 1 - s);
        Operand right = operand(tile, 0, 0, KEYS);
        wgmma_begin();
#pragma unroll
        for (int kk = 0; kk < KEYS; kk += 16)
            wgmma<true>(sums, weights[kk / 16], further(right, kk, 0, KEYS));
        wgmma_close_group();
    };
    auto values_added = [&](int t) {
        wgmma_wait<0>();
        wgmma_results(sums);
        if (leads) barrier_arrive(&memory->values_empty[t % 2], 0);
    };
    auto pack_weights = [&] {
#pragma unroll
        for (int i = 0; i < KEYS / 4; i++)
            weights[i / 4][i % 4] = pack_bf16(scores[2 * i], scores[2 * i + 1]);
    };
    barrier_wait(&memory->rows_full, 0);
    while (part.end < row_end) { /* a sequence after the other */
        part = stretch_of(&memory->sights, part.end, row_end);
        sights_within(low, high, &memory->sights, part, r);
        int s = first_key(part, see);
        if (s > part.high) continue;
        score(turn);
        wgmma_wait<0>();
        weigh_scores(turn, s);
        fade_results(sums, fade);
        pack_weights();
        for (s += KEYS, turn++; s <= part.high; s += KEYS, turn++) {
            score(turn);
            add_values(turn - 1, s - KEYS);
            wgmma_wait<1>();
            weigh_scores(turn, s);
            values_added(turn - 1);
            fade_results(sums, fade);
            pack_weights();
        }
        add_values(turn - 1, s - KEYS);
        values_added(turn - 1);
    }
#pragma unroll
    for (int p = 0; p < 2; p++) {
        total[p] += __shfl_xor_sync(0xffffffffu, total[p], 1);
        total[p] += __shfl_xor_sync(0xffffffffu, total[p], 2);
    }
    write_results<SEEN_ROWS>(maps.results, lse, memory->rows, sums, top, total, heads,
                             n0 + own / heads.group, kv, r, 0);
#endif
}

/* ---- heads of 512 ---- */

#define PAIR_KEYS 128 /* of a tile */
/* A unit of 16 KB is a tile's keys by 64 columns, or so many of its values; there is room for a
 * tile's keys, or its values. */
#define UNIT_VALUES 16
#define PAIR_UNITS  (PAIR_KEYS / UNIT_VALUES)

struct Seen512 {
    bf16 rows[SEEN_ROWS / PAIR * 512], units[PAIR_UNITS][PAIR_KEYS * TILE_COLUMNS];
    bf16 weights[2][SEEN_ROWS / PAIR * PAIR_KEYS];
    RowSights<SEEN_ROWS> sights;
    float tops[2][SEEN_ROWS / PAIR]; /* what the warpgroups tell each other of each row */
    Barrier rows_full, full[PAIR_UNITS], empty[PAIR_UNITS];
};

/* Units come in the order keys 0, keys 1, values 0, keys 2, values 1, ...: UNITS of each. Grid:
 * (twice the tiles of rows, K), in pairs. */
static __global__ void __launch_bounds__(BROUGHT_THREADS, 1)
    hopper_forward_512(float *lse, const __grid_constant__ SeenMaps maps, Heads heads, Sight see) {
#if ON_HOPPER
    constexpr int C = 512, KEYS = PAIR_KEYS, ROWS = SEEN_ROWS / PAIR, DEEP = UNIT_VALUES,
                  UNITS = C / TILE_COLUMNS, LATE = 4; /* units of values that may be under way */
    static_assert(UNITS == PAIR_UNITS, "as many units of keys as of values");
    DYNAMIC_SHARED(bytes);
    Seen512 *memory = (Seen512 *)bytes;
    int queries = SEEN_ROWS / heads.group, kv = blockIdx.y, rank = (int)pair_rank();
    int n0 = (int)(gridDim.x / PAIR - 1 - blockIdx.x / PAIR) * queries; /* long sights first */
    int row_end = (int)min((int64_t)SEEN_ROWS, (heads.N - n0) * heads.group);
    wait_for_last();
    if (!threadIdx.x) {
        barrier_begin(&memory->rows_full, 1);
        shared_for_products(); /* the copy engine counts there before all have met */
        barrier_announce(&memory->rows_full, (int)sizeof memory->rows);
        for (int c = 0; c < C; c += TILE_COLUMNS)
            copy_tile<false>(memory->rows + c * ROWS, &memory->rows_full, maps.rows,
                             n0 + rank * (queries / PAIR), kv * heads.group, c);
        for (int i = 0; i < UNITS; i++) {
            barrier_begin(&memory->full[i], 1);
            barrier_begin(&memory->empty[i], 2 * PAIR);
        }
    }
    read_sights(&memory->sights, heads, see, n0);
    pair_sync();
    unsigned phase = 0; /* unit u is always at the same place: phases change from tile to tile */
    Stretch part = {0, 0, 0, 0};
    if (threadIdx.x < WARPGROUP) {
        registers_fewer<40>();
        while (threadIdx.x < 32 && part.end < row_end) {
            part = stretch_of(&memory->sights, part.end, row_end);
            int n = n0 + part.row / heads.group, begin = first_key(part, see);
            int tiles = (part.high - begin + KEYS) / KEYS;
            /* bring(unit, its place, barrier): this block's half of it. */
            auto bring_units = [&](auto bring) {
#pragma unroll 1
                for (int u = 0; u < UNITS; u++) {
                    barrier_wait(&memory->empty[u], phase ^ 1);
                    barrier_announce(&memory->full[u], (int)sizeof memory->units[0]);
                    bring(u, memory->units[u], &memory->full[u]);
                }
                phase ^= 1;
            };
            for (int t = 0; t <= tiles && tiles > 0 && !threadIdx.x; t++) {
                int s = begin + t * KEYS;
                if (t < tiles) {
                    int64_t row = key_place(part, see, n, s + rank * (KEYS / PAIR));
                    bring_units([&](int u, bf16 *to, Barrier *full) {
                        copy_tile<true>(to + rank * (KEYS / PAIR) * TILE_COLUMNS, full, maps.keys,
                                        0, row, kv * C + u * TILE_COLUMNS);
                    });
                }
                if (t > 0)
                    bring_units([&](int u, bf16 *to, Barrier *full) {
                        int64_t row = key_place(part, see, n, s - KEYS + u * DEEP);
                        for (int c = rank * (C / PAIR); c < (rank + 1) * (C / PAIR);
                             c += TILE_COLUMNS)
                            copy_tile<true>(to + c * DEEP, full, maps.values, 0, row, kv * C + c);
                    });
            }
            __syncwarp();
        }
    } else {
        registers_more<232>();
        int half = same_in_warp(brought_half()), r = result_row(), mine = threadIdx.x % WARPGROUP;
        float sums[C / 4] = {}, scores[KEYS / 4], top[2] = {-INFINITY, -INFINITY},
                       total[2] = {0, 0}, best[2], fade[2];
        int low[2], high[2];
        auto release = [&](int u) {
            if (mine < PAIR) barrier_arrive(&memory->empty[u], mine);
        };
        /* Scores of the next tile; the last unit's may still be under way. */
        auto score = [&] {
#pragma unroll
            for (int i = 0; i < KEYS / 4; i++) scores[i] = 0.0f;
            int here = same_in_warp(0); /* operands are made again for each tile, not kept */
            Operand left = operand(memory->rows, here, 0, ROWS),
                    right = operand(memory->units[0], here + half * (KEYS / 2), 0, KEYS);
#pragma unroll
            for (int u = 0; u < UNITS; u++) {
                barrier_wait(&memory->full[u], phase);
                wgmma_begin();
#pragma unroll
                for (int kk = u * TILE_COLUMNS; kk < (u + 1) * TILE_COLUMNS; kk += 16)
                    wgmma<false, false>(scores, further(left, 0, kk, ROWS),
                                        further(right, 0, kk, KEYS));
                wgmma_close_group();
                wgmma_wait<1>();
                if (u) release(u - 1);
            }
            phase ^= 1;
        };
        /* Scores of keys from s on become weights in shared memory. */
        auto weigh_scores = [&](bf16 *weights, int s) {
            int t = threadIdx.x % 4, row = known_here(r);
            bf16 *own = weights + half * (KEYS / 2) * ROWS;
            wgmma_results(scores);
            mask_scores(best, scores, s + half * (KEYS / 2), low, high);
            if (!t)
                for (int p = 0; p < 2; p++) memory->tops[half][r + 8 * p] = best[p];
            multipliers_sync();
            for (int p = 0; p < 2; p++) best[p] = fmaxf(best[p], memory->tops[!half][r + 8 * p]);
            weigh(top, total, fade, scores, best);
#pragma unroll
            for (int i = 0; i < KEYS / 8; i++)
                *(unsigned *)(own + tile_at(row + 8 * (i % 2), i / 2 * 8, ROWS) + 2 * t) =
                    pack_bf16(scores[2 * i], scores[2 * i + 1]);
            shared_for_products();
        };
        /* Weights meet the values of keys from s on; the last units may still be under way, and
         * the last of scores, if they were asked for before, no more. */
        auto add_values = [&](const bf16 *weights, int s, bool scored) {
            int here = same_in_warp(0);
            Operand left = operand(weights, here, 0, ROWS),
                    right = operand(memory->units[0], here, half * (C / 2), DEEP);
#pragma unroll
            for (int u = 0; u < UNITS; u++) {
                int last = part.high + 1 - s - u * DEEP;
                barrier_wait(&memory->full[u], phase);
                if (see.pages && last < DEEP) clear_values<DEEP, C>(memory->units[u], last);
                wgmma_begin();
                wgmma<false, true>(sums, further(left, 0, u * DEEP, ROWS),
                                   further(right, 0, u * C, DEEP));
                wgmma_close_group();
                wgmma_wait<LATE>();
                if (u >= LATE) release(u - LATE);
                if (u == LATE - 1 && scored) release(UNITS - 1);
            }
            phase ^= 1;
        };
        auto values_added = [&] {
            wgmma_wait<0>();
            wgmma_results(sums);
#pragma unroll
            for (int u = UNITS - LATE; u < UNITS; u++) release(u);
        };
        barrier_wait(&memory->rows_full, 0);
        while (part.end < row_end) { /* a sequence after the other */
            part = stretch_of(&memory->sights, part.end, row_end);
            sights_within(low, high, &memory->sights, part, rank * ROWS + r);
            int s = first_key(part, see), which = 0;
            if (s > part.high) continue;
            score();
            wgmma_wait<0>();
            release(UNITS - 1);
            weigh_scores(memory->weights[which], s);
            for (; s + KEYS <= part.high; s += KEYS, which ^= 1) {
                score();
                multipliers_sync(); /* the weights of both halves are there */
                add_values(memory->weights[which], s, true);
                weigh_scores(memory->weights[which ^ 1], s + KEYS);
                values_added();
                fade_results(sums, fade);
            }
            multipliers_sync();
            add_values(memory->weights[which], s, false);
            values_added();
            multipliers_sync(); /* the weights have been read */
        }
        /* The sums of both halves of the keys. */
#pragma unroll
        for (int p = 0; p < 2; p++) {
            total[p] += __shfl_xor_sync(0xffffffffu, total[p], 1);
            total[p] += __shfl_xor_sync(0xffffffffu, total[p], 2);
            if (threadIdx.x % 4 == 0) memory->tops[half][r + 8 * p] = total[p];
        }
        multipliers_sync();
        for (int p = 0; p < 2; p++) total[p] += memory->tops[!half][r + 8 * p];
        write_results<ROWS>(maps.results, lse, memory->rows, sums, top, total, heads,
                            n0 + rank * (queries / PAIR), kv, r, half * (C / 2));
    }
    pair_sync(); /* neither ends while the other writes to it */
#endif
}

#endif
