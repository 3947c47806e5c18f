/* session.c - opening a run. */
#include "train/session.h"
#include "formats/file.h"
#include "kernels/random.h"
#include "train/adapt.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static bool is_store(const char *path) {
    size_t n = strlen(path);
    return n > 3 && !strcmp(path + n - 3, ".h5");
}

/* Ranks make a store together; whether there is one already the first of them sees. */
static Status open_data(Session *s, const char *store_path, StoreProgress *progress) {
    DataConfig *c = &s->config.data;
    bool there = file_exists(store_path);
    if (is_store(c->train.items[0])) {
        if (c->train.count > 1 || c->eval.count)
            FAIL(ERR_CONFIG, "data.train: one .h5 file holds train and eval rows, expected no "
                             "other file beside it");
        TRY(store_open(&s->store, c->train.items[0], NULL, c, s->config.seed));
        return store_check_origin(&s->store, s->tokenizer);
    }
    comm_broadcast(&s->comm, &there, sizeof there);
    if (!there) TRY(store_build(store_path, &s->reader, c, s->config.seed, &s->comm, progress));
    return store_open(&s->store, store_path, &s->reader, c, s->config.seed);
}

/* Whether layers are exchanged while others are computed. */
static bool exchanges_beside(const Session *s) {
    return comm_is_many(&s->comm) && s->config.shard >= 2 && (s->beside || s->comm.supposed);
}

/* Leaves this rank its part of the experts. */
static Status share_experts(Session *s) {
    const RunConfig *c = &s->config;
    if (!s->g.config.num_experts)
        FAIL(ERR_CONFIG, "parallel.experts is %" PRId64 ", and %s has no experts", c->experts,
             c->model);
    if (c->quant.learned_scale && method_rounds(c->method))
        FAIL(ERR_CONFIG, "quant.learned_scale: expected false with parallel.experts");
    if (c->method == METHOD_QLORA && c->quant.format == QUANT_NF4 && c->quant.nested)
        FAIL(ERR_CONFIG, "quant.double: expected false with parallel.experts: one mean is of the "
                         "scales of all experts");
    return gemma_share_experts(&s->g, &s->ranks.experts);
}

/* Declares the model as the method wants it. */
static Status declare(Session *s, Device *device, bool media) {
    const RunConfig *c = &s->config;
    adapter_spec_free(&s->spec);
    gemma_free(&s->g);
    gemma_declare(&s->g, &s->checkpoint.config, !strcmp(c->dtype, "bf16") ? BF16 : F32, device);
    if (comm_is_many(&s->context)) s->g.context = &s->context;
    if (media) gemma_declare_media(&s->g);
    TRY(adapt(&s->g, c, &s->spec));
    if (c->experts > 1) TRY(share_experts(s));
    checkpoint_formats(&s->checkpoint, &s->g);
    return OK;
}

/* A store may have been made for another model: the same tokenizer, but other cells or features. */
static Status check_media(const Session *s) {
    const VisionConfig *v = &s->checkpoint.config.vision;
    const AudioConfig *a = &s->checkpoint.config.audio;
    int64_t side = v->patch_size * v->pooling_kernel_size;
    for (int64_t i = 0; i < s->store.media_count; i++) {
        const StoredMedium *m = &s->store.media[i];
        bool picture = m->height > 0;
        bool fits = picture ? v->path && !(m->height % side) && !(m->width % side) &&
                                  m->tokens == media_picture_tokens(v, m->height, m->width)
                            : a->path && m->tokens == media_audio_tokens(a, m->frames) &&
                                  (m->parts || m->bytes == m->frames * media_feature_width(a) *
                                                               (int64_t)sizeof(float));
        if (!fits)
            FAIL(ERR_FORMAT, "%s: its %s %" PRId64 " was made for another model than %s",
                 s->store.file.path, picture ? "picture" : "recording", i, s->config.model);
    }
    return OK;
}

