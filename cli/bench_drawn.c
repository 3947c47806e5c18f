/* bench_drawn.c - training steps and decoding of a released shape, without any file. */
#include "cli/bench_drawn.h"
#include "formats/initial.h"
#include "infer/engine.h"
#include "kernels/attention.h"
#include "kernels/elementwise.h"
#include "kernels/random.h"
#include "model/cost.h"
#include "model/step.h"
#include "optim/optimizer.h"
#include "train/adapt.h"

#include <inttypes.h>
#include <math.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define STEPS 5

/* A declared model of the preset; its per-layer table is on the device with the rest. */
static Status declare(Gemma *g, const DrawnBench *b) {
    ModelConfig config;
    Device *device;
    char *json = preset_config(b->preset, b->layers);
    if (!json) FAIL(ERR_USAGE, "'%s' is no preset (tiny, e2b, e4b, 12b, 26b-a4b, 31b)", b->preset);
    Status status = model_config_parse(&config, json, strlen(json), b->preset);
    free(json);
    TRY(status);
    TRY(device_open(&device, b->device));
    gemma_declare(g, &config, BF16, device);
    for (int i = 0; i < g->params.count; i++) g->params.items[i]->mapped = false;
    return OK;
}

static Status pack(Gemma *g, const char *weights) {
    bool four = !strcmp(weights, "q4_0");
    if (!strcmp(weights, "bf16")) return OK;
    if (!four && strcmp(weights, "q8_0"))
        FAIL(ERR_USAGE, "--weights %s, expected bf16, q4_0 or q8_0", weights);
    for (int i = 0; i < g->params.count; i++) {
        Param *p = g->params.items[i];
        DType dtype = four ? Q4_0_TILED : Q8_0_TILED;
        if (param_takes_blocks(p) &&
            dtype_fits(dtype, tensor_rows(p->value), tensor_cols(p->value)))
            p->value.dtype = dtype;
    }
    g->int8 = true;
    return OK;
}

int32_t *bench_random_ids(const Gemma *g, int64_t n) {
    int32_t *ids = must_malloc((size_t)n * sizeof *ids);
    for (int64_t i = 0; i < n; i++)
        ids[i] = (int32_t)(3 + random_u64(9, (uint64_t)i) % (uint64_t)(g->config.vocab_size - 3));
    return ids;
}

double bench_bytes_a_token(const Gemma *g) {
    double bytes = 0;
    for (int i = 0; i < g->params.count; i++) {
        const Param *p = g->params.items[i];
        if (p->adapter || strstr(p->name, "embed_tokens_per_layer")) continue;
        double size = (double)tensor_bytes(p->value);
        if (p->value.ndim == 3)
            size *= (double)g->config.top_k_experts / (double)g->config.num_experts;
        bytes += size;
    }
    return bytes;
}

/* ---- training ---- */

static Status method_of(RunConfig *config, const DrawnBench *b) {
    char *text = must_format("model: drawn\noutput: none\ndata: {train: none.jsonl}\nmethod: %s\n",
                             b->train);
    char *rank = must_format("lora.rank=%" PRId64, b->rank);
    Status status = run_config_parse(config, text, "bench", &rank, strcmp(b->train, "full") != 0);
    free(text);
    free(rank);
    return status;
}

/* Updates on the way back, when training is lean. */
typedef struct Lean {
    Gemma *g;
    Optimizer *o;
} Lean;

static void update_layer(void *context, int layer) {
    Lean *l = context;
    optimizer_update(l->o, &l->g->params, layer, 1e-5, 1.0);
    if (layer >= 0) fill(l->g->params.space.layer_grads[0], 0.0f);
}

