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

static RowGroups groups_of(const MoeSaved *s) {
    return (RowGroups){s->offsets, s->counts};
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

void moe_forward(const Moe *m, MoeSaved *s, Tensor y, Tensor h, Tensor x, Pass *p) {
    size_t mark = arena_mark(p->scratch);
    int64_t N = tensor_rows(h), E = m->config.num_experts;
    int64_t F = m->config.moe_intermediate_size, D = m->config.hidden_size;
    rmsnorm_forward(s->normed, s->router_rstd, x, tensor_absent(), tensor_absent(), m->config.eps);
    Tensor r = router_input(m, s, p), logits = ARENA_TENSOR(p->scratch, h.dtype, N, E);
    linear_forward(&m->router_proj, logits, r, p);
    router_forward(s->probs, s->share, s->experts, logits);
    routing_sort(s->offsets, s->counts, s->slot, s->source, s->experts);
    count_load(m, s, p);

    int64_t M = tensor_rows(s->gate_up);
    Tensor sorted = ARENA_TENSOR(p->scratch, h.dtype, M, D);
    Tensor hidden = ARENA_TENSOR(p->scratch, h.dtype, M, F);
    gather_rows(sorted, h, s->source);
    linear_forward_grouped(&m->gate_up_proj, s->gate_up, sorted, groups_of(s), p);
    gelu_mul_joined_forward(hidden, s->gate_up);
    linear_forward_grouped(&m->down_proj, s->out, hidden, groups_of(s), p);
    combine_forward(y, s->out, s->slot, s->share, s->experts, m->per_expert_scale->value);
    arena_release(p->scratch, mark);
}

void moe_backward(const Moe *m, const MoeSaved *s, Tensor dh, Tensor dx, Tensor dy, Tensor h,
                  Tensor x, Pass *p) {
    size_t mark = arena_mark(p->scratch);
    int64_t N = tensor_rows(h), E = m->config.num_experts, M = tensor_rows(s->gate_up);
    int64_t F = m->config.moe_intermediate_size, D = m->config.hidden_size;
    Tensor dout = arena_like(p->scratch, s->out), dshare = arena_like(p->scratch, s->share);
    combine_backward(dout, dshare, m->per_expert_scale->grad, dy, s->out, s->slot, s->share,
                     s->experts, m->per_expert_scale->value);

    Tensor sorted = ARENA_TENSOR(p->scratch, h.dtype, M, D),
           dsorted = arena_like(p->scratch, sorted);
    Tensor hidden = ARENA_TENSOR(p->scratch, h.dtype, M, F),
           dhidden = arena_like(p->scratch, hidden);
    Tensor dgate_up = arena_like(p->scratch, s->gate_up);
    gather_rows(sorted, h, s->source);
    gelu_mul_joined_forward(hidden, s->gate_up);
    linear_backward_grouped(&m->down_proj, dhidden, SET, dout, hidden, groups_of(s), p);
    gelu_mul_joined_backward(dgate_up, dhidden, s->gate_up);
    linear_backward_grouped(&m->gate_up_proj, dsorted, SET, dgate_up, sorted, groups_of(s), p);
    fill(dh, 0.0f);
    gather_add_rows(dh, dsorted, s->slot);

    Tensor dlogits = ARENA_TENSOR(p->scratch, h.dtype, N, E), r = router_input(m, s, p),
           dr = arena_like(p->scratch, r);
    router_backward(dlogits, dshare, s->probs, s->share, s->experts, p->balance);
    linear_backward(&m->router_proj, dr, SET, dlogits, r, p);
    scale_copy(dr, SET, dr, 1.0f / sqrtf((float)D));
    if (m->router_scale->trainable) dot_columns(m->router_scale->grad, dr, s->normed);
    Tensor scale = ARENA_TENSOR(p->scratch, F32, D);
    scale_copy(scale, SET, m->router_scale->value, 1.0f);
    scale_columns(dr, SET, dr, scale);
    rmsnorm_backward(dx, ADD, tensor_absent(), dr, x, s->router_rstd, tensor_absent());
    arena_release(p->scratch, mark);
}
