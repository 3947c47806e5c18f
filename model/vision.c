/* vision.c - h = W_in (2 (pixels - 1/2)) + P[0][x] + P[1][y]; blocks in which every patch sees all
 * of its picture, heads turning half by x and half by y; the mean of each cell times sqrt(D);
 * (z - std_bias) std_scale where the model standardises. */
#include "model/vision.h"
#include "kernels/convolution.h"
#include "kernels/elementwise.h"
#include "kernels/embedding.h"
#include "kernels/rope.h"

#include <math.h>
#include <stdlib.h>

void vision_declare(Vision *v, ParamList *params, LinearList *list, const VisionConfig *c) {
    int64_t D = c->hidden_size;
    *v = (Vision){.config = *c};
    params_enter(params, "vision_tower");
    params_enter(params, "patch_embedder");
    linear_declare(&v->input_proj, params, list, "input_proj", D,
                   3 * c->patch_size * c->patch_size);
    v->position_embedding_table =
        PARAMS_ADD(params, "position_embedding_table", 2, c->position_embedding_size, D);
    params_leave(params);
    params_enter(params, "encoder");
    v->blocks = must_calloc((size_t)c->num_hidden_layers, sizeof *v->blocks);
    for (int l = 0; l < c->num_hidden_layers; l++) {
        BlockConfig block = vision_block_config(c, l);
        block_declare(&v->blocks[l], params, list, &block);
    }
    params_leave(params);
    if (c->standardize) {
        v->std_bias = PARAMS_ADD(params, "std_bias", D);
        v->std_scale = PARAMS_ADD(params, "std_scale", D);
        v->std_bias->buffer = v->std_scale->buffer = true;
    }
    params_leave(params);
}

void vision_free(Vision *v) {
    free(v->blocks);
    *v = (Vision){0};
}

void vision_open(VisionSaved *s, const Vision *v, StackMode mode) {
    size_t L = (size_t)v->config.num_hidden_layers;
    *s = (VisionSaved){.mode = mode};
    s->slots = must_calloc(L, sizeof *s->slots);
    s->saved = must_calloc(L, sizeof *s->saved);
    s->residual = must_calloc(L + 1, sizeof *s->residual);
}

void vision_close(VisionSaved *s) {
    free(s->slots);
    free(s->saved);
    free(s->residual);
    *s = (VisionSaved){0};
}

/* What one block of `N` patches leaves, its keys and values included. */
static void place_block(VisionSaved *s, const Vision *v, Arena *arena, DType dtype, int l) {
    const BlockConfig *c = &v->blocks[l].config;
    block_reserve(&s->saved[l], arena, c, dtype, s->N);
    s->slots[l].k = ARENA_TENSOR(arena, dtype, s->N, c->num_key_value_heads, c->head_dim);
    s->slots[l].v = arena_like(arena, s->slots[l].k);
}

void vision_place(VisionSaved *s, const Vision *v, Arena *arena, DType dtype, int64_t N) {
    const VisionConfig *c = &v->config;
    int L = (int)c->num_hidden_layers;
    int64_t D = c->hidden_size;
    s->N = N;
    s->rows = (Rows){.count = N,
                     .index[FULL] = ARENA_TENSOR(arena, I32, N),
                     .first[FULL] = ARENA_TENSOR(arena, I32, N),
                     .last[FULL] = ARENA_TENSOR(arena, I32, N),
                     .cos[FULL] = ARENA_TENSOR(arena, F32, N, 2, c->head_dim / 4),
                     .sin[FULL] = ARENA_TENSOR(arena, F32, N, 2, c->head_dim / 4)};
    s->columns = ARENA_TENSOR(arena, I32, N);
    s->lines = ARENA_TENSOR(arena, I32, N);
    s->pixels = ARENA_TENSOR(arena, dtype, N, 3 * c->patch_size * c->patch_size);
    for (int l = 0; l <= L; l++)
        s->residual[l] = s->mode == STACK_SCORE && l >= 2 ? s->residual[l - 2]
                                                          : ARENA_TENSOR(arena, dtype, N, D);
    size_t start = arena->used;
    for (int l = 0; l < L; l++) { /* where nothing is kept all blocks have one place */
        if (s->mode != STACK_KEEP) arena->used = start;
        place_block(s, v, arena, dtype, l);
    }
    if (s->mode == STACK_SCORE) return;
    const BlockConfig *block = &v->blocks[0].config;
    Tensor dk = ARENA_TENSOR(arena, F32, N, block->num_key_value_heads, block->head_dim),
           dv = arena_like(arena, dk);
    for (int l = 0; l < L; l++) s->slots[l].dk = dk, s->slots[l].dv = dv;
}

