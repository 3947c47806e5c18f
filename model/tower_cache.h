/* tower_cache.h - what towers made of items before, by the items' keys: where nothing trains them
 * they make the same again. Bounded; what was used longest ago goes first. */
#ifndef TOWER_CACHE_H
#define TOWER_CACHE_H

#include "kernels/tensor.h"

typedef struct TowerEntry {
    uint64_t key, used;
    Tensor out; /* (soft tokens, width of the projection's input) */
} TowerEntry;

typedef struct TowerCache {
    TowerEntry *entries;
    int64_t count, capacity;
    size_t bytes, most; /* taken, and allowed: 0 keeps nothing */
    uint64_t clock;
} TowerCache;

/* Fills `out` with what was kept under the key; false where nothing of its shape was. */
bool tower_cache_find(TowerCache *c, uint64_t key, Tensor out);

/* Keeps a copy on the same device; does nothing where it does not fit. */
void tower_cache_keep(TowerCache *c, uint64_t key, Tensor out);
void tower_cache_free(TowerCache *c);

#endif
