/* step.c - placing a step's tensors, and running it forward and back. */
#include "model/step.h"
#include "kernels/elementwise.h"
#include "kernels/embedding.h"
#include "kernels/loss.h"
#include "kernels/matmul.h"
#include "kernels/rope.h"

#include <stdlib.h>
#include <string.h>

/* Rows of logits made at a time: (128, 262144) f32 is 134 MB. */
#define LOSS_ROWS 128

typedef struct Step {
    Gemma *g;
    const StepOptions *options;
    int64_t N, kept; /* rows, and rows with a target */
    Rows all, some;  /* `some`: the rows that go on after the boundary */
    int boundary;    /* first layer that sees only `some` */
    Tensor ids, positions, targets, weights, nll;
    KvSlot *slots;
    BlockSaved *saved;   /* one a layer, or two: before and after the boundary */
    Tensor *residual;    /* input of each layer, and of the final norm */
    Tensor kept_input;   /* (kept, D): residual[boundary] of `some` */
    PerLayerInputSaved per_layer;
    Tensor final, final_rstd, dfinal; /* (kept, D) */
    Pass pass;
} Step;

static bool trains(const Step *s) { return s->options->mode != STEP_SCORE; }

void rows_reserve(Rows *rows, Arena *arena, const ModelConfig *c, int64_t count) {
    *rows = (Rows){.count = count};
    int64_t width[ATTENTION_KINDS] = {0};
    for (int l = 0; l < c->num_hidden_layers; l++) width[c->layer[l].kind] = c->layer[l].head_dim / 2;
    for (int kind = 0; kind < ATTENTION_KINDS; kind++) {
        rows->index[kind] = ARENA_TENSOR(arena, I32, count);
        rows->first[kind] = ARENA_TENSOR(arena, I32, count);
        rows->last[kind] = ARENA_TENSOR(arena, I32, count);
        if (!width[kind]) continue;
        rows->cos[kind] = ARENA_TENSOR(arena, F32, count, width[kind]);
        rows->sin[kind] = ARENA_TENSOR(arena, F32, count, width[kind]);
    }
}

void rows_rotate(Rows *rows, const ModelConfig *c, Tensor positions) {
    for (int kind = 0; kind < ATTENTION_KINDS; kind++) {
        if (!tensor_present(rows->cos[kind])) continue;
        const RopeConfig *rope = &c->rope[kind];
        int64_t half = tensor_cols(rows->cos[kind]);
        int64_t rotated = (int64_t)(rope->partial_rotary_factor * (double)(2 * half)) / 2;
        rope_table(rows->cos[kind], rows->sin[kind], positions, (float)rope->rope_theta, rotated, (float)rope->factor);
    }
}

static void reserve_slots(Step *s, Arena *arena) {
    const Gemma *g = s->g;
    bool keep = s->options->mode == STEP_KEEP;
    Tensor lent_k[ATTENTION_KINDS] = {0}, lent_v[ATTENTION_KINDS] = {0};
    Tensor lent_dk[ATTENTION_KINDS] = {0}, lent_dv[ATTENTION_KINDS] = {0};
    for (int l = 0; l < g->config.num_hidden_layers; l++) {
        const BlockConfig *c = &g->blocks[l].config;
        if (!c->owns_kv) continue;
        KvSlot *slot = &s->slots[l];
        int64_t shape[] = {s->N, c->num_key_value_heads, c->head_dim};
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
        if (!trains(s)) continue;
        if (c->kv_is_shared || !tensor_present(lent_dk[c->kind])) {
            slot->dk = arena_tensor(arena, F32, 3, shape);
            slot->dv = arena_tensor(arena, F32, 3, shape);
            if (!c->kv_is_shared) lent_dk[c->kind] = slot->dk, lent_dv[c->kind] = slot->dv;
            fill(slot->dk, 0.0f);
            fill(slot->dv, 0.0f);
        } else {
            slot->dk = lent_dk[c->kind];
            slot->dv = lent_dv[c->kind];
        }
    }
}

