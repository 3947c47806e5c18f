/* attention.h - grouped-query attention with normalised, rotated heads and shared K/V.
 *
 * K and V live in a slot of the pass, one for each layer that owns them; a layer that shares has no
 * k_proj and reads the slot of an earlier layer of its kind. In the backward pass every reader adds
 * to the slot's dk and dv; blocks run in reverse, so the owner finds them complete. */
#ifndef MODEL_ATTENTION_H
#define MODEL_ATTENTION_H

#include "model/linear.h"
#include "model/norm.h"

typedef struct Attention {
    Linear q_proj, k_proj, v_proj, o_proj; /* v_proj only when V is not the raw K */
    Norm q_norm, k_norm, v_norm;           /* v_norm has no weight */
    BlockConfig config;
} Attention;

typedef struct AttentionSaved {
    Tensor q_raw, q, out; /* (N, H, C): projected; normalised and rotated; attended */
    Tensor q_rstd, lse;   /* (N, H) f32 */
    Tensor k_raw, v_raw;  /* (N, K, C); owners only; v_raw is k_raw when V comes from K */
    Tensor k_rstd, v_rstd;
} AttentionSaved;

void attention_declare(Attention *a, ParamList *params, LinearList *list, const BlockConfig *c);
void attention_reserve(AttentionSaved *s, Arena *arena, const BlockConfig *c, DType dtype,
                       int64_t N);
void attention_layer_forward(const Attention *a, AttentionSaved *s, Tensor y, Tensor x, Pass *p);
void attention_layer_backward(const Attention *a, const AttentionSaved *s, Tensor dx, Write write,
                              Tensor dy, Tensor x, Pass *p);

#endif
