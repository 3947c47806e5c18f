/* sampling.c - the contracts of sampling.h. */
#include "kernels/sampling.h"

void top_logits(Tensor values, Tensor ids, Tensor lse, Tensor logits, Tensor scale) {
    int64_t N = tensor_rows(logits);
    CHECK(logits.dtype == F32 && tensor_rows(values) == N && tensor_rows(ids) == N &&
              tensor_cols(values) == tensor_cols(ids) &&
              tensor_cols(values) <= tensor_cols(logits) && tensor_count(lse) == 2 * N &&
              tensor_count(scale) == N,
          "top_logits: %s of %s", tensor_text(values), tensor_text(logits));
    ON_DEVICE(logits, top_logits)(values, ids, lse, logits, scale);
}

void pick_columns(Tensor y, Tensor x, Tensor columns) {
    CHECK(x.dtype == F32 && y.dtype == F32 && columns.dtype == I32 &&
              tensor_count(y) == tensor_rows(x) && tensor_count(columns) == tensor_rows(x),
          "pick_columns: %s of %s", tensor_text(y), tensor_text(x));
    ON_DEVICE(x, pick_columns)(y, x, columns);
}
