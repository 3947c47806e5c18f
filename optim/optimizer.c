/* optimizer.c - AdamW and SGD as loops over parameters in the flat space. */
#include "optim/optimizer.h"
#include "kernels/elementwise.h"
#include "kernels/update.h"

#include <math.h>

static int moments(const OptimizerConfig *config) {
    return config->name == OPTIMIZER_ADAMW ? 2 : config->momentum != 0 ? 1 : 0;
}

size_t optimizer_measure(const OptimizerConfig *config, int64_t n) {
    return (size_t)moments(config) * (size_t)n * 4;
}

Status optimizer_init(Optimizer *o, const OptimizerConfig *config, const ParamList *params,
                      Device *device) {
    *o = (Optimizer){.config = *config};
    int64_t n = tensor_count(params->space);
    TRY(arena_init(&o->arena, device, optimizer_measure(config, n), "the optimizer's states"));
    if (moments(config) > 0) o->m = ARENA_TENSOR(&o->arena, F32, n);
    if (moments(config) > 1) o->v = ARENA_TENSOR(&o->arena, F32, n);
    return OK;
}

void optimizer_free(Optimizer *o) {
    arena_free(&o->arena);
    *o = (Optimizer){0};
}

void optimizer_step(Optimizer *o, ParamList *params, double lr, double scale) {
    const OptimizerConfig *c = &o->config;
    o->t++;
    for (int i = 0; i < params->count; i++) {
        Param *p = params->items[i];
        if (!p->trainable) continue;
        int64_t n = tensor_count(p->value);
        Tensor value = tensor_slice(params->space, p->offset, n),
               grad = tensor_slice(params->grads, p->offset, n);
        Tensor m = tensor_slice(o->m, p->offset, n), v = tensor_slice(o->v, p->offset, n);
        float decay = p->decay ? (float)c->weight_decay : 0.0f;
        if (c->name == OPTIMIZER_ADAMW)
            adamw_update(value, grad, m, v, (float)scale, (float)lr, (float)c->beta1,
                         (float)c->beta2, (float)c->eps, decay, o->t);
        else
            sgd_update(value, grad, m, (float)scale, (float)lr, (float)c->momentum, decay, o->t);
    }
    params_publish(params);
}

double gradients_norm(const ParamList *params) {
    double sum;
    sum_of_squares(&sum, params->grads);
    return sqrt(sum);
}

void gradients_zero(ParamList *params) {
    fill(params->grads, 0.0f);
}
