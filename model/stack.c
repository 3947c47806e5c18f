/* stack.c - placing the tensors of a pass, and running it forward. */
#include "model/stack.h"
#include "kernels/elementwise.h"
#include "kernels/embedding.h"
#include "kernels/matmul.h"
#include "kernels/rope.h"

#include <stdlib.h>
#include <string.h>

void stack_open(Stack *s, Gemma *g, StackMode mode, int64_t N, int64_t kept, const KvCache *cache,
                Arena *scratch) {
    size_t L = (size_t)g->config.num_hidden_layers;
    *s = (Stack){.g = g, .mode = mode, .N = N, .kept = kept, .cache = cache};
    s->slots = cache ? cache->slots : must_calloc(L, sizeof *s->slots);
    s->saved = must_calloc(L, sizeof *s->saved);
    s->residual = must_calloc(L + 1, sizeof *s->residual);
    s->pass = (Pass){.slots = s->slots,
                     .experts = g->experts,
                     .scratch = scratch,
                     .training = mode != STACK_SCORE,
                     .int8 = g->int8 && mode == STACK_SCORE};
}

void stack_close(Stack *s) {
    if (!s->cache) free(s->slots);
    free(s->saved);
    free(s->residual);
}

/* The integers of some rows. */
static void rows_reserve(Rows *rows, Arena *arena, const KvCache *cache, int64_t count) {
    *rows = (Rows){.count = count};
    for (int kind = 0; kind < ATTENTION_KINDS; kind++) {
        rows->index[kind] = ARENA_TENSOR(arena, I32, count);
        rows->first[kind] = ARENA_TENSOR(arena, I32, count);
        rows->last[kind] = ARENA_TENSOR(arena, I32, count);
    }
    if (cache) rows->sequence = ARENA_TENSOR(arena, I32, count);
}

/* Where the cache has the keys of all rows, and takes their own. */
static void rows_reserve_pages(Rows *rows, Arena *arena, const KvCache *cache) {
    for (int kind = 0; kind < ATTENTION_KINDS; kind++) {
        rows->pages[kind] = ARENA_TENSOR(arena, I32, cache->sequences, cache->pages);
        rows->place[kind] = ARENA_TENSOR(arena, I32, rows->count);
    }
}

/* What their positions turn heads by. */
static void rows_reserve_angles(Rows *rows, Arena *arena, const ModelConfig *c) {
    int64_t width[ATTENTION_KINDS] = {0};
    for (int l = 0; l < c->num_hidden_layers; l++)
        width[c->layer[l].kind] = c->layer[l].head_dim / 2;
    for (int kind = 0; kind < ATTENTION_KINDS; kind++) {
        if (!width[kind]) continue;
        rows->cos[kind] = ARENA_TENSOR(arena, F32, rows->count, width[kind]);
        rows->sin[kind] = ARENA_TENSOR(arena, F32, rows->count, width[kind]);
    }
}

/* Everything the caller fills, in one run. */
static void reserve_inputs(Stack *s, Arena *arena) {
    staging_begin(&s->inputs, arena);
    s->ids = ARENA_TENSOR(arena, I32, s->N);
    s->positions = ARENA_TENSOR(arena, I32, s->N);
    rows_reserve(&s->all, arena, s->cache, s->N);
    if (s->cache) rows_reserve_pages(&s->all, arena, s->cache);
    s->some = s->all;
    if (s->kept < s->N) {
        rows_reserve(&s->some, arena, s->cache, s->kept);
        memcpy(s->some.pages, s->all.pages, sizeof s->all.pages);
        s->some.source = ARENA_TENSOR(arena, I32, s->kept);
    }
    if (s->context) context_reserve(s->context, arena);
    staging_end(&s->inputs);
}

static void rows_rotate(Rows *rows, const ModelConfig *c, Tensor positions) {
    for (int kind = 0; kind < ATTENTION_KINDS; kind++) {
        if (!tensor_present(rows->cos[kind])) continue;
        const RopeConfig *rope = &c->rope[kind];
        int64_t half = tensor_cols(rows->cos[kind]);
        int64_t rotated = (int64_t)(rope->partial_rotary_factor * (double)(2 * half)) / 2;
        rope_table(rows->cos[kind], rows->sin[kind], positions, (float)rope->rope_theta, rotated,
                   (float)rope->factor);
    }
}

