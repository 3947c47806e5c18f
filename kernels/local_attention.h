/* local_attention.h - attention over the last few rows with relative positions and a soft cap: that
 * of the audio tower. */
#ifndef LOCAL_ATTENTION_H
#define LOCAL_ATTENTION_H

#include "kernels/kernel.h"

/* a[t,h,r] = q[t,h] . (k[t-r,h] + relative[r,h]) for r < W and r <= t;
 * p = softmax over r of cap * tanh(a / cap);  y[t,h] = sum over r of p[t,h,r] v[t-r,h].
 *   y, q, k, v  (T, H, C)     f32
 *   relative    (W, H, C)     f32, W <= 32
 *   kept        (2, T, H, W)  f32: p, and 1 - tanh^2(a / cap), for the backward pass */
KERNEL(local_attention_forward, Tensor y, Tensor kept, Tensor q, Tensor k, Tensor v,
       Tensor relative, float cap);

/* dq, dk, dv, drelative are set from dy.   scores (T, H, W) f32: scratch */
KERNEL(local_attention_backward, Tensor dq, Tensor dk, Tensor dv, Tensor drelative, Tensor scores,
       Tensor dy, Tensor kept, Tensor q, Tensor k, Tensor v, Tensor relative);

#endif
