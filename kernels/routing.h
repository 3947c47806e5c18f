/* routing.h - choosing experts, sorting rows by expert, and joining what the experts return. */
#ifndef ROUTING_H
#define ROUTING_H

#include "kernels/kernel.h"

/* Groups start at multiples of this many rows in the sorted order, so that grouped products see few
 * shapes. */
#define ROUTING_ALIGN 16

/* probs = softmax(logits) in f32; the A largest of each row, ties to the lowest expert,
 * renormalised to sum to one. probs    (N, E)  f32 share    (N, A)  f32: the renormalised
 * probabilities, before any per-expert scale experts  (N, A)  i32 logits   (N, E)  f32 | bf16 */
KERNEL(router_forward, Tensor probs, Tensor share, Tensor experts, Tensor logits);

/* dlogits of the renormalised top-A softmax, zero for experts not chosen, plus the gradient of the
 * load loss: p * (a - sum p a), a_e = balance[e]. dlogits  (N, E)  dtype of the logits dshare   (N,
 * A)  f32 balance  (E)     f32; absent means no load loss */
KERNEL(router_backward, Tensor dlogits, Tensor dshare, Tensor probs, Tensor share, Tensor experts,
       Tensor balance);

/* y[n] = sum over k of share[n,k] * scale[expert] * rows[slot[n,k]], summed in f32 in order of k.
 *   y      (N, D)  f32 | bf16
 *   rows   (M, D)  dtype of y: expert outputs in sorted order
 *   slot   (N, A)  i32
 *   scale  (E)     f32 | bf16 */
KERNEL(combine_forward, Tensor y, Tensor rows, Tensor slot, Tensor share, Tensor experts,
       Tensor scale);

/* weights[slot] = share * scale[expert]: by what a sorted row's result is multiplied; 0 where no
 * slot names a row. weights  (M)  f32 source   (M)  i32, -1 where no slot names a row */
KERNEL(row_weights, Tensor weights, Tensor slot, Tensor source, Tensor share, Tensor experts,
       Tensor scale);

/* The way back of those: dshare = scale * dweights[slot]; dscale[e] += share * dweights[slot].
 *   dweights  (M)     f32
 *   dscale    (E)     f32; absent means frozen */
KERNEL(row_weights_backward, Tensor dshare, Tensor dscale, Tensor dweights, Tensor slot,
       Tensor share, Tensor experts, Tensor scale);

/* The sorted order: row (n, k) goes to slot[n,k]; group e holds rows offsets[e] .. offsets[e+1],
 * which include up to ROUTING_ALIGN - 1 rows of padding; source[m] is n, or -1 for padding and for
 * what lies behind the last group.
 *   offsets  (E + 1)  i32      slot    (N, A)  i32
 *   counts   (E)      i32      source  (M)     i32, M = routing_rows(N, A, E) */
KERNEL(routing_sort, Tensor offsets, Tensor counts, Tensor slot, Tensor source, Tensor experts);

/* The most rows that N rows of A experts each take in sorted order. */
static inline int64_t routing_rows(int64_t N, int64_t A, int64_t E) {
    int64_t used = N * A < E ? N * A : E;
    int64_t rows = N * A + used * (ROUTING_ALIGN - 1);
    return (rows + ROUTING_ALIGN - 1) / ROUTING_ALIGN * ROUTING_ALIGN;
}

#endif
