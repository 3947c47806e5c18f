/* pass.h - one call of forward or backward: which rows flow, what each may see, where temporaries
 * go.
 *
 * A batch is one axis of N rows: sequences and packed segments lie behind each other, and what
 * separates them is only the interval of keys each row sees. */
#ifndef PASS_H
#define PASS_H

#include "model/context.h"

/* What a pass through layers leaves behind. */
typedef enum StackMode {
    STACK_SCORE,     /* forward only; layers share one set of saved activations */
    STACK_KEEP,      /* for a backward pass, every activation kept */
    STACK_RECOMPUTE, /* for a backward pass that makes a block's activations again */
    STACK_OFFLOAD,   /* the same, and the blocks' inputs wait in the host's memory */
} StackMode;

static inline bool stack_mode_recomputes(StackMode mode) {
    return mode == STACK_RECOMPUTE || mode == STACK_OFFLOAD;
}

/* The rows flowing through some layers, and per attention kind the keys each sees. */
typedef struct Rows {
    int64_t count;
    Tensor source; /* (count) i32: their places among all rows; absent: all of them */
    Tensor index[ATTENTION_KINDS]; /* (count) i32: each row's place on the key axis, ascending */
    Tensor first[ATTENTION_KINDS]; /* (count) i32: the interval of keys it sees, inclusive */
    Tensor last[ATTENTION_KINDS];
    Tensor cos[ATTENTION_KINDS]; /* (count, C/2) f32 */
    Tensor sin[ATTENTION_KINDS];
    /* Keys and values in a cache of pages; absent where slots hold this pass alone, in order. */
    Tensor sequence;               /* (count) i32, ascending: which sequence a row belongs to */
    Tensor pages[ATTENTION_KINDS]; /* (sequences, P) i32: where the pages of its keys lie */
    Tensor place[ATTENTION_KINDS]; /* (count) i32: where a row's own key goes; of all rows only */
    /* With several adapters: rows sorted by adapter, those of number a from adapters[a] to
     * adapters[a + 1], 0 being none. Host memory; NULL: every row goes through every adapter. */
    const int64_t *adapters;
} Rows;

/* K and V of one layer that owns them; layers that share point here. */
typedef struct KvSlot {
    Tensor k, v;   /* (S, K, C) */
    Tensor dk, dv; /* (S, K, C) f32; training only */
    bool begun;    /* they have gradients of layers that share k and v */
} KvSlot;

typedef struct Pass {
    const Rows *rows;
    KvSlot *slots;              /* one for each layer; valid where the layer owns K and V */
    const ContextPart *context; /* whose rows these are a part of; NULL: all there are */
    const Comm *experts;        /* ranks that have the experts between them; NULL: all are here */
    Arena *scratch;
    bool training;
    /* Where nothing is trained a layer's end makes the next one's normalised input with its output.
     */
    const struct Norm *next;     /* of the layer that follows; NULL: it does not follow at once */
    const struct Linear *reader; /* the first product that reads it; NULL: none of a layer's */
    Tensor leaving;              /* (N, D): where that goes */
    Tensor entered;              /* (N, D): that of the layer that is entered now */
    bool is_entered;             /* it is there */
    /* Activations in 8 bits that were made with them, for the product that reads them next. */
    Tensor codes_room; /* u8; absent: products round for themselves */
    Tensor codes;      /* of what lies at `coded`; that NULL: of nothing */
    const void *coded;
    bool int8;    /* packed weights meet activations in 8 bits: running a model, not training it */
    uint64_t key; /* of this micro-batch's random numbers */
    /* Of the experts; absent: nobody asks. */
    Tensor load_counts; /* (L, E) i32: rows that each expert got in each layer */
    Tensor load_probs;  /* (L, E) f32: sum of its probabilities over the rows */
    Tensor balance;     /* (E) f32: derivative of the loss by each probability, read backward */
} Pass;

#endif
