/* fake_quant.h - quantisation-aware training: a model computes with its weights as they will be
 * stored.
 *
 * One setting serves the whole model. The forward pass uses w + blend * (rounded(w) - w); the
 * gradient passes straight through, but not where a code was clipped. With an adapter the sum
 * W + scale B A goes through the rounding, so what is trained is what a merged export holds. */
#ifndef FAKE_QUANT_H
#define FAKE_QUANT_H

#include "kernels/arena.h"
#include "kernels/quantize.h"

typedef struct FakeQuant {
    QuantScheme scheme; /* SCHEME_NONE: the model does not train through rounding */
    float blend;        /* 0: not yet, between: warming up, 1: fully */
    bool activations;   /* inputs of linears rounded to 8 bits a row, too */
    bool embeddings;    /* the token table (and head) and the per-layer table, too */
} FakeQuant;

/* Whether rounding applies now. NULL: never. */
static inline bool fake_quant_on(const FakeQuant *f) {
    return f && f->scheme != SCHEME_NONE && f->blend > 0;
}

/* Whether a matrix with rows of K can be stored by the scheme. */
static inline bool fake_quant_fits(const FakeQuant *f, int64_t K) {
    if (!scheme_has_blocks(f->scheme)) return f->scheme != SCHEME_NONE;
    return K % scheme_block(f->scheme, K) == 0 && K % 32 == 0;
}

#endif
