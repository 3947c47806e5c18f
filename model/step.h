/* step.h - one batch through the model: forward, loss, and backward. */
#ifndef STEP_H
#define STEP_H

#include "model/stack.h"

/* Rows of a batch, all segments behind each other. Host memory of the caller. */
typedef struct Batch {
    int64_t N;
    const int32_t *ids;       /* (N) */
    const int32_t *positions; /* (N) restart at each segment */
    const int32_t *starts;    /* (N) index of the first row of the row's segment */
    const int32_t
        *span_ends; /* (N) last row of the bidirectional span a row is in, or -1; NULL: no spans */
    const int32_t *targets; /* (N) the next token where it is scored, else -1 */
    const float *weights;   /* (N) derivative of the loss by each nll; NULL when only scoring */
    const MediaItem *media; /* what stands in their slots; ascending by `first` */
    int64_t media_count;
} Batch;

/* Sees logits (n, V) f32, softcap included, of kept rows first .. first + n - 1. */
typedef void LogitsFunction(void *context, int64_t first, Tensor logits);

typedef struct StepOptions {
    StackMode mode;
    bool shortcut;    /* rows without a target stop after the last K/V owner */
    uint64_t key;     /* of the random numbers of this batch */
    ExpertLoad *load; /* NULL: not wanted */
    float aux_scale;
    LogitsFunction *logits; /* with STACK_SCORE; NULL: nobody wants them */
    void *logits_context;
    void (*layer_done)(void *context, int layer); /* its gradients are whole; NULL: nobody waits */
    void *layer_context;
    const MediaItem *largest; /* of each kind a batch may hold: what a plan counts with */
    int64_t largest_count;
} StepOptions;

/* Rows of logits made at a time: (256, 262144) f32 is 268 MB. A GPU would read its table too often
 * for so few. */
#define LOSS_ROWS     256
#define LOSS_ROWS_GPU 512

/* Everything a step places: made for the largest batch, placed anew for each. */
typedef struct StepMemory {
    Arena activations, scratch;
    Offload offload; /* with STACK_OFFLOAD */
} StepMemory;

/* Bytes a batch of N rows takes, `kept` of this rank's with targets: the same code, measuring. */
void step_measure(Gemma *g, int64_t N, int64_t kept, const StepOptions *options,
                  size_t *activations, size_t *scratch);

/* The most rows of a batch of N that this rank has: all, unless g->context shares them. */
int64_t step_own_rows(const Gemma *g, int64_t N, const StepOptions *options);

/* The most that batches of up to N rows take: with every row scored, and with some left out. */
void step_plan(Gemma *g, int64_t N, const StepOptions *options, size_t *activations,
               size_t *scratch);

/* Memory for batches of up to N rows, all of them scored. */
Status step_init(StepMemory *m, Gemma *g, int64_t N, const StepOptions *options);
void step_free(StepMemory *m);

/* Runs the batch. nll (N): the negative log-likelihood of each target, 0 where there is none.
 * Gradients of trainable parameters are added to, unless the mode is STACK_SCORE. Returns the sum
 * of nll * weight (of nll without weights). Where ranks share the rows (g->context) all of them
 * call it with the whole batch, and each has the nll, the sum and the gradients of its own. */
double step_run(Gemma *g, StepMemory *m, const Batch *batch, const StepOptions *options,
                float *nll);

#endif
