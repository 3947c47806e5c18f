/* block.c - x1 = x + norm(attention(norm(x)));  x2 = x1 + norm(feed_forward(x1));
 *           x3 = x2 + norm(projection(gelu(gate(x2)) * per_layer));  y = layer_scalar * x3.
 *
 * With experts the feed-forward is norm_1(mlp(norm(x1))) + norm_2'(experts(norm_2(x1))), the router
 * reading x1. Normalised inputs are not saved: from x and rstd they are one pass over memory away.
 */
#include "model/block.h"
#include "kernels/activation.h"
#include "kernels/elementwise.h"

void block_declare(Block *b, ParamList *params, LinearList *list, const BlockConfig *c) {
    int64_t D = c->hidden_size;
    b->config = *c;
    params_enter(params, "layers.%d", c->layer);
    attention_declare(&b->self_attn, params, list, c);
    mlp_declare(&b->mlp, params, list, c);
    norm_declare(&b->input_layernorm, params, "input_layernorm", D, c->eps);
    norm_declare(&b->post_attention_layernorm, params, "post_attention_layernorm", D, c->eps);
    norm_declare(&b->pre_feedforward_layernorm, params, "pre_feedforward_layernorm", D, c->eps);
    norm_declare(&b->post_feedforward_layernorm, params, "post_feedforward_layernorm", D, c->eps);
    if (c->num_experts) {
        moe_declare(&b->moe, params, list, c);
        norm_declare(&b->post_feedforward_layernorm_1, params, "post_feedforward_layernorm_1", D,
                     c->eps);
        norm_declare(&b->pre_feedforward_layernorm_2, params, "pre_feedforward_layernorm_2", D,
                     c->eps);
        norm_declare(&b->post_feedforward_layernorm_2, params, "post_feedforward_layernorm_2", D,
                     c->eps);
    }
    if (c->per_layer_input) {
        linear_declare(&b->per_layer_input_gate, params, list, "per_layer_input_gate",
                       c->per_layer_input, D);
        linear_declare(&b->per_layer_projection, params, list, "per_layer_projection", D,
                       c->per_layer_input);
        norm_declare(&b->post_per_layer_input_norm, params, "post_per_layer_input_norm", D, c->eps);
    }
    b->scalar = 1.0f;
    if (!c->unscaled) {
        b->layer_scalar = PARAMS_ADD(params, "layer_scalar", 1);
        b->layer_scalar->buffer = true;
    }
    params_leave(params);
}

void block_reserve(BlockSaved *s, Arena *arena, const BlockConfig *c, DType dtype, int64_t N) {
    int64_t D = c->hidden_size;
    *s = (BlockSaved){0};
    attention_reserve(&s->attention, arena, c, dtype, N);
    mlp_reserve(&s->mlp, arena, c, dtype, N);
    s->attended = ARENA_TENSOR(arena, dtype, N, D);
    s->x1 = ARENA_TENSOR(arena, dtype, N, D);
    s->input_rstd = ARENA_TENSOR(arena, F32, N);
    s->attended_rstd = ARENA_TENSOR(arena, F32, N);
    s->x1_rstd = ARENA_TENSOR(arena, F32, N);
    s->fed_rstd = ARENA_TENSOR(arena, F32, c->num_experts ? 3 : 1, N);
    s->fed[0] = ARENA_TENSOR(arena, dtype, N, D);
    if (c->num_experts) {
        s->fed[1] = ARENA_TENSOR(arena, dtype, N, D);
        moe_reserve(&s->moe, arena, c, dtype, N);
    }
    if (c->per_layer_input) {
        s->x2 = ARENA_TENSOR(arena, dtype, N, D);
        s->gate = ARENA_TENSOR(arena, dtype, N, c->per_layer_input);
        s->projected = ARENA_TENSOR(arena, dtype, N, D);
        s->projected_rstd = ARENA_TENSOR(arena, F32, N);
    }
}

/* h, and where there are experts h2: s->x1 normalised. Where nothing is trained h2 is made here, of
 * h's memory. */
