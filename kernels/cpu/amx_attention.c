/* amx_attention.c - attention by tiles: a block of queries and one key head at a time.
 *
 * Scores are sums of products of bf16 in f32; the weights, and the slopes of scores, are rounded to
 * bf16 before they are multiplied in turn. Rows of queries lie as they are, and are rows of tiles;
 * what meets them is put into tiles of pairs of terms. */
#include "kernels/cpu/amx_tiles.h"
#include "kernels/cpu/attention.h"

#define KEY_STEPS (TILE_KEYS / STEP)
#define KEY_PAIRS (TILE_KEYS / PAIR)

/* sums (32, 32), lines `stride` apart, (=|+=) a pair of rows times pair `pair` of columns. */
static void multiply(float *sums, int64_t stride, Write write, Rows rows, const uint16_t *columns,
                     int64_t pair, int64_t steps) {
    multiply_pair((Sums){sums, stride, PAIR / 2, stride * PAIR / 2}, write == ADD, rows,
                  columns + pair * steps * PAIR_STEP, steps, 0, columns);
}

/* Rows of queries, rounded up to whole pairs. */
static int64_t whole(int64_t rows) {
    return pairs_of(rows) * PAIR;
}

static const uint16_t *query_row(Tensor x, const Shape *s, const Block *b, int64_t head,
                                 int64_t m) {
    int64_t n = b->begin + m / s->group;
    return (const uint16_t *)x.data + (n * s->H + head * s->group + m % s->group) * s->C;
}

/* `count` keys of a head from row `first`: as lines, or, of the same memory, as terms. */
static Side keys_of(Tensor k, const Shape *s, int64_t head, int64_t first, int64_t count,
                    bool lines) {
    const uint16_t *at = (const uint16_t *)k.data + (first * s->K + head) * s->C;
    return (Side){at, s->K * s->C, lines ? count : s->C, lines ? s->C : count, lines, NULL};
}

static void to_bf16(uint16_t *out, const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i += 2 * LANES)
        _mm512_storeu_si512(out + i, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + i + LANES),
                                                                  _mm512_loadu_ps(x + i)));
}

/* ---- forward ---- */

/* Scores of row m to weights in bf16, of the keys low .. high - 1 of a tile; what its sums so far
 * fade by. */
static float weigh_row(const Running *r, uint16_t *weights, int64_t m, int64_t low, int64_t high) {
    float *score = r->score + m * TILE_KEYS, best = r->top[m], sum = 0;
    if (high <= low) {
        memset(weights, 0, TILE_KEYS * sizeof *weights);
        return 1;
    }
    for (int64_t j = low; j < high; j++) best = score[j] > best ? score[j] : best;
    float fade = r->top[m] == -INFINITY ? 0.0f : fast_exp(r->top[m] - best);
    for (int64_t j = 0; j < TILE_KEYS; j++)
        score[j] = (j >= low) & (j < high) ? fast_exp(score[j] - best) : 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < TILE_KEYS; j++) sum += score[j];
    r->total[m] = r->total[m] * fade + sum;
    r->top[m] = best;
    to_bf16(weights, score, TILE_KEYS);
    return fade;
}

void CPU(amx_attend)(Running *r, const Shape *s, const Block *b, int64_t head, Tensor q, Tensor k,
                     Tensor v, int64_t begin, int64_t end, const int32_t *from, const int32_t *to) {
    int64_t C = s->C, rows = (b->end - b->begin) * s->group, M = whole(rows), steps = C / STEP;
    uint16_t *query = (uint16_t *)r->query, *keys = (uint16_t *)r->keys,
             *values = (uint16_t *)r->values, *weights = (uint16_t *)r->turned;
    for (int64_t m = 0; m < rows; m++)
        memcpy(query + m * C, query_row(q, s, b, head, m), (size_t)C * sizeof *query);
    memset(query + rows * C, 0, (size_t)((M - rows) * C) * sizeof *query);
    memset(weights + rows * TILE_KEYS, 0, (size_t)((M - rows) * TILE_KEYS) * sizeof *weights);
    memset(r->out, 0, (size_t)(M * C) * sizeof *r->out);
    for (int64_t m = 0; m < rows; m++) r->top[m] = -INFINITY, r->total[m] = 0;
    _tile_loadconfig(&bf16_tiles);
    for (int64_t key = begin; key < end; key += TILE_KEYS) {
        int64_t count = keys_in_tile(s, b, key), first = row_of(b, key);
        Side lines = keys_of(k, s, head, first, count, true),
             terms = keys_of(v, s, head, first, count, false);
        pack(keys, &lines, 0, KEY_PAIRS, 0, steps, false);
        pack(values, &terms, 0, C / PAIR, 0, KEY_STEPS, false);
        for (int64_t m = 0; m < M; m += PAIR)
            for (int64_t p = 0; p < KEY_PAIRS; p++)
                multiply(r->score + m * TILE_KEYS + p * PAIR, TILE_KEYS, SET,
                         rows_of(query + m * C, C), keys, p, steps);
        for (int64_t m = 0; m < rows; m++) {
            int64_t n = b->begin + m / s->group;
            float fade = weigh_row(r, weights + m * TILE_KEYS, m, from[n] > key ? from[n] - key : 0,
                                   lesser(to[n] - key + 1, count));
            for (int64_t c = 0; fade != 1.0f && c < C; c++) r->out[m * C + c] *= fade;
        }
        for (int64_t m = 0; m < M; m += PAIR)
            for (int64_t p = 0; p < C / PAIR; p++)
                multiply(r->out + m * C + p * PAIR, C, ADD,
                         rows_of(weights + m * TILE_KEYS, TILE_KEYS), values, p, KEY_STEPS);
    }
    _tile_release();
}

