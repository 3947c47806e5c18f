/* embedding.h - rows of a table, scaled; and the way back. */
#ifndef EMBEDDING_H
#define EMBEDDING_H

#include "kernels/kernel.h"

/* y[n] = table[ids[n]] * scale, columns first_col .. first_col + D of the table, rounded once.
 *   y      (N, D)  f32 | bf16
 *   table  (V, W)  f32 | bf16 | f16; may lie in a mapped file, only the rows named are touched
 *   ids    (N)     i32 in [0, V) */
KERNEL(embedding_forward, Tensor y, Tensor table, int64_t first_col, Tensor ids, float scale);

/* dtable[ids[n]] += dy[n] * scale, in order of n for every element; id `skip` gets nothing (the
 * reference's padding row), -1 skips none.
 *   dtable  (V, W)  f32
 *   dy      (N, D)  f32 | bf16 */
KERNEL(embedding_backward, Tensor dtable, int64_t first_col, Tensor dy, Tensor ids, float scale,
       int32_t skip);

#endif
