/* schedule.h - the learning rate of each update. */
#ifndef SCHEDULE_H
#define SCHEDULE_H

#include "configs/run_config.h"

/* The rate of update `i` (from 0) of `steps`: linear warm-up from 0, then constant, linear to
 * min_lr, cosine to min_lr, or wsd: constant and a cosine to min_lr over the last tenth. Without
 * warm-up the first update has the full rate, as get_scheduler of transformers has it. */
double schedule_rate(const RunConfig *c, int64_t i, int64_t steps);

#endif
