/* attention.h - where keys lie, and what the attention kernels of both kinds share. */
#ifndef CUDA_ATTENTION_H
#define CUDA_ATTENTION_H

#include "kernels/cuda/packed.h"

extern "C" {
#include "kernels/attention.h"
}

/* Queries (N, H, C) against keys (S, K, C); head h reads head h / (H / K). */
struct Heads {
    int64_t N, S;
    int H, K, C, group; /* group = H / K */
};

static inline Heads heads_of(Tensor q, Tensor k) {
    int H = (int)q.shape[1], K = (int)k.shape[1];
    return Heads{q.shape[0], k.shape[0], H, K, (int)q.shape[2], H / K};
}

/* The interval of keys each query sees, and the pages where they lie (NULL: in order). */
struct Sight {
    const int32_t *first, *last, *sequence, *pages;
    int64_t columns; /* pages of a sequence */
};

/* The row of k and v that key s of query n is. */
DEVICE_FUNCTION int64_t key_row(const Sight &see, int64_t n, int64_t s) {
    if (!see.pages) return s;
    int32_t page = see.pages[see.sequence[n] * see.columns + s / PAGE_KEYS];
    return (int64_t)page * PAGE_KEYS + s % PAGE_KEYS;
}

#endif
