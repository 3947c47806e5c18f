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

/* What the host makes for a pass: tensors placed between staging_begin and staging_end lie in one
 * run. `staged` is where to write one of them, staging_send moves the run to the device at once; on
 * the CPU the tensors themselves are written. */
typedef struct Staging {
    Arena *arena;
    size_t begin, end; /* the run in the arena */
    char *host;        /* NULL: only measured */
} Staging;

void staging_begin(Staging *s, Arena *arena);
void staging_end(Staging *s);
void *staged(const Staging *s, Tensor t); /* NULL when the tensor is absent, or only measured */
void staging_send(const Staging *s);

/* Temporaries live between a mark and its release, in one function. */
static inline size_t arena_mark(const Arena *arena) {
    return arena->used;
}
static inline void arena_release(Arena *arena, size_t mark) {
    arena->used = mark;
}

#endif
