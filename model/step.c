/* step.c - loss and backward over the stack. */
#include "model/step.h"
#include "kernels/elementwise.h"
#include "kernels/embedding.h"
#include "kernels/loss.h"
#include "kernels/matmul.h"
#include "kernels/random.h"

#include <stdlib.h>
#include <string.h>

static int64_t loss_rows(const Stack *s) {
    int64_t most = s->g->device->kind == DEVICE_CUDA ? LOSS_ROWS_GPU : LOSS_ROWS;
    return s->kept < most ? s->kept : most;
}

typedef struct Step {
    Stack stack;
    const StepOptions *options;
    Tensor targets, weights, nll; /* (kept) */
    Tensor dfinal;                /* (kept, D) */
} Step;

static void step_place(Step *t, Arena *arena) {
    Stack *s = &t->stack;
    stack_place(s, arena);
    t->targets = ARENA_TENSOR(arena, I32, s->kept);
    t->weights = ARENA_TENSOR(arena, F32, s->kept);
    t->nll = ARENA_TENSOR(arena, F32, s->kept);
    if (stack_trains(s)) t->dfinal = arena_like(arena, s->final);
    int64_t L = s->g->config.num_hidden_layers, E = s->g->config.num_experts;
    if (!E) return; /* placed whoever asks, so that one plan fits all */
    Tensor counts = ARENA_TENSOR(arena, I32, L, E), probs = ARENA_TENSOR(arena, F32, L, E),
           slope = ARENA_TENSOR(arena, F32, E);
    if (!t->options->load) return;
    s->pass.load_counts = counts;
    s->pass.load_probs = probs;
    if (t->options->aux_scale != 0) s->pass.balance = slope;
}

/* Logits in chunks of rows, their loss, and at once the gradient of the head's input. */
static void loss(Step *t) {
    Stack *s = &t->stack;
    Gemma *g = s->g;
    Arena *scratch = s->pass.scratch;
    int64_t V = g->config.vocab_size, rows = loss_rows(s);
    size_t mark = arena_mark(scratch);
    Tensor logits = ARENA_TENSOR(scratch, F32, rows, V);
    Tensor dlogits = stack_trains(s) ? ARENA_TENSOR(scratch, g->dtype, rows, V) : tensor_absent();
    for (int64_t first = 0; first < s->kept && logits.data; first += rows) {
        int64_t n = s->kept - first < rows ? s->kept - first : rows;
        Tensor h = tensor_slice(s->final, first, n), z = tensor_slice(logits, 0, n),
               dz = tensor_slice(dlogits, 0, n);
        project(z, h, stack_table(s), s->pass.int8);
        cross_entropy(tensor_slice(t->nll, first, n), dz, z, tensor_slice(t->targets, first, n),
                      tensor_slice(t->weights, first, n), (float)g->config.final_logit_softcapping);
        if (t->options->logits) t->options->logits(t->options->logits_context, first, z);
        if (!stack_trains(s)) continue;
        matmul(NN, tensor_slice(t->dfinal, first, n), SET, dz, stack_table(s), 1.0f);
        if (g->embed_tokens->trainable) matmul(TN, g->embed_tokens->grad, ADD, dz, h, 1.0f);
    }
    arena_release(scratch, mark);
}

