/* soft_cache.c - a list: a model looks at thousands of items at most, and each is worth seconds. */
#include "model/soft_cache.h"

#include <stdlib.h>

bool soft_cache_find(SoftCache *c, uint64_t key, Tensor soft) {
    for (int64_t i = 0; i < c->count; i++) {
        SoftEntry *e = &c->entries[i];
        if (e->key != key || e->soft.dtype != soft.dtype ||
            tensor_count(e->soft) != tensor_count(soft))
            continue;
        e->used = ++c->clock;
        tensor_copy(soft, e->soft);
        return true;
    }
    return false;
}

static void drop(SoftCache *c, int64_t i) {
    Tensor soft = c->entries[i].soft;
    c->bytes -= tensor_bytes(soft);
    device_release(soft.device, soft.data, tensor_bytes(soft));
    c->entries[i] = c->entries[--c->count];
}

static void drop_oldest(SoftCache *c) {
    int64_t oldest = 0;
    for (int64_t i = 1; i < c->count; i++)
        if (c->entries[i].used < c->entries[oldest].used) oldest = i;
    drop(c, oldest);
}

void soft_cache_keep(SoftCache *c, uint64_t key, Tensor soft) {
    size_t bytes = tensor_bytes(soft);
    if (bytes > c->most) return;
    while (c->bytes + bytes > c->most) drop_oldest(c);
    Tensor copy = soft;
    copy.data = device_allocate(soft.device, bytes);
    if (!copy.data) return; /* it is made again next time */
    tensor_copy(copy, soft);
    if (c->count == c->capacity) {
        c->capacity = c->capacity ? 2 * c->capacity : 64;
        c->entries = must_realloc(c->entries, (size_t)c->capacity * sizeof *c->entries);
    }
    c->entries[c->count++] = (SoftEntry){key, ++c->clock, copy};
    c->bytes += bytes;
}

void soft_cache_free(SoftCache *c) {
    while (c->count) drop(c, c->count - 1);
    free(c->entries);
    *c = (SoftCache){0};
}
