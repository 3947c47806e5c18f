/* activation.h - GELU (tanh form), alone in a gate: y = gelu(gate) * up. */
#ifndef ACTIVATION_H
#define ACTIVATION_H

#include "kernels/kernel.h"

/* y = gelu(gate) * up, gelu(x) = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), in f32; gelu is
 * rounded to the dtype before the product, as the reference does. y, gate, up  same shape and
 * dtype, f32 | bf16; y may alias gate or up */
KERNEL(gelu_mul_forward, Tensor y, Tensor gate, Tensor up);

/* dgate = dy * up * gelu'(gate), dup = dy * gelu(gate).
 *   dup may alias dy, dgate may alias gate. dup absent: not needed. */
KERNEL(gelu_mul_backward, Tensor dgate, Tensor dup, Tensor dy, Tensor gate, Tensor up);

/* The same where each row of `both` (M, 2 F) holds gate, then up.   y (M, F) */
KERNEL(gelu_mul_joined_forward, Tensor y, Tensor both);

/* dboth (M, 2 F) from dy (M, F); may not alias. */
KERNEL(gelu_mul_joined_backward, Tensor dboth, Tensor dy, Tensor both);

#endif
