/* compare.h - two runs over the same questions, question by question. */
#ifndef COMPARE_H
#define COMPARE_H

#include "data/json.h"

#include <stdio.h>

/* Reads the samples of two runs' folders: every task, filter and metric that both have, the
 * questions paired by their hash. A list of {task, filter, metric, n, a, b, difference, stderr,
 * low, high, better, worse, p}: the mean difference b - a with its 95 % interval, and the sign
 * test's p over questions that differ. Caller decrefs. */
Status runs_compare(json_t **out, const char *a, const char *b);

void comparison_print(const json_t *comparison, const char *a, const char *b, FILE *out);

#endif
