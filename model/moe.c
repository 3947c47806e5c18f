/* moe.c - router, sorted expert products, weighted join.
 *
 *   r = norm(x) * router.scale * D^-1/2;  p = softmax(r proj^T) over all experts
 *   share = the A largest of p, renormalised;  y = sum share * per_expert_scale * expert(h)
 *   expert(h) = (gelu(gate) * up) down^T, gate and up the two halves of gate_up_proj
 *
 * Rows are sorted by expert so that each expert is one product. Where ranks have the experts
 * between them, each expert's rows go to the rank that has it, and their results come back. The
 * balancing loss is the Switch form (Fedus et al. 2021) with all layers pooled, as the Mixtral
 * recipe has it: E * sum_e f_e P_e, f constant in the backward pass. */
#include "model/moe.h"
#include "kernels/activation.h"
#include "kernels/elementwise.h"
#include "kernels/routing.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

void moe_declare(Moe *m, ParamList *params, LinearList *list, const BlockConfig *c) {
    int64_t E = c->num_experts, D = c->hidden_size, F = c->moe_intermediate_size;
    m->config = *c;
    params_enter(params, "router");
    linear_declare(&m->router_proj, params, list, "proj", E, D);
    m->router_scale = PARAMS_ADD(params, "scale", D);
    m->per_expert_scale = PARAMS_ADD(params, "per_expert_scale", E);
    m->router_scale->decay = m->per_expert_scale->decay = false;
    params_leave(params);
    params_enter(params, "experts");
    linear_declare_grouped(&m->gate_up_proj, params, list, "gate_up_proj", E, 2 * F, D);
    linear_declare_grouped(&m->down_proj, params, list, "down_proj", E, D, F);
    params_leave(params);
}

void moe_reserve(MoeSaved *s, Arena *arena, const BlockConfig *c, DType dtype, int64_t N) {
    int64_t E = c->num_experts, A = c->top_k_experts, D = c->hidden_size, M = routing_rows(N, A, E);
    s->router_input = ARENA_TENSOR(arena, dtype, N, D);
    s->probs = ARENA_TENSOR(arena, F32, N, E);
    s->share = ARENA_TENSOR(arena, F32, N, A);
    s->experts = ARENA_TENSOR(arena, I32, N, A);
    s->slot = ARENA_TENSOR(arena, I32, N, A);
    s->offsets = ARENA_TENSOR(arena, I32, E + 1);
    s->counts = ARENA_TENSOR(arena, I32, E);
    s->source = ARENA_TENSOR(arena, I32, M);
    if (c->expert_ranks) { /* all rows of all ranks may choose experts that are here */
        int64_t R = c->expert_ranks, here = E / R;
        M = R * routing_rows(c->expert_rows, A, E);
        s->came = ARENA_TENSOR(arena, I32, R, here);
        s->groups = ARENA_TENSOR(arena, I32, here + 1);
        s->counts_here = ARENA_TENSOR(arena, I32, here);
        s->order = ARENA_TENSOR(arena, I32, M);
        s->back = ARENA_TENSOR(arena, I32, M);
    }
    s->gate_up = ARENA_TENSOR(arena, dtype, M, 2 * c->moe_intermediate_size);
}

Norm moe_router_norm(const Moe *m) {
    return (Norm){.weight = m->router_scale,
                  .eps = m->config.eps,
                  .factor = 1.0f / sqrtf((float)m->config.hidden_size)};
}

static RowGroups groups_of(const MoeSaved *s) {
    if (tensor_present(s->came)) return (RowGroups){s->groups, s->counts_here};
    return (RowGroups){s->offsets, s->counts};
}

/* ---- rows on their way to experts that other ranks have ---- */

/* How many rows go to each rank and come from it; R <= EXPERTS_MAX. */
typedef struct Travel {
    int64_t sends[EXPERTS_MAX], gets[EXPERTS_MAX],
        came; /* came: of all; while measuring the most */
} Travel;