/* ---- backward ---- */

/* A block's rows whose dy is not zero, and what they need. */
typedef struct Back {
    int64_t rows, M;                     /* M: rounded up to whole pairs, with zeros */
    uint16_t *query, *dout;              /* (M, C) */
    uint16_t *query_tiles, *dout_tiles;  /* columns of a product over M */
    uint16_t *keys, *values, *key_terms; /* of a tile: columns of products over C, and over keys */
    uint16_t *prob, *dscore;             /* (M, TILE_KEYS) */
    uint16_t *prob_tiles, *dscore_tiles; /* rows of a product over M */
    float *dquery;                       /* (M, C) */
    float *score, *slope;                /* (M, TILE_KEYS) */
    float *spill;                        /* (TILE_KEYS, C): sums of a tile that goes beyond S */
    float *delta, *log_sum;              /* (M) */
    int32_t *which;                      /* (M): of the block's rows */
} Back;

static Back back_in(float *memory, const Shape *s, int64_t M) {
    int64_t C = s->C;
    Back r = {.dquery = memory};
    r.score = r.dquery + M * C;
    r.slope = r.score + M * TILE_KEYS;
    r.spill = r.slope + M * TILE_KEYS;
    r.delta = r.spill + TILE_KEYS * C;
    r.log_sum = r.delta + M;
    r.which = (int32_t *)(r.log_sum + M);
    r.query = (uint16_t *)(r.which + M);
    r.dout = r.query + M * C;
    r.query_tiles = r.dout + M * C;
    r.dout_tiles = r.query_tiles + M * C;
    r.keys = r.dout_tiles + M * C;
    r.values = r.keys + TILE_KEYS * C;
    r.key_terms = r.values + TILE_KEYS * C;
    r.prob = r.key_terms + TILE_KEYS * C;
    r.dscore = r.prob + M * TILE_KEYS;
    r.prob_tiles = r.dscore + M * TILE_KEYS;
    r.dscore_tiles = r.prob_tiles + M * TILE_KEYS;
    return r;
}

/* Rows of zeros in dy get a dq of zeros, the others are gathered. */
static void gather_rows(Back *r, const Slopes *t, const Shape *s, const Block *b, int64_t head) {
    int64_t C = s->C, all = (b->end - b->begin) * s->group;
    float dy[C], y[C];
    for (int64_t m = 0; m < all; m++) {
        const uint16_t *row = query_row(t->dy, s, b, head, m);
        int64_t at = row - (const uint16_t *)t->dy.data;
        if (row_is_zero(t->dy, at / C)) {
            memset((uint16_t *)t->dq.data + at, 0, (size_t)C * sizeof *row);
            continue;
        }
        memcpy(r->dout + r->rows * C, row, (size_t)C * sizeof *row);
        memcpy(r->query + r->rows * C, (const uint16_t *)t->q.data + at, (size_t)C * sizeof *row);
        r->delta[r->rows] = dot(load_f32(dy, t->dy, at, C), load_f32(y, t->y, at, C), C);
        r->log_sum[r->rows] = ((const float *)t->lse.data)[at / C];
        r->which[r->rows++] = (int32_t)m;
    }
    r->M = whole(r->rows);
    size_t rest = (size_t)(r->M - r->rows);
    memset(r->query + r->rows * C, 0, rest * (size_t)C * sizeof *r->query);
    memset(r->dout + r->rows * C, 0, rest * (size_t)C * sizeof *r->dout);
    memset(r->prob + r->rows * TILE_KEYS, 0, rest * TILE_KEYS * sizeof *r->prob);
    memset(r->dscore + r->rows * TILE_KEYS, 0, rest * TILE_KEYS * sizeof *r->dscore);
}

