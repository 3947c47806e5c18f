/* trainer.c - steps, evaluations, saves, and what is shown of them. */
#include "train/trainer.h"
#include "formats/file.h"
#include "formats/sha256.h"
#include "kernels/elementwise.h"
#include "kernels/random.h"
#include "kernels/update.h"
#include "optim/schedule.h"
#include "train/adapt.h"
#include "train/metrics.h"
#include "train/plot.h"
#include "train/progress.h"
#include "train/run_state.h"

#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

/* A gradient norm this many times the median of the last good ones is a spike. */
#define SPIKE         50.0
#define SPIKE_HISTORY 20

static volatile sig_atomic_t stop_requested;

static void request_stop(int signal) {
    (void)signal;
    stop_requested = 1;
}

typedef struct Trainer {
    Session s;
    RunState state;
    MetricsLog log;
    StepMemory eval_memory;
    ExpertLoad *load;
    double taken[EXPERTS_MAX]; /* rows that the experts of each rank got, since the start */
    float *nll;
    int64_t steps;
    const char *output;
    Progress progress;
    AskFunction *ask; /* NULL: no eval_tasks */
    Comm comm;
    bool stop; /* some rank was asked to */
} Trainer;

/* Rank 0 writes and says what there is to write and to say. */
static bool speaks(const Trainer *t) {
    return !t->comm.rank;
}

/* ---- saving ---- */

/* An adapter of experts that ranks have between them is brought together for a while. */
static Status fetch_adapter(Trainer *t) {
    ParamList *params = &t->s.g.params;
    for (int i = 0; i < params->count; i++)
        if (params->items[i]->trainable) TRY(param_fetch(params, params->items[i]));
    return OK;
}

/* All ranks call it. */
static Status save_weights(Trainer *t, const char *path) {
    Session *s = &t->s;
    Status status = OK;
    if (!method_has_adapter(s->config.method))
        return speaks(t) ? checkpoint_save(&s->checkpoint, &s->g, s->g.dtype, SCHEME_NONE, path)
                         : checkpoint_save_along(&s->checkpoint, &s->g);
    TRY_DONE(fetch_adapter(t));
    if (speaks(t)) status = peft_save(&s->g, &s->spec, path);
done:
    for (int i = 0; i < s->g.params.count; i++) param_release(s->g.params.items[i]);
    return status;
}

static const char *weights_name(const Trainer *t) {
    return method_has_adapter(t->s.config.method) ? "adapter" : "model";
}

static int by_step(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x < y ? 1 : x > y ? -1 : 0;
}

/* Removes all but the newest `keep` saves. */
static void prune(const Trainer *t) {
    char *path = path_join(t->output, "checkpoints");
    DIR *dir = opendir(path);
    int64_t steps[4096];
    int count = 0;
    for (struct dirent *entry; dir && count < 4096 && (entry = readdir(dir));)
        if (!strncmp(entry->d_name, "step-", 5) &&
            strspn(entry->d_name + 5, "0123456789") == strlen(entry->d_name + 5))
            steps[count++] = atoll(entry->d_name + 5);
    if (dir) closedir(dir);
    qsort(steps, (size_t)count, sizeof *steps, by_step);
    for (int i = (int)t->s.config.save_keep; i < count; i++) {
        char *old = must_format("%s/step-%" PRId64, path, steps[i]);
        tree_remove(old);
        free(old);
    }
    free(path);
}

/* That no rank failed; one that did not says which did. */
static Status all_are_well(const Trainer *t, Status status) {
    int failed = comm_most(&t->comm, status == OK ? 0 : t->comm.rank + 1);
    if (status != OK || !failed) return status;
    FAIL(ERR_IO, "step %" PRId64 " is not saved: rank %d could not write its part", t->state.step,
         failed - 1);
}

/* The weights as they are, where users look for them. */
static Status save_newest(Trainer *t) {
    char *path = path_join(t->output, weights_name(t));
    Status status = save_weights(t, path);
    free(path);
    return status;
}

