/* mlp.c - the gated feed-forward: y = down_proj(gelu(gate_proj(x)) * up_proj(x)).
 *
 * gelu(gate) * up is cheap, so only gate and up are saved and the product is made again on the way
 * back, with the gradients of both; keeping it would cost a third (N, F) tensor per block. */
#include "model/mlp.h"
#include "kernels/activation.h"

void mlp_declare(Mlp *m, ParamList *params, LinearList *list, const BlockConfig *c) {
    params_enter(params, "mlp");
    linear_declare_kind(&m->gate_proj, params, list, c->linears, "gate_proj", c->intermediate_size,
                        c->hidden_size);
    linear_declare_kind(&m->up_proj, params, list, c->linears, "up_proj", c->intermediate_size,
                        c->hidden_size);
    linear_declare_kind(&m->down_proj, params, list, c->linears, "down_proj", c->hidden_size,
                        c->intermediate_size);
    params_leave(params);
}

void mlp_reserve(MlpSaved *s, Arena *arena, const BlockConfig *c, DType dtype, int64_t N) {
    s->gate = ARENA_TENSOR(arena, dtype, N, c->intermediate_size);
    s->up = ARENA_TENSOR(arena, dtype, N, c->intermediate_size);
}

void mlp_forward(const Mlp *m, MlpSaved *s, Tensor y, Tensor x, Pass *p) {
    size_t mark = arena_mark(p->scratch);
    Tensor hidden = arena_like(p->scratch, s->gate); /* (N, F) */
    linear_forward_several((const Linear *[]){&m->gate_proj, &m->up_proj},
                           (Tensor[]){s->gate, s->up}, 2, x, p);
    Tensor codes = pass_codes(p, hidden, &m->down_proj);
    if (tensor_present(codes))
        gelu_mul_codes(hidden, codes, s->gate, s->up);
    else
        gelu_mul_forward(hidden, s->gate, s->up);
    linear_forward(&m->down_proj, y, hidden, p);
    arena_release(p->scratch, mark);
}

void mlp_backward(const Mlp *m, const MlpSaved *s, Tensor dx, Write write, Tensor dy, Tensor x,
                  Pass *p) {
    size_t mark = arena_mark(p->scratch);
    Tensor hidden = tensor_absent(), dgate = arena_like(p->scratch, s->gate),
           dup = arena_like(p->scratch, s->gate);
    if (linear_reads_input(&m->down_proj)) hidden = arena_like(p->scratch, s->gate);
    if (linear_parts_backward(&m->down_proj, p)) {
        Tensor du = linear_backward_to_input(&m->down_proj, dup, SET, dy, p);
        gelu_mul_backward(dgate, dup, hidden, dup, s->gate, s->up);
        linear_backward_from_input(&m->down_proj, du, dy, hidden, p);
    } else {
        if (tensor_present(hidden)) gelu_mul_forward(hidden, s->gate, s->up);
        linear_backward(&m->down_proj, dup, SET, dy, hidden, p);
        gelu_mul_backward(dgate, dup, tensor_absent(), dup, s->gate, s->up);
    }
    linear_backward_several((const Linear *[]){&m->gate_proj, &m->up_proj}, dx, write,
                            (Tensor[]){dgate, dup}, 2, x, p);
    arena_release(p->scratch, mark);
}
