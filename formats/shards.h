/* shards.h - a checkpoint's weights as one file, or as shards of 5 GB with an index. */
#ifndef SHARDS_H
#define SHARDS_H

#include "formats/safetensors.h"

typedef struct ShardItem {
    const char *name, *dtype_text;
    int ndim;
    const int64_t *shape;
    size_t size;      /* bytes */
    const void *what; /* the caller's: a parameter, a stored tensor */
} ShardItem;

/* Writes the bytes of one item, in as many safetensors_write as it likes. */
typedef Status ShardWrite(SafetensorsWriter *w, const ShardItem *item, void *context);

/* Writes dir/model.safetensors, or model-0000N-of-0000M.safetensors and
 * model.safetensors.index.json. */
Status shards_write(const char *dir, const ShardItem *items, int count, ShardWrite *write,
                    void *context);

#endif