/* A folder of a temporary name on the first rank, into which every rank writes its part. */
static Status save(Trainer *t) {
    char *final = must_format("%s/checkpoints/step-%" PRId64, t->output, t->state.step),
         *begun = NULL, *inner = NULL;
    char temporary[4096] = "";
    Status status = OK;
    if (speaks(t)) {
        TRY_DONE(folder_begin(&begun, final));
        CHECK(strlen(begun) < sizeof temporary, "name too long: %s", begun);
        strcpy(temporary, begun);
    }
    comm_broadcast(&t->comm, temporary, sizeof temporary);
    status = run_state_save(&t->state, &t->s.g.params, &t->s.optimizer, temporary);
    TRY_DONE(all_are_well(t, status));
    inner = path_join(temporary, weights_name(t));
    TRY_DONE(save_weights(t, inner));
    if (speaks(t)) {
        status = folder_commit(begun, final);
        begun = NULL;
        if (status != OK) goto done;
    }
    TRY_DONE(save_newest(t));
    if (speaks(t)) prune(t);
    comm_barrier(&t->comm);
done:
    folder_abandon(begun);
    free(final);
    free(inner);
    return status;
}

/* ---- evaluation ---- */

/* Whether ranks wait for each other within passes, so that all must make as many. */
static bool passes_meet(const Session *s) {
    return comm_is_many(&s->comm) &&
           (s->config.shard >= 2 || s->g.experts || comm_is_many(&s->context));
}

/* A pass of one row that gives nothing, where passes of all ranks meet and this one has no
 * micro-batch left. */
static void run_idle(Session *s, StepMemory *memory, StepOptions options) {
    int32_t id = (int32_t)s->g.config.pad_token_id, zero = 0, none = -1;
    float weight = 0, nll;
    Batch idle = {.N = 1,
                  .ids = &id,
                  .positions = &zero,
                  .starts = &zero,
                  .targets = &none,
                  .weights = &weight};
    if (!passes_meet(s)) return;
    options.load = NULL;
    step_run(&s->g, memory, &idle, &options, &nll);
}

Status evaluate(Session *s, StepMemory *memory, double *loss) {
    StepOptions options = {.mode = STACK_SCORE,
                           .shortcut = true,
                           .largest = s->options.largest,
                           .largest_count = s->options.largest_count};
    int64_t capacity = s->config.data.max_length, sample = 0, trained = 0;
    MicroBatch batch = {0};
    float *nll = must_malloc((size_t)capacity * sizeof *nll);
    double total = 0;
    int turn = 0;
    Status status = OK;
    if (!memory->activations.capacity) TRY_DONE(step_init(memory, &s->g, capacity, &options));
    while (sample < s->store.eval.count) {
        TRY_DONE(loader_eval_batch(&s->store, true, &sample, capacity, &s->g.config, &batch));
        batch.batch.weights = NULL;
        if (turn++ % s->data_ranks != s->data_rank) continue;
        total += step_run(&s->g, memory, &batch.batch, &options, nll);
        if (!s->context.rank) trained += batch.trained;
    }
    if (turn % s->data_ranks && s->data_rank >= turn % s->data_ranks) run_idle(s, memory, options);
    total = comm_sum(&s->comm, total);
    trained = comm_sum_count(&s->comm, trained);
    *loss = trained ? total / (double)trained : NAN;
done:
    micro_batch_free(&batch);
    free(nll);
    return status;
}

static Status evaluate_and_keep(Trainer *t, double *loss) {
    TRY(evaluate(&t->s, &t->eval_memory, loss));
    bool better = *loss < t->state.best_eval;
    if (!better) {
        t->state.evals_without_gain++;
        return OK;
    }
    t->state.best_eval = *loss;
    t->state.evals_without_gain = 0;
    if (!t->s.config.save_best) return OK;
    char *path = path_join(t->output, "best");
    Status status = save_weights(t, path);
    free(path);
    return status;
}

static bool stopping(void) {
    return stop_requested;
}

static Status ask_tasks(Trainer *t) {
    if (!t->ask) return OK;
    if (!speaks(t)) { /* a barrier waits longest */
        comm_barrier(&t->comm);
        return OK;
    }
    progress_clear(&t->progress);
    Status status = t->ask(&t->s, t->state.step, stopping, &t->log);
    comm_barrier(&t->comm);
    return status == ERR_STOPPED ? OK : status; /* the loop ends and saves */
}

/* ---- one step ---- */

static int by_value(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return x < y ? -1 : x > y;
}

