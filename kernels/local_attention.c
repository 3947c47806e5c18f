/* local_attention.c - the contracts of local_attention.h. */
#include "kernels/local_attention.h"

static void check_rows(Tensor q, Tensor k, Tensor v, Tensor relative, Tensor kept) {
    CHECK(q.ndim == 3 && relative.ndim == 3 && tensor_count(k) == tensor_count(q) &&
              tensor_count(v) == tensor_count(q) && relative.shape[0] <= 32 &&
              relative.shape[1] == q.shape[1] && relative.shape[2] == q.shape[2] &&
              q.dtype == F32 && k.dtype == F32 && v.dtype == F32 && relative.dtype == F32,
          "local attention: q %s, relative %s", tensor_text(q), tensor_text(relative));
    CHECK(kept.dtype == F32 &&
              tensor_count(kept) == 2 * q.shape[0] * q.shape[1] * relative.shape[0],
          "local attention: kept %s", tensor_text(kept));
}

void local_attention_forward(Tensor y, Tensor kept, Tensor q, Tensor k, Tensor v, Tensor relative,
                             float cap) {
    check_rows(q, k, v, relative, kept);
    CHECK(tensor_count(y) == tensor_count(q) && y.dtype == F32, "local attention: y %s",
          tensor_text(y));
    ON_DEVICE(q, local_attention_forward)(y, kept, q, k, v, relative, cap);
}

void local_attention_backward(Tensor dq, Tensor dk, Tensor dv, Tensor drelative, Tensor scores,
                              Tensor dy, Tensor kept, Tensor q, Tensor k, Tensor v,
                              Tensor relative) {
    check_rows(q, k, v, relative, kept);
    check_rows(dq, dk, dv, drelative, kept);
    CHECK(tensor_count(dy) == tensor_count(q) && dy.dtype == F32 &&
              2 * tensor_count(scores) == tensor_count(kept),
          "local attention: dy %s, scores %s", tensor_text(dy), tensor_text(scores));
    ON_DEVICE(q, local_attention_backward)
    (dq, dk, dv, drelative, scores, dy, kept, q, k, v, relative);
}
