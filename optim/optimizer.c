/* optimizer.c - AdamW and SGD as loops over parameters in the flat space. */
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
    return measure.peak;
}

Status optimizer_init(Optimizer *o, const OptimizerConfig *config, const ParamList *params,
                      Device *device) {
    *o = (Optimizer){.config = *config};
    int64_t n = params_bytes(params).trained;
    TRY(arena_init(&o->arena, device, optimizer_measure(config, n), "the optimizer's states"));
    if (moments(config) > 0) o->m = states(&o->arena, config, n, 0);
    if (moments(config) > 1) o->v = states(&o->arena, config, n, 1);
    return OK;
}

void optimizer_free(Optimizer *o) {
    arena_free(&o->arena);
    *o = (Optimizer){0};
}

static void update(Optimizer *o, Param *p, double lr, double scale) {
    const OptimizerConfig *c = &o->config;
    int64_t n = tensor_count(p->value);
    Tensor value = RESHAPE(p->master, n), grad = RESHAPE(p->grad, n);
    uint64_t key = random_key(random_key_name(c->seed, p->name), (uint64_t)o->t);
    int64_t block = p->offset / DYNAMIC_BLOCK, blocks = (n + DYNAMIC_BLOCK - 1) / DYNAMIC_BLOCK;
    Tensor m = tensor_slice(o->m, block, blocks), v = tensor_slice(o->v, block, blocks);
    float decay = p->decay ? (float)c->weight_decay : 0.0f;
    if (c->name == OPTIMIZER_ADAMW)
        adamw_update(value, grad, m, v, (float)scale, (float)lr, (float)c->beta1, (float)c->beta2,
                     (float)c->eps, decay, o->t, key);
    else
        sgd_update(value, grad, m, (float)scale, (float)lr, (float)c->momentum, decay, o->t, key);
    param_publish(p);
}

void optimizer_begin(Optimizer *o) {
    o->t++;
}

void optimizer_update(Optimizer *o, ParamList *params, int layer, double lr, double scale) {
    for (int i = 0; i < params->count; i++) {
        Param *p = params->items[i];
        if (p->trainable && p->layer == layer) update(o, p, lr, scale);
    }
}

void optimizer_step(Optimizer *o, ParamList *params, double lr, double scale) {
    optimizer_begin(o);
    for (int i = 0; i < params->count; i++)
        if (params->items[i]->trainable) update(o, params->items[i], lr, scale);
}

double gradients_norm(const ParamList *params) {
    double sum;
    sum_of_squares(&sum, params->grads);
    return sqrt(sum);
}

void gradients_zero(ParamList *params) {
    fill(params->grads, 0.0f);
}
