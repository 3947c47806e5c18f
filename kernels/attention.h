/* attention.h - softmax attention where each query sees one interval of keys.
 *
 * Causality, sliding windows, packed segments and bidirectional spans all leave every query an
 * interval first..last of the key axis, so two integers a query state any mask of this model
 * family. Scores are q.k with no scale (the q norm carries it).
 *
 * Keys lie in order, or in pages: then every sequence has a key axis of its own, cut in runs of
 * PAGE_KEYS that may lie anywhere. */
#ifndef ATTENTION_KERNEL_H
#define ATTENTION_KERNEL_H

#include "kernels/kernel.h"

#define PAGE_KEYS 64

/* y = softmax(q k^T over keys first[n] .. last[n]) v, softmax in f32.
 *   y, q         (N, H, C)  f32 | bf16
 *   k, v         (S, K, C)  dtype of q, or packed (forward only); head h reads head h / (H / K)
 *   lse          (N, H)     f32: log of the sum of exponentials, kept for the backward pass
 *   codes        u8, of y as rows (N, H C) (int8_codes); absent: nobody wants them
 *   index        (N)        i32, ascending: the place of each query on the key axis. Work is cut
 *                           into tiles by this place, so leaving queries out changes no bit of the
 *                           others
 *   first, last  (N)        i32, inclusive, first <= last
 *   sequence     (N)        i32, ascending: the row of `pages` that a query reads; index ascends
 *                           within a sequence. Absent: keys lie in order
 *   pages        (R, P)     i32: key s of sequence r is k[pages[r, s / PAGE_KEYS] * PAGE_KEYS +
 *                           s % PAGE_KEYS] */
KERNEL(attention_forward, Tensor y, Tensor lse, Tensor codes, Tensor q, Tensor k, Tensor v,
       Tensor index, Tensor first, Tensor last, Tensor sequence, Tensor pages);

/* dq from dy; dk and dv (=|+=) what the queries send to them, all of them.
 *   dq, dy, y   (N, H, C)  dtype of q
 *   dk, dv      (S, K, C)  f32
 *   partial     (G, 2, S, K, C) f32, G = attention_partials(K); scratch, absent when G is 1 */
KERNEL(attention_backward, Tensor dq, Tensor dk, Tensor dv, Write write, Tensor dy, Tensor y,
       Tensor lse, Tensor q, Tensor k, Tensor v, Tensor index, Tensor first, Tensor last,
       Tensor partial);

/* How many partial sums of dk and dv the backward pass keeps: enough work items for few key heads.
 * A function of the shape alone, so results do not depend on the thread count. */
static inline int64_t attention_partials(int64_t kv_heads) {
    return kv_heads >= 8 ? 1 : 8 / kv_heads;
}

#endif
