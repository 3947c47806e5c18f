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

/* Into FOLDER/state.h5: trained values (or f32 masters), the optimizer's moments, and RunState. Of
 * several ranks each writes what it has a share of, the others into state-1.h5, state-2.h5, ...,
 * and each file says which pieces of which parameters it has. */
Status run_state_save(const RunState *state, ParamList *params, const Optimizer *optimizer,
                      const char *folder);

/* The reverse, into a placed model and optimizer of the same run, whatever the ranks then and now;
 * all ranks call it. */
Status run_state_load(RunState *state, ParamList *params, Optimizer *optimizer, const char *folder);

/* The newest step-N folder of OUTPUT/checkpoints with a state in it, or 0. */
int64_t run_state_newest(const char *output);

#endif
