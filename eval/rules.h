/* rules.h - what a rule set makes of a response: the answer it reads, and its score. */
#ifndef RULES_H
#define RULES_H

#include "eval/task.h"

/* All borrowed by nobody: the caller decrefs with verdict_free. */
typedef struct Verdict {
    json_t *extracted; /* string; null: nothing was found */
    json_t *score;     /* a number; null: this needs more than the response; "random": a guess is
                        * drawn; or an object of several figures */
    json_t *more; /* {metric: value} beside the score, and details: normalized, step, warning */
    bool parsed;  /* whether an answer was found at all */
} Verdict;

/* `response`: a string, or a list of votes. ERR_FORMAT when the document lacks what the rule asks
 * for. */
Status rule_score(Verdict *v, const Task *task, const FilterChain *chain, const json_t *doc,
                  const json_t *response);
void verdict_free(Verdict *v);

/* Whether it is errors over words of all documents together ("errors" and "words" of `more`), less
 * being better. */
bool rule_is_rate(const Task *task);

/* The figure of a task's verdicts that `score` is: exact_match, acc, ... */
const char *rule_metric(const Task *task);

/* What is kept of a raw generation: what follows the last end of a thought, up to the first stop
 * text. think_end may be NULL. */
Text response_cleaned(Slice raw, const Texts *until, const char *think_end);

#endif
