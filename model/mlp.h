/* mlp.h - the gated feed-forward of every block. */
#ifndef MLP_H
#define MLP_H

#include "model/linear.h"

typedef struct Mlp {
    Linear gate_proj, up_proj, down_proj;
} Mlp;

typedef struct MlpSaved { /* left by forward for backward */
    Tensor gate, up;      /* (N, F) */
} MlpSaved;

void mlp_declare(Mlp *m, ParamList *params, LinearList *list, const BlockConfig *c);
void mlp_reserve(MlpSaved *s, Arena *arena, const BlockConfig *c, DType dtype, int64_t N);
void mlp_forward(const Mlp *m, MlpSaved *s, Tensor y, Tensor x, Pass *p);
void mlp_backward(const Mlp *m, const MlpSaved *s, Tensor dx, Write write, Tensor dy, Tensor x,
                  Pass *p);

#endif
