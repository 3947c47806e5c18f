/* sampler.h - choosing the next token, as transformers orders it: repetition penalty, temperature,
 * top-k, top-p, min-p. */
#ifndef SAMPLER_H
#define SAMPLER_H

#include "infer/model.h"

#define STOPS_MAX 32

/* Enough of the best tokens for what most settings leave. */
#define CANDIDATES_MAX 256

typedef struct Sampling {
    double temperature;        /* 0: greedy, ties to the lowest id */
    int64_t top_k;             /* 0: all */
    double top_p;              /* 1: all */
    double min_p;              /* least share of the best token's probability; 0: all */
    double repetition_penalty; /* of tokens in prompt and answer (Keskar et al. 2019); 1: none */
    uint64_t seed;
    int64_t max_tokens;
    int32_t stops[STOPS_MAX], suppressed[STOPS_MAX];
    int stop_count, suppress_count;
} Sampling;

/* Defaults from the generation_config.json of a checkpoint in `dir` (greedy without one); stops are
 * the union of its eos_token_id and that of config.json. */
Status sampling_load(Sampling *s, const char *dir, const ModelConfig *config);

/* ERR_USAGE naming the setting that is out of range. */
Status sampling_check(const Sampling *s);

bool sampling_stops(const Sampling *s, int32_t id);

/* A row of logits after penalties, and its best tokens (top_logits). */
typedef struct Candidates {
    Tensor logits; /* (1, V); read into buffer (V) when the best alone do not settle it */
    float *buffer;
    const float *values; /* (count) */
    const int32_t *ids;
    int64_t count;
    float lse; /* log of the sum of exp(logit / temperature) */
} Candidates;

/* How many of the best tokens sampler_pick wants to see. */
int64_t sampler_candidates(const Sampling *s, int64_t vocab);

/* Whether logits need changes before the best are looked for. */
bool sampler_edits(const Sampling *s);

/* Applies penalties: tokens that never come, and those of `ids` (prompt and answer so far). */
void sampler_edit(const Sampling *s, float *logits, int64_t vocab, const int32_t *ids,
                  int64_t count);

/* The next token. The random number is a function of the seed and `index`, the token's place in
 * its answer, so it does not depend on what else runs. */
int32_t sampler_pick(const Sampling *s, const Candidates *c, int64_t index);

#endif
