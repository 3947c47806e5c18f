/* store.h - a tokenised dataset in HDF5 (layout in data/README.md), and where it came from. */
#ifndef STORE_H
#define STORE_H

#include "data/hdf5.h"
#include "data/rows.h"
#include "kernels/comm.h"

typedef struct SampleSet {
    int64_t count;    /* samples */
    int64_t *begins;  /* (count + 1) first token of each */
    int64_t *trained; /* (count) trained tokens that have one before them */
    int32_t *sources; /* (count, 2) file and line (1-based) */
    int64_t *slots;   /* (slot_count, 2) token where an item's slots begin, and the item */
    int64_t slot_count;
    int64_t *slot_begins; /* (count + 1) first of each sample's slots */
    int64_t total_trained;
} SampleSet;

/* A picture or a recording as the model reads it, kept once whatever number of samples hold it. */
typedef struct StoredMedium {
    int64_t height, width; /* of a picture: its bytes are (height, width, 3); 0: a recording */
    int64_t frames;        /* of a recording: its bytes are rows of f32 */
    int64_t tokens;        /* soft tokens */
    int64_t offset, bytes; /* in media/bytes */
    int64_t parts, part; /* parts > 0: its bytes are the original file, of which it is frame `part`
                          * of `parts` where that is a video (kind MEDIUM_VIDEO) */
    int64_t kind;        /* of an original: MediumKind */
} StoredMedium;

typedef struct StoreCounts {
    double rows, samples, cut, dropped, bad, tokens, trained;
} StoreCounts;

typedef struct Store {
    H5File file;
    SampleSet train, eval;
    StoreCounts counts; /* of train and eval together */
    StoredMedium *media;
    int64_t media_count;
    char **source_paths;
    int source_count;
} Store;

/* Tokenises JSONL files into a new store. eval files go to the eval set, or the share of rows that
 * config->eval_share picks by a hash of seed and row. A bad row is an error naming file, line and
 * reason unless config->skip_bad. progress may be NULL. Of several ranks, which all call it, each
 * tokenises some of the rows into PATH.part-N, and the first makes of these what one process would;
 * comm NULL: one. */
typedef void StoreProgress(const char *path, int64_t rows, double share);
Status store_build(const char *path, RowReader *reader, const DataConfig *config, int64_t seed,
                   const Comm *comm, StoreProgress *progress);

/* Opens a store and checks that it is whole. With `reader` also that it was made with this
 * tokenizer, these settings and sources that have not changed: otherwise it is stale, an error
 * saying how. */
Status store_open(Store *s, const char *path, RowReader *reader, const DataConfig *config,
                  int64_t seed);
void store_close(Store *s);

/* That a store fits this tokenizer and that its sources, where they are still there, have not
 * changed. */
Status store_check_origin(Store *s, const Tokenizer *tokenizer);

/* The source file of a sample, and its line (1-based). */
const char *store_source(const Store *s, bool eval, int64_t sample, int *line);

/* Tokens and mask of one sample. */
Status store_read(Store *s, bool eval, int64_t sample, int32_t *ids, uint8_t *mask);

/* What an item of s->media is to the model `c`, *bytes being new: pixels or rows of features. `r`
 * goes along from item to item. */
Status store_read_medium(Store *s, int64_t item, OriginalReader *r, const ModelConfig *c,
                         uint8_t **bytes);

static inline int64_t sample_length(const SampleSet *set, int64_t i) {
    return set->begins[i + 1] - set->begins[i];
}

#endif
