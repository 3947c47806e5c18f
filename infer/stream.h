/* stream.h - the text of tokens as they come: a run of byte tokens waits until it ends. */
#ifndef STREAM_H
#define STREAM_H

#include "data/tokenizer.h"

typedef struct TextStream {
    const Tokenizer *tokenizer;
    Tokens run; /* bytes whose text is not settled */
    Text text;  /* what tokenizer_decode gives of everything before, special tokens kept */
} TextStream;

void stream_add(TextStream *s, int32_t id);
void stream_end(TextStream *s);
void stream_free(TextStream *s);

#endif
