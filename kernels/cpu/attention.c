/* attention.c - tiled softmax attention over key intervals.
 *
 * A work item is one block of queries (by their place on the key axis) and one key head: the
 * block's rows of all query heads that read this key head form one (M, C) matrix, so a tile of
 * keys is converted once for all of them. Keys go in tiles at fixed places (a tile is a page where
 * there are pages), with the running softmax of FlashAttention (Dao et al. 2022). Blocks of bf16
 * go by tiles where the CPU has them (amx_attention.c); all arithmetic here is f32, with subnormal
 * results flushed: weights of keys far below the best come to them, and a step of E2B took 1.2
 * times as long. */
#include "kernels/cpu/attention.h"
#include "kernels/cpu/amx.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cpu/tile.h"

/* Keys of one part when a sequence has few queries: parts run side by side. */
#define PART_KEYS 512
#define FEW       8

static Shape shape_of(Tensor q, Tensor k) {
    Shape s = {.N = q.shape[0], .S = k.shape[0], .H = q.shape[1], .K = k.shape[1], .C = q.shape[2]};
    s.group = s.H / s.K;
    s.rows = s.group >= BLOCK_ROWS ? 1 : BLOCK_ROWS / s.group;
    return s;
}

/* The block of queries that starts at `begin`. */
static Block block_at(const Shape *s, int64_t begin, const int32_t *index, const int32_t *first,
                      const int32_t *last) {
    Block b = {
        .begin = begin, .end = begin, .first = first[begin], .last = last[begin], .parts = 1};
    int64_t place = index[begin] / s->rows;
    while (b.end < s->N && index[b.end] / s->rows == place) {
        if (first[b.end] < b.first) b.first = first[b.end];
        if (last[b.end] > b.last) b.last = last[b.end];
        b.end++;
    }
    b.first = b.first / TILE_KEYS * TILE_KEYS;
    return b;
}

static int64_t list_blocks(int64_t *begins, const Shape *s, const int32_t *index) {
    int64_t count = 0;
    for (int64_t n = 0; n < s->N; n++)
        if (n == 0 || index[n] / s->rows != index[n - 1] / s->rows) begins[count++] = n;
    return count;
}

/* The blocks of paged sequences, one after the other. Where a sequence has few queries its keys are
 * cut in parts: a rule of that sequence alone, so its bits do not depend on its neighbours. */
static int64_t list_paged_blocks(Block *blocks, const Shape *s, const int32_t *index,
                                 const int32_t *first, const int32_t *last, const int32_t *sequence,
                                 Tensor pages) {
    int64_t count = 0, partial = 0;
    for (int64_t begin = 0, end; begin < s->N; begin = end) {
        Shape mine = *s;
        for (end = begin; end < s->N && sequence[end] == sequence[begin];) end++;
        mine.N = end;
        for (int64_t n = begin; n < end; n = blocks[count++].end) {
            Block b = block_at(&mine, n, index, first, last);
            b.pages = (const int32_t *)pages.data + sequence[n] * tensor_cols(pages);
            b.alone = end - begin == 1;
            b.partial = partial;
            if (end - begin <= FEW) b.parts = (b.last - b.first) / PART_KEYS + 1;
            if (b.parts > 1) partial += b.parts;
            blocks[count] = b;
        }
    }
    return count;
}

/* Row (n, head) of the block's matrix, head fastest. */
static void load_block(float *out, Tensor x, const Shape *s, const Block *b, int64_t head) {
    for (int64_t n = b->begin, m = 0; n < b->end; n++)
        for (int64_t g = 0; g < s->group; g++, m++) {
            const float *row =
                load_f32(out + m * s->C, x, (n * s->H + head * s->group + g) * s->C, s->C);
            if (row != out + m * s->C) memcpy(out + m * s->C, row, (size_t)s->C * sizeof *row);
        }
}

static void store_block(Tensor y, const float *in, const Shape *s, const Block *b, int64_t head) {
    for (int64_t n = b->begin, m = 0; n < b->end; n++)
        for (int64_t g = 0; g < s->group; g++, m++)
            store_f32(y, (n * s->H + head * s->group + g) * s->C, s->C, in + m * s->C);
}