/* Rows to each rank, from where the groups of all experts begin. */
static void count_sends(Travel *t, const MoeSaved *s, int64_t R, int64_t here, int32_t *groups) {
    tensor_read(groups, s->offsets);
    for (int64_t r = 0; r < R; r++) t->sends[r] = groups[(r + 1) * here] - groups[r * here];
}

/* What comes, of the (R, E) counts: its sums, and its order by experts. */
static void count_gets(Travel *t, const int32_t *came, int64_t R, int64_t here) {
    t->came = 0;
    for (int64_t r = 0; r < R; r++) {
        t->gets[r] = 0;
        for (int64_t e = 0; e < here; e++) t->gets[r] += came[r * here + e];
        t->came += t->gets[r];
    }
}

/* Tells the other ranks how many rows come for each of their experts, and sorts what comes here. */
static Travel begin_travel(MoeSaved *s, const Comm *c) {
    int64_t R = c->size, here = s->came.shape[1], E = R * here, n = 0, ones[EXPERTS_MAX];
    Travel t = {.came = tensor_rows(s->gate_up)};
    int32_t groups[E + 1], counts[E], came[E], begin[here + 1], most[here];
    if (!s->came.data) return t; /* only measured */
    count_sends(&t, s, R, here, groups);
    for (int64_t e = 0; e < E; e++) counts[e] = groups[e + 1] - groups[e];
    for (int64_t r = 0; r < R; r++) ones[r] = 1;
    comm_all_to_all(c, TENSOR(came, I32, R, here), ones, TENSOR(counts, I32, R, here), ones);
    count_gets(&t, came, R, here);
    CHECK(t.came <= tensor_rows(s->gate_up), "%lld rows for the experts here", (long long)t.came);
    int32_t *order = must_malloc((size_t)(t.came + 1) * sizeof *order),
            *back = must_malloc((size_t)(t.came + 1) * sizeof *back);
    for (int64_t e = 0; e < here; e++) {
        begin[e] = (int32_t)n;
        for (int64_t r = 0, from = 0; r < R; from += t.gets[r++]) {
            int64_t at = from;
            for (int64_t before = 0; before < e; before++) at += came[r * here + before];
            for (int32_t i = 0; i < came[r * here + e]; i++, n++) {
                order[n] = (int32_t)(at + i);
                back[at + i] = (int32_t)n;
            }
        }
        most[e] = (int32_t)n - begin[e];
    }
    begin[here] = (int32_t)n;
    tensor_write(s->came, came);
    tensor_write(s->groups, begin);
    tensor_write(s->counts_here, most);
    tensor_write(tensor_slice(s->order, 0, n), order);
    tensor_write(tensor_slice(s->back, 0, n), back);
    free(order);
    free(back);
    return t;
}

/* The same rows again. */
static Travel repeat_travel(const MoeSaved *s, const Comm *c) {
    int64_t R = c->size, here = s->came.shape[1];
    Travel t = {.came = tensor_rows(s->gate_up)};
    int32_t groups[R * here + 1], came[R * here];
    if (!s->came.data) return t;
    count_sends(&t, s, R, here, groups);
    tensor_read(came, s->came);
    count_gets(&t, came, R, here);
    return t;
}

/* rows (T, D) by experts here, of everyone's sorted (M, D). */
static void to_experts(const MoeSaved *s, const Travel *t, Tensor rows, Tensor sorted, Pass *p) {
    size_t mark = arena_mark(p->scratch);
    Tensor came = arena_like(p->scratch, rows);
    comm_all_to_all(p->experts, came, t->gets, sorted, t->sends);
    if (t->came) gather_rows(rows, came, tensor_slice(s->order, 0, t->came));
    arena_release(p->scratch, mark);
}

/* The way back. */
static void from_experts(const MoeSaved *s, const Travel *t, Tensor sorted, Tensor rows, Pass *p) {
    size_t mark = arena_mark(p->scratch);
    Tensor back = arena_like(p->scratch, rows);
    if (t->came) gather_rows(back, rows, tensor_slice(s->back, 0, t->came));
    comm_all_to_all(p->experts, sorted, t->sends, back, t->gets);
    arena_release(p->scratch, mark);
}

