/* test_step.c - the whole model against the reference: losses, every gradient, adapters, invariants. */
#include "formats/adapter.h"
#include "formats/file.h"
#include "model/step.h"
#include "optim/optimizer.h"
#include "tests/fixture.h"

#include <math.h>

static const char *const kinds[] = {"e2b", "e4b", "26b-a4b", "31b", "12b"};
#define KINDS (sizeof kinds / sizeof *kinds)

/* The fixture's sequences as one packed batch. */
typedef struct Packed {
    Batch batch;
    int32_t ids[64], positions[64], starts[64], targets[64], spans[64];
    float weights[64], nll[64];
    int64_t scored;
} Packed;

static Packed *pack(const Fixture *f, int only) {
    int64_t n, count;
    int32_t *ids = fixture_ints(f, "ids", &n), *lengths = fixture_ints(f, "lengths", &count);
    Packed *p = must_calloc(1, sizeof *p);
    int64_t at = 0, from = 0;
    for (int64_t s = 0; s < count; from += lengths[s], s++) {
        if (only >= 0 && s != only) continue;
        for (int64_t t = 0, start = at; t < lengths[s]; t++, at++) {
            p->ids[at] = ids[from + t];
            p->positions[at] = (int32_t)t;
            p->starts[at] = (int32_t)start;
            p->targets[at] = t + 1 < lengths[s] ? ids[from + t + 1] : -1;
            p->spans[at] = -1;
            p->scored += t + 1 < lengths[s];
        }
    }
    for (int64_t i = 0; i < at; i++) p->weights[i] = 1.0f / (float)p->scored;
    p->batch = (Batch){at, p->ids, p->positions, p->starts, NULL, p->targets, p->weights};
    free(ids);
    free(lengths);
    return p;
}

typedef struct Run {
    Checkpoint checkpoint;
    Gemma g;
    StepMemory memory;
    StepOptions options;
} Run;

static void run_open(Run *r, const char *dir, DType dtype, bool full, const AdapterSpec *spec, StackMode mode) {
    EXPECT_OK(checkpoint_open(&r->checkpoint, dir));
    gemma_declare(&r->g, &r->checkpoint.config, dtype, device_cpu());
    for (int i = 0; full && i < r->g.params.count; i++) r->g.params.items[i]->trainable = !r->g.params.items[i]->buffer;
    if (spec) EXPECT_OK(adapter_attach(&r->g, spec));
    EXPECT_OK(params_place(&r->g.params, device_cpu(), true));
    EXPECT_OK(checkpoint_load(&r->checkpoint, &r->g));
    r->options = (StepOptions){.mode = mode, .shortcut = true};
    EXPECT_OK(step_init(&r->memory, &r->g, 64, &r->options));
}

static void run_close(Run *r) {
    step_free(&r->memory);
    gemma_free(&r->g);
    checkpoint_close(&r->checkpoint);
}

static void compare_nll(const Packed *p, const float *expected, double tolerance, const char *kind) {
    for (int64_t n = 0, i = 0; n < p->batch.N; n++) {
        if (p->targets[n] < 0) continue;
        double error = fabs(p->nll[n] - expected[i]) / fmax(1.0, fabs(expected[i]));
        EXPECT(error < tolerance, "%s: nll of row %d is %.6f, expected %.6f", kind, (int)n, p->nll[n], expected[i]);
        i++;
    }
}

static void compare_grads(const Fixture *f, const Gemma *g, const char *group, const char *kind, double tolerance) {
    int compared = 0;
    for (int i = 0; i < g->params.count; i++) {
        const Param *p = g->params.items[i];
        char name[256];
        snprintf(name, sizeof name, "%s/%s", group, p->name);
        if (p->buffer) continue;
        int64_t count;
        float *expected = fixture_floats(f, name, &count);
        EXPECT(count == tensor_count(p->grad), "%s: %s has %d values", kind, name, (int)count);
        double error = relative_error(p->grad.data, expected, count);
        EXPECT(error < tolerance, "%s: gradient of %s is off by %.2e", kind, p->name, error);
        free(expected);
        compared++;
    }
    EXPECT(compared > 20, "only %d gradients compared", compared);
}

