/* attention.c - q, k, v from x; heads normalised; q and k rotated; attended; o_proj.
 *
 * v is normalised without a weight and not rotated. Where V comes from K it is the raw k_proj
 * output under v's norm, so it differs from K. Scores have no scale. */
#include "model/attention.h"
#include "kernels/attention.h"
#include "kernels/elementwise.h"
#include "kernels/heads.h"
#include "kernels/norm.h"
#include "kernels/quantize.h"
#include "kernels/rope.h"

void attention_declare(Attention *a, ParamList *params, LinearList *list, const BlockConfig *c) {
    int64_t C = c->head_dim, kv = c->num_key_value_heads * C, D = c->hidden_size;
    a->config = *c;
    params_enter(params, "self_attn");
    linear_declare_kind(&a->q_proj, params, list, c->linears, "q_proj", c->num_attention_heads * C,
                        D);
    norm_declare(&a->q_norm, params, "q_norm", C, c->eps);
    if (c->owns_kv) {
        linear_declare_kind(&a->k_proj, params, list, c->linears, "k_proj", kv, D);
        norm_declare(&a->k_norm, params, "k_norm", C, c->eps);
        if (!c->v_from_k)
            linear_declare_kind(&a->v_proj, params, list, c->linears, "v_proj", kv, D);
        a->v_norm = (Norm){.eps = c->eps};
    }
    linear_declare_kind(&a->o_proj, params, list, c->linears, "o_proj", D,
                        c->num_attention_heads * C);
    params_leave(params);
}

void attention_reserve(AttentionSaved *s, Arena *arena, const BlockConfig *c, DType dtype,
                       int64_t N) {
    int64_t H = c->num_attention_heads, K = c->num_key_value_heads, C = c->head_dim;
    *s = (AttentionSaved){0};
    s->q_raw = ARENA_TENSOR(arena, dtype, N, H, C);
    s->q = ARENA_TENSOR(arena, dtype, N, H, C);
    s->out = ARENA_TENSOR(arena, dtype, N, H, C);
    s->q_rstd = ARENA_TENSOR(arena, F32, N, H);
    s->lse = ARENA_TENSOR(arena, F32, N, H);
    if (!c->owns_kv) return;
    s->k_raw = ARENA_TENSOR(arena, dtype, N, K, C);
    s->k_rstd = ARENA_TENSOR(arena, F32, N, K);
    s->v_raw = c->v_from_k ? s->k_raw : ARENA_TENSOR(arena, dtype, N, K, C);
    s->v_rstd = ARENA_TENSOR(arena, F32, N, K);
}

static Tensor flat(Tensor heads) {
    return RESHAPE(heads, heads.shape[0], heads.shape[1] * heads.shape[2]);
}

/* How many of q_proj, k_proj and v_proj there are. */
static int projections(const BlockConfig *c) {
    return !c->owns_kv ? 1 : c->v_from_k ? 2 : 3;
}

/* q, k and v from x, as they come out of their products. */
static void project_heads(const Attention *a, AttentionSaved *s, Tensor x, Pass *p) {
    const BlockConfig *c = &a->config;
    const Linear *linears[] = {&a->q_proj, &a->k_proj, &a->v_proj};
    Tensor out[] = {flat(s->q_raw), tensor_absent(), tensor_absent()};
    if (c->owns_kv) out[1] = flat(s->k_raw);
    if (c->owns_kv && !c->v_from_k) out[2] = flat(s->v_raw);
    linear_forward_several(linears, out, projections(c), x, p);
}

/* Heads normalised and turned: queries where attention reads them, keys and values into k and v, at
 * the rows `place` says where that is there. All at once, unless a picture's axes turn apart. */
static void make_heads(const Attention *a, AttentionSaved *s, Tensor k, Tensor v, Tensor place,
                       Pass *p) {
    const BlockConfig *c = &a->config;
    Tensor cos = p->rows->cos[c->kind], sin = p->rows->sin[c->kind];
    if (cos.ndim == 2) {
        HeadSet sets[HEAD_SETS] = {
            [0] = {s->q, s->q_raw, a->q_norm.weight->value, tensor_absent(), s->q_rstd, true}};
        if (c->owns_kv) {
            sets[1] = (HeadSet){k, s->k_raw, a->k_norm.weight->value, place, s->k_rstd, true};
            sets[2] = (HeadSet){v, s->v_raw, tensor_absent(), place, s->v_rstd, false};
        }
        heads_forward(sets, c->owns_kv ? 3 : 1, cos, sin, c->eps);
        return;
    }
    norm_forward(&a->q_norm, s->q, s->q_rstd, s->q_raw, tensor_absent());
    rope_forward(s->q, s->q, cos, sin);
    if (!c->owns_kv) return;
    norm_forward(&a->k_norm, k, s->k_rstd, s->k_raw, tensor_absent());
    rope_forward(k, k, cos, sin);
    norm_forward(&a->v_norm, v, s->v_rstd, s->v_raw, tensor_absent());
}

/* Rows of keys or values made apart, to where attention reads them. */
static void deliver(Tensor slot, Tensor rows, AttentionKind kind, Pass *p) {
    if (p->context)
        context_gather(p->context, kind, slot, rows, p->scratch);
    else
        store_rows(slot, rows, p->rows->place[kind]);
}

