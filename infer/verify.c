/* verify.c - four models, one after the other. */
#include "infer/verify.h"
#include "kernels/elementwise.h"
#include "model/merge.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Beyond these the file is not what was exported: f32 sums in another order stay far below. */
#define KL_LIMIT      1e-6
#define LARGEST_LIMIT 0.05

static const char *const prompts[] = {
    "The hardness of a mineral says which others it scratches; topaz scratches quartz.",
    "def area(width, height):\n    return width * height\n",
    "In 1869 the elements were put in order: 1, 2, 3, and what was missing was left open.",
    "Wie tief ist der Brunnen? Zwanzig Meter, vielleicht mehr."};
#define PROMPTS ((int)(sizeof prompts / sizeof *prompts))

/* One prompt's ids behind the next. */
typedef struct Prompts {
    int32_t *ids, *positions, *starts, *targets;
    int64_t count, scored;
} Prompts;

static Status read_prompts(Prompts *p, const Model *m) {
    Tokens all = {0};
    int64_t ends[PROMPTS];
    for (int i = 0; i < PROMPTS; i++) {
        tokens_add(&all, (int32_t)m->checkpoint.config.bos_token_id);
        tokenizer_encode(m->tokenizer, &all, prompts[i], strlen(prompts[i]), NULL, 0, false);
        ends[i] = all.count;
    }
    int64_t N = all.count;
    *p = (Prompts){.ids = all.ids, .count = N};
    p->positions = must_malloc((size_t)N * 3 * sizeof *p->positions);
    p->starts = p->positions + N;
    p->targets = p->starts + N;
    for (int64_t i = 0, n = 0, start = 0; n < N; n++) {
        if (n == ends[i]) start = ends[i++];
        p->positions[n] = (int32_t)(n - start);
        p->starts[n] = (int32_t)start;
        p->targets[n] = n + 1 < ends[i] ? p->ids[n + 1] : -1;
        p->scored += p->targets[n] >= 0;
    }
    return p->scored ? OK : status_fail(ERR_CONFIG, "the prompts to verify with hold no tokens");
}

static void prompts_free(Prompts *p) {
    free(p->ids);
    free(p->positions);
}

/* Logits of all rows in a file that has no name any more. */
typedef struct Sink {
    FILE *file;
    int64_t vocab;
    bool failed;
} Sink;

static void keep_logits(void *context, int64_t first, Tensor logits) {
    Sink *s = context;
    size_t count = (size_t)tensor_count(logits);
    float *copy = must_malloc(tensor_bytes(logits));
    s->failed |= fseeko(s->file, (off_t)(first * s->vocab * (int64_t)sizeof(float)), SEEK_SET) ||
                 fwrite(tensor_host(logits, copy), sizeof(float), count, s->file) != count;
    free(copy);
}

static Status run_model(Model *m, const Prompts *p, Sink *sink) {
    StepOptions options = {.mode = STACK_SCORE, .logits = keep_logits, .logits_context = sink};
    StepMemory memory = {0};
    float *nll = must_malloc((size_t)p->count * sizeof *nll);
    Batch batch = {.N = p->count,
                   .ids = p->ids,
                   .positions = p->positions,
                   .starts = p->starts,
                   .targets = p->targets};
    sink->vocab = m->g.config.vocab_size;
    sink->failed = false;
    sink->file = tmpfile();
    Status status = OK;
    if (!sink->file) FAIL_DONE(ERR_IO, "no temporary file for logits: %s", strerror(errno));
    TRY_DONE(step_init(&memory, &m->g, p->count, &options));
    step_run(&m->g, &memory, &batch, &options, nll);
    if (sink->failed) FAIL_DONE(ERR_IO, "the temporary file for logits cannot be written");
done:
    step_free(&memory);
    free(nll);
    return status;
}

static double log_sum(const float *x, int64_t n) {
    float top = x[0];
    double sum = 0;
    for (int64_t i = 1; i < n; i++) top = x[i] > top ? x[i] : top;
    for (int64_t i = 0; i < n; i++) sum += exp((double)x[i] - top);
    return top + log(sum);
}

