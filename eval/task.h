/* task.h - what a task asks and how its answers are scored: read from YAML, built in or one's own.
 */
#ifndef TASK_H
#define TASK_H

#include "eval/filter.h"

#define CHAINS_MAX  4
#define STOPS_TEXTS 8

typedef enum TaskOutput {
    OUTPUT_TEXT,    /* the model answers */
    OUTPUT_CHOICES, /* the likelihood of each choice */
    OUTPUT_ROLLING, /* the likelihood of whole documents */
} TaskOutput;

typedef enum Scorer {
    SCORER_NONE, /* choices and rolling likelihoods score themselves */
    SCORER_EXACT,
    SCORER_HENDRYCKS,
    SCORER_MINERVA,
    SCORER_AIME,
    SCORER_MATHARENA,
    SCORER_THREE_STEP,
    SCORER_LETTER,
    SCORER_IFEVAL,
    SCORER_PYTHON,
    SCORER_BFCL,
    SCORER_CLEANUP,
    SCORER_WER,
} Scorer;

typedef struct Texts {
    char **items;
    int count;
} Texts;

#define MEDIA_KINDS 3

/* A document's field goes by one of several names. */
typedef struct FieldNames {
    char *name;
    Texts names;
} FieldNames;

typedef struct Task {
    char *name;  /* with its @rules, where it was asked for so */
    char *rules; /* the rule set it follows, with its version */
    double version;
    char *reads;
    Texts files, fewshot_files; /* below the data folder, the first that are there */
    FieldNames fields[8];
    int field_count;
    char *by; /* field that splits it into tasks of their own; NULL: none */
    TaskOutput output;
    bool chat;     /* the question is a user's message */
    bool messages; /* the document brings its own: "messages", and "tools" */
    /* fields that name pictures, recordings or videos, which come before the question: a name or a
     * list of them. `media_types` are types of message parts. */
    char *media_fields[MEDIA_KINDS], *media_types[MEDIA_KINDS];
    int media_count;
    /* templates (prompt.h); NULL: none */
    char *description, *question, *answer, *worked, *opening, *tests, *program;
    char *choices;   /* letters, bracketed or texts */
    char *delimiter; /* between question and answer: a space unless said otherwise */
    int64_t shots;
    bool drawn; /* few-shot examples are drawn for each document; else the first ones */
    Texts until;
    bool has_until;
    int64_t max_tokens, samples;
    double temperature; /* NAN: greedy as plain text, in a chat what the model's makers set */
    FilterChain chains[CHAINS_MAX];
    int chain_count;
    Scorer scorer;
    ExactMatch exact;
    Texts metrics;
} Task;

/* The task of that name: NAME or NAME@RULES built in, or the path of a YAML file. ERR_USAGE lists
 * what there is. */
Status task_find(Task *task, const char *name);
void task_free(Task *task);

/* The built-in task whose rules scored a row: by its name and suite; or, for a harness's samples,
 * the longest name that `name` begins with. */
Status task_for_row(Task *task, const char *name, const char *suite);
Status task_for_samples(Task *task, const char *name);

#endif
