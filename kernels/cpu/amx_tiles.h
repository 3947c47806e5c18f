/* amx_tiles.h - operands in tiles of bf16.
 *
 * The instruction adds to a tile of 16 by 16 sums the product of a tile of 16 lines, 32 terms each,
 * with one of 16 pairs of terms, 16 lines each. Lines go two tiles at a time, a pair: four products
 * for four tiles read. */
#ifndef AMX_TILES_H
#define AMX_TILES_H

#include "kernels/cpu/amx.h"
#include "kernels/cpu/tile.h"

#include <immintrin.h>

#define TILE      512 /* bf16 of a tile */
#define STEP      32  /* terms of a tile */
#define PAIR      32  /* lines of two tiles */
#define PAIR_STEP (2 * TILE)
#define PAIR_SUMS (PAIR * PAIR)

/* An operand: `lines` rows or columns of the product, `terms` along K. */
typedef struct Side {
    const uint16_t *data;
    int64_t stride, lines, terms;
    bool along;           /* stored line by line; else term by term */
    const int32_t *order; /* term by term: where they are stored; NULL: one behind the other */
} Side;

static inline int64_t lesser(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static inline int64_t pairs_of(int64_t lines) {
    return (lines + PAIR - 1) / PAIR;
}

static inline int64_t steps_of(int64_t terms) {
    return (terms + STEP - 1) / STEP;
}

/* (lines, terms) as it is stored, or (terms, lines). */
static inline Side side_of(Tensor t, bool along) {
    int64_t rows = tensor_rows(t), cols = tensor_cols(t);
    return (Side){t.data, cols, along ? rows : cols, along ? cols : rows, along, NULL};
}

static inline const uint16_t *term_at(const Side *side, int64_t term) {
    return side->data + (side->order ? side->order[term] : term) * side->stride;
}

static inline __mmask32 mask_of(int64_t count) {
    return count >= 32 ? ~(__mmask32)0 : count <= 0 ? 0 : ((__mmask32)1 << count) - 1;
}

static inline void turn_tile(uint16_t *tile) {
    turn_registers((float *)tile, LANES, (const float *)tile, LANES);
}

/* `pairs` pairs of lines from `line`, `steps` steps of terms from `term`, zeros beyond the operand:
 * pair p, step s at (p steps + s) PAIR_STEP. Tiles hold lines (rows) or pairs of terms. */
static inline void pack(uint16_t *to, const Side *side, int64_t line, int64_t pairs, int64_t term,
                        int64_t steps, bool rows) {
    if (side->along) {
        for (int64_t l = 0; l < PAIR * pairs; l++) {
            int64_t known = line + l < side->lines ? side->terms - term : 0;
            const uint16_t *from = side->data + (line + l) * side->stride + term;
            uint16_t *out =
                to + l / PAIR * steps * PAIR_STEP + l % PAIR / 16 * TILE + l % 16 * STEP;
            for (int64_t s = 0; s < steps; s++) {
                _mm_prefetch(from + 2 * side->stride + s * STEP, _MM_HINT_T1);
                _mm512_storeu_si512(
                    out + s * PAIR_STEP,
                    _mm512_maskz_loadu_epi16(mask_of(known - s * STEP), from + s * STEP));
            }
        }
    } else {
        const __m512i even = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9,
                                              40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33,
                                              1, 32, 0),
                      odd = _mm512_add_epi16(even, _mm512_set1_epi16(16));
        for (int64_t t = 0; t < STEP * steps; t += 2) {
            const uint16_t *from = term_at(side, term + t) + line,
                           *after = term_at(side, term + t + 1) + line,
                           *ahead = term_at(side, term + t + 8) + line,
                           *farther = term_at(side, term + t + 9) + line;
            uint16_t *out = to + t / STEP * PAIR_STEP + t % STEP * 16;
            for (int64_t p = 0; p < pairs; p++) {
                __mmask32 mask = mask_of(side->lines - line - p * PAIR);
                _mm_prefetch(ahead + p * PAIR, _MM_HINT_T0);
                _mm_prefetch(farther + p * PAIR, _MM_HINT_T0);
                __m512i a = _mm512_maskz_loadu_epi16(term + t < side->terms ? mask : 0,
                                                     from + p * PAIR),
                        b = _mm512_maskz_loadu_epi16(term + t + 1 < side->terms ? mask : 0,
                                                     after + p * PAIR);
                uint16_t *at = out + p * steps * PAIR_STEP;
                _mm512_storeu_si512(at, _mm512_permutex2var_epi16(a, even, b));
                _mm512_storeu_si512(at + TILE, _mm512_permutex2var_epi16(a, odd, b));
            }
        }
    }
    if (side->along != rows)
        for (int64_t i = 0; i < 2 * pairs * steps; i++) turn_tile(to + i * TILE);
}

