/* optimizer.c - AdamW and SGD as loops over parameters in the flat space. */
#include "optim/optimizer.h"
#include "kernels/elementwise.h"
#include "kernels/random.h"
#include "kernels/update.h"

#include <limits.h>
#include <math.h>

static int moments(const OptimizerConfig *config) {
    return config->name == OPTIMIZER_ADAMW ? 2 : config->momentum != 0 ? 1 : 0;
}

/* The states of n values: `which` is 0 for m, 1 for v. */
static Tensor states(Arena *arena, const OptimizerConfig *config, int64_t n, int which) {
    DType dtype = !config->states_8bit ? F32 : which ? DYNAMIC8_UNSIGNED : DYNAMIC8;
    return ARENA_TENSOR(arena, dtype, n / DYNAMIC_BLOCK, DYNAMIC_BLOCK);
}

/* The block that share `part` of `parts` begins with. */
static int64_t share_begin(int64_t n, int part, int parts) {
    return n / DYNAMIC_BLOCK * part / parts;
}

void optimizer_shares(int64_t *bounds, int64_t n, int parts) {
    for (int i = 0; i <= parts; i++) bounds[i] = share_begin(n, i, parts) * DYNAMIC_BLOCK;
}

/* The blocks of n values that are this optimizer's. */
static void own_blocks(const OptimizerConfig *c, int64_t n, int64_t *begin, int64_t *end) {
    int parts = c->parts > 1 ? c->parts : 1, part = parts > 1 ? c->part : 0;
    *begin = share_begin(n, part, parts);
    *end = share_begin(n, part + 1, parts);
}

size_t optimizer_measure(const OptimizerConfig *config, int64_t n) {
    Arena measure = arena_measure();
    int64_t begin, end;
    own_blocks(config, n, &begin, &end);
    for (int i = 0; i < moments(config); i++)
        states(&measure, config, (end - begin) * DYNAMIC_BLOCK, i);
    if (config->own_grads) ARENA_TENSOR(&measure, F32, (end - begin) * DYNAMIC_BLOCK);
    return measure.peak;
}

Status optimizer_init(Optimizer *o, const OptimizerConfig *config, const ParamList *params,
                      Device *device) {
    *o = (Optimizer){.config = *config};
    int64_t n = params_bytes(params).trained;
    TRY(arena_init(&o->arena, device, optimizer_measure(config, n), "the optimizer's states"));
    own_blocks(config, n, &o->begin, &o->end);
    n = (o->end - o->begin) * DYNAMIC_BLOCK;
    if (moments(config) > 0) o->m = states(&o->arena, config, n, 0);
    if (moments(config) > 1) o->v = states(&o->arena, config, n, 1);
    if (config->own_grads) o->grads = ARENA_TENSOR(&o->arena, F32, n);
    return OK;
}

void optimizer_free(Optimizer *o) {
    arena_free(&o->arena);
    *o = (Optimizer){0};
}

/* Whether q's values, gradients and states lie right behind p's and are updated alike. Values of 16
 * bits round by chances of their own, so each such parameter is by itself. */
static bool follows(const Param *p, const Param *q) {
    size_t bytes = tensor_bytes(p->master);
    return q->trainable && q->decay == p->decay && p->master.dtype == F32 &&
           q->master.dtype == F32 && tensor_count(p->value) % DYNAMIC_BLOCK == 0 &&
           q->offset == p->offset + tensor_count(p->value) &&
           (char *)q->master.data == (char *)p->master.data + bytes &&
           (char *)q->grad.data == (char *)p->grad.data + bytes;
}

/* Values first .. first + n - 1 of a tensor. */
static Tensor values_of(Tensor t, int64_t first, int64_t n) {
    Tensor part = tensor_make((char *)t.data + (size_t)first * dtype_size(t.dtype), t.dtype, 1, &n);
    part.device = t.device;
    return part;
}

/* One update of the `count` parameters from `first` on, n values one behind the other: of what is
 * this optimizer's share of them. */
