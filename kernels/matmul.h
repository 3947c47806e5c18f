/* matmul.h - dense and grouped matrix products. */
#ifndef MATMUL_H
#define MATMUL_H

#include "kernels/kernel.h"

typedef enum Layout {
    NT, /* y (M, N) = a (M, K) b (N, K)^T : forward of y = x W^T */
    NN, /* y (M, N) = a (M, K) b (K, N)   : dx = dy W */
    TN, /* y (M, N) = a (K, M)^T b (K, N) : dW = dy^T x */
} Layout;

/* y (=|+=) alpha * a b in the layout named; sums in f32.
 *   y, a  f32 | bf16
 *   b     f32 | bf16, or packed (not in TN): then the product is that of the same weights unpacked
 * to the dtype of a */
KERNEL(matmul, Layout layout, Tensor y, Write write, Tensor a, Tensor b, float alpha);

/* What an adapter adds to a product: scale u v, beside it in f32.
 *   u (M, R), v (R, N), or (N, R) where the product's layout is NT   f32; u absent: nothing */
typedef struct Term {
    Tensor u, v;
    float scale;
} Term;

/* Whether product i of several has one; terms NULL: none has. */
static inline bool has_term(const Term *terms, int i) {
    return terms && tensor_present(terms[i].u);
}

/* Several of NT that read one a, up to MATRICES_MOST: y[i] = a b[i]^T + terms[i], bit for bit as
 * alone. terms NULL: none of them has one. */
#define MATRICES_MOST 3
KERNEL(matmul_several, const Tensor *y, Tensor a, const Tensor *b, const Term *terms, int count);

/* Several of NN that go to one y (M, N): y (=|+=) the sum of a[i] b[i] + terms[i], whose scale is
 * one and the same. */
KERNEL(matmul_sum, Tensor y, Write write, const Tensor *a, const Tensor *b, const Term *terms,
       int count);

/* A product of f32's precision, to 2^-16 where y is bf16, in which terms that are zero in all rows
 * change no bit: the adapters' products. */
void matmul_ordered(Layout layout, Tensor y, Write write, Tensor a, Tensor b, float alpha);

/* Several of them that share an operand, up to MATRICES_MOST:
 *   NT  y[i] (=|+=) alpha a[0] b[i]^T      what adapters of one input make of it
 *   NN  y[0] += alpha a[i] b[i], in order  what they give back to it; write must be ADD for several
 *   TN  y[i] (=|+=) alpha a[i]^T b[0]
 * Operands of one kind are of one dtype. */
KERNEL(matmul_ordered_several, Layout layout, const Tensor *y, Write write, const Tensor *a,
       const Tensor *b, int count, float alpha);

/* What adapters send back of dy (M, N), as matmul_ordered makes it: du = scale dy B and, where it
 * is wanted, dB += scale dy^T u.
 *   du, u  (M, R)  f32; u is read for dB alone
 *   dB, B  (N, R)  f32; dB absent: not wanted
 *   dy     (M, N)  f32 | bf16, that of all */
typedef struct AdapterBack {
    Tensor du, dB, dy, u, B;
    float scale;
} AdapterBack;

/* Of up to MATRICES_MOST adapters. */
KERNEL(adapters_backward, const AdapterBack *a, int count);

/* One product per group over rows sorted by group: rows offsets[g] .. offsets[g+1] belong to g.
 *   NT  y (M, N) rows of g = a (M, K) rows of g times b[g] (N, K)^T
 *   NN  y (M, N) rows of g = a (M, K) rows of g times b[g] (K, N)
 *   TN  y[g] (P, Q) += (rows of g of a (M, P))^T (rows of g of b (M, Q)); write must be ADD
 *   offsets  (G + 1)  i32; rows behind the last group are left alone */
KERNEL(grouped_matmul, Layout layout, Tensor y, Write write, Tensor a, Tensor b, Tensor offsets,
       float alpha);

/* y (M, N) = a (M, K) b (N, K)^T, the activations a rounded to 8 bits in blocks of 32 along K, the
 * weights read as they are packed: the product of decoding and prefill.
 *   y, a  f32 | bf16
 *   b     Q4_0_TILED | Q8_0_TILED */
void matmul_int8(Tensor y, Tensor a, Tensor b);

/* The same with up to MATRICES_MOST matrices of one dtype, which read one rounding of a:
 *   y[i]   (M, N_i)    b[i]  (N_i, K)
 *   codes  (int8_codes) u8: that rounding, made by the kernel that made a; absent: it is made here
 */
KERNEL(matmul_int8_several, const Tensor *y, Tensor a, Tensor codes, const Tensor *b, int count);

/* Whether these are codes of x, or none. */
static inline bool codes_fit(Tensor codes, Tensor x) {
    return !tensor_present(codes) ||
           (codes.dtype == U8 && tensor_count(codes) * 8 == tensor_count(x) * 9);
}

/* Bytes of a (M, K) rounded, where kernels of the device make that on the way; 0: they do not. */
int64_t int8_codes(const Device *device, int64_t M, int64_t K);

/* The same for rows sorted by group: counts[g] rows from offsets[g] on, a multiple of 8, meet b[g];
 * rows between groups are left alone.   offsets (G + 1), counts (G)  i32 */
KERNEL(grouped_matmul_int8, Tensor y, Tensor a, Tensor b, Tensor offsets, Tensor counts);

#endif
