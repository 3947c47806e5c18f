/* drafter.h - guessing the next tokens with a small model that reads the large one's keys.
 *
 * Gemma 4's assistants predict several tokens from one position: each step takes the embedding of
 * the last token and the state behind it (the large model's final one, then the drafter's own),
 * attends to the large model's keys and values of its last layers of either kind, and gives a token
 * and the next state. What is guessed is checked by the large model, so answers do not change. */
#ifndef DRAFTER_H
#define DRAFTER_H

#include "formats/checkpoint.h"
#include "model/stack.h"

#define DRAFT_MAX 16

typedef struct Drafter {
    Checkpoint checkpoint;
    Gemma g;
    const Gemma *target;
    int32_t *ordering; /* (V) tokens by centroid; NULL: the head looks at every token */
    int64_t rows;      /* at once, at most */
    Arena activations, scratch;
} Drafter;

/* Opens an assistant's folder for the model it was made for. ERR_CONFIG when their shapes do not
 * fit. */
Status drafter_open(Drafter *d, const char *dir, const Gemma *target);
void drafter_close(Drafter *d); /* accepts a zeroed one */

/* Tokens guessed each time unless said otherwise. */
#define DRAFT_TOKENS 4

/* Memory for `rows` sequences at once over a cache of that size. */
Status drafter_reserve(Drafter *d, int64_t rows, const KvCache *cache);

/* A sequence that is guessed on: its last token lies at `position`, keys before it are in the
 * cache, sliding layers see those from sliding_first on. */
typedef struct DraftRow {
    int32_t token;
    int64_t position, sliding_first;
    const int32_t *pages[ATTENTION_KINDS]; /* (page_count) */
    int64_t page_count;
} DraftRow;

/* out (n, steps): the guesses. hidden (n, backbone_hidden_size): the large model's final state of
 * the token before each row's; changed. */
void drafter_guess(Drafter *d, KvSlot *slots, const DraftRow *rows, int64_t n, int64_t steps,
                   Tensor hidden, int32_t *out);

#endif
