/* norm.h - root-mean-square normalisation, with and without a weight, alone or onto a residual. */
#ifndef NORM_H
#define NORM_H

#include "kernels/kernel.h"

/* y = residual + x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps); plain weight, not 1 + weight.
 * Mean, product and sum in f32; as in the reference the product is rounded to x's dtype before the
 * residual is added.
 *   y, x      (..., D)  f32 | bf16, same dtype; y may alias x or residual
 *   rstd      (rows)    f32, kept for the backward pass; absent means not kept
 *   weight    (D)       f32 | bf16; absent means ones
 *   residual  (..., D)  dtype of x; absent means zeros */
KERNEL(rmsnorm_forward, Tensor y, Tensor rstd, Tensor x, Tensor weight, Tensor residual, float eps);

/* y = x * rstd * weight again from the kept rstd: what rmsnorm_forward wrote, bit for bit. */
KERNEL(rmsnorm_apply, Tensor y, Tensor rstd, Tensor x, Tensor weight);

/* With g = dy * weight: dx (=|+=) rstd * (g - x * rstd^2 * mean(g * x)); dweight += sum over rows
 * of dy * x * rstd, in a fixed order. dx       (..., D)  dtype of dy; may alias dy; absent means
 * not needed dweight  (D)       f32; absent means frozen */
KERNEL(rmsnorm_backward, Tensor dx, Write write, Tensor dweight, Tensor dy, Tensor x, Tensor rstd,
       Tensor weight);

#endif
