/* loss.h - softcap and cross-entropy over the vocabulary, forward and backward in one pass. */
#ifndef LOSS_H
#define LOSS_H

#include "kernels/kernel.h"

/* logits <- cap * tanh(logits / cap); cap 0 leaves them.  logits (R, V) f32 */
KERNEL(softcap_forward, Tensor logits, float cap);

/* With c = cap * tanh(z / cap) (c = z when cap is 0):
 *   nll[r] = log(sum_v exp(c_v)) - c_target
 *   dlogits = weights[r] * (softmax(c) - onehot(target)) * (1 - (c / cap)^2)
 * everything in f32. Without dlogits logits is overwritten by c, with them by anything. A target of
 * -1 gives nll 0 and a zero row.
 *
 *   nll      (R)     f32
 *   dlogits  (R, V)  f32 | bf16; absent means forward only
 *   logits   (R, V)  f32
 *   targets  (R)     i32
 *   weights  (R)     f32: the derivative of the loss by each nll; may be absent without dlogits */
KERNEL(cross_entropy, Tensor nll, Tensor dlogits, Tensor logits, Tensor targets, Tensor weights,
       float cap);

#endif
