/* update.c - the contracts of update.h. */
#include "kernels/update.h"

void adamw_update(Tensor value, Tensor grad, Tensor m, Tensor v, float scale, float lr, float beta1,
                  float beta2, float eps, float decay, int64_t t, uint64_t key) {
    int64_t n = tensor_count(value);
    CHECK(tensor_count(grad) == n && tensor_count(m) >= n && tensor_count(v) >= n && t >= 1 &&
              (value.dtype == F32 || value.dtype == BF16) && grad.dtype == F32 &&
              dtype_is_packed(m.dtype) == dtype_is_packed(v.dtype),
          "adamw: m %s, v %s for %s", tensor_text(m), tensor_text(v), tensor_text(value));
    ON_DEVICE(value, adamw_update)(value, grad, m, v, scale, lr, beta1, beta2, eps, decay, t, key);
}

void sgd_update(Tensor value, Tensor grad, Tensor buffer, float scale, float lr, float momentum,
                float decay, int64_t t, uint64_t key) {
    CHECK(tensor_count(grad) == tensor_count(value) &&
              (momentum == 0 || tensor_count(buffer) >= tensor_count(value)),
          "sgd: sizes");
    ON_DEVICE(value, sgd_update)(value, grad, buffer, scale, lr, momentum, decay, t, key);
}

void sum_of_squares(double *sum, Tensor x) {
    CHECK(x.dtype == F32, "sum_of_squares of %s", dtype_name(x.dtype));
    ON_DEVICE(x, sum_of_squares)(sum, x);
}
