/* test_step.c - the whole model against the reference: losses, every gradient, adapters,
 * invariants. */
#include "formats/adapter.h"
#include "formats/file.h"
#include "infer/engine.h"
#include "model/step.h"
#include "optim/optimizer.h"
#include "tests/fixture.h"

#include <math.h>

static const char *const kinds[] = {"e2b", "e4b", "26b-a4b", "31b", "12b"};
#define KINDS (sizeof kinds / sizeof *kinds)

typedef struct Run {
    Checkpoint checkpoint;
    Gemma g;
    StepMemory memory;
    StepOptions options;
} Run;

static void run_open(Run *r, const char *dir, DType dtype, bool full, const AdapterSpec *spec,
                     StackMode mode) {
    EXPECT_OK(checkpoint_open(&r->checkpoint, dir));
    gemma_declare(&r->g, &r->checkpoint.config, dtype, device_cpu());
    for (int i = 0; full && i < r->g.params.count; i++)
        r->g.params.items[i]->trainable = !r->g.params.items[i]->buffer;
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

static void compare_nll(const Packed *p, const float *expected, double tolerance,
                        const char *kind) {
    for (int64_t n = 0, i = 0; n < p->batch.N; n++) {
        if (p->targets[n] < 0) continue;
        double error = fabs(p->nll[n] - expected[i]) / fmax(1.0, fabs(expected[i]));
        EXPECT(error < tolerance, "%s: nll of row %d is %.6f, expected %.6f", kind, (int)n,
               p->nll[n], expected[i]);
        i++;
    }
}

static void compare_grads(const Fixture *f, const Gemma *g, const char *group, const char *kind,
                          double tolerance) {
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
            Packed *p = fixture_batch(&f, -1);
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
        Packed *p = fixture_batch(&f, -1);
        Run r;
        run_open(&r, f.dir, BF16, false, NULL, STACK_SCORE);
        step_run(&r.g, &r.memory, &p->batch, &r.options, p->nll);
        int64_t count;
        float *half = fixture_floats(&f, "nll_bf16", &count),
              *exact = fixture_floats(&f, "nll", &count);
        double ours = 0, theirs = 0;
        for (int64_t n = 0, i = 0; n < p->batch.N; n++) {
            if (p->targets[n] < 0) continue;
            ours += fabs(p->nll[n] - exact[i]);
            theirs += fabs(half[i] - exact[i]);
            i++;
        }
        /* Neither is the truth: ours may stray from f32 as far as the reference's bf16 does, and
         * half again. */
        EXPECT(ours < 1.5 * theirs + 1e-3 * (double)count,
               "%s: bf16 strays %.4f from f32, the reference %.4f", kinds[k], ours / (double)count,
               theirs / (double)count);
        free(half);
        free(exact);
        run_close(&r);
        free(p);
    }
}

