/* convolution.c - the contracts of convolution.h. */
#include "kernels/convolution.h"

static void check_unfold(Tensor y, Tensor x) {
    CHECK(y.ndim == 3 && x.ndim == 3 && y.shape[0] == (x.shape[0] + 1) / 2 &&
              y.shape[1] == (x.shape[1] + 1) / 2 && y.shape[2] == 9 * x.shape[2] &&
              y.dtype == x.dtype,
          "unfold: %s from %s", tensor_text(y), tensor_text(x));
}

void unfold_forward(Tensor y, Tensor x) {
    check_unfold(y, x);
    ON_DEVICE(x, unfold_forward)(y, x);
}

void unfold_backward(Tensor dx, Tensor dy) {
    check_unfold(dy, dx);
    ON_DEVICE(dy, unfold_backward)(dx, dy);
}

static void check_depthwise(Tensor y, Tensor x, Tensor weight) {
    CHECK(tensor_count(y) == tensor_count(x) && y.dtype == x.dtype &&
              tensor_rows(weight) == tensor_cols(x) && tensor_cols(weight) <= 16,
          "depthwise: %s from %s by %s", tensor_text(y), tensor_text(x), tensor_text(weight));
}

void depthwise_forward(Tensor y, Tensor x, Tensor weight) {
    check_depthwise(y, x, weight);
    ON_DEVICE(x, depthwise_forward)(y, x, weight);
}

void depthwise_backward(Tensor dx, Tensor dweight, Tensor dy, Tensor x, Tensor weight) {
    check_depthwise(dy, x, weight);
    check_depthwise(dx, x, weight);
    ON_DEVICE(dy, depthwise_backward)(dx, dweight, dy, x, weight);
}

static void check_pool(Tensor y, Tensor x) {
    CHECK(tensor_cols(y) == tensor_cols(x) && tensor_rows(y) > 0 &&
              tensor_rows(x) % tensor_rows(y) == 0 && y.dtype == F32,
          "pool: %s from %s", tensor_text(y), tensor_text(x));
}

void pool_rows_forward(Tensor y, Tensor x, float alpha) {
    check_pool(y, x);
    ON_DEVICE(x, pool_rows_forward)(y, x, alpha);
}

void pool_rows_backward(Tensor dx, Tensor dy, float alpha) {
    check_pool(dy, dx);
    ON_DEVICE(dy, pool_rows_backward)(dx, dy, alpha);
}

void standardize(Tensor y, Tensor x, Tensor shift, Tensor scale) {
    CHECK(tensor_count(y) == tensor_count(x) && x.dtype == F32 &&
              tensor_count(shift) == tensor_cols(x) && tensor_count(scale) == tensor_cols(x) &&
              shift.dtype == scale.dtype,
          "standardize: %s from %s", tensor_text(y), tensor_text(x));
    ON_DEVICE(x, standardize)(y, x, shift, scale);
}
