/* soft_cache.h - soft tokens that were made before, by their item's key: towers that nothing trains
 * make the same ones again. Bounded; what was used longest ago goes first. */
#ifndef SOFT_CACHE_H
#define SOFT_CACHE_H

#include "kernels/tensor.h"

typedef struct SoftEntry {
    uint64_t key, used;
    Tensor soft; /* (count, D) */
} SoftEntry;

typedef struct SoftCache {
    SoftEntry *entries;
    int64_t count, capacity;
    size_t bytes, most; /* taken, and allowed: 0 keeps nothing */
    uint64_t clock;
} SoftCache;

/* Fills `soft` with what was kept under the key; false where nothing of its shape was. */
bool soft_cache_find(SoftCache *c, uint64_t key, Tensor soft);

/* Keeps a copy on the same device; does nothing where it does not fit. */
void soft_cache_keep(SoftCache *c, uint64_t key, Tensor soft);
void soft_cache_free(SoftCache *c);

#endif