/* Keys first .. first + count - 1 of one head, (count, C). */
static void load_keys(float *out, Tensor k, const Shape *s, int64_t head, int64_t first,
                      int64_t count) {
    for (int64_t j = 0; j < count; j++) {
        const float *row = load_f32(out + j * s->C, k, ((first + j) * s->K + head) * s->C, s->C);
        if (row != out + j * s->C) memcpy(out + j * s->C, row, (size_t)s->C * sizeof *row);
    }
}

/* Rows of heads turned around, (C, width), zeros behind the last. */
static void turn_rows(float *turned, int64_t width, const float *rows, const Shape *s,
                      int64_t count) {
    turn_around(turned, width, rows, s->C, count, s->C);
    if (count == width) return;
    for (int64_t c = 0; c < s->C; c++)
        memset(turned + c * width + count, 0, (size_t)(width - count) * sizeof *turned);
}

static int64_t columns_of(int64_t M) {
    return (M + ROWS_TOGETHER - 1) / ROWS_TOGETHER * ROWS_TOGETHER;
}

static size_t running_floats(const Shape *s, int64_t M) {
    int64_t columns = columns_of(M);
    return (size_t)(3 * columns * s->C + 2 * TILE_KEYS * s->C + columns * TILE_KEYS + 6 * columns);
}

static Running running_in(float *memory, const Shape *s, int64_t M) {
    int64_t columns = columns_of(M);
    Running r = {.query = memory};
    r.out = r.query + columns * s->C;
    r.turned = r.out + columns * s->C;
    r.keys = r.turned + columns * s->C;
    r.values = r.keys + TILE_KEYS * s->C;
    r.score = r.values + TILE_KEYS * s->C;
    r.top = r.score + columns * TILE_KEYS;
    r.total = r.top + columns;
    r.best = r.total + columns;
    r.fade = r.best + columns;
    r.low = (int32_t *)(r.fade + columns);
    r.high = r.low + columns;
    return r;
}

/* score (M, TILE_KEYS) = query (M, C) keys (count, C)^T for the few rows of a single query: dot
 * products along the keys as they lie, where turning them around would cost more than it saves. */
static void dot_keys(float *score, const float *query, int64_t M, const float *keys, int64_t count,
                     int64_t C) {
    for (int64_t j = 0; j < TILE_KEYS; j++)
        for (int64_t m = 0; m < M; m += 4) {
            int64_t rows = M - m < 4 ? M - m : 4;
            const float *key = keys + j * C, *a[4];
            Vec sum[4] = {{0}};
            for (int i = 0; i < 4; i++) a[i] = query + (m + (i < rows ? i : 0)) * C;
            for (int64_t c = 0; j < count && c + LANES <= C; c += LANES) {
                Vec x = *(const Vec *)(key + c);
                for (int i = 0; i < 4; i++) sum[i] += *(const Vec *)(a[i] + c) * x;
            }
            for (int64_t i = 0; i < rows; i++) {
                float total = 0;
                for (int l = 0; l < LANES; l++) total += sum[i][l];
                for (int64_t c = C / LANES * LANES; j < count && c < C; c++)
                    total += a[i][c] * key[c];
                score[(m + i) * TILE_KEYS + j] = total;
            }
        }
}

/* Keys begin .. end - 1, begin at a tile, for the rows of a single query, which start from nothing.
 */
