/* update.h - optimizer updates over flat spaces of f32. */
#ifndef UPDATE_H
#define UPDATE_H

#include "kernels/kernel.h"

/* A value in bf16 has no master copy in f32: the new value is rounded to one of its two neighbours
 * by the random numbers of stream `key`, so that small updates are not lost on average (Gupta et
 * al. 2015). A value in f32 has no use for the key. */

/* Decoupled-decay Adam (Loshchilov and Hutter 2019) as torch.optim.AdamW computes it:
 *   value *= 1 - lr * decay;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
 *   value -= lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)
 * g is grad * scale (the clipping factor).
 *   value        (n) f32 | bf16
 *   grad         (n) f32
 *   m, v         (blocks, 256), n elements and padding: f32, or DYNAMIC8 and DYNAMIC8_UNSIGNED
 *                (Dettmers et al. 2022): computed in f32, stored as the nearest levels, but a v
 * that is not zero never becomes zero */
KERNEL(adamw_update, Tensor value, Tensor grad, Tensor m, Tensor v, float scale, float lr,
       float beta1, float beta2, float eps, float decay, int64_t t, uint64_t key);

/* Stochastic gradient descent with momentum as torch.optim.SGD computes it:
 *   g = grad * scale + decay * value;  buffer = t == 1 ? g : momentum * buffer + g
 *   value -= lr * buffer
 *   buffer  (blocks, 256) f32 or DYNAMIC8; absent when momentum is 0 */
KERNEL(sgd_update, Tensor value, Tensor grad, Tensor buffer, float scale, float lr, float momentum,
       float decay, int64_t t, uint64_t key);

/* *sum = sum of x^2 in f64, in an order that does not depend on the thread count.  x (n) f32 */
KERNEL(sum_of_squares, double *sum, Tensor x);

#endif
