/* space.c - runs of the flat space, their shares, and layers that come and go. */
#include "kernels/elementwise.h"
#include "model/params.h"

#include <stdlib.h>
#include <string.h>

#define LINE 64 /* bytes at which what is placed begins */

static int64_t aligned(size_t bytes) {
    return ((int64_t)bytes + LINE - 1) / LINE * LINE;
}

static int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static int64_t larger(int64_t a, int64_t b) {
    return a > b ? a : b;
}

/* Elements first .. end - 1 of a tensor seen as one line. */
static Tensor elements(Tensor t, int64_t first, int64_t end) {
    int64_t n = end - first;
    Tensor part = tensor_make(NULL, t.dtype, 1, &n);
    part.device = t.device;
    if (t.data) part.data = (char *)t.data + (size_t)first * dtype_size(t.dtype);
    return part;
}

/* ---- how things are shared out ---- */

static bool gathers(const ParamList *params) {
    return params->space.level >= 3;
}

/* Whether only a layer's time has its value. A layer's scalar is read once and stays. */
static bool is_gathered(const ParamList *params, const Param *p) {
    if (!gathers(params) || p->layer < 0 || p->buffer || p->adapter) return false;
    return p->trainable ? !params->space.whole_trained : !p->mapped;
}

static bool has_master(const ParamList *params, const Param *p) {
    return p->trainable && (p->value.dtype == F32 || !params->space.no_masters);
}

static const Comm *sharers_of(const RankGroups *ranks, bool experts) {
    return experts ? &ranks->replicas : &ranks->sharers;
}

const Comm *run_sharers(const RankGroups *ranks, const ParamRun *run) {
    return sharers_of(ranks, run->experts);
}

/* Into how many shares, and which of them is here. */
static int shares(const Space *s, bool experts, int *mine) {
    const Comm *c = s->level ? sharers_of(s->ranks, experts) : NULL;
    *mine = c ? c->rank : 0;
    return c ? c->size : 1;
}

/* Values of a run up to share r of `parts`. */
static int64_t run_bound(const ParamRun *run, int r, int parts) {
    return (run->end - run->begin) / DYNAMIC_BLOCK * r / parts * DYNAMIC_BLOCK;
}

void run_bounds(const RankGroups *ranks, const ParamRun *run, int64_t *bounds) {
    int parts = run_sharers(ranks, run)->size;
    for (int r = 0; r <= parts; r++) bounds[r] = run_bound(run, r, parts);
}

/* The groups whose calls go with exchanging layers. */
static const RankGroups *layer_groups(const Space *s) {
    return s->overlaps ? s->beside_ranks : s->ranks;
}

/* Bytes of a layer's frozen values up to share r of `parts`. */
static int64_t frozen_bound(const FrozenShare *f, int r, int parts) {
    return f->bytes / LINE * r / parts * LINE;
}

/* Whether q goes into p's run. */
static bool goes_along(const Param *p, const Param *q) {
    return q->layer == p->layer && q->value.dtype == p->value.dtype && q->adapter == p->adapter &&
           (q->groups > 0) == (p->groups > 0);
}

static void begin_run(ParamList *params, int item, int64_t begin) {
    Space *s = &params->space;
    const Param *p = params->items[item];
    s->runs = must_realloc(s->runs, (size_t)(s->count + 1) * sizeof *s->runs);
    s->runs[s->count++] = (ParamRun){.layer = p->layer,
                                     .first = item,
                                     .dtype = p->value.dtype,
                                     .experts = p->groups > 0,
                                     .begin = begin,
                                     .place = -1};
}

static void make_runs(ParamList *params) {
    Space *s = &params->space;
    const Param *before = NULL;
    int64_t offset = 0, share = 0;
    s->count = 0;
    for (int i = 0; i < params->count; i++) {
        Param *p = params->items[i];
        if (!p->trainable) continue;
        if (!before || !goes_along(before, p)) begin_run(params, i, offset);
        p->offset = offset;
        offset += param_span(p);
        s->runs[s->count - 1].last = i;
        s->runs[s->count - 1].end = offset;
        before = p;
    }
    for (int i = 0; i < s->count; i++) {
        ParamRun *r = &s->runs[i];
        int mine, parts = shares(s, r->experts, &mine);
        r->own = r->begin + run_bound(r, mine, parts);
        r->own_end = r->begin + run_bound(r, mine + 1, parts);
        r->share = share;
        share += r->own_end - r->own;
        r->gathered = is_gathered(params, params->items[r->first]);
        r->whole = !r->gathered && (parts == 1 || r->dtype == F32 || s->whole_trained);
    }
}

