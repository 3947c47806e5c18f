/* drafter.c - opening an assistant, and its steps. */
#include "infer/drafter.h"
#include "kernels/elementwise.h"
#include "kernels/embedding.h"
#include "kernels/sampling.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* The layer of the target whose keys a layer of that kind reads: the last that owns some. */
static int lender(const Gemma *target, AttentionKind kind) {
    for (int l = (int)target->config.num_hidden_layers - 1; l >= 0; l--)
        if (target->blocks[l].config.owns_kv && target->blocks[l].config.kind == kind) return l;
    return -1;
}

static Status check_fit(Drafter *d, const char *dir) {
    const ModelConfig *c = &d->g.config, *t = &d->target->config;
    if (!c->assistant)
        FAIL(ERR_CONFIG, "%s: model_type is '%s', expected gemma4_assistant", dir, c->model_type);
    if (c->backbone_hidden_size != t->hidden_size || c->vocab_size != t->vocab_size)
        FAIL(ERR_CONFIG,
             "%s: made for a model of hidden_size %" PRId64 " and %" PRId64
             " tokens, this one has %" PRId64 " and %" PRId64,
             dir, c->backbone_hidden_size, c->vocab_size, t->hidden_size, t->vocab_size);
    for (int l = 0; l < c->num_hidden_layers; l++) {
        Block *b = &d->g.blocks[l];
        int from = lender(d->target, b->config.kind);
        const BlockConfig *lent = from < 0 ? NULL : &d->target->blocks[from].config;
        if (!lent || lent->head_dim != b->config.head_dim ||
            b->config.num_attention_heads % lent->num_key_value_heads)
            FAIL(ERR_CONFIG, "%s: layer %d does not fit the keys of the model", dir, l);
        b->config.kv_layer = b->self_attn.config.kv_layer = from;
    }
    return OK;
}

static Status read_ordering(Drafter *d, const char *dir) {
    const ModelConfig *c = &d->g.config;
    const StoredTensor *stored = NULL;
    if (!c->num_centroids) return OK;
    for (int i = 0; i < d->checkpoint.count; i++)
        if (d->checkpoint.tensors[i].role == ROLE_ORDER) stored = d->checkpoint.tensors[i].stored;
    if (!stored || strcmp(stored->dtype_text, "I64") ||
        stored->size != (size_t)c->vocab_size * sizeof(int64_t))
        FAIL(ERR_FORMAT, "%s: %s is missing, or not one I64 for each token", dir, TOKEN_ORDERING);
    d->ordering = must_malloc((size_t)c->vocab_size * sizeof *d->ordering);
    for (int64_t i = 0; i < c->vocab_size; i++) {
        int64_t id;
        memcpy(&id, stored->bytes + (size_t)i * sizeof id, sizeof id);
        if (id < 0 || id >= c->vocab_size)
            FAIL(ERR_FORMAT, "%s: %s names token %" PRId64, dir, TOKEN_ORDERING, id);
        d->ordering[i] = (int32_t)id;
    }
    return OK;
}

Status drafter_open(Drafter *d, const char *dir, const Gemma *target) {
    *d = (Drafter){.target = target};
    Status status = OK;
    TRY_DONE(checkpoint_open(&d->checkpoint, dir));
    gemma_declare(&d->g, &d->checkpoint.config, target->dtype, target->device);
    d->g.int8 = target->int8;
    TRY_DONE(check_fit(d, dir));
    checkpoint_formats(&d->checkpoint, &d->g);
    TRY_DONE(params_place(&d->g.params, target->device, false));
    TRY_DONE(checkpoint_load(&d->checkpoint, &d->g));
    TRY_DONE(read_ordering(d, dir));
done:
    if (status != OK) drafter_close(d);
    return status;
}

void drafter_close(Drafter *d) {
    arena_free(&d->activations);
    arena_free(&d->scratch);
    if (d->g.device) gemma_free(&d->g);
    checkpoint_close(&d->checkpoint);
    free(d->ordering);
    *d = (Drafter){0};
}

/* ---- a step ---- */

/* The input of the first layer: the token's embedding and the state, side by side, projected. */
static void enter(Drafter *d, Stack *s, Tensor hidden) {
    Arena *scratch = s->pass.scratch;
    size_t mark = arena_mark(scratch);
    int64_t n = s->N, width = d->g.config.backbone_hidden_size;
    Tensor pair = ARENA_TENSOR(scratch, hidden.dtype, 2, n, width),
           both = ARENA_TENSOR(scratch, hidden.dtype, n, 2, width);
    embedding_forward(tensor_at(pair, 0), d->target->embed_tokens->value, 0, s->ids,
                      gemma_embedding_scale(d->target));
    tensor_copy(tensor_at(pair, 1), hidden);
    swap_outer(both, pair);
    linear_forward(&d->g.pre_projection, s->residual[0], RESHAPE(both, n, 2 * width), &s->pass);
    arena_release(scratch, mark);
}

/* The best token of each row, over all of them. */
static void guess_all(Drafter *d, Stack *s, int32_t *out) {
    Arena *scratch = s->pass.scratch;
    size_t mark = arena_mark(scratch);
    Tensor z = ARENA_TENSOR(scratch, F32, s->N, d->g.config.vocab_size),
           value = ARENA_TENSOR(scratch, F32, s->N, 1), id = ARENA_TENSOR(scratch, I32, s->N, 1),
           lse = ARENA_TENSOR(scratch, F32, s->N, 2), scale = ARENA_TENSOR(scratch, F32, s->N);
    project(z, s->final, d->g.embed_tokens->value, s->pass.int8);
    fill(scale, 1.0f);
    top_logits(value, id, lse, z, scale);
    tensor_read(out, id);
    arena_release(scratch, mark);
}

