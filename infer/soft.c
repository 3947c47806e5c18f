/* soft.c - one pass of the towers over each item. */
#include "infer/soft.h"

#include <stdlib.h>

static void place(SoftMedia *s, const Gemma *g, Arena *memory) {
    for (int64_t i = 0; i < s->count; i++)
        s->items[i].soft = ARENA_TENSOR(memory, g->dtype, s->items[i].count, g->config.hidden_size);
}

static void run(const SoftMedia *s, const Gemma *g, Arena *scratch) {
    Pass p = {.scratch = scratch, .rows = &(Rows){0}};
    for (int64_t i = 0; i < s->count; i++)
        media_forward(&g->media, s->items[i].soft, &s->items[i], &p);
}

Status soft_media_make(SoftMedia *s, Gemma *g, MediaItem *items, int64_t count) {
    Arena measured = arena_measure(), temporary = arena_measure(), scratch = {0};
    *s = (SoftMedia){.items = items, .count = count};
    if (!count) return OK;
    Status status = OK;
    place(s, g, &measured);
    run(s, g, &temporary);
    s->peak = temporary.peak;
    TRY_DONE(arena_init(&s->memory, g->device, measured.peak, "soft tokens"));
    TRY_DONE(arena_init(&scratch, g->device, temporary.peak, "the towers' temporaries"));
    place(s, g, &s->memory);
    run(s, g, &scratch);
done:
    arena_free(&scratch);
    if (status != OK) soft_media_free(s);
    return status;
}

void soft_media_free(SoftMedia *s) {
    arena_free(&s->memory);
    free(s->items);
    *s = (SoftMedia){0};
}
