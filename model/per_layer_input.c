/* per_layer_input.c - projection of the embedding plus a looked-up row, one slice for each layer.
 */
#include "model/per_layer_input.h"
#include "kernels/elementwise.h"
#include "kernels/embedding.h"

#include <math.h>

void per_layer_input_declare(PerLayerInput *m, ParamList *params, LinearList *list,
                             const ModelConfig *c) {
    m->L = c->num_hidden_layers;
    m->P = c->hidden_size_per_layer_input;
    m->D = c->hidden_size;
    m->pad = (int32_t)c->pad_token_id;
    params_enter(params, "embed_tokens_per_layer");
    m->embed_tokens_per_layer =
        PARAMS_ADD(params, "weight", c->vocab_size_per_layer_input, m->L * m->P);
    m->embed_tokens_per_layer->mapped = true;
    params_leave(params);
    linear_declare(&m->per_layer_model_projection, params, list, "per_layer_model_projection",
                   m->L * m->P, m->D);
    norm_declare(&m->per_layer_projection_norm, params, "per_layer_projection_norm", m->P,
                 (float)c->rms_norm_eps);
}

void per_layer_input_reserve(PerLayerInputSaved *s, Arena *arena, const PerLayerInput *m,
                             DType dtype, int64_t N) {
    s->projected = ARENA_TENSOR(arena, dtype, N, m->L * m->P);
    s->rstd = ARENA_TENSOR(arena, F32, N * m->L);
    s->out = ARENA_TENSOR(arena, dtype, m->L, N, m->P);
}

void per_layer_input_forward(const PerLayerInput *m, PerLayerInputSaved *s, Tensor x0, Tensor ids,
                             Pass *p) {
    size_t mark = arena_mark(p->scratch);
    int64_t N = tensor_rows(x0);
    linear_forward(&m->per_layer_model_projection, s->projected, x0, p);
    scale_copy(s->projected, SET, s->projected, 1.0f / sqrtf((float)m->D));
    Tensor table = arena_like(p->scratch, s->projected),
           context = arena_like(p->scratch, s->projected);
    Tensor stored = m->embed_tokens_per_layer->value;
    if (fake_quant_on(m->fake) && m->fake->embeddings && fake_quant_fits(m->fake, m->L * m->P) &&
        !scheme_holds(m->fake->scheme, stored.dtype)) {
        embedding_forward(table, stored, 0, ids, 1.0f);
        fake_quantize(table, table, tensor_absent(), m->fake->scheme, m->fake->blend);
        scale_copy(table, SET, table, sqrtf((float)m->P));
    } else {
        embedding_forward(table, stored, 0, ids, sqrtf((float)m->P));
    }
    norm_forward(&m->per_layer_projection_norm, RESHAPE(context, N * m->L, m->P), s->rstd,
                 RESHAPE(s->projected, N * m->L, m->P), tensor_absent());
    add_scaled(context, context, table, sqrtf(0.5f));
    swap_outer(s->out, RESHAPE(context, N, m->L, m->P));
    arena_release(p->scratch, mark);
}

bool per_layer_input_trains(const PerLayerInput *m) {
    return m->embed_tokens_per_layer->trainable ||
           m->per_layer_model_projection.weight->trainable ||
           m->per_layer_projection_norm.weight->trainable || m->per_layer_model_projection.lora;
}

void per_layer_input_backward(const PerLayerInput *m, const PerLayerInputSaved *s, Tensor dx0,
                              Tensor dout, Tensor x0, Tensor ids, Pass *p) {
    size_t mark = arena_mark(p->scratch);
    int64_t N = tensor_rows(x0);
    Tensor dsum = arena_like(p->scratch, s->projected);
    swap_outer(RESHAPE(dsum, N, m->L, m->P), dout);
    scale_copy(dsum, SET, dsum, sqrtf(0.5f));
    if (m->embed_tokens_per_layer->trainable)
        embedding_backward(m->embed_tokens_per_layer->grad, 0, dsum, ids, sqrtf((float)m->P),
                           m->pad);
    norm_backward(&m->per_layer_projection_norm, RESHAPE(dsum, N * m->L, m->P), SET,
                  RESHAPE(dsum, N * m->L, m->P), RESHAPE(s->projected, N * m->L, m->P), s->rstd);
    scale_copy(dsum, SET, dsum, 1.0f / sqrtf((float)m->D));
    linear_backward(&m->per_layer_model_projection, dx0, ADD, dsum, x0, p);
    arena_release(p->scratch, mark);
}
