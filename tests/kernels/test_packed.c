/* test_packed.c - products of packed weights: those of the unpacked ones, and with activations in 8
 * bits the plain sum; needs no library, so that it also runs on emulated processors. */
#include "kernels/blocks.h"
#include "kernels/elementwise.h"
#include "kernels/matmul.h"
#include "kernels/quantize.h"
#include "tests/test.h"

#include <math.h>

static Tensor make(DType dtype, int64_t rows, int64_t cols) {
    Tensor t = TENSOR(NULL, dtype, rows, cols);
    t.data = aligned_alloc(64, (tensor_bytes(t) + 63) / 64 * 64);
    return t;
}

static Tensor zeros(DType dtype, int64_t rows, int64_t cols) {
    return TENSOR(must_calloc((size_t)(rows * cols), dtype_size(dtype)), dtype, rows, cols);
}

static void expect_near(Tensor y, Tensor expected, double tolerance, const char *what) {
    int64_t n = tensor_count(y);
    float *a = must_malloc((size_t)n * 4), *b = must_malloc((size_t)n * 4);
    scale_copy(TENSOR(a, F32, n), SET, y, 1);
    scale_copy(TENSOR(b, F32, n), SET, expected, 1);
    double error = relative_error(a, b, n);
    EXPECT(error < tolerance, "%s: %g", what, error);
    free(a);
    free(b);
}

CASE(packed_matmul, products_are_those_of_the_unpacked_weights) {
    static const DType kinds[] = {Q4_0, Q8_0, NF4, NF4_NESTED, Q4_0_TILED, Q8_0_TILED};
    static const int64_t sizes[][3] = {
        {1, 48, 128}, {3, 64, 192}, {7, 80, 64}, {33, 2064, 576}, {5, 40960, 192}}; /* M N K */
    for (size_t kind = 0; kind < sizeof kinds / sizeof *kinds; kind++)
        for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
            for (int half = 0; half < 2; half++) {
                int64_t M = sizes[s][0], N = sizes[s][1], K = sizes[s][2];
                if (N > 40000 && (kinds[kind] != Q4_0_TILED || !half)) continue;
                DType dtype = half ? BF16 : F32;
                Tensor w = RANDOM_TENSOR(F32, 1, N, K), packed = make(kinds[kind], N, K),
                       unpacked = zeros(dtype, N, K);
                quantize(packed, w);
                scale_copy(unpacked, SET, packed, 1);
                Tensor x = RANDOM_TENSOR(dtype, 2, M, K), dy = RANDOM_TENSOR(dtype, 3, M, N);
                Tensor y = RANDOM_TENSOR(dtype, 4, M, N), z = zeros(dtype, M, N);
                Tensor dx = zeros(dtype, M, K), dz = zeros(dtype, M, K);
                double tolerance = half ? 8e-3 : 1e-5;
                scale_copy(z, SET, y, 1);
                matmul(NT, y, ADD, x, packed, 1);
                matmul(NT, z, ADD, x, unpacked, 1);
                expect_near(y, z, tolerance, dtype_name(kinds[kind]));
                matmul(NN, dx, SET, dy, packed, 1);
                matmul(NN, dz, SET, dy, unpacked, 1);
                expect_near(dx, dz, tolerance, dtype_name(kinds[kind]));
            }
}

/* What a product with activations in blocks of 8 bits is, in double precision. */
static void plain_int8(Tensor y, Tensor x, Tensor packed) {
    int64_t M = tensor_rows(x), K = tensor_cols(x), N = tensor_rows(packed);
    float *w = must_malloc((size_t)(N * K) * 4), *v = must_malloc((size_t)(M * K) * 4);
    scale_copy(TENSOR(w, F32, N * K), SET, packed, 1);
    scale_copy(TENSOR(v, F32, M * K), SET, x, 1);
    for (int64_t b = 0; b < M * K; b += 32) {
        float most = 0;
        for (int i = 0; i < 32; i++) most = fmaxf(most, fabsf(v[b + i]));
        for (int i = 0; i < 32 && most > 0; i++)
            v[b + i] = rintf(v[b + i] * (127 / most)) * (most / 127);
    }
    for (int64_t m = 0; m < M; m++)
        for (int64_t n = 0; n < N; n++) {
            double sum = 0;
            for (int64_t k = 0; k < K; k++) sum += (double)v[m * K + k] * w[n * K + k];
            ((float *)y.data)[m * N + n] = (float)sum;
        }
    free(w);
    free(v);
}

CASE(packed_matmul, eight_bit_activations_give_the_plain_sum) {
    static const DType kinds[] = {Q4_0_TILED, Q8_0_TILED};
    for (int kind = 0; kind < 2; kind++)
        for (int64_t M = 1; M <= 30; M++) {
            int64_t N = 16 * (1 + M % 5), K = 64 * (1 + M % 7);
            Tensor packed = make(kinds[kind], N, K), x = RANDOM_TENSOR(M % 2 ? F32 : BF16, 8, M, K);
            quantize(packed, RANDOM_TENSOR(F32, 7, N, K));
            Tensor y = zeros(F32, M, N), expected = zeros(F32, M, N);
            matmul_int8(y, x, packed);
            plain_int8(expected, x, packed);
            expect_near(y, expected, 2e-5, dtype_name(kinds[kind]));
        }
}

CASE(packed_matmul, a_rows_bits_do_not_depend_on_how_many_there_are) {
    static const DType kinds[][2] = {
        {Q4_0_TILED, F32}, {Q4_0_TILED, BF16}, {Q8_0_TILED, F32}, {Q8_0_TILED, BF16}};
    for (int kind = 0; kind < 4; kind++) {
        DType dtype = kinds[kind][1];
        Tensor packed = make(kinds[kind][0], 64, 512), x = RANDOM_TENSOR(dtype, 8, 45, 512);
        quantize(packed, RANDOM_TENSOR(F32, 7, 64, 512));
        Tensor all = zeros(dtype, 45, 64), one = zeros(dtype, 1, 64);
        matmul_int8(all, x, packed);
        for (int64_t m = 0; m < 45; m++) {
            matmul_int8(one, tensor_slice(x, m, 1), packed);
            EXPECT(!memcmp(one.data, tensor_slice(all, m, 1).data, tensor_bytes(one)), "%s, row %d",
                   dtype_name(kinds[kind][0]), (int)m);
        }
    }
}

CASE(packed_matmul, groups_meet_their_own_matrices) {
    int32_t offsets[] = {0, 16, 16, 48, 96}, counts[] = {3, 0, 17, 41};
    Tensor w = RANDOM_TENSOR(F32, 7, 4, 32, 128), packed = TENSOR(NULL, Q4_0_TILED, 4, 32, 128);
    packed.data = aligned_alloc(64, tensor_bytes(packed));
    quantize(packed, w);
    Tensor x = RANDOM_TENSOR(F32, 8, 96, 128), y = zeros(F32, 96, 32);
    grouped_matmul_int8(y, x, packed, TENSOR(offsets, I32, 5), TENSOR(counts, I32, 4));
    for (int g = 0; g < 4; g++) {
        if (!counts[g]) continue;
        Tensor expected = zeros(F32, counts[g], 32);
        matmul_int8(expected, tensor_slice(x, offsets[g], counts[g]), tensor_at(packed, g));
        EXPECT(!memcmp(expected.data, tensor_slice(y, offsets[g], counts[g]).data,
                       tensor_bytes(expected)));
    }
    for (int i = 0; i < 32; i++)
        EXPECT(((float *)y.data)[3 * 32 + i] == 0, "a row of padding is written");
}