static bool is_spike(const RunState *state, double norm) {
    if (state->norm_count < SPIKE_HISTORY) return false;
    int64_t count = state->norm_count < NORM_HISTORY ? state->norm_count : NORM_HISTORY;
    float sorted[NORM_HISTORY];
    memcpy(sorted, state->norms, (size_t)count * sizeof *sorted);
    qsort(sorted, (size_t)count, sizeof *sorted, by_value);
    return norm > SPIKE * sorted[count / 2];
}

/* The sum of squares of what is here of a parameter's gradient, of all ranks': shares, where they
 * have been summed. */
static double own_squares(const Session *s, const ParamRun *r, const Param *p) {
    const Optimizer *o = &s->optimizer;
    int64_t first = p->offset, end = first + tensor_count(p->value);
    double sum = 0;
    if (!comm_is_many(&s->comm)) {
        sum_of_squares(&sum, p->grad);
        return sum;
    }
    if (first < r->own) first = r->own;
    if (end > r->own_end) end = r->own_end;
    if (first < end)
        sum_of_squares(&sum, optimizer_gradients(o, &s->g.params.space, r, first, end));
    return sum;
}

/* The parameter whose gradient is worst: not finite, or the largest. All ranks call it. */
static const char *worst_parameter(const Session *s) {
    const ParamList *params = &s->g.params;
    const char *worst = "none";
    double most = -1, *sums = must_calloc((size_t)params->count + 1, sizeof *sums);
    for (int i = 0; i < params->space.count; i++)
        for (int k = params->space.runs[i].first; k <= params->space.runs[i].last; k++)
            if (params->items[k]->trainable)
                sums[k] = own_squares(s, &params->space.runs[i], params->items[k]);
    comm_sum_doubles(&s->comm, sums, params->count); /* of copies, a multiple */
    for (int i = 0; i < params->count; i++) {
        if (!params->items[i]->trainable || sums[i] <= most) continue;
        most = sums[i], worst = params->items[i]->name;
    }
    for (int i = params->count - 1; i >= 0; i--)
        if (!isfinite(sums[i])) worst = params->items[i]->name;
    free(sums);
    return worst;
}

static Status report_bad_step(Trainer *t, const MicroBatch *batches, int64_t count, double loss,
                              double norm) {
    Session *s = &t->s;
    Text rows = {0};
    int listed = 0;
    for (int64_t i = 0; i < count; i++)
        for (int64_t k = 0; k < batches[i].sample_count; k++) {
            int line;
            const char *path = store_source(&s->store, false, batches[i].samples[k], &line);
            if (listed++ < 8) text_addf(&rows, "%s%s:%d", listed > 1 ? ", " : "", path, line);
        }
    if (listed > 8) text_addf(&rows, " and %d more", listed - 8);
    const char *what = isfinite(norm) && isfinite(loss) ? "gradient spike" : "not finite";
    const char *where = worst_parameter(s);
    progress_clear(&t->progress);
    Status status = OK;
    if (s->config.stop_on_bad_step)
        status = status_fail(
            ERR_FORMAT, "step %" PRId64 ": %s (loss %g, gradient norm %g), worst in %s; rows %s",
            t->state.step + 1, what, loss, norm, where, rows.bytes);
    else if (speaks(t))
        note("step %" PRId64 " skipped: %s (loss %g, gradient norm %g), worst in %s; rows %s",
             t->state.step + 1, what, loss, norm, where, rows.bytes);
    text_free(&rows);
    return status;
}

/* Updates within the backward pass: what a layer needs, and what it leaves. */
typedef struct Fused {
    Session *s;
    double lr, squares; /* of the gradients' norm */
} Fused;

static void update_layer(void *context, int layer) {
    Fused *f = context;
    ParamList *params = &f->s->g.params;
    double squares;
    gemma_finish_layer(&f->s->g, layer);
    Tensor grads = layer >= 0 ? params->space.layer_grads[0]
                              : tensor_slice(params->space.grads, 0,
                                             tensor_count(params->space.grads) -
                                                 tensor_count(params->space.layer_grads[0]));
    sum_of_squares(&squares, grads);
    f->squares += squares;
    optimizer_update(&f->s->optimizer, params, layer, f->lr, 1.0);
    fill(grads, 0.0f);
}

