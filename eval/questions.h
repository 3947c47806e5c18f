/* questions.h - the questions of a run, what came back of each, and what was set. */
#ifndef QUESTIONS_H
#define QUESTIONS_H

#include "eval/run.h"
#include "infer/dialog.h"

#define THOUGHT_BEGIN "<|channel>"
#define THOUGHT_END   "<channel|>"

/* A document as it is asked. */
typedef struct Item {
    int suite;         /* of the run's list */
    int64_t doc;       /* its place in the suite */
    const json_t *row; /* the document */
    Text prompt;
    json_t *messages; /* of a chat with media, which the prompt's text only mentions; else NULL */
    char prompt_hash[65];
    json_t *answers; /* (jobs) what came back of each job; null: nothing yet */
    int64_t jobs;    /* answers, choices or windows that are wanted */
    bool together;   /* one job gives all choices: they differ in one token after the same ones */
} Item;

typedef struct RunSuite {
    const Task *task;
    const Suite *suite;
    int64_t original;
} RunSuite;

typedef struct Run {
    const Examinee *m;
    const EvalOptions *o;
    Task *tasks;
    Documents *documents;
    int task_count;
    RunSuite *suites;
    int suite_count;
    Item *items;
    int64_t item_count, item_capacity;
    Sampling sampling; /* the model's own */
    int32_t bos, thought_begin, thought_end;
    FILE *log;
    int64_t answered, total;
    int64_t cut; /* jobs whose prompt lost its beginning: the model has no positions for it */
    double began, shown;
    EngineCounts counts;
} Run;

static inline const Task *item_task(const Run *r, const Item *item) {
    return r->suites[item->suite].task;
}

/* Answers that are wanted of each document. */
static inline int64_t run_samples(const Run *r, const Task *t) {
    return r->o->samples ? r->o->samples : t->samples;
}

static inline int64_t run_max_tokens(const Run *r, const Task *t) {
    return r->o->max_tokens ? r->o->max_tokens : t->max_tokens;
}

/* Whether a document can be scored once it is answered: it says what is right. */
Status score_check(const Task *t, const json_t *row);

/* Figures of one suite into *results, its samples into OUT/samples_NAME.jsonl (score.c). */
Status score_suite(Run *r, Results *results, int suite);

/* Everything that decides what comes out (settings.c). Caller decrefs. */
json_t *settings_of(const Run *r);

/* A folder that holds another run's answers is refused; a new one gets the settings. */
Status settings_check(const Run *r, json_t *settings);

#endif
