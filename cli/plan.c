/* plan.c - lapidary plan: what each rank of a run takes and how fast it will be, before anything
 * runs. */
#include "cli/command.h"
#include "formats/file.h"
#include "train/forecast.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define RANKS_MOST 1024
#define LEVELS     4

/* GPUs of one host, unless --nodes says otherwise. */
#define HOST_GPUS 8

/* What CUDA, cuBLASLt and panels of weights take of a GPU beside the plan. */
#define GPU_BESIDE 0.6e9

/* For whom plans are made. */
typedef struct Machine {
    Speeds speeds;
    double bytes;  /* of one rank's memory */
    double beside; /* of them that the process takes beside the plan */
    int64_t nodes; /* 0: as many as there are */
    bool gpu;      /* another machine's, whose logits come in more rows */
} Machine;

/* Logits that a GPU has at a time beyond the CPU's: f32 and their gradients. */
static double more_logits(const Gemma *g) {
    return (double)((LOSS_ROWS_GPU - LOSS_ROWS) * g->config.vocab_size) *
           (4.0 + (double)dtype_size(g->dtype));
}

/* Ranks of one host. */
static int host_ranks(const Machine *m, int64_t ranks) {
    if (m->nodes) return (int)((ranks + m->nodes - 1) / m->nodes);
    return m->gpu && ranks > HOST_GPUS ? HOST_GPUS : (int)ranks;
}

/* What is planned for so many ranks at a level. */
typedef struct Line {
    int64_t ranks;
    int shard, host;
    MemoryPlan plan;
    double total, more; /* bytes, and of them what another GPU's logits take */
    bool fits;
    Forecast forecast;
} Line;

static Status plan_level(Line *l, Session *s, const Machine *m, int64_t ranks, int shard) {
    *l = (Line){.ranks = ranks, .shard = shard, .host = host_ranks(m, ranks)};
    l->more = m->gpu ? more_logits(&s->g) : 0;
    double room = m->bytes - m->beside - l->more;
    s->config.shard = shard;
    TRY(session_suppose(s, (int)ranks, room > 0 ? (size_t)room : 0));
    l->plan = s->plan;
    l->total = (double)s->plan.total + m->beside + l->more;
    l->fits = l->total <= m->bytes;
    l->forecast = forecast_run(s, &m->speeds, l->host);
    return OK;
}

static void print_line(const Line *l, const Machine *m) {
    const MemoryPlan *p = &l->plan;
    const Forecast *f = &l->forecast;
    printf("{\"ranks\": %" PRId64 ", \"nodes\": %" PRId64
           ", \"shard\": %d, \"recompute\": %s, \"weights_gb\": %.2f, \"trained_gb\": %.2f, "
           "\"gradients_gb\": %.2f, \"states_gb\": %.2f, \"activations_gb\": %.2f, "
           "\"temporaries_gb\": %.2f, \"process_gb\": %.2f, \"total_gb\": %.2f, \"fits\": %s, "
           "\"sent_gb\": %.3f, \"sent_far_gb\": %.3f, \"step_s\": %.4g, \"tokens_per_s\": %.4g}\n",
           l->ranks, (l->ranks + l->host - 1) / l->host, l->shard,
           p->mode == STACK_KEEP ? "false" : "true", (double)p->weights / 1e9,
           (double)p->masters / 1e9, (double)p->gradients / 1e9, (double)p->optimizer / 1e9,
           (double)p->activations / 1e9, ((double)p->scratch + l->more) / 1e9, m->beside / 1e9,
           l->total / 1e9, l->fits ? "true" : "false", (f->near + f->far) / 1e9, f->far / 1e9,
           f->step, f->tokens_per_s);
}

/* Whether a line is better than another: it fits, and is fastest; or it needs least. */
static bool is_better(const Line *a, const Line *b) {
    if (a->fits != b->fits) return a->fits;
    return a->fits ? a->forecast.tokens_per_s > b->forecast.tokens_per_s : a->total < b->total;
}

/* Whether so many ranks can share the run as it says. */
static bool can_share(const RunConfig *c, int64_t ranks) {
    return ranks % c->context == 0 && ranks % c->experts == 0 &&
           (!c->within || ranks % c->within == 0);
}

/* Every level for `ranks`; or, where that is 0, the fastest level that fits for one rank, two, ...,
 * as many as have a micro-batch. */