/* A layer's gradients of this micro-batch go to the ranks whose shares they are. */
static void send_gradients(void *context, int layer) {
    Trainer *t = context;
    Space *s = &t->s.g.params.space;
    for (int i = 0; i < s->count; i++) {
        const ParamRun *r = &s->runs[i];
        Tensor grads = run_grads(s, r, r->begin, r->end);
        if (r->layer != layer) continue;
        run_sum(s->overlaps ? s->beside_ranks : s->ranks, r, grads, false);
        optimizer_take_gradients(&t->s.optimizer, s, r, grads);
    }
    if (layer >= 0) fill(s->layer_grads[layer % 2], 0.0f);
}

/* The layer's gradients are whole: they are on their way while the layer below is made. The one
 * after that writes where those of the layer above were. */
static void share_layer(void *context, int layer) {
    Trainer *t = context;
    Space *s = &t->s.g.params.space;
    gemma_finish_layer(&t->s.g, layer);
    comm_beside_wait(s->beside);
    comm_beside_begin(s->beside, send_gradients, t, layer);
}

/* The norm of all summed gradients, the same on every rank: each adds a part, whoever updates it.
 */
static double norm_of_ranks(Session *s) {
    const Space *space = &s->g.params.space;
    double dense = 0, experts = 0, part;
    for (int i = 0; i < space->count; i++) {
        const ParamRun *r = &space->runs[i];
        int64_t bounds[run_sharers(space->ranks, r)->size + 1];
        int mine = run_sharers(space->ranks, r)->rank;
        run_bounds(space->ranks, r, bounds);
        int64_t first = r->begin + bounds[mine], end = r->begin + bounds[mine + 1];
        if (first == end) continue;
        sum_of_squares(&part, optimizer_gradients(&s->optimizer, space, r, first, end));
        *(r->experts ? &experts : &dense) += part;
    }
    return sqrt(comm_sum(&space->ranks->sharers, dense) + comm_sum(&s->comm, experts));
}

/* Gradients of all ranks: each rank has the sum of its shares, or of everything where that is
 * updated everywhere, or is to be masked first. Their norm. */
static double sum_gradients(Trainer *t) {
    Session *s = &t->s;
    Space *space = &s->g.params.space;
    if (!comm_is_many(&t->comm)) {
        gemma_finish_gradients(&s->g);
        return gradients_norm(&s->g.params);
    }
    if (s->optimizer.config.own_grads) {
        share_layer(t, -1);
        comm_beside_wait(space->beside);
        return norm_of_ranks(s);
    }
    bool whole = !space->level || fake_quant_on(&s->g.fake);
    for (int i = 0; i < space->count; i++) {
        const ParamRun *r = &space->runs[i];
        run_sum(space->ranks, r, run_grads(space, r, r->begin, r->end), whole);
    }
    gemma_finish_gradients(&s->g);
    return norm_of_ranks(s);
}

/* The update of a step whose gradients are all there: the norm, clipping, or leaving it out. */
static Status update_all(Trainer *t, const MicroBatch *batches, int64_t count, double lr,
                         Metrics *m) {
    Session *s = &t->s;
    double scale = 1, norm;
    norm = m->grad_norm = sum_gradients(t);
    m->skipped = !isfinite(m->loss) || !isfinite(norm) || is_spike(&t->state, norm);
    if (m->skipped) {
        TRY(report_bad_step(t, batches, count, m->loss, norm));
        t->state.skipped++;
        return OK;
    }
    t->state.norms[t->state.norm_count++ % NORM_HISTORY] = (float)norm;
    if (s->config.clip > 0 && norm > s->config.clip) scale = s->config.clip / (norm + 1e-6);
    optimizer_step(&s->optimizer, &s->g.params, lr, scale);
    space_join(&s->g.params);
    return OK;
}

/* What is left of an update that was made on the way: it cannot be left out any more. */
static Status update_rest(Trainer *t, const MicroBatch *batches, int64_t count, Fused *f,
                          Metrics *m) {
    update_layer(f, -1);
    m->grad_norm = sqrt(f->squares);
    if (!isfinite(m->loss) || !isfinite(m->grad_norm))
        return report_bad_step(t, batches, count, m->loss, m->grad_norm);
    t->state.norms[t->state.norm_count++ % NORM_HISTORY] = (float)m->grad_norm;
    return OK;
}

