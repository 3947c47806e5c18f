/* tensor.h - a Tensor is a small view of memory that someone else owns; copying it copies no data.
 */
#ifndef TENSOR_H
#define TENSOR_H

#include "kernels/device.h"
#include "kernels/half.h"

#include <stdint.h>

/* Q4_0 to Q6_K are ggml's blocks in file order; NF4 those of bitsandbytes, NF4_NESTED with its
 * double quantisation. The tiled ones hold 16 rows side by side, the order products read them in
 * (blocks.h). DYNAMIC8 and DYNAMIC8_UNSIGNED hold an optimizer's states (dynamic.h). */
typedef enum DType {
    F32,
    BF16,
    I32,
    U8,
    F16,
    Q4_0,
    Q8_0,
    Q4_K,
    Q5_K,
    Q6_K,
    NF4,
    NF4_NESTED,
    Q4_0_TILED,
    Q8_0_TILED,
    DYNAMIC8,
    DYNAMIC8_UNSIGNED,
    DTYPE_COUNT
} DType;

/* What a kernel does with what its output already holds. */
typedef enum Write { SET, ADD } Write;

typedef struct Tensor {
    void *data;     /* NULL: absent, not placed yet, or only measured */
    Device *device; /* NULL: absent (an optional argument) */
    DType dtype;
    int ndim;
    int64_t shape[4]; /* row-major, outermost first, always contiguous */
    int64_t
        origin; /* NF4_NESTED: elements before this view; its blocks are too long to move data */
} Tensor;

/* Rows and columns that one tile of a tiled dtype covers. */
#define TILE_HEIGHT 16
#define TILE_WIDTH  64

/* Elements that share a scale in DYNAMIC8. */
#define DYNAMIC_BLOCK 256

/* A dtype stores `count` elements in `bytes`. */
typedef struct DTypeBlock {
    uint32_t count, bytes;
} DTypeBlock;

static inline DTypeBlock dtype_block(DType dtype) {
    switch (dtype) {
    case F32:
    case I32:
        return (DTypeBlock){1, 4};
    case BF16:
    case F16:
        return (DTypeBlock){1, 2};
    case U8:
        return (DTypeBlock){1, 1};
    case Q4_0:
    case Q4_0_TILED:
        return (DTypeBlock){32, 18};
    case Q8_0:
    case Q8_0_TILED:
        return (DTypeBlock){32, 34};
    case Q4_K:
        return (DTypeBlock){256, 144};
    case Q5_K:
        return (DTypeBlock){256, 176};
    case Q6_K:
        return (DTypeBlock){256, 210};
    case NF4:
        return (DTypeBlock){64, 36};
    case NF4_NESTED:
        return (DTypeBlock){16384, 8456};
    case DYNAMIC8:
    case DYNAMIC8_UNSIGNED:
        return (DTypeBlock){DYNAMIC_BLOCK, DYNAMIC_BLOCK + 4};
    default:
        return (DTypeBlock){0, 0};
    }
}

/* Bytes of one element; only of dtypes that are not packed. */
static inline size_t dtype_size(DType dtype) {
    return dtype_block(dtype).bytes;
}

/* Whether elements share blocks. */
static inline bool dtype_is_packed(DType dtype) {
    return dtype_block(dtype).count > 1;
}

static inline bool dtype_is_tiled(DType dtype) {
    return dtype == Q4_0_TILED || dtype == Q8_0_TILED;
}

/* Whether a (rows, cols) matrix can be stored in the dtype. */
bool dtype_fits(DType dtype, int64_t rows, int64_t cols);

/* The tiled order of Q4_0 and Q8_0, and back; other dtypes stay what they are. */
DType dtype_tiled(DType dtype);
DType dtype_untiled(DType dtype);

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
    DTypeBlock block = dtype_block(t.dtype);
    return ((size_t)tensor_count(t) + block.count - 1) / block.count * block.bytes;
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

/* All bytes of a tensor from and to host memory, and between tensors of equal bytes on any devices.
 * Nothing happens to what is only measured. */
void tensor_write(Tensor to, const void *from);
void tensor_read(void *to, Tensor from);
void tensor_copy(Tensor to, Tensor from);

/* The first element of a f32 or bf16 tensor. */
float tensor_first(Tensor t);

/* The bytes on the host: the tensor's own where they are there already, else read into buffer. */
const void *tensor_host(Tensor t, void *buffer);

/* A CPU tensor to make t's values in: t itself where that is on the CPU, else a twin in memory of
 * its own, which tensor_unstage sends (unless `failed`) and frees. ERR_IO: no memory. */
Status tensor_stage(Tensor *host, Tensor t);
void tensor_unstage(Tensor t, Tensor host, bool failed);

/* "(512, 1536) bf16", in a buffer of this thread that the next four calls leave alone. */
const char *tensor_text(Tensor t);

#endif
