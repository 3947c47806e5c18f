/* chat.h - a conversation with a model: its history, and turns with calls of functions. */
#ifndef CHAT_SESSION_H
#define CHAT_SESSION_H

#include "infer/dialog.h"
#include "infer/engine.h"
#include "infer/tools.h"

typedef struct Chat Chat;

/* Who sees the conversation. */
typedef struct ChatView {
    void *context;
    void (*piece)(void *context, PieceKind kind, Slice text, const json_t *call);
    /* Whether a call may run; what it answered. */
    bool (*allow)(void *context, const char *name, const json_t *arguments, const char *command);
    void (*response)(void *context, const char *name, const json_t *response);
    bool (*stopped)(void *context); /* whether the answer is to end now */
} ChatView;

typedef struct ChatSettings {
    ChatFormat format;
    bool think;
    const char *system; /* NULL: none */
    const char *tools;  /* a tools file; NULL: none */
    int64_t context;    /* tokens of the conversation */
    const char *kv;
    const char *draft;     /* an assistant's folder; NULL: none */
    int rounds, seconds;   /* calls in a turn, and time for each */
    MediumOptions reading; /* budgets of media */
} ChatSettings;

struct Chat {
    Model *m;
    ChatSettings settings;
    Sampling sampling;
    Engine engine;
    Drafter drafter;
    Tools tools;
    json_t *messages;
    json_t *attached; /* parts that go before what is said next */
    int64_t answered; /* tokens of the last turn */
};

Status chat_open(Chat *c, Model *m, const ChatSettings *settings);
void chat_close(Chat *c);

/* One turn: what the user says after what is attached, the model's answer, its calls and what
 * follows them. On an error the conversation is as it was before. */
Status chat_say(Chat *c, const char *text, const ChatView *view);

/* A picture, recording or video (`part` as in messages) for the next turn; ERR_FORMAT where it
 * cannot be read. */
Status chat_attach(Chat *c, json_t *part);

/* Forgets everything but the system text. */
void chat_clear(Chat *c);

/* The system text from now on; "" takes it away. */
void chat_set_system(Chat *c, const char *text);

/* The conversation as a data row of `train`, and back. Loading replaces what was said. */
Status chat_save(const Chat *c, const char *path);
Status chat_load(Chat *c, const char *path);

#endif