static void attend_alone(Running *r, const Shape *s, const Block *b, int64_t head, Tensor q,
                         Tensor k, Tensor v, int64_t begin, int64_t end, const int32_t *from,
                         const int32_t *to) {
    int64_t rows = s->group;
    load_block(r->query, q, s, b, head);
    memset(r->out, 0, (size_t)(rows * s->C) * sizeof *r->out);
    for (int64_t m = 0; m < rows; m++) r->top[m] = -INFINITY, r->total[m] = 0;
    for (int64_t key = begin; key < end; key += TILE_KEYS) {
        int64_t count = keys_in_tile(s, b, key), row_first = row_of(b, key);
        int64_t low = from[b->begin] > key ? from[b->begin] - key : 0,
                high = to[b->begin] - key < count ? to[b->begin] - key + 1 : count;
        if (high <= low) continue;
        load_keys(r->values, v, s, head, row_first, count);
        load_keys(r->keys, k, s, head, row_first, count);
        dot_keys(r->score, r->query, rows, r->keys, count, s->C);
        for (int64_t m = 0; m < rows; m++) {
            float *row = r->score + m * TILE_KEYS, best = r->top[m], sum = 0;
            for (int64_t j = low; j < high; j++) best = row[j] > best ? row[j] : best;
            float fade = r->top[m] == -INFINITY ? 0.0f : fast_exp(r->top[m] - best);
            for (int64_t j = 0; j < TILE_KEYS; j++)
                row[j] = j >= low && j < high ? fast_exp(row[j] - best) : 0.0f;
            for (int64_t j = 0; j < TILE_KEYS; j++) sum += row[j];
            if (fade != 1.0f)
                for (int64_t c = 0; c < s->C; c++) r->out[m * s->C + c] *= fade;
            r->total[m] = r->total[m] * fade + sum;
            r->top[m] = best;
        }
        tile_product(rows, s->C, count, r->score, TILE_KEYS, 1, r->values, s->C, r->out, s->C,
                     true);
    }
}

/* Scores of a tile to weights, and what the rows' sums so far fade by. */
static void weigh(const Running *r, int64_t columns, int64_t count) {
    float *restrict top = r->top, *restrict total = r->total, *restrict best = r->best,
                    *restrict fade = r->fade;
    const int32_t *restrict low = r->low, *restrict high = r->high;
    memcpy(best, top, (size_t)columns * sizeof *best);
    for (int32_t j = 0; j < count; j++) {
        const float *restrict score = r->score + j * columns;
#pragma omp simd
        for (int64_t m = 0; m < columns; m++) {
            float seen = ((j >= low[m]) & (j < high[m])) ? score[m] : -INFINITY;
            best[m] = seen > best[m] ? seen : best[m];
        }
    }
#pragma omp simd
    for (int64_t m = 0; m < columns; m++) {
        float less = fast_exp(top[m] - best[m]);
        less = top[m] == -INFINITY ? 0.0f : less;
        fade[m] = best[m] == top[m] ? 1.0f : less; /* also where nothing was seen yet */
        total[m] *= fade[m];
        top[m] = best[m];
        best[m] = 0;
    }
    for (int32_t j = 0; j < count; j++) {
        float *restrict score = r->score + j * columns;
#pragma omp simd
        for (int64_t m = 0; m < columns; m++) {
            float weight = fast_exp(score[m] - top[m]);
            weight = ((j >= low[m]) & (j < high[m])) ? weight : 0.0f;
            score[m] = weight;
            best[m] += weight;
        }
    }
#pragma omp simd
    for (int64_t m = 0; m < columns; m++) total[m] += best[m];
}

/* Whether the CPU has tiles for those. */
static inline bool by_tiles(Tensor q, Tensor k, Tensor v) {
    return has_tiles() && q.dtype == BF16 && k.dtype == BF16 && v.dtype == BF16 &&
           q.shape[2] % 32 == 0;
}

/* The same as attend_alone for the rows of a block. */
static void attend(Running *r, const Shape *s, const Block *b, int64_t head, Tensor q, Tensor k,
                   Tensor v, int64_t begin, int64_t end, const int32_t *from, const int32_t *to) {
    int64_t rows = (b->end - b->begin) * s->group, columns = columns_of(rows);
    if (b->alone) {
        attend_alone(r, s, b, head, q, k, v, begin, end, from, to);
        return;
    }
#if LANES == 16
    if (by_tiles(q, k, v)) {
        CPU(amx_attend)(r, s, b, head, q, k, v, begin, end, from, to);
        return;
    }
#endif
    load_block(r->query, q, s, b, head);
    turn_rows(r->turned, columns, r->query, s, rows);
    memset(r->out, 0, (size_t)(rows * s->C) * sizeof *r->out);
    for (int64_t m = 0; m < columns; m++) r->top[m] = -INFINITY, r->total[m] = 0;
    for (int64_t key = begin; key < end; key += TILE_KEYS) {
        int64_t count = keys_in_tile(s, b, key), row_first = row_of(b, key);
        for (int64_t m = 0; m < columns; m++) {
            int64_t n = b->begin + (m < rows ? m : 0) / s->group;
            r->low[m] = (int32_t)(from[n] > key ? from[n] - key : 0);
            r->high[m] = m >= rows ? 0 : (int32_t)(to[n] - key < count ? to[n] - key + 1 : count);
        }
        load_keys(r->keys, k, s, head, row_first, count);
        load_keys(r->values, v, s, head, row_first, count);
        tile_product(count, columns, s->C, r->keys, s->C, 1, r->turned, columns, r->score, columns,
                     false);
        weigh(r, columns, count);
        for (int64_t m = 0; m < rows; m++)
            for (int64_t c = 0; r->fade[m] != 1.0f && c < s->C; c++)
                r->out[m * s->C + c] *= r->fade[m];
        tile_product(rows, s->C, count, r->score, 1, columns, r->values, s->C, r->out, s->C, true);
    }
}

