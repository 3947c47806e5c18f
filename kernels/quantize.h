/* quantize.h - weights as blocks of small integers, and training that sees them so.
 *
 * Reading packed weights needs no call of its own: scale_copy, embedding_forward and matmul take
 * packed tensors as inputs. */
#ifndef QUANTIZE_H
#define QUANTIZE_H

#include "kernels/kernel.h"

/* packed = x in the packed dtype, by the rule of the program whose files hold it:
 *   Q4_0, Q8_0  ggml's reference quantiser, bit for bit (tiled: the same blocks in tiled order)
 *   NF4         bitsandbytes' blocks of 64; NF4_NESTED also its 8-bit scales, whose offset is the
 *               mean over the whole tensor, so x must be all of it
 *   packed, x   (..., K), x f32 | bf16 | f16, finite */
KERNEL(quantize, Tensor packed, Tensor x);

/* y[rows[n]] = x[n], rounded as `quantize` rounds where y is packed: keys and values into a cache.
 *   y     (S, ...)  f32 | bf16 | Q4_0 | Q8_0, not tiled
 *   x     (N, ...)  f32 | bf16; y's dtype unless that is packed
 *   rows  (N)       i32 in [0, S), distinct */
KERNEL(store_rows, Tensor y, Tensor x, Tensor rows);

/* y = x between file order and tiled order of Q4_0 and Q8_0; no bit of a block changes. */
KERNEL(repack, Tensor y, Tensor x);

/* Whether every element of x (f32 | bf16 | f16) is finite, and small enough for an f16 scale. */
KERNEL(check_finite, bool *finite, Tensor x);

/* How training rounds a weight: what its export will store.
 *   SCHEME_Q4_0  blocks of 32 along K, scale = signed largest / -8, codes -8 .. 7
 *   SCHEME_Q8_0  blocks of 32, scale = largest / 127
 *   SCHEME_INT8  one scale a row, largest / 127.5 as bf16, codes -128 .. 127 (compressed-tensors)
 *   SCHEME_F32, SCHEME_BF16  no blocks: the value, or the value rounded to bf16
 *   SCHEME_INT4  groups of 32, scale = largest / 7.5 as bf16, codes -8 .. 7 (compressed-tensors) */
typedef enum QuantScheme {
    SCHEME_NONE,
    SCHEME_Q4_0,
    SCHEME_Q8_0,
    SCHEME_INT8,
    SCHEME_INT4,
    SCHEME_F32,
    SCHEME_BF16,
    SCHEMES, /* how many there are */
} QuantScheme;

/* Whether the scheme has codes and scales at all. */
static inline bool scheme_has_blocks(QuantScheme scheme) {
    return scheme >= SCHEME_Q4_0 && scheme <= SCHEME_INT4;
}

/* Elements of a row of K that share one scale. */
static inline int64_t scheme_block(QuantScheme scheme, int64_t K) {
    return scheme == SCHEME_INT8 ? K : scheme_has_blocks(scheme) ? 32 : 1;
}

/* The dtype whose blocks hold the scheme's codes and scales exactly. */
static inline DType scheme_dtype(QuantScheme scheme) {
    return scheme == SCHEME_Q4_0 || scheme == SCHEME_INT4 ? Q4_0 : Q8_0;
}

/* Whether a stored tensor is in the scheme's blocks already and so is not rounded any more. */
static inline bool scheme_holds(QuantScheme scheme, DType dtype) {
    return scheme_has_blocks(scheme) && dtype_untiled(dtype) == scheme_dtype(scheme);
}

/* y = x + blend * (rounded(x) - x), what a weight stored by the scheme would read as; blend 1 gives
 * exactly that.
 *   y, x     (rows, K)  f32 | bf16; y may alias x. A packed x is read; its own scheme's blocks stay
 *            what they are, as they do in an export
 *   factors  (rows, K / block) f32: learned factors of the rule's scales (Q4_0 only); absent: 1 */
KERNEL(fake_quantize, Tensor y, Tensor x, Tensor factors, QuantScheme scheme, float blend);

/* The straight-through gradient (Bengio et al. 2013): dx is kept where the code lies in range and
 * becomes (1 - blend) * dx where it was clipped. With learned factors (after Esser et al. 2020)
 * dfactors += blend * rule's scale * sum dx * (code - x / scale where in range, the code where
 * clipped); the rule's scale counts as a constant.
 *   dx       (rows, K)  f32, in place: comes as the gradient of y, leaves as that of x */
KERNEL(fake_quantize_backward, Tensor dx, Tensor dfactors, Tensor x, Tensor factors,
       QuantScheme scheme, float blend);

/* The codes and scales themselves, for writing files: packed (rows, K) in scheme_dtype.
 * Scales of INT8 repeat in each block of the row. */
KERNEL(quantize_scheme, Tensor packed, Tensor x, Tensor factors, QuantScheme scheme);

/* y = x rounded to 8 bits with one scale a row, largest / 127: what an int8 product sees of its
 * activations.   y, x  (N, K)  f32 | bf16; y may alias x */
KERNEL(fake_quantize_rows, Tensor y, Tensor x);

#endif