static void feed_forward(const Block *b, BlockSaved *s, Tensor h, Tensor h2, Pass *p) {
    size_t mark = arena_mark(p->scratch);
    mlp_forward(&b->mlp, &s->mlp, s->fed[0], h, p);
    if (b->config.num_experts) {
        Norm router = moe_router_norm(&b->moe);
        if (!p->training)
            norm_forward_several((const Norm *[]){&b->pre_feedforward_layernorm_2, &router},
                                 (Tensor[]){h2, s->moe.router_input}, 2, tensor_absent(), s->x1);
        moe_forward(&b->moe, &s->moe, s->fed[1], h2, p);
    }
    arena_release(p->scratch, mark);
}

static NormsJoined joined_norms(const Block *b) {
    return (NormsJoined){{&b->post_feedforward_layernorm_1, &b->post_feedforward_layernorm_2},
                         &b->post_feedforward_layernorm};
}

/* The next layer's input, which this one leaves with its own end where it is known. */
static NormNext leaves_next(Pass *p) {
    p->is_entered = !p->training && p->next;
    if (!p->is_entered) return (NormNext){0};
    p->entered = p->leaving;
    return (NormNext){
        .norm = p->next,
        .y = p->leaving,
        .codes = p->reader ? pass_codes(p, p->leaving, p->reader) : tensor_absent(),
    };
}

/* What only a way back reads. */
static Tensor kept(Tensor rstd, const Pass *p) {
    return p->training ? rstd : tensor_absent();
}

/* y = scale * (x1 + norm(fed)), and what comes next of it. */
static void add_fed(const Block *b, const BlockSaved *s, Tensor y, float scale, NormNext next,
                    Pass *p) {
    Tensor rstd = kept(s->fed_rstd, p);
    if (b->config.num_experts) {
        NormsJoined norms = joined_norms(b);
        norm_join(&norms, y, rstd, s->fed, s->x1, scale, next);
    } else {
        norm_pair(&b->post_feedforward_layernorm, y, rstd, s->fed[0], s->x1, scale, next);
    }
}

void block_forward(const Block *b, BlockSaved *s, Tensor y, Tensor x, Tensor per_layer, Pass *p) {
    size_t mark = arena_mark(p->scratch);
    Tensor h = arena_like(p->scratch, x);
    float scale = b->config.unscaled ? 1.0f : b->scalar;
    if (!p->is_entered) norm_forward(&b->input_layernorm, h, s->input_rstd, x, tensor_absent());
    attention_layer_forward(&b->self_attn, &s->attention, s->attended,
                            p->is_entered ? p->entered : h, p);
    Tensor h2 = h, attended_rstd = kept(s->attended_rstd, p);
    if (b->config.num_experts && p->training) {
        Norm router = moe_router_norm(&b->moe);
        h2 = arena_like(p->scratch, x);
        norm_forward(&b->post_attention_layernorm, s->x1, attended_rstd, s->attended, x);
        norm_forward_several((const Norm *[]){&b->pre_feedforward_layernorm,
                                              &b->pre_feedforward_layernorm_2, &router},
                             (Tensor[]){h, h2, s->moe.router_input}, 3, s->x1_rstd, s->x1);
    } else {
        NormNext next = {
            .norm = &b->pre_feedforward_layernorm,
            .y = h,
            .rstd = kept(s->x1_rstd, p),
            .codes = pass_codes(p, h, &b->mlp.gate_proj),
        };
        norm_pair(&b->post_attention_layernorm, s->x1, attended_rstd, s->attended, x, 1.0f, next);
    }
    feed_forward(b, s, h, h2, p);
    if (b->config.per_layer_input) {
        Tensor u = arena_like(p->scratch, s->gate);
        add_fed(b, s, s->x2, 1.0f, (NormNext){0}, p);
        linear_forward(&b->per_layer_input_gate, s->gate, s->x2, p);
        gelu_mul_forward(u, s->gate, per_layer);
        linear_forward(&b->per_layer_projection, s->projected, u, p);
        norm_pair(&b->post_per_layer_input_norm, y, kept(s->projected_rstd, p), s->projected, s->x2,
                  scale, leaves_next(p));
    } else {
        add_fed(b, s, y, scale, leaves_next(p), p);
    }
    arena_release(p->scratch, mark);
}

