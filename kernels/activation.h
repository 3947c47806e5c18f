/* activation.h - gates and other functions of single elements. */
#ifndef ACTIVATION_H
#define ACTIVATION_H

#include "kernels/kernel.h"

/* y = gelu(gate) * up, gelu(x) = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), in f32; gelu is
 * rounded to the dtype before the product, as the reference does. y, gate, up  same shape and
 * dtype, f32 | bf16; y may alias gate or up */
KERNEL(gelu_mul_forward, Tensor y, Tensor gate, Tensor up);

/* The same, and its rounding for a product with packed weights.
 *   y, gate, up (M, F); codes u8 (int8_codes) */
KERNEL(gelu_mul_codes, Tensor y, Tensor codes, Tensor gate, Tensor up);

/* dgate = dy * up * gelu'(gate), dup = dy * gelu(gate), and once more y = gelu(gate) * up, bit for
 * bit gelu_mul_forward's.
 *   dup may alias dy, dgate may alias gate, y may not alias. dup, y absent: not needed. */
KERNEL(gelu_mul_backward, Tensor dgate, Tensor dup, Tensor y, Tensor dy, Tensor gate, Tensor up);

/* The same where each row of `both` (M, 2 F) holds gate, then up.   y (M, F) */
KERNEL(gelu_mul_joined_forward, Tensor y, Tensor both);

/* dboth (M, 2 F) of weights * y from its gradient dy (M, F), and dweights = <dy, y> of each row, y
 * as gelu_mul_joined_forward made it.   weights, dweights (M) f32; nothing may alias */
KERNEL(gelu_mul_joined_backward, Tensor dboth, Tensor dweights, Tensor dy, Tensor weights,
       Tensor both);

/* y = a * sigmoid(b) where each row of x (M, 2 F) holds a, then b.   y (M, F) dtype of x */
KERNEL(glu_forward, Tensor y, Tensor x);

/* dx (M, 2 F) from dy (M, F); may not alias. */
KERNEL(glu_backward, Tensor dx, Tensor dy, Tensor x);

typedef enum Activation {
    RELU,     /* max(x, 0) */
    SILU,     /* x sigmoid(x) */
    SOFTPLUS, /* ln(1 + e^x) */
} Activation;

/* y = f(x), in f32.   y, x  same size, f32 | bf16 each; y may alias x */
KERNEL(activation_forward, Tensor y, Tensor x, Activation f);

/* dx (=|+=) dy * f'(x).   dx, dy, x  same size, f32 | bf16, dy's dtype that of x; dx may alias dy
 */
KERNEL(activation_backward, Tensor dx, Write write, Tensor dy, Tensor x, Activation f);

/* y = min(max(x, low), high).   y, x  same size and dtype; y may alias x */
KERNEL(clamp_forward, Tensor y, Tensor x, float low, float high);

/* dx (=|+=) dy where low < x < high, else 0: x may be the clamped value as well, for what was
 * clamped lies at a bound.   dx, dy, x  same size and dtype; dx may alias dy or x */
KERNEL(clamp_backward, Tensor dx, Write write, Tensor dy, Tensor x, float low, float high);

#endif
