/* norm.h - root-mean-square normalisation, with and without a weight, alone or onto a residual; and
 * layer normalisation. */
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

/* What comes next of y, as rmsnorm_forward makes it: norm(y) * weight.
 *   y       (..., D)  dtype of what it is made of; absent: nobody wants any of this
 *   rstd    (rows)    f32; absent means not kept
 *   weight  (D)       f32 | bf16
 *   codes   u8, of y (int8_codes); absent: nobody wants them */
typedef struct NextNorm {
    Tensor y, rstd, weight, codes;
} NextNorm;

/* A norm onto a residual and, where it is wanted, the norm of that:
 *   y = scale * (residual + norm(x) * weight), next.y = norm(y) * next.weight
 * bit for bit as rmsnorm_forward, scale_copy and rmsnorm_forward make them.
 *   y, x, residual  (..., D)  f32 | bf16, one dtype; y may alias residual
 *   rstd            (rows)    f32; absent means not kept
 *   weight          (D)       f32 | bf16 */
KERNEL(rmsnorm_pair, Tensor y, Tensor rstd, Tensor x, Tensor weight, Tensor residual, float scale,
       const NextNorm *next, float eps);

/* y = x * rstd * weight again from the kept rstd: what rmsnorm_forward wrote, bit for bit. */
KERNEL(rmsnorm_apply, Tensor y, Tensor rstd, Tensor x, Tensor weight);

/* With g = dy * weight: dx (=|+=) rstd * (g - x * rstd^2 * mean(g * x)); dweight += sum over rows
 * of dy * x * rstd, in a fixed order. dx       (..., D)  dtype of dy; may alias dy; absent means
 * not needed dweight  (D)       f32; absent means frozen */
KERNEL(rmsnorm_backward, Tensor dx, Write write, Tensor dweight, Tensor dy, Tensor x, Tensor rstd,
       Tensor weight);

/* A norm's weight; absent means ones. With a factor x * rstd is rounded, its product with the
 * weight is, and that is multiplied by it: as scale_columns makes it. */
typedef struct NormWeight {
    Tensor weight;
    float factor; /* 0: none */
} NormWeight;

/* Several norms of one x, which differ in their weights: y[i] = x * rstd * weight[i], bit for bit
 * as rmsnorm_forward makes each.   count <= NORMS_MOST */
#define NORMS_MOST 3
KERNEL(rmsnorm_forward_several, const Tensor *y, Tensor rstd, Tensor x, const NormWeight *weight,
       int count, float eps);

/* Their way back into one gradient, which is that of rmsnorm_backward with g = sum of dy[i] *
 * weight[i]. */
KERNEL(rmsnorm_backward_several, Tensor dx, Write write, const Tensor *dy, Tensor x, Tensor rstd,
       const NormWeight *weight, int count);

/* Where two branches join: fed = norm(x[0]) * weight[0] + norm(x[1]) * weight[1], which is
 * normalised in turn.
 *   x       (..., D)   f32 | bf16, one dtype
 *   weight  (D)        f32 | bf16, one dtype: of the branches and of fed
 *   rstd    (3, rows)  f32, of the branches and of fed, for the way back; absent means not kept */
typedef struct NormJoin {
    Tensor x[2], weight[3], rstd;
} NormJoin;

/* As rmsnorm_pair, of branches: y = scale * (residual + norm(fed) * weight[2]), next.y = norm(y) *
 * next.weight, bit for bit as rmsnorm_forward and scale_copy make them one by one; fed is kept
 * nowhere.   y, residual  (..., D)  dtype of x; y may alias residual */
KERNEL(rmsnorm_join, Tensor y, const NormJoin *join, Tensor residual, float scale,
       const NextNorm *next, float eps);

/* dresidual = scale * dy; dx[i] the gradients of the branches, as scale_copy and rmsnorm_backward
 * make them one by one.
 *   dx, dresidual, dy  (..., D)  dtype of x; dresidual may alias dy
 *   fed, dfed          (..., D)  written where given (for the gradients of weights), else absent */
KERNEL(rmsnorm_join_backward, const Tensor *dx, Tensor dresidual, Tensor fed, Tensor dfed,
       Tensor dy, const NormJoin *join, float scale);

/* y = (x - mean) * rstd * weight + bias, mean and rstd = 1 / sqrt(variance + eps) over the columns
 * (biased variance), in f32.
 *   y, x          (..., D)  f32 | bf16, same dtype; y may not alias x
 *   mean, rstd    (rows)    f32, kept for the backward pass
 *   weight, bias  (D)       f32 | bf16; bias absent means zeros */
KERNEL(layernorm_forward, Tensor y, Tensor mean, Tensor rstd, Tensor x, Tensor weight, Tensor bias,
       float eps);

/* With g = dy * weight and n = (x - mean) * rstd: dx = rstd * (g - mean(g) - n * mean(g * n));
 * dweight += sum over rows of dy * n, dbias += sum over rows of dy, in a fixed order.
 *   dx              (..., D)  dtype of dy; may alias dy; absent means not needed
 *   dweight, dbias  (D)       f32; absent means frozen */
KERNEL(layernorm_backward, Tensor dx, Tensor dweight, Tensor dbias, Tensor dy, Tensor x,
       Tensor mean, Tensor rstd, Tensor weight);

#endif