/* Whether nothing of a row, f32 or bf16, counts. */
static inline bool row_is_zero(Tensor x, int64_t row) {
    int64_t cols = tensor_cols(x), c = 0;
    if (x.dtype == F32) {
        const float *values = (const float *)x.data + row * cols;
        while (c < cols && values[c] == 0) c++;
    } else {
        const uint16_t *bits = (const uint16_t *)x.data + row * cols;
        while (c < cols && !(bits[c] & 0x7fff)) c++;
    }
    return c == cols;
}

/* Where tiles of rows lie: elements from a line to the next, to the second tile of a pair, and from
 * a step to the next. */
typedef struct Rows {
    const uint16_t *at;
    int64_t line, second, step;
} Rows;

/* A pair of lines as they are stored, `stride` elements apart. */
static inline Rows rows_of(const uint16_t *at, int64_t stride) {
    return (Rows){at, stride, stride * PAIR / 2, STEP};
}

static inline Rows rows_in_tiles(const uint16_t *tiles) {
    return (Rows){tiles, STEP, TILE, PAIR_STEP};
}

/* Where four tiles of sums lie: floats from a line to the next, to the tile at the right, and to
 * the one below. */
typedef struct Sums {
    float *at;
    int64_t line, right, below;
} Sums;

/* sums (32, 32) = what they were if `add` + a pair of rows times a pair of columns, in tiles.
 * Meanwhile so many lines of 64 bytes a step are fetched of what comes next. */
static inline __attribute__((always_inline)) void multiply_pair(Sums sums, bool add, Rows rows,
                                                                const uint16_t *columns,
                                                                int64_t steps, const int fetched,
                                                                const uint16_t *next) {
    size_t apart = (size_t)sums.line * sizeof *sums.at, line = (size_t)rows.line * sizeof *rows.at;
    float *below = sums.at + sums.below;
    if (add) {
        _tile_loadd(0, sums.at, apart);
        _tile_loadd(1, sums.at + sums.right, apart);
        _tile_loadd(2, below, apart);
        _tile_loadd(3, below + sums.right, apart);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t s = 0; s < steps; s++) {
        _tile_loadd(4, rows.at, line);
        _tile_loadd(6, columns, 64);
        _tile_loadd(7, columns + TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, rows.at + rows.second, line);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        for (int i = 0; i < fetched; i++) _mm_prefetch(next + 32 * i, _MM_HINT_T1);
        rows.at += rows.step;
        columns += PAIR_STEP;
        next += 32 * fetched;
    }
    _tile_stored(0, sums.at, apart);
    _tile_stored(1, sums.at + sums.right, apart);
    _tile_stored(2, below, apart);
    _tile_stored(3, below + sums.right, apart);
}

static const TileShapes bf16_tiles = {1, .bytes = {64, 64, 64, 64, 64, 64, 64, 64},
                                      .lines = {16, 16, 16, 16, 16, 16, 16, 16}};

#endif
