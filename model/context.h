/* context.h - one batch's rows over several ranks.
 *
 * Everything but attention is row by row, so a rank runs its own rows alone. In a layer that owns K
 * and V it then sends each other rank the keys that one's rows see, and has in its slot those that
 * its own rows see: in sliding layers a window, in global ones what its segments have before it. On
 * the way back their gradients return, and are summed in the order of the ranks.
 *
 * The rows are cut in two runs a rank, the r-th from the front and from the back: with causal
 * attention each rank has then the same number of keys to look at. No run ends inside a picture. */
#ifndef CONTEXT_H
#define CONTEXT_H

#include "configs/model_config.h"
#include "kernels/arena.h"
#include "kernels/comm.h"

/* What ranks exchange in the layers of one kind. */
typedef struct ContextKeys {
    int64_t keys;                  /* that this rank's rows see */
    int64_t sent;                  /* its rows, once for each rank that sees them */
    int64_t *sends, *gets;         /* of them to and from each rank */
    int32_t *index, *first, *last; /* of each row, by places in slots (Rows) */
    int32_t *sources, *places;     /* (sent), (keys): what is sent; where what comes goes */
    Tensor source, place;          /* the same, i32 on the device */
} ContextKeys;

typedef struct ContextPart {
    const Comm *comm;
    int64_t N;     /* rows of this rank; one at least, which sees itself alone where it has none */
    int64_t all;   /* rows of the batch */
    int64_t *cuts; /* (2 ranks + 1): where runs begin */
    int32_t *rows; /* (N): which of the batch's they are, ascending; -1: none */
    ContextKeys kinds[ATTENTION_KINDS];
} ContextPart;

/* For plans: the most rows and keys that a rank of `comm` has of a batch of N rows whose pictures
 * have at most `longest` rows, 0: it has none. */
void context_measure(ContextPart *x, const Comm *comm, const ModelConfig *c, int64_t N,
                     int64_t longest);

/* Cuts a batch of N rows; `cuttable` (N + 1) says before which rows a run may begin. */
void context_open(ContextPart *x, const Comm *comm, int64_t N, const bool *cuttable);
void context_close(ContextPart *x);

/* What the batch's rows see, first[n] .. last[n] of it, to what this rank's see of its slots. */
void context_see(ContextPart *x, AttentionKind kind, const int32_t *first, const int32_t *last);

/* Places the lists of rows among what the host makes for a pass, and fills them. */
void context_reserve(ContextPart *x, Arena *arena);
void context_fill(const ContextPart *x, const Staging *inputs);

/* slot (keys, K, C) from everyone's rows (N, K, C), one dtype. */
void context_gather(const ContextPart *x, AttentionKind kind, Tensor slot, Tensor rows,
                    Arena *scratch);

/* drows (N, K, C) f32 = the sum of what everyone's dslot (keys, K, C) has for them. */
void context_return(const ContextPart *x, AttentionKind kind, Tensor drows, Tensor dslot,
                    Arena *scratch);

#endif
