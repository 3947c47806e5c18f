/* doctor.c - lapidary doctor: looks at a run before its first step. */
#include "cli/command.h"
#include "formats/file.h"
#include "kernels/update.h"
#include "train/progress.h"
#include "train/session.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define TRAINED_COLOUR "\033[32m"
#define MASKED_COLOUR  "\033[2m"
#define END_COLOUR     "\033[0m"
#define SAMPLES_SHOWN  3

static int warnings;

static void warn(const char *format, const char *detail) {
    warnings++;
    printf("  WARNING  ");
    printf(format, detail);
    printf("\n");
}

/* Trained text in colour (or between [[ ]] where there is no terminal), the rest dim. */
static Status show_sample(Session *s, int64_t sample, bool colour) {
    int64_t n = sample_length(&s->store.train, sample);
    int32_t *ids = must_malloc((size_t)n * sizeof *ids);
    uint8_t *mask = must_malloc((size_t)n);
    Status status = store_read(&s->store, false, sample, ids, mask);
    int line;
    const char *path = store_source(&s->store, false, sample, &line);
    if (status == OK)
        printf("\nsample %" PRId64 " (%s:%d), %" PRId64 " tokens, %" PRId64 " trained:\n", sample,
               path, line, n, s->store.train.trained[sample]);
    for (int64_t i = 0; status == OK && i < n;) {
        int64_t end = i;
        Text text = {0};
        while (end < n && mask[end] == mask[i]) end++;
        tokenizer_decode(s->tokenizer, &text, ids + i, end - i, false);
        if (colour)
            printf("%s%s%s", mask[i] ? TRAINED_COLOUR : MASKED_COLOUR, text.bytes, END_COLOUR);
        else
            printf(mask[i] ? "[[%s]]" : "%s", text.bytes);
        text_free(&text);
        i = end;
    }
    printf("\n");
    free(ids);
    free(mask);
    return status;
}

/* Every trained sample should end on a token the model stops on. */
static Status check_stops(Session *s) {
    int32_t stops[] = {tokenizer_find(s->tokenizer, "<turn|>"),
                       tokenizer_find(s->tokenizer, "<eos>"),
                       tokenizer_find(s->tokenizer, "<|tool_response>")};
    int64_t without = 0, looked = s->store.train.count < 1000 ? s->store.train.count : 1000;
    for (int64_t i = 0; i < looked; i++) {
        int64_t n = sample_length(&s->store.train, i), last = -1;
        int32_t *ids = must_malloc((size_t)n * sizeof *ids);
        uint8_t *mask = must_malloc((size_t)n);
        Status status = store_read(&s->store, false, i, ids, mask);
        for (int64_t t = 0; status == OK && t < n; t++)
            if (mask[t]) last = ids[t];
        without += last != stops[0] && last != stops[1] && last != stops[2];
        free(ids);
        free(mask);
        TRY(status);
    }
    printf("  stop token: %" PRId64 " of %" PRId64 " samples end on a trained stop token\n",
           looked - without, looked);
    if (without)
        warn("%s samples teach no stop: documents longer than max_length, or add_eos false",
             without == looked ? "all" : "some");
    return OK;
}

/* The sum of squares of the gradients below one module. */
static double gradient_below(const Gemma *g, const char *part) {
    double total = 0;
    for (int i = 0; i < g->params.count; i++) {
        const Param *p = g->params.items[i];
        double sum;
        if (!p->trainable || !strstr(p->name, part)) continue;
        sum_of_squares(&sum, p->grad);
        total += sum;
    }
    return sqrt(total);
}

/* One batch forward and back: a finite loss, a gradient for everything trained, and for the layers
 * whose K and V later layers read. */