static void backward(Step *t) {
    Stack *s = &t->stack;
    Gemma *g = s->g;
    Pass *p = &s->pass;
    const PerLayerInput *ple = &g->per_layer_input;
    int L = (int)g->config.num_hidden_layers;
    size_t mark = arena_mark(p->scratch);
    Tensor dx = arena_like(p->scratch, s->final);
    bool to_embedding = gemma_trains_embedding(g);
    bool to_per_layer = ple->L && to_embedding;
    Tensor dper_layer = to_per_layer ? arena_like(p->scratch, s->per_layer.out) : tensor_absent();
    Tensor dfull =
        s->kept < s->N ? ARENA_TENSOR(p->scratch, g->dtype, s->N, g->config.hidden_size) : dx;

    norm_backward(&g->norm, dx, SET, t->dfinal, stack_input(s, L), s->final_rstd);
    if (s->boundary == L && s->kept < s->N) scatter_rows(dfull, SET, dx, s->some.source);
    for (int l = L - 1; l >= 0; l--) {
        size_t inner = arena_mark(p->scratch);
        Tensor *d = l < s->boundary ? &dfull : &dx;
        Tensor per_layer = stack_per_layer(s, l), dmine = tensor_absent(), dslice = tensor_absent();
        stack_enter(s, l);
        stack_fetch(s, l);
        if (p->scratch->base) space_need(&g->params.space, l, l - 1);
        if (to_per_layer) {
            dslice = tensor_at(dper_layer, l);
            dmine = l < s->boundary ? dslice : arena_like(p->scratch, per_layer);
        }
        if (stack_mode_recomputes(s->mode)) {
            Tensor ignored = arena_like(p->scratch, *d);
            block_forward(&g->blocks[l], &s->saved[l], ignored, stack_input(s, l), per_layer, p);
        }
        block_backward(&g->blocks[l], &s->saved[l], *d, dmine, *d, stack_input(s, l), per_layer, p);
        if (to_per_layer && l >= s->boundary) scatter_rows(dslice, SET, dmine, s->some.source);
        if (l == s->boundary && s->kept < s->N) scatter_rows(dfull, SET, dx, s->some.source);
        arena_release(p->scratch, inner);
        if (t->options->layer_done && p->scratch->base)
            t->options->layer_done(t->options->layer_context, l);
    }
    if (to_embedding) {
        p->rows = &s->all;
        if (to_per_layer)
            per_layer_input_backward(ple, &s->per_layer, dfull, dper_layer, s->residual[0], s->ids,
                                     p);
        for (int64_t i = 0; i < s->media_count && g->media.params; i++)
            if (media_trains(&g->media) && !tensor_present(s->media[i].soft))
                media_backward(&g->media, tensor_slice(dfull, s->media[i].first, s->media[i].count),
                               &s->media[i], s->mode, p);
        if (g->embed_tokens->trainable)
            embedding_backward(g->embed_tokens->grad, 0, dfull, s->ids, gemma_embedding_scale(g),
                               (int32_t)g->config.pad_token_id);
    }
    arena_release(p->scratch, mark);
}

/* `context`: of the ranks that share the rows, or NULL. */
static void step_open(Step *t, Gemma *g, const StepOptions *options, int64_t N, int64_t kept,
                      ContextPart *context, Arena *scratch) {
    CHECK(!options->logits || options->mode == STACK_SCORE, "logits of a step that trains");
    *t = (Step){.options = options};
    stack_open(&t->stack, g, options->mode, N, options->shortcut ? kept : N, NULL, scratch);
    t->stack.context = context;
    t->stack.pass.key = options->key;
    if (context && context->comm->rank)
        t->stack.pass.key = random_key(options->key, (uint64_t)context->comm->rank);
}

/* How the experts fared, and what the balancing loss makes of it: aux_scale * E * f_e / rows for
 * each probability of expert e, f_e held constant. */
static void balance(Step *t) {
    ExpertLoad *load = t->options->load;
    Pass *p = &t->stack.pass;
    if (!load || !p->load_counts.data) return;
    int64_t E = t->stack.g->config.num_experts;
    const ContextPart *context = t->stack.context;
    if (!context || context->rows[0] >= 0)
        expert_load_collect(load, p, t->stack.N);
    else
        expert_load_clear(load);
    if (context) expert_load_sum(load, context->comm);
    if (!tensor_present(p->balance)) return;
    float slope[EXPERTS_MAX];
    double rows = (double)load->rows;
    for (int64_t e = 0; e < E; e++)
        slope[e] = (float)(t->options->aux_scale * (double)E * load->counts[e] / rows / rows);
    tensor_write(p->balance, slope);
}