/* The fastest of a few steps, after one that makes plans. */
static void time_steps(Gemma *g, StepMemory *memory, Optimizer *o, const StepOptions *options,
                       const Batch *batch, float *nll, double *seconds, double *loss) {
    *seconds = 1e9;
    for (int i = 0; i <= STEPS; i++) {
        double start = omp_get_wtime();
        gradients_zero(&g->params);
        if (options->layer_done) optimizer_begin(o);
        *loss = step_run(g, memory, batch, options, nll);
        if (options->layer_done) {
            update_layer(options->layer_context, -1);
        } else {
            (void)gradients_norm(&g->params);
            optimizer_step(o, &g->params, 1e-5, 1.0);
        }
        float one;
        tensor_read(&one, tensor_slice(g->params.space.grads, 0, 1)); /* all of it is done */
        if (i && omp_get_wtime() - start < *seconds) *seconds = omp_get_wtime() - start;
    }
}

/* What training takes. */
typedef struct Plan {
    ParamBytes params;
    size_t states, activations, temporaries, total;
} Plan;

static Plan plan_of(Gemma *g, int64_t tokens, StackMode mode, const OptimizerConfig *adam) {
    StepOptions options = {.mode = mode, .shortcut = true};
    Plan p = {.params = params_bytes(&g->params)};
    p.states = optimizer_measure(adam, p.params.own);
    step_plan(g, tokens, &options, &p.activations, &p.temporaries);
    p.total = p.params.values + p.params.masters + p.params.gradients + p.states + p.activations +
              p.temporaries;
    return p;
}

/* With every activation kept, and with them made again. */
static void print_plans(Gemma *g, const DrawnBench *b, const OptimizerConfig *adam) {
    for (int mode = STACK_KEEP; mode <= STACK_OFFLOAD; mode++) {
        Plan p = plan_of(g, b->tokens, (StackMode)mode, adam);
        printf("{\"preset\": \"%s\", \"train\": \"%s\", \"tokens\": %" PRId64
               ", \"recompute\": %s, \"offload\": %s, \"weights_gb\": %.2f, \"trained_gb\": %.2f, "
               "\"states_gb\": %.2f, "
               "\"activations_gb\": %.2f, \"temporaries_gb\": %.2f, \"total_gb\": %.2f}\n",
               b->preset, b->train, b->tokens, mode == STACK_KEEP ? "false" : "true",
               mode == STACK_OFFLOAD ? "true" : "false", (double)p.params.values / 1e9,
               (double)(p.params.masters + p.params.gradients) / 1e9, (double)p.states / 1e9,
               (double)p.activations / 1e9, (double)p.temporaries / 1e9, (double)p.total / 1e9);
    }
}

static Status bench_training(Gemma *g, const DrawnBench *b) {
    RunConfig config = {0};
    AdapterSpec spec = {0};
    StepMemory memory = {0};
    Optimizer o = {0};
    OptimizerConfig adam = {
        .name = OPTIMIZER_ADAMW, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .states_8bit = true};
    int64_t N = b->tokens;
    int32_t *numbers = must_calloc((size_t)N * 4, sizeof *numbers),
            *ids = bench_random_ids(g, N + 1);
    float *weights = must_malloc((size_t)N * 2 * sizeof *weights);
    double seconds, loss;
    Status status = OK;
    TRY_DONE(method_of(&config, b));
    g->params.space.no_masters = g->params.space.one_layer = b->lean;
    TRY_DONE(adapt(g, &config, &spec));
    if (b->plan) {
        print_plans(g, b, &adam);
        goto done;
    }
    StepOptions options = {.mode = STACK_KEEP, .shortcut = true};
    if (b->recompute ||
        (double)plan_of(g, N, STACK_KEEP, &adam).total > 0.9 * (double)device_available(g->device))
        options.mode = STACK_RECOMPUTE;
    if (b->offload) options.mode = STACK_OFFLOAD;
    TRY_DONE(params_place(&g->params, g->device, true));
    TRY_DONE(initial_values(g, 42));
    TRY_DONE(adapt_init(g, &config));
    TRY_DONE(step_init(&memory, g, N, &options));
    TRY_DONE(optimizer_init(&o, &adam, &g->params, g->device));
    gemma_refresh(g, &memory.scratch);
    Lean lean = {g, &o};
    if (b->lean) {
        options.layer_done = update_layer;
        options.layer_context = &lean;
    }
    for (int64_t i = 0; i < N; i++) {
        numbers[i] = (int32_t)i; /* positions; starts are 0 */
        numbers[2 * N + i] = ids[i + 1];
        weights[i] = 1.0f / (float)N;
    }
    Batch batch = {.N = N,
                   .ids = ids,
                   .positions = numbers,
                   .starts = numbers + N,
                   .targets = numbers + 2 * N,
                   .weights = weights};
    time_steps(g, &memory, &o, &options, &batch, weights + N, &seconds, &loss);
    /* Forward, and back to the inputs; to the weights as well where they are trained. */
    double flops =
        gemma_forward_flops(g, (double)N) * (double)N * (strcmp(b->train, "full") ? 2 : 3);
    printf("{\"preset\": \"%s\", \"train\": \"%s\", \"tokens\": %" PRId64
           ", \"recompute\": %s, \"offload\": %s, \"tokens_per_s\": %.1f, \"model_tflops\": %.2f, "
           "\"device_gb\": "
           "%.2f, \"loss\": %.4f}\n",
           b->preset, b->train, N, options.mode == STACK_KEEP ? "false" : "true",
           options.mode == STACK_OFFLOAD ? "true" : "false", (double)N / seconds,
           flops / seconds / 1e12, (double)device_held(g->device) / 1e9, loss);
done:
    step_free(&memory);
    optimizer_free(&o);
    adapter_spec_free(&spec);
    run_config_free(&config);
    free(numbers);
    free(weights);
    free(ids);
    return status;
}

