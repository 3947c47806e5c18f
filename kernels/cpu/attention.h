/* attention.h - blocks of queries, for attention.c and amx_attention.c. */
#ifndef CPU_ATTENTION_H
#define CPU_ATTENTION_H

#include "kernels/attention.h"
#include "kernels/cpu/cpu.h"

/* About as many matrix rows in a block of queries. At 64 keys are read so often that the vision
 * tower takes 1.2 times as long and the backward pass 1.35 times. */
#define BLOCK_ROWS    256
#define TILE_KEYS     PAGE_KEYS
#define ROWS_TOGETHER 32 /* memory has room for whole registers, and whole tiles, of rows */

typedef struct Block { /* queries begin .. end - 1, of one sequence and one block of places */
    int64_t begin, end, first, last; /* keys any of them sees, first rounded down to a tile */
    int64_t parts;                   /* that the keys are cut in */
    int64_t partial;                 /* parts of the blocks before, where those have several */
    const int32_t *pages;            /* NULL: keys lie in order */
    bool alone;                      /* the only query of its sequence */
} Block;

typedef struct Shape {
    int64_t N, S, H, K, C, group, rows; /* group: query heads a key head; rows: places in a block */
} Shape;

/* Where key `key`, the first of a tile, lies. */
static inline int64_t row_of(const Block *b, int64_t key) {
    return b->pages ? (int64_t)b->pages[key / PAGE_KEYS] * PAGE_KEYS : key;
}

/* Behind the last key of a sequence a page holds anything; keys in order are all there, and going
 * on to the end of the tile keeps even the signs of zeros whatever queries are left out. */
static inline int64_t keys_in_tile(const Shape *s, const Block *b, int64_t key) {
    int64_t left = (b->pages ? b->last + 1 : s->S) - key;
    return left < TILE_KEYS ? left : TILE_KEYS;
}

/* The running softmax of a block's rows: out = sum of exp(score - top) v, total = the sum of
 * weights. Scores of a block lie key by key, so that nothing but its queries is turned around, and
 * once. */
typedef struct Running {
    float *query, *out;   /* (M, C) */
    float *turned;        /* (C, columns): the queries; columns: M rounded up */
    float *keys, *values; /* (TILE_KEYS, C) */
    float *score;         /* (TILE_KEYS, columns); of a single query (M, TILE_KEYS) */
    float *top, *total;   /* (columns) */
    float *best, *fade;   /* (columns) */
    int32_t *low, *high;  /* (columns): the keys of a tile that a row sees, low .. high - 1 */
} Running;

/* What the way back reads and writes. */
typedef struct Slopes {
    Tensor dq, dy, y, lse, q, k, v;
    const int32_t *from, *to; /* first and last key of each query */
} Slopes;

/* By tiles, where q, k and v are bf16 and C a multiple of 32: what attend and block_backward of
 * attention.c do, in their memory. Rows of queries know nothing of each other, and those whose dy
 * is zero are left out on the way back: without them the bits are the same. */
void CPU(amx_attend)(Running *r, const Shape *s, const Block *b, int64_t head, Tensor q, Tensor k,
                     Tensor v, int64_t begin, int64_t end, const int32_t *from, const int32_t *to);
void CPU(amx_block_backward)(const Slopes *t, const Shape *s, const Block *b, int64_t head,
                             float *dkey, float *dvalue, float *memory);

#endif
