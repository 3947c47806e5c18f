/* tensor.h - a Tensor is a small view of memory that someone else owns; copying it copies no data.
 */
#ifndef TENSOR_H
#define TENSOR_H

#include "kernels/device.h"

#include <stdint.h>

typedef enum DType { F32, BF16, I32, U8, F16, DTYPE_COUNT } DType;

/* What a kernel does with what its output already holds. */
typedef enum Write { SET, ADD } Write;

typedef struct Tensor {
    void *data;     /* NULL: absent, not placed yet, or only measured */
    Device *device; /* NULL: absent (an optional argument) */
    DType dtype;
    int ndim;
    int64_t shape[4]; /* row-major, outermost first, always contiguous */
} Tensor;

static inline size_t dtype_size(DType dtype) {
    static const uint8_t sizes[DTYPE_COUNT] = {4, 2, 4, 1, 2};
    return sizes[dtype];
}

const char *dtype_name(DType dtype);

static inline int64_t tensor_count(Tensor t) {
    int64_t count = 1;
    for (int i = 0; i < t.ndim; i++) count *= t.shape[i];
    return count;
}

/* The last dimension, and how many rows of it there are. */
static inline int64_t tensor_cols(Tensor t) {
    return t.ndim ? t.shape[t.ndim - 1] : 1;
}
static inline int64_t tensor_rows(Tensor t) {
    int64_t rows = 1;
    for (int i = 0; i + 1 < t.ndim; i++) rows *= t.shape[i];
    return rows;
}
static inline size_t tensor_bytes(Tensor t) {
    return (size_t)tensor_count(t) * dtype_size(t.dtype);
}

static inline Tensor tensor_absent(void) {
    return (Tensor){0};
}
static inline bool tensor_present(Tensor t) {
    return t.device != NULL;
}

/* A view over memory the caller owns, on the CPU. */
Tensor tensor_make(void *data, DType dtype, int ndim, const int64_t *shape);

#define TENSOR(data, dtype, ...)                                                                   \
    tensor_make(data, dtype, (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)),            \
                (const int64_t[]){__VA_ARGS__})

/* The same data under another shape of equal count. */
Tensor tensor_reshape(Tensor t, int ndim, const int64_t *shape);
#define RESHAPE(tensor, ...)                                                                       \
    tensor_reshape(tensor, (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)),              \
                   (const int64_t[]){__VA_ARGS__})

/* `count` entries of the outermost dimension from `first` on. An absent tensor stays absent. */
Tensor tensor_slice(Tensor t, int64_t first, int64_t count);

/* The inner tensor at `index` of the outermost dimension. */
Tensor tensor_at(Tensor t, int64_t index);

/* "(512, 1536) bf16", in a buffer of this thread that the next four calls leave alone. */
const char *tensor_text(Tensor t);

static inline float bf16_to_f32(uint16_t bits) {
    union {
        uint32_t u;
        float f;
    } value = {(uint32_t)bits << 16};
    return value.f;
}

/* Round to nearest, ties to even; NaN stays NaN. */
static inline uint16_t f32_to_bf16(float value) {
    union {
        float f;
        uint32_t u;
    } bits = {value};
    if ((bits.u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits.u >> 16 | 0x40);
    return (uint16_t)((bits.u + 0x7fff + (bits.u >> 16 & 1)) >> 16);
}

#endif