/* The best token among those of the nearest centroids. */
static void guess_near(Drafter *d, Stack *s, int32_t *out) {
    const ModelConfig *c = &d->g.config;
    Arena *scratch = s->pass.scratch;
    size_t mark = arena_mark(scratch);
    int64_t top = c->centroid_intermediate_top_k, each = c->vocab_size / c->num_centroids,
            many = top * each;
    Tensor z = ARENA_TENSOR(scratch, F32, s->N, c->num_centroids),
           value = ARENA_TENSOR(scratch, F32, s->N, top),
           near = ARENA_TENSOR(scratch, I32, s->N, top), lse = ARENA_TENSOR(scratch, F32, s->N, 2),
           scale = ARENA_TENSOR(scratch, F32, s->N), ids = ARENA_TENSOR(scratch, I32, many),
           table = ARENA_TENSOR(scratch, d->g.dtype, many, c->hidden_size),
           scores = ARENA_TENSOR(scratch, F32, 1, many), best = ARENA_TENSOR(scratch, F32, 1, 1),
           place = ARENA_TENSOR(scratch, I32, 1, 1);
    linear_forward(&d->g.centroids, z, s->final, &s->pass);
    fill(scale, 1.0f);
    top_logits(value, near, lse, z, scale);
    int32_t nearest[s->N * top], best_place = 0;
    memset(nearest, 0, sizeof nearest);
    tensor_read(nearest, near);
    for (int64_t n = 0; n < s->N; n++) {
        for (int64_t k = 0; k < top; k++)
            tensor_write(tensor_slice(ids, k * each, each),
                         d->ordering + nearest[n * top + k] * each);
        embedding_forward(table, d->g.embed_tokens->value, 0, ids, 1.0f);
        project(scores, tensor_slice(s->final, n, 1), table, false);
        top_logits(best, place, tensor_slice(lse, n, 1), scores, tensor_slice(scale, n, 1));
        tensor_read(&best_place, place);
        out[n] = d->ordering[nearest[n * top + best_place / each] * each + best_place % each];
    }
    arena_release(scratch, mark);
}

static void fill_step(Stack *s, const DraftRow *rows) {
    const Staging *in = &s->inputs;
    int32_t *ids = staged(in, s->ids), *positions = staged(in, s->positions),
            *sequence = staged(in, s->all.sequence);
    for (int64_t i = 0; i < s->N; i++) {
        const DraftRow *r = &rows[i];
        ids[i] = r->token;
        positions[i] = (int32_t)r->position;
        sequence[i] = (int32_t)i;
        for (int kind = 0; kind < ATTENTION_KINDS; kind++) {
            int64_t columns = tensor_cols(s->all.pages[kind]);
            int32_t *index = staged(in, s->all.index[kind]), *last = staged(in, s->all.last[kind]),
                    *first = staged(in, s->all.first[kind]),
                    *pages = staged(in, s->all.pages[kind]);
            index[i] = (int32_t)r->position;
            last[i] = (int32_t)(r->position - 1);
            first[i] = (int32_t)(kind == SLIDING ? r->sliding_first : 0);
            memcpy(pages + i * columns, r->pages[kind], (size_t)r->page_count * sizeof *pages);
        }
    }
    staging_send(in);
}

/* One step of n rows; `rows` NULL: only measured. */
static void step(Drafter *d, const KvCache *cache, const DraftRow *rows, int64_t n, Tensor hidden,
                 int32_t *out, Arena *activations, Arena *scratch) {
    Stack s;
    stack_open(&s, &d->g, STACK_SCORE, n, n, cache, scratch);
    stack_place(&s, activations);
    if (rows) fill_step(&s, rows);
    stack_begin(&s);
    enter(d, &s, hidden);
    stack_layers(&s);
    s.pass.rows = &s.all;
    if (d->g.config.num_centroids)
        guess_near(d, &s, out);
    else
        guess_all(d, &s, out);
    linear_forward(&d->g.post_projection, hidden, s.final, &s.pass);
    stack_close(&s);
}

Status drafter_reserve(Drafter *d, int64_t rows, const KvCache *cache) {
    size_t activations = 0, scratch = 0;
    int32_t ignored[1];
    d->rows = rows;
    for (int64_t n = 1; n <= rows; n = n < rows && 2 * n > rows ? rows : 2 * n) {
        Arena place = arena_measure(), temporary = arena_measure();
        Tensor hidden = ARENA_TENSOR(&place, d->g.dtype, n, d->g.config.backbone_hidden_size);
        step(d, cache, NULL, n, hidden, ignored, &place, &temporary);
        if (place.peak > activations) activations = place.peak;
        if (temporary.peak > scratch) scratch = temporary.peak;
    }
    TRY(arena_init(&d->activations, d->g.device, activations, "the drafter's activations"));
    return arena_init(&d->scratch, d->g.device, scratch, "the drafter's temporaries");
}

void drafter_guess(Drafter *d, KvSlot *slots, const DraftRow *rows, int64_t n, int64_t steps,
                   Tensor hidden, int32_t *out) {
    DraftRow now[n];
    int32_t ids[n];
    KvCache cache = {slots, n, 1};
    CHECK(n <= d->rows && steps <= DRAFT_MAX, "drafter rows");
    memcpy(now, rows, sizeof now);
    for (int64_t i = 0; i < n; i++)
        if (rows[i].page_count > cache.pages) cache.pages = rows[i].page_count;
    for (int64_t k = 0; k < steps; k++) {
        d->activations.used = d->scratch.used = 0;
        step(d, &cache, now, n, hidden, ids, &d->activations, &d->scratch);
        for (int64_t i = 0; i < n; i++) now[i].token = out[i * steps + k] = ids[i];
    }
}
