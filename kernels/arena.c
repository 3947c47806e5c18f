/* arena.c - placing tensors one behind the other. */
#include "kernels/arena.h"

Arena arena_measure(void) {
    return (Arena){.device = device_measure()};
}

Status arena_init(Arena *arena, Device *device, size_t bytes, const char *what) {
    *arena = (Arena){.device = device, .capacity = bytes};
    if (!bytes) return OK;
    arena->base = device_allocate(device, bytes);
    if (!arena->base)
        FAIL(ERR_IO, "out of memory: %s needs %.2f GB, %.2f GB are available", what,
             (double)bytes / 1e9, (double)device_available(device) / 1e9);
    return OK;
}

void arena_free(Arena *arena) {
    device_release(arena->device, arena->base, arena->capacity);
    *arena = (Arena){0};
}

Tensor arena_tensor(Arena *arena, DType dtype, int ndim, const int64_t *shape) {
    Tensor t = tensor_make(NULL, dtype, ndim, shape);
    t.device = arena->device;
    size_t bytes = (tensor_bytes(t) + 63) / 64 * 64;
    if (arena->device->kind != DEVICE_MEASURE) {
        CHECK(arena->used + bytes <= arena->capacity, "arena of %zu bytes cannot place %s at %zu",
              arena->capacity, tensor_text(t), arena->used);
        t.data = arena->base + arena->used;
    }
    arena->used += bytes;
    if (arena->used > arena->peak) arena->peak = arena->used;
    return t;
}

void staging_begin(Staging *s, Arena *arena) {
    *s = (Staging){.arena = arena, .begin = arena->used};
}

void staging_end(Staging *s) {
    Device *device = s->arena->device;
    s->end = s->arena->used;
    if (device->kind == DEVICE_MEASURE || !s->arena->base) return;
    s->host = device_staging(device, s->end - s->begin);
    if (!s->host) s->host = s->arena->base + s->begin;
}

void *staged(const Staging *s, Tensor t) {
    return t.data ? s->host + ((char *)t.data - (s->arena->base + s->begin)) : NULL;
}

void staging_send(const Staging *s) {
    char *to = s->arena->base + s->begin;
    if (s->host && s->host != to) device_send(s->arena->device, to, s->host, s->end - s->begin);
}

Tensor arena_like(Arena *arena, Tensor t) {
    return arena_tensor(arena, t.dtype, t.ndim, t.shape);
}
