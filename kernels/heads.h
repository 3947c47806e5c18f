/* heads.h - what happens between the projections and attention: heads are normalised, some turned,
 * and put where attention reads them. */
#ifndef HEADS_H
#define HEADS_H

#include "kernels/kernel.h"

#define HEAD_SETS 3 /* queries, keys, values */

/* Heads of one kind.
 *   y       (N, heads, C), or with `rows` (S, heads, C)   dtype of x
 *   x       (N, heads, C)   f32 | bf16; y may be x
 *   weight  (C)             f32 | bf16; absent means ones
 *   rows    (N)             i32 in [0, S), distinct: row n goes to y[rows[n]]; absent: to y[n]
 *   rstd    (N, heads)      f32, kept for the backward pass; absent: not kept */
typedef struct HeadSet {
    Tensor y, x, weight, rows, rstd;
    bool turns;
} HeadSet;

/* y = x rstd weight, rstd = 1 / sqrt(mean(x^2) + eps), rounded to the dtype, then turned as
 * rope_forward does where the set turns: bit for bit rmsnorm_forward, rope_forward and store_rows.
 *   cos, sin  (N, C/2)  f32 */
KERNEL(heads_forward, const HeadSet *sets, int count, Tensor cos, Tensor sin, float eps);

/* The way back of heads of one kind: through the turn, then the norm.
 *   dx      (N, heads, C)   dtype of x
 *   dy      (N, heads, C)   f32 | dtype of x; dx may be dy
 *   also    (N, heads, C)   f32: a gradient of x rstd itself, without weight and turn; absent: none
 *   x, weight, rstd, turns  as on the way forward; rstd present */
typedef struct HeadGradient {
    Tensor dx, dy, also, x, weight, rstd;
    bool turns;
} HeadGradient;

/* With g = weight * turned back dy + also: dx = rstd * (g - x * rstd^2 * mean(g * x)). */
KERNEL(heads_backward, const HeadGradient *sets, int count, Tensor cos, Tensor sin);

#endif
