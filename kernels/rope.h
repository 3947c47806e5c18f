/* rope.h - rotary position embedding, half-split pairs: dimension i turns with i + C/2. */
#ifndef ROPE_H
#define ROPE_H

#include "kernels/kernel.h"

/* cos, sin of position * w_i, w_i = theta^(-2i/C) / factor for i < rotated and 0 beyond (identity).
 *   cos, sin   (N, C/2)  f32
 *   positions  (N)       i32 */
KERNEL(rope_table, Tensor cos, Tensor sin, Tensor positions, float theta, int64_t rotated,
       float factor);

/* y_i = x_i cos - x_{i+C/2} sin;  y_{i+C/2} = x_{i+C/2} cos + x_i sin, in f32, rounded once.
 *   y, x      (N, heads, C)  f32 | bf16; y may alias x
 *   cos, sin  (N, C/2)       f32; or (N, A, C/2A): heads are cut in A runs of C/A, each of which
 *                            turns alone, one for each axis of a picture */
KERNEL(rope_forward, Tensor y, Tensor x, Tensor cos, Tensor sin);

/* The transposed rotation: dx from dy. dx may alias dy; dy may be f32 where dx is bf16. */
KERNEL(rope_backward, Tensor dx, Tensor dy, Tensor cos, Tensor sin);

#endif