void attention_layer_forward(const Attention *a, AttentionSaved *s, Tensor y, Tensor x, Pass *p) {
    const BlockConfig *c = &a->config;
    const Rows *rows = p->rows;
    KvSlot *slot = &p->slots[c->kv_layer];
    bool paged = tensor_present(rows->sequence), /* a packed slot takes rows that are there */
        apart = c->owns_kv && (p->context || (paged && slot->k.dtype != s->k_raw.dtype));
    size_t mark = arena_mark(p->scratch);
    Tensor k = apart ? arena_like(p->scratch, s->k_raw) : slot->k,
           v = apart ? arena_like(p->scratch, s->v_raw) : slot->v;
    project_heads(a, s, x, p);
    make_heads(a, s, k, v, paged && !apart ? rows->place[c->kind] : tensor_absent(), p);
    if (apart) {
        deliver(slot->k, k, c->kind, p);
        deliver(slot->v, v, c->kind, p);
    }
    arena_release(p->scratch, mark);
    attention_forward(s->out, s->lse, pass_codes(p, flat(s->out), &a->o_proj), s->q, slot->k,
                      slot->v, rows->index[c->kind], rows->first[c->kind], rows->last[c->kind],
                      rows->sequence, rows->pages[c->kind]);
    linear_forward(&a->o_proj, y, flat(s->out), p);
}

/* f32, of the shape of `like`: the slot's gradient of the keys that are rows here. */
static Tensor own_gradient(Pass *p, AttentionKind kind, Tensor dslot, Tensor like) {
    if (!p->context) return dslot;
    Tensor own = arena_tensor(p->scratch, F32, like.ndim, like.shape);
    context_return(p->context, kind, own, dslot, p->scratch);
    return own;
}

/* The gradient of a norm's weight, where it is trained, from dy of its heads turned. */
static void train_norm(const Norm *n, Tensor dy, Tensor x, Tensor rstd, Tensor cos, Tensor sin,
                       Pass *p) {
    if (!tensor_present(n->weight->grad)) return;
    size_t mark = arena_mark(p->scratch);
    Tensor back = arena_like(p->scratch, x);
    rope_backward(back, dy, cos, sin);
    norm_backward(n, tensor_absent(), SET, back, x, rstd);
    arena_release(p->scratch, mark);
}

/* Of make_heads: through turns and norms. */
static void return_heads(const HeadGradient *sets, int count, Tensor cos, Tensor sin) {
    if (cos.ndim == 2) {
        heads_backward(sets, count, cos, sin);
        return;
    }
    for (int i = 0; i < count; i++) {
        const HeadGradient *s = &sets[i];
        CHECK(!tensor_present(s->also), "heads of axes: no gradient comes from elsewhere");
        if (s->turns)
            rope_backward(s->dx, s->dy, cos, sin);
        else
            scale_copy(s->dx, SET, s->dy, 1.0f);
        rmsnorm_backward(s->dx, SET, tensor_absent(), s->dx, s->x, s->rstd, s->weight);
    }
}

void attention_layer_backward(const Attention *a, const AttentionSaved *s, Tensor dx, Write write,
                              Tensor dy, Tensor x, Pass *p) {
    const BlockConfig *c = &a->config;
    const Rows *rows = p->rows;
    KvSlot *slot = &p->slots[c->kv_layer];
    Tensor cos = rows->cos[c->kind], sin = rows->sin[c->kind];
    size_t mark = arena_mark(p->scratch);

    Tensor dout = arena_like(p->scratch, s->out), dq = arena_like(p->scratch, s->q),
           dheads[] = {flat(dq), tensor_absent(), tensor_absent()};
    HeadGradient sets[HEAD_SETS] = {
        [0] = {dq, dq, tensor_absent(), s->q_raw, a->q_norm.weight->value, s->q_rstd, true}};
    int64_t G = attention_partials(c->num_key_value_heads);
    Tensor partial = G == 1 ? tensor_absent()
                            : ARENA_TENSOR(p->scratch, F32, 2 * G, slot->k.shape[0],
                                           slot->k.shape[1], slot->k.shape[2]);
    linear_backward(&a->o_proj, flat(dout), SET, dy, flat(s->out), p);
    attention_backward(dq, slot->dk, slot->dv, slot->begun ? ADD : SET, dout, s->out, s->lse, s->q,
                       slot->k, slot->v, rows->index[c->kind], rows->first[c->kind],
                       rows->last[c->kind], partial);
    slot->begun = !c->owns_kv; /* who owns them comes last */
    if (c->owns_kv) {
        Tensor dk = arena_like(p->scratch, s->k_raw),
               dk_sum = own_gradient(p, c->kind, slot->dk, s->k_raw),
               dv_sum = own_gradient(p, c->kind, slot->dv, s->v_raw);
        Tensor none = tensor_absent(), wk = a->k_norm.weight->value;
        train_norm(&a->k_norm, dk_sum, s->k_raw, s->k_rstd, cos, sin, p);
        sets[1] = (HeadGradient){dk, dk_sum, none, s->k_raw, wk, s->k_rstd, true};
        dheads[1] = flat(dk);
        if (c->v_from_k) { /* both paths end in the raw K */
            sets[1].also = dv_sum;
        } else {
            Tensor dv = arena_like(p->scratch, s->v_raw);
            sets[2] = (HeadGradient){dv, dv_sum, none, s->v_raw, none, s->v_rstd, false};
            dheads[2] = flat(dv);
        }
    }
    train_norm(&a->q_norm, dq, s->q_raw, s->q_rstd, cos, sin, p);
    return_heads(sets, projections(c), cos, sin);
    linear_backward_several((const Linear *[]){&a->q_proj, &a->k_proj, &a->v_proj}, dx, write,
                            dheads, projections(c), x, p);
    arena_release(p->scratch, mark);
}
