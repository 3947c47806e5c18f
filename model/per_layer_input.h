/* per_layer_input.h - the second, per-layer embedding of E2B and E4B.
 *
 *   A = (x0 W^T) * D^-1/2, normalised over P for each layer;  B = table[ids] * sqrt(P)
 *   per_layer[l] = (A_l + B_l) / sqrt(2)
 * The table is most of the checkpoint; frozen, it stays in the mapped file and only the rows of the
 * batch's tokens are touched. */
#ifndef PER_LAYER_INPUT_H
#define PER_LAYER_INPUT_H

#include "model/linear.h"
#include "model/norm.h"

typedef struct PerLayerInput {
    Param *embed_tokens_per_layer;     /* (V, L P) */
    Linear per_layer_model_projection; /* (L P, D) */
    Norm per_layer_projection_norm;    /* (P), one weight for all layers */
    const FakeQuant *fake; /* rounds the table when its embeddings are on; NULL: never */
    int64_t L, P, D;
    int32_t pad; /* the lookup of this id trains nothing, as in the reference */
} PerLayerInput;

typedef struct PerLayerInputSaved {
    Tensor projected; /* (N, L P), scaled by D^-1/2 */
    Tensor rstd;      /* (N L) f32 */
    Tensor out;       /* (L, N, P) */
} PerLayerInputSaved;

void per_layer_input_declare(PerLayerInput *m, ParamList *params, LinearList *list,
                             const ModelConfig *c);
void per_layer_input_reserve(PerLayerInputSaved *s, Arena *arena, const PerLayerInput *m,
                             DType dtype, int64_t N);

/* s->out from the scaled embeddings x0 (N, D) and the token ids (N). */
void per_layer_input_forward(const PerLayerInput *m, PerLayerInputSaved *s, Tensor x0, Tensor ids,
                             Pass *p);

/* Whether anything here or below wants dout. */
bool per_layer_input_trains(const PerLayerInput *m);

/* dx0 gets the context path's part added (absent: not needed); dout is (L, N, P). */
void per_layer_input_backward(const PerLayerInput *m, const PerLayerInputSaved *s, Tensor dx0,
                              Tensor dout, Tensor x0, Tensor ids, Pass *p);

#endif
