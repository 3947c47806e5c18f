/* activation.c - the contracts of activation.h. */
#include "kernels/activation.h"

static void check_gate(Tensor y, Tensor gate, Tensor up) {
    CHECK(tensor_count(y) == tensor_count(gate) && tensor_count(up) == tensor_count(gate) &&
              y.dtype == gate.dtype && up.dtype == gate.dtype,
          "gelu_mul: %s %s %s", tensor_text(y), tensor_text(gate), tensor_text(up));
}

void gelu_mul_forward(Tensor y, Tensor gate, Tensor up) {
    check_gate(y, gate, up);
    ON_DEVICE(y, gelu_mul_forward)(y, gate, up);
}

void gelu_mul_backward(Tensor dgate, Tensor dup, Tensor dy, Tensor gate, Tensor up) {
    check_gate(dy, gate, up);
    CHECK(tensor_count(dgate) == tensor_count(gate) && dgate.dtype == gate.dtype,
          "gelu_mul: dgate %s", tensor_text(dgate));
    CHECK(!tensor_present(dup) ||
              (tensor_count(dup) == tensor_count(gate) && dup.dtype == gate.dtype),
          "gelu_mul: dup %s", tensor_text(dup));
    ON_DEVICE(dy, gelu_mul_backward)(dgate, dup, dy, gate, up);
}

static void check_joined(Tensor y, Tensor both) {
    CHECK(tensor_rows(both) == tensor_rows(y) && tensor_cols(both) == 2 * tensor_cols(y) &&
              both.dtype == y.dtype,
          "gelu_mul_joined: %s and %s", tensor_text(y), tensor_text(both));
}

void gelu_mul_joined_forward(Tensor y, Tensor both) {
    check_joined(y, both);
    ON_DEVICE(y, gelu_mul_joined_forward)(y, both);
}

void gelu_mul_joined_backward(Tensor dboth, Tensor dy, Tensor both) {
    check_joined(dy, both);
    check_joined(dy, dboth);
    ON_DEVICE(dy, gelu_mul_joined_backward)(dboth, dy, both);
}
