/* norm.c - the contracts of norm.h, checked once for every device. */
#include "kernels/norm.h"
#include "kernels/matmul.h"

#define NORM_COLS_MAX 32768

static void check_norm(Tensor x, Tensor rstd, Tensor weight) {
    CHECK(tensor_cols(x) > 0 && tensor_cols(x) <= NORM_COLS_MAX, "rmsnorm: %s has too long rows",
          tensor_text(x));
    CHECK(!tensor_present(rstd) || tensor_count(rstd) == tensor_rows(x),
          "rmsnorm: rstd is not one a row");
    CHECK(!tensor_present(weight) || tensor_count(weight) == tensor_cols(x),
          "rmsnorm: weight is not (D)");
}

void rmsnorm_forward(Tensor y, Tensor rstd, Tensor x, Tensor weight, Tensor residual, float eps) {
    check_norm(x, rstd, weight);
    CHECK(tensor_count(y) == tensor_count(x) && y.dtype == x.dtype, "rmsnorm: y and x differ");
    CHECK(!tensor_present(residual) ||
              (tensor_count(residual) == tensor_count(x) && residual.dtype == x.dtype),
          "rmsnorm: residual and x differ");
    ON_DEVICE(x, rmsnorm_forward)(y, rstd, x, weight, residual, eps);
}

void rmsnorm_pair(Tensor y, Tensor next, Tensor codes, Tensor x, Tensor weight, Tensor residual,
                  float scale, Tensor next_weight, float eps) {
    int64_t D = tensor_cols(x);
    CHECK(tensor_count(y) == tensor_count(x) && tensor_count(next) == tensor_count(x) &&
              tensor_count(residual) == tensor_count(x) && y.dtype == x.dtype &&
              next.dtype == x.dtype && residual.dtype == x.dtype,
          "rmsnorm_pair: %s and %s of %s", tensor_text(y), tensor_text(next), tensor_text(x));
    CHECK(tensor_count(weight) == D && tensor_count(next_weight) == D,
          "rmsnorm_pair: weights %s %s", tensor_text(weight), tensor_text(next_weight));
    CHECK(codes_fit(codes, next), "rmsnorm_pair: codes %s", tensor_text(codes));
    ON_DEVICE(x, rmsnorm_pair)(y, next, codes, x, weight, residual, scale, next_weight, eps);
}

void rmsnorm_apply(Tensor y, Tensor rstd, Tensor x, Tensor weight) {
    check_norm(x, rstd, weight);
    CHECK(tensor_present(rstd), "rmsnorm: rstd is needed");
    CHECK(tensor_count(y) == tensor_count(x) && y.dtype == x.dtype, "rmsnorm: y and x differ");
    ON_DEVICE(x, rmsnorm_apply)(y, rstd, x, weight);
}

void rmsnorm_backward(Tensor dx, Write write, Tensor dweight, Tensor dy, Tensor x, Tensor rstd,
                      Tensor weight) {
    check_norm(x, rstd, weight);
    CHECK(tensor_present(rstd), "rmsnorm: rstd is needed");
    CHECK(tensor_count(dy) == tensor_count(x) && dy.dtype == x.dtype, "rmsnorm: dy and x differ");
    CHECK(!tensor_present(dx) || (tensor_count(dx) == tensor_count(x) && dx.dtype == x.dtype),
          "rmsnorm: dx and x differ");
    CHECK(!tensor_present(dweight) ||
              (tensor_count(dweight) == tensor_cols(x) && dweight.dtype == F32),
          "rmsnorm: dweight is not (D) f32");
    ON_DEVICE(x, rmsnorm_backward)(dx, write, dweight, dy, x, rstd, weight);
}

static void check_several(const Tensor *y, Tensor x, Tensor rstd, const NormWeight *weight,
                          int count) {
    CHECK(count > 0 && count <= NORMS_MOST, "rmsnorm: %d norms", count);
    for (int i = 0; i < count; i++) {
        check_norm(x, rstd, weight[i].weight);
        CHECK(!weight[i].factor || tensor_present(weight[i].weight),
              "rmsnorm: a factor of no weight");
        CHECK(tensor_count(y[i]) == tensor_count(x) && y[i].dtype == x.dtype,
              "rmsnorm: %s and %s differ", tensor_text(y[i]), tensor_text(x));
    }
}

void rmsnorm_forward_several(const Tensor *y, Tensor rstd, Tensor x, const NormWeight *weight,
                             int count, float eps) {
    check_several(y, x, rstd, weight, count);
    ON_DEVICE(x, rmsnorm_forward_several)(y, rstd, x, weight, count, eps);
}

void rmsnorm_backward_several(Tensor dx, Write write, const Tensor *dy, Tensor x, Tensor rstd,
                              const NormWeight *weight, int count) {
    check_several(dy, x, rstd, weight, count);
    CHECK(tensor_present(rstd) && tensor_count(dx) == tensor_count(x) && dx.dtype == x.dtype,
          "rmsnorm: dx %s of %s", tensor_text(dx), tensor_text(x));
    ON_DEVICE(x, rmsnorm_backward_several)(dx, write, dy, x, rstd, weight, count);
}

static void check_layernorm(Tensor x, Tensor mean, Tensor rstd, Tensor weight) {
    CHECK(tensor_cols(x) > 0 && tensor_cols(x) <= NORM_COLS_MAX, "layernorm: %s has too long rows",
          tensor_text(x));
    CHECK(tensor_count(mean) == tensor_rows(x) && tensor_count(rstd) == tensor_rows(x),
          "layernorm: mean and rstd are not one a row");
    CHECK(tensor_count(weight) == tensor_cols(x), "layernorm: weight is not (D)");
}

void layernorm_forward(Tensor y, Tensor mean, Tensor rstd, Tensor x, Tensor weight, Tensor bias,
                       float eps) {
    check_layernorm(x, mean, rstd, weight);
    CHECK(tensor_count(y) == tensor_count(x) && y.dtype == x.dtype, "layernorm: y and x differ");
    CHECK(!tensor_present(bias) ||
              (tensor_count(bias) == tensor_cols(x) && bias.dtype == weight.dtype),
          "layernorm: bias and weight differ");
    ON_DEVICE(x, layernorm_forward)(y, mean, rstd, x, weight, bias, eps);
}

void layernorm_backward(Tensor dx, Tensor dweight, Tensor dbias, Tensor dy, Tensor x, Tensor mean,
                        Tensor rstd, Tensor weight) {
    check_layernorm(x, mean, rstd, weight);
    CHECK(tensor_count(dy) == tensor_count(x) && dy.dtype == x.dtype, "layernorm: dy and x differ");
    CHECK(!tensor_present(dx) || (tensor_count(dx) == tensor_count(x) && dx.dtype == x.dtype),
          "layernorm: dx and x differ");
    ON_DEVICE(x, layernorm_backward)(dx, dweight, dbias, dy, x, mean, rstd, weight);
}