static void step_place(Step *s, Arena *arena) {
    Gemma *g = s->g;
    const ModelConfig *c = &g->config;
    int L = (int)c->num_hidden_layers;
    int64_t D = c->hidden_size;
    s->boundary = s->kept < s->N ? model_config_kv_layers(c) : L;
    rows_reserve(&s->all, arena, c, s->N);
    s->ids = ARENA_TENSOR(arena, I32, s->N);
    s->positions = ARENA_TENSOR(arena, I32, s->N);
    s->targets = ARENA_TENSOR(arena, I32, s->kept);
    s->weights = ARENA_TENSOR(arena, F32, s->kept);
    s->nll = ARENA_TENSOR(arena, F32, s->kept);
    s->some = s->all;
    if (s->kept < s->N) {
        rows_reserve(&s->some, arena, c, s->kept);
        s->some.source = ARENA_TENSOR(arena, I32, s->kept);
        s->kept_input = ARENA_TENSOR(arena, g->dtype, s->kept, D);
    }
    reserve_slots(s, arena);
    if (g->per_layer_input.L) per_layer_input_reserve(&s->per_layer, arena, &g->per_layer_input, g->dtype, s->N);
    for (int l = 0; l <= L; l++) {
        bool reuse = !trains(s) && l >= 2 && l != s->boundary + 1 && l != s->boundary + 2;
        int64_t n = l > s->boundary ? s->kept : s->N;
        s->residual[l] = reuse ? s->residual[l - 2] : ARENA_TENSOR(arena, g->dtype, n, D);
    }
    for (int l = 0; l < L; l++) {
        /* Blocks that share activations are of different sizes: the largest layout wins, so each lays
         * its own out from the same place. */
        if (s->options->mode != STEP_KEEP) break;
        block_reserve(&s->saved[l], arena, &g->blocks[l].config, g->dtype, l >= s->boundary ? s->kept : s->N);
    }
    if (s->options->mode != STEP_KEEP) {
        size_t start = arena->used, end = start;
        for (int l = 0; l < L; l++) {
            arena->used = start;
            block_reserve(&s->saved[l], arena, &g->blocks[l].config, g->dtype, l >= s->boundary ? s->kept : s->N);
            if (arena->used > end) end = arena->used;
        }
        arena->used = end;
    }
    s->final = ARENA_TENSOR(arena, g->dtype, s->kept, D);
    s->final_rstd = ARENA_TENSOR(arena, F32, s->kept);
    if (trains(s)) s->dfinal = ARENA_TENSOR(arena, g->dtype, s->kept, D);
}

/* The layer's input: after the boundary the rows that go on. */
static Tensor layer_input(const Step *s, int l) { return l == s->boundary && s->kept < s->N ? s->kept_input : s->residual[l]; }

/* The layer's per-layer input for the rows that reach it. */
static Tensor layer_per_layer(Step *s, int l) {
    if (!s->g->per_layer_input.L) return tensor_absent();
    Tensor slice = tensor_at(s->per_layer.out, l);
    if (l < s->boundary || s->kept == s->N) return slice;
    Tensor mine = ARENA_TENSOR(s->pass.scratch, slice.dtype, s->kept, tensor_cols(slice));
    gather_rows(mine, slice, s->some.source);
    return mine;
}

static void enter_rows(Step *s, int l) { s->pass.rows = l < s->boundary ? &s->all : &s->some; }

static void forward(Step *s) {
    Gemma *g = s->g;
    Pass *p = &s->pass;
    int L = (int)g->config.num_hidden_layers;
    p->rows = &s->all;
    rows_rotate(&s->all, &g->config, s->positions);
    if (s->kept < s->N)
        for (int kind = 0; kind < ATTENTION_KINDS; kind++) {
            if (!tensor_present(s->all.cos[kind])) continue;
            gather_rows(s->some.cos[kind], s->all.cos[kind], s->some.source);
            gather_rows(s->some.sin[kind], s->all.sin[kind], s->some.source);
        }
    embedding_forward(s->residual[0], g->embed_tokens->value, 0, s->ids, gemma_embedding_scale(g));
    if (g->per_layer_input.L) per_layer_input_forward(&g->per_layer_input, &s->per_layer, s->residual[0], s->ids, p);
    for (int l = 0; l < L; l++) {
        size_t mark = arena_mark(p->scratch);
        if (l == s->boundary && s->kept < s->N) gather_rows(s->kept_input, s->residual[l], s->some.source);
        enter_rows(s, l);
        block_forward(&g->blocks[l], &s->saved[l], s->residual[l + 1], layer_input(s, l), layer_per_layer(s, l), p);
        arena_release(p->scratch, mark);
    }
    if (s->boundary == L && s->kept < s->N) gather_rows(s->kept_input, s->residual[L], s->some.source);
    norm_forward(&g->norm, s->final, s->final_rstd, layer_input(s, L), tensor_absent());
}