CASE(step, token_nlls_and_every_gradient_match_the_reference) {
    for (size_t k = 0; k < KINDS; k++)
        for (int mode = STACK_KEEP; mode <= STACK_RECOMPUTE; mode++) {
            char name[64];
            snprintf(name, sizeof name, "model_%s.h5", kinds[k]);
            Fixture f = fixture_open(name);
            Packed *p = pack(&f, -1);
            Run r;
            run_open(&r, f.dir, F32, true, NULL, (StackMode)mode);
            step_run(&r.g, &r.memory, &p->batch, &r.options, p->nll);
            int64_t count;
            float *nll = fixture_floats(&f, "nll", &count);
            EXPECT(count == p->scored);
            compare_nll(p, nll, 1e-4, kinds[k]);
            compare_grads(&f, &r.g, "grad", kinds[k], 1e-3);
            free(nll);
            run_close(&r);
            free(p);
        }
}

CASE(step, bf16_losses_follow_the_reference_within_bf16_noise) {
    for (size_t k = 0; k < KINDS; k++) {
        char name[64];
        snprintf(name, sizeof name, "model_%s.h5", kinds[k]);
        Fixture f = fixture_open(name);
        Packed *p = pack(&f, -1);
        Run r;
        run_open(&r, f.dir, BF16, false, NULL, STACK_SCORE);
        step_run(&r.g, &r.memory, &p->batch, &r.options, p->nll);
        int64_t count;
        float *half = fixture_floats(&f, "nll_bf16", &count), *exact = fixture_floats(&f, "nll", &count);
        double ours = 0, theirs = 0;
        for (int64_t n = 0, i = 0; n < p->batch.N; n++) {
            if (p->targets[n] < 0) continue;
            ours += fabs(p->nll[n] - exact[i]);
            theirs += fabs(half[i] - exact[i]);
            i++;
        }
        /* Neither is the truth: ours may stray from f32 as far as the reference's bf16 does, and half again. */
        EXPECT(ours < 1.5 * theirs + 1e-3 * (double)count, "%s: bf16 strays %.4f from f32, the reference %.4f", kinds[k],
               ours / (double)count, theirs / (double)count);
        free(half);
        free(exact);
        run_close(&r);
        free(p);
    }
}

CASE(step, balancing_loss_and_its_gradients_match_the_reference) {
    Fixture f = fixture_open("model_26b-a4b.h5");
    Packed *p = pack(&f, -1);
    Run r;
    int64_t count;
    float *coefficient = fixture_floats(&f, "aux/coefficient", &count), *loss = fixture_floats(&f, "aux/loss", &count);
    run_open(&r, f.dir, F32, true, NULL, STACK_RECOMPUTE);
    ExpertLoad *load = must_calloc(1, sizeof *load);
    r.options.load = load;
    r.options.aux_scale = *coefficient;
    step_run(&r.g, &r.memory, &p->batch, &r.options, p->nll);
    EXPECT_CLOSE(expert_load_loss(load, r.g.config.num_experts), *loss, 1e-4);
    compare_grads(&f, &r.g, "aux/grad", "26b-a4b", 1e-3);
    run_close(&r);
    free(load);
    free(coefficient);
    free(loss);
    free(p);
}

