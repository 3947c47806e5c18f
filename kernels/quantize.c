/* quantize.c - the contracts of quantize.h. */
#include "kernels/quantize.h"

static bool is_dense(Tensor x) {
    return x.dtype == F32 || x.dtype == BF16 || x.dtype == F16;
}

void quantize(Tensor packed, Tensor x) {
    CHECK(tensor_count(packed) == tensor_count(x) && is_dense(x), "quantize: %s from %s",
          tensor_text(packed), tensor_text(x));
    CHECK(dtype_fits(packed.dtype, tensor_rows(packed), tensor_cols(packed)), "quantize: %s",
          tensor_text(packed));
    ON_DEVICE(packed, quantize)(packed, x);
}

void store_rows(Tensor y, Tensor x, Tensor rows) {
    CHECK(y.ndim == x.ndim && tensor_count(rows) == x.shape[0] &&
              tensor_count(x) / x.shape[0] == tensor_count(y) / y.shape[0] &&
              (y.dtype == x.dtype || y.dtype == Q4_0 || y.dtype == Q8_0),
          "store_rows: %s into %s", tensor_text(x), tensor_text(y));
    ON_DEVICE(y, store_rows)(y, x, rows);
}

void repack(Tensor y, Tensor x) {
    CHECK(tensor_count(y) == tensor_count(x) && tensor_cols(y) == tensor_cols(x) &&
              dtype_untiled(y.dtype) == dtype_untiled(x.dtype),
          "repack: %s from %s", tensor_text(y), tensor_text(x));
    ON_DEVICE(y, repack)(y, x);
}

void check_finite(bool *finite, Tensor x) {
    CHECK(is_dense(x), "check_finite: %s", tensor_text(x));
    ON_DEVICE(x, check_finite)(finite, x);
}

static void check_scheme(Tensor x, Tensor factors, QuantScheme scheme) {
    int64_t K = tensor_cols(x);
    CHECK(K % scheme_block(scheme, K) == 0 && scheme != SCHEME_NONE, "fake_quantize: %s",
          tensor_text(x));
    CHECK(!tensor_present(factors) ||
              (factors.dtype == F32 &&
               tensor_count(factors) == tensor_count(x) / scheme_block(scheme, K)),
          "fake_quantize: factors %s of %s", tensor_text(factors), tensor_text(x));
    CHECK(!tensor_present(factors) || scheme == SCHEME_Q4_0, "fake_quantize: factors of a scheme");
}

void fake_quantize(Tensor y, Tensor x, Tensor factors, QuantScheme scheme, float blend) {
    check_scheme(x, factors, scheme);
    CHECK(tensor_count(y) == tensor_count(x) && is_dense(y), "fake_quantize: %s from %s",
          tensor_text(y), tensor_text(x));
    if (scheme_holds(scheme, x.dtype)) scheme = SCHEME_F32;
    ON_DEVICE(y, fake_quantize)(y, x, factors, scheme, blend);
}

void fake_quantize_backward(Tensor dx, Tensor dfactors, Tensor x, Tensor factors,
                            QuantScheme scheme, float blend) {
    check_scheme(x, factors, scheme);
    CHECK(tensor_count(dx) == tensor_count(x) && dx.dtype == F32 &&
              (!tensor_present(dfactors) || tensor_present(factors)),
          "fake_quantize_backward: %s of %s", tensor_text(dx), tensor_text(x));
    ON_DEVICE(dx, fake_quantize_backward)(dx, dfactors, x, factors, scheme, blend);
}

void quantize_scheme(Tensor packed, Tensor x, Tensor factors, QuantScheme scheme) {
    check_scheme(x, factors, scheme);
    CHECK(tensor_count(packed) == tensor_count(x) && packed.dtype == scheme_dtype(scheme) &&
              scheme_has_blocks(scheme),
          "quantize_scheme: %s from %s", tensor_text(packed), tensor_text(x));
    ON_DEVICE(packed, quantize_scheme)(packed, x, factors, scheme);
}

void fake_quantize_rows(Tensor y, Tensor x) {
    CHECK(tensor_count(y) == tensor_count(x) && is_dense(x) && y.dtype != F16,
          "fake_quantize_rows: %s from %s", tensor_text(y), tensor_text(x));
    ON_DEVICE(y, fake_quantize_rows)(y, x);
}
