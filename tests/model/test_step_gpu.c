/* test_step_gpu.c - a whole training step on the GPU, or the emulator that stands in for one,
 * against the same step on the CPU. */
#include "optim/optimizer.h"
#include "tests/fixture.h"
#include "tests/small_model.h"

#include <math.h>

static const char *const variants[] = {"e2b", "e4b", "12b", "26b-a4b", "31b"};

typedef struct Method {
    const char *name;
    Setup *setup;
} Method;

/* Losses, gradients, and the trained values after an update, of one step. */
typedef struct Outcome {
    float nll[SMALL_MOST];
    float *grads, *values;
    int64_t count;
} Outcome;

/* Over random ids where there is no `batch`. */
static Outcome step_on(Device *device, const char *path, const Packed *batch, DType dtype,
                       StackMode mode, Setup *setup) {
    Outcome out = {0};
    Loaded m;
    Optimizer o;
    OptimizerConfig config = {.name = OPTIMIZER_ADAMW, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-2};
    small_device = device;
    small_load(&m, path, dtype, mode, setup);
    small_device = NULL;
    gemma_refresh(&m.g, &m.memory.scratch);
    if (batch)
        step_run(&m.g, &m.memory, &batch->batch, &m.options, out.nll);
    else
        small_run(&m);
    gemma_finish_gradients(&m.g);
    if (!batch) memcpy(out.nll, m.nll, sizeof m.nll);
    out.count = tensor_count(m.g.params.space.values);
    out.grads = small_values(m.g.params.space.grads);
    EXPECT_OK(optimizer_init(&o, &config, &m.g.params, m.g.device));
    optimizer_step(&o, &m.g.params, 1e-2, 1.0);
    out.values = small_values(m.g.params.space.values);
    optimizer_free(&o);
    small_unload(&m);
    return out;
}

static void outcome_free(Outcome *o) {
    free(o->grads);
    free(o->values);
}

static void expect_same_step(Device *gpu, const char *variant, const char *path,
                             const Packed *batch, DType dtype, StackMode mode, Method method,
                             double tolerance) {
    Outcome a = step_on(device_cpu(), path, batch, dtype, mode, method.setup),
            b = step_on(gpu, path, batch, dtype, mode, method.setup);
    double nll = relative_error(b.nll, a.nll, SMALL_MOST),
           grads = relative_error(b.grads, a.grads, a.count),
           values = relative_error(b.values, a.values, a.count);
    EXPECT(a.count == b.count && a.count > 0);
    EXPECT(nll <= tolerance, "%s %s: losses differ by %.2e", variant, method.name, nll);
    EXPECT(grads <= tolerance, "%s %s: gradients differ by %.2e", variant, method.name, grads);
    EXPECT(values <= tolerance, "%s %s: updated values differ by %.2e", variant, method.name,
           values);
    outcome_free(&a);
    outcome_free(&b);
}

/* A step in bf16 is as far from the step in f32 as the CPU's is, give or take a quarter. */
static void expect_same_noise(Device *gpu, const char *variant, const char *path,
                              const Packed *batch, StackMode mode, Method method) {
    Outcome exact = step_on(device_cpu(), path, batch, F32, mode, method.setup),
            a = step_on(device_cpu(), path, batch, BF16, mode, method.setup),
            b = step_on(gpu, path, batch, BF16, mode, method.setup);
    double cpu_nll = relative_error(a.nll, exact.nll, SMALL_MOST),
           gpu_nll = relative_error(b.nll, exact.nll, SMALL_MOST),
           cpu_grads = relative_error(a.grads, exact.grads, exact.count),
           gpu_grads = relative_error(b.grads, exact.grads, exact.count);
    EXPECT(cpu_grads > 1e-4, "%s: bf16 changes nothing", variant);
    EXPECT(gpu_nll <= 1.25 * cpu_nll + 1e-3, "%s: losses are off by %.2e, on the CPU %.2e", variant,
           gpu_nll, cpu_nll);
    EXPECT(gpu_grads <= 1.25 * cpu_grads, "%s: gradients are off by %.2e, on the CPU %.2e", variant,
           gpu_grads, cpu_grads);
    outcome_free(&exact);
    outcome_free(&a);
    outcome_free(&b);
}

