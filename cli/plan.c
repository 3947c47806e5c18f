/* plan.c - lapidary plan: what each rank of a run takes, before anything runs. */
#include "cli/command.h"
#include "formats/file.h"
#include "train/session.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define RANKS_MOST 1024

/* What a GPU has, less what CUDA, cuBLASLt and panels of weights take beside the plan. */
static const struct {
    const char *name;
    double bytes;
} gpus[] = {{"h100", 84.5e9}, {"h200", 150.0e9}, {"a100", 84.5e9}, {"b200", 191.0e9}};
#define GPU_BESIDE 0.6e9

/* Logits that a GPU has at a time beyond the CPU's: f32 and their gradients. */
static double more_logits(const Gemma *g) {
    return (double)((LOSS_ROWS_GPU - LOSS_ROWS) * g->config.vocab_size) *
           (4.0 + (double)dtype_size(g->dtype));
}

/* Bytes that a rank sends in a step: sums of gradients to their ranks, at level 2 in each turn of
 * micro-batches, and the updated values (or, at level 0, the sums) to all. */
static double sent_bytes(Session *s, int64_t ranks) {
    double values = 4.0 * (double)params_bytes(&s->g.params).trained,
           away = (double)(ranks - 1) / (double)ranks;
    int64_t turns = s->config.shard == 2 ? (s->config.accumulate + ranks - 1) / ranks : 1;
    return values * away * (double)(turns + 1);
}

/* One line for so many ranks at a level; whether it fits. */
static Status plan_level(Session *s, int64_t ranks, int shard, double bytes, bool gpu, bool shows,
                         bool *fits) {
    double more = gpu ? more_logits(&s->g) : 0;
    s->config.shard = shard;
    TRY(session_suppose(s, (int)ranks, bytes > more ? (size_t)(bytes - more) : 0));
    const MemoryPlan *p = &s->plan;
    double total = (double)p->total + more;
    *fits = total <= bytes;
    if (!shows && !*fits) return OK;
    printf("{\"ranks\": %" PRId64 ", \"shard\": %d, \"recompute\": %s, \"weights_gb\": %.2f, "
           "\"trained_gb\": %.2f, \"gradients_gb\": %.2f, \"states_gb\": %.2f, \"activations_gb\": "
           "%.2f, \"temporaries_gb\": %.2f, \"total_gb\": %.2f, \"fits\": %s, \"sent_gb\": %.3f}\n",
           ranks, shard, p->mode == STACK_KEEP ? "false" : "true", (double)p->weights / 1e9,
           (double)p->masters / 1e9, (double)p->gradients / 1e9, (double)p->optimizer / 1e9,
           (double)p->activations / 1e9, ((double)p->scratch + more) / 1e9, total / 1e9,
           *fits ? "true" : "false", sent_bytes(s, ranks) / 1e9);
    return OK;
}

/* Every level for `ranks`; or, where that is 0, the first level that fits for one rank, two, ...,
 * as many as have a micro-batch. */
static Status plan_ranks(Session *s, int64_t ranks, double bytes, bool gpu) {
    int64_t most = s->config.accumulate < RANKS_MOST ? s->config.accumulate : RANKS_MOST;
    bool fits = false;
    if (ranks > most)
        FAIL(ERR_CONFIG,
             "%" PRId64 " ranks: batch.accumulate is %" PRId64
             ", expected at least as many: ranks share a step's micro-batches",
             ranks, s->config.accumulate);
    for (int shard = 0; ranks && shard <= 2; shard++)
        TRY(plan_level(s, ranks, shard, bytes, gpu, true, &fits));
    for (int64_t n = 1; !ranks && n <= most; n *= 2) {
        fits = false;
        for (int shard = 0; !fits && shard <= 2; shard++)
            TRY(plan_level(s, n, shard, bytes, gpu, shard == 2, &fits));
    }
    return OK;
}

Status command_plan(int argc, char **argv) {
    int64_t ranks = 0;
    const char *name = NULL;
    RunOptions run = {0};
    Option options[] = {{"--gpus", OPTION_INT, &ranks,
                         "N  ranks: all levels of sharing for them; default: the first "
                         "level that fits for 1, 2, 4, ... ranks"},
                        {"--gpu", OPTION_TEXT, &name,
                         "a100|h100|h200|b200  whose memory is to suffice; default: "
                         "this machine's"},
                        RUN_OPTIONS(run),
                        {NULL, OPTION_FLAG, NULL, NULL}};
    Arguments a = {.usage = "plan RUN.yaml [--gpus N] [--gpu NAME] [key.path=value ...]",
                   .about =
                       "Memory of each rank and what it sends in a step, before anything runs.",
                   .options = options,
                   .least = 1,
                   .most = -1};
    TRY(arguments_parse(&a, argc, argv));
    if (a.helped) return OK;
    double bytes = 0;
    for (size_t i = 0; name && i < sizeof gpus / sizeof *gpus; i++)
        if (!strcmp(name, gpus[i].name)) bytes = gpus[i].bytes - GPU_BESIDE;
    if (name && bytes == 0) FAIL(ERR_USAGE, "--gpu %s: expected a100, h100, h200 or b200", name);
    if (ranks < 0) FAIL(ERR_USAGE, "--gpus %" PRId64 ": expected 1 or more", ranks);
    RunConfig config;
    Session s;
    TRY(run_arguments_load(&config, &a, &run));
    char *store = must_format("/tmp/lapidary-plan-%d.h5", (int)getpid());
    Status status = session_open(&s, &config, NULL, store, NULL);
    run_config_free(&config);
    if (status == OK) {
        status = plan_ranks(&s, ranks, name ? bytes : (double)s.plan.available, name != NULL);
        session_close(&s);
    }
    tree_remove(store);
    free(store);
    return status;
}
