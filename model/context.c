/* context.c - which keys go where. */
#include "model/context.h"
#include "kernels/elementwise.h"
#include "kernels/quantize.h"

#include <stdlib.h>
#include <string.h>

static int ranks_of(const ContextPart *x) {
    return x->comm->size;
}

/* Whose rows run `run` are. */
static int owner(int ranks, int run) {
    return run < ranks ? run : 2 * ranks - 1 - run;
}

void context_measure(ContextPart *x, const Comm *comm, const ModelConfig *c, int64_t N,
                     int64_t longest) {
    int64_t runs = 2 * comm->size, slack = longest > 1 ? longest - 1 : 0,
            run = (N + runs - 1) / runs + slack, rows = 2 * run < N ? 2 * run : N,
            seen = 2 * (run + c->sliding_window - 1);
    *x = (ContextPart){.comm = comm, .N = rows > 0 ? rows : 1, .all = N};
    for (int kind = 0; kind < ATTENTION_KINDS; kind++) {
        bool window = kind == SLIDING && !longest &&
                      c->use_bidirectional_attention != BIDIRECTIONAL_ALL && seen < N;
        x->kinds[kind].keys = (window ? seen : N) + 1;
        x->kinds[kind].sent = comm->size * x->N + 1;
    }
}

void context_open(ContextPart *x, const Comm *comm, int64_t N, const bool *cuttable) {
    int ranks = comm->size, runs = 2 * ranks;
    *x = (ContextPart){.comm = comm, .all = N};
    x->cuts = must_calloc((size_t)runs + 1, sizeof *x->cuts);
    x->rows = must_malloc((size_t)(N + 1) * sizeof *x->rows);
    for (int i = 0; i <= runs; i++) {
        int64_t cut = N * i / runs;
        while (cut < N && !cuttable[cut]) cut++;
        x->cuts[i] = cut;
    }
    for (int i = 0; i < runs; i++)
        for (int64_t n = x->cuts[i]; owner(ranks, i) == comm->rank && n < x->cuts[i + 1]; n++)
            x->rows[x->N++] = (int32_t)n;
    if (!x->N) x->rows[x->N++] = -1;
}

void context_close(ContextPart *x) {
    for (int kind = 0; kind < ATTENTION_KINDS; kind++) {
        ContextKeys *k = &x->kinds[kind];
        free(k->sends), free(k->gets), free(k->index), free(k->first), free(k->last);
        free(k->sources), free(k->places);
    }
    free(x->cuts);
    free(x->rows);
}

/* Marks the keys that rank r's rows see. */
static void mark_seen(const ContextPart *x, int r, const int32_t *first, const int32_t *last,
                      bool *seen) {
    int32_t *edges = must_calloc((size_t)x->all + 1, sizeof *edges);
    for (int i = 0; i < 2 * ranks_of(x); i++)
        for (int64_t n = x->cuts[i]; owner(ranks_of(x), i) == r && n < x->cuts[i + 1]; n++)
            edges[first[n]]++, edges[last[n] + 1]--;
    int32_t open = 0;
    for (int64_t n = 0; n < x->all; n++) seen[n] = (open += edges[n]) > 0;
    free(edges);
}

/* What this rank sends to r, which sees those keys. */
static void add_sources(const ContextPart *x, ContextKeys *k, int r, const bool *seen) {
    for (int64_t n = 0; n < x->N; n++) {
        bool mine = x->rows[n] < 0 && r == x->comm->rank;
        if (!mine && (x->rows[n] < 0 || !seen[x->rows[n]])) continue;
        k->sources[k->sent++] = (int32_t)n;
        k->sends[r]++;
    }
}

/* Where in this rank's slots come the keys that it sees. */
static void add_places(const ContextPart *x, ContextKeys *k, const bool *seen, int32_t *place) {
    int ranks = ranks_of(x);
    for (int64_t n = 0; n < x->all; n++)
        if (seen[n]) place[n] = (int32_t)k->keys++;
    int64_t at = 0;
    for (int r = 0; r < ranks; r++) {
        for (int i = 0; i < 2 * ranks; i++)
            for (int64_t n = x->cuts[i]; owner(ranks, i) == r && n < x->cuts[i + 1]; n++)
                if (seen[n]) k->places[at++] = place[n], k->gets[r]++;
        if (r == x->comm->rank && x->rows[0] < 0)
            k->places[at++] = (int32_t)k->keys++, k->gets[r]++;
    }
}