/* What each expert got, for who asked (Pass.load_counts). */
static void count_load(const Moe *m, const MoeSaved *s, Pass *p) {
    if (!tensor_present(p->load_counts)) return;
    Tensor sums = tensor_at(p->load_probs, m->config.layer);
    tensor_copy(tensor_at(p->load_counts, m->config.layer), s->counts);
    fill(sums, 0.0f);
    dot_columns(sums, s->probs, tensor_absent());
}

void expert_load_clear(ExpertLoad *load) {
    load->rows = 0;
    memset(load->counts, 0, sizeof load->counts);
    memset(load->probs, 0, sizeof load->probs);
}

void expert_load_sum(ExpertLoad *load, const Comm *comm) {
    load->rows = comm_sum_count(comm, load->rows);
    comm_sum_doubles(comm, load->counts, EXPERTS_MAX);
    comm_sum_doubles(comm, load->probs, EXPERTS_MAX);
}

void expert_load_collect(ExpertLoad *load, const Pass *p, int64_t N) {
    int64_t L = p->load_counts.shape[0], E = p->load_counts.shape[1];
    int32_t counts[L * E];
    float probs[L * E];
    tensor_read(counts, p->load_counts);
    tensor_read(probs, p->load_probs);
    expert_load_clear(load);
    for (int64_t i = 0; i < L * E; i++) {
        load->counts[i % E] += counts[i];
        load->probs[i % E] += probs[i];
        if (load->by_layer) load->by_layer[i] += (float)counts[i];
    }
    load->rows = L * N;
}

double expert_load_loss(const ExpertLoad *load, int64_t num_experts) {
    double sum = 0, rows = (double)load->rows;
    if (!load->rows) return 0;
    for (int64_t e = 0; e < num_experts; e++)
        sum += load->counts[e] / rows * (load->probs[e] / rows);
    return (double)num_experts * sum;
}

/* Each of sorted rows (M, D) becomes what its expert makes of it, wherever that is. */
static void experts_forward(const Moe *m, MoeSaved *s, Tensor sorted, Pass *p) {
    Travel t = {.came = tensor_rows(sorted)};
    Tensor rows = sorted, results = sorted;
    if (p->experts) {
        t = begin_travel(s, p->experts);
        rows = ARENA_TENSOR(p->scratch, sorted.dtype, t.came, tensor_cols(sorted));
        results = arena_like(p->scratch, rows);
        to_experts(s, &t, rows, sorted, p);
    }
    Tensor hidden = ARENA_TENSOR(p->scratch, sorted.dtype, t.came, m->config.moe_intermediate_size);
    Tensor gate_up = tensor_slice(s->gate_up, 0, t.came);
    if (t.came) {
        linear_forward_grouped(&m->gate_up_proj, gate_up, rows, groups_of(s), p);
        gelu_mul_joined_forward(hidden, gate_up);
        linear_forward_grouped(&m->down_proj, results, hidden, groups_of(s), p);
    }
    if (p->experts) from_experts(s, &t, sorted, results, p);
}

/* The gradients of what a row's result was multiplied by `weights` (M) to be, d (M, D), become
 * those of sorted rows; dweights (M). sorted (M, D): absent where gate_up_proj does not read it.
 *
 * A result is y = hidden down^T and <d, y> = <d down, hidden>, so that y itself is not kept. */
