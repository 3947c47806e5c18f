/* reading.h - what is read of the logits of a few rows, wherever they are computed. */
#ifndef READING_H
#define READING_H

#include "infer/sampler.h"

/* Rows of logits made at a time: (64, 262144) f32 is 67 MB. */
#define HEAD_ROWS 64

/* Host memory for what is read; made once. */
typedef struct ReadingMemory {
    char *best; /* values, ids, lse and asked of all rows, as they lie in the arena */
    float *row; /* (V) */
} ReadingMemory;

typedef struct Reading {
    Tensor z, values, ids, lse, scale; /* (n, V), (n, k), (n, k), (n, 2), (n): see top_logits */
    Tensor next, asked;                /* (n) i32, (n) f32: a token asked about, and its logit */
    Tensor changed;                    /* (1, V) */
    ReadingMemory *memory;
    int64_t edited; /* the row that reading_edit took last; -1: none */
    const float *host_values, *host_lse, *host_asked; /* the same on the host, once read */
    const int32_t *host_ids;
} Reading;

void reading_memory_init(ReadingMemory *m, int64_t vocab);
void reading_memory_free(ReadingMemory *m);

/* Places n rows whose k best are wanted; also run measuring. */
void reading_reserve(Reading *r, ReadingMemory *memory, Arena *arena, int64_t n, int64_t k,
                     int64_t vocab);

/* Reads the rows of r->z. scale (n): 1 / temperature; next (n): a token asked about in each row, -1
 * where there is none. */
void reading_read(Reading *r, const float *scale, const int32_t *next);

/* The logit of a token in row i. */
float reading_logit(const Reading *r, int64_t i, int32_t id);

/* Row i as the sampler takes it. */
Candidates reading_candidates(const Reading *r, int64_t i);

/* A copy of row i on the host, to be changed; then reading_changed looks for its best again, which
 * takes the place of those in c. */
float *reading_edit(Reading *r, int64_t i);
void reading_changed(Reading *r, Candidates *c, int64_t i);

#endif