/* Logits in chunks of rows, their loss, and at once the gradient of the head's input. */
static void loss(Step *s) {
    Gemma *g = s->g;
    Arena *scratch = s->pass.scratch;
    int64_t V = g->config.vocab_size, rows = s->kept < LOSS_ROWS ? s->kept : LOSS_ROWS;
    size_t mark = arena_mark(scratch);
    Tensor logits = ARENA_TENSOR(scratch, F32, rows, V);
    Tensor dlogits = trains(s) ? ARENA_TENSOR(scratch, g->dtype, rows, V) : tensor_absent();
    for (int64_t first = 0; first < s->kept && logits.data; first += rows) {
        int64_t n = s->kept - first < rows ? s->kept - first : rows;
        Tensor h = tensor_slice(s->final, first, n), z = tensor_slice(logits, 0, n), dz = tensor_slice(dlogits, 0, n);
        matmul(NT, z, SET, h, g->embed_tokens->value, 1.0f);
        cross_entropy(tensor_slice(s->nll, first, n), dz, z, tensor_slice(s->targets, first, n),
                      tensor_slice(s->weights, first, n), (float)g->config.final_logit_softcapping);
        if (!trains(s)) continue;
        matmul(NN, tensor_slice(s->dfinal, first, n), SET, dz, g->embed_tokens->value, 1.0f);
        if (g->embed_tokens->trainable) matmul(TN, g->embed_tokens->grad, ADD, dz, h, 1.0f);
    }
    arena_release(scratch, mark);
}

static void backward(Step *s) {
    Gemma *g = s->g;
    Pass *p = &s->pass;
    const PerLayerInput *ple = &g->per_layer_input;
    int L = (int)g->config.num_hidden_layers;
    size_t mark = arena_mark(p->scratch);
    Tensor dx = arena_like(p->scratch, s->final);
    bool to_embedding = gemma_trains_embedding(g);
    bool to_per_layer = ple->L && to_embedding;
    Tensor dper_layer = to_per_layer ? arena_like(p->scratch, s->per_layer.out) : tensor_absent();
    Tensor dfull = s->kept < s->N ? ARENA_TENSOR(p->scratch, g->dtype, s->N, g->config.hidden_size) : dx;

    norm_backward(&g->norm, dx, SET, s->dfinal, layer_input(s, L), s->final_rstd);
    if (s->boundary == L && s->kept < s->N) scatter_rows(dfull, SET, dx, s->some.source);
    for (int l = L - 1; l >= 0; l--) {
        size_t inner = arena_mark(p->scratch);
        Tensor *d = l < s->boundary ? &dfull : &dx;
        Tensor per_layer = layer_per_layer(s, l), dmine = tensor_absent(), dslice = tensor_absent();
        enter_rows(s, l);
        if (to_per_layer) {
            dslice = tensor_at(dper_layer, l);
            dmine = l < s->boundary ? dslice : arena_like(p->scratch, per_layer);
        }
        if (s->options->mode == STEP_RECOMPUTE) {
            Tensor ignored = arena_like(p->scratch, *d);
            block_forward(&g->blocks[l], &s->saved[l], ignored, layer_input(s, l), per_layer, p);
        }
        block_backward(&g->blocks[l], &s->saved[l], *d, dmine, *d, layer_input(s, l), per_layer, p);
        if (to_per_layer && l >= s->boundary) scatter_rows(dslice, SET, dmine, s->some.source);
        if (l == s->boundary && s->kept < s->N) scatter_rows(dfull, SET, dx, s->some.source);
        arena_release(p->scratch, inner);
    }
    if (to_embedding) {
        p->rows = &s->all;
        if (to_per_layer)
            per_layer_input_backward(ple, &s->per_layer, dfull, dper_layer, s->residual[0], s->ids, p);
        if (g->embed_tokens->trainable)
            embedding_backward(g->embed_tokens->grad, 0, dfull, s->ids, gemma_embedding_scale(g),
                               (int32_t)g->config.pad_token_id);
    }
    arena_release(p->scratch, mark);
}

static void step_open(Step *s, Gemma *g, const StepOptions *options, int64_t N, int64_t kept, Arena *scratch) {
    size_t L = (size_t)g->config.num_hidden_layers;
    *s = (Step){.g = g, .options = options, .N = N, .kept = options->shortcut ? kept : N};
    s->slots = must_calloc(L, sizeof *s->slots);
    s->saved = must_calloc(L, sizeof *s->saved);
    s->residual = must_calloc(L + 1, sizeof *s->residual);
    s->pass = (Pass){.slots = s->slots,
                     .scratch = scratch,
                     .training = options->mode != STEP_SCORE,
                     .key = options->key,
                     .load = options->load,
                     .aux_scale = options->aux_scale};
}