static Status one_step(Trainer *t, Metrics *m) {
    Session *s = &t->s;
    MicroBatch *batches;
    int64_t count, trained, tokens = 0;
    TRY(loader_next(s->loader, &batches, &count, &trained));
    int64_t all = loader_step_batches(s->loader), ranks = s->data_ranks;
    bool counts = !s->context.rank; /* what all that share rows have alike */
    trained = comm_sum_count(&s->comm, counts ? trained : 0);
    if (comm_is_many(&s->comm)) micro_batches_weigh(batches, count, trained);
    double lr = schedule_rate(&s->config, t->state.step, t->steps), loss = 0, aux = 0;
    Fused fused = {.s = s, .lr = lr};
    if (s->config.optimizer.fused) {
        optimizer_begin(&s->optimizer);
        s->options.layer_done = update_layer;
        s->options.layer_context = &fused;
    }
    if (s->optimizer.config.own_grads) {
        s->options.layer_done = share_layer;
        s->options.layer_context = t;
        fill(s->optimizer.grads, 0.0f);
    }
    gradients_zero(&s->g.params);
    s->g.fake.blend = adapt_blend(&s->config, t->state.step);
    for (int64_t i = 0; i < count; i++) {
        s->options.key = random_key(random_key((uint64_t)s->config.seed, (uint64_t)t->state.step),
                                    (uint64_t)(i * ranks + s->data_rank));
        s->options.load = t->load;
        s->options.aux_scale = (float)(s->config.aux_loss / (double)all);
        loss += step_run(&s->g, &s->memory, &batches[i].batch, &s->options, t->nll);
        if (!counts) continue;
        if (t->load) aux += expert_load_loss(t->load, s->g.config.num_experts) / (double)all;
        tokens += batches[i].batch.N;
    }
    if (count * ranks < all) run_idle(s, &s->memory, s->options);
    loss = comm_sum(&s->comm, loss);
    aux = comm_sum(&s->comm, aux);
    tokens = comm_sum_count(&s->comm, tokens);
    *m = (Metrics){.loss = loss,
                   .aux_loss = t->load ? aux : NAN,
                   .lr = lr,
                   .tokens = tokens,
                   .trained_tokens = trained,
                   .eval_loss = NAN};
    s->options.layer_done = NULL;
    if (s->config.optimizer.fused)
        TRY(update_rest(t, batches, count, &fused, m));
    else
        TRY(update_all(t, batches, count, lr, m));
    if (!m->skipped) gemma_refresh(&s->g, &s->memory.scratch);
    t->state.step++;
    m->step = t->state.step;
    m->epoch = loader_epoch(s->loader, t->state.step);
    return OK;
}

/* The most and least used expert of each layer. */
static Status log_expert_load(Trainer *t) {
    if (!t->load) return OK;
    int64_t E = t->s.g.config.num_experts;
    comm_sum_floats(&t->comm, t->load->by_layer, t->s.g.config.num_hidden_layers * E);
    for (int l = 0; l < t->s.g.config.num_hidden_layers; l++) {
        float *counts = t->load->by_layer + l * E;
        double total = 0, most = 0, least = INFINITY;
        for (int64_t e = 0; e < E; e++) {
            total += counts[e];
            most = fmax(most, counts[e]);
            least = fmin(least, counts[e]);
            t->taken[e * t->s.ranks.experts.size / E] += counts[e];
            counts[e] = 0;
        }
        if (total <= 0 || !speaks(t)) continue;
        double fair = total / (double)E;
        TRY(metrics_add_expert_share(&t->log,
                                     &(ExpertShare){t->state.step, l, most / fair, least / fair}));
    }
    return OK;
}

/* What the experts of each rank had to do, 1 being an even share. */
static void report_expert_load(const Trainer *t) {
    int ranks = t->s.ranks.experts.size;
    double all = 0;
    for (int r = 0; r < ranks; r++) all += t->taken[r];
    if (ranks < 2 || all <= 0 || !speaks(t)) return;
    fprintf(stderr, "rows for the experts of each rank, 1 being an even share:");
    for (int r = 0; r < ranks; r++) fprintf(stderr, " %.2f", t->taken[r] / all * ranks);
    fprintf(stderr, "\n");
}

/* Whether any rank was, up to now. */
static bool asked_to_stop(Trainer *t) {
    t->stop = comm_most(&t->comm, stop_requested);
    return t->stop;
}

