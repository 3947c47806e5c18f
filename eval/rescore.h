/* rescore.h - scoring responses that were saved: single rows, and whole sample files. */
#ifndef RESCORE_H
#define RESCORE_H

#include "eval/results.h"
#include "eval/rules.h"

/* A row {"task", "suite", "filter", "doc", "response"} gains "extracted", "score" and what else the
 * rule says. Programs are run (with `run_code`) where the document has their tests. */
Status rescore_row(json_t *row, bool run_code);

/* Whether a file's first row is a harness's sample (it has "resps"). */
Status rescore_is_samples(bool *samples, const char *path);

/* Adds the figures of a samples file, named samples_TASK[_TIME].jsonl, to *r; `task`: its name, or
 * NULL to go by the file's. `group`: NULL, or what it belongs to. */
Status rescore_samples(Results *r, const char *path, const char *task, const char *group);

#endif
