/* report.h - a run's figures as one HTML page that needs nothing else. */
#ifndef REPORT_H
#define REPORT_H

#include "eval/results.h"

/* Tables of figures with intervals drawn as bars, what was set, and where the questions came from.
 * `json`: of results_json. */
Status report_write(const Results *r, const json_t *json, const char *path);

#endif
