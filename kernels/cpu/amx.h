/* amx.h - dense products of bf16 by the tiles of Intel's AMX, at the level that has them. */
#ifndef AMX_H
#define AMX_H

#include "kernels/cpu/cpu.h"
#include "kernels/matmul.h"

/* y (=|+=) a b: a bf16, b bf16 or packed (not in TN), y bf16 | f32; K at least 1. Every element is
 * one sum in order of K that knows nothing of the other rows: fewer rows change no bit of the rest.
 */
void CPU(amx_product)(Layout layout, Tensor y, Write write, Tensor a, Tensor b);

#endif