static Status compare(LogitsDifference *d, const Sink *a, const Sink *b, const Prompts *p) {
    int64_t V = a->vocab;
    float *x = must_malloc((size_t)V * sizeof *x), *y = must_malloc((size_t)V * sizeof *y);
    Status status = OK;
    *d = (LogitsDifference){0};
    for (int64_t n = 0; n < p->count; n++) {
        off_t at = (off_t)(n * V * (int64_t)sizeof(float));
        if (fseeko(a->file, at, SEEK_SET) || fseeko(b->file, at, SEEK_SET) ||
            fread(x, sizeof *x, (size_t)V, a->file) != (size_t)V ||
            fread(y, sizeof *y, (size_t)V, b->file) != (size_t)V)
            FAIL_DONE(ERR_IO, "the temporary file for logits cannot be read");
        double p_sum = log_sum(x, V), q_sum = log_sum(y, V), kl = 0;
        int64_t best_x = 0, best_y = 0;
        for (int64_t i = 0; i < V; i++) {
            double log_p = x[i] - p_sum, log_q = y[i] - q_sum, gap = fabs((double)x[i] - y[i]);
            kl += exp(log_p) * (log_p - log_q);
            if (x[i] > x[best_x]) best_x = i;
            if (y[i] > y[best_y]) best_y = i;
            if (!(gap <= d->largest)) d->largest = gap; /* NaN is kept */
        }
        d->kl += kl;
        d->same_top += best_x == best_y;
        d->positions++;
    }
    d->kl /= (double)d->positions;
    d->same_top /= (double)d->positions;
done:
    free(x);
    free(y);
    return status;
}

/* How a tensor of the file was rounded; `codes`: the scheme of its blocks, SCHEME_NONE: ggml's. */
static QuantScheme scheme_of(DType dtype, QuantScheme codes) {
    dtype = dtype_untiled(dtype);
    if (dtype_is_packed(dtype) && codes != SCHEME_NONE) return codes;
    return dtype == Q4_0   ? SCHEME_Q4_0
           : dtype == Q8_0 ? SCHEME_Q8_0
           : dtype == BF16 ? SCHEME_BF16
                           : SCHEME_F32;
}

/* Every linear merges its adapter when it is used; `file`: and rounds as that file does. */
static void merge_at_use(Model *m, FakeQuant fakes[SCHEMES], const Model *file, QuantScheme codes) {
    for (int i = 0; i < SCHEMES; i++) fakes[i] = (FakeQuant){.scheme = i, .blend = 1};
    for (Linear *l = m->g.linears.first; l; l = l->next) {
        l->fake = &fakes[SCHEME_F32];
        if (!file) continue;
        DType stored = params_find(&file->g.params, l->weight->name)->value.dtype;
        l->fake = &fakes[scheme_of(stored, codes)];
    }
}

/* Whether the file's tensor is ours, merged and rounded: the same numbers. A few rows at a time. */
static bool is_ours(const Gemma *g, const Param *p, Tensor stored, QuantScheme codes) {
    const Linear *l = gemma_owner(g, p);
    int64_t cols = p->value.ndim > 1 ? tensor_cols(p->value) : tensor_count(p->value);
    int64_t rows = tensor_count(p->value) / cols, block = (1 << 20) / cols + 1;
    float *a = must_malloc((size_t)(block * cols) * 2 * sizeof *a), *b = a + block * cols;
    QuantScheme scheme = scheme_of(stored.dtype, codes);
    bool same = true;
    stored = RESHAPE(stored, rows, cols);
    Tensor plain = RESHAPE(p->value, rows, cols);
    for (int64_t r = 0; r < rows && same; r += block) {
        int64_t n = rows - r < block ? rows - r : block;
        Tensor ours = TENSOR(a, F32, n, cols);
        scale_copy(TENSOR(b, F32, n, cols), SET, tensor_slice(stored, r, n), 1.0f);
        if (l && l->lora) merged_rows(g, p, r, n, a);
        Tensor factors = scheme == SCHEME_Q4_0 ? merged_factors(g, p, r, n) : tensor_absent();
        fake_quantize(ours, l && l->lora ? ours : tensor_slice(plain, r, n), factors, scheme, 1.0f);
        same = !memcmp(a, b, (size_t)(n * cols) * sizeof *a);
    }
    free(a);
    return same;
}

