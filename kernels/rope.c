/* rope.c - the contracts of rope.h. */
#include "kernels/rope.h"

static void check_rope(Tensor y, Tensor x, Tensor cos, Tensor sin) {
    CHECK(x.ndim == 3 && x.shape[2] % 2 == 0, "rope: x %s is not (N, heads, C)", tensor_text(x));
    CHECK(tensor_count(y) == tensor_count(x), "rope: y and x differ in size");
    CHECK(tensor_count(cos) == x.shape[0] * x.shape[2] / 2 &&
              tensor_count(sin) == tensor_count(cos),
          "rope: tables are not (N, C/2)");
}

void rope_table(Tensor cos, Tensor sin, Tensor positions, float theta, int64_t rotated,
                float factor) {
    CHECK(cos.dtype == F32 && sin.dtype == F32 && positions.dtype == I32, "rope: table dtypes");
    CHECK(tensor_rows(cos) == tensor_count(positions), "rope: one row a position");
    CHECK(rotated <= tensor_cols(cos), "rope: more rotated pairs than pairs");
    ON_DEVICE(cos, rope_table)(cos, sin, positions, theta, rotated, factor);
}

void rope_forward(Tensor y, Tensor x, Tensor cos, Tensor sin) {
    check_rope(y, x, cos, sin);
    ON_DEVICE(x, rope_forward)(y, x, cos, sin);
}

void rope_backward(Tensor dx, Tensor dy, Tensor cos, Tensor sin) {
    check_rope(dx, dy, cos, sin);
    ON_DEVICE(dy, rope_backward)(dx, dy, cos, sin);
}
