/* norm.h - the layer of kernels/norm.h: a weight, or none. */
#ifndef MODEL_NORM_H
#define MODEL_NORM_H

#include "model/params.h"

typedef struct Norm {
    Param *weight; /* (D); NULL: without scale */
    float eps;
    float factor; /* of norms that have one (NormWeight); 0: none. Only among several */
} Norm;

/* Declares name.weight (D); norms are not decayed. */
void norm_declare(Norm *n, ParamList *params, const char *name, int64_t D, float eps);

/* y = residual + norm(x), rstd kept when given; residual absent: none. */
void norm_forward(const Norm *n, Tensor y, Tensor rstd, Tensor x, Tensor residual);

/* Another norm of what one has made, wherever it is wanted, and what is kept of it (NextNorm); norm
 * NULL: nowhere. */
typedef struct NormNext {
    const Norm *norm;
    Tensor y, rstd, codes;
} NormNext;

/* y = scale * (residual + norm(x)), and what comes next of it; rstd kept when given. */
void norm_pair(const Norm *n, Tensor y, Tensor rstd, Tensor x, Tensor residual, float scale,
               NormNext next);

/* Several norms of one x, whose rstd is one, and their way back into dx; dy may be scaled. */
void norm_forward_several(const Norm *const *n, const Tensor *y, int count, Tensor rstd, Tensor x);
void norm_backward_several(const Norm *const *n, Tensor dx, Write write, const Tensor *dy,
                           int count, Tensor x, Tensor rstd);

/* The norms of two branches, and that of their sum. */
typedef struct NormsJoined {
    const Norm *branch[2], *sum;
} NormsJoined;

/* y = scale * (residual + norm(norm(x[0]) + norm(x[1]))), and what comes next of it; rstd (3, N),
 * absent where nothing is trained. */
void norm_join(const NormsJoined *n, Tensor y, Tensor rstd, const Tensor *x, Tensor residual,
               float scale, NormNext next);

/* dx[i] = gradients of the branches, dresidual = scale * dy, which may be dy. */
void norm_join_backward(const NormsJoined *n, const Tensor *dx, Tensor dresidual, Tensor dy,
                        Tensor rstd, const Tensor *x, float scale, Arena *scratch);

/* y = norm(x) again, bit for bit, from the kept rstd. */
void norm_apply(const Norm *n, Tensor y, Tensor rstd, Tensor x);

/* dx (=|+=) gradient of norm(x); the residual's gradient is dy itself. */
void norm_backward(const Norm *n, Tensor dx, Write write, Tensor dy, Tensor x, Tensor rstd);

#endif