/* ---- decoding ---- */

static Status bench_decoding(Gemma *g, const DrawnBench *b) {
    Engine e = {0};
    Sequence *s = NULL;
    int64_t n = b->depth + 4;
    int32_t *ids = bench_random_ids(g, n);
    EngineOptions options = {.sequences = b->sequences,
                             .tokens = b->sequences * (n + b->tokens + 2 * PAGE_KEYS),
                             .chunk = 2048,
                             .kv = BF16};
    Request request = {
        .ids = ids,
        .count = n,
        .sampling = {.max_tokens = b->tokens + 9, .top_p = 1, .repetition_penalty = 1}};
    Status status = OK;
    TRY_DONE(pack(g, b->weights));
    TRY_DONE(params_place(&g->params, g->device, false));
    TRY_DONE(initial_values(g, 42));
    TRY_DONE(engine_init(&e, g, NULL, &options));
    for (int64_t i = 0; i < b->sequences; i++) TRY_DONE(engine_submit(&e, &s, &request));
    double start = omp_get_wtime();
    while (sequence_answered(s) == 0)
        if (!engine_step(&e)) FAIL_DONE(ERR_CONFIG, "the model's first token is no number");
    double prefill = omp_get_wtime() - start;
    for (int i = 0; i < 8; i++) engine_step(&e);
    start = omp_get_wtime();
    for (int64_t i = 0; i < b->tokens; i++) engine_step(&e);
    double seconds = (omp_get_wtime() - start) / (double)b->tokens;
    printf("{\"preset\": \"%s\", \"weights\": \"%s\", \"sequences\": %" PRId64
           ", \"depth\": %" PRId64
           ", \"prefill_tokens_per_s\": %.1f, \"decode_tokens_per_s\": %.2f, \"read_gb\": %.3f, "
           "\"read_gb_per_s\": %.1f, \"device_gb\": %.2f}\n",
           b->preset, b->weights, b->sequences, b->depth,
           b->depth ? (double)(n * b->sequences) / prefill : 0, (double)b->sequences / seconds,
           bench_bytes_a_token(g) / 1e9, bench_bytes_a_token(g) / seconds / 1e9,
           (double)device_held(g->device) / 1e9);
done:
    engine_free(&e);
    free(ids);
    return status;
}

Status bench_drawn(const DrawnBench *b) {
    Gemma g = {0};
    Status status = declare(&g, b);
    if (status == OK) status = b->train ? bench_training(&g, b) : bench_decoding(&g, b);
    if (g.device) gemma_free(&g);
    return status;
}

