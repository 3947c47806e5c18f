/* trainer.h - the training loop. */
#ifndef TRAINER_H
#define TRAINER_H

#include "train/session.h"

/* Trains as the run file says, into config->output; takes over the config. With `resume` continues
 * the run in that folder from its newest save. ERR_STOPPED after SIGTERM or SIGINT, everything
 * saved. */
Status train_run(RunConfig *config, bool resume);

/* Mean negative log-likelihood over the trained tokens of the eval set, with memory of its own kept
 * in *memory. */
Status evaluate(Session *s, StepMemory *memory, double *loss);

#endif