static Status plan_ranks(Session *s, const Machine *m, int64_t ranks) {
    int64_t most = s->config.accumulate * s->config.context;
    Line line, best;
    if (most > RANKS_MOST) most = RANKS_MOST;
    if (ranks > most)
        FAIL(ERR_CONFIG,
             "%" PRId64 " ranks: batch.accumulate is %" PRId64
             ", expected at least as many: ranks share a step's micro-batches",
             ranks, s->config.accumulate);
    for (int shard = 0; ranks && shard < LEVELS; shard++) {
        TRY(plan_level(&line, s, m, ranks, shard));
        print_line(&line, m);
    }
    for (int64_t n = 1; !ranks && n <= most; n *= 2) {
        if (!can_share(&s->config, n)) continue;
        for (int shard = 0; shard < LEVELS; shard++) {
            TRY(plan_level(&line, s, m, n, shard));
            if (!shard || is_better(&line, &best)) best = line;
        }
        print_line(&best, m);
    }
    return OK;
}

/* As many ranks as plan together, or as few as the run file's groups allow. */
static Comm suppose_ranks(const Comm *comm, const RunConfig *c) {
    int64_t least = c->context * c->experts * (c->within ? c->within : 1);
    return (Comm){
        .size = comm_is_many(comm) ? comm->size : (int)least, .supposed = true, .threads = true};
}

/* The GPU named, or this machine as it is now. */
static Status find_machine(Machine *m, const Session *s, const Comm *comm, const char *name) {
    if (name) {
        m->gpu = true;
        m->speeds = *speeds_of(name);
        m->bytes = m->speeds.memory_bytes - GPU_BESIDE;
        return OK;
    }
    m->bytes = (double)s->plan.available;
    if (s->g.device->kind == DEVICE_CPU) m->beside = (double)process_resident();
    return speeds_measure(&m->speeds, s, comm);
}

Status command_plan(int argc, char **argv) {
    int64_t ranks = 0;
    Machine machine = {0};
    const char *name = NULL;
    RunOptions run = {0};
    Option options[] = {
        {"--gpus", OPTION_INT, &ranks,
         "N  ranks: all levels of sharing for them; default: the fastest that fits for 1, 2, 4, "
         "... ranks"},
        {"--nodes", OPTION_INT, &machine.nodes, "M  hosts that they are on (8 GPUs on each)"},
        {"--gpu", OPTION_TEXT, &name,
         "a100|h100|h200|b200  whose memory is to suffice and whose speed counts; default: this "
         "machine's, timed now"},
        RUN_OPTIONS(run),
        {NULL, OPTION_FLAG, NULL, NULL}};
    Arguments a = {.usage =
                       "plan RUN.yaml [--gpus N] [--nodes M] [--gpu NAME] [key.path=value ...]",
                   .about = "Memory of each rank, what it sends in a step, and how fast steps will "
                            "be, before\nanything runs. Under mpirun this machine's ranks and "
                            "links are timed together.",
                   .options = options,
                   .least = 1,
                   .most = -1};
    TRY(arguments_parse(&a, argc, argv));
    if (a.helped) return OK;
    if (name && !speeds_of(name))
        FAIL(ERR_USAGE, "--gpu %s: expected a100, h100, h200 or b200", name);
    if (ranks < 0) FAIL(ERR_USAGE, "--gpus %" PRId64 ": expected 1 or more", ranks);
    if (machine.nodes < 0)
        FAIL(ERR_USAGE, "--nodes %" PRId64 ": expected 1 or more", machine.nodes);
    RunConfig config;
    Session s;
    Comm comm;
    TRY(run_arguments_load(&config, &a, &run));
    TRY(comm_open(&comm));
    Comm supposed = suppose_ranks(&comm, &config);
    char *store = must_format("/tmp/lapidary-plan-%d.h5", (int)getpid());
    Status status = session_open(&s, &config, &supposed, store, NULL);
    run_config_free(&config);
    if (status == OK) {
        status = find_machine(&machine, &s, &comm, name);
        if (!ranks && comm_is_many(&comm)) ranks = comm.size;
        if (status == OK && !comm.rank) status = plan_ranks(&s, &machine, ranks);
        session_close(&s);
    }
    comm_close(&comm);
    tree_remove(store);
    free(store);
    return status;
}
