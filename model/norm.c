/* norm.c - root-mean-square norm layers. */
#include "model/norm.h"
#include "kernels/elementwise.h"
#include "kernels/norm.h"

void norm_declare(Norm *n, ParamList *params, const char *name, int64_t D, float eps) {
    params_enter(params, "%s", name);
    n->weight = PARAMS_ADD(params, "weight", D);
    n->weight->decay = false;
    n->eps = eps;
    params_leave(params);
}

static Tensor weight_of(const Norm *n) {
    return n->weight ? n->weight->value : tensor_absent();
}

void norm_forward(const Norm *n, Tensor y, Tensor rstd, Tensor x, Tensor residual) {
    rmsnorm_forward(y, rstd, x, weight_of(n), residual, n->eps);
}

static NextNorm next_of(NormNext next) {
    if (!next.norm) return (NextNorm){.y = tensor_absent()};
    return (NextNorm){next.y, next.rstd, weight_of(next.norm), next.codes};
}

void norm_pair(const Norm *n, Tensor y, Tensor rstd, Tensor x, Tensor residual, float scale,
               NormNext next) {
    NextNorm after = next_of(next);
    rmsnorm_pair(y, rstd, x, weight_of(n), residual, scale, &after, n->eps);
}

void norm_apply(const Norm *n, Tensor y, Tensor rstd, Tensor x) {
    rmsnorm_apply(y, rstd, x, weight_of(n));
}

void norm_backward(const Norm *n, Tensor dx, Write write, Tensor dy, Tensor x, Tensor rstd) {
    rmsnorm_backward(dx, write, n->weight ? n->weight->grad : tensor_absent(), dy, x, rstd,
                     weight_of(n));
}

static NormWeight factored(const Norm *n) {
    return (NormWeight){weight_of(n), n->factor};
}

void norm_forward_several(const Norm *const *n, const Tensor *y, int count, Tensor rstd, Tensor x) {
    NormWeight weights[NORMS_MOST];
    for (int i = 0; i < count; i++) weights[i] = factored(n[i]);
    rmsnorm_forward_several(y, rstd, x, weights, count, n[0]->eps);
}

void norm_backward_several(const Norm *const *n, Tensor dx, Write write, const Tensor *dy,
                           int count, Tensor x, Tensor rstd) {
    NormWeight weights[NORMS_MOST];
    for (int i = 0; i < count; i++) {
        weights[i] = factored(n[i]);
        if (!n[i]->weight || !tensor_present(n[i]->weight->grad)) continue;
        if (n[i]->factor) {
            scale_copy(dy[i], SET, dy[i], n[i]->factor);
            weights[i].factor = 1.0f;
        }
        norm_backward(n[i], tensor_absent(), SET, dy[i], x, rstd);
    }
    rmsnorm_backward_several(dx, write, dy, x, rstd, weights, count);
}

static NormJoin joined(const NormsJoined *n, const Tensor *x, Tensor rstd) {
    return (NormJoin){
        .x = {x[0], x[1]},
        .weight = {weight_of(n->branch[0]), weight_of(n->branch[1]), weight_of(n->sum)},
        .rstd = rstd};
}

void norm_join(const NormsJoined *n, Tensor y, Tensor rstd, const Tensor *x, Tensor residual,
               float scale, NormNext next) {
    NormJoin join = joined(n, x, rstd);
    NextNorm after = next_of(next);
    rmsnorm_join(y, &join, residual, scale, &after, n->sum->eps);
}

void norm_join_backward(const NormsJoined *n, const Tensor *dx, Tensor dresidual, Tensor dy,
                        Tensor rstd, const Tensor *x, float scale, Arena *scratch) {
    size_t mark = arena_mark(scratch);
    NormJoin join = joined(n, x, rstd);
    const Norm *norms[] = {n->branch[0], n->branch[1], n->sum};
    Tensor none = tensor_absent(), fed = none, dfed = none;
    bool trained = false;
    for (int i = 0; i < 3; i++) trained = trained || norms[i]->weight->trainable;
    if (trained) {
        fed = arena_like(scratch, dy);
        dfed = arena_like(scratch, dy);
    }
    rmsnorm_join_backward(dx, dresidual, fed, dfed, dy, &join, scale);
    for (int i = 0; i < 3; i++)
        if (norms[i]->weight->trainable)
            norm_backward(norms[i], none, SET, i < 2 ? dfed : dresidual, i < 2 ? x[i] : fed,
                          tensor_slice(rstd, i, 1));
    arena_release(scratch, mark);
}