CASE(step, balancing_loss_and_its_gradients_match_the_reference) {
    Fixture f = fixture_open("model_26b-a4b.h5");
    Packed *p = fixture_batch(&f, -1);
    Run r;
    int64_t count;
    float *coefficient = fixture_floats(&f, "aux/coefficient", &count),
          *loss = fixture_floats(&f, "aux/loss", &count);
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
        Packed *p = fixture_batch(&f, 0);
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
    Packed *p = fixture_batch(&f, -1);
    Run r;
    run_open(&r, f.dir, F32, false, &spec, STACK_KEEP);
    EXPECT_OK(peft_load(&r.g, dir));
    OptimizerConfig config = {.name = OPTIMIZER_ADAMW,
                              .lr = 5e-4,
                              .beta1 = 0.9,
                              .beta2 = 0.999,
                              .eps = 1e-2,
                              .weight_decay = 0.1};
    Optimizer optimizer;
    EXPECT_OK(optimizer_init(&optimizer, &config, &r.g.params, device_cpu()));
    int64_t count;
    snprintf(name, sizeof name, "%s/losses", variant);
    float *losses = fixture_floats(&f, name, &count);
    for (int step = 0; step < 4; step++) {
        gemma_refresh(&r.g, &r.memory.scratch);
        gradients_zero(&r.g.params);
        double loss = step_run(&r.g, &r.memory, &p->batch, &r.options, p->nll);
        EXPECT(fabs(loss - losses[step]) < 1e-4 * losses[step],
               "%s %s: loss %d is %.6f, expected %.6f", kind, variant, step, loss, losses[step]);
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

/* ---- invariants ---- */

/* Only the second half of each sequence is scored: what answers in a chat look like. */
static void score_second_halves(Packed *p) {
    p->scored = 0;
    for (int64_t n = 0; n < p->batch.N; n++) {
        if (p->positions[n] < 6) p->targets[n] = -1;
        p->scored += p->targets[n] >= 0;
    }
    for (int64_t n = 0; n < p->batch.N; n++) p->weights[n] = 1.0f / (float)p->scored;
}

/* Every gradient of a run over p, concatenated; caller frees. */
static float *gradients_of(const char *dir, DType dtype, bool full, const AdapterSpec *spec,
                           StackMode mode, bool shortcut, Packed *p, int64_t *count) {
    Run r;
    run_open(&r, dir, dtype, full, spec, mode);
    if (spec) {
        EXPECT_OK(adapter_init(&r.g, 5));
        for (Linear *l = r.g.linears.first; l; l = l->next) /* a B of zeros would hide half of it */
            for (int64_t i = 0; l->lora && i < tensor_count(l->lora->B->value); i++)
                ((float *)l->lora->B->value.data)[i] = 0.01f * (float)(i % 7 - 3);
    }
    r.options.shortcut = shortcut;
    step_run(&r.g, &r.memory, &p->batch, &r.options, p->nll);
    *count = tensor_count(r.g.params.space.grads);
    float *copy = must_malloc((size_t)*count * sizeof *copy);
    memcpy(copy, r.g.params.space.grads.data, (size_t)*count * sizeof *copy);
    run_close(&r);
    return copy;
}

static AdapterSpec usual_adapter(void) {
    static const char *const names[] = {"q_proj",  "o_proj",    "gate_proj",
                                        "up_proj", "down_proj", "k_proj"};
    AdapterSpec spec = {.rank = 4, .alpha = 8};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        text_list_add(&spec.targets, names[i]);
    return spec;
}

CASE(invariant, recompute_on_equals_off_bit_for_bit) {
    for (size_t k = 0; k < KINDS; k++)
        for (int dtype = F32; dtype <= BF16; dtype++) {
            char name[64];
            int64_t count;
            snprintf(name, sizeof name, "model_%s.h5", kinds[k]);
            Fixture f = fixture_open(name);
            Packed *p = fixture_batch(&f, -1);
            float *keep =
                gradients_of(f.dir, (DType)dtype, true, NULL, STACK_KEEP, true, p, &count);
            for (int mode = STACK_RECOMPUTE; mode <= STACK_OFFLOAD; mode++) {
                float *again =
                    gradients_of(f.dir, (DType)dtype, true, NULL, (StackMode)mode, true, p, &count);
                EXPECT(!memcmp(keep, again, (size_t)count * 4), "%s %s mode %d", kinds[k],
                       dtype_name((DType)dtype), mode);
                free(again);
            }
            free(keep), free(p);
        }
}

CASE(invariant, shortcut_on_equals_off_bit_for_bit) {
    AdapterSpec spec = usual_adapter();
    for (size_t k = 0; k < KINDS; k++)
        for (int dtype = F32; dtype <= BF16; dtype++)
            for (int mode = STACK_KEEP; mode <= STACK_RECOMPUTE; mode++) {
                char name[64];
                int64_t count;
                float on_nll[64];
                snprintf(name, sizeof name, "model_%s.h5", kinds[k]);
                Fixture f = fixture_open(name);
                Packed *p = fixture_batch(&f, -1);
                score_second_halves(p);
                float *on = gradients_of(f.dir, (DType)dtype, false, &spec, (StackMode)mode, true,
                                         p, &count);
                memcpy(on_nll, p->nll, sizeof on_nll);
                float *off = gradients_of(f.dir, (DType)dtype, false, &spec, (StackMode)mode, false,
                                          p, &count);
                EXPECT(!memcmp(on_nll, p->nll, (size_t)p->batch.N * 4), "%s %s: losses", kinds[k],
                       dtype_name((DType)dtype));
                EXPECT(!memcmp(on, off, (size_t)count * 4), "%s %s: gradients", kinds[k],
                       dtype_name((DType)dtype));
                free(on), free(off), free(p);
            }
    adapter_spec_free(&spec);
}

/* Sequences one by one, gradients added up, against both packed in one batch. The sums have another
 * order. */
CASE(invariant, packed_equals_separate_and_accumulated_equals_one_batch) {
    for (size_t k = 0; k < KINDS; k++) {
        char name[64];
        int64_t count;
        snprintf(name, sizeof name, "model_%s.h5", kinds[k]);
        Fixture f = fixture_open(name);
        Packed *both = fixture_batch(&f, -1);
        float *packed = gradients_of(f.dir, F32, true, NULL, STACK_KEEP, true, both, &count);
        Run r;
        run_open(&r, f.dir, F32, true, NULL, STACK_KEEP);
        for (int s = 0, at = 0; s < 2; s++) {
            Packed *one = fixture_batch(&f, s);
            for (int64_t n = 0; n < one->batch.N; n++) one->weights[n] = 1.0f / (float)both->scored;
            step_run(&r.g, &r.memory, &one->batch, &r.options, one->nll);
            for (int64_t n = 0; n < one->batch.N; n++, at++)
                EXPECT_CLOSE(one->nll[n], both->nll[at], 2e-5 * (1 + fabs(both->nll[at])));
            free(one);
        }
        EXPECT(relative_error(r.g.params.space.grads.data, packed, count) < 1e-5, "%s", kinds[k]);
        run_close(&r);
        free(packed), free(both);
    }
}

CASE(invariant, an_adapter_with_zero_b_is_the_base) {
    AdapterSpec spec = usual_adapter();
    Fixture f = fixture_open("model_e2b.h5");
    Packed *p = fixture_batch(&f, -1);
    float base[64];
    Run r;
    run_open(&r, f.dir, BF16, false, NULL, STACK_SCORE);
    step_run(&r.g, &r.memory, &p->batch, &r.options, p->nll);
    memcpy(base, p->nll, sizeof base);
    run_close(&r);
    run_open(&r, f.dir, BF16, false, &spec, STACK_SCORE);
    EXPECT_OK(adapter_init(&r.g, 3));
    step_run(&r.g, &r.memory, &p->batch, &r.options, p->nll);
    EXPECT(!memcmp(base, p->nll, (size_t)p->batch.N * 4));
    run_close(&r);
    adapter_spec_free(&spec);
    free(p);
}

static void merge_like_unmerged(const char *kind, const char *variant) {
    char name[96], dir[400], out[400];
    snprintf(name, sizeof name, "model_%s.h5", kind);
    Fixture f = fixture_open(name);
    if (!fixture_has(&f, variant)) return;
    snprintf(dir, sizeof dir, "%s/adapter-%s-%s", test_folder(), kind, variant);
    snprintf(out, sizeof out, "%s/merged-%s-%s", test_folder(), kind, variant);
    EXPECT_OK(folder_make(dir));
    snprintf(name, sizeof name, "%s/adapter_model.safetensors", variant);
    fixture_write(&f, name, dir, "adapter_model.safetensors");
    snprintf(name, sizeof name, "%s/adapter_config.json", variant);
    fixture_write(&f, name, dir, "adapter_config.json");
    AdapterSpec spec;
    EXPECT_OK(peft_load_spec(&spec, dir));
    Packed *p = fixture_batch(&f, -1);
    float unmerged[64];
    Run r;
    run_open(&r, f.dir, F32, false, &spec, STACK_SCORE);
    EXPECT_OK(peft_load(&r.g, dir));
    gemma_refresh(&r.g, &r.memory.scratch);
    step_run(&r.g, &r.memory, &p->batch, &r.options, p->nll);
    memcpy(unmerged, p->nll, sizeof unmerged);
    EXPECT_OK(checkpoint_save(&r.checkpoint, &r.g, F32, SCHEME_NONE, out));
    /* What is written as an adapter loads again to the same bits. */
    snprintf(dir, sizeof dir, "%s/again-%s-%s", test_folder(), kind, variant);
    EXPECT_OK(peft_save(&r.g, &spec, dir));
    AdapterSpec exact;
    Run second;
    EXPECT_OK(peft_load_spec(&exact, dir));
    run_open(&second, f.dir, F32, false, &exact, STACK_SCORE);
    EXPECT_OK(peft_load(&second.g, dir));
    EXPECT(tensor_count(second.g.params.space.values) == tensor_count(r.g.params.space.values));
    EXPECT(!memcmp(second.g.params.space.values.data, r.g.params.space.values.data,
                   tensor_bytes(r.g.params.space.values)),
           "%s %s", kind, variant);
    run_close(&second);
    run_close(&r);
    run_open(&r, out, F32, false, NULL, STACK_SCORE);
    step_run(&r.g, &r.memory, &p->batch, &r.options, p->nll);
    for (int64_t n = 0; n < p->batch.N; n++)
        EXPECT(fabs(unmerged[n] - p->nll[n]) < 1e-4, "%s %s: row %d: %g merged, %g not", kind,
               variant, (int)n, p->nll[n], unmerged[n]);
    run_close(&r);
    adapter_spec_free(&spec);
    adapter_spec_free(&exact);
    free(p);
}

CASE(invariant, merged_equals_unmerged_and_saved_adapters_load_again) {
    for (size_t k = 0; k < KINDS; k++) {
        merge_like_unmerged(kinds[k], "lora");
        merge_like_unmerged(kinds[k], "dora");
    }
}

CASE(invariant, a_saved_checkpoint_holds_the_same_bits) {
    for (size_t k = 0; k < KINDS; k++) {
        char name[64], out[400], from[500], to[500];
        char *a, *b;
        size_t a_size, b_size;
        snprintf(name, sizeof name, "model_%s.h5", kinds[k]);
        Fixture f = fixture_open(name);
        Run r;
        run_open(&r, f.dir, F32, true, NULL, STACK_SCORE);
        snprintf(out, sizeof out, "%s/saved-%s", test_folder(), kinds[k]);
        EXPECT_OK(checkpoint_save(&r.checkpoint, &r.g, F32, SCHEME_NONE, out));
        Checkpoint again;
        EXPECT_OK(checkpoint_open(&again, out));
        EXPECT(again.count == r.checkpoint.count);
        for (int i = 0; i < again.count; i++) {
            EXPECT(!strcmp(again.tensors[i].stored->name, r.checkpoint.tensors[i].stored->name));
            EXPECT(again.tensors[i].stored->size == r.checkpoint.tensors[i].stored->size);
            EXPECT(!memcmp(again.tensors[i].stored->bytes, r.checkpoint.tensors[i].stored->bytes,
                           again.tensors[i].stored->size),
                   "%s", again.tensors[i].stored->name);
        }
        snprintf(from, sizeof from, "%s/config.json", f.dir);
        snprintf(to, sizeof to, "%s/config.json", out);
        EXPECT_OK(file_read(&a, &a_size, from, 1 << 20));
        EXPECT_OK(file_read(&b, &b_size, to, 1 << 20));
        EXPECT(a_size == b_size && !memcmp(a, b, a_size), "config.json changed");
        free(a), free(b);
        checkpoint_close(&again);
        run_close(&r);
    }
}

/* The likelihood of every token, read in chunks and in single tokens from a cache of pages. */
CASE(invariant, prefill_and_decode_equal_one_forward_across_the_window) {
    static const int64_t chunks[] = {1, 2, 9, 64};
    for (size_t k = 0; k < KINDS; k++) {
        char name[64];
        snprintf(name, sizeof name, "model_%s.h5", kinds[k]);
        Fixture f = fixture_open(name);
        Packed *p = fixture_batch(&f, 0);
        Run r;
        run_open(&r, f.dir, F32, false, NULL, STACK_SCORE);
        step_run(&r.g, &r.memory, &p->batch, &r.options, p->nll);
        for (size_t i = 0; i < sizeof chunks / sizeof *chunks; i++) {
            EngineOptions options = {.sequences = 1, .tokens = 64, .chunk = chunks[i], .kv = F32};
            Request request = {.ids = p->ids,
                               .count = p->batch.N,
                               .score_from = 1,
                               .sampling = {.top_p = 1, .repetition_penalty = 1}};
            Engine e;
            Sequence *s;
            EXPECT_OK(engine_init(&e, &r.g, NULL, &options));
            EXPECT_OK(engine_submit(&e, &s, &request));
            while (engine_step(&e)) continue;
            for (int64_t n = 0; n + 1 < p->batch.N; n++)
                EXPECT(fabs(s->logprobs[n + 1] + p->nll[n]) < 2e-4, "%s: row %d: %g, expected %g",
                       kinds[k], (int)n, -s->logprobs[n + 1], p->nll[n]);
            engine_drop(&e, s);
            engine_free(&e);
        }
        run_close(&r);
        free(p);
    }
}

/* The plan says what a step takes before anything is taken. How many padded rows experts need
 * depends on the routing, so with experts the plan for temporaries is the most it can be. */
CASE(invariant, the_memory_plan_is_what_a_step_takes) {
    for (size_t k = 0; k < KINDS; k++) {
        char name[64];
        size_t activations, scratch;
        snprintf(name, sizeof name, "model_%s.h5", kinds[k]);
        Fixture f = fixture_open(name);
        Packed *p = fixture_batch(&f, -1);
        Run r;
        run_open(&r, f.dir, F32, true, NULL, STACK_KEEP);
        step_measure(&r.g, p->batch.N, p->batch.N, &r.options, &activations, &scratch);
        r.options.shortcut = false;
        step_run(&r.g, &r.memory, &p->batch, &r.options, p->nll);
        EXPECT(r.memory.activations.used == activations, "%s: %zu bytes placed, %zu planned",
               kinds[k], r.memory.activations.used, activations);
        r.memory.scratch.peak = 0;
        step_run(&r.g, &r.memory, &p->batch, &r.options, p->nll);
        bool exact = !r.g.config.num_experts;
        EXPECT(exact ? r.memory.scratch.peak == scratch : r.memory.scratch.peak <= scratch,
               "%s: %zu bytes of scratch, %zu planned", kinds[k], r.memory.scratch.peak, scratch);
        run_close(&r);
        free(p);
    }
}
