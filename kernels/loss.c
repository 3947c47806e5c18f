/* loss.c - the contracts of loss.h. */
#include "kernels/loss.h"

void softcap_forward(Tensor logits, float cap) {
    CHECK(logits.dtype == F32, "softcap: logits are %s", dtype_name(logits.dtype));
    ON_DEVICE(logits, softcap_forward)(logits, cap);
}

void cross_entropy(Tensor nll, Tensor dlogits, Tensor logits, Tensor targets, Tensor weights,
                   float cap) {
    int64_t R = tensor_rows(logits);
    CHECK(logits.dtype == F32 && nll.dtype == F32 && targets.dtype == I32, "cross_entropy: dtypes");
    CHECK(tensor_count(nll) == R && tensor_count(targets) == R,
          "cross_entropy: one target a row of %s", tensor_text(logits));
    CHECK(!tensor_present(dlogits) ||
              (tensor_count(dlogits) == tensor_count(logits) && tensor_count(weights) == R),
          "cross_entropy: dlogits %s for logits %s", tensor_text(dlogits), tensor_text(logits));
    ON_DEVICE(logits, cross_entropy)(nll, dlogits, logits, targets, weights, cap);
}
