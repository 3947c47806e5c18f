/* optimizer.h - updates of the flat trainable space. */
#ifndef OPTIMIZER_H
#define OPTIMIZER_H

#include "model/params.h"

typedef enum OptimizerName { OPTIMIZER_ADAMW, OPTIMIZER_SGD } OptimizerName;

typedef struct OptimizerConfig {
    OptimizerName name;
    double lr, beta1, beta2, eps, weight_decay, momentum;
    uint64_t seed;    /* of the rounding of values that have no master */
    bool states_8bit; /* moments in DYNAMIC8 and DYNAMIC8_UNSIGNED, else f32 */
    bool own_grads; /* gradients of what is updated here are the optimizer's, in Optimizer.grads */
} OptimizerConfig;

typedef struct Optimizer {
    OptimizerConfig config;
    Arena arena;
    Tensor m, v; /* (own values / 256, 256) of the shares of all runs; SGD has only m, and that only
                  * with momentum */
    Tensor grads; /* f32, of the same; absent: those of the parameters */
    int64_t t;    /* updates made */
} Optimizer;

/* Bytes of state for n values, whole blocks (ParamBytes.own). */
size_t optimizer_measure(const OptimizerConfig *config, int64_t n);
Status optimizer_init(Optimizer *o, const OptimizerConfig *config, ParamList *params,
                      Device *device);
void optimizer_free(Optimizer *o);

/* One update of this rank's shares at rate `lr`, every gradient multiplied by `scale` first; then
 * publishes bf16 values, unless there are ranks that have other shares (space_join). */
void optimizer_step(Optimizer *o, ParamList *params, double lr, double scale);

/* The same in parts: optimizer_begin, then each layer's parameters, and those of none (-1), once.
 */
void optimizer_begin(Optimizer *o);
void optimizer_update(Optimizer *o, ParamList *params, int layer, double lr, double scale);

/* The gradients of places first .. end - 1 of the flat space, within a run's share: own ones, or
 * the parameters'. */
Tensor optimizer_gradients(const Optimizer *o, const Space *s, const ParamRun *run, int64_t first,
                           int64_t end);

/* Adds this rank's share of a run's gradients to own ones. */
void optimizer_take_gradients(Optimizer *o, const Space *s, const ParamRun *run, Tensor grads);

/* The norm of all gradients together, in f64. */
double gradients_norm(const ParamList *params);
void gradients_zero(ParamList *params);

#endif
