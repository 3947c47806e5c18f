/* trainer.h - the training loop. */
#ifndef TRAINER_H
#define TRAINER_H

#include "train/metrics.h"
#include "train/session.h"

/* Asks the model that is trained the questions of the run file's eval_tasks, and puts the figures
 * into the log. ERR_STOPPED once `stopping` says that a signal came. */
typedef Status AskFunction(Session *s, int64_t step, bool (*stopping)(void), MetricsLog *log);

/* Trains as the run file says, into config->output; takes over the config. With `resume` continues
 * the run in that folder from its newest save; `ask` is called at every evaluation if there are
 * eval_tasks. ERR_STOPPED after SIGTERM or SIGINT, everything saved. */
Status train_run(RunConfig *config, bool resume, AskFunction *ask);

/* Mean negative log-likelihood over the trained tokens of the eval set, with memory of its own kept
 * in *memory. */
Status evaluate(Session *s, StepMemory *memory, double *loss);

#endif
