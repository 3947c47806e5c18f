/* prompt.h - the bytes a model is asked with. */
#ifndef PROMPT_EVAL_H
#define PROMPT_EVAL_H

#include "data/chat.h"
#include "eval/documents.h"
#include "eval/mersenne.h"

/* How prompts are made; the same for all tasks of a run. */
typedef struct PromptOptions {
    int64_t shots;      /* few-shot examples; -1: the task's own number */
    bool chat;          /* questions as a user's messages, whatever the task says */
    bool think;         /* the chat lets the model think first */
    const char *system; /* instruction before everything else; NULL: none */
    ChatFormat format;
    uint64_t seed; /* of the few-shot examples: 1234 */
} PromptOptions;

/* Draws the examples of one document after the other, in their order. */
typedef struct Shots {
    const Suite *suite;
    int64_t count;
    bool drawn;
    Mersenne generator;
} Shots;

/* ERR_FORMAT when there are too few examples. */
Status shots_init(Shots *s, const Task *task, const Suite *suite, const PromptOptions *o);

/* Indices of the next document's examples, into picked (count). */
void shots_next(Shots *s, int64_t *picked);

/* Whether the task is asked in chat form. */
bool prompt_is_chat(const Task *task, const PromptOptions *o);

/* The context of a document: description, examples, question; in chat form rendered, <bos> and all.
 * *messages, given where media are wanted: of a chat that has some, what was rendered (the caller
 * decrefs); else NULL. */
Status prompt_render(Text *out, json_t **messages, const Task *task, const PromptOptions *o,
                     const Suite *suite, const json_t *doc, const int64_t *picked, int64_t count);

/* How the chat is rendered. */
ChatOptions prompt_chat_options(const PromptOptions *o);

/* Choice i of a document as it continues the prompt. */
Status prompt_choice(Text *out, const Task *task, const PromptOptions *o, const json_t *doc,
                     int64_t i);
int64_t prompt_choice_count(const json_t *doc);

/* The index of the right choice. */
Status prompt_gold(int64_t *gold, const Task *task, const json_t *doc);

#endif