/* A variant's model, and its batch. */
static Fixture open_variant(size_t v, Packed **batch) {
    char *name = must_format("model_%s.h5", variants[v]);
    Fixture f = fixture_open(name);
    *batch = fixture_batch(&f, -1);
    free(name);
    return f;
}

static void every_variant(DType dtype, StackMode mode, Method method, double tolerance) {
    Device *gpu;
    if (device_open(&gpu, "cuda") != OK) SKIP("%s", status_message());
    for (size_t v = 0; v < sizeof variants / sizeof *variants; v++) {
        Packed *batch;
        Fixture f = open_variant(v, &batch);
        if (dtype == BF16)
            expect_same_noise(gpu, variants[v], f.dir, batch, mode, method);
        else
            expect_same_step(gpu, variants[v], f.dir, batch, dtype, mode, method, tolerance);
        free(batch);
    }
}

CASE(gpu, a_full_step_of_each_variant_equals_the_cpus) {
    every_variant(F32, STACK_RECOMPUTE, (Method){"full", small_full}, 1e-4);
}

CASE(gpu, a_step_whose_layers_wait_in_the_hosts_memory_has_the_same_bits) {
    Device *gpu;
    if (device_open(&gpu, "cuda") != OK) SKIP("%s", status_message());
    for (size_t v = 0; v < sizeof variants / sizeof *variants; v++) {
        Packed *batch;
        Fixture f = open_variant(v, &batch);
        Outcome a = step_on(gpu, f.dir, batch, BF16, STACK_RECOMPUTE, small_full),
                b = step_on(gpu, f.dir, batch, BF16, STACK_OFFLOAD, small_full);
        EXPECT(!memcmp(a.grads, b.grads, (size_t)a.count * sizeof *a.grads), "%s: gradients",
               variants[v]);
        EXPECT(!memcmp(a.values, b.values, (size_t)a.count * sizeof *a.values), "%s: values",
               variants[v]);
        outcome_free(&a);
        outcome_free(&b);
        free(batch);
    }
}

CASE(gpu, a_lora_step_of_each_variant_equals_the_cpus) {
    every_variant(F32, STACK_KEEP, (Method){"lora", small_adapt}, 1e-4);
}

/* The CPU's sums are rounded where those of small products on a GPU are; by tiles, an adapter's
 * share joins before the first rounding. */
CASE(gpu, steps_in_bf16_stay_within_its_noise) {
    setenv("LAPIDARY_CPU", "generic", 1);
    every_variant(BF16, STACK_KEEP, (Method){"lora", small_adapt}, 0);
}

/* The first few models whose rows are whole blocks. */
static void every_kind(int kinds, DType dtype, Method method, double tolerance) {
    Device *gpu;
    if (device_open(&gpu, "cuda") != OK) SKIP("%s", status_message());
    for (int k = 0; k < kinds; k++) {
        char *path = small_make(small_kinds[k]);
        expect_same_step(gpu, small_kinds[k], path, NULL, dtype, STACK_RECOMPUTE, method,
                         tolerance);
        free(path);
    }
}

CASE(gpu, a_qlora_step_equals_the_cpus) {
    every_kind(SMALL_KINDS, F32, (Method){"qlora", small_adapt_packed}, 1e-4);
}

CASE(gpu, a_qat_step_equals_the_cpus) {
    every_kind(SMALL_KINDS, F32, (Method){"qat", small_round_full}, 1e-4);
}

/* The sum of weight and adapter is another in its last bits, which moves a code now and then. */
CASE(gpu, a_qat_lora_step_follows_the_cpus) {
    every_kind(SMALL_KINDS, F32, (Method){"qat-lora", small_round_adapted}, 5e-3);
    small_learned = true;
    every_kind(1, F32, (Method){"qat-lora, learned scales", small_round_adapted}, 5e-3);
}