/* The largest picture and the longest recording of the data: what towers need memory for. */
static void find_largest(Session *s) {
    int64_t count = 0, picture = -1, sound = -1;
    const StoredMedium *m = s->store.media;
    for (int64_t i = 0; i < s->store.media_count; i++) {
        int64_t *best = m[i].height ? &picture : &sound;
        if (*best < 0 || m[i].tokens > m[*best].tokens) *best = i;
    }
    int64_t found[] = {picture, sound};
    for (int i = 0; i < 2; i++)
        if (found[i] >= 0)
            s->largest[count++] = (MediaItem){.count = m[found[i]].tokens,
                                              .height = m[found[i]].height,
                                              .width = m[found[i]].width,
                                              .frames = m[found[i]].frames};
    s->options.largest = s->largest;
    s->options.largest_count = count;
}

/* What towers make of all media, where it is the same at every step; within half of what is free.
 */
static void plan_tower_cache(Session *s) {
    MemoryPlan *p = &s->plan;
    p->towers = 0;
    if (!s->g.media.params || media_trains_towers(&s->g.media)) return;
    for (int64_t i = 0; i < s->store.media_count; i++) {
        const StoredMedium *m = &s->store.media[i];
        int64_t width = media_tower_width(&s->g.media, m->height > 0);
        p->towers += (size_t)(m->tokens * width) * dtype_size(s->g.dtype);
    }
    size_t room = p->available > p->total ? (p->available - p->total) / 2 : 0;
    if (p->towers > room) p->towers = room;
    s->g.media.cache->most = p->towers;
    p->total += p->towers;
}

/* A layer's gradients go to their ranks as soon as they are there, and the next layer takes their
 * place. */
static bool shares_gradients(const Session *s) {
    return s->config.shard >= 2 && comm_is_many(&s->comm);
}

/* What the run file asks for, or without a wish the first that fits: a tenth stays free for the
 * page cache, the tokenizer and the rest of the machine. On the CPU all memory is the host's. */
static bool takes_mode(const Session *s, StackMode mode) {
    bool gpu = s->g.device->kind == DEVICE_CUDA,
         last = mode == (gpu ? STACK_OFFLOAD : STACK_RECOMPUTE);
    if (mode < s->least_mode) return false;
    switch (s->config.recompute) {
    case RECOMPUTE_ON:
        return mode == STACK_RECOMPUTE;
    case RECOMPUTE_OFF:
        return mode == STACK_KEEP;
    case RECOMPUTE_OFFLOAD:
        return last;
    default:
        return last || (double)s->plan.total < 0.9 * (double)s->plan.available;
    }
}

