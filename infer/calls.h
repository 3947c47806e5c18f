/* calls.h - what the server's two sides share: requests on their way, and the engine's thread. */
#ifndef CALLS_H
#define CALLS_H

#include "infer/server.h"

#include <pthread.h>

/* One answer of a call. Written by the engine's thread under the board's lock. */
typedef struct Part {
    struct Call *call;
    int index;
    Sequence *sequence; /* the engine's thread only */
    Text text;          /* of the answer so far */
    Tokens ids;         /* of the answer, the stop token too */
    float *logprobs;    /* (ids.count) */
    TokenChoice *tops;  /* (ids.count, top_logprobs) */
    Ending ending;
    struct Part *next; /* in line for the engine */
} Part;

/* A request under way. */
typedef struct Call {
    struct Board *board;
    Request request; /* of every part, but for the seed; its arrays are the call's */
    Tokens prompt;
    Text prompt_text;
    MediumList media; /* of the prompt, and once its turn came their soft tokens */
    SoftMedia soft;
    json_t *body, *tools;
    Grammar *grammar, *call_grammar; /* what the answer, and calls in it, are held to; or NULL */
    const char *model;               /* as the client named it */
    Part *parts;
    int count, ended;
    bool cancelled;
    char *error; /* the engine refused it */
    pthread_cond_t changed;
    char id[40];
    int64_t created, reused;
} Call;

typedef struct BoardCounts {
    int64_t requests, refused, failed, cancelled, prompt_tokens, answer_tokens, reused_tokens;
    double first_token_seconds; /* summed over answers */
    int64_t answers;
} BoardCounts;

/* Where both sides meet. */
typedef struct Board {
    pthread_mutex_t lock;
    pthread_cond_t work; /* for the engine's thread */
    Part *line, **line_end;
    int64_t waiting, running;
    bool stopping;
    BoardCounts counts;
    Engine *engine;
    pthread_t thread;
} Board;

Status board_open(Board *b, Engine *engine);
void board_close(Board *b);

/* Hands a call's parts to the engine. False when `most` parts wait already. */
bool board_submit(Board *b, Call *call, int64_t most);

/* Waits, under the lock, until the call changes or a moment has passed. */
void call_wait(Call *call);

/* The call is no longer wanted; returns when the engine has let go of it. */
void call_end(Call *call);

#endif
