/* matmul.c - the contracts of matmul.h. */
#include "kernels/matmul.h"

static void check_product(Layout layout, Tensor y, Tensor a, Tensor b) {
    int64_t M = tensor_rows(y), N = tensor_cols(y);
    int64_t K = layout == TN ? tensor_rows(a) : tensor_cols(a);
    CHECK((layout == TN ? tensor_cols(a) : tensor_rows(a)) == M, "matmul: a %s against y %s",
          tensor_text(a), tensor_text(y));
    CHECK((layout == NT ? tensor_rows(b) : tensor_cols(b)) == N, "matmul: b %s against y %s",
          tensor_text(b), tensor_text(y));
    CHECK((layout == NT ? tensor_cols(b) : tensor_rows(b)) == K, "matmul: a %s and b %s share no K",
          tensor_text(a), tensor_text(b));
    CHECK((a.dtype == F32 || a.dtype == BF16) &&
              (b.dtype == F32 || b.dtype == BF16 || (dtype_is_packed(b.dtype) && layout != TN)) &&
              (y.dtype == F32 || y.dtype == BF16),
          "matmul: dtypes %s %s %s", dtype_name(y.dtype), dtype_name(a.dtype), dtype_name(b.dtype));
}

void matmul(Layout layout, Tensor y, Write write, Tensor a, Tensor b, float alpha) {
    check_product(layout, y, a, b);
    if (!tensor_count(y)) return;
    ON_DEVICE(a, matmul)(layout, y, write, a, b, alpha);
}

static void check_term(const char *name, Layout layout, Tensor y, const Term *terms, int i) {
    if (!has_term(terms, i)) return;
    Tensor u = terms[i].u, v = terms[i].v;
    check_product(layout, y, u, v);
    CHECK(u.dtype == F32 && v.dtype == F32, "%s: terms %s %s", name, tensor_text(u),
          tensor_text(v));
}

void matmul_several(const Tensor *y, Tensor a, const Tensor *b, const Term *terms, int count) {
    CHECK(count > 0 && count <= MATRICES_MOST, "matmul_several: %d matrices", count);
    for (int i = 0; i < count; i++) {
        check_product(NT, y[i], a, b[i]);
        check_term("matmul_several", NT, y[i], terms, i);
        CHECK(y[i].dtype == y->dtype, "matmul_several: %s and %s", tensor_text(*y),
              tensor_text(y[i]));
    }
    if (!tensor_count(a)) return;
    ON_DEVICE(a, matmul_several)(y, a, b, terms, count);
}

void matmul_sum(Tensor y, Write write, const Tensor *a, const Tensor *b, const Term *terms,
                int count) {
    CHECK(count > 0 && count <= MATRICES_MOST, "matmul_sum: %d products", count);
    const Term *first = NULL;
    for (int i = 0; i < count; i++) {
        check_product(NN, y, a[i], b[i]);
        check_term("matmul_sum", NN, y, terms, i);
        if (has_term(terms, i) && !first) first = &terms[i];
        CHECK(!has_term(terms, i) || terms[i].scale == first->scale, "matmul_sum: two scales");
    }
    if (!tensor_count(y)) return;
    ON_DEVICE(y, matmul_sum)(y, write, a, b, terms, count);
}

void matmul_ordered(Layout layout, Tensor y, Write write, Tensor a, Tensor b, float alpha) {
    matmul_ordered_several(layout, &y, write, &a, &b, 1, alpha);
}

void matmul_ordered_several(Layout layout, const Tensor *y, Write write, const Tensor *a,
                            const Tensor *b, int count, float alpha) {
    CHECK(count > 0 && count <= MATRICES_MOST && (count == 1 || layout != NN || write == ADD),
          "matmul_ordered: %d matrices", count);
    for (int i = 0; i < count; i++) {
        Tensor to = y[layout == NN ? 0 : i], left = a[layout == NT ? 0 : i],
               right = b[layout == TN ? 0 : i];
        check_product(layout, to, left, right);
        CHECK(to.dtype == y->dtype && left.dtype == a->dtype && right.dtype == b->dtype &&
                  !dtype_is_packed(right.dtype),
              "matmul_ordered: %s %s %s", tensor_text(to), tensor_text(left), tensor_text(right));
    }
    if (!tensor_count(*y)) return;
    ON_DEVICE(*a, matmul_ordered_several)(layout, y, write, a, b, count, alpha);
}

