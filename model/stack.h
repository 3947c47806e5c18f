/* stack.h - the forward pass of all layers over one set of rows: what training, scoring and
 * decoding share.
 *
 * The exact shortcut lives here. Layers past the last one that owns K and V give nothing to other
 * tokens, so a token whose own logits nobody needs stops there: only the rows kept go on. In models
 * without shared K/V that is the head alone. */
#ifndef STACK_H
#define STACK_H

#include "kernels/offload.h"
#include "model/gemma.h"

/* What an engine lends: slots of pages, and the size of the tables that find them. */
typedef struct KvCache {
    KvSlot *slots; /* one a layer: (pages * PAGE_KEYS, K, C) where the layer owns K and V */
    int64_t sequences, pages; /* rows and columns of Rows.pages */
} KvCache;

typedef struct Stack {
    Gemma *g;
    StackMode mode;
    int64_t N, kept; /* rows, and rows that go all the way */
    Rows all,
        some; /* `some`: the rows that go on after the boundary; `all` itself when every row does */
    int boundary;   /* first layer that sees only `some` */
    Staging inputs; /* integers that the caller fills: ids, positions, Rows, and lent tables */
    Tensor ids, positions;
    const MediaItem *media; /* whose soft tokens take the rows of their slots; ids are padding there
                             */
    int64_t media_count;
    Tensor rounded_table; /* (V, D): the token table as it will be stored; only where that is
                             trained */
    KvSlot *slots;        /* one a layer; the stack's own unless a cache is lent */
    const KvCache *cache; /* NULL: slots hold the keys of this pass alone */
    ContextPart *context; /* of the ranks that share this batch's rows; NULL: none do */
    BlockSaved *saved;    /* one a layer */
    Tensor *residual;     /* (N or kept, D): input of each layer, and of the final norm */
    Offload *offload;     /* with STACK_OFFLOAD: where those of most layers wait, by their number;
                           * NULL while measuring */
    Tensor kept_input;    /* (kept, D): residual[boundary] of `some` */
    PerLayerInputSaved per_layer;
    Tensor normed;            /* (N, D): what a layer leaves for the next; only where none trains */
    Tensor final, final_rstd; /* (kept, D), (kept) */
    Pass pass;
} Stack;

/* `cache`: of an engine, or NULL to have K and V of this pass only. */
void stack_open(Stack *s, Gemma *g, StackMode mode, int64_t N, int64_t kept, const KvCache *cache,
                Arena *scratch);
void stack_close(Stack *s);

/* Places everything in `arena`; also run measuring. What the caller fills is `staged` in s->inputs.
 */
void stack_place(Stack *s, Arena *arena);

/* From ids, positions and filled rows, sent first, to s->final. */
void stack_forward(Stack *s);

/* The same in its parts, for who fills residual[0] otherwise: what positions give, and the layers
 * with the final norm. */
void stack_begin(Stack *s);
void stack_layers(Stack *s);

/* The token table that embeds, and the head that it also is. */
Tensor stack_table(const Stack *s);

/* What layer l reads: its rows' residual, and their per-layer input (temporary). stack_enter points
 * the pass at its rows. */
Tensor stack_input(const Stack *s, int l);
Tensor stack_per_layer(Stack *s, int l);
void stack_enter(Stack *s, int l);

/* With STACK_OFFLOAD, on the way back: layer l's input is there from here on, and that of the layer
 * below is on its way. */
void stack_fetch(Stack *s, int l);

/* Bytes of the host's memory for each of a stack's layers. */
static inline size_t stack_offload_bytes(const Gemma *g, int64_t N) {
    return (size_t)(N * g->config.hidden_size) * dtype_size(g->dtype);
}

static inline bool stack_trains(const Stack *s) {
    return s->mode != STACK_SCORE;
}

#endif
