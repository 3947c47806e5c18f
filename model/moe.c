/* moe.c - router, sorted expert products, weighted join.
 *
 *   r = norm(x) * router.scale * D^-1/2;  p = softmax(r proj^T) over all experts
 *   share = the A largest of p, renormalised;  y = sum share * per_expert_scale * expert(h)
 *   expert(h) = (gelu(gate) * up) down^T, gate and up the two halves of gate_up_proj
 *
 * Rows are sorted by expert so that each expert is one product. The balancing loss is the Switch
 * form (Fedus et al. 2021) with all layers pooled, as the Mixtral recipe has it: E * sum_e f_e P_e,
 * f constant in the backward pass. */
#include "model/moe.h"
#include "kernels/activation.h"
#include "kernels/elementwise.h"
#include "kernels/norm.h"
#include "kernels/routing.h"

#include <math.h>
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
    s->normed = ARENA_TENSOR(arena, dtype, N, D);
    s->router_rstd = ARENA_TENSOR(arena, F32, N);
    s->probs = ARENA_TENSOR(arena, F32, N, E);
    s->share = ARENA_TENSOR(arena, F32, N, A);
    s->experts = ARENA_TENSOR(arena, I32, N, A);
    s->slot = ARENA_TENSOR(arena, I32, N, A);
    s->offsets = ARENA_TENSOR(arena, I32, E + 1);
    s->counts = ARENA_TENSOR(arena, I32, E);
    s->source = ARENA_TENSOR(arena, I32, M);
    s->gate_up = ARENA_TENSOR(arena, dtype, M, 2 * c->moe_intermediate_size);
    s->out = ARENA_TENSOR(arena, dtype, M, D);
}

/* r = normed * scale * D^-1/2, in the two roundings of the reference. */
static Tensor router_input(const Moe *m, const MoeSaved *s, Pass *p) {
    int64_t D = m->config.hidden_size;
    Tensor r = arena_like(p->scratch, s->normed), scale = ARENA_TENSOR(p->scratch, F32, D);
    scale_copy(scale, SET, m->router_scale->value, 1.0f);
    scale_columns(r, SET, s->normed, scale);
    scale_copy(r, SET, r, 1.0f / sqrtf((float)D));
    return r;
}

/* gelu(gate) * up from the joined halves: splits them, as the activation takes two tensors. */
static void split_halves(Tensor gate, Tensor up, Tensor both) {
    if (!both.data) return;
    size_t half = (size_t)tensor_cols(gate) * dtype_size(gate.dtype);
#pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < tensor_rows(both); m++) {
        memcpy((char *)gate.data + (size_t)m * half, (char *)both.data + 2 * (size_t)m * half,
               half);
        memcpy((char *)up.data + (size_t)m * half, (char *)both.data + (2 * (size_t)m + 1) * half,
               half);
    }
}

static void join_halves(Tensor both, Tensor gate, Tensor up) {
    if (!both.data) return;
    size_t half = (size_t)tensor_cols(gate) * dtype_size(gate.dtype);
#pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < tensor_rows(both); m++) {
        memcpy((char *)both.data + 2 * (size_t)m * half, (char *)gate.data + (size_t)m * half,
               half);
        memcpy((char *)both.data + (2 * (size_t)m + 1) * half, (char *)up.data + (size_t)m * half,
               half);
    }
}

/* Rows in sorted order, padding included: known once they are sorted, before that the most there
 * can be. */
static int64_t routed_rows(const MoeSaved *s) {
    const int32_t *offsets = s->offsets.data;
    return offsets ? offsets[tensor_count(s->offsets) - 1] : tensor_rows(s->gate_up);
}

static RowGroups groups_of(const MoeSaved *s) {
    return (RowGroups){s->offsets.data, s->counts.data};
}

static void count_load(const Moe *m, const MoeSaved *s, ExpertLoad *load) {
    int64_t E = m->config.num_experts, N = tensor_rows(s->probs);
    const int32_t *counts = s->counts.data;
    const float *probs = s->probs.data;
    for (int64_t e = 0; e < E; e++) {
        load->counts[e] += counts[e];
        for (int64_t n = 0; n < N; n++) load->probs[e] += probs[n * E + e];
        if (load->by_layer) load->by_layer[m->config.layer * E + e] += (float)counts[e];
    }
    load->rows += N;
}

double expert_load_loss(const ExpertLoad *load, int64_t num_experts) {
    double sum = 0, rows = (double)load->rows;
    if (!load->rows) return 0;
    for (int64_t e = 0; e < num_experts; e++)
        sum += load->counts[e] / rows * (load->probs[e] / rows);
    return (double)num_experts * sum;
}

