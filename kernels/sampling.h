/* sampling.h - the best of a row of logits: what choosing a token starts from. */
#ifndef SAMPLING_KERNEL_H
#define SAMPLING_KERNEL_H

#include "kernels/kernel.h"

/* The k best of each row, larger first and the lower id first among equals, and what turns logits
 * into probabilities.
 *   values, ids  (N, k)  f32, i32; k <= V
 *   lse          (N, 2)  f32: log of the sum of exp(z), and of exp(z * scale[n]), over the row
 *   logits       (N, V)  f32; -inf: never
 *   scale        (N)     f32 */
KERNEL(top_logits, Tensor values, Tensor ids, Tensor lse, Tensor logits, Tensor scale);

/* y[n] = x[n, columns[n]]; column -1 gives 0.   y (N) f32, x (N, V) f32, columns (N) i32 */
KERNEL(pick_columns, Tensor y, Tensor x, Tensor columns);

#endif