void adapters_backward(const AdapterBack *a, int count) {
    CHECK(count <= MATRICES_MOST, "adapters_backward: %d adapters", count);
    for (int i = 0; i < count; i++) {
        check_product(NN, a[i].du, a[i].dy, a[i].B);
        CHECK(a[i].du.dtype == F32 && a[i].B.dtype == F32 && a[i].dy.dtype == a->dy.dtype,
              "adapters_backward: %s %s %s", tensor_text(a[i].du), tensor_text(a[i].dy),
              tensor_text(a[i].B));
        if (!tensor_present(a[i].dB)) continue;
        check_product(TN, a[i].dB, a[i].dy, a[i].u);
        CHECK(a[i].dB.dtype == F32 && a[i].u.dtype == F32, "adapters_backward: %s %s",
              tensor_text(a[i].dB), tensor_text(a[i].u));
    }
    if (!count || !tensor_count(a->du)) return;
    ON_DEVICE(a->dy, adapters_backward)(a, count);
}

void grouped_matmul(Layout layout, Tensor y, Write write, Tensor a, Tensor b, Tensor offsets,
                    float alpha) {
    int64_t groups = tensor_count(offsets) - 1;
    if (layout == TN) {
        CHECK(write == ADD && y.ndim == 3 && y.shape[0] == groups,
              "grouped_matmul: TN adds to (G, P, Q)");
        CHECK(tensor_rows(a) == tensor_rows(b) && tensor_cols(a) == y.shape[1] &&
                  tensor_cols(b) == y.shape[2],
              "grouped_matmul: %s %s %s", tensor_text(y), tensor_text(a), tensor_text(b));
    } else {
        CHECK(b.ndim == 3 && b.shape[0] == groups && tensor_rows(y) == tensor_rows(a),
              "grouped_matmul: %s %s %s", tensor_text(y), tensor_text(a), tensor_text(b));
    }
    CHECK(offsets.dtype == I32, "grouped_matmul: offsets are %s", tensor_text(offsets));
    ON_DEVICE(a, grouped_matmul)(layout, y, write, a, b, offsets, alpha);
}

void matmul_int8(Tensor y, Tensor a, Tensor b) {
    matmul_int8_several(&y, a, tensor_absent(), &b, 1);
}

/* More rows are worth a kernel of their own. */
#define CODES_ROWS 64

int64_t int8_codes(const Device *device, int64_t M, int64_t K) {
    bool makes = device->kind == DEVICE_CUDA && M <= CODES_ROWS && K % TILE_WIDTH == 0;
    return makes ? M * K + M * K / 8 : 0;
}

void matmul_int8_several(const Tensor *y, Tensor a, Tensor codes, const Tensor *b, int count) {
    CHECK(count > 0 && count <= MATRICES_MOST, "matmul_int8: %d matrices", count);
    for (int i = 0; i < count; i++) {
        check_product(NT, y[i], a, b[i]);
        CHECK(dtype_is_tiled(b[i].dtype) && b[i].dtype == b->dtype && y[i].dtype == y->dtype,
              "matmul_int8: b is %s, y %s", tensor_text(b[i]), tensor_text(y[i]));
    }
    CHECK(codes_fit(codes, a), "matmul_int8: codes %s of %s", tensor_text(codes), tensor_text(a));
    if (!tensor_count(a)) return;
    ON_DEVICE(a, matmul_int8_several)(y, a, codes, b, count);
}

void grouped_matmul_int8(Tensor y, Tensor a, Tensor b, Tensor offsets, Tensor counts) {
    CHECK(b.ndim == 3 && b.shape[0] == tensor_count(counts) &&
              tensor_count(offsets) == tensor_count(counts) + 1 && dtype_is_tiled(b.dtype) &&
              tensor_rows(y) == tensor_rows(a) && tensor_cols(a) == b.shape[2] &&
              tensor_cols(y) == b.shape[1],
          "grouped_matmul_int8: %s %s %s", tensor_text(y), tensor_text(a), tensor_text(b));
    ON_DEVICE(a, grouped_matmul_int8)(y, a, b, offsets, counts);
}
