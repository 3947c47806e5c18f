/* reading.c - the best of each row, and the few other numbers that are asked for. */
#include "infer/reading.h"
#include "kernels/sampling.h"

#include <stdlib.h>
#include <string.h>

void reading_memory_init(ReadingMemory *m, int64_t vocab) {
    m->values = must_malloc(HEAD_ROWS * CANDIDATES_MAX * sizeof *m->values);
    m->ids = must_malloc(HEAD_ROWS * CANDIDATES_MAX * sizeof *m->ids);
    m->lse = must_malloc(2 * HEAD_ROWS * sizeof *m->lse);
    m->asked = must_malloc(HEAD_ROWS * sizeof *m->asked);
    m->row = must_malloc((size_t)vocab * sizeof *m->row);
}

void reading_memory_free(ReadingMemory *m) {
    free(m->values);
    free(m->ids);
    free(m->lse);
    free(m->asked);
    free(m->row);
    *m = (ReadingMemory){0};
}

void reading_reserve(Reading *r, ReadingMemory *memory, Arena *arena, int64_t n, int64_t k,
                     int64_t vocab) {
    CHECK(n <= HEAD_ROWS && k <= CANDIDATES_MAX, "a reading of %d rows, %d best", (int)n, (int)k);
    *r = (Reading){.z = ARENA_TENSOR(arena, F32, n, vocab),
                   .values = ARENA_TENSOR(arena, F32, n, k),
                   .ids = ARENA_TENSOR(arena, I32, n, k),
                   .lse = ARENA_TENSOR(arena, F32, n, 2),
                   .scale = ARENA_TENSOR(arena, F32, n),
                   .next = ARENA_TENSOR(arena, I32, n),
                   .asked = ARENA_TENSOR(arena, F32, n),
                   .changed = ARENA_TENSOR(arena, F32, 1, vocab),
                   .memory = memory};
}

void reading_read(Reading *r, const float *scale, const int32_t *next) {
    tensor_write(r->scale, scale);
    tensor_write(r->next, next);
    top_logits(r->values, r->ids, r->lse, r->z, r->scale);
    pick_columns(r->asked, r->z, r->next);
    r->host_values = tensor_host(r->values, r->memory->values);
    r->host_ids = tensor_host(r->ids, r->memory->ids);
    r->host_lse = tensor_host(r->lse, r->memory->lse);
    r->host_asked = tensor_host(r->asked, r->memory->asked);
}

static Tensor row_of(const Reading *r, int64_t i) {
    return tensor_slice(r->z, i, 1);
}

float reading_logit(const Reading *r, int64_t i, int32_t id) {
    float value;
    tensor_read(&value, tensor_slice(RESHAPE(row_of(r, i), tensor_cols(r->z)), id, 1));
    return value;
}

Candidates reading_candidates(const Reading *r, int64_t i) {
    int64_t k = tensor_cols(r->values);
    return (Candidates){.logits = row_of(r, i),
                        .buffer = r->memory->row,
                        .values = r->host_values + i * k,
                        .ids = r->host_ids + i * k,
                        .count = k,
                        .lse = r->host_lse[2 * i + 1]};
}

float *reading_edit(Reading *r, int64_t i) {
    bool here = r->changed.device->kind == DEVICE_CPU;
    float *row = here ? r->changed.data : r->memory->row;
    tensor_read(row, row_of(r, i));
    return row;
}

void reading_changed(Reading *r, Candidates *c, int64_t i) {
    int64_t k = tensor_cols(r->values);
    Tensor values = tensor_slice(r->values, i, 1), ids = tensor_slice(r->ids, i, 1),
           lse = tensor_slice(r->lse, i, 1);
    if (r->changed.device->kind != DEVICE_CPU) tensor_write(r->changed, r->memory->row);
    top_logits(values, ids, lse, r->changed, tensor_slice(r->scale, i, 1));
    c->logits = r->changed;
    c->values = tensor_host(values, r->memory->values + i * k);
    c->ids = tensor_host(ids, r->memory->ids + i * k);
    const float *sums = tensor_host(lse, r->memory->lse + 2 * i);
    c->lse = sums[1];
}
