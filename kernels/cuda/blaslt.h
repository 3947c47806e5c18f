/* blaslt.h - dense products through cuBLASLt, which is opened when first needed. */
#ifndef CUDA_BLASLT_H
#define CUDA_BLASLT_H

#include "kernels/cuda/cuda.h"

extern "C" {
#include "kernels/matmul.h"
}

/* y (M, N) (=|+=) alpha a b in the layout named; a and b of one dtype, f32 or bf16, y f32 or bf16;
 * rows of y and of a lie y_stride and a_stride elements apart. A product that is asked for again
 * takes the plan of the first time. */
void blaslt_matmul(const Device *device, Layout layout, void *y, DType y_dtype, int64_t y_stride,
                   Write write, const void *a, int64_t a_stride, const void *b, DType dtype,
                   int64_t M, int64_t N, int64_t K, float alpha);

#endif