static void run(Step *t) {
    stack_forward(&t->stack);
    balance(t);
    t->stack.pass.load_counts = tensor_absent(); /* layers made again are not counted again */
    loss(t);
    if (stack_trains(&t->stack)) backward(t);
}

/* Rows of the longest picture. */
static int64_t longest_medium(const StepOptions *o) {
    int64_t longest = 0;
    for (int64_t i = 0; i < o->largest_count; i++)
        if (o->largest[i].count > longest) longest = o->largest[i].count;
    return longest;
}

int64_t step_own_rows(const Gemma *g, int64_t N, const StepOptions *options) {
    ContextPart x;
    if (!g->context) return N;
    context_measure(&x, g->context, &g->config, N, longest_medium(options));
    return x.N;
}

void step_measure(Gemma *g, int64_t N, int64_t kept, const StepOptions *options,
                  size_t *activations, size_t *scratch) {
    Arena place = arena_measure(), temporary = arena_measure();
    Step t;
    ContextPart x;
    if (g->context) context_measure(&x, g->context, &g->config, N, longest_medium(options));
    step_open(&t, g, options, g->context ? x.N : N, kept, g->context ? &x : NULL, &temporary);
    t.stack.media = options->largest;
    t.stack.media_count = options->largest_count;
    step_place(&t, &place);
    gemma_refresh(g, &temporary);
    run(&t);
    *activations = place.peak;
    *scratch = temporary.peak;
    stack_close(&t.stack);
}

/* Keeping every row takes the most activations; leaving some out adds gathered copies. A model that
 * trains through rounding runs without it until its start. */
void step_plan(Gemma *g, int64_t N, const StepOptions *options, size_t *activations,
               size_t *scratch) {
    float blend = g->fake.blend;
    int64_t rows = step_own_rows(g, N, options);
    *activations = *scratch = 0;
    for (int64_t kept = rows; kept >= rows - 1 && kept > 0; kept--)
        for (int on = 0; on <= (g->fake.scheme != SCHEME_NONE); on++) {
            size_t a, t;
            g->fake.blend = (float)on;
            step_measure(g, N, kept, options, &a, &t);
            if (a > *activations) *activations = a;
            if (t > *scratch) *scratch = t;
        }
    g->fake.blend = blend;
}

Status step_init(StepMemory *m, Gemma *g, int64_t N, const StepOptions *options) {
    *m = (StepMemory){0};
    size_t activations, scratch;
    step_plan(g, N, options, &activations, &scratch);
    if (options->mode == STACK_OFFLOAD)
        TRY(offload_init(&m->offload, g->device, (int)g->config.num_hidden_layers,
                         stack_offload_bytes(g, step_own_rows(g, N, options))));
    TRY(arena_init(&m->activations, g->device, activations, "the activations"));
    return arena_init(&m->scratch, g->device, scratch, "temporaries");
}

void step_free(StepMemory *m) {
    arena_free(&m->activations);
    arena_free(&m->scratch);
    if (m->offload.device) offload_free(&m->offload);
}

/* What every row of a batch sees, from its segment, its window and its span. */
static void see(const ModelConfig *c, const Batch *batch, AttentionKind kind, int32_t *first,
                int32_t *last) {
    int64_t W = c->sliding_window, span = 0;
    bool all = c->use_bidirectional_attention == BIDIRECTIONAL_ALL;
    const int32_t *ends = batch->span_ends;
    for (int64_t n = 0; n < batch->N; n++) {
        int64_t low = batch->starts[n], high = n;
        bool inside = ends && ends[n] >= 0;
        if (!inside || !n || ends[n - 1] != ends[n]) span = n; /* where its span begins */
        if (kind == SLIDING && n - W + 1 > low) low = n - W + 1;
        if (inside && (all || kind == SLIDING)) high = ends[n];
        if (inside && all && span < low) low = span;
        first[n] = (int32_t)low;
        last[n] = (int32_t)high;
    }
}