/* ---- places ---- */

/* The rooms that things take, one behind the other. */
typedef struct Rooms {
    int64_t working, values, grads, layer_grads, kept, buffers[2];
} Rooms;

/* Where a layer's gathered values lie in its bytes: frozen ones, those of experts, runs. */
static void layer_rooms(ParamList *params, int layer, Rooms *rooms) {
    Space *s = &params->space;
    int64_t at = 0;
    for (int experts = 0; experts < 2; experts++) {
        FrozenShare *f = &s->frozen[layer][experts];
        int mine, parts = shares(s, experts, &mine);
        *f = (FrozenShare){.begin = at, .kept = rooms->kept};
        for (int i = 0; i < params->count; i++) {
            const Param *p = params->items[i];
            if (p->layer != layer || p->trainable || (p->groups > 0) != experts) continue;
            if (is_gathered(params, p)) f->bytes += aligned(tensor_bytes(p->value));
        }
        at += f->bytes;
        rooms->kept += frozen_bound(f, mine + 1, parts) - frozen_bound(f, mine, parts);
    }
    for (int i = 0; i < s->count; i++) {
        ParamRun *r = &s->runs[i];
        if (r->layer != layer || !r->gathered) continue;
        r->room = at;
        at += aligned((size_t)(r->end - r->begin) * dtype_size(r->dtype));
    }
    rooms->buffers[layer % 2] = larger(rooms->buffers[layer % 2], at);
}

/* Gradients of what is in no layer (or of everything) come first, then those that layers share. */
static void grad_rooms(Space *s, Rooms *rooms) {
    int64_t taken[LAYERS_MAX] = {0};
    for (int i = 0; i < s->count; i++) {
        ParamRun *r = &s->runs[i];
        bool shares = s->one_layer && r->layer >= 0;
        int64_t *at = shares ? &taken[r->layer] : &rooms->grads;
        r->grads = *at;
        *at += r->end - r->begin;
        if (shares) rooms->layer_grads = larger(rooms->layer_grads, *at);
    }
    for (int i = 0; i < s->count && s->one_layer; i++) {
        ParamRun *r = &s->runs[i];
        if (r->layer >= 0) r->grads += rooms->grads;
        if (r->layer >= 0 && s->overlaps && r->layer % 2) r->grads += rooms->layer_grads;
    }
}

static Rooms make_rooms(ParamList *params) {
    Space *s = &params->space;
    Rooms rooms = {0};
    make_runs(params);
    grad_rooms(s, &rooms);
    for (int layer = 0; layer < LAYERS_MAX && gathers(params); layer++)
        layer_rooms(params, layer, &rooms);
    for (int i = 0; i < s->count; i++) {
        ParamRun *r = &s->runs[i];
        if (has_master(params, params->items[r->first])) {
            r->place = rooms.values;
            rooms.values += r->whole ? r->end - r->begin : r->own_end - r->own;
        }
        if (r->gathered || r->dtype == F32) continue;
        r->room = rooms.working;
        rooms.working += r->end - r->begin;
    }
    return rooms;
}

/* Frozen values that have a place of their own. */
static bool has_place(const ParamList *params, const Param *p) {
    return !p->trainable && !p->mapped && !is_gathered(params, p);
}

/* Everything but what is trained in f32. */
static size_t working_bytes(const ParamList *params, const Rooms *rooms) {
    int64_t bytes = aligned((size_t)rooms->working * dtype_size(BF16)) +
                    aligned((size_t)rooms->kept) + aligned((size_t)rooms->buffers[0]) +
                    aligned((size_t)rooms->buffers[1]);
    for (int i = 0; i < params->count; i++)
        if (has_place(params, params->items[i]))
            bytes += aligned(tensor_bytes(params->items[i]->value));
    for (int i = 0; i < params->derived_count; i++)
        bytes += aligned(tensor_bytes(*params->derived[i]));
    return (size_t)bytes;
}

