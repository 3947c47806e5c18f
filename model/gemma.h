/* gemma.h - the whole model: embedding, per-layer input, blocks, final norm, tied head; and beside
 * it what turns pictures and sound into rows of the embedding, where that is asked for. */
#ifndef GEMMA_H
#define GEMMA_H

#include "model/block.h"
#include "model/media.h"
#include "model/per_layer_input.h"

/* Told after the forward pass of each layer: what mapped weights need to let go of their pages. */
typedef struct LayerWatch {
    void (*done)(void *context, int layer);
    void *context;
} LayerWatch;

typedef struct Gemma {
    ModelConfig config;
    DType dtype; /* of activations and frozen weights */
    bool int8;   /* run packed weights with activations in 8 bits; only with dtype bf16 */
    Device *device;
    FakeQuant fake;      /* linears that train through rounding point here */
    LayerWatch watch;    /* done NULL: nobody */
    const Comm *context; /* ranks that share the rows of each batch; NULL: none do */
    const Comm *experts; /* ranks that have the experts between them; NULL: each has all */
    ParamList params;
    LinearList linears;
    Param *embed_tokens;           /* (V, D), also the head */
    PerLayerInput per_layer_input; /* L == 0: the model has none */
    Media media;                   /* declared by gemma_declare_media alone */
    Block *blocks;
    Norm norm;
    /* of a drafter only: (token, state) of the other model in, its state out; and what tokens are
     * grouped by, where they are */
    Linear pre_projection, post_projection, centroids;
} Gemma;

/* Declares every parameter; nothing is taken yet. */
void gemma_declare(Gemma *g, const ModelConfig *config, DType dtype, Device *device);
void gemma_free(Gemma *g);

/* Leaves this rank its part of the experts; once adapters are declared, before anything is placed.
 * ERR_CONFIG: they cannot be dealt out so. */
Status gemma_share_experts(Gemma *g, const Comm *ranks);

/* Declares the towers and projections that config has, after gemma_declare. */
void gemma_declare_media(Gemma *g);

/* Keeps what passes need of the values on the host (layer_scalar, bounds): once after loading. */
void gemma_loaded(Gemma *g);

/* sqrt(D), rounded as the working dtype rounds it. */
float gemma_embedding_scale(const Gemma *g);

/* The linear of that full module (or fused parameter) name; NULL when there is none. */
Linear *gemma_find_linear(const Gemma *g, const char *name);

/* The linear whose weight that is; NULL for tables and vectors. */
Linear *gemma_owner(const Gemma *g, const Param *weight);

/* Renews what adapters derive from their values (linear_refresh of every linear): after loading
 * them and after every update, before anything is computed with them. */
void gemma_refresh(Gemma *g, Arena *scratch);

/* Whether the token table (and the head with it) is used rounded now. */
bool gemma_rounds_embedding(const Gemma *g);

/* Once the gradients of a step are summed: what straight-through rounding leaves of the gradients
 * of trained weights. Before clipping and the update. */
void gemma_finish_gradients(Gemma *g);

/* The same of one layer's weights, or of those in none (-1). */
void gemma_finish_layer(Gemma *g, int layer);

/* Whether the gradient of the scaled embeddings is wanted by anything. */
bool gemma_trains_embedding(const Gemma *g);

#endif