/* The rows' intervals, of those here and of those that go on. */
static void fill_rows(Stack *s, const Batch *batch) {
    for (int kind = 0; kind < ATTENTION_KINDS; kind++) {
        int32_t *index = staged(&s->inputs, s->all.index[kind]),
                *first = staged(&s->inputs, s->all.first[kind]),
                *last = staged(&s->inputs, s->all.last[kind]);
        if (s->context) {
            const ContextKeys *keys = &s->context->kinds[kind];
            memcpy(index, keys->index, (size_t)s->N * sizeof *index);
            memcpy(first, keys->first, (size_t)s->N * sizeof *first);
            memcpy(last, keys->last, (size_t)s->N * sizeof *last);
        } else {
            for (int64_t n = 0; n < s->N; n++) index[n] = (int32_t)n;
            see(&s->g->config, batch, (AttentionKind)kind, first, last);
        }
        if (s->kept == s->N) continue;
        const int32_t *source = staged(&s->inputs, s->some.source);
        int32_t *some_index = staged(&s->inputs, s->some.index[kind]),
                *some_first = staged(&s->inputs, s->some.first[kind]),
                *some_last = staged(&s->inputs, s->some.last[kind]);
        for (int64_t m = 0; m < s->kept; m++) {
            some_index[m] = index[source[m]];
            some_first[m] = first[source[m]];
            some_last[m] = last[source[m]];
        }
    }
}

/* This rank's rows of a batch that several share. */
typedef struct Part {
    ContextPart context;
    Batch batch; /* without starts and spans */
    int32_t *ids, *positions, *targets;
    float *weights;
    MediaItem *media;
} Part;

static void part_open(Part *p, const Gemma *g, const Batch *all) {
    size_t N = (size_t)all->N;
    bool *cuttable = must_malloc(N + 1);
    int32_t *first = must_malloc((N + 1) * sizeof *first),
            *last = must_malloc((N + 1) * sizeof *last);
    memset(cuttable, 1, N + 1);
    for (int64_t i = 0; i < all->media_count; i++)
        memset(cuttable + all->media[i].first + 1, 0, (size_t)all->media[i].count - 1);
    *p = (Part){0};
    context_open(&p->context, g->context, all->N, cuttable);
    for (int kind = 0; kind < ATTENTION_KINDS; kind++) {
        see(&g->config, all, (AttentionKind)kind, first, last);
        context_see(&p->context, (AttentionKind)kind, first, last);
    }
    free(cuttable), free(first), free(last);
    int64_t n = p->context.N;
    p->ids = must_malloc((size_t)n * sizeof *p->ids);
    p->positions = must_malloc((size_t)n * sizeof *p->positions);
    p->targets = must_malloc((size_t)n * sizeof *p->targets);
    p->weights = must_malloc((size_t)n * sizeof *p->weights);
    p->media = must_malloc(((size_t)all->media_count + 1) * sizeof *p->media);
    p->batch = (Batch){n, p->ids, p->positions, NULL, NULL, p->targets, p->weights, p->media, 0};
    for (int64_t i = 0, medium = 0; i < n; i++) {
        int32_t row = p->context.rows[i];
        p->ids[i] = row < 0 ? (int32_t)g->config.pad_token_id : all->ids[row];
        p->positions[i] = row < 0 ? 0 : all->positions[row];
        p->targets[i] = row < 0 ? -1 : all->targets[row];
        p->weights[i] = row < 0 ? 0 : all->weights ? all->weights[row] : 1.0f;
        while (medium < all->media_count && all->media[medium].first < row) medium++;
        if (medium == all->media_count || all->media[medium].first != row) continue;
        p->media[p->batch.media_count] = all->media[medium];
        p->media[p->batch.media_count++].first = i;
    }
}