static void experts_backward(const Moe *m, const MoeSaved *s, Tensor d, Tensor dweights,
                             Tensor weights, Tensor sorted, Pass *p) {
    Travel t = {.came = tensor_rows(d)};
    Tensor rows = sorted, drows = d, dresults = d, hidden = tensor_absent(), products = dweights,
           factors = weights;
    if (p->experts) {
        t = repeat_travel(s, p->experts);
        dresults = ARENA_TENSOR(p->scratch, d.dtype, t.came, tensor_cols(d));
        drows = arena_like(p->scratch, dresults);
        factors = ARENA_TENSOR(p->scratch, F32, t.came, 1);
        products = arena_like(p->scratch, factors);
        to_experts(s, &t, dresults, d, p);
        to_experts(s, &t, factors, weights, p);
        if (tensor_present(sorted)) {
            rows = arena_like(p->scratch, dresults);
            to_experts(s, &t, rows, sorted, p);
        }
    }
    Tensor gate_up = tensor_slice(s->gate_up, 0, t.came),
           dgate_up = arena_like(p->scratch, gate_up),
           dhidden = ARENA_TENSOR(p->scratch, d.dtype, t.came, m->config.moe_intermediate_size);
    if (linear_reads_input(&m->down_proj)) hidden = arena_like(p->scratch, dhidden);
    if (t.came) {
        if (tensor_present(hidden)) { /* weights' gradients have rows' factors from this side */
            gelu_mul_joined_forward(hidden, gate_up);
            scale_rows(hidden, hidden, factors);
        }
        linear_backward_grouped(&m->down_proj, dhidden, SET, dresults, hidden, groups_of(s), p);
        gelu_mul_joined_backward(dgate_up, products, dhidden, factors, gate_up);
        linear_backward_grouped(&m->gate_up_proj, drows, SET, dgate_up, rows, groups_of(s), p);
    }
    if (p->experts) {
        from_experts(s, &t, d, drows, p);
        from_experts(s, &t, dweights, products, p);
    }
}

void moe_forward(const Moe *m, MoeSaved *s, Tensor y, Tensor h, Pass *p) {
    size_t mark = arena_mark(p->scratch);
    int64_t N = tensor_rows(h), E = m->config.num_experts;
    int64_t D = m->config.hidden_size;
    Tensor logits = ARENA_TENSOR(p->scratch, h.dtype, N, E);
    linear_forward(&m->router_proj, logits, s->router_input, p);
    router_forward(s->probs, s->share, s->experts, logits);
    routing_sort(s->offsets, s->counts, s->slot, s->source, s->experts);
    count_load(m, s, p);

    Tensor sorted = ARENA_TENSOR(p->scratch, h.dtype, tensor_count(s->source), D);
    spread_rows(sorted, h, s->slot, s->source);
    experts_forward(m, s, sorted, p);
    combine_forward(y, sorted, s->slot, s->share, s->experts, m->per_expert_scale->value);
    arena_release(p->scratch, mark);
}

bool moe_reads_input(const Moe *m) {
    return linear_reads_input(&m->gate_up_proj);
}

void moe_backward(const Moe *m, const MoeSaved *s, Tensor dh, Tensor drouter, Tensor dy, Tensor h,
                  Pass *p) {
    size_t mark = arena_mark(p->scratch);
    int64_t N = tensor_rows(dy), E = m->config.num_experts;
    int64_t M = tensor_count(s->source);
    const Param *scale = m->per_expert_scale;
    Tensor d = ARENA_TENSOR(p->scratch, dy.dtype, M, m->config.hidden_size),
           dshare = arena_like(p->scratch, s->share), weights = ARENA_TENSOR(p->scratch, F32, M, 1),
           dweights = arena_like(p->scratch, weights), sorted = tensor_absent();
    row_weights(weights, s->slot, s->source, s->share, s->experts, scale->value);
    spread_rows(d, dy, s->slot, s->source);
    if (moe_reads_input(m)) {
        sorted = arena_like(p->scratch, d);
        spread_rows(sorted, h, s->slot, s->source);
    }
    experts_backward(m, s, d, dweights, weights, sorted, p);
    gather_sums(dh, d, s->slot);
    row_weights_backward(dshare, scale->grad, dweights, s->slot, s->share, s->experts,
                         scale->value);

    Tensor dlogits = ARENA_TENSOR(p->scratch, dy.dtype, N, E);
    router_backward(dlogits, dshare, s->probs, s->share, s->experts, p->balance);
    linear_backward(&m->router_proj, drouter, SET, dlogits, s->router_input, p);
    arena_release(p->scratch, mark);
}