/* What a block's rows came to: y, and lse. */
static void store_rows_of(Tensor y, Tensor lse, Running *r, const Shape *s, const Block *b,
                          int64_t head) {
    for (int64_t m = 0; m < (b->end - b->begin) * s->group; m++) {
        int64_t n = b->begin + m / s->group, h = head * s->group + m % s->group;
        float inverse = 1.0f / r->total[m];
        for (int64_t c = 0; c < s->C; c++) r->out[m * s->C + c] *= inverse;
        ((float *)lse.data)[n * s->H + h] = r->top[m] + logf(r->total[m]);
    }
    store_block(y, r->out, s, b, head);
}

/* Floats of one part of one head: out (M, C), top (M) and total (M). */
static int64_t part_floats(const Shape *s) {
    return s->rows * s->group * (s->C + 2);
}

/* The parts of a block join in order, whatever the number of threads. */
static void join_parts(Running *r, const float *parts, const Shape *s, const Block *b) {
    int64_t M = (b->end - b->begin) * s->group, stride = s->K * part_floats(s);
    memset(r->out, 0, (size_t)(M * s->C) * sizeof *r->out);
    for (int64_t m = 0; m < M; m++) {
        float best = -INFINITY, total = 0, *out = r->out + m * s->C;
        for (int64_t part = 0; part < b->parts; part++) {
            float value = parts[part * stride + M * s->C + m];
            best = value > best ? value : best;
        }
        for (int64_t part = 0; part < b->parts; part++) {
            const float *p = parts + part * stride;
            if (p[M * s->C + m] == -INFINITY) continue;
            float fade = fast_exp(p[M * s->C + m] - best);
            total += fade * p[M * s->C + M + m];
            for (int64_t c = 0; c < s->C; c++) out[c] += fade * p[m * s->C + c];
        }
        r->top[m] = best;
        r->total[m] = total;
    }
}

static void paged_forward(Tensor y, Tensor lse, Tensor q, Tensor k, Tensor v, const Shape *s,
                          const Block *blocks, int64_t count, const int32_t *from,
                          const int32_t *to) {
    int64_t M = s->rows * s->group, items = 0, several = 0, begins[count + 1];
    for (int64_t i = 0; i < count; i++) {
        begins[i] = items;
        items += blocks[i].parts;
        if (blocks[i].parts > 1) several += blocks[i].parts;
    }
    begins[count] = items;
    float *partial = several ? outer_scratch((size_t)(several * s->K * part_floats(s))) : NULL;
#pragma omp parallel
    {
        unsigned before = flush_subnormals();
        Running r = running_in(thread_scratch(running_floats(s, M)), s, M);
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t item = 0; item < items; item++)
            for (int64_t head = 0; head < s->K; head++) {
                int64_t low = 0, high = count; /* blocks[low] is the item's */
                while (high - low > 1) {
                    int64_t middle = (low + high) / 2;
                    if (begins[middle] <= item)
                        low = middle;
                    else
                        high = middle;
                }
                const Block *b = &blocks[low];
                int64_t part = item - begins[low], begin = b->first + part * PART_KEYS,
                        end = b->parts > 1 && begin + PART_KEYS <= b->last ? begin + PART_KEYS
                                                                           : b->last + 1;
                attend(&r, s, b, head, q, k, v, begin, end, from, to);
                if (b->parts == 1) {
                    store_rows_of(y, lse, &r, s, b, head);
                    continue;
                }
                int64_t rows = (b->end - b->begin) * s->group;
                float *out = partial + ((b->partial + part) * s->K + head) * part_floats(s);
                memcpy(out, r.out, (size_t)(rows * s->C) * sizeof *out);
                memcpy(out + rows * s->C, r.top, (size_t)rows * sizeof *out);
                memcpy(out + rows * s->C + rows, r.total, (size_t)rows * sizeof *out);
            }
        if (partial) {
#pragma omp for schedule(static) collapse(2)
            for (int64_t i = 0; i < count; i++)
                for (int64_t head = 0; head < s->K; head++) {
                    const Block *b = &blocks[i];
                    if (b->parts == 1) continue;
                    join_parts(&r, partial + (b->partial * s->K + head) * part_floats(s), s, b);
                    store_rows_of(y, lse, &r, s, b, head);
                }
        }
        put_back_subnormals(before);
    }
}

