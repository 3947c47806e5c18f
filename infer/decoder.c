/* decoder.c - prefill in chunks, then one token at a time, through the stack that training uses. */
#include "infer/decoder.h"
#include "kernels/loss.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

static void place_slots(Decoder *d, Arena *arena) {
    for (int l = 0; l < d->g->config.num_hidden_layers; l++) {
        const BlockConfig *c = &d->g->blocks[l].config;
        if (!c->owns_kv) continue;
        d->slots[l].k =
            ARENA_TENSOR(arena, d->kv, d->capacity[c->kind], c->num_key_value_heads, c->head_dim);
        d->slots[l].v = arena_like(arena, d->slots[l].k);
    }
}

static void open_pass(Decoder *d, Stack *s, int64_t n) {
    stack_open(s, d->g, STACK_SCORE, n, 1, d->slots, &d->scratch);
}

/* The head of the one row that is kept. */
static void head(Decoder *d, Stack *s, float *logits) {
    Tensor z = TENSOR(logits, F32, 1, d->g->config.vocab_size);
    project(z, s->final, stack_table(s), s->pass.int8);
    softcap_forward(z, (float)d->g->config.final_logit_softcapping);
}

Status decoder_init(Decoder *d, Gemma *g, int64_t max_tokens, int64_t chunk, DType kv) {
    *d = (Decoder){.g = g, .kv = kv, .chunk = chunk < max_tokens ? chunk : max_tokens};
    int64_t W = g->config.sliding_window, more = d->chunk > W ? d->chunk : W;
    d->capacity[FULL] = max_tokens;
    d->capacity[SLIDING] = max_tokens < W + more ? max_tokens : W + more;
    for (int l = 0; l < g->config.num_hidden_layers; l++)
        if (!dtype_fits(kv, 1, g->blocks[l].config.head_dim))
            FAIL(ERR_CONFIG, "heads of %" PRId64 " numbers do not fit blocks of %s",
                 g->blocks[l].config.head_dim, dtype_name(kv));
    d->slots = must_calloc((size_t)g->config.num_hidden_layers, sizeof *d->slots);
    Arena cache = arena_measure(), activations = {0};
    place_slots(d, &cache);
    size_t most = 0, scratch = 0;
    for (int pass = 0; pass < 2; pass++) { /* a whole chunk, and one token */
        Stack s;
        activations = arena_measure();
        d->scratch = arena_measure();
        open_pass(d, &s, pass ? 1 : d->chunk);
        stack_place(&s, &activations);
        stack_forward(&s);
        stack_close(&s);
        if (activations.peak > most) most = activations.peak;
        if (d->scratch.peak > scratch) scratch = d->scratch.peak;
    }
    d->scratch = (Arena){0};
    Status status = OK;
    TRY_DONE(arena_init(&d->cache, g->device, cache.peak, "the key and value cache"));
    TRY_DONE(arena_init(&d->activations, g->device, most, "the activations"));
    TRY_DONE(arena_init(&d->scratch, g->device, scratch, "temporaries"));
    place_slots(d, &d->cache);
done:
    if (status != OK) decoder_free(d);
    return status;
}

Status kv_dtype(DType *kv, const Gemma *g, const char *name) {
    *kv = g->dtype;
    if (!name || !strcmp(name, dtype_name(g->dtype))) return OK;
    if (strcmp(name, "q8_0") && strcmp(name, "q4_0"))
        FAIL(ERR_USAGE, "--kv is '%s', expected %s, q8_0 or q4_0", name, dtype_name(g->dtype));
    *kv = strcmp(name, "q8_0") ? Q4_0 : Q8_0;
    return OK;
}

void decoder_free(Decoder *d) {
    arena_free(&d->cache);
    arena_free(&d->activations);
    arena_free(&d->scratch);
    free(d->slots);
    *d = (Decoder){0};
}

/* Makes room for n more keys in sliding slots: the last window moves to the front. */
static void slide(Decoder *d, int64_t n) {
    int64_t keep = d->g->config.sliding_window - 1, length = d->length[SLIDING];
    if (length + n <= d->capacity[SLIDING]) return;
    if (keep > length) keep = length;
    for (int l = 0; l < d->g->config.num_hidden_layers; l++) {
        const BlockConfig *c = &d->g->blocks[l].config;
        if (!c->owns_kv || c->kind != SLIDING) continue;
        Tensor parts[] = {d->slots[l].k, d->slots[l].v};
        for (int i = 0; i < 2; i++) {
            Tensor from = tensor_slice(parts[i], length - keep, keep);
            memmove(parts[i].data, from.data, tensor_bytes(from));
        }
    }
    d->length[SLIDING] = keep;
}

static void fill_rows(Decoder *d, Stack *s) {
    int64_t W = d->g->config.sliding_window;
    for (int kind = 0; kind < ATTENTION_KINDS; kind++) {
        int32_t *index = s->all.index[kind].data, *first = s->all.first[kind].data,
                *last = s->all.last[kind].data;
        for (int64_t i = 0; i < s->N; i++) {
            int64_t at = d->length[kind] + i;
            index[i] = last[i] = (int32_t)at;
            first[i] = (int32_t)(kind == SLIDING && at - W + 1 > 0 ? at - W + 1 : 0);
        }
        if (s->kept == s->N) continue;
        ((int32_t *)s->some.index[kind].data)[0] = index[s->N - 1];
        ((int32_t *)s->some.first[kind].data)[0] = first[s->N - 1];
        ((int32_t *)s->some.last[kind].data)[0] = last[s->N - 1];
    }
    if (s->kept < s->N) ((int32_t *)s->some.source.data)[0] = (int32_t)(s->N - 1);
}

void decoder_feed(Decoder *d, const int32_t *ids, int64_t n, float *logits) {
    for (int64_t done = 0; done < n;) {
        int64_t part = n - done < d->chunk ? n - done : d->chunk;
        CHECK(d->length[FULL] + part <= d->capacity[FULL], "the cache is full");
        slide(d, part);
        Stack s;
        d->activations.used = d->scratch.used = 0;
        open_pass(d, &s, part);
        stack_place(&s, &d->activations);
        for (int l = 0; l < d->g->config.num_hidden_layers; l++)
            d->slots[l].length = d->length[d->g->blocks[l].config.kind];
        memcpy(s.ids.data, ids + done, (size_t)part * sizeof *ids);
        for (int64_t i = 0; i < part; i++)
            ((int32_t *)s.positions.data)[i] = (int32_t)(d->position + i);
        fill_rows(d, &s);
        stack_forward(&s);
        done += part;
        if (done == n) head(d, &s, logits);
        stack_close(&s);
        d->length[FULL] += part;
        d->length[SLIDING] += part;
        d->position += part;
    }
}
