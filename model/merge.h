/* merge.h - the weights a model computes with: its adapters folded in, a few rows at a time. */
#ifndef MERGE_H
#define MERGE_H

#include "model/gemma.h"

/* Rows first .. first + count - 1 of a parameter seen as a matrix (all leading dimensions
 * flattened; a vector is one row) as f32 (count, cols), with the adapter of its linear, if any,
 * merged in. A bf16 parameter under training gives its f32 master. */
void merged_rows(const Gemma *g, const Param *p, int64_t first, int64_t count, float *out);

/* The learned factors of the Q4_0 scales of those rows, (count, cols / 32); absent: none. */
Tensor merged_factors(const Gemma *g, const Param *p, int64_t first, int64_t count);

#endif
