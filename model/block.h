/* block.h - one layer of the text model. */
#ifndef BLOCK_H
#define BLOCK_H

#include "model/attention.h"
#include "model/mlp.h"
#include "model/moe.h"

typedef struct Block {
    BlockConfig config;
    Norm input_layernorm, post_attention_layernorm, pre_feedforward_layernorm,
        post_feedforward_layernorm;
    Attention self_attn;
    Mlp mlp;
    /* mixture of experts only */
    Moe moe;
    Norm post_feedforward_layernorm_1, pre_feedforward_layernorm_2, post_feedforward_layernorm_2;
    /* per-layer input only */
    Linear per_layer_input_gate, per_layer_projection;
    Norm post_per_layer_input_norm;
    Param *layer_scalar; /* (1), a buffer: never trained; NULL: none */
    float scalar;        /* its value, once loaded (gemma_loaded) */
} Block;

typedef struct BlockSaved {
    AttentionSaved attention;
    MlpSaved mlp;
    MoeSaved moe;
    Tensor attended;  /* (N, D) output of attention */
    Tensor x1;        /* (N, D) after the first residual */
    Tensor fed[2];    /* (N, D) output of the feed-forward; with experts, of both branches */
    Tensor x2;        /* (N, D) after the second residual; per-layer input only */
    Tensor gate;      /* (N, P) */
    Tensor projected; /* (N, D) */
    Tensor input_rstd, attended_rstd, x1_rstd, projected_rstd; /* (N) */
    Tensor fed_rstd; /* (1, N); with experts (3, N), of the branches and of their sum */
} BlockSaved;

void block_declare(Block *b, ParamList *params, LinearList *list, const BlockConfig *c);
void block_reserve(BlockSaved *s, Arena *arena, const BlockConfig *c, DType dtype, int64_t N);

/* y (N, D) from x (N, D) and this layer's per-layer input (N, P), absent where the model has none.
 * y may not alias x. */
void block_forward(const Block *b, BlockSaved *s, Tensor y, Tensor x, Tensor per_layer, Pass *p);

/* dx is set from dy; dper_layer (N, P), when present, is set. dx may alias dy. */
void block_backward(const Block *b, const BlockSaved *s, Tensor dx, Tensor dper_layer, Tensor dy,
                    Tensor x, Tensor per_layer, Pass *p);

#endif
