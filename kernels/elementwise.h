/* elementwise.h - copies, sums, gathers and masks: memory moved once, nothing else. */
#ifndef ELEMENTWISE_H
#define ELEMENTWISE_H

#include "kernels/kernel.h"

/* y (=|+=) alpha * x, converting between f32, bf16 and f16 (f16 only as x).  y may alias x. */
KERNEL(scale_copy, Tensor y, Write write, Tensor x, float alpha);

/* y = value everywhere.   y f32 | bf16 */
KERNEL(fill, Tensor y, float value);

/* y[i] = factor * normal number i of stream `key` (random.h).   y f32 | bf16 */
KERNEL(fill_normal, Tensor y, uint64_t key, float factor);

/* y = alpha * (a + b), a + b rounded to the dtype before the factor as the reference does.
 *   y, a, b  f32 | bf16, one dtype; y may alias a or b */
KERNEL(add_scaled, Tensor y, Tensor a, Tensor b, float alpha);

/* y[m] = x[rows[m]]; rows -1 gives zeros.   y (M, D), x (N, D) one dtype, rows (M) i32 */
KERNEL(gather_rows, Tensor y, Tensor x, Tensor rows);

/* The same where each row goes to several places: y[slot[n,k]] = x[n]; rows of y whose source is -1
 * become zeros, the source of the others is n.   y (M, D), x (N, D) one dtype, slot (N, A) i32,
 * source (M) i32 */
KERNEL(spread_rows, Tensor y, Tensor x, Tensor slot, Tensor source);

/* y (=|+=) 0 except y[rows[m]] (=|+=) x[m]; rows are distinct, -1 is skipped. With SET rows not
 * named become zero.   y (N, D), x (M, D) one dtype */
KERNEL(scatter_rows, Tensor y, Write write, Tensor x, Tensor rows);

/* y[n] = sum over k of x[slot[n,k]], in f32 in order of k.   y (N, D), x (M, D) one dtype, slot
 * (N, A) i32 */
KERNEL(gather_sums, Tensor y, Tensor x, Tensor slot);

/* y = x * mask / (1 - p), mask[i] = uniform(key, i) >= p.   y may alias x */
KERNEL(dropout, Tensor y, Tensor x, float p, uint64_t key);

/* y[., o] (=|+=) alpha * (x[., o] * weight[o]), the product rounded to x's dtype before the factor,
 * unless that is 1.   y, x (N, D), weight (D) f32 | bf16 */
KERNEL(scale_columns, Tensor y, Write write, Tensor x, Tensor weight, float alpha);

/* y[., o] = x[., o] + shift[o].   y, x (N, D) one dtype; shift (D) f32 | bf16; y may alias x */
KERNEL(shift_columns, Tensor y, Tensor x, Tensor shift);

/* y[n] = x[n] * weight[n].   y, x (N, D), weight (N) f32; y may alias x */
KERNEL(scale_rows, Tensor y, Tensor x, Tensor weight);

/* y[o] += sum over rows of a[., o] * b[., o], in order of rows; b absent means ones.
 *   y (D) f32; a, b (N, D) */
KERNEL(dot_columns, Tensor y, Tensor a, Tensor b);

/* y[n] = |x[n]|, the Euclidean norm of each row.   y (N) f32; x (N, D) f32 */
KERNEL(row_norms, Tensor y, Tensor x);

/* y (=|+=) a / b, 0 where b is 0.   y, a, b f32 of one shape */
KERNEL(quotient, Tensor y, Write write, Tensor a, Tensor b);

/* y[j,i] = x[i,j].   y (J, I, D), x (I, J, D) one dtype, not packed */
KERNEL(swap_outer, Tensor y, Tensor x);

#endif