static Status check_gradients(Session *s) {
    MicroBatch *batches;
    int64_t count, trained;
    TRY(session_place(s));
    TRY(loader_start(s->loader, 0));
    TRY(loader_next(s->loader, &batches, &count, &trained));
    float *nll = must_malloc((size_t)(s->plan.rows + 1) * sizeof *nll);
    gradients_zero(&s->g.params);
    s->g.fake.blend = 1; /* whole, whenever it begins */
    double begin = progress_now(),
           loss = step_run(&s->g, &s->memory, &batches[0].batch, &s->options, nll);
    gemma_finish_gradients(&s->g);
    double seconds = progress_now() - begin, norm = gradients_norm(&s->g.params);
    loss *= (double)trained / (double)(batches[0].trained ? batches[0].trained : 1);
    free(nll);
    printf("  first batch: loss %.4f (a uniform guess is %.4f), gradient norm %.4g, %.0f tokens/s, "
           "%.2f GB resident\n",
           loss, log((double)s->g.config.vocab_size), norm, (double)batches[0].batch.N / seconds,
           (double)process_resident() / 1e9);
    if (!isfinite(loss) || !isfinite(norm)) warn("%s", "the loss or gradient is not finite");
    for (int l = 0; l < s->g.config.num_hidden_layers; l++) {
        if (!s->g.blocks[l].config.kv_is_shared) continue;
        char part[64];
        snprintf(part, sizeof part, "layers.%d.self_attn.k_proj", l);
        double k = gradient_below(&s->g, part);
        printf("  layer %d lends its K and V: gradient norm of k_proj %.4g\n", l, k);
        if (!method_has_adapter(s->config.method) && !(k > 0)) warn("%s gets no gradient", part);
    }
    return OK;
}

static Status examine(Session *s, bool weights) {
    const StoreCounts *n = &s->store.counts;
    bool colour = isatty(1);
    for (int64_t i = 0; i < SAMPLES_SHOWN && i < s->store.train.count; i++)
        TRY(show_sample(s, i, colour));
    printf("\nchecks:\n  rows: %.0f, samples %.0f, cut %.0f, dropped %.0f, bad %.0f\n", n->rows,
           n->samples, n->cut, n->dropped, n->bad);
    printf("  trained share: %.1f %% of %.0f tokens\n",
           n->tokens > 0 ? 100 * n->trained / n->tokens : 0, n->tokens);
    if (n->trained < 0.02 * n->tokens)
        warn("%s", "less than 2 % of the tokens are trained: check data.loss_on and the roles");
    if (n->dropped > 0.2 * n->rows)
        warn("%s", "more than a fifth of the rows is dropped: raise data.max_length");
    printf("  template: %s\n",
           s->reader.has_format ? chat_format_name(s->reader.format) : "not used by these rows");
    TRY(check_stops(s));
    printf("  steps: %" PRId64 " over %.2f epochs, %" PRId64 " packed rows an epoch\n",
           loader_steps(s->loader), loader_epoch(s->loader, loader_steps(s->loader)),
           loader_rows(s->loader));
    printf("  memory: %.2f GB needed, %.2f GB available, activations %s\n",
           (double)s->plan.total / 1e9, (double)s->plan.available / 1e9,
           s->plan.mode == STACK_KEEP        ? "kept"
           : s->plan.mode == STACK_RECOMPUTE ? "recomputed"
                                             : "recomputed, layers' inputs in the host's memory");
    if (s->plan.total > s->plan.available) warn("%s", "the run does not fit");
    if (weights && s->plan.total <= s->plan.available) TRY(check_gradients(s));
    printf(warnings ? "%d warnings\n" : "no warnings\n", warnings);
    return OK;
}

Status command_doctor(int argc, char **argv) {
    bool fast = false;
    RunOptions run = {0};
    Option options[] = {{"--no-weights", OPTION_FLAG, &fast, "look at data and memory only"},
                        RUN_OPTIONS(run),
                        {NULL, OPTION_FLAG, NULL, NULL}};
    Arguments a = {.usage = "doctor RUN.yaml [key.path=value ...]",
                   .about = "Shows samples with their loss mask and checks stop tokens, template, "
                            "kept-token share,\n"
                            "memory, and the gradients of one batch.",
                   .options = options,
                   .least = 1,
                   .most = -1};
    TRY(arguments_parse(&a, argc, argv));
    if (a.helped) return OK;
    RunConfig config;
    Session s;
    TRY(run_arguments_load(&config, &a, &run));
    char *store = must_format("/tmp/lapidary-doctor-%d.h5", (int)getpid());
    Status status = session_open(&s, &config, NULL, store, NULL);
    run_config_free(&config);
    if (status == OK) {
        status = examine(&s, !fast);
        session_close(&s);
    }
    tree_remove(store);
    free(store);
    return status;
}