static int64_t all_grads(const Space *s, const Rooms *rooms) {
    return rooms->grads + (s->overlaps ? 2 : 1) * rooms->layer_grads;
}

ParamBytes params_bytes(ParamList *params) {
    Rooms rooms = make_rooms(params);
    const Space *s = &params->space;
    const ParamRun *last = s->count ? &s->runs[s->count - 1] : NULL;
    return (ParamBytes){.values = working_bytes(params, &rooms),
                        .masters = (size_t)rooms.values * 4,
                        .gradients = (size_t)all_grads(s, &rooms) * 4,
                        .trained = last ? last->end : 0,
                        .own = last ? last->share + last->own_end - last->own : 0};
}

/* A tensor of the shape of p, from element `first` of a flat one on; absent of an absent one. */
static Tensor part_of(Tensor flat, int64_t first, const Param *p) {
    if (!tensor_present(flat)) return flat;
    Tensor t = p->value;
    t.dtype = flat.dtype;
    t.device = flat.device;
    t.data = (char *)flat.data + (size_t)first * dtype_size(flat.dtype);
    return t;
}

/* Bytes of a layer's buffer as values of p. */
static void put_in_buffer(const Space *s, Param *p, int64_t byte) {
    Tensor buffer = s->buffers[p->layer % 2];
    p->value.data = (char *)buffer.data + byte;
    p->value.device = buffer.device;
}

static void place_run(ParamList *params, const ParamRun *r, bool gradients) {
    const Space *s = &params->space;
    for (int i = r->first; i <= r->last; i++) {
        Param *p = params->items[i];
        int64_t at = p->offset - r->begin;
        if (!p->trainable) continue;
        if (gradients) p->grad = part_of(s->grads, r->grads + at, p);
        p->master =
            r->whole && r->place >= 0 ? part_of(s->values, r->place + at, p) : tensor_absent();
        if (r->gathered)
            put_in_buffer(s, p, r->room + at * (int64_t)dtype_size(r->dtype));
        else if (r->dtype == F32)
            p->value = p->master;
        else
            p->value = part_of(s->working, r->room + at, p);
        if (r->place < 0) p->master = p->value;
    }
}

static void place_frozen(ParamList *params) {
    Space *s = &params->space;
    int64_t taken[LAYERS_MAX][2] = {0};
    for (int i = 0; i < params->count; i++) {
        Param *p = params->items[i];
        if (p->trainable) continue;
        if (has_place(params, p)) p->value = arena_like(&s->working_arena, p->value);
        if (!is_gathered(params, p)) continue;
        int64_t *at = &taken[p->layer][p->groups > 0];
        put_in_buffer(s, p, s->frozen[p->layer][p->groups > 0].begin + *at);
        *at += aligned(tensor_bytes(p->value));
    }
}

Status params_place(ParamList *params, Device *device, bool gradients) {
    Space *s = &params->space;
    Rooms rooms = make_rooms(params);
    int64_t n = all_grads(s, &rooms);
    TRY(arena_init(&s->working_arena, device, working_bytes(params, &rooms), "the weights"));
    TRY(arena_init(&s->trained_arena, device,
                   (size_t)(rooms.values + (gradients ? n : 0)) * sizeof(float),
                   "the trained parameters"));
    if (rooms.values) s->values = ARENA_TENSOR(&s->trained_arena, F32, rooms.values);
    if (gradients) s->grads = ARENA_TENSOR(&s->trained_arena, F32, n);
    for (int i = 0; i < 2 && gradients && s->one_layer; i++)
        s->layer_grads[i] = tensor_slice(
            s->grads, rooms.grads + (s->overlaps ? i : 0) * rooms.layer_grads, rooms.layer_grads);
    if (rooms.working) s->working = ARENA_TENSOR(&s->working_arena, params->dtype, rooms.working);
    if (rooms.kept) s->kept = ARENA_TENSOR(&s->working_arena, U8, rooms.kept);
    for (int i = 0; i < 2; i++) {
        if (rooms.buffers[i]) s->buffers[i] = ARENA_TENSOR(&s->working_arena, U8, rooms.buffers[i]);
        s->held[i] = -1;
    }
    place_frozen(params);
    for (int i = 0; i < s->count; i++) place_run(params, &s->runs[i], gradients);
    for (int i = 0; i < params->derived_count; i++)
        *params->derived[i] = arena_like(&s->working_arena, *params->derived[i]);
    return OK;
}

