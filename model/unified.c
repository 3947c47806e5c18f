/* unified.c - out = LN3(LN2(dense(LN1(patch))) + P[x][0] + P[y][1]), LN with weight and bias. */
#include "model/unified.h"
#include "kernels/elementwise.h"
#include "kernels/embedding.h"
#include "kernels/norm.h"

#include <stdlib.h>

#define LAYER_NORM_EPS 1e-5f /* what the reference's layer norms have, whatever the config says */

static void layer_norm_declare(LayerNorm *n, ParamList *params, const char *name, int64_t D) {
    params_enter(params, "%s", name);
    n->weight = PARAMS_ADD(params, "weight", D);
    n->bias = PARAMS_ADD(params, "bias", D);
    n->weight->decay = n->bias->decay = false;
    params_leave(params);
}

void unified_declare(Unified *u, ParamList *params, LinearList *list, const VisionConfig *c) {
    int64_t D = c->mm_embed_dim, side = c->patch_size * c->pooling_kernel_size;
    *u = (Unified){.config = *c};
    params_enter(params, "vision_embedder");
    layer_norm_declare(&u->patch_ln1, params, "patch_ln1", 3 * side * side);
    linear_declare(&u->patch_dense, params, list, "patch_dense", D, 3 * side * side);
    u->patch_dense.bias = PARAMS_ADD(params, "patch_dense.bias", D);
    u->patch_dense.bias->decay = false;
    layer_norm_declare(&u->patch_ln2, params, "patch_ln2", D);
    u->pos_embedding = PARAMS_ADD(params, "pos_embedding", c->mm_posemb_size, 2, D);
    layer_norm_declare(&u->pos_norm, params, "pos_norm", D);
    params_leave(params);
}

/* A layer norm's input and what its backward pass needs. */
typedef struct Normed {
    Tensor x, mean, rstd;
} Normed;

static Normed normed(Tensor x, Arena *scratch) {
    return (Normed){x, ARENA_TENSOR(scratch, F32, tensor_rows(x)),
                    ARENA_TENSOR(scratch, F32, tensor_rows(x))};
}

static void layer_norm(const LayerNorm *n, Tensor y, const Normed *s) {
    layernorm_forward(y, s->mean, s->rstd, s->x, n->weight->value, n->bias->value, LAYER_NORM_EPS);
}

static void layer_norm_backward(const LayerNorm *n, Tensor dx, Tensor dy, const Normed *s) {
    layernorm_backward(dx, n->weight->grad, n->bias->grad, dy, s->x, s->mean, s->rstd,
                       n->weight->value);
}

/* Everything on the way, in scratch memory. */
typedef struct Way {
    Normed patches, dense, placed;
    Tensor normal;         /* of the patches: input of patch_dense */
    Tensor columns, lines; /* (N) i32: rows of pos_embedding as (2 positions, D) */
} Way;

static Tensor table_of(Tensor t) {
    return RESHAPE(t, t.shape[0] * 2, t.shape[2]);
}

static Way walk(const Unified *u, Tensor out, const float *patches, const int32_t *places,
                Pass *p) {
    Arena *scratch = p->scratch;
    int64_t N = tensor_rows(out), D = u->config.mm_embed_dim, in = u->patch_dense.in;
    Way w = {.normal = ARENA_TENSOR(scratch, out.dtype, N, in),
             .columns = ARENA_TENSOR(scratch, I32, N),
             .lines = ARENA_TENSOR(scratch, I32, N)};
    w.patches = normed(ARENA_TENSOR(scratch, out.dtype, N, in), scratch);
    w.dense = normed(ARENA_TENSOR(scratch, out.dtype, N, D), scratch);
    w.placed = normed(ARENA_TENSOR(scratch, out.dtype, N, D), scratch);
    size_t mark = arena_mark(scratch);
    Tensor values = ARENA_TENSOR(scratch, F32, N, in), column = arena_like(scratch, out),
           line = arena_like(scratch, out);
    int32_t *rows = must_malloc((size_t)N * sizeof *rows);
    for (int axis = 0; axis < 2; axis++) {
        for (int64_t n = 0; n < N && places; n++) rows[n] = 2 * places[2 * n + axis] + axis;
        if (places) tensor_write(axis ? w.lines : w.columns, rows);
    }
    free(rows);
    if (patches) tensor_write(values, patches);
    scale_copy(w.patches.x, SET, values, 1.0f);
    layer_norm(&u->patch_ln1, w.normal, &w.patches);
    linear_forward(&u->patch_dense, w.dense.x, w.normal, p);
    layer_norm(&u->patch_ln2, w.placed.x, &w.dense);
    embedding_forward(column, table_of(u->pos_embedding->value), 0, w.columns, 1.0f);
    embedding_forward(line, table_of(u->pos_embedding->value), 0, w.lines, 1.0f);
    add_scaled(column, column, line, 1.0f);
    add_scaled(w.placed.x, w.placed.x, column, 1.0f);
    layer_norm(&u->pos_norm, out, &w.placed);
    arena_release(scratch, mark);
    return w;
}

void unified_forward(const Unified *u, Tensor out, const float *patches, const int32_t *places,
                     Pass *p) {
    size_t mark = arena_mark(p->scratch);
    walk(u, out, patches, places, p);
    arena_release(p->scratch, mark);
}

void unified_backward(const Unified *u, Tensor dout, const float *patches, const int32_t *places,
                      Pass *p) {
    size_t mark = arena_mark(p->scratch);
    Tensor d = arena_like(p->scratch, dout);
    Way w = walk(u, d, patches, places, p);
    layer_norm_backward(&u->pos_norm, d, dout, &w.placed);
    if (u->pos_embedding->trainable) {
        Tensor grad = table_of(u->pos_embedding->grad);
        embedding_backward(grad, 0, d, w.columns, 1.0f, -1);
        embedding_backward(grad, 0, d, w.lines, 1.0f, -1);
    }
    layer_norm_backward(&u->patch_ln2, d, d, &w.dense);
    Tensor dnormal = arena_like(p->scratch, w.normal);
    linear_backward(&u->patch_dense, dnormal, SET, d, w.normal, p);
    layer_norm_backward(&u->patch_ln1, tensor_absent(), dnormal, &w.patches);
    arena_release(p->scratch, mark);
}
