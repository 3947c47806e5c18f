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

static bool is_like(Tensor a, Tensor x) {
    return tensor_count(a) == tensor_count(x) && a.dtype == x.dtype;
}

static void check_next(const NextNorm *next, Tensor y) {
    if (!tensor_present(next->y)) return;
    check_norm(y, next->rstd, next->weight);
    CHECK(is_like(next->y, y) && tensor_present(next->weight) && codes_fit(next->codes, next->y),
          "rmsnorm: next %s of %s, weight %s, codes %s", tensor_text(next->y), tensor_text(y),
          tensor_text(next->weight), tensor_text(next->codes));
}

void rmsnorm_pair(Tensor y, Tensor rstd, Tensor x, Tensor weight, Tensor residual, float scale,
                  const NextNorm *next, float eps) {
    check_norm(x, rstd, weight);
    check_next(next, y);
    CHECK(is_like(y, x) && is_like(residual, x) && tensor_present(weight),
          "rmsnorm_pair: %s of %s and %s, weight %s", tensor_text(y), tensor_text(x),
          tensor_text(residual), tensor_text(weight));
    ON_DEVICE(x, rmsnorm_pair)(y, rstd, x, weight, residual, scale, next, eps);
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

static void check_join(const NormJoin *j) {
    CHECK(tensor_count(j->x[0]) == tensor_count(j->x[1]) && j->x[0].dtype == j->x[1].dtype,
          "rmsnorm_join: branches %s %s", tensor_text(j->x[0]), tensor_text(j->x[1]));
    CHECK(!tensor_present(j->rstd) || tensor_count(j->rstd) == 3 * tensor_rows(j->x[0]),
          "rmsnorm_join: rstd is not three a row");
    for (int i = 0; i < 3; i++) {
        check_norm(j->x[0], tensor_absent(), j->weight[i]);
        CHECK(tensor_present(j->weight[i]) && j->weight[i].dtype == j->weight[0].dtype,
              "rmsnorm_join: weights of several dtypes");
    }
}

void rmsnorm_join(Tensor y, const NormJoin *join, Tensor residual, float scale,
                  const NextNorm *next, float eps) {
    Tensor x = join->x[0];
    check_join(join);
    check_next(next, y);
    CHECK(is_like(y, x) && is_like(residual, x), "rmsnorm_join: %s and %s of %s", tensor_text(y),
          tensor_text(residual), tensor_text(x));
    ON_DEVICE(x, rmsnorm_join)(y, join, residual, scale, next, eps);
}

void rmsnorm_join_backward(const Tensor *dx, Tensor dresidual, Tensor fed, Tensor dfed, Tensor dy,
                           const NormJoin *join, float scale) {
    Tensor x = join->x[0];
    check_join(join);
    CHECK(tensor_present(join->rstd), "rmsnorm_join: rstd is needed");
    CHECK(is_like(dx[0], x) && is_like(dx[1], x) && is_like(dresidual, x) && is_like(dy, x),
          "rmsnorm_join: %s, %s, %s and %s of %s", tensor_text(dx[0]), tensor_text(dx[1]),
          tensor_text(dresidual), tensor_text(dy), tensor_text(x));
    CHECK((!tensor_present(fed) || is_like(fed, x)) && (!tensor_present(dfed) || is_like(dfed, x)),
          "rmsnorm_join: fed %s, dfed %s of %s", tensor_text(fed), tensor_text(dfed),
          tensor_text(x));
    ON_DEVICE(x, rmsnorm_join_backward)(dx, dresidual, fed, dfed, dy, join, scale);
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
