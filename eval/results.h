/* results.h - figures of tasks, gathered value by value and written in the harness's schema. */
#ifndef RESULTS_H
#define RESULTS_H

#include "eval/metrics.h"
#include "eval/task.h"

#include <stdio.h>

typedef enum FigureKind {
    FIGURE_MEAN,       /* of one value a document, with its standard error */
    FIGURE_FLAT,       /* of several values a document, without an error */
    FIGURE_PERPLEXITY, /* exp(-sum of values / sum of weights), error by bootstrap */
    FIGURE_RATE,       /* sum of values / sum of weights, less being better, error by bootstrap */
    FIGURE_BITS,       /* -sum of values / sum of weights / ln 2 */
} FigureKind;

/* All values of one metric under one filter. */
typedef struct Figure {
    char *metric, *filter;
    FigureKind kind;
    double *values, *weights; /* (count) */
    int64_t *docs;            /* (count) which document each is of */
    int64_t count, capacity;
} Figure;

typedef struct TaskResult {
    char *name, *alias, *group; /* group: NULL when it stands alone */
    double version;
    int64_t shots, original, effective;               /* documents there are, and those asked */
    int64_t samples;                                  /* answers to each */
    int64_t responses, unparsed, truncated, unclosed; /* thoughts that never ended */
    bool generates;
    Figure *figures;
    int count;
} TaskResult;

typedef struct Results {
    TaskResult *tasks;
    int count;
    json_t *settings; /* what else is written: config, model, hashes, times */
} Results;

TaskResult *results_add(Results *r, const char *name);
void results_free(Results *r);

/* Adds a value; `weight` of rates and perplexities only. */
void result_value(TaskResult *t, const char *metric, const char *filter, FigureKind kind,
                  int64_t doc, double value, double weight);

/* The figure itself. */
Estimate figure_estimate(const Figure *f, int64_t iterations);

/* A 95 % interval: Wilson's for shares of right and wrong, else the normal one; within 0 and 1
 * where the figure is. `f` NULL: of a group. */
void figure_interval(const Figure *f, Estimate e, double *low, double *high);

/* {results, groups, group_subtasks, versions, n-shot, higher_is_better, n-samples, ...settings}.
 * Caller decrefs. `iterations`: of the bootstrap; 0 for no errors of that kind. */
json_t *results_json(const Results *r, int64_t iterations);

/* A table for people, with 95 % intervals. */
void results_print(const Results *r, FILE *out);

/* JSON to a file, whole or not at all. */
Status json_write(const json_t *value, const char *path);

#endif