void space_free(Space *s) {
    arena_free(&s->working_arena);
    arena_free(&s->trained_arena);
    free(s->runs);
    *s = (Space){0};
}

Tensor run_grads(const Space *s, const ParamRun *run, int64_t first, int64_t end) {
    int64_t to = run->grads - run->begin;
    return elements(s->grads, to + first, to + end);
}

Tensor run_values(const Space *s, const ParamRun *run, int64_t first, int64_t end) {
    int64_t to = run->place - (run->whole ? run->begin : run->own);
    return elements(s->values, to + first, to + end);
}

/* A run's values where passes read them. */
static Tensor working_values(const Space *s, const ParamRun *r) {
    int64_t n = r->end - r->begin;
    if (!r->gathered) return elements(s->working, r->room, r->room + n);
    Tensor t = tensor_make((char *)s->buffers[r->layer % 2].data + r->room, r->dtype, 1, &n);
    t.device = s->buffers[r->layer % 2].device;
    return t;
}

/* ---- values and their masters ---- */

void param_publish(Param *p) {
    if (p->trainable && tensor_present(p->master) && p->master.data != p->value.data)
        scale_copy(p->value, SET, p->master, 1.0f);
}

void params_publish(ParamList *params) {
    for (int i = 0; i < params->count; i++) param_publish(params->items[i]);
}

/* Keeps this rank's bytes of a frozen value that lies in its layer's buffer. */
static void keep_frozen(const Space *s, const Param *p) {
    bool experts = p->groups > 0;
    const FrozenShare *f = &s->frozen[p->layer][experts];
    Tensor buffer = s->buffers[p->layer % 2];
    int mine, parts = shares(s, experts, &mine);
    int64_t low = frozen_bound(f, mine, parts),
            begin = (char *)p->value.data - (char *)buffer.data - f->begin,
            from = larger(begin, low),
            to = smaller(begin + aligned(tensor_bytes(p->value)), frozen_bound(f, mine + 1, parts));
    if (from < to)
        tensor_copy(elements(s->kept, f->kept + from - low, f->kept + to - low),
                    elements(buffer, f->begin + from, f->begin + to));
}

static const ParamRun *run_of(const Space *s, const Param *p) {
    int i = 0;
    while (p->offset >= s->runs[i].end) i++;
    return &s->runs[i];
}

void param_adopt(ParamList *params, Param *p) {
    const Space *s = &params->space;
    if (!p->trainable) {
        if (is_gathered(params, p)) keep_frozen(s, p);
        return;
    }
    const ParamRun *r = run_of(s, p);
    if (r->place < 0) return;
    if (r->whole) {
        if (p->master.data != p->value.data) scale_copy(p->master, SET, p->value, 1.0f);
        return;
    }
    int64_t from = larger(p->offset, r->own),
            to = smaller(p->offset + tensor_count(p->value), r->own_end);
    if (from < to)
        scale_copy(run_values(s, r, from, to), SET,
                   elements(p->value, from - p->offset, to - p->offset), 1.0f);
}

void params_adopt(ParamList *params) {
    for (int i = 0; i < params->count; i++) param_adopt(params, params->items[i]);
}

/* Every rank's share of a run into the values that passes read. */
static void gather_run(const Space *s, const ParamRun *r, const RankGroups *ranks) {
    const Comm *c = run_sharers(ranks, r);
    int64_t bounds[c->size + 1];
    Tensor values = working_values(s, r);
    run_bounds(ranks, r, bounds);
    if (r->own < r->own_end)
        scale_copy(elements(values, r->own - r->begin, r->own_end - r->begin), SET,
                   run_values(s, r, r->own, r->own_end), 1.0f);
    comm_all_gather(c, values, bounds);
}

