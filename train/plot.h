/* plot.h - the curves of one run or several as one SVG. */
#ifndef PLOT_H
#define PLOT_H

#include "kernels/status.h"

/* Loss (train and eval), learning rate, gradient norm and throughput over steps, from each run
 * folder's metrics.csv; with experts also the balancing loss. */
Status plot_runs(const char *path, const char *const *runs, int count);

#endif