static void update(Optimizer *o, Param *const *first, int count, int64_t n, double lr,
                   double scale) {
    const OptimizerConfig *c = &o->config;
    const Param *p = *first;
    int64_t block = p->offset / DYNAMIC_BLOCK, blocks = (n + DYNAMIC_BLOCK - 1) / DYNAMIC_BLOCK,
            from = block > o->begin ? block : o->begin,
            to = block + blocks < o->end ? block + blocks : o->end;
    if (from >= to) return;
    int64_t skip = (from - block) * DYNAMIC_BLOCK, end = (to - block) * DYNAMIC_BLOCK;
    if (end > n) end = n;
    CHECK(c->parts <= 1 || p->master.dtype == F32, "a share of %s", tensor_text(p->master));
    Tensor value = values_of(p->master, skip, end - skip),
           grad = c->own_grads ? values_of(o->grads, (from - o->begin) * DYNAMIC_BLOCK, end - skip)
                               : values_of(p->grad, skip, end - skip);
    uint64_t key = random_key(random_key_name(c->seed, p->name), (uint64_t)o->t);
    Tensor m = tensor_slice(o->m, from - o->begin, to - from),
           v = tensor_slice(o->v, from - o->begin, to - from);
    float decay = p->decay ? (float)c->weight_decay : 0.0f;
    if (c->name == OPTIMIZER_ADAMW)
        adamw_update(value, grad, m, v, (float)scale, (float)lr, (float)c->beta1, (float)c->beta2,
                     (float)c->eps, decay, o->t, key);
    else
        sgd_update(value, grad, m, (float)scale, (float)lr, (float)c->momentum, decay, o->t, key);
    for (int i = 0; i < count && c->parts <= 1; i++) param_publish(first[i]);
}

#define ALL_LAYERS INT_MIN

/* Those of a layer, as few updates as may be. */
static void update_those(Optimizer *o, ParamList *params, int layer, double lr, double scale) {
    for (int i = 0, next; i < params->count; i = next) {
        Param *const *first = &params->items[i];
        next = i + 1;
        if (!(*first)->trainable || (layer != ALL_LAYERS && (*first)->layer != layer)) continue;
        int64_t n = tensor_count((*first)->value);
        for (; next < params->count && follows(params->items[next - 1], params->items[next]) &&
               (layer == ALL_LAYERS || params->items[next]->layer == layer);
             next++)
            n += tensor_count(params->items[next]->value);
        update(o, first, next - i, n, lr, scale);
    }
}

void optimizer_begin(Optimizer *o) {
    o->t++;
}

void optimizer_update(Optimizer *o, ParamList *params, int layer, double lr, double scale) {
    update_those(o, params, layer, lr, scale);
}

void optimizer_step(Optimizer *o, ParamList *params, double lr, double scale) {
    optimizer_begin(o);
    update_those(o, params, ALL_LAYERS, lr, scale);
}

/* Whether q's gradients, and its place in the space, come right behind p's. */
static bool lies_behind(const Param *p, const Param *q) {
    int64_t span = param_span(p);
    return q->trainable && q->layer == p->layer && q->offset == p->offset + span &&
           (float *)q->grad.data == (float *)p->grad.data + span;
}

void optimizer_take_gradients(Optimizer *o, const ParamList *params, int layer,
                              ReduceFunction *reduce, void *context) {
    for (int i = 0, next; i < params->count; i = next) {
        const Param *p = params->items[i];
        next = i + 1;
        if (!p->trainable || p->layer != layer) continue;
        while (next < params->count && lies_behind(params->items[next - 1], params->items[next]))
            next++;
        const Param *last = params->items[next - 1];
        int64_t begin = p->offset, end = last->offset + param_span(last),
                low = o->begin * DYNAMIC_BLOCK, high = o->end * DYNAMIC_BLOCK;
        Tensor run = values_of(p->grad, 0, end - begin);
        reduce(context, run, begin);
        if (low < begin) low = begin;
        if (high > end) high = end;
        if (low < high)
            scale_copy(values_of(o->grads, low - o->begin * DYNAMIC_BLOCK, high - low), ADD,
                       values_of(run, low - begin, high - low), 1.0f);
    }
}

double gradients_norm(const ParamList *params) {
    double sum;
    sum_of_squares(&sum, params->grads);
    return sqrt(sum);
}

void gradients_zero(ParamList *params) {
    fill(params->grads, 0.0f);
}
