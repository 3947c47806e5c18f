/* onednn.h - dense products through oneDNN, primitives made once per shape. */
#ifndef ONEDNN_H
#define ONEDNN_H

#include "kernels/matmul.h"

/* y (=|+=) a b; a and b of one dtype (bf16 only where cpu_has_bf16_products()); rows of y are
 * `stride` elements apart. One call at a time. */
void onednn_product(Layout layout, Tensor y, int64_t stride, Write write, Tensor a, Tensor b);

#endif
