/* decoder.h - one sequence, token by token, with its keys and values kept.
 *
 * Full layers keep every key. Sliding layers keep a buffer of about two windows: when it is full
 * its last window moves to the front, so the keys a query sees always lie behind each other. */
#ifndef DECODER_H
#define DECODER_H

#include "model/stack.h"

typedef struct Decoder {
    Gemma *g;
    KvSlot *slots;
    int64_t length[ATTENTION_KINDS]; /* keys in the slots of a kind */
    int64_t capacity[ATTENTION_KINDS];
    int64_t position; /* of the next token */
    int64_t chunk;    /* most tokens fed at once */
    DType kv;         /* of keys and values */
    Arena cache, activations, scratch;
} Decoder;

/* Room for max_tokens in all, fed in chunks of at most `chunk`. Keys and values are kept as `kv`:
 * the model's dtype, Q8_0 or Q4_0 (in blocks of 32 along a head). */
Status decoder_init(Decoder *d, Gemma *g, int64_t max_tokens, int64_t chunk, DType kv);
void decoder_free(Decoder *d);

/* The dtype that an option names: NULL or the model's own dtype, q8_0, q4_0. */
Status kv_dtype(DType *kv, const Gemma *g, const char *name);

/* Feeds n tokens and writes the logits (V, softcap included) after the last; n may exceed the
 * chunk. Only the last token goes through layers that own no K and V. */
void decoder_feed(Decoder *d, const int32_t *ids, int64_t n, float *logits);

#endif
