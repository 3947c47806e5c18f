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
