/* run.h - asking a model all questions of some tasks, and scoring what it says.
 *
 * Every answer is written to OUT/responses.jsonl the moment it is there, so a run that was stopped
 * goes on where it was; of several ranks each writes a file of its own, responses-N.jsonl. In the
 * end OUT holds results.json, samples_TASK.jsonl and report.html. */
#ifndef RUN_EVAL_H
#define RUN_EVAL_H

#include "data/medium.h"
#include "eval/prompt.h"
#include "eval/results.h"
#include "infer/engine.h"
#include "kernels/comm.h"

typedef struct EvalOptions {
    const char *tasks; /* names, with commas between */
    const char *data;  /* folder of questions, or one file */
    const char *out;   /* folder; NULL: nothing is written */
    double limit;      /* documents of each task: a share below 1, else a number; 0: all */
    PromptOptions prompt;
    int64_t samples;                /* answers to each question; 0: the task's own number */
    int64_t max_tokens, think_most; /* 0: the task's own; no budget */
    double temperature, top_p, min_p;
    int64_t top_k;          /* NAN and -1: the task's own, or the model's */
    uint64_t seed;          /* of sampling */
    MediumOptions reading;  /* budgets of media; the rest is set here */
    int64_t batch;          /* sequences at once */
    const char *kv;         /* how keys and values are kept */
    int64_t bootstrap;      /* iterations */
    bool run_code;          /* consent to run generated programs, in a sandbox */
    bool quiet;             /* no progress line */
    const Comm *ranks;      /* that ask the questions turn by turn, and meet in `out`; NULL: one */
    bool (*stopping)(void); /* whether a signal came */
} EvalOptions;

EvalOptions eval_options_default(void);

/* Who is asked. */
typedef struct Examinee {
    const char *dir, *adapter; /* named in the results; companions of the checkpoint in dir */
    Gemma *g;
    const Tokenizer *tokenizer;
} Examinee;

/* What the tasks take: the chat format, where any is asked in chat form (then prompt.format must be
 * known); towers, where any has media or may have. Tasks that cannot be found are eval_run's to
 * report. */
typedef struct EvalNeeds {
    bool chat, media;
} EvalNeeds;
EvalNeeds eval_needs(const EvalOptions *o);

/* Runs the tasks on an open model. ERR_STOPPED where o->stopping says so. Of several ranks the
 * first has the results. */
Status eval_run(Results *r, const Examinee *m, const EvalOptions *o);

#endif