Status session_plan(Session *s, size_t available) {
    MemoryPlan *p = &s->plan;
    *p = (MemoryPlan){.available = available};
    OptimizerConfig *o = &s->optimizer.config;
    *o = (OptimizerConfig){s->config.optimizer.sgd ? OPTIMIZER_SGD : OPTIMIZER_ADAMW,
                           s->config.optimizer.lr,
                           s->config.optimizer.beta1,
                           s->config.optimizer.beta2,
                           s->config.optimizer.eps,
                           s->config.optimizer.weight_decay,
                           s->config.optimizer.momentum,
                           (uint64_t)s->config.seed,
                           s->config.optimizer.states_8bit,
                           shares_gradients(s)};
    Space *space = &s->g.params.space;
    space->level = comm_is_many(&s->comm) ? (int)s->config.shard : 0;
    space->ranks = comm_is_many(&s->comm) ? &s->ranks : NULL;
    space->overlaps = exchanges_beside(s);
    space->beside = space->overlaps ? s->beside : NULL;
    space->beside_ranks = &s->beside_ranks;
    space->whole_trained = method_has_adapter(s->config.method);
    space->no_masters = s->config.optimizer.no_masters;
    space->one_layer = s->config.optimizer.fused || shares_gradients(s);
    ParamBytes bytes = params_bytes(&s->g.params);
    p->weights = bytes.values;
    p->masters = bytes.masters;
    p->gradients = bytes.gradients;
    for (int i = 0; i < s->g.params.count; i++) {
        const Param *q = s->g.params.items[i];
        if (q->mapped && !q->trainable) p->mapped += tensor_bytes(q->value);
        if (q->value.ndim != 3 || q->adapter || q->trainable || q->tower) continue;
        p->experts += tensor_bytes(q->value);
        p->expert_bits = 8.0 * (double)tensor_bytes(q->value) / (double)tensor_count(q->value);
    }
    p->optimizer = optimizer_measure(o, bytes.own);
    p->rows = loader_capacity(s->loader);
    if (!s->store.train.count) FAIL(ERR_FORMAT, "%s: holds no training sample", s->store.file.path);
    int64_t longest = p->rows > s->config.data.max_length ? p->rows : s->config.data.max_length;
    for (int l = 0; l < s->g.config.num_hidden_layers; l++)
        s->g.blocks[l].config.expert_rows = step_own_rows(&s->g, longest, &s->options);
    size_t base = p->weights + p->masters + p->gradients + p->optimizer;
    for (int mode = STACK_KEEP; mode <= STACK_OFFLOAD; mode++) {
        s->options.mode = p->mode = (StackMode)mode;
        step_plan(&s->g, p->rows, &s->options, &p->activations, &p->scratch);
        p->total = base + p->activations + p->scratch;
        if (takes_mode(s, p->mode)) break;
    }
    if (p->mode == STACK_OFFLOAD)
        p->host = stack_offload_bytes(&s->g, step_own_rows(&s->g, p->rows, &s->options)) *
                  (size_t)s->g.config.num_hidden_layers;
    plan_tower_cache(s);
    return OK;
}

/* All ranks keep as little as the one with the least memory. */
static Status agree_on_mode(Session *s) {
    s->least_mode = (StackMode)comm_most(&s->comm, (int)s->plan.mode);
    return s->least_mode == s->plan.mode ? OK : session_plan(s, s->plan.available);
}

/* What all ranks must have in common. */
static Status check_ranks(Session *s) {
    const Comm *comm = &s->comm;
    const RunConfig *c = &s->config;
    const SampleSet *train = &s->store.train;
    uint64_t data = random_key((uint64_t)train->count, (uint64_t)s->store.eval.count);
    if (!comm_is_many(comm)) return OK;
    if (train->count) data = random_key(data, (uint64_t)train->begins[train->count]);
    TRY(comm_agree(comm, "dataset", data));
    TRY(comm_agree(comm, "kind of device", (uint64_t)s->g.device->kind));
    if (c->accumulate < s->data_ranks)
        FAIL(ERR_CONFIG,
             "batch.accumulate is %" PRId64 ", expected at least %d: ranks share a step's "
             "micro-batches",
             c->accumulate, s->data_ranks);
    if (c->eval_tasks.names.count && (c->shard > 2 || c->experts > 1))
        FAIL(ERR_CONFIG,
             "eval_tasks: expected none with parallel.%s: rank 0 has not all of the model",
             c->shard > 2 ? "shard 3" : "experts");
    if (c->optimizer.no_masters || c->optimizer.fused)
        FAIL(ERR_CONFIG, "optimizer.%s: expected masters f32 and fused false with several ranks",
             c->optimizer.fused ? "fused" : "masters");
    return OK;
}

static Status check_divides(const char *key, int64_t value, int64_t ranks) {
    if (ranks % value)
        FAIL(ERR_CONFIG,
             "parallel.%s is %" PRId64 ", expected a divisor of the number of ranks, %" PRId64, key,
             value, ranks);
    return OK;
}

