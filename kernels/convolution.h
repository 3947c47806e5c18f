/* convolution.h - what the towers do over neighbours: the unfolding that makes a convolution a
 * product, the depthwise one, and means over runs of rows. */
#ifndef CONVOLUTION_H
#define CONVOLUTION_H

#include "kernels/kernel.h"

/* The neighbourhoods of a 3 x 3 convolution with stride 2 and a border of one zero:
 * y[t,f,9d+3i+j] = x[2t+i-1,2f+j-1,d], so that a product with a weight (out, D, 3, 3) is it.
 *   y  ((T+1)/2, (F+1)/2, 9 D)  x  (T, F, D)  one dtype, f32 | bf16 */
KERNEL(unfold_forward, Tensor y, Tensor x);

/* dx = the sum of what each element went to. */
KERNEL(unfold_backward, Tensor dx, Tensor dy);

/* y[t,d] = sum over j of weight[d,j] * x[t+j-(J-1),d], zeros before the first row.
 *   y, x    (T, D)  f32 | bf16, one dtype; y may not alias x
 *   weight  (D, J)  f32 | bf16, J <= 16 */
KERNEL(depthwise_forward, Tensor y, Tensor x, Tensor weight);

/* dx from dy, dweight added to, in order of rows.   dweight (D, J) f32; absent means frozen */
KERNEL(depthwise_backward, Tensor dx, Tensor dweight, Tensor dy, Tensor x, Tensor weight);

/* y[m] = alpha * mean of x[km] .. x[km+k-1], k = rows of x / rows of y; the mean is rounded to x's
 * dtype as the reference does.   y (M, D) f32; x (kM, D) f32 | bf16 */
KERNEL(pool_rows_forward, Tensor y, Tensor x, float alpha);

/* dx[km+i] = alpha / k * dy[m].   dx (kM, D) f32 | bf16; dy (M, D) f32 */
KERNEL(pool_rows_backward, Tensor dx, Tensor dy, float alpha);

/* y[n] = (x[n] - shift) * scale, columns by columns.
 *   y  (N, D) f32 | bf16; x (N, D) f32; may be one   shift, scale  (D) f32 | bf16 */
KERNEL(standardize, Tensor y, Tensor x, Tensor shift, Tensor scale);

#endif