/* Every tensor, number by number; the rounded model may then read the file's tables. */
static Status compare_tensors(Model *m, const Model *file, QuantScheme codes, const char *path) {
    for (int i = 0; i < m->g.params.count; i++) {
        Param *p = m->g.params.items[i];
        if (p->adapter) continue;
        const Param *theirs = params_find(&file->g.params, p->name);
        if (!is_ours(&m->g, p, theirs->value, codes))
            FAIL(ERR_FORMAT, "%s: tensor '%s' is not the model's, merged and rounded", path,
                 p->name);
        checkpoint_release(&m->checkpoint, p);
        checkpoint_release(&file->checkpoint, theirs);
        if (!gemma_owner(&m->g, p)) p->value = theirs->value;
    }
    return OK;
}

static void count_adapter(Verification *v, const Gemma *g) {
    for (const Linear *l = g->linears.first; l; l = l->next) {
        if (l->lora) v->applied += l->lora->magnitude ? 3 : 2;
        v->applied += l->factors != NULL;
    }
    for (int i = 0; i < g->params.count; i++) v->adapter_tensors += g->params.items[i]->adapter;
}

Status verify_export(Verification *v, const char *model, const char *adapter, const char *exported,
                     QuantScheme codes) {
    Model m = {0}, file = {0};
    Prompts p = {0};
    Sink plain = {0}, merged = {0}, rounded = {0}, stored = {0};
    FakeQuant fakes[SCHEMES];
    Status status = OK;
    *v = (Verification){0};
    TRY_DONE(model_open(&m, model, adapter, "cpu", "f32", WEIGHTS_MAPPED, WITHOUT_MEDIA));
    TRY_DONE(model_open(&file, exported, NULL, "cpu", "f32", WEIGHTS_MAPPED, WITHOUT_MEDIA));
    TRY_DONE(read_prompts(&p, &m));
    count_adapter(v, &m.g);
    TRY_DONE(run_model(&m, &p, &plain));
    merge_at_use(&m, fakes, NULL, codes);
    TRY_DONE(run_model(&m, &p, &merged));
    TRY_DONE(run_model(&file, &p, &stored));
    merge_at_use(&m, fakes, &file, codes);
    TRY_DONE(compare_tensors(&m, &file, codes, exported));
    TRY_DONE(run_model(&m, &p, &rounded));
    TRY_DONE(compare(&v->merging, &plain, &merged, &p));
    TRY_DONE(compare(&v->format, &merged, &stored, &p));
    TRY_DONE(compare(&v->file, &rounded, &stored, &p));
    if (!(v->merging.kl <= KL_LIMIT && v->merging.largest <= LARGEST_LIMIT))
        FAIL_DONE(ERR_FORMAT,
                  "%s: the merged weights differ from base and adapter: KL %.3g, largest logit "
                  "difference %.3g",
                  exported, v->merging.kl, v->merging.largest);
    if (!(v->file.kl <= KL_LIMIT && v->file.largest <= LARGEST_LIMIT))
        FAIL_DONE(
            ERR_FORMAT,
            "%s: differs from the model beyond the format's own error: KL %.3g, largest logit "
            "difference %.3g",
            exported, v->file.kl, v->file.largest);
done:
    if (plain.file) fclose(plain.file);
    if (merged.file) fclose(merged.file);
    if (rounded.file) fclose(rounded.file);
    if (stored.file) fclose(stored.file);
    prompts_free(&p);
    model_close(&file);
    model_close(&m);
    return status;
}

void verification_print(const Verification *v) {
    const struct {
        const char *name;
        const LogitsDifference *d;
    } lines[] = {{"base + adapter, merged", &v->merging},
                 {"merged, exported file", &v->format},
                 {"merged and rounded, exported file", &v->file}};
    fprintf(stderr, "applied %d of %d adapter tensors; %" PRId64 " positions\n", v->applied,
            v->adapter_tensors, v->format.positions);
    fprintf(stderr, "  %-36s %12s %10s %14s\n", "", "KL", "same top", "largest diff.");
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++)
        fprintf(stderr, "  %-36s %12.3e %9.2f%% %14.3e\n", lines[i].name, lines[i].d->kl,
                100 * lines[i].d->same_top, lines[i].d->largest);
}