static Status loop(Trainer *t) {
    const RunConfig *c = &t->s.config;
    bool has_eval = t->s.store.eval.count > 0, stopped_early = false;
    int64_t begin = t->state.step, saved = begin;
    if (has_eval && !t->state.step) {
        double loss;
        TRY(evaluate(&t->s, &t->eval_memory, &loss));
        if (speaks(t)) fprintf(stderr, "eval loss before training: %.4f\n", loss);
    }
    if (!t->state.step) TRY(ask_tasks(t));
    while (t->state.step < t->steps && !stopped_early && !asked_to_stop(t)) {
        Metrics m;
        double start = progress_now();
        TRY(one_step(t, &m));
        m.tokens_per_s = (double)m.tokens / (progress_now() - start);
        m.memory_bytes = (double)device_held(t->s.g.device);
        bool last = t->state.step == t->steps,
             due = c->eval_every && (t->state.step % c->eval_every == 0 || last);
        if (has_eval && due) {
            TRY(evaluate_and_keep(t, &m.eval_loss));
            stopped_early = c->early_stop && t->state.evals_without_gain >= c->early_stop;
        }
        if (speaks(t)) TRY(metrics_add(&t->log, &m));
        TRY(log_expert_load(t));
        if (due) TRY(ask_tasks(t));
        if (speaks(t)) progress_show(&t->progress, &m, t->steps);
        if (t->state.step % c->save_every == 0) {
            TRY(save(t));
            saved = t->state.step;
        }
    }
    progress_clear(&t->progress);
    report_expert_load(t);
    if (saved != t->state.step || t->state.step == 0)
        TRY(save(t));
    else if (begin == t->state.step) /* the run before may have ended while it wrote them */
        TRY(save_newest(t));
    if (stopped_early && speaks(t))
        note("stopped at step %" PRId64 ": %" PRId64 " evaluations without a better loss",
             t->state.step, t->state.evals_without_gain);
    return OK;
}

/* ---- starting ---- */

static Status open_folder(const RunConfig *c, bool resume, int64_t *step) {
    char *run = path_join(c->output, "run.yaml");
    bool there = file_exists(run);
    Status status = OK;
    *step = 0;
    if (there && !resume)
        FAIL_DONE(ERR_CONFIG,
                  "%s: already holds a run; give --resume to continue it, or another output",
                  c->output);
    if (!there && resume) FAIL_DONE(ERR_CONFIG, "%s: holds no run to resume", c->output);
    TRY_DONE(folder_make(c->output));
    char *text = run_config_text(c), *old = NULL;
    size_t size;
    if (there) {
        status = file_read(&old, &size, run, (size_t)1 << 24);
        if (status == OK && strcmp(old, text))
            note("the run file differs from the one %s was started with; the new one is used and "
                 "kept",
                 c->output);
        *step = run_state_newest(c->output);
    }
    if (status == OK) status = file_write(run, text, strlen(text));
    free(text);
    free(old);
done:
    free(run);
    return status;
}

static void report_data(const Store *store) {
    const StoreCounts *n = &store->counts;
    fprintf(stderr,
            "data: %.0f rows -> %.0f samples (%.0f cut, %.0f dropped, %.0f bad rows), %.0f tokens, "
            "%.1f %% trained; "
            "%" PRId64 " train and %" PRId64 " eval samples\n",
            n->rows, n->samples, n->cut, n->dropped, n->bad, n->tokens,
            n->tokens > 0 ? 100 * n->trained / n->tokens : 0, store->train.count,
            store->eval.count);
}

/* Who shares what. */
static void report_ranks(const Session *s) {
    if (!comm_is_many(&s->comm)) return;
    fprintf(stderr, "%d ranks: micro-batches in %d turns, level %" PRId64 " among %d", s->comm.size,
            s->data_ranks, s->config.shard, s->ranks.sharers.size);
    if (s->context.size > 1) fprintf(stderr, ", rows among %d", s->context.size);
    if (s->ranks.experts.size > 1) fprintf(stderr, ", experts among %d", s->ranks.experts.size);
    if (s->g.device->kind == DEVICE_CUDA)
        fprintf(stderr, "; between GPUs %s",
                session_links_gpus(s) ? "directly, by NCCL" : "through the host: there is no NCCL");
    fprintf(stderr, "\n");
}

