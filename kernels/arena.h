/* arena.h - memory with one owner: a block, and a place in it.
 *
 * An arena without a base only measures: code that places tensors runs once measuring and once
 * placing, so that the sum is known, exactly, before anything is taken. */
#ifndef ARENA_H
#define ARENA_H

#include "kernels/tensor.h"

typedef struct Arena {
    Device *device;
    char *base;      /* NULL: only measures */
    size_t used;     /* bytes placed now */
    size_t peak;     /* the most `used` has been */
    size_t capacity; /* bytes of base */
} Arena;

/* A measuring arena: its tensors live on device_measure(). */
Arena arena_measure(void);

/* Takes what a measuring run found; ERR_IO naming `what` when the memory is not there. */
Status arena_init(Arena *arena, Device *device, size_t bytes, const char *what);
void arena_free(Arena *arena);

/* Places a tensor, 64-byte aligned. In a measuring arena its data stays NULL. */
Tensor arena_tensor(Arena *arena, DType dtype, int ndim, const int64_t *shape);
#define ARENA_TENSOR(arena, dtype, ...)                                                            \
    arena_tensor(arena, dtype, (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)),          \
                 (const int64_t[]){__VA_ARGS__})

/* A tensor of the same dtype and shape. */
Tensor arena_like(Arena *arena, Tensor t);

/* Temporaries live between a mark and its release, in one function. */
static inline size_t arena_mark(const Arena *arena) {
    return arena->used;
}
static inline void arena_release(Arena *arena, size_t mark) {
    arena->used = mark;
}

#endif
