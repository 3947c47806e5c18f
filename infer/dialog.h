/* dialog.h - messages to a prompt, and an answer in pieces while it comes. */
#ifndef DIALOG_H
#define DIALOG_H

#include "data/chat.h"
#include "data/medium.h"
#include "infer/model.h"
#include "infer/soft.h"

typedef struct DialogPrompt {
    Tokens ids;
    Text text;        /* what the answer is parsed after */
    MediumList media; /* decoded; dialog_soften runs the towers over them */
    SoftMedia soft;
} DialogPrompt;

/* Renders messages (a list) with tools (a list, or NULL) and encodes them. Calls whose arguments
 * are a string are read first, as OpenAI's clients send them; media are read as `reading` says (its
 * config is set here). ERR_FORMAT for what the template refuses. */
Status dialog_prompt(DialogPrompt *p, const Gemma *g, const Tokenizer *tokenizer,
                     const json_t *messages, const json_t *tools, const ChatOptions *options,
                     const MediumOptions *reading);
void dialog_prompt_free(DialogPrompt *p);

/* Reads the media of messages, if there are any, and puts their slots into the rendered text. */
Status dialog_read_media(MediumList *list, Rendered *rendered, const Gemma *g,
                         const json_t *messages, const MediumOptions *reading);

/* The soft tokens of a prompt's media. In the thread that runs the model. */
Status dialog_soften(SoftMedia *soft, Gemma *g, const MediumList *media, const Tokens *ids);

typedef enum PieceKind { PIECE_THOUGHT, PIECE_CONTENT, PIECE_CALL } PieceKind;

/* A piece of an answer: new text of a thought or of the content; or a whole call, {name,
 * arguments}, whose text is as it was written. `call` is NULL for one that cannot be read: then it
 * is content. */
typedef void PieceFunction(void *context, PieceKind kind, Slice text, const json_t *call);

/* Where in an answer one is. */
typedef struct Pieces {
    const json_t *tools;
    PieceFunction *give;
    void *context;
    PieceKind kind;
    bool head;  /* the thought's channel name has not been read yet */
    bool begun; /* the content has: white space before it is dropped, at the end as well */
    size_t at;  /* bytes of the answer dealt with */
    int calls;  /* so far */
} Pieces;

/* `prompt`: the tail of the prompt, which may have opened a thought. */
void pieces_init(Pieces *p, Slice prompt, const json_t *tools, PieceFunction *give, void *context);

/* The answer's text so far, special tokens kept; with `last` nothing more comes. */
void pieces_feed(Pieces *p, Slice answer, bool last);

#endif
