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

/* How the assignments of one layer spread over its experts: the most and the least used one, as
 * multiples of a fair share (1 when balanced). */
typedef struct ExpertShare {
    int64_t step, layer;
    double most, least;
} ExpertShare;

/* A figure of a task that the model was asked while it trained. */
typedef struct TaskFigure {
    int64_t step;
    const char *task, *metric; /* metric: with its filter, "exact_match,strict-match" */
    double value, stderr_;     /* NAN: none */
} TaskFigure;

/* A CSV file that is made when its first row comes. */
typedef struct LateLog {
    const char *header;
    char *path;
    FILE *file;
} LateLog;

typedef struct MetricsLog {
    FILE *csv, *events;
    char *csv_path;
    LateLog experts, tasks; /* experts.csv, tasks.csv */
} MetricsLog;

/* Opens OUTPUT/metrics.csv and a TensorBoard event file. Rows after `last_step` (of a run that was
 * killed past its last save) are dropped. */
Status metrics_open(MetricsLog *log, const char *output, int64_t last_step);
Status metrics_add(MetricsLog *log, const Metrics *m);

Status metrics_add_expert_share(MetricsLog *log, const ExpertShare *share);
Status metrics_add_task(MetricsLog *log, const TaskFigure *figure);
void metrics_close(MetricsLog *log);

/* Reads metrics.csv; caller frees *rows. */
Status metrics_read(Metrics **rows, int64_t *count, const char *path);

/* Reads experts.csv; a run without experts has none: count 0. */
Status expert_shares_read(ExpertShare **shares, int64_t *count, const char *path);

#endif
