/* verify.h - proof that an exported model computes what it was exported from.
 *
 * The same prompts go through the base with its adapter, through the merged weights, through the
 * merged weights rounded as the format rounds them, and through the file, all in f32 and one after
 * the other, from mapped weights: a layer, its activations and a chunk of logits is all that is
 * held. Every tensor of the file must be ours, number by number, and the rounded model and the file
 * (which says itself what it is: config, tokenizer) must agree to the noise of f32 sums; what lies
 * between the merged model and the file is the format's own error, and is reported. */
#ifndef VERIFY_H
#define VERIFY_H

#include "infer/model.h"

typedef struct LogitsDifference {
    double kl;       /* mean KL divergence, natural logarithm */
    double same_top; /* share of positions with the same best token */
    double largest;  /* logit difference */
    int64_t positions;
} LogitsDifference;

typedef struct Verification {
    int adapter_tensors,
        applied; /* of the adapter; A, B, magnitudes and learned scales that were computed with */
    LogitsDifference merging; /* base + adapter against the merged weights */
    LogitsDifference format;  /* the merged weights against the file */
    LogitsDifference file;    /* the merged weights, rounded in memory, against the file */
} Verification;

/* `codes`: what a compressed-tensors folder was written with; SCHEME_NONE: another format.
 * ERR_FORMAT when the file differs beyond the format's error, with what was found in *v. */
Status verify_export(Verification *v, const char *model, const char *adapter, const char *exported,
                     QuantScheme codes);

/* The figures as a table on standard error. */
void verification_print(const Verification *v);

#endif
