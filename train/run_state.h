/* run_state.h - what makes a resumed run continue bit for bit: values, moments, cursor. */
#ifndef RUN_STATE_H
#define RUN_STATE_H

#include "optim/optimizer.h"

#define NORM_HISTORY 64

typedef struct RunState {
    int64_t
        step; /* updates done; the data cursor and the keys of all random numbers follow from it */
    int64_t skipped;  /* of them */
    double best_eval; /* INFINITY: none yet */
    int64_t evals_without_gain;
    float norms[NORM_HISTORY]; /* of the last good updates: what a spike is measured against */
    int64_t norm_count;
} RunState;

/* state.h5: the flat space of trained values (or f32 masters), the optimizer's moments, and
 * RunState. */
Status run_state_save(const RunState *state, const ParamList *params, const Optimizer *optimizer,
                      const char *path);

/* The reverse, into a placed model and optimizer of the same run, which may have a share of the
 * states; another size is an error. */
Status run_state_load(RunState *state, ParamList *params, Optimizer *optimizer, const char *path);

/* The newest step-N folder of OUTPUT/checkpoints with a state in it, or 0. */
int64_t run_state_newest(const char *output);

#endif