CASE(step, bidirectional_spans_match_the_reference) {
    static const char *const spanned[] = {"26b-a4b", "31b"};
    for (int k = 0; k < 2; k++) {
        char name[64];
        snprintf(name, sizeof name, "model_%s.h5", spanned[k]);
        Fixture f = fixture_open(name);
        Packed *p = pack(&f, 0);
        int64_t count;
        int32_t *span = fixture_ints(&f, "span/span", &count);
        for (int i = span[0]; i <= span[1]; i++) p->spans[i] = span[1];
        p->batch.span_ends = p->spans;
        Run r;
        run_open(&r, f.dir, F32, true, NULL, STACK_KEEP);
        step_run(&r.g, &r.memory, &p->batch, &r.options, p->nll);
        float *nll = fixture_floats(&f, "span/nll", &count);
        compare_nll(p, nll, 1e-4, spanned[k]);
        compare_grads(&f, &r.g, "span/grad", spanned[k], 1e-3);
        run_close(&r);
        free(nll);
        free(span);
        free(p);
    }
}

/* Four AdamW steps from the fixture's adapter: losses and the adapter after them. */
static void follow_peft(const char *kind, const char *variant) {
    char name[96], dir[400];
    snprintf(name, sizeof name, "model_%s.h5", kind);
    Fixture f = fixture_open(name);
    if (!fixture_has(&f, variant)) return;
    snprintf(dir, sizeof dir, "%s/%s", test_folder(), variant);
    EXPECT_OK(folder_make(dir));
    snprintf(name, sizeof name, "%s/adapter_model.safetensors", variant);
    fixture_write(&f, name, dir, "adapter_model.safetensors");
    snprintf(name, sizeof name, "%s/adapter_config.json", variant);
    fixture_write(&f, name, dir, "adapter_config.json");
    AdapterSpec spec;
    EXPECT_OK(peft_load_spec(&spec, dir));
    Packed *p = pack(&f, -1);
    Run r;
    run_open(&r, f.dir, F32, false, &spec, STACK_KEEP);
    EXPECT_OK(peft_load(&r.g, dir));
    OptimizerConfig config = {OPTIMIZER_ADAMW, 2e-3, 0.9, 0.999, 1e-2, 0.1, 0};
    Optimizer optimizer;
    EXPECT_OK(optimizer_init(&optimizer, &config, &r.g.params, device_cpu()));
    int64_t count;
    snprintf(name, sizeof name, "%s/losses", variant);
    float *losses = fixture_floats(&f, name, &count);
    for (int step = 0; step < 4; step++) {
        for (Linear *l = r.g.linears.first; l; l = l->next) linear_refresh(l, &r.memory.scratch);
        gradients_zero(&r.g.params);
        double loss = step_run(&r.g, &r.memory, &p->batch, &r.options, p->nll);
        EXPECT(fabs(loss - losses[step]) < 1e-4 * losses[step], "%s %s: loss %d is %.6f, expected %.6f", kind, variant,
               step, loss, losses[step]);
        optimizer_step(&optimizer, &r.g.params, config.lr, 1.0);
    }
    /* What peft saved after its steps loads into a second model; the two must agree. */
    snprintf(name, sizeof name, "%s/after.safetensors", variant);
    fixture_write(&f, name, dir, "adapter_model.safetensors");
    Run after;
    run_open(&after, f.dir, F32, false, &spec, STACK_SCORE);
    EXPECT_OK(peft_load(&after.g, dir));
    for (int i = 0; i < r.g.params.count; i++) {
        const Param *a = r.g.params.items[i], *b = after.g.params.items[i];
        if (!a->adapter) continue;
        double error = relative_error(a->value.data, b->value.data, tensor_count(a->value));
        EXPECT(error < 1e-3, "%s %s: %s is off by %.2e", kind, variant, a->name, error);
    }
    free(losses);
    optimizer_free(&optimizer);
    run_close(&after);
    run_close(&r);
    adapter_spec_free(&spec);
    free(p);
}

CASE(step, lora_steps_follow_peft) {
    for (size_t k = 0; k < KINDS; k++) follow_peft(kinds[k], "lora");
}

CASE(step, rank_stabilised_lora_steps_follow_peft) {
    for (size_t k = 0; k < KINDS; k++) follow_peft(kinds[k], "rslora");
}

CASE(step, dora_steps_follow_peft) {
    for (size_t k = 0; k < KINDS; k++) follow_peft(kinds[k], "dora");
}