void context_see(ContextPart *x, AttentionKind kind, const int32_t *first, const int32_t *last) {
    ContextKeys *k = &x->kinds[kind];
    size_t ranks = (size_t)ranks_of(x), N = (size_t)x->N, all = (size_t)x->all;
    bool *seen = must_calloc(all + 1, sizeof *seen);
    int32_t *place = must_calloc(all + 1, sizeof *place);
    k->sends = must_calloc(ranks, sizeof *k->sends);
    k->gets = must_calloc(ranks, sizeof *k->gets);
    k->sources = must_malloc((ranks * N + 1) * sizeof *k->sources);
    k->places = must_malloc((all + 1) * sizeof *k->places);
    k->index = must_malloc(N * sizeof *k->index);
    k->first = must_malloc(N * sizeof *k->first);
    k->last = must_malloc(N * sizeof *k->last);
    for (int r = 0; r < ranks_of(x); r++) {
        mark_seen(x, r, first, last, seen);
        add_sources(x, k, r, seen);
        if (r == x->comm->rank) add_places(x, k, seen, place);
    }
    for (int64_t n = 0; n < x->N; n++) {
        int32_t row = x->rows[n];
        k->index[n] = row < 0 ? (int32_t)k->keys - 1 : place[row];
        k->first[n] = row < 0 ? k->index[n] : place[first[row]];
        k->last[n] = row < 0 ? k->index[n] : place[last[row]];
    }
    free(seen);
    free(place);
}

void context_reserve(ContextPart *x, Arena *arena) {
    for (int kind = 0; kind < ATTENTION_KINDS; kind++) {
        ContextKeys *k = &x->kinds[kind];
        k->source = ARENA_TENSOR(arena, I32, k->sent);
        k->place = ARENA_TENSOR(arena, I32, k->keys);
    }
}

void context_fill(const ContextPart *x, const Staging *inputs) {
    for (int kind = 0; kind < ATTENTION_KINDS; kind++) {
        const ContextKeys *k = &x->kinds[kind];
        memcpy(staged(inputs, k->source), k->sources, (size_t)k->sent * sizeof *k->sources);
        memcpy(staged(inputs, k->place), k->places, (size_t)k->keys * sizeof *k->places);
    }
}

/* (n, K, C) as (n, K C). */
static Tensor flat(Tensor t) {
    return RESHAPE(t, t.shape[0], t.shape[1] * t.shape[2]);
}

void context_gather(const ContextPart *x, AttentionKind kind, Tensor slot, Tensor rows,
                    Arena *scratch) {
    const ContextKeys *k = &x->kinds[kind];
    size_t mark = arena_mark(scratch);
    int64_t width = rows.shape[1] * rows.shape[2];
    Tensor out = ARENA_TENSOR(scratch, rows.dtype, k->sent, width),
           in = ARENA_TENSOR(scratch, rows.dtype, k->keys, width);
    gather_rows(out, flat(rows), k->source);
    comm_all_to_all(x->comm, in, k->gets, out, k->sends);
    store_rows(flat(slot), in, k->place);
    arena_release(scratch, mark);
}

void context_return(const ContextPart *x, AttentionKind kind, Tensor drows, Tensor dslot,
                    Arena *scratch) {
    const ContextKeys *k = &x->kinds[kind];
    size_t mark = arena_mark(scratch);
    int64_t width = drows.shape[1] * drows.shape[2], at = 0;
    Tensor out = ARENA_TENSOR(scratch, F32, k->keys, width),
           in = ARENA_TENSOR(scratch, F32, k->sent, width);
    gather_rows(out, flat(dslot), k->place);
    comm_all_to_all(x->comm, in, k->sends, out, k->gets);
    fill(drows, 0.0f);
    for (int r = 0; k->sends && r < ranks_of(x); r++) {
        int64_t n = k->sends[r];
        if (n)
            scatter_rows(flat(drows), ADD, tensor_slice(in, at, n), tensor_slice(k->source, at, n));
        at += n;
    }
    arena_release(scratch, mark);
}
