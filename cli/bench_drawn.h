/* bench_drawn.h - a released shape with random weights drawn where they run. */
#ifndef BENCH_DRAWN_H
#define BENCH_DRAWN_H

#include "model/gemma.h"

#include <stdint.h>

typedef struct DrawnBench {
    const char *preset, *device, *train; /* train: lora | qlora | full; NULL: decoding */
    const char *weights;                 /* of decoding: bf16 | q4_0 | q8_0 */
    int64_t layers, tokens, rank, sequences, depth;
    bool recompute; /* activations are made again, though there be room */
    bool offload;   /* and layers' inputs wait in the host's memory */
    bool lean;      /* no masters, and room for one layer's gradients */
    bool plan;      /* only say what memory training would take */
} DrawnBench;

/* One JSON line: tokens a second of training steps on `tokens` tokens, or of decoding them. */
Status bench_drawn(const DrawnBench *b);

/* Attention of released heads over `tokens` tokens, forward and backward: a JSON line each. */
Status bench_attention(const char *device, int64_t tokens);

/* Ids that are no special tokens' and the same every time. Caller frees. */
int32_t *bench_random_ids(const Gemma *g, int64_t n);

/* Bytes of weights that one decoded token reads: every matrix but the per-layer table, and of the
 * experts those that are chosen. */
double bench_bytes_a_token(const Gemma *g);

#endif