/* Every patch sees all of them; tables and turns by its place. */
static void send_places(const Vision *v, VisionSaved *s, const int32_t *places, Arena *scratch) {
    int64_t N = s->N, quarter = v->config.head_dim / 4;
    size_t mark = arena_mark(scratch);
    Tensor both = ARENA_TENSOR(scratch, I32, 2 * N);
    if (!places) { /* only measured */
        arena_release(scratch, mark);
        return;
    }
    int32_t *line = must_malloc((size_t)N * sizeof *line);
    Tensor *const lists[] = {&s->rows.index[FULL], &s->rows.first[FULL], &s->rows.last[FULL],
                             &s->columns, &s->lines};
    for (int i = 0; i < 5; i++) {
        for (int64_t n = 0; n < N; n++)
            line[n] = i == 0   ? (int32_t)n
                      : i == 1 ? 0
                      : i == 2 ? (int32_t)N - 1
                               : places[2 * n + i - 3];
        tensor_write(*lists[i], line);
    }
    tensor_write(both, places);
    rope_table(RESHAPE(s->rows.cos[FULL], 2 * N, quarter),
               RESHAPE(s->rows.sin[FULL], 2 * N, quarter), both, (float)v->config.rope_theta,
               quarter, 1.0f);
    free(line);
    arena_release(scratch, mark);
}

static void embed(const Vision *v, VisionSaved *s, const float *pixels, Pass *p) {
    size_t mark = arena_mark(p->scratch);
    Tensor values = ARENA_TENSOR(p->scratch, F32, s->N, tensor_cols(s->pixels)),
           lines = arena_like(p->scratch, s->residual[0]),
           table = v->position_embedding_table->value;
    tensor_write(values, pixels);
    Tensor one = ARENA_TENSOR(p->scratch, F32, tensor_cols(values));
    fill(one, -1.0f);
    scale_copy(values, SET, values, 2.0f);
    shift_columns(values, values, one);
    scale_copy(s->pixels, SET, values, 1.0f);
    Tensor x = arena_like(p->scratch, s->residual[0]);
    embedding_forward(x, tensor_at(table, 0), 0, s->columns, 1.0f);
    embedding_forward(lines, tensor_at(table, 1), 0, s->lines, 1.0f);
    add_scaled(lines, x, lines, 1.0f);
    linear_forward(&v->input_proj, x, s->pixels, p);
    add_scaled(s->residual[0], x, lines, 1.0f);
    arena_release(p->scratch, mark);
}

/* The pass as the tower's blocks see it. */
static Pass pass_of(VisionSaved *s, const Pass *p) {
    return (Pass){.rows = &s->rows,
                  .slots = s->slots,
                  .scratch = p->scratch,
                  .training = p->training,
                  .key = p->key};
}

void vision_forward(const Vision *v, VisionSaved *s, Tensor out, const float *pixels,
                    const int32_t *places, Pass *p) {
    int L = (int)v->config.num_hidden_layers;
    Pass pass = pass_of(s, p);
    size_t mark = arena_mark(p->scratch);
    send_places(v, s, places, p->scratch);
    embed(v, s, pixels, &pass);
    for (int l = 0; l < L; l++)
        block_forward(&v->blocks[l], &s->saved[l], s->residual[l + 1], s->residual[l],
                      tensor_absent(), &pass);
    Tensor means = ARENA_TENSOR(p->scratch, F32, tensor_rows(out), tensor_cols(out));
    pool_rows_forward(means, s->residual[L], sqrtf((float)v->config.hidden_size));
    if (v->std_bias)
        standardize(out, means, v->std_bias->value, v->std_scale->value);
    else
        scale_copy(out, SET, means, 1.0f);
    arena_release(p->scratch, mark);
}

void vision_backward(const Vision *v, VisionSaved *s, Tensor dout, Pass *p) {
    int L = (int)v->config.num_hidden_layers;
    Pass pass = pass_of(s, p);
    size_t mark = arena_mark(p->scratch);
    Tensor dmeans = ARENA_TENSOR(p->scratch, F32, tensor_rows(dout), tensor_cols(dout));
    scale_copy(dmeans, SET, dout, 1.0f);
    if (v->std_bias) scale_columns(dmeans, SET, dmeans, v->std_scale->value, 1.0f);
    Tensor d = arena_like(p->scratch, s->residual[L]);
    pool_rows_backward(d, dmeans, sqrtf((float)v->config.hidden_size));
    for (int l = L - 1; l >= 0; l--) {
        if (stack_mode_recomputes(s->mode)) {
            size_t inner = arena_mark(p->scratch);
            block_forward(&v->blocks[l], &s->saved[l], arena_like(p->scratch, d), s->residual[l],
                          tensor_absent(), &pass);
            arena_release(p->scratch, inner);
        }
        block_backward(&v->blocks[l], &s->saved[l], d, tensor_absent(), d, s->residual[l],
                       tensor_absent(), &pass);
    }
    linear_backward(&v->input_proj, tensor_absent(), SET, d, s->pixels, &pass);
    if (v->position_embedding_table->trainable) {
        Tensor grad = v->position_embedding_table->grad;
        embedding_backward(tensor_at(grad, 0), 0, d, s->columns, 1.0f, -1);
        embedding_backward(tensor_at(grad, 1), 0, d, s->lines, 1.0f, -1);
    }
    arena_release(p->scratch, mark);
}
