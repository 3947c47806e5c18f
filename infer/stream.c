/* stream.c - decoding a little at a time. */
#include "infer/stream.h"

void stream_end(TextStream *s) {
    tokenizer_decode(s->tokenizer, &s->text, s->run.ids, s->run.count, false);
    s->run.count = 0;
}

void stream_add(TextStream *s, int32_t id) {
    tokens_add(&s->run, id);
    if (!tokenizer_is_byte(s->tokenizer, id)) stream_end(s);
}

void stream_free(TextStream *s) {
    tokens_free(&s->run);
    text_free(&s->text);
}
