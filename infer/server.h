/* server.h - the OpenAI chat-completions and completions API over HTTP.
 *
 * A thread a connection parses, waits and writes; one thread owns the engine. Between them lie
 * calls: what was asked, and what has been answered so far. */
#ifndef SERVER_H
#define SERVER_H

#include "infer/dialog.h"
#include "infer/engine.h"

typedef struct ServeOptions {
    const char *host;            /* 127.0.0.1 unless said otherwise; elsewhere a key is a must */
    int64_t port;                /* 0: any that is free */
    const char *key;             /* clients must show it; NULL: nobody must */
    const char *name;            /* the base model's */
    const char *const *adapters; /* (Model.adapters) names of the others */
    ChatFormat format;
    bool has_format;   /* else chats are refused */
    int64_t sequences; /* at once */
    int64_t context;   /* tokens of one request, prompt and answer */
    int64_t cache;     /* keys in all */
    int64_t queue;     /* requests that wait; more are turned away */
    int64_t body;      /* bytes of a request */
    int64_t connections;
    const char *media;     /* folder that messages may name files of; NULL: none may */
    MediumOptions reading; /* budgets of media */
    const char *kv;
    const char *draft; /* an assistant's folder; NULL: none */
} ServeOptions;

ServeOptions serve_options_default(void);

/* Serves until SIGINT or SIGTERM. Says on standard error where it listens. */
Status serve(Model *m, const ServeOptions *o);

#endif
