/* chat.h - a conversation as the released Gemma 4 templates write it, and what of it is trained.
 *
 * Two templates of July 2026 are rendered, byte for byte: the large models' and the small ones'.
 * They differ only in the generation prompt. */
#ifndef CHAT_H
#define CHAT_H

#include "data/json.h"
#include "data/tokenizer.h"

typedef enum ChatFormat { CHAT_LARGE, CHAT_SMALL } ChatFormat;

/* The format of a model folder: `choice` large or small, or auto by the hash of its template file.
 * An unknown template under auto is an error that names the flag. */
Status chat_format_find(ChatFormat *format, const char *dir, const char *choice);
const char *chat_format_name(ChatFormat format);

typedef struct ChatOptions {
    ChatFormat format;
    bool add_generation_prompt, enable_thinking, preserve_thinking;
    bool trl_mask; /* the mask TRL makes: the newline after <turn|> trained, <|tool_response> not */
    int train_from;         /* messages before this one are not trained */
    int empty_thought_from; /* a closed empty thought, untrained, opens model turns from this
                             * message on; 0: nowhere */
} ChatOptions;

typedef struct Rendered {
    Text text;
    Range *trained; /* ascending, by byte */
    int trained_count;
    Range *content; /* what came from the data rather than the template: ascending, by byte */
    int content_count;
} Rendered;

/* Renders messages (a list) with tools (a list, or NULL). What the template refuses is an error. */
Status chat_render(Rendered *out, const json_t *messages, const json_t *tools,
                   const ChatOptions *options);
void rendered_free(Rendered *rendered);

/* Ids of a rendering and their mask; with `literal` data text makes no control tokens. */
void chat_encode(const Tokenizer *t, const Rendered *rendered, bool literal, Tokens *ids,
                 uint8_t **mask);

#endif