static void reserve_slots(Stack *s, Arena *arena) {
    const Gemma *g = s->g;
    bool keep = s->mode == STACK_KEEP;
    Tensor lent_k[ATTENTION_KINDS] = {0}, lent_v[ATTENTION_KINDS] = {0};
    Tensor lent_dk[ATTENTION_KINDS] = {0}, lent_dv[ATTENTION_KINDS] = {0};
    for (int l = 0; l < g->config.num_hidden_layers; l++) {
        const BlockConfig *c = &g->blocks[l].config;
        if (!c->owns_kv) continue;
        KvSlot *slot = &s->slots[l];
        int64_t keys = s->context ? s->context->kinds[c->kind].keys : s->N,
                shape[] = {keys, c->num_key_value_heads, c->head_dim};
        /* Only slots that later layers read, or the backward pass needs, are their layer's own. */
        bool own = c->kv_is_shared || keep;
        if (own || !tensor_present(lent_k[c->kind])) {
            slot->k = arena_tensor(arena, g->dtype, 3, shape);
            slot->v = arena_tensor(arena, g->dtype, 3, shape);
            if (!own) lent_k[c->kind] = slot->k, lent_v[c->kind] = slot->v;
        } else {
            slot->k = lent_k[c->kind];
            slot->v = lent_v[c->kind];
        }
        if (!stack_trains(s)) continue;
        if (c->kv_is_shared || !tensor_present(lent_dk[c->kind])) {
            slot->dk = arena_tensor(arena, F32, 3, shape);
            slot->dv = arena_tensor(arena, F32, 3, shape);
            if (!c->kv_is_shared) lent_dk[c->kind] = slot->dk, lent_dv[c->kind] = slot->dv;
        } else {
            slot->dk = lent_dk[c->kind];
            slot->dv = lent_dv[c->kind];
        }
    }
}

/* Inputs of layers that have their own memory, where the rest wait in the host's: the one that is
 * read, the one that is made or used before, and the one that is copied. */
#define RING 3

/* Whether residual[l]'s memory is taken by a later layer's of as many rows before the way back. */
static bool is_offloaded(const Stack *s, int l) {
    int L = (int)s->g->config.num_hidden_layers, end = l <= s->boundary ? s->boundary : L;
    return s->mode == STACK_OFFLOAD && l + RING <= end;
}

/* The layer whose input's memory residual[l] takes over; -1: none. */
static int lender(const Stack *s, int l) {
    if (stack_trains(s)) return l >= RING && is_offloaded(s, l - RING) ? l - RING : -1;
    return l >= 2 && l != s->boundary + 1 && l != s->boundary + 2 ? l - 2 : -1;
}

/* For the widest input of a product, where kernels make codes on the way. */
static Tensor codes_room(const Gemma *g, Arena *arena, int64_t N) {
    int64_t widest = 0;
    for (const Linear *l = g->linears.first; l; l = l->next)
        if (l->in > widest && !l->weight->tower) widest = l->in;
    int64_t bytes = int8_codes(g->device, N, (widest + TILE_WIDTH - 1) / TILE_WIDTH * TILE_WIDTH);
    return bytes ? ARENA_TENSOR(arena, U8, bytes) : tensor_absent();
}

void stack_place(Stack *s, Arena *arena) {
    Gemma *g = s->g;
    const ModelConfig *c = &g->config;
    int L = (int)c->num_hidden_layers;
    int64_t D = c->hidden_size;
    s->boundary = s->kept < s->N ? model_config_kv_layers(c) : L;
    s->pass.context = s->context;
    reserve_inputs(s, arena);
    rows_reserve_angles(&s->all, arena, c);
    if (s->kept < s->N)
        rows_reserve_angles(&s->some, arena, c);
    else
        s->some = s->all;
    if (g->fake.embeddings && fake_quant_fits(&g->fake, D))
        s->rounded_table = ARENA_TENSOR(arena, g->dtype, c->vocab_size, D);
    if (s->kept < s->N) s->kept_input = ARENA_TENSOR(arena, g->dtype, s->kept, D);
    if (!s->cache) reserve_slots(s, arena);
    if (g->per_layer_input.L)
        per_layer_input_reserve(&s->per_layer, arena, &g->per_layer_input, g->dtype, s->N);
    for (int l = 0; l <= L; l++) {
        int from = lender(s, l);
        int64_t n = l > s->boundary ? s->kept : s->N;
        s->residual[l] = from >= 0 ? s->residual[from] : ARENA_TENSOR(arena, g->dtype, n, D);
    }
    for (int l = 0; l < L; l++) {
        if (s->mode != STACK_KEEP) break;
        block_reserve(&s->saved[l], arena, &g->blocks[l].config, g->dtype,
                      l >= s->boundary ? s->kept : s->N);
    }
    if (s->mode != STACK_KEEP) { /* one place for all: each lays itself out from its start */
        size_t start = arena->used, end = start;
        for (int l = 0; l < L; l++) {
            arena->used = start;
            block_reserve(&s->saved[l], arena, &g->blocks[l].config, g->dtype,
                          l >= s->boundary ? s->kept : s->N);
            if (arena->used > end) end = arena->used;
        }
        arena->used = end;
    }
    for (Linear *l = g->linears.first; l && stack_trains(s); l = l->next)
        if (!l->weight->tower) linear_keep(l, arena, s->N);
    if (!stack_trains(s)) s->normed = ARENA_TENSOR(arena, g->dtype, s->N, D);
    if (s->pass.int8) s->pass.codes_room = codes_room(g, arena, s->N);
    s->final = ARENA_TENSOR(arena, g->dtype, s->kept, D);
    s->final_rstd = ARENA_TENSOR(arena, F32, s->kept);
}

Tensor stack_table(const Stack *s) {
    return gemma_rounds_embedding(s->g) ? s->rounded_table : s->g->embed_tokens->value;
}

