/* unified.h - pictures without a tower: each soft token is one merged patch, normalised and
 * projected. */
#ifndef UNIFIED_H
#define UNIFIED_H

#include "model/linear.h"
#include "model/norm.h"

typedef struct LayerNorm {
    Param *weight, *bias; /* (D) */
} LayerNorm;

typedef struct Unified {
    VisionConfig config;
    LayerNorm patch_ln1, patch_ln2, pos_norm;
    Linear patch_dense;   /* with a bias */
    Param *pos_embedding; /* (positions, 2, D): of columns, of rows */
} Unified;

/* Declares vision_embedder.* below the path that is entered. */
void unified_declare(Unified *u, ParamList *params, LinearList *list, const VisionConfig *c);

/* out (N, mm_embed_dim) from merged patches (N, 3 side^2) f32 in [0, 1] and their places (N, 2)
 * i32, x before y; both in host memory. */
void unified_forward(const Unified *u, Tensor out, const float *patches, const int32_t *places,
                     Pass *p);

/* Gradients of the weights from dout; everything before it is computed again. */
void unified_backward(const Unified *u, Tensor dout, const float *patches, const int32_t *places,
                      Pass *p);

#endif
