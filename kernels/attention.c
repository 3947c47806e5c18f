/* attention.c - the contracts of attention.h. */
#include "kernels/attention.h"
#include "kernels/matmul.h"

static void check_attention(Tensor y, Tensor q, Tensor k, Tensor v, Tensor index, Tensor first,
                            Tensor last) {
    CHECK(q.ndim == 3 && k.ndim == 3 && tensor_count(v) == tensor_count(k),
          "attention: q %s k %s v %s", tensor_text(q), tensor_text(k), tensor_text(v));
    CHECK(tensor_count(y) == tensor_count(q) && y.dtype == q.dtype && k.dtype == v.dtype &&
              (k.dtype == q.dtype || dtype_is_packed(k.dtype)),
          "attention: y %s q %s k %s", tensor_text(y), tensor_text(q), tensor_text(k));
    CHECK(q.shape[1] % k.shape[1] == 0 && q.shape[2] == k.shape[2] && q.shape[2] <= 512,
          "attention: q %s against k %s", tensor_text(q), tensor_text(k));
    CHECK(tensor_count(index) == q.shape[0] && tensor_count(first) == q.shape[0] &&
              tensor_count(last) == q.shape[0],
          "attention: one interval a query");
}

void attention_forward(Tensor y, Tensor lse, Tensor codes, Tensor q, Tensor k, Tensor v,
                       Tensor index, Tensor first, Tensor last, Tensor sequence, Tensor pages) {
    check_attention(y, q, k, v, index, first, last);
    CHECK(tensor_count(lse) == q.shape[0] * q.shape[1], "attention: lse is not (N, H)");
    CHECK(codes_fit(codes, y), "attention: codes %s of y %s", tensor_text(codes), tensor_text(y));
    CHECK(!tensor_present(pages) || (pages.ndim == 2 && tensor_count(sequence) == q.shape[0] &&
                                     k.shape[0] % PAGE_KEYS == 0),
          "attention: pages %s of k %s", tensor_text(pages), tensor_text(k));
    ON_DEVICE(q, attention_forward)(y, lse, codes, q, k, v, index, first, last, sequence, pages);
}

void attention_backward(Tensor dq, Tensor dk, Tensor dv, Write write, Tensor dy, Tensor y,
                        Tensor lse, Tensor q, Tensor k, Tensor v, Tensor index, Tensor first,
                        Tensor last, Tensor partial) {
    check_attention(y, q, k, v, index, first, last);
    CHECK(tensor_count(dq) == tensor_count(q) && tensor_count(dy) == tensor_count(q),
          "attention: dq, dy against q");
    CHECK(dk.dtype == F32 && dv.dtype == F32 && tensor_count(dk) == tensor_count(k) &&
              tensor_count(dv) == tensor_count(v),
          "attention: dk %s against k %s", tensor_text(dk), tensor_text(k));
    CHECK(attention_partials(k.shape[1]) == 1 ||
              tensor_count(partial) == 2 * attention_partials(k.shape[1]) * tensor_count(k),
          "attention: partial sums are %s", tensor_text(partial));
    ON_DEVICE(q, attention_backward)
    (dq, dk, dv, write, dy, y, lse, q, k, v, index, first, last, partial);
}