void CPU(attention_forward)(Tensor y, Tensor lse, Tensor codes, Tensor q, Tensor k, Tensor v,
                            Tensor index, Tensor first, Tensor last, Tensor sequence,
                            Tensor pages) {
    (void)codes;
    Shape s = shape_of(q, k);
    const int32_t *from = first.data, *to = last.data;
    int64_t M = s.rows * s.group;
    if (tensor_present(pages)) {
        Block blocks[s.N];
        int64_t count = list_paged_blocks(blocks, &s, index.data, from, to, sequence.data, pages);
        paged_forward(y, lse, q, k, v, &s, blocks, count, from, to);
        return;
    }
    int64_t begins[s.N], blocks = list_blocks(begins, &s, index.data);
#pragma omp parallel
    {
        unsigned before = flush_subnormals();
        Running r = running_in(thread_scratch(running_floats(&s, M)), &s, M);
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t block = 0; block < blocks; block++)
            for (int64_t head = 0; head < s.K; head++) {
                Block b = block_at(&s, begins[block], index.data, from, to);
                attend(&r, &s, &b, head, q, k, v, b.first, b.last + 1, from, to);
                store_rows_of(y, lse, &r, &s, &b, head);
            }
        put_back_subnormals(before);
    }
}

static size_t backward_floats(const Shape *s, int64_t M) {
    return (size_t)(4 * columns_of(M) * (s->C + TILE_KEYS) + 3 * TILE_KEYS * s->C +
                    6 * columns_of(M));
}

