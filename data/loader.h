/* loader.h - samples to batches: shuffled, packed, prefetched, and resumable at any step.
 *
 * The order of an epoch is a function of (seed, epoch), so the cursor is a step number and nothing
 * more. Packing is first-fit in that order into rows of max_length; segments of a row never see
 * each other and restart their positions. A step is sequences x accumulate rows, the last step of
 * an epoch what is left. */
#ifndef LOADER_H
#define LOADER_H

#include "data/store.h"
#include "model/step.h"

/* One micro-batch: arrays of capacity rows; see Batch for their meaning. */
typedef struct MicroBatch {
    Batch batch;
    int32_t *ids, *positions, *starts, *targets;
    float *weights;
    int32_t *span_ends;
    MediaItem *media; /* each with bytes of its own */
    int64_t media_capacity;
    int64_t trained;  /* targets in it */
    int64_t *samples; /* the samples in it, ascending in the batch */
    int64_t sample_count;
} MicroBatch;

typedef struct Loader Loader;

typedef struct LoaderConfig {
    int64_t sequences, accumulate, max_length, seed;
    bool shuffle, packing;
    int64_t steps; /* 0: by epochs */
    double epochs;
    const ModelConfig *model; /* whose pictures may see themselves; NULL: text alone */
    int rank, ranks; /* of those that share a step's micro-batches, turn by turn; ranks 0: one */
} LoaderConfig;

/* Plans the run; loader_start then begins filling from step `first` (0 is the beginning). */
Status loader_open(Loader **l, Store *store, const LoaderConfig *config);
Status loader_start(Loader *l, int64_t first);
void loader_close(Loader *l); /* accepts NULL */

int64_t loader_steps(const Loader *l);
double loader_epoch(const Loader *l, int64_t step); /* epochs done after `step` steps */
int64_t loader_rows(const Loader *l);               /* packed rows in the first epoch */

/* The largest micro-batch there is, in tokens. */
int64_t loader_capacity(const Loader *l);

/* The next step's micro-batches that are this rank's, valid until the next call. `trained` is the
 * number of targets in them; each target's weight is 1 / trained. */
Status loader_next(Loader *l, MicroBatch **batches, int64_t *count, int64_t *trained);

/* How many micro-batches the step that was taken last has on all ranks: this rank's are rank,
 * rank + ranks, ... of them. */
int64_t loader_step_batches(const Loader *l);

/* Gives each target the weight 1 / trained, of all ranks' targets. */
void micro_batches_weigh(MicroBatch *batches, int64_t count, int64_t trained);

/* All samples of the eval set (or train set) as one batch each of up to max_length tokens, for
 * scoring. */
Status loader_eval_batch(Store *store, bool eval, int64_t *sample, int64_t max_length,
                         const ModelConfig *model, MicroBatch *out);

void micro_batch_free(MicroBatch *b);

#endif