/* The layer's input: after the boundary the rows that go on. */
Tensor stack_input(const Stack *s, int l) {
    return l == s->boundary && s->kept < s->N ? s->kept_input : s->residual[l];
}

/* The layer's per-layer input for the rows that reach it. */
Tensor stack_per_layer(Stack *s, int l) {
    if (!s->g->per_layer_input.L) return tensor_absent();
    Tensor slice = tensor_at(s->per_layer.out, l);
    if (l < s->boundary || s->kept == s->N) return slice;
    Tensor mine = ARENA_TENSOR(s->pass.scratch, slice.dtype, s->kept, tensor_cols(slice));
    gather_rows(mine, slice, s->some.source);
    return mine;
}

void stack_enter(Stack *s, int l) {
    s->pass.rows = l < s->boundary ? &s->all : &s->some;
}

void stack_begin(Stack *s) {
    s->pass.rows = &s->all;
    rows_rotate(&s->all, &s->g->config, s->positions);
    if (s->kept == s->N) return;
    for (int kind = 0; kind < ATTENTION_KINDS; kind++) {
        if (!tensor_present(s->all.cos[kind])) continue;
        gather_rows(s->some.cos[kind], s->all.cos[kind], s->some.source);
        gather_rows(s->some.sin[kind], s->all.sin[kind], s->some.source);
    }
}

static void embed(Stack *s) {
    Gemma *g = s->g;
    if (gemma_rounds_embedding(g))
        fake_quantize(s->rounded_table, g->embed_tokens->value, tensor_absent(), g->fake.scheme,
                      g->fake.blend);
    embedding_forward(s->residual[0], stack_table(s), 0, s->ids, gemma_embedding_scale(g));
    for (int64_t i = 0; i < s->media_count; i++) {
        const MediaItem *item = &s->media[i];
        Tensor rows = tensor_slice(s->residual[0], item->first, item->count);
        if (tensor_present(item->soft))
            tensor_copy(rows, item->soft);
        else
            media_forward(&g->media, rows, item, &s->pass);
    }
    if (g->per_layer_input.L)
        per_layer_input_forward(&g->per_layer_input, &s->per_layer, s->residual[0], s->ids,
                                &s->pass);
}

/* residual[l] has been made: a copy of it leaves. */
static void put_away(Stack *s, int l) {
    if (s->offload && is_offloaded(s, l)) offload_store(s->offload, l, s->residual[l]);
}

void stack_fetch(Stack *s, int l) {
    if (!s->offload) return;
    if (is_offloaded(s, l)) offload_wait(s->offload, l);
    if (l && is_offloaded(s, l - 1)) offload_fetch(s->offload, l - 1, s->residual[l - 1]);
}

/* The norm that layer l begins with; behind the last one the final one. */
static const Norm *norm_before(const Stack *s, int l) {
    bool last = l == s->g->config.num_hidden_layers;
    return last ? &s->g->norm : &s->g->blocks[l].input_layernorm;
}

/* Whether layer l reads what the one before it leaves as it is: its own rows, and no weights that
 * are still to come. */
static bool follows_at_once(const Stack *s, int l) {
    bool gathers = l == s->boundary && s->kept < s->N;
    return !stack_trains(s) && !gathers && s->g->params.space.level < 3;
}

void stack_layers(Stack *s) {
    Gemma *g = s->g;
    Pass *p = &s->pass;
    int L = (int)g->config.num_hidden_layers;
    put_away(s, 0);
    for (int l = 0; l < L; l++) {
        size_t mark = arena_mark(p->scratch);
        if (s->offload && lender(s, l + 1) >= 0) offload_wait(s->offload, lender(s, l + 1));
        if (l == s->boundary && s->kept < s->N)
            gather_rows(s->kept_input, s->residual[l], s->some.source);
        stack_enter(s, l);
        if (p->scratch->base) space_need(&g->params.space, l, l + 1 < L ? l + 1 : -1);
        p->next = follows_at_once(s, l + 1) ? norm_before(s, l + 1) : NULL;
        p->reader = l + 1 < L ? &g->blocks[l + 1].self_attn.q_proj : NULL;
        p->leaving =
            l + 1 == L ? s->final : tensor_slice(s->normed, 0, l < s->boundary ? s->N : s->kept);
        block_forward(&g->blocks[l], &s->saved[l], s->residual[l + 1], stack_input(s, l),
                      stack_per_layer(s, l), p);
        arena_release(p->scratch, mark);
        put_away(s, l + 1);
        if (g->watch.done && s->pass.scratch->base) g->watch.done(g->watch.context, l);
    }
    if (s->boundary == L && s->kept < s->N)
        gather_rows(s->kept_input, s->residual[L], s->some.source);
    if (!p->is_entered) /* else the last layer has made it */
        norm_forward(&g->norm, s->final, s->final_rstd, stack_input(s, L), tensor_absent());
    p->is_entered = false;
}

void stack_forward(Stack *s) {
    stack_begin(s);
    embed(s);
    stack_layers(s);
}
