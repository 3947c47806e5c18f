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
    int part, parts;  /* which of several equal shares of the space is updated here, and has its
                       * states here; parts 0: all of it */
    bool own_grads;   /* the share's gradients are the optimizer's, in Optimizer.grads */
} OptimizerConfig;

typedef struct Optimizer {
    OptimizerConfig config;
    Arena arena;
    Tensor m,
        v; /* (end - begin, 256) over the space; SGD has only m, and that only with momentum */
    Tensor grads;       /* f32, of the share; absent: those of the parameters */
    int64_t begin, end; /* blocks of 256 values that are updated here */
    int64_t t;          /* updates made */
} Optimizer;

/* Where the shares of n values begin, in values: bounds[0 .. parts]. */
void optimizer_shares(int64_t *bounds, int64_t n, int parts);

/* Bytes of state for n trainable values, padding included (ParamBytes.trained), or for the share.
 */
size_t optimizer_measure(const OptimizerConfig *config, int64_t n);
Status optimizer_init(Optimizer *o, const OptimizerConfig *config, const ParamList *params,
                      Device *device);
void optimizer_free(Optimizer *o);

/* One update at rate `lr`, every gradient multiplied by `scale` first; then publishes bf16 values,
 * unless it is of a share, which the caller joins with the others and publishes. A share is of f32
 * values or masters. */
void optimizer_step(Optimizer *o, ParamList *params, double lr, double scale);

/* The same in parts: optimizer_begin, then each layer's parameters, and those of none (-1), once.
 */
void optimizer_begin(Optimizer *o);
void optimizer_update(Optimizer *o, ParamList *params, int layer, double lr, double scale);

/* Adds the share's part of a layer's gradients (-1: of what is in none), as they are in the
 * parameters, to own ones. `reduce` is given each run of them that lies together, n values from
 * `grads` on, and where in the space that run begins; it makes the share's part the sum of all
 * ranks'. */
typedef void ReduceFunction(void *context, Tensor grads, int64_t first);
void optimizer_take_gradients(Optimizer *o, const ParamList *params, int layer,
                              ReduceFunction *reduce, void *context);

/* The norm of all gradients together, in f64. */
double gradients_norm(const ParamList *params);
void gradients_zero(ParamList *params);

#endif