/* What a block of queries sends to its dq, and to dk and dv of a head: dkey, dvalue (S, K, C). */
static void block_backward(const Slopes *t, const Shape *s, const Block *b, int64_t head,
                           float *dkey, float *dvalue, float *memory) {
#if LANES == 16
    if (by_tiles(t->q, t->k, t->v)) {
        CPU(amx_block_backward)(t, s, b, head, dkey, dvalue, memory);
        return;
    }
#endif
    int64_t M = (b->end - b->begin) * s->group, stride = s->K * s->C;
    float *query = memory, *dquery = query + M * s->C, *dout = dquery + M * s->C,
          *out = dout + M * s->C;
    float *keys = out + M * s->C, *keys_t = keys + TILE_KEYS * s->C,
          *values_t = keys_t + TILE_KEYS * s->C;
    float *prob = values_t + TILE_KEYS * s->C, *dscore = prob + M * TILE_KEYS,
          *delta = dscore + M * TILE_KEYS, *log_sum = delta + M;
    load_block(query, t->q, s, b, head);
    load_block(dout, t->dy, s, b, head);
    load_block(out, t->y, s, b, head);
    memset(dquery, 0, (size_t)(M * s->C) * sizeof *dquery);
    for (int64_t m = 0; m < M; m++) {
        delta[m] = dot(dout + m * s->C, out + m * s->C, s->C);
        int64_t n = b->begin + m / s->group;
        log_sum[m] = ((const float *)t->lse.data)[n * s->H + head * s->group + m % s->group];
    }
    for (int64_t key = b->first; key <= b->last; key += TILE_KEYS) {
        int64_t count = s->S - key < TILE_KEYS ? s->S - key : TILE_KEYS;
        load_keys(keys, t->v, s, head, key, count);
        turn_rows(values_t, TILE_KEYS, keys, s, count);
        load_keys(keys, t->k, s, head, key, count);
        turn_rows(keys_t, TILE_KEYS, keys, s, count);
        tile_product(M, TILE_KEYS, s->C, query, s->C, 1, keys_t, TILE_KEYS, prob, TILE_KEYS, false);
        tile_product(M, TILE_KEYS, s->C, dout, s->C, 1, values_t, TILE_KEYS, dscore, TILE_KEYS,
                     false);
        for (int64_t m = 0; m < M; m++) {
            int64_t n = b->begin + m / s->group;
            int64_t low = t->from[n] - key, high = t->to[n] - key;
            float *p = prob + m * TILE_KEYS, *ds = dscore + m * TILE_KEYS;
            for (int64_t j = 0; j < TILE_KEYS; j++) {
                p[j] = j >= low && j <= high && j < count ? fast_exp(p[j] - log_sum[m]) : 0.0f;
                ds[j] = p[j] * (ds[j] - delta[m]);
            }
        }
        tile_product(M, s->C, count, dscore, TILE_KEYS, 1, keys, s->C, dquery, s->C, true);
        tile_product(count, s->C, M, prob, 1, TILE_KEYS, dout, s->C, dvalue + key * stride, stride,
                     true);
        tile_product(count, s->C, M, dscore, 1, TILE_KEYS, query, s->C, dkey + key * stride, stride,
                     true);
    }
    store_block(t->dq, dquery, s, b, head);
}

void CPU(attention_backward)(Tensor dq, Tensor dk, Tensor dv, Write write, Tensor dy, Tensor y,
                             Tensor lse, Tensor q, Tensor k, Tensor v, Tensor index, Tensor first,
                             Tensor last, Tensor partial) {
    Shape s = shape_of(q, k);
    Slopes t = {dq, dy, y, lse, q, k, v, first.data, last.data};
    const int32_t *place = index.data;
    int64_t begins[s.N], blocks = list_blocks(begins, &s, index.data);
    int64_t groups = attention_partials(s.K), size = s.S * s.K * s.C, stride = s.K * s.C;
    float *partials = groups > 1 ? partial.data : NULL;
    if (write == SET) {
        memset(dk.data, 0, tensor_bytes(dk));
        memset(dv.data, 0, tensor_bytes(dv));
    }
#pragma omp parallel
    {
        unsigned before = flush_subnormals();
        float *memory = thread_scratch(backward_floats(&s, s.rows * s.group));
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t group = 0; group < groups; group++)
            for (int64_t head = 0; head < s.K; head++) {
                float *dkey =
                    (partials ? partials + 2 * group * size : (float *)dk.data) + head * s.C;
                float *dvalue =
                    (partials ? partials + (2 * group + 1) * size : (float *)dv.data) + head * s.C;
                if (partials)
                    for (int64_t j = 0; j < s.S; j++) {
                        memset(dkey + j * stride, 0, (size_t)s.C * sizeof *dkey);
                        memset(dvalue + j * stride, 0, (size_t)s.C * sizeof *dvalue);
                    }
                for (int64_t block = 0; block < blocks; block++) {
                    if (place[begins[block]] / s.rows % groups != group) continue;
                    Block b = block_at(&s, begins[block], place, t.from, t.to);
                    block_backward(&t, &s, &b, head, dkey, dvalue, memory);
                }
            }
        put_back_subnormals(before);
    }
    if (!partials) return;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < size; i++) {
        float sum_k = ((float *)dk.data)[i], sum_v = ((float *)dv.data)[i];
        for (int64_t group = 0; group < groups; group++) {
            sum_k += partials[2 * group * size + i];
            sum_v += partials[(2 * group + 1) * size + i];
        }
        ((float *)dk.data)[i] = sum_k;
        ((float *)dv.data)[i] = sum_v;
    }
}
