/* activation.c - the contracts of activation.h. */
#include "kernels/activation.h"
#include "kernels/matmul.h"

static void check_gate(Tensor y, Tensor gate, Tensor up) {
    CHECK(tensor_count(y) == tensor_count(gate) && tensor_count(up) == tensor_count(gate) &&
              y.dtype == gate.dtype && up.dtype == gate.dtype,
          "gelu_mul: %s %s %s", tensor_text(y), tensor_text(gate), tensor_text(up));
}

void gelu_mul_forward(Tensor y, Tensor gate, Tensor up) {
    check_gate(y, gate, up);
    ON_DEVICE(y, gelu_mul_forward)(y, gate, up);
}

void gelu_mul_codes(Tensor y, Tensor codes, Tensor gate, Tensor up) {
    check_gate(y, gate, up);
    CHECK(tensor_present(codes) && codes_fit(codes, y), "gelu_mul: codes %s", tensor_text(codes));
    ON_DEVICE(y, gelu_mul_codes)(y, codes, gate, up);
}

void gelu_mul_backward(Tensor dgate, Tensor dup, Tensor y, Tensor dy, Tensor gate, Tensor up) {
    check_gate(dy, gate, up);
    if (tensor_present(y)) check_gate(y, gate, up);
    CHECK(tensor_count(dgate) == tensor_count(gate) && dgate.dtype == gate.dtype,
          "gelu_mul: dgate %s", tensor_text(dgate));
    CHECK(!tensor_present(dup) ||
              (tensor_count(dup) == tensor_count(gate) && dup.dtype == gate.dtype),
          "gelu_mul: dup %s", tensor_text(dup));
    ON_DEVICE(dy, gelu_mul_backward)(dgate, dup, y, dy, gate, up);
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

void gelu_mul_joined_backward(Tensor dboth, Tensor dweights, Tensor dy, Tensor weights,
                              Tensor both) {
    check_joined(dy, both);
    check_joined(dy, dboth);
    CHECK(weights.dtype == F32 && dweights.dtype == F32 &&
              tensor_count(weights) == tensor_rows(dy) && tensor_count(dweights) == tensor_rows(dy),
          "gelu_mul_joined: weights %s of %s", tensor_text(weights), tensor_text(dy));
    ON_DEVICE(dy, gelu_mul_joined_backward)(dboth, dweights, dy, weights, both);
}

static void check_glu(Tensor y, Tensor x) {
    CHECK(tensor_rows(x) == tensor_rows(y) && tensor_cols(x) == 2 * tensor_cols(y) &&
              x.dtype == y.dtype,
          "glu: %s and %s", tensor_text(y), tensor_text(x));
}

void glu_forward(Tensor y, Tensor x) {
    check_glu(y, x);
    ON_DEVICE(y, glu_forward)(y, x);
}

void glu_backward(Tensor dx, Tensor dy, Tensor x) {
    check_glu(dy, x);
    check_glu(dy, dx);
    ON_DEVICE(dy, glu_backward)(dx, dy, x);
}

void activation_forward(Tensor y, Tensor x, Activation f) {
    CHECK(tensor_count(y) == tensor_count(x), "activation: %s and %s", tensor_text(y),
          tensor_text(x));
    ON_DEVICE(y, activation_forward)(y, x, f);
}

void activation_backward(Tensor dx, Write write, Tensor dy, Tensor x, Activation f) {
    CHECK(tensor_count(dx) == tensor_count(x) && tensor_count(dy) == tensor_count(x) &&
              dy.dtype == x.dtype,
          "activation: %s and %s", tensor_text(dx), tensor_text(x));
    ON_DEVICE(dy, activation_backward)(dx, write, dy, x, f);
}

void clamp_forward(Tensor y, Tensor x, float low, float high) {
    CHECK(tensor_count(y) == tensor_count(x) && y.dtype == x.dtype, "clamp: %s and %s",
          tensor_text(y), tensor_text(x));
    ON_DEVICE(y, clamp_forward)(y, x, low, high);
}

void clamp_backward(Tensor dx, Write write, Tensor dy, Tensor x, float low, float high) {
    CHECK(tensor_count(dx) == tensor_count(x) && tensor_count(dy) == tensor_count(x) &&
              dx.dtype == x.dtype && dy.dtype == x.dtype,
          "clamp: %s, %s and %s", tensor_text(dx), tensor_text(dy), tensor_text(x));
    ON_DEVICE(dy, clamp_backward)(dx, write, dy, x, low, high);
}
