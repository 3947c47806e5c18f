/* parts.h - weights that a checkpoint folder stores in several tensors, as one tensor of blocks.
 *
 *   compressed-tensors  int4 or int8 codes in int32 (pack-quantized) or int8 (int-quantized), with
 *                       a scale for each row or group of whole 32s, symmetric: Q4_0, Q8_0 blocks
 *   bitsandbytes        nf4 in blocks of 64, scales plain or in 8 bits: NF4, NF4_NESTED
 *
 * No code changes; a scale becomes f16, which holds those that are stored as bf16. The matrices of
 * experts, each a module of its own, become the fused parameter. */
#ifndef PARTS_H
#define PARTS_H

#include "formats/safetensors.h"

/* One weight: what it is as a whole, bytes NULL, and where its pieces are. */
typedef struct Parts Parts;

/* All such weights of a folder. */
typedef struct PartsList {
    StoredTensor *whole; /* each with its parts */
    int count;
} PartsList;

/* Finds the weights stored in parts among `tensors` (sorted by name) and takes their pieces out of
 * that list. Kinds that have no exact blocks are an error naming the tensor. */
Status parts_collect(PartsList *list, const StoredTensor **tensors, int *count);
void parts_free(PartsList *list);

/* The blocks of a whole weight, in file order, into t->size bytes. */
Status parts_read(const StoredTensor *t, void *blocks);

#endif
