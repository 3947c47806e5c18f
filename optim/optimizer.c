/* optimizer.c - AdamW and SGD as loops over the runs of the flat space. */
#include "optim/optimizer.h"
#include "kernels/elementwise.h"
#include "kernels/random.h"
#include "kernels/update.h"

#include <math.h>

static int moments(const OptimizerConfig *config) {
    return config->name == OPTIMIZER_ADAMW ? 2 : config->momentum != 0 ? 1 : 0;
}

/* The states of n values: `which` is 0 for m, 1 for v. */
static Tensor states(Arena *arena, const OptimizerConfig *config, int64_t n, int which) {
    DType dtype = !config->states_8bit ? F32 : which ? DYNAMIC8_UNSIGNED : DYNAMIC8;
    return ARENA_TENSOR(arena, dtype, n / DYNAMIC_BLOCK, DYNAMIC_BLOCK);
}

size_t optimizer_measure(const OptimizerConfig *config, int64_t n) {
    Arena measure = arena_measure();
    for (int i = 0; i < moments(config); i++) states(&measure, config, n, i);
    if (config->own_grads) ARENA_TENSOR(&measure, F32, n);
    return measure.peak;
}

Status optimizer_init(Optimizer *o, const OptimizerConfig *config, ParamList *params,
                      Device *device) {
    *o = (Optimizer){.config = *config};
    int64_t n = params_bytes(params).own;
    TRY(arena_init(&o->arena, device, optimizer_measure(config, n), "the optimizer's states"));
    if (moments(config) > 0) o->m = states(&o->arena, config, n, 0);
    if (moments(config) > 1) o->v = states(&o->arena, config, n, 1);
    if (config->own_grads) o->grads = ARENA_TENSOR(&o->arena, F32, n);
    return OK;
}

void optimizer_free(Optimizer *o) {
    arena_free(&o->arena);
    *o = (Optimizer){0};
}

/* Whether q is updated with p: values of 16 bits round by chances of their own, so each such
 * parameter is by itself. */
static bool goes_with(const ParamRun *r, const Param *p, const Param *q) {
    return q->trainable && q->decay == p->decay && r->place >= 0 &&
           tensor_count(p->value) % DYNAMIC_BLOCK == 0;
}

Tensor optimizer_gradients(const Optimizer *o, const Space *s, const ParamRun *r, int64_t first,
                           int64_t end) {
    if (!o->config.own_grads) return run_grads(s, r, first, end);
    int64_t to = r->share - r->own;
    return tensor_slice(o->grads, to + first, end - first);
}

/* One update of what is here of places first .. end - 1 of a run, p's and those that go with it. */
static void update(Optimizer *o, const Space *s, const ParamRun *r, const Param *p, int64_t first,
                   int64_t end, double lr, double scale) {
    const OptimizerConfig *c = &o->config;
    if (first < r->own) first = r->own;
    if (end > r->own_end) end = r->own_end;
    if (first >= end) return;
    int64_t row = (r->share + first - r->own) / DYNAMIC_BLOCK,
            rows = (end - first + DYNAMIC_BLOCK - 1) / DYNAMIC_BLOCK;
    Tensor value = r->place >= 0 ? run_values(s, r, first, end)
                                 : RESHAPE(p->master, tensor_count(p->master)),
           grad = optimizer_gradients(o, s, r, first, end), m = tensor_slice(o->m, row, rows),
           v = tensor_slice(o->v, row, rows);
    uint64_t key = random_key(random_key_name(c->seed, p->name), (uint64_t)o->t);
    float decay = p->decay ? (float)c->weight_decay : 0.0f;
    if (c->name == OPTIMIZER_ADAMW)
        adamw_update(value, grad, m, v, (float)scale, (float)lr, (float)c->beta1, (float)c->beta2,
                     (float)c->eps, decay, o->t, key);
    else
        sgd_update(value, grad, m, (float)scale, (float)lr, (float)c->momentum, decay, o->t, key);
}

/* What is here of a run, in as few updates as may be. */
static void update_run(Optimizer *o, ParamList *params, const ParamRun *r, double lr,
                       double scale) {
    for (int i = r->first, next; i <= r->last; i = next) {
        const Param *p = params->items[i], *last = p;
        next = i + 1;
        if (!p->trainable) continue;
        for (; next <= r->last; next++) {
            const Param *q = params->items[next];
            if (!q->trainable) continue;
            if (!goes_with(r, last, q)) break;
            last = q;
        }
        update(o, &params->space, r, p, p->offset, last->offset + tensor_count(last->value), lr,
               scale);
    }
    for (int i = r->first; i <= r->last && !params->space.level; i++)
        param_publish(params->items[i]);
}

void optimizer_begin(Optimizer *o) {
    o->t++;
}

void optimizer_update(Optimizer *o, ParamList *params, int layer, double lr, double scale) {
    for (int i = 0; i < params->space.count; i++)
        if (params->space.runs[i].layer == layer)
            update_run(o, params, &params->space.runs[i], lr, scale);
}

void optimizer_step(Optimizer *o, ParamList *params, double lr, double scale) {
    optimizer_begin(o);
    for (int i = 0; i < params->space.count; i++)
        update_run(o, params, &params->space.runs[i], lr, scale);
}

void optimizer_take_gradients(Optimizer *o, const Space *s, const ParamRun *r, Tensor grads) {
    if (r->own < r->own_end)
        scale_copy(optimizer_gradients(o, s, r, r->own, r->own_end), ADD,
                   tensor_slice(grads, r->own - r->begin, r->own_end - r->own), 1.0f);
}

double gradients_norm(const ParamList *params) {
    double sum;
    sum_of_squares(&sum, params->space.grads);
    return sqrt(sum);
}

void gradients_zero(ParamList *params) {
    fill(params->space.grads, 0.0f);
}
