/* linear.h - y = x W^T, with everything a training method may hang on it.
 *
 * Full training is a weight with a gradient; LoRA is `lora`; DoRA is a lora with a magnitude; a
 * group dimension makes it the matrices of all experts. Linear saves nothing but an adapter's few
 * ranks: its input is its caller's. */
#ifndef LINEAR_H
#define LINEAR_H

#include "model/fake_quant.h"
#include "model/params.h"
#include "model/pass.h"

/* y += scale * dropout(x) A^T B^T, (Hu et al. 2021). With a magnitude m (DoRA, Liu et al. 2024):
 * y = m / |W + scale B A| * (x W^T + scale x A^T B^T), the norm of each output row held constant in
 * the backward pass as peft does. */
typedef struct Lora {
    Param *A;         /* (G, R, in) f32; G dropped when 1 */
    Param *B;         /* (G, out, R) f32 */
    Param *magnitude; /* (out) f32; NULL: not DoRA */
    Tensor factor;    /* (out) f32: m / |W + scale B A|, renewed by linear_refresh; DoRA only */
    int64_t rank;
    float scale, dropout;
    Tensor u;     /* (N, R) f32: x A^T of the last training pass, for its way back; absent: it is
                   * made again (linear_keep) */
    uint64_t key; /* of the dropout masks */
    int number;   /* which of several adapters it belongs to, from 1; see Rows.adapters. 0: the
                   * only one */
    struct Lora *next; /* another adapter's; only where models are run, not trained */
} Lora;

typedef struct Linear {
    int64_t in, out, groups;   /* groups: experts, those of this rank; 1 for a dense layer */
    Param *weight;             /* (out, in) or (groups, out, in) */
    Lora *lora;                /* NULL: no adapter */
    const FakeQuant *fake;     /* NULL: weights are used as they are */
    Param *bias;               /* (out); NULL: none */
    Param *bounds[4];          /* (): input_min, input_max, output_min, output_max, between which
                                * input and output are clamped; NULL: as they are */
    float bound[4];            /* their values, once loaded (linear_loaded) */
    Param *factors;            /* (groups, out, in / 32) f32, learned, of the rounding's scales;
                                * groups dropped when 1; NULL: none */
    char name[PARAM_NAME_MAX]; /* full name of the module, or of the parameter when grouped */
    struct Linear *next;       /* the model's list of linears, in order of declaration */
} Linear;

/* Collects the linears of a model as they are declared. */
typedef struct LinearList {
    Linear *first, **end;
} LinearList;

/* Declares name.weight (out, in). */
void linear_declare(Linear *l, ParamList *params, LinearList *list, const char *name, int64_t out,
                    int64_t in);

/* The same as a kind says: name.linear.weight, and name.input_min and its like, never trained. */
void linear_declare_kind(Linear *l, ParamList *params, LinearList *list, LinearKind kind,
                         const char *name, int64_t out, int64_t in);

/* Keeps the bounds' values on the host. */
void linear_loaded(Linear *l);

/* Declares name (groups, out, in), without the .weight suffix: fused experts. */
void linear_declare_grouped(Linear *l, ParamList *params, LinearList *list, const char *name,
                            int64_t groups, int64_t out, int64_t in);

/* Rows of x sorted by group: group g has counts[g] of them from offsets[g] on, and padding up to
 * offsets[g + 1].   offsets (G + 1), counts (G)  i32; absent where there is one group */
typedef struct RowGroups {
    Tensor offsets, counts;
} RowGroups;

/* Leaves groups `first` .. first + n - 1 here, other ranks having the rest; once everything that
 * hangs on it is declared, before it is placed. */
void linear_take_groups(Linear *l, int64_t first, int64_t n);

/* Groups of all ranks. */
static inline int64_t linear_all_groups(const Linear *l) {
    return l->weight->groups ? l->weight->groups : l->groups;
}

/* Declares l->factors under the linear's name, trainable; they start as 1. */
void linear_learn_scales(Linear *l, ParamList *params);

/* The factors that go into the rounding of rows first .. first + n - 1 of group g; absent when
 * there are none, or the scheme takes none. */
Tensor linear_factors(const Linear *l, int64_t g, int64_t first, int64_t n);

/* Places what the way back needs of passes of up to N rows; of linears that run once in a pass. */
void linear_keep(Linear *l, Arena *arena, int64_t N);

/* y (N, out) = x (N, in) W^T + adapter. */
void linear_forward(const Linear *l, Tensor y, Tensor x, Pass *p);
void linear_forward_grouped(const Linear *l, Tensor y, Tensor x, RowGroups groups, Pass *p);

/* The same of several linears that read one x, at most three, into y[i]: at once, where they
 * are of one kind. */
void linear_forward_several(const Linear *const *l, const Tensor *y, int count, Tensor x, Pass *p);

/* Where the codes of x go, which the caller's kernel makes with it; the linear that is run next
 * reads them. Absent: it rounds for itself, or reads x as it is. */
Tensor pass_codes(Pass *p, Tensor x, const Linear *reader);

/* y (N, V) = x W^T for a matrix that is no linear's: the tied head. */
void project(Tensor y, Tensor x, Tensor weight, bool int8);

/* The way back of an x that is made on it, from the same as dx goes on to: first dx, and what goes
 * back through the adapter, in scratch (absent: none); then the gradients that read x. Only where
 * linear_parts_backward says that it can be taken apart. */
bool linear_parts_backward(const Linear *l, const Pass *p);
Tensor linear_backward_to_input(const Linear *l, Tensor dx, Write write, Tensor dy, Pass *p);
void linear_backward_from_input(const Linear *l, Tensor du, Tensor dy, Tensor x, Pass *p);

/* Whether the way back reads x; else it may be absent there, and need not be made again. */
bool linear_reads_input(const Linear *l);

/* dx (=|+=) dy W + adapter, absent dx: not needed; gradients of weight and adapter are added to.
 * Where outputs are clamped they are computed once more, to know which of them were. */
void linear_backward(const Linear *l, Tensor dx, Write write, Tensor dy, Tensor x, Pass *p);
/* The same of several linears that read one x, at most three, from dy[i]; dx is the sum. */
void linear_backward_several(const Linear *const *l, Tensor dx, Write write, const Tensor *dy,
                             int count, Tensor x, Pass *p);

void linear_backward_grouped(const Linear *l, Tensor dx, Write write, Tensor dy, Tensor x,
                             RowGroups groups, Pass *p);

/* sum (n, in) f32 = rows first .. first + n - 1 of W + scale B A, of group g (0 when dense). */
void linear_sum_rows(const Linear *l, int64_t g, int64_t first, Tensor sum);

/* The same times DoRA's factor: rows of the weight that merging leaves. */
void linear_merged_rows(const Linear *l, int64_t g, int64_t first, Tensor rows);

/* Renews what depends on the adapter's values alone (DoRA's factor); once before the passes of a
 * step. */
void linear_refresh(Linear *l, Arena *scratch);

#endif
