/* tower_cache.c - a list: a model looks at thousands of items at most, and each is worth seconds.
 */
#include "model/tower_cache.h"

#include <stdlib.h>

bool tower_cache_find(TowerCache *c, uint64_t key, Tensor out) {
    for (int64_t i = 0; i < c->count; i++) {
        TowerEntry *e = &c->entries[i];
        if (e->key != key || e->out.dtype != out.dtype || tensor_count(e->out) != tensor_count(out))
            continue;
        e->used = ++c->clock;
        tensor_copy(out, e->out);
        return true;
    }
    return false;
}

static void drop(TowerCache *c, int64_t i) {
    Tensor out = c->entries[i].out;
    c->bytes -= tensor_bytes(out);
    device_release(out.device, out.data, tensor_bytes(out));
    c->entries[i] = c->entries[--c->count];
}

static void drop_oldest(TowerCache *c) {
    int64_t oldest = 0;
    for (int64_t i = 1; i < c->count; i++)
        if (c->entries[i].used < c->entries[oldest].used) oldest = i;
    drop(c, oldest);
}

void tower_cache_keep(TowerCache *c, uint64_t key, Tensor out) {
    size_t bytes = tensor_bytes(out);
    if (bytes > c->most) return;
    while (c->bytes + bytes > c->most) drop_oldest(c);
    Tensor copy = out;
    copy.data = device_allocate(out.device, bytes);
    if (!copy.data) return; /* it is made again next time */
    tensor_copy(copy, out);
    if (c->count == c->capacity) {
        c->capacity = c->capacity ? 2 * c->capacity : 64;
        c->entries = must_realloc(c->entries, (size_t)c->capacity * sizeof *c->entries);
    }
    c->entries[c->count++] = (TowerEntry){key, ++c->clock, copy};
    c->bytes += bytes;
}

void tower_cache_free(TowerCache *c) {
    while (c->count) drop(c, c->count - 1);
    free(c->entries);
    *c = (TowerCache){0};
}
