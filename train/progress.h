/* progress.h - what a person sees of a run: a bar on a terminal, a plain line every few seconds
 * otherwise. */
#ifndef PROGRESS_H
#define PROGRESS_H

#include "train/metrics.h"

typedef struct Progress {
    bool terminal, shown;
    double started, last_shown;
    int64_t first_step; /* of this process: what the rate is measured from */
    double smooth_loss;
} Progress;

void progress_init(Progress *p);
void progress_show(Progress *p, const Metrics *m, int64_t steps);

/* Ends the bar's line, if there is one, before other output. */
void progress_clear(Progress *p);

/* A line that the next one overwrites on a terminal; nothing elsewhere. */
void progress_line(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Rows of a file prepared so far: a StoreProgress. */
void progress_rows(const char *path, int64_t rows, double share);

double progress_now(void); /* seconds, monotonic */

#endif
