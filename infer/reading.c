/* reading.c - the best of each row, and the few other numbers that are asked for. */
#include "infer/reading.h"
#include "kernels/sampling.h"

#include <stdlib.h>
#include <string.h>

/* Bytes from the first of the tensors read to the end of the last: an arena places them so. */
static size_t run_bytes(const Reading *r) {
    return (size_t)((char *)r->asked.data - (char *)r->values.data) + tensor_bytes(r->asked);
}

void reading_memory_init(ReadingMemory *m, int64_t vocab) {
    Arena measure = arena_measure();
    Reading most;
    reading_reserve(&most, NULL, &measure, HEAD_ROWS, CANDIDATES_MAX, 0);
    m->best = must_malloc(measure.peak);
    m->row = must_malloc((size_t)vocab * sizeof *m->row);
}

void reading_memory_free(ReadingMemory *m) {
    free(m->best);
    free(m->row);
    *m = (ReadingMemory){0};
}

void reading_reserve(Reading *r, ReadingMemory *memory, Arena *arena, int64_t n, int64_t k,
                     int64_t vocab) {
    CHECK(n <= HEAD_ROWS && k <= CANDIDATES_MAX, "a reading of %d rows, %d best", (int)n, (int)k);
    *r = (Reading){.memory = memory, .edited = -1};
    r->values = ARENA_TENSOR(arena, F32, n, k);
    r->ids = ARENA_TENSOR(arena, I32, n, k);
    r->lse = ARENA_TENSOR(arena, F32, n, 2);
    r->asked = ARENA_TENSOR(arena, F32, n);
    r->scale = ARENA_TENSOR(arena, F32, n);
    r->next = ARENA_TENSOR(arena, I32, n);
    r->z = ARENA_TENSOR(arena, F32, n, vocab);
    r->changed = ARENA_TENSOR(arena, F32, 1, vocab);
}

/* Where a tensor of the run is on the host. */
static const void *host_of(const Reading *r, Tensor t) {
    if (t.device->kind == DEVICE_CPU) return t.data;
    return r->memory->best + ((char *)t.data - (char *)r->values.data);
}

static void fetch(Reading *r) {
    if (r->values.device->kind != DEVICE_CPU)
        device_copy(device_cpu(), r->memory->best, r->values.device, r->values.data, run_bytes(r));
}

void reading_read(Reading *r, const float *scale, const int32_t *next) {
    tensor_write(r->scale, scale);
    tensor_write(r->next, next);
    top_logits(r->values, r->ids, r->lse, r->z, r->scale);
    pick_columns(r->asked, r->z, r->next);
    fetch(r);
    r->host_values = host_of(r, r->values);
    r->host_ids = host_of(r, r->ids);
    r->host_lse = host_of(r, r->lse);
    r->host_asked = host_of(r, r->asked);
}

static Tensor row_of(const Reading *r, int64_t i) {
    return tensor_slice(r->z, i, 1);
}

float reading_logit(const Reading *r, int64_t i, int32_t id) {
    int64_t k = tensor_cols(r->values);
    float value;
    for (int64_t c = i * k; c < (i + 1) * k && r->edited != i; c++)
        if (r->host_ids[c] == id) return r->host_values[c];
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
    r->edited = i;
    return row;
}

void reading_changed(Reading *r, Candidates *c, int64_t i) {
    if (r->changed.device->kind != DEVICE_CPU) tensor_write(r->changed, r->memory->row);
    top_logits(tensor_slice(r->values, i, 1), tensor_slice(r->ids, i, 1),
               tensor_slice(r->lse, i, 1), r->changed, tensor_slice(r->scale, i, 1));
    fetch(r);
    c->logits = r->changed;
    c->lse = r->host_lse[2 * i + 1];
}
