/* rows.h - JSON rows to samples: token ids and which of them are trained.
 *
 * Kinds of row, detected from the first of each file: messages (+tools), prompt and completion,
 * text, and the ShareGPT and Alpaca spellings, which become messages. */
#ifndef ROWS_H
#define ROWS_H

#include "configs/run_config.h"
#include "data/medium.h"

typedef struct Sample {
    const int32_t *ids;
    const uint8_t *mask; /* 1: trained */
    int64_t count;
    bool cut;               /* lost its last turns to max_length */
    const MediaItem *media; /* what stands in its slots, ascending */
    int64_t media_count;
    const MediumList *originals; /* what they were made of */
} Sample;

/* Called with each sample of a row, in order. */
typedef void SampleFunction(void *context, const Sample *sample);

typedef struct RowReader {
    const DataConfig *config;
    const Tokenizer *tokenizer;
    const char
        *model_dir; /* where the chat template is looked for, when a chat row first needs it */
    bool has_format;
    ChatFormat format;
    int32_t bos, eos;
    int64_t dropped;       /* samples that were too long or had nothing to train */
    MediumOptions reading; /* config NULL: media are refused */
    int32_t marks[7];      /* of media: never trained; -1: not in the vocabulary */
} RowReader;

Status row_reader_init(RowReader *r, const DataConfig *config, const Tokenizer *tokenizer,
                       const char *model_dir);

/* Gives the samples of one row. An error says what is wrong with it. */
Status row_convert(RowReader *r, const json_t *row, SampleFunction *give, void *context);

/* <bos> unless the text begins with it, then the text; for scoring and plain generation. */
void encode_document(const RowReader *r, Slice text, Tokens *out);

/* Repairs of the run file applied to messages; caller decrefs. */
json_t *messages_repaired(const DataConfig *config, const json_t *messages);

#endif
