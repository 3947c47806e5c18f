/* metrics.h - what a run measures, as CSV and as TensorBoard events. */
#ifndef METRICS_H
#define METRICS_H

#include "kernels/status.h"

#include <stdint.h>
#include <stdio.h>

typedef struct Metrics { /* of one update; NAN: not measured */
    int64_t step;
    double epoch, loss, aux_loss, lr, grad_norm;
    bool skipped;
    int64_t tokens, trained_tokens;
    double tokens_per_s, memory_bytes, eval_loss;
} Metrics;

typedef struct MetricsLog {
    FILE *csv, *events;
    char *csv_path;
} MetricsLog;

/* Opens OUTPUT/metrics.csv and a TensorBoard event file. Rows after `last_step` (of a run that was
 * killed past its last save) are dropped. */
Status metrics_open(MetricsLog *log, const char *output, int64_t last_step);
Status metrics_add(MetricsLog *log, const Metrics *m);

/* A series of one number a layer or expert, for TensorBoard only. */
Status metrics_add_scalar(MetricsLog *log, int64_t step, const char *tag, double value);
void metrics_close(MetricsLog *log);

/* Reads metrics.csv; caller frees *rows. */
Status metrics_read(Metrics **rows, int64_t *count, const char *path);

#endif
