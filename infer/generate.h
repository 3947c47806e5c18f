/* generate.h - choosing the next token, and one answer from prompt to stop. */
#ifndef GENERATE_H
#define GENERATE_H

#include "infer/decoder.h"
#include "infer/model.h"

typedef struct Sampling {
    double temperature; /* 0: greedy, ties to the lowest id */
    int64_t top_k;      /* 0: all */
    double top_p;       /* 1: all */
    uint64_t seed;
    int64_t max_tokens;
    const char *kv; /* keys and values: NULL (the model's dtype), "q8_0" or "q4_0" */
    int32_t stops[32], suppressed[32];
    int stop_count, suppress_count;
} Sampling;

/* Defaults from generation_config.json (greedy without one); stops are the union of its
 * eos_token_id and that of config.json. */
Status sampling_load(Sampling *s, const Model *m);

/* The next token; token number `index` of the answer keys the random number. logits are changed. */
int32_t sample_token(const Sampling *s, float *logits, int64_t vocab, int64_t index);

/* Generates after `prompt` until a stop token (kept) or max_tokens, adding ids to *out. `show`, if
 * given, is called with each token as it comes. */
typedef void TokenFunction(void *context, int32_t id);
Status generate(Model *m, const Tokens *prompt, const Sampling *s, Tokens *out, TokenFunction *show,
                void *context);

#endif