/* The derivative of the loss by each probability of expert e: aux_scale * E * f_e / rows. */
static Tensor load_gradient(const Moe *m, Pass *p) {
    int64_t E = m->config.num_experts;
    if (p->aux_scale == 0) return tensor_absent();
    Tensor balance = ARENA_TENSOR(p->scratch, F32, E);
    if (!balance.data) return balance; /* measuring */
    double rows = (double)p->load->rows;
    for (int64_t e = 0; e < E; e++)
        ((float *)balance.data)[e] =
            (float)(p->aux_scale * (double)E * p->load->counts[e] / rows / rows);
    return balance;
}

void moe_forward(const Moe *m, MoeSaved *s, Tensor y, Tensor h, Tensor x, Pass *p) {
    size_t mark = arena_mark(p->scratch);
    int64_t N = tensor_rows(h), E = m->config.num_experts;
    int64_t F = m->config.moe_intermediate_size, D = m->config.hidden_size;
    rmsnorm_forward(s->normed, s->router_rstd, x, tensor_absent(), tensor_absent(), m->config.eps);
    Tensor r = router_input(m, s, p), logits = ARENA_TENSOR(p->scratch, h.dtype, N, E);
    linear_forward(&m->router_proj, logits, r, p);
    router_forward(s->probs, s->share, s->experts, logits);
    routing_sort(s->offsets, s->counts, s->slot, s->source, s->experts);
    if (s->probs.data && p->load && p->load->counting) count_load(m, s, p->load);

    int64_t M = routed_rows(s);
    Tensor gate_up = tensor_slice(s->gate_up, 0, M), out = tensor_slice(s->out, 0, M);
    Tensor sorted = ARENA_TENSOR(p->scratch, h.dtype, M, D);
    Tensor gate = ARENA_TENSOR(p->scratch, h.dtype, M, F), up = arena_like(p->scratch, gate);
    gather_rows(sorted, h, tensor_slice(s->source, 0, M));
    linear_forward_grouped(&m->gate_up_proj, gate_up, sorted, groups_of(s), p);
    split_halves(gate, up, gate_up);
    gelu_mul_forward(gate, gate, up);
    linear_forward_grouped(&m->down_proj, out, gate, groups_of(s), p);
    combine_forward(y, s->out, s->slot, s->share, s->experts, m->per_expert_scale->value);
    arena_release(p->scratch, mark);
}

void moe_backward(const Moe *m, const MoeSaved *s, Tensor dh, Tensor dx, Tensor dy, Tensor h,
                  Tensor x, Pass *p) {
    size_t mark = arena_mark(p->scratch);
    int64_t N = tensor_rows(h), E = m->config.num_experts, M = routed_rows(s);
    int64_t F = m->config.moe_intermediate_size, D = m->config.hidden_size;
    Tensor gate_up = tensor_slice(s->gate_up, 0, M), out = tensor_slice(s->out, 0, M);
    Tensor dout = arena_like(p->scratch, out), dshare = arena_like(p->scratch, s->share);
    combine_backward(dout, dshare, m->per_expert_scale->grad, dy, out, s->slot, s->share,
                     s->experts, m->per_expert_scale->value);

    Tensor sorted = ARENA_TENSOR(p->scratch, h.dtype, M, D),
           dsorted = arena_like(p->scratch, sorted);
    Tensor gate = ARENA_TENSOR(p->scratch, h.dtype, M, F), up = arena_like(p->scratch, gate);
    Tensor hidden = arena_like(p->scratch, gate), dhidden = arena_like(p->scratch, gate);
    Tensor dgate_up = arena_like(p->scratch, gate_up);
    gather_rows(sorted, h, tensor_slice(s->source, 0, M));
    split_halves(gate, up, gate_up);
    gelu_mul_forward(hidden, gate, up);
    linear_backward_grouped(&m->down_proj, dhidden, SET, dout, hidden, groups_of(s), p);
    gelu_mul_backward(gate, dhidden, dhidden, gate, up); /* gate: dgate, dhidden: dup */
    join_halves(dgate_up, gate, dhidden);
    linear_backward_grouped(&m->gate_up_proj, dsorted, SET, dgate_up, sorted, groups_of(s), p);
    fill(dh, 0.0f);
    gather_add_rows(dh, dsorted, s->slot);

    Tensor balance = load_gradient(m, p);
    Tensor dlogits = ARENA_TENSOR(p->scratch, h.dtype, N, E), r = router_input(m, s, p),
           dr = arena_like(p->scratch, r);
    router_backward(dlogits, dshare, s->probs, s->share, s->experts, balance);
    linear_backward(&m->router_proj, dr, SET, dlogits, r, p);
    scale_copy(dr, SET, dr, 1.0f / sqrtf((float)D));
    if (m->router_scale->trainable) dot_columns(m->router_scale->grad, dr, s->normed);
    Tensor scale = ARENA_TENSOR(p->scratch, F32, D);
    scale_copy(scale, SET, m->router_scale->value, 1.0f);
    scale_columns(dr, SET, dr, scale);
    rmsnorm_backward(dx, ADD, tensor_absent(), dr, x, s->router_rstd, tensor_absent());
    arena_release(p->scratch, mark);
}