/* dx1, which holds the gradient arriving by the residual, gets that of the feed-forward added:
 * dfed[0], dfed[1] are those of what it made. */
static void feed_forward_backward(const Block *b, const BlockSaved *s, Tensor dx1,
                                  const Tensor *dfed, Pass *p) {
    size_t mark = arena_mark(p->scratch);
    Tensor h = arena_like(p->scratch, s->x1), dh = arena_like(p->scratch, s->x1);
    norm_apply(&b->pre_feedforward_layernorm, h, s->x1_rstd, s->x1);
    mlp_backward(&b->mlp, &s->mlp, dh, SET, dfed[0], h, p);
    if (!b->config.num_experts) {
        norm_backward(&b->pre_feedforward_layernorm, dx1, ADD, dh, s->x1, s->x1_rstd);
    } else {
        if (moe_reads_input(&b->moe))
            norm_apply(&b->pre_feedforward_layernorm_2, h, s->x1_rstd, s->x1);
        Tensor dh2 = arena_like(p->scratch, s->x1), drouter = arena_like(p->scratch, s->x1);
        Norm router = moe_router_norm(&b->moe);
        moe_backward(&b->moe, &s->moe, dh2, drouter, dfed[1], h, p);
        norm_backward_several((const Norm *[]){&b->pre_feedforward_layernorm,
                                               &b->pre_feedforward_layernorm_2, &router},
                              dx1, ADD, (Tensor[]){dh, dh2, drouter}, 3, s->x1, s->x1_rstd);
    }
    arena_release(p->scratch, mark);
}

/* dx1 = scale * dy, the gradient by the residual, and those of fed. dx1 may be dy. */
static void add_fed_backward(const Block *b, const BlockSaved *s, Tensor *dfed, Tensor dx1,
                             Tensor dy, float scale, Pass *p) {
    if (b->config.num_experts) {
        NormsJoined norms = joined_norms(b);
        dfed[1] = arena_like(p->scratch, dx1);
        norm_join_backward(&norms, dfed, dx1, dy, s->fed_rstd, s->fed, scale, p->scratch);
    } else {
        if (scale != 1.0f || dx1.data != dy.data) scale_copy(dx1, SET, dy, scale);
        norm_backward(&b->post_feedforward_layernorm, dfed[0], SET, dx1, s->fed[0], s->fed_rstd);
    }
}

void block_backward(const Block *b, const BlockSaved *s, Tensor dx, Tensor dper_layer, Tensor dy,
                    Tensor x, Tensor per_layer, Pass *p) {
    size_t mark = arena_mark(p->scratch);
    Tensor h = arena_like(p->scratch, x), dbranch = arena_like(p->scratch, x),
           dfed[] = {dbranch, tensor_absent()};
    float scale = b->scalar; /* until dx carries the residual's gradient, from there down */
    if (b->config.per_layer_input) {
        scale_copy(dx, SET, dy, scale);
        dy = dx;
        scale = 1.0f;
        Tensor u = arena_like(p->scratch, s->gate), du = arena_like(p->scratch, s->gate);
        if (linear_reads_input(&b->per_layer_projection)) gelu_mul_forward(u, s->gate, per_layer);
        norm_backward(&b->post_per_layer_input_norm, dbranch, SET, dx, s->projected,
                      s->projected_rstd);
        linear_backward(&b->per_layer_projection, du, SET, dbranch, u, p);
        gelu_mul_backward(u, dper_layer, tensor_absent(), du, s->gate, per_layer); /* u: dgate */
        linear_backward(&b->per_layer_input_gate, dx, ADD, u, s->x2, p);
    }
    add_fed_backward(b, s, dfed, dx, dy, scale, p);
    feed_forward_backward(b, s, dx, dfed, p);
    norm_backward(&b->post_attention_layernorm, dbranch, SET, dx, s->attended, s->attended_rstd);
    norm_apply(&b->input_layernorm, h, s->input_rstd, x);
    Tensor dh = arena_like(p->scratch, x);
    attention_layer_backward(&b->self_attn, &s->attention, dh, SET, dbranch, h, p);
    norm_backward(&b->input_layernorm, dx, ADD, dh, x, s->input_rstd);
    arena_release(p->scratch, mark);
}