/* Weights and slopes of row m, of the keys low .. high - 1 of a tile. */
static void slope_row(const Back *r, int64_t m, int64_t low, int64_t high) {
    float *p = r->score + m * TILE_KEYS, *ds = r->slope + m * TILE_KEYS;
    float log_sum = r->log_sum[m], delta = r->delta[m];
    for (int64_t j = 0; j < TILE_KEYS; j++) {
        p[j] = (j >= low) & (j < high) ? fast_exp(p[j] - log_sum) : 0.0f;
        ds[j] = p[j] * (ds[j] - delta);
    }
    to_bf16(r->prob + m * TILE_KEYS, p, TILE_KEYS);
    to_bf16(r->dscore + m * TILE_KEYS, ds, TILE_KEYS);
}

/* sums, `count` keys of a head `stride` apart, += rows over M, in tiles, times columns over M. */
static void add_to_keys(const Back *r, float *sums, int64_t stride, int64_t count, int64_t C,
                        const uint16_t *rows, const uint16_t *columns) {
    int64_t steps = r->M / STEP;
    bool beyond = count < TILE_KEYS;
    float *to = beyond ? r->spill : sums;
    int64_t apart = beyond ? C : stride;
    for (int64_t key = 0; key < TILE_KEYS; key += PAIR)
        for (int64_t c = 0; c < C; c += PAIR)
            multiply(to + key * apart + c, apart, beyond ? SET : ADD,
                     rows_in_tiles(rows + key / PAIR * steps * PAIR_STEP), columns, c / PAIR,
                     steps);
    for (int64_t key = 0; beyond && key < count; key++)
        for (int64_t c = 0; c < C; c++) sums[key * stride + c] += r->spill[key * C + c];
}

void CPU(amx_block_backward)(const Slopes *t, const Shape *s, const Block *b, int64_t head,
                             float *dkey, float *dvalue, float *memory) {
    int64_t C = s->C, stride = s->K * C, steps = C / STEP;
    Back r = back_in(memory, s, whole((b->end - b->begin) * s->group));
    gather_rows(&r, t, s, b, head);
    if (!r.rows) return;
    Side query = {r.query, C, C, r.M, false, NULL}, dout = {r.dout, C, C, r.M, false, NULL},
         prob = {r.prob, TILE_KEYS, TILE_KEYS, r.M, false, NULL},
         dscore = {r.dscore, TILE_KEYS, TILE_KEYS, r.M, false, NULL};
    pack(r.query_tiles, &query, 0, C / PAIR, 0, r.M / STEP, false);
    pack(r.dout_tiles, &dout, 0, C / PAIR, 0, r.M / STEP, false);
    memset(r.dquery, 0, (size_t)(r.M * C) * sizeof *r.dquery);
    _tile_loadconfig(&bf16_tiles);
    for (int64_t key = b->first; key <= b->last; key += TILE_KEYS) {
        int64_t count = lesser(TILE_KEYS, s->S - key);
        Side keys = keys_of(t->k, s, head, key, count, true),
             terms = keys_of(t->k, s, head, key, count, false),
             values = keys_of(t->v, s, head, key, count, true);
        pack(r.keys, &keys, 0, KEY_PAIRS, 0, steps, false);
        pack(r.values, &values, 0, KEY_PAIRS, 0, steps, false);
        pack(r.key_terms, &terms, 0, C / PAIR, 0, KEY_STEPS, false);
        for (int64_t m = 0; m < r.M; m += PAIR)
            for (int64_t p = 0; p < KEY_PAIRS; p++) {
                int64_t at = m * TILE_KEYS + p * PAIR;
                multiply(r.score + at, TILE_KEYS, SET, rows_of(r.query + m * C, C), r.keys, p,
                         steps);
                multiply(r.slope + at, TILE_KEYS, SET, rows_of(r.dout + m * C, C), r.values, p,
                         steps);
            }
        for (int64_t m = 0; m < r.rows; m++) {
            int64_t n = b->begin + r.which[m] / s->group;
            slope_row(&r, m, t->from[n] - key, lesser(t->to[n] - key + 1, count));
        }
        pack(r.prob_tiles, &prob, 0, KEY_PAIRS, 0, r.M / STEP, true);
        pack(r.dscore_tiles, &dscore, 0, KEY_PAIRS, 0, r.M / STEP, true);
        for (int64_t m = 0; m < r.M; m += PAIR)
            for (int64_t p = 0; p < C / PAIR; p++)
                multiply(r.dquery + m * C + p * PAIR, C, ADD,
                         rows_of(r.dscore + m * TILE_KEYS, TILE_KEYS), r.key_terms, p, KEY_STEPS);
        add_to_keys(&r, dvalue + key * stride, stride, count, C, r.prob_tiles, r.dout_tiles);
        add_to_keys(&r, dkey + key * stride, stride, count, C, r.dscore_tiles, r.query_tiles);
    }
    _tile_release();
    for (int64_t m = 0; m < r.rows; m++) {
        int64_t at = query_row(t->dq, s, b, head, r.which[m]) - (const uint16_t *)t->dq.data;
        store_f32(t->dq, at, C, r.dquery + m * C);
    }
}