static void step_close(Step *s) {
    free(s->slots);
    free(s->saved);
    free(s->residual);
}

static void run(Step *s) {
    ExpertLoad *load = s->pass.load;
    if (load) {
        load->rows = 0;
        memset(load->counts, 0, sizeof load->counts);
        memset(load->probs, 0, sizeof load->probs);
        load->counting = true;
    }
    forward(s);
    if (load) load->counting = false;
    loss(s);
    if (trains(s)) backward(s);
}

void step_measure(Gemma *g, int64_t N, int64_t kept, const StepOptions *options, size_t *activations,
                  size_t *scratch) {
    Arena place = arena_measure(), temporary = arena_measure();
    Step s;
    step_open(&s, g, options, N, kept, &temporary);
    step_place(&s, &place);
    run(&s);
    *activations = place.peak;
    *scratch = temporary.peak;
    step_close(&s);
}

Status step_init(StepMemory *m, Gemma *g, int64_t N, const StepOptions *options) {
    *m = (StepMemory){0};
    size_t activations = 0, scratch = 0;
    /* Keeping every row takes the most activations; leaving some out adds gathered copies. */
    for (int64_t kept = N; kept >= N - 1 && kept > 0; kept--) {
        size_t a, t;
        step_measure(g, N, kept, options, &a, &t);
        if (a > activations) activations = a;
        if (t > scratch) scratch = t;
    }
    TRY(arena_init(&m->activations, g->device, activations, "the activations"));
    TRY(arena_init(&m->scratch, g->device, scratch, "temporaries"));
    return OK;
}

void step_free(StepMemory *m) {
    arena_free(&m->activations);
    arena_free(&m->scratch);
}

/* What every row sees, from its segment, its window and its span. */
static void fill_rows(Step *s, const Batch *batch) {
    int64_t W = s->g->config.sliding_window;
    for (int kind = 0; kind < ATTENTION_KINDS; kind++) {
        int32_t *index = s->all.index[kind].data, *first = s->all.first[kind].data, *last = s->all.last[kind].data;
        for (int64_t n = 0; n < s->N; n++) {
            int64_t low = batch->starts[n], high = n;
            if (kind == SLIDING) {
                if (n - W + 1 > low) low = n - W + 1;
                if (batch->span_ends && batch->span_ends[n] > high) high = batch->span_ends[n];
            }
            index[n] = (int32_t)n;
            first[n] = (int32_t)low;
            last[n] = (int32_t)high;
        }
        if (s->kept == s->N) continue;
        const int32_t *source = s->some.source.data;
        for (int64_t m = 0; m < s->kept; m++) {
            ((int32_t *)s->some.index[kind].data)[m] = index[source[m]];
            ((int32_t *)s->some.first[kind].data)[m] = first[source[m]];
            ((int32_t *)s->some.last[kind].data)[m] = last[source[m]];
        }
    }
}

double step_run(Gemma *g, StepMemory *m, const Batch *batch, const StepOptions *options, float *nll) {
    Step s;
    int64_t N = batch->N, kept = 0;
    for (int64_t n = 0; n < N; n++) kept += batch->targets[n] >= 0;
    /* Products of a few rows take another path than large ones: never fewer than 8 go on, so that a row's
     * bits do not depend on how many others have a target. */
    int64_t least = N < 8 ? N : 8, extra = kept < least ? least - kept : 0;
    step_open(&s, g, options, N, kept + extra, &m->scratch);
    m->activations.used = m->scratch.used = 0;
    step_place(&s, &m->activations);
    memcpy(s.ids.data, batch->ids, (size_t)N * sizeof(int32_t));
    memcpy(s.positions.data, batch->positions, (size_t)N * sizeof(int32_t));
    int32_t *source = s.some.source.data;
    for (int64_t n = 0, k = 0; n < N; n++) {
        bool keep = s.kept == N || batch->targets[n] >= 0;
        if (!keep && extra) keep = true, extra--;
        if (!keep) continue;
        if (source) source[k] = (int32_t)n;
        ((int32_t *)s.targets.data)[k] = batch->targets[n];
        ((float *)s.weights.data)[k] = batch->weights ? batch->weights[n] : 1.0f;
        k++;
    }
    fill_rows(&s, batch);
    run(&s);
    double total = 0;
    memset(nll, 0, (size_t)N * sizeof *nll);
    for (int64_t k = 0; k < s.kept; k++) {
        float value = ((float *)s.nll.data)[k];
        nll[source ? source[k] : k] = value;
        total += (double)value * ((float *)s.weights.data)[k];
    }
    step_close(&s);
    return total;
}