/* Ranks that share rows, shares, or experts follow each other. */
static Status make_groups(Session *s) {
    const RunConfig *c = &s->config;
    RankGroups *g = &s->ranks, *b = &s->beside_ranks;
    int64_t size = s->comm.size, within = c->within ? c->within : size;
    TRY(check_divides("context", c->context, size));
    TRY(check_divides("experts", c->experts, size));
    TRY(check_divides("within", within, size));
    comm_group(&s->context, &s->comm, (int)c->context, false);
    g->all = s->comm;
    comm_group(&g->sharers, &s->comm, (int)within, false);
    comm_group(&g->across, &s->comm, (int)(size / within), true);
    comm_group(&g->replicas, &s->comm, c->experts > 1 ? (int)(size / c->experts) : 1, true);
    comm_group(&g->experts, &s->comm, (int)c->experts, false);
    comm_again(&b->sharers, &g->sharers);
    comm_again(&b->across, &g->across);
    comm_again(&b->replicas, &g->replicas);
    s->data_rank = s->comm.rank / (int)c->context;
    s->data_ranks = (int)(size / c->context);
    return OK;
}

/* Lets the groups' GPUs exchange data directly, and layers go beside the passes. */
static void join_gpus(Session *s, Device *device) {
    RankGroups *g = &s->ranks, *b = &s->beside_ranks;
    Comm *groups[] = {&s->context, &g->sharers, &g->across, &g->replicas,
                      &g->experts, &b->sharers, &b->across, &b->replicas};
    for (size_t i = 0; i < sizeof groups / sizeof *groups; i++) comm_join_gpus(groups[i], device);
    bool can = device->kind == DEVICE_CPU ? s->comm.threads : session_links_gpus(s);
    if (can) s->beside = comm_beside_open(device);
}

bool session_links_gpus(const Session *s) {
    return s->ranks.sharers.gpus || s->ranks.across.gpus;
}

static void leave_groups(Session *s) {
    Comm *groups[] = {&s->context,
                      &s->ranks.sharers,
                      &s->ranks.across,
                      &s->ranks.replicas,
                      &s->ranks.experts,
                      &s->beside_ranks.sharers,
                      &s->beside_ranks.across,
                      &s->beside_ranks.replicas};
    for (size_t i = 0; i < sizeof groups / sizeof *groups; i++) comm_close(groups[i]);
}

Status session_suppose(Session *s, int ranks, size_t available) {
    leave_groups(s);
    s->least_mode = STACK_SCORE;
    s->comm = (Comm){.size = ranks, .supposed = true, .threads = true};
    TRY(make_groups(s));
    return session_plan(s, available);
}

Status session_open(Session *s, RunConfig *config, const Comm *comm, const char *store_path,
                    StoreProgress *progress) {
    *s = (Session){.config = *config, .comm = comm ? *comm : (Comm){.size = 1}};
    *config = (RunConfig){0}; /* the session owns it now */
    const RunConfig *c = &s->config;
    Device *device;
    Status status = OK;
    TRY_DONE(make_groups(s));
    TRY_DONE(comm_open_device(&s->comm, &device, c->device));
    if (!comm_is_alone(&s->comm)) join_gpus(s, device);
    if (s->comm.supposed)
        TRY_DONE(checkpoint_describe(&s->checkpoint, c->model));
    else
        TRY_DONE(checkpoint_open(&s->checkpoint, c->model));
    TRY_DONE(tokenizer_load(&s->tokenizer, c->model));
    if (tokenizer_size(s->tokenizer) > s->checkpoint.config.vocab_size)
        FAIL_DONE(ERR_FORMAT, "%s: the tokenizer has %" PRId64 " tokens, the model %" PRId64,
                  c->model, tokenizer_size(s->tokenizer), s->checkpoint.config.vocab_size);
    TRY_DONE(row_reader_init(&s->reader, &s->config.data, s->tokenizer, c->model));
    bool towers = checkpoint_has_towers(&s->checkpoint);
    if (towers) s->reader.reading.config = &s->checkpoint.config;
    TRY_DONE(declare(s, device, towers)); /* what is wrong is said before the data is read */
    TRY_DONE(open_data(s, store_path, progress));
    TRY_DONE(check_ranks(s));
    if (s->store.media_count && !towers)
        FAIL_DONE(ERR_CONFIG, "%s: holds media, and %s has no towers", s->store.file.path,
                  c->model);
    TRY_DONE(check_media(s));
    if (towers && !s->store.media_count) TRY_DONE(declare(s, device, false));
    LoaderConfig loader = {c->sequences,          c->accumulate,   c->data.max_length, c->seed,
                           c->data.shuffle,       c->data.packing, c->steps,           c->epochs,
                           &s->checkpoint.config, s->data_rank,    s->data_ranks};
    TRY_DONE(loader_open(&s->loader, &s->store, &loader));
    const char *shortcut = getenv("LAPIDARY_SHORTCUT"); /* 0: for measuring what it saves */
    s->options = (StepOptions){.shortcut = !shortcut || strcmp(shortcut, "0"),
                               .aux_scale = (float)c->aux_loss};
    find_largest(s);
    TRY_DONE(session_plan(s, device_available(s->g.device)));
    TRY_DONE(agree_on_mode(s));
done:
    if (status != OK && comm_is_alone(&s->comm)) session_close(s);
    return status; /* of several ranks the others may be waiting: the process ends as it is */
}

