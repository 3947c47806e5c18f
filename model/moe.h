/* moe.h - the router and the routed experts of a mixture-of-experts block. */
#ifndef MOE_H
#define MOE_H

#include "model/linear.h"
#include "model/norm.h"

typedef struct Moe {
    Linear router_proj;      /* router.proj (E, D) */
    Param *router_scale;     /* router.scale (D) */
    Param *per_expert_scale; /* router.per_expert_scale (E) */
    Linear gate_up_proj;     /* experts.gate_up_proj (E, 2 F, D): rows of gate, then of up */
    Linear down_proj;        /* experts.down_proj (E, D, F) */
    BlockConfig config;
} Moe;

typedef struct MoeSaved {
    Tensor router_input;  /* (N, D): x through the router's norm */
    Tensor probs;         /* (N, E) f32 */
    Tensor share;         /* (N, A) f32 */
    Tensor experts, slot; /* (N, A) i32 */
    Tensor offsets;       /* (E + 1) i32 */
    Tensor counts;        /* (E) i32 */
    Tensor source;        /* (M) i32 */
    Tensor gate_up;       /* (M, 2 F) in sorted order; of the rows that came here, where experts are
                           * shared out */
    /* Where experts are shared out, of the rows that came here, T of at most R * M: */
    Tensor came;        /* (R, E) i32: rows with padding from each rank for each expert here */
    Tensor groups;      /* (E + 1) i32: where each expert's rows begin */
    Tensor counts_here; /* (E) i32 */
    Tensor order, back; /* (T) i32: the places in order of ranks of rows by experts; the reverse */
} MoeSaved;

void moe_declare(Moe *m, ParamList *params, LinearList *list, const BlockConfig *c);
void moe_reserve(MoeSaved *s, Arena *arena, const BlockConfig *c, DType dtype, int64_t N);

/* y (N, D) = sum of chosen experts of h; the router reads s->router_input, which is there. */
void moe_forward(const Moe *m, MoeSaved *s, Tensor y, Tensor h, Pass *p);

/* Whether the way back reads h; else it may be absent there. */
bool moe_reads_input(const Moe *m);

/* dh and drouter, of what the router reads, are set. */
void moe_backward(const Moe *m, const MoeSaved *s, Tensor dh, Tensor drouter, Tensor dy, Tensor h,
                  Pass *p);

/* r = norm(x) * scale * D^-1/2, in the two roundings of the reference. */
Norm moe_router_norm(const Moe *m);

/* Load of the experts over one pass, all layers pooled: what the balancing loss is made of. */
typedef struct ExpertLoad {
    int64_t rows;               /* rows times layers */
    double counts[EXPERTS_MAX]; /* assignments to each expert */
    double probs[EXPERTS_MAX];  /* sum of its probabilities */
    float *by_layer;            /* (L, E) assignments, summed over passes; NULL: not wanted */
} ExpertLoad;

/* Sums what a forward pass of N rows left in the pass's tensors. */
void expert_load_collect(ExpertLoad *load, const Pass *p, int64_t N);

void expert_load_clear(ExpertLoad *load); /* but for by_layer */

/* Makes it that of the rows of all ranks, but for by_layer. */
void expert_load_sum(ExpertLoad *load, const Comm *comm);

/* The balancing loss of a pass: E * sum_e f_e P_e, f_e the assignments to e and P_e its mean
 * probability per pooled row (top_k when balanced). */
double expert_load_loss(const ExpertLoad *load, int64_t num_experts);

#endif
