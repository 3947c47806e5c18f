/* elementwise.c - the contracts of elementwise.h. */
#include "kernels/elementwise.h"

void scale_copy(Tensor y, Write write, Tensor x, float alpha) {
    CHECK(tensor_count(y) == tensor_count(x), "copy: %s from %s", tensor_text(y), tensor_text(x));
    ON_DEVICE(y, scale_copy)(y, write, x, alpha);
}

void fill(Tensor y, float value) {
    CHECK(y.dtype == F32 || y.dtype == BF16, "fill: %s", tensor_text(y));
    ON_DEVICE(y, fill)(y, value);
}

void fill_normal(Tensor y, uint64_t key, float factor) {
    CHECK(y.dtype == F32 || y.dtype == BF16, "fill_normal: %s", tensor_text(y));
    ON_DEVICE(y, fill_normal)(y, key, factor);
}

void add_scaled(Tensor y, Tensor a, Tensor b, float alpha) {
    CHECK(tensor_count(y) == tensor_count(a) && tensor_count(y) == tensor_count(b) &&
              y.dtype == a.dtype && y.dtype == b.dtype,
          "add: %s %s %s", tensor_text(y), tensor_text(a), tensor_text(b));
    ON_DEVICE(y, add_scaled)(y, a, b, alpha);
}

void gather_rows(Tensor y, Tensor x, Tensor rows) {
    CHECK(tensor_cols(y) == tensor_cols(x) && tensor_rows(y) == tensor_count(rows) &&
              y.dtype == x.dtype,
          "gather: %s from %s", tensor_text(y), tensor_text(x));
    ON_DEVICE(y, gather_rows)(y, x, rows);
}

void spread_rows(Tensor y, Tensor x, Tensor slot, Tensor source) {
    CHECK(tensor_cols(y) == tensor_cols(x) && tensor_rows(y) == tensor_count(source) &&
              tensor_rows(x) == tensor_rows(slot) && y.dtype == x.dtype,
          "spread: %s to %s", tensor_text(x), tensor_text(y));
    ON_DEVICE(y, spread_rows)(y, x, slot, source);
}

void scatter_rows(Tensor y, Write write, Tensor x, Tensor rows) {
    CHECK(tensor_cols(y) == tensor_cols(x) && tensor_rows(x) == tensor_count(rows) &&
              y.dtype == x.dtype,
          "scatter: %s into %s", tensor_text(x), tensor_text(y));
    ON_DEVICE(y, scatter_rows)(y, write, x, rows);
}

void gather_sums(Tensor y, Tensor x, Tensor slot) {
    CHECK(tensor_cols(y) == tensor_cols(x) && tensor_rows(y) == tensor_rows(slot) &&
              y.dtype == x.dtype,
          "gather_sums: %s from %s", tensor_text(y), tensor_text(x));
    ON_DEVICE(y, gather_sums)(y, x, slot);
}

void dropout(Tensor y, Tensor x, float p, uint64_t key) {
    CHECK(tensor_count(y) == tensor_count(x) && y.dtype == x.dtype && p >= 0 && p < 1,
          "dropout: %s from %s", tensor_text(y), tensor_text(x));
    ON_DEVICE(y, dropout)(y, x, p, key);
}

void scale_columns(Tensor y, Write write, Tensor x, Tensor weight, float alpha) {
    CHECK(tensor_count(y) == tensor_count(x) && tensor_count(weight) == tensor_cols(x) &&
              (weight.dtype == F32 || weight.dtype == BF16),
          "scale_columns: %s by %s", tensor_text(x), tensor_text(weight));
    ON_DEVICE(y, scale_columns)(y, write, x, weight, alpha);
}

void shift_columns(Tensor y, Tensor x, Tensor shift) {
    CHECK(tensor_count(y) == tensor_count(x) && y.dtype == x.dtype &&
              tensor_count(shift) == tensor_cols(x),
          "shift_columns: %s by %s", tensor_text(x), tensor_text(shift));
    ON_DEVICE(y, shift_columns)(y, x, shift);
}

void dot_columns(Tensor y, Tensor a, Tensor b) {
    CHECK((!tensor_present(b) || tensor_count(a) == tensor_count(b)) &&
              tensor_count(y) == tensor_cols(a) && y.dtype == F32,
          "dot_columns: %s with %s", tensor_text(a), tensor_text(b));
    ON_DEVICE(a, dot_columns)(y, a, b);
}

void scale_rows(Tensor y, Tensor x, Tensor weight) {
    CHECK(tensor_count(y) == tensor_count(x) && tensor_count(weight) == tensor_rows(x) &&
              weight.dtype == F32,
          "scale_rows: %s by %s", tensor_text(x), tensor_text(weight));
    ON_DEVICE(y, scale_rows)(y, x, weight);
}

void row_norms(Tensor y, Tensor x) {
    CHECK(tensor_count(y) == tensor_rows(x) && y.dtype == F32 && x.dtype == F32,
          "row_norms: %s of %s", tensor_text(y), tensor_text(x));
    ON_DEVICE(x, row_norms)(y, x);
}

void quotient(Tensor y, Write write, Tensor a, Tensor b) {
    CHECK(tensor_count(y) == tensor_count(a) && tensor_count(y) == tensor_count(b) &&
              y.dtype == F32 && a.dtype == F32 && b.dtype == F32,
          "quotient: %s = %s / %s", tensor_text(y), tensor_text(a), tensor_text(b));
    ON_DEVICE(a, quotient)(y, write, a, b);
}

void swap_outer(Tensor y, Tensor x) {
    CHECK(x.ndim == 3 && y.ndim == 3 && y.shape[0] == x.shape[1] && y.shape[1] == x.shape[0] &&
              y.shape[2] == x.shape[2] && y.dtype == x.dtype && !dtype_is_packed(x.dtype),
          "swap_outer: %s from %s", tensor_text(y), tensor_text(x));
    ON_DEVICE(x, swap_outer)(y, x);
}