void space_join(ParamList *params) {
    Space *s = &params->space;
    if (!s->level) return;
    for (int i = 0; i < s->count; i++) {
        const ParamRun *r = &s->runs[i];
        if (r->gathered) {
            comm_beside_wait(s->beside);
            s->held[0] = s->held[1] = -1;
        } else if (!r->whole) {
            gather_run(s, r, s->ranks);
        } else {
            const Comm *c = run_sharers(s->ranks, r);
            int64_t bounds[c->size + 1];
            run_bounds(s->ranks, r, bounds);
            comm_all_gather(c, run_values(s, r, r->begin, r->end), bounds);
            for (int p = r->first; p <= r->last; p++) param_publish(params->items[p]);
        }
    }
}

void run_sum(const RankGroups *ranks, const ParamRun *run, Tensor grads, bool whole) {
    const Comm *c = run_sharers(ranks, run);
    int64_t bounds[c->size + 1];
    run_bounds(ranks, run, bounds);
    comm_reduce_scatter(c, grads, bounds);
    int64_t first = bounds[c->rank], end = bounds[c->rank + 1];
    if (!run->experts && first < end)
        comm_all_reduce(&ranks->across, tensor_slice(grads, first, end - first));
    if (whole) comm_all_gather(c, grads, bounds);
}

/* ---- layers that come and go ---- */

static void gather_frozen(const Space *s, int layer, bool experts) {
    const FrozenShare *f = &s->frozen[layer][experts];
    const Comm *c = sharers_of(layer_groups(s), experts);
    int64_t bounds[c->size + 1];
    if (!f->bytes) return;
    for (int r = 0; r <= c->size; r++) bounds[r] = frozen_bound(f, r, c->size);
    int64_t low = bounds[c->rank], high = bounds[c->rank + 1];
    Tensor all = elements(s->buffers[layer % 2], f->begin, f->begin + f->bytes);
    if (low < high)
        tensor_copy(elements(all, low, high), elements(s->kept, f->kept, f->kept + high - low));
    comm_all_gather(c, all, bounds);
}

static void gather_layer(void *context, int layer) {
    const Space *s = context;
    gather_frozen(s, layer, false);
    gather_frozen(s, layer, true);
    for (int i = 0; i < s->count; i++)
        if (s->runs[i].layer == layer && s->runs[i].gathered)
            gather_run(s, &s->runs[i], layer_groups(s));
}

static void begin_gathering(Space *s, int layer) {
    if (layer < 0 || s->held[layer % 2] == layer) return;
    s->held[layer % 2] = layer;
    comm_beside_begin(s->beside, gather_layer, s, layer);
}

void space_need(Space *s, int layer, int next) {
    if (s->level < 3 || layer < 0) return;
    begin_gathering(s, layer);
    comm_beside_wait(s->beside);
    if (s->overlaps) begin_gathering(s, next);
}

/* Groups of experts from the ranks that have them. */
static Status fetch_groups(const Space *s, Param *p) {
    Tensor source = param_source(p);
    size_t bytes = tensor_bytes(source);
    const Comm *experts = &s->ranks->experts;
    bool first = !experts->first, /* of the groups that have all, the one with rank 0 */
        gets = !s->ranks->all.rank;
    Tensor host, whole = source;
    whole.device = device_cpu();
    whole.shape[0] = p->groups;
    TRY(tensor_stage(&host, source));
    tensor_read(host.data, source);
    if (gets) {
        whole.data = malloc(bytes * (size_t)experts->size);
        if (!whole.data) FAIL(ERR_IO, "no memory for all of %s", p->name);
    }
    for (int r = 0; r < experts->size && first; r++)
        comm_fetch(experts, r, whole.data ? (char *)whole.data + (size_t)r * bytes : NULL,
                   host.data, bytes);
    tensor_unstage(source, host, true);
    if (!gets) return OK;
    p->here[0] = p->value;
    p->here[1] = p->master;
    p->value = p->master = whole;
    return OK;
}

Status param_fetch(ParamList *params, Param *p) {
    Space *s = &params->space;
    if (is_gathered(params, p)) space_need(s, p->layer, -1);
    return p->groups ? fetch_groups(s, p) : OK;
}

void param_release(Param *p) {
    if (!tensor_present(p->here[0])) return;
    free(p->value.data);
    p->value = p->here[0];
    p->master = p->here[1];
    p->here[0] = tensor_absent();
}