static void part_close(Part *p) {
    context_close(&p->context);
    free(p->ids), free(p->positions), free(p->targets), free(p->weights), free(p->media);
}

/* Slots have the padding's rows of both tables, as in the reference. */
static void clear_slots(Stack *s, const Gemma *g) {
    int32_t *ids = staged(&s->inputs, s->ids);
    for (int64_t i = 0; i < s->media_count; i++)
        for (int64_t n = 0; n < s->media[i].count; n++)
            ids[s->media[i].first + n] = (int32_t)g->config.pad_token_id;
}

/* Values 0 .. count - 1 to their places among N, 0 elsewhere; source ascends. */
static void spread(float *values, int64_t N, const int32_t *source, int64_t count) {
    for (int64_t n = N - 1, k = count - 1; n >= 0; n--) {
        bool here = k >= 0 && source[k] == n;
        values[n] = here ? values[k] : 0.0f;
        if (here) k--;
    }
}

/* Runs rows that are all there are, or this rank's part of them. */
static double run_rows(Gemma *g, StepMemory *m, const Batch *batch, ContextPart *context,
                       const StepOptions *options, float *nll) {
    Step t;
    Stack *s = &t.stack;
    int64_t N = batch->N, kept = 0;
    for (int64_t n = 0; n < N; n++) kept += batch->targets[n] >= 0;
    /* Products of a few rows take another path than large ones: never fewer than 8 go on, so that a
     * row's bits do not depend on how many others have a target. */
    int64_t least = N < 8 ? N : 8, extra = kept < least ? least - kept : 0;
    step_open(&t, g, options, N, kept + extra, context, &m->scratch);
    if (m->offload.device) s->offload = &m->offload;
    m->activations.used = m->scratch.used = 0;
    step_place(&t, &m->activations);
    memcpy(staged(&s->inputs, s->ids), batch->ids, (size_t)N * sizeof(int32_t));
    memcpy(staged(&s->inputs, s->positions), batch->positions, (size_t)N * sizeof(int32_t));
    int32_t *source = staged(&s->inputs, s->some.source);
    int32_t *targets = must_malloc((size_t)s->kept * sizeof *targets);
    float *weights = must_malloc((size_t)s->kept * sizeof *weights);
    for (int64_t n = 0, k = 0; n < N; n++) {
        bool keep = s->kept == N || batch->targets[n] >= 0;
        if (!keep && extra) keep = true, extra--;
        if (!keep) continue;
        if (source) source[k] = (int32_t)n;
        targets[k] = batch->targets[n];
        weights[k] = batch->weights ? batch->weights[n] : 1.0f;
        k++;
    }
    fill_rows(s, batch);
    s->media = batch->media;
    s->media_count = batch->media_count;
    clear_slots(s, g);
    if (context) context_fill(context, &s->inputs);
    staging_send(&s->inputs);
    tensor_write(t.targets, targets);
    tensor_write(t.weights, weights);
    run(&t);
    tensor_read(nll, t.nll);
    double total = 0;
    for (int64_t k = 0; k < s->kept; k++) total += (double)nll[k] * weights[k];
    if (source) spread(nll, N, source, s->kept);
    free(targets);
    free(weights);
    stack_close(s);
    return total;
}

double step_run(Gemma *g, StepMemory *m, const Batch *batch, const StepOptions *options,
                float *nll) {
    if (!g->context) return run_rows(g, m, batch, NULL, options, nll);
    Part part;
    part_open(&part, g, batch);
    float *mine = must_malloc((size_t)part.batch.N * sizeof *mine);
    double total = run_rows(g, m, &part.batch, &part.context, options, mine);
    memset(nll, 0, (size_t)batch->N * sizeof *nll);
    for (int64_t i = 0; i < part.batch.N; i++)
        if (part.context.rows[i] >= 0) nll[part.context.rows[i]] = mine[i];
    free(mine);
    part_close(&part);
    return total;
}