/* That all ranks run this program with this run file. */
static Status compare_ranks(const Comm *comm, const RunConfig *config) {
    char hash[65];
    if (!comm_is_many(comm)) return OK;
    char *text = run_config_text(config);
    uint64_t key = random_key_name(1, text);
    free(text);
    TRY(sha256_file(hash, "/proc/self/exe"));
    TRY(comm_agree(comm, "program", random_key_name(1, hash)));
    return comm_agree(comm, "run file", key);
}

/* Opens the run. One that is new and cannot be opened leaves nothing that would refuse the next
 * try.
 */
static Status open_run(Trainer *t, RunConfig *config, bool resume, int64_t *step) {
    if (speaks(t)) TRY(open_folder(config, resume, step));
    comm_broadcast(&t->comm, step, sizeof *step);
    char *store = path_join(config->output, "data.h5"),
         *run = path_join(config->output, "run.yaml");
    bool prepared = file_exists(store);
    Status status = session_open(&t->s, config, &t->comm, store, speaks(t) ? progress_rows : NULL);
    progress_clear(&t->progress);
    if (status != OK && speaks(t) && !resume) {
        if (!prepared) tree_remove(store);
        tree_remove(run);
    }
    free(store);
    free(run);
    return status;
}

static Status start(Trainer *t, RunConfig *config, bool resume) {
    int64_t step = 0;
    Status status;
    TRY(compare_ranks(&t->comm, config));
    TRY(open_run(t, config, resume, &step));
    Session *s = &t->s;
    t->output = s->config.output;
    if (speaks(t)) {
        report_data(&s->store);
        report_ranks(s);
        memory_plan_print(&s->plan);
    }
    TRY(session_place(s));
    t->state.best_eval = INFINITY;
    if (step) {
        char *path = must_format("%s/checkpoints/step-%" PRId64, t->output, step);
        status = run_state_load(&t->state, &s->g.params, &s->optimizer, path);
        free(path);
        TRY(status);
        gemma_refresh(&s->g, &s->memory.scratch);
        if (speaks(t)) fprintf(stderr, "resuming at step %" PRId64 "\n", t->state.step);
    }
    t->steps = loader_steps(s->loader);
    TRY(loader_start(s->loader, t->state.step));
    t->nll = must_malloc((size_t)(s->plan.rows + 1) * sizeof *t->nll);
    if (s->g.config.num_experts) {
        t->load = must_calloc(1, sizeof *t->load);
        t->load->by_layer = must_calloc(
            (size_t)(s->g.config.num_hidden_layers * s->g.config.num_experts), sizeof(float));
    }
    return speaks(t) ? metrics_open(&t->log, t->output, t->state.step) : OK;
}

static void watch_signals(void) {
    struct sigaction action = {.sa_handler = request_stop};
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
}

Status train_run(RunConfig *config, bool resume, AskFunction *ask) {
    Trainer t = {.ask = config->eval_tasks.names.count ? ask : NULL};
    Status status = OK;
    progress_init(&t.progress);
    TRY_DONE(comm_open(&t.comm));
    t.comm.timeout = config->timeout;
    TRY_DONE(start(&t, config, resume));
    watch_signals();
    TRY_DONE(loop(&t));
    metrics_close(&t.log);
    if (speaks(&t)) {
        char *report = path_join(t.output, "report.svg");
        status = plot_runs(report, &t.output, 1);
        free(report);
    }
    if (status == OK && t.stop && t.state.step < t.steps)
        FAIL_DONE(ERR_STOPPED, "stopped at step %" PRId64 " of %" PRId64 ", saved in %s",
                  t.state.step, t.steps, t.output);
    if (status == OK && speaks(&t))
        fprintf(stderr,
                "done: %" PRId64 " steps, %" PRId64
                " skipped; weights in %s/%s, curve in %s/report.svg\n",
                t.state.step, t.state.skipped, t.output, weights_name(&t), t.output);
done:
    if (status != OK && status != ERR_STOPPED && comm_is_many(&t.comm)) {
        status_prefix(status, "rank %d", t.comm.rank);
        return status; /* other ranks may be waiting, a thread be at work: the process ends so */
    }
    metrics_close(&t.log);
    step_free(&t.eval_memory);
    if (t.load) free(t.load->by_layer);
    free(t.load);
    free(t.nll);
    session_close(&t.s);
    run_config_free(config);
    comm_close(&t.comm);
    return status;
}