Status session_place(Session *s) {
    if (s->plan.total > s->plan.available)
        FAIL(ERR_IO,
             "the run needs %.2f GB, %.2f GB are available: lower data.max_length or "
             "batch.sequences",
             (double)s->plan.total / 1e9, (double)s->plan.available / 1e9);
    TRY(params_place(&s->g.params, s->g.device, true));
    TRY(checkpoint_load(&s->checkpoint, &s->g));
    TRY(adapt_init(&s->g, &s->config));
    TRY(step_init(&s->memory, &s->g, s->plan.rows, &s->options));
    gemma_refresh(&s->g, &s->memory.scratch);
    OptimizerConfig config = s->optimizer.config;
    return optimizer_init(&s->optimizer, &config, &s->g.params, s->g.device);
}

void session_close(Session *s) {
    comm_beside_close(s->beside);
    loader_close(s->loader);
    store_close(&s->store);
    step_free(&s->memory);
    optimizer_free(&s->optimizer);
    adapter_spec_free(&s->spec);
    gemma_free(&s->g);
    tokenizer_free(s->tokenizer);
    checkpoint_close(&s->checkpoint);
    run_config_free(&s->config);
    leave_groups(s);
    *s = (Session){0};
}

void memory_plan_print(const MemoryPlan *p) {
    struct {
        const char *name;
        size_t bytes;
    } lines[] = {
        {"weights", p->weights},
        {"trained values", p->masters},
        {"gradients", p->gradients},
        {"optimizer states", p->optimizer},
        {p->mode == STACK_KEEP ? "activations" : "activations (recomputed)", p->activations},
        {"temporaries", p->scratch},
        {"outputs of towers", p->towers},
        {"total", p->total}};
    fprintf(stderr, "memory plan for %" PRId64 " rows at a time:\n", p->rows);
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++)
        if (lines[i].bytes != p->towers || p->towers)
            fprintf(stderr, "  %-26s %9.3f GB\n", lines[i].name, (double)lines[i].bytes / 1e9);
    if (p->experts)
        fprintf(stderr, "  %-26s %9.3f GB (of the weights, %.2f bits each)\n", "experts",
                (double)p->experts / 1e9, p->expert_bits);
    if (p->host)
        fprintf(stderr, "  %-26s %9.3f GB (in the host's memory)\n", "inputs of layers",
                (double)p->host / 1e9);
    if (p->mapped)
        fprintf(stderr, "  %-26s %9.3f GB (stays in the file)\n", "per-layer table",
                (double)p->mapped / 1e9);
}