/* ---- attention ---- */

typedef struct AttentionShape {
    const char *name;
    int64_t H, K, C, window; /* window 0: all that comes before */
} AttentionShape;

/* Causal attention of one segment; the fastest of a few runs after a first. */
static Status time_attention(Device *device, const AttentionShape *shape, int64_t N) {
    int64_t H = shape->H, K = shape->K, C = shape->C, G = attention_partials(K);
    Arena memory = {0}, measure = arena_measure();
    int32_t *rows = must_malloc((size_t)N * 3 * sizeof *rows);
    Tensor t[12] = {{0}};
    double forward = 1e9, backward = 1e9, keys = 0;
    Status status = OK;
    for (int64_t n = 0; n < N; n++) {
        int64_t first = shape->window && n >= shape->window ? n - shape->window + 1 : 0;
        rows[n] = rows[2 * N + n] = (int32_t)n;
        rows[N + n] = (int32_t)first;
        keys += (double)(n - first + 1);
    }
    for (int placing = 0; placing <= 1; placing++) {
        Arena *a = placing ? &memory : &measure;
        if (placing) TRY_DONE(arena_init(&memory, device, measure.peak, "attention"));
        for (int i = 0; i < 4; i++) t[i] = ARENA_TENSOR(a, BF16, N, H, C); /* q, y, dy, dq */
        for (int i = 4; i < 6; i++) t[i] = ARENA_TENSOR(a, BF16, N, K, C); /* k, v */
        for (int i = 6; i < 8; i++) t[i] = ARENA_TENSOR(a, F32, N, K, C);  /* dk, dv */
        t[8] = ARENA_TENSOR(a, F32, N, H);
        t[9] = ARENA_TENSOR(a, I32, 3, N);
        if (G > 1) t[10] = ARENA_TENSOR(a, F32, 2 * G, N, K, C);
    }
    for (int i = 0; i < 6; i++)
        fill_normal(t[i], (uint64_t)i, i == 0 ? 1.0f / sqrtf((float)C) : 1.0f);
    tensor_write(t[9], rows);
    Tensor index = tensor_at(t[9], 0), first = tensor_at(t[9], 1), last = tensor_at(t[9], 2),
           none = tensor_absent();
    for (int i = 0; i < 6; i++) {
        float one[2];
        double start = omp_get_wtime();
        attention_forward(t[1], t[8], none, t[0], t[4], t[5], index, first, last, none, none);
        tensor_read(one, tensor_slice(tensor_at(t[8], 0), 0, 1));
        double middle = omp_get_wtime();
        attention_backward(t[3], t[6], t[7], SET, t[2], t[1], t[8], t[0], t[4], t[5], index, first,
                           last, t[10]);
        tensor_read(one, tensor_slice(RESHAPE(t[6], N * K * C), 0, 1));
        if (!i) continue;
        forward = fmin(forward, middle - start);
        backward = fmin(backward, omp_get_wtime() - middle);
    }
    double flops = 4.0 * keys * (double)(H * C);
    printf("{\"attention\": \"%s\", \"head_dim\": %" PRId64 ", \"heads\": %" PRId64
           ", \"kv_heads\": %" PRId64 ", \"tokens\": %" PRId64
           ", \"forward_tflops\": %.2f, \"backward_tflops\": %.2f}\n",
           shape->name, C, H, K, N, flops / forward / 1e12, 2.5 * flops / backward / 1e12);
done:
    if (memory.base) arena_free(&memory);
    free(rows);
    return status;
}

Status bench_attention(const char *device_name, int64_t tokens) {
    static const AttentionShape shapes[] = {
        {"e2b sliding", 8, 1, 256, 512},    {"e2b full", 8, 1, 512, 0},
        {"31b sliding", 32, 16, 256, 1024}, {"31b full", 32, 4, 512, 0},
        {"causal 256", 16, 8, 256, 0},
    };
    Device *device;
    TRY(device_open(&device, device_name));
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        TRY(time_attention(device, &shapes[i], tokens));
    return OK;
}
