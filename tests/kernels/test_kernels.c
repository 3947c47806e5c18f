/* test_kernels.c - each kernel against a plain loop in double precision, at the level in use;
 * gradients against finite differences; contracts that must refuse. */
#include "kernels/activation.h"
#include "kernels/attention.h"
#include "kernels/blocks.h"
#include "kernels/dynamic.h"
#include "kernels/elementwise.h"
#include "kernels/embedding.h"
#include "kernels/heads.h"
#include "kernels/loss.h"
#include "kernels/matmul.h"
#include "kernels/norm.h"
#include "kernels/quantize.h"
#include "kernels/random.h"
#include "kernels/rope.h"
#include "kernels/routing.h"
#include "kernels/update.h"
#include "tests/test.h"

#include <math.h>

static Tensor zeros(DType dtype, int64_t a, int64_t b) {
    return TENSOR(must_calloc((size_t)(a * b), dtype_size(dtype)), dtype, a, b);
}

static float at(Tensor t, int64_t i) {
    return t.dtype == F32 ? ((float *)t.data)[i] : bf16_to_f32(((uint16_t *)t.data)[i]);
}

/* A scalar function of x, and its gradient by central differences. */
typedef double Function(Tensor x, void *context);

static void expect_gradient(Function *f, Tensor x, Tensor dx, void *context, double tolerance,
                            const char *what) {
    float *values = x.data, worst = 0, scale = 0;
    for (int64_t i = 0; i < tensor_count(x); i++) {
        float keep = values[i], step = 1e-2f;
        values[i] = keep + step;
        double up = f(x, context);
        values[i] = keep - step;
        double down = f(x, context);
        values[i] = keep;
        float slope = (float)((up - down) / (2 * (double)step));
        worst = fmaxf(worst, fabsf(slope - ((float *)dx.data)[i]));
        scale = fmaxf(scale, fabsf(slope));
    }
    EXPECT(worst <= tolerance * fmaxf(1, scale), "%s: gradient off by %g at scale %g", what, worst,
           scale);
}

/* ---- matmul ---- */

/* Term k of element (m, n) of a b. */
static double term_of_product(Layout layout, Tensor a, Tensor b, int64_t m, int64_t n, int64_t k) {
    return (double)at(a, layout == TN ? k * tensor_cols(a) + m : m * tensor_cols(a) + k) *
           at(b, layout == NT ? n * tensor_cols(b) + k : k * tensor_cols(b) + n);
}

static void plain_matmul(Layout layout, int64_t M, int64_t N, int64_t K, Tensor a, Tensor b,
                         double *y) {
    for (int64_t m = 0; m < M; m++)
        for (int64_t n = 0; n < N; n++) {
            double sum = 0;
            for (int64_t k = 0; k < K; k++) sum += term_of_product(layout, a, b, m, n, k);
            y[m * N + n] = sum;
        }
}

CASE(kernel_matmul, every_layout_dtype_and_size_equals_a_plain_loop) {
    static const int64_t sizes[][3] = {{1, 7, 5},    {3, 64, 33},    {4, 130, 300},
                                       {17, 19, 23}, {100, 300, 17}, {130, 16, 520}};
    static const DType types[][3] = {{F32, F32, F32},   {BF16, BF16, BF16},
                                     {BF16, BF16, F32}, {BF16, F32, F32},
                                     {F32, F32, BF16},  {BF16, F32, BF16}}; /* a, b, y */
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
        for (size_t d = 0; d < sizeof types / sizeof *types; d++)
            for (int layout = NT; layout <= TN; layout++)
                for (int write = SET; write <= ADD; write++) {
                    int64_t M = sizes[s][0], N = sizes[s][1], K = sizes[s][2];
                    Tensor a = layout == TN ? RANDOM_TENSOR(types[d][0], 1, K, M)
                                            : RANDOM_TENSOR(types[d][0], 1, M, K);
                    Tensor b = layout == NT ? RANDOM_TENSOR(types[d][1], 2, N, K)
                                            : RANDOM_TENSOR(types[d][1], 2, K, N);
                    Tensor y = RANDOM_TENSOR(types[d][2], 3, M, N),
                           old = RANDOM_TENSOR(types[d][2], 3, M, N);
                    double *expected = must_malloc((size_t)(M * N) * sizeof *expected);
                    plain_matmul((Layout)layout, M, N, K, a, b, expected);
                    matmul((Layout)layout, y, (Write)write, a, b, 1.0f);
                    /* bf16 outputs round to 8 bits; f32 sums of K terms of size one stray by
                     * sqrt(K) ulp. */
                    double tolerance = types[d][2] == BF16 ? 0.01 : 2e-6;
                    for (int64_t i = 0; i < M * N; i++) {
                        double want = expected[i] + (write == ADD ? at(old, i) : 0);
                        EXPECT(fabs(at(y, i) - want) <=
                                   tolerance * (sqrt((double)K) * 4 + fabs(want)),
                               "layout %d sizes %d %d %d dtypes %s %s %s: %g, expected %g", layout,
                               (int)M, (int)N, (int)K, dtype_name(types[d][0]),
                               dtype_name(types[d][1]), dtype_name(types[d][2]), at(y, i), want);
                    }
                    free(expected);
                    free(a.data), free(b.data), free(y.data), free(old.data);
                }
}

CASE(kernel_matmul, ordered_products_do_not_change_when_zero_terms_are_added) {
    int64_t M = 40, N = 70, K = 100;
    Tensor a = RANDOM_TENSOR(F32, 1, K, M), b = RANDOM_TENSOR(BF16, 2, K, N), y = zeros(F32, M, N),
           z = zeros(F32, M, N);
    Tensor wide_a = zeros(F32, 3 * K, M), wide_b = RANDOM_TENSOR(BF16, 5, 3 * K, N);
    for (int64_t k = 0; k < K; k++) { /* every third row is a real one */
        memcpy((float *)wide_a.data + 3 * k * M, (float *)a.data + k * M, (size_t)M * 4);
        memcpy((uint16_t *)wide_b.data + 3 * k * N, (uint16_t *)b.data + k * N, (size_t)N * 2);
    }
    matmul_ordered(TN, y, SET, a, b, 0.5f);
    matmul_ordered(TN, z, SET, wide_a, wide_b, 0.5f);
    EXPECT(!memcmp(y.data, z.data, (size_t)(M * N) * 4));
}

/* Larger than what goes through a cache at once: several blocks of rows, panels, chunks and passes
 * of terms; and edges of every kind. */
CASE(kernel_matmul, large_products_of_bf16_equal_a_plain_loop) {
    static const int64_t sizes[][3] = {
        {1100, 77, 40}, {70, 600, 1700}, {530, 33, 300}, {40, 50, 16500}, {33, 40, 560000}};
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
        for (int layout = NT; layout <= TN; layout++) {
            int64_t M = sizes[s][0], N = sizes[s][1], K = sizes[s][2];
            Tensor a = layout == TN ? RANDOM_TENSOR(BF16, 1, K, M) : RANDOM_TENSOR(BF16, 1, M, K);
            Tensor b = layout == NT ? RANDOM_TENSOR(BF16, 2, N, K) : RANDOM_TENSOR(BF16, 2, K, N);
            Tensor y = zeros(F32, M, N), narrow = zeros(BF16, M, N);
            matmul((Layout)layout, y, SET, a, b, 1.0f);
            matmul((Layout)layout, narrow, SET, a, b, 1.0f);
            for (int64_t m = 0; m < M; m += 7)
                for (int64_t n = m % 5; n < N; n += 5) {
                    double want = 0, size = 0;
                    for (int64_t k = 0; k < K; k++) {
                        double term = term_of_product((Layout)layout, a, b, m, n, k);
                        want += term;
                        size += term * term;
                    }
                    EXPECT(fabs(at(y, m * N + n) - want) <= 1e-4 * sqrt(size),
                           "layout %d, %d %d %d: %g, expected %g", layout, (int)M, (int)N, (int)K,
                           at(y, m * N + n), want);
                    EXPECT(fabs(at(narrow, m * N + n) - want) <=
                           1e-4 * sqrt(size) + 0x1p-8 * fabs(want));
                }
            free(a.data), free(b.data), free(y.data), free(narrow.data);
        }
}

/* What makes leaving out rows without loss exact. */
CASE(kernel_matmul, rows_of_bf16_products_do_not_depend_on_how_many_there_are) {
    if (cpu_level() < CPU_LEVELS - 1) SKIP("elsewhere a library's products decide it");
    int64_t M = 700, N = 300, K = 2100, first = 13, count = 45;
    for (int layout = NT; layout <= NN; layout++) {
        Tensor a = RANDOM_TENSOR(BF16, 1, M, K), y = zeros(BF16, M, N), z = zeros(BF16, count, N);
        Tensor b = layout == NT ? RANDOM_TENSOR(BF16, 2, N, K) : RANDOM_TENSOR(BF16, 2, K, N);
        matmul((Layout)layout, y, SET, a, b, 1.0f);
        matmul((Layout)layout, z, SET, tensor_slice(a, first, count), b, 1.0f);
        EXPECT(!memcmp((uint16_t *)y.data + first * N, z.data, (size_t)(count * N) * 2));
        Tensor v = layout == NT ? RANDOM_TENSOR(F32, 3, N, 24) : RANDOM_TENSOR(F32, 3, 24, N),
               c = layout == NT ? RANDOM_TENSOR(F32, 4, 24, K) : RANDOM_TENSOR(F32, 4, K, 24),
               u = zeros(F32, M, 24), w = zeros(F32, count, 24);
        matmul_ordered((Layout)layout, u, SET, a, c, 1.0f);
        matmul_ordered((Layout)layout, w, SET, tensor_slice(a, first, count), c, 1.0f);
        EXPECT(!memcmp((float *)u.data + first * 24, w.data, (size_t)(count * 24) * 4));
        matmul_ordered((Layout)layout, y, ADD, u, v, 0.3f);
        matmul_ordered((Layout)layout, z, ADD, w, v, 0.3f);
        EXPECT(!memcmp((uint16_t *)y.data + first * N, z.data, (size_t)(count * N) * 2));
    }
}

/* y = old + scale a b + what u and v make, here and there. */
static void expect_product(Layout layout, Tensor y, Tensor old, float scale, Tensor a, Tensor b,
                           Term term, double tolerance) {
    int64_t N = tensor_cols(y), K = layout == TN ? tensor_rows(a) : tensor_cols(a);
    for (int64_t m = 0; m < tensor_rows(y); m += 7)
        for (int64_t n = m % 5; n < N; n += 5) {
            double want = tensor_present(old) ? at(old, m * N + n) : 0, size = want * want;
            for (int64_t k = 0; k < K; k++) {
                double one = scale * term_of_product(layout, a, b, m, n, k);
                want += one, size += one * one;
            }
            for (int64_t k = 0; tensor_present(term.u) && k < tensor_cols(term.u); k++) {
                double one = term.scale * term_of_product(layout, term.u, term.v, m, n, k);
                want += one, size += one * one;
            }
            EXPECT(fabs(at(y, m * N + n) - want) <= tolerance * (sqrt(size) + fabs(want)),
                   "layout %d, %s and %s: %g, expected %g", layout, tensor_text(a), tensor_text(b),
                   at(y, m * N + n), want);
        }
}

/* What adapters of some ranks do with bf16 activations, of which some rows are zero. */
CASE(kernel_matmul, products_of_adapters_equal_a_plain_loop) {
    static const int64_t sizes[][4] = {
        {530, 200, 1700, 16}, {40, 1700, 90, 130}, {1100, 64, 70, 5}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        int64_t M = sizes[i][0], N = sizes[i][1], K = sizes[i][2], R = sizes[i][3];
        Tensor x = RANDOM_TENSOR(BF16, 1, M, K), W = RANDOM_TENSOR(BF16, 2, N, K),
               dy = RANDOM_TENSOR(BF16, 3, M, N), A = RANDOM_TENSOR(F32, 4, R, K),
               B = RANDOM_TENSOR(F32, 5, N, R), u = zeros(F32, M, R), du = zeros(F32, M, R),
               y = zeros(BF16, M, N), dA = RANDOM_TENSOR(F32, 6, R, K),
               oldA = RANDOM_TENSOR(F32, 6, R, K), dB = RANDOM_TENSOR(F32, 7, N, R),
               oldB = RANDOM_TENSOR(F32, 7, N, R), dx = RANDOM_TENSOR(BF16, 8, M, K),
               old = RANDOM_TENSOR(BF16, 8, M, K), none = tensor_absent();
        for (int64_t m = 0; m < M; m += 3)
            memset((uint16_t *)dy.data + m * N, 0, (size_t)N * sizeof(uint16_t));
        matmul_ordered(NT, u, SET, x, A, 1.0f);
        expect_product(NT, u, none, 1, x, A, (Term){0}, 2e-6);
        Term forth = {u, B, 0.5f}, back = {du, A, 0.7f};
        matmul_several(&y, x, &W, &forth, 1);
        expect_product(NT, y, none, 1, x, W, forth, 0x1p-7);
        AdapterBack way = {du, dB, dy, u, B, 0.5f};
        adapters_backward(&way, 1);
        expect_product(NN, du, none, 0.5f, dy, B, (Term){0}, 2e-6);
        expect_product(TN, dB, oldB, 0.5f, dy, u, (Term){0}, 2e-6);
        matmul_ordered(TN, dA, ADD, du, x, 0.7f);
        expect_product(TN, dA, oldA, 0.7f, du, x, (Term){0}, 2e-6);
        matmul_sum(dx, ADD, &dy, &W, &back, 1);
        expect_product(NN, dx, old, 1, dy, W, back, 0x1p-7);
        for (int64_t m = 0; m < M * R; m++) ((float *)du.data)[m] = 0;
        memcpy(dA.data, oldA.data, tensor_bytes(dA));
        matmul_ordered(TN, dA, ADD, du, x, 1.0f);
        EXPECT(!memcmp(dA.data, oldA.data, tensor_bytes(dA)), "rows of zeros add something");
        Tensor all[] = {x, W, dy, A, B, u, du, y, dA, oldA, dB, oldB, dx, old};
        for (size_t t = 0; t < sizeof all / sizeof *all; t++) free(all[t].data);
    }
}

static void multiply_mismatched(void) {
    matmul(NT, zeros(F32, 2, 3), SET, zeros(F32, 2, 4), zeros(F32, 3, 5), 1.0f);
}
static void norm_mismatched(void) {
    rmsnorm_forward(zeros(F32, 2, 4), tensor_absent(), zeros(F32, 2, 4), zeros(F32, 1, 3),
                    tensor_absent(), 1e-6f);
}
static void gather_mismatched(void) {
    embedding_forward(zeros(F32, 2, 9), zeros(F32, 4, 8), 0, TENSOR(must_calloc(2, 4), I32, 2),
                      1.0f);
}

CASE(kernel_contracts, wrong_shapes_are_refused) {
    EXPECT(test_faults(multiply_mismatched));
    EXPECT(test_faults(norm_mismatched));
    EXPECT(test_faults(gather_mismatched));
}

/* ---- norm ---- */

typedef struct NormContext {
    Tensor x, weight, dy;
} NormContext;

static double norm_value(NormContext *c) {
    Tensor y = zeros(F32, tensor_rows(c->x), tensor_cols(c->x));
    rmsnorm_forward(y, tensor_absent(), c->x, c->weight, tensor_absent(), 1e-6f);
    double sum = 0;
    for (int64_t i = 0; i < tensor_count(y); i++) sum += (double)at(y, i) * at(c->dy, i);
    free(y.data);
    return sum;
}
static double norm_of_x(Tensor x, void *context) {
    ((NormContext *)context)->x = x;
    return norm_value(context);
}
static double norm_of_weight(Tensor w, void *context) {
    ((NormContext *)context)->weight = w;
    return norm_value(context);
}

CASE(kernel_norm, gradients_match_finite_differences) {
    NormContext c = {RANDOM_TENSOR(F32, 1, 3, 20), RANDOM_TENSOR(F32, 2, 20),
                     RANDOM_TENSOR(F32, 3, 3, 20)};
    Tensor y = zeros(F32, 3, 20), rstd = zeros(F32, 3, 1), dx = zeros(F32, 3, 20),
           dw = zeros(F32, 1, 20);
    rmsnorm_forward(y, rstd, c.x, c.weight, tensor_absent(), 1e-6f);
    rmsnorm_backward(dx, SET, dw, c.dy, c.x, rstd, c.weight);
    expect_gradient(norm_of_x, c.x, dx, &c, 1e-3, "x");
    expect_gradient(norm_of_weight, c.weight, dw, &c, 1e-3, "weight");
}

CASE(kernel_norm, apply_repeats_forward_bit_for_bit) {
    Tensor x = RANDOM_TENSOR(BF16, 1, 9, 77), w = RANDOM_TENSOR(BF16, 2, 77),
           y = zeros(BF16, 9, 77), z = zeros(BF16, 9, 77);
    Tensor rstd = zeros(F32, 9, 1);
    rmsnorm_forward(y, rstd, x, w, tensor_absent(), 1e-6f);
    rmsnorm_apply(z, rstd, x, w);
    EXPECT(!memcmp(y.data, z.data, 9 * 77 * 2));
}

/* ---- rope ---- */

CASE(kernel_rope, rotation_is_undone_by_its_backward_and_leaves_unrotated_pairs) {
    Tensor x = RANDOM_TENSOR(F32, 1, 6, 2, 16), y = RANDOM_TENSOR(F32, 2, 6, 2, 16),
           z = RANDOM_TENSOR(F32, 3, 6, 2, 16);
    int32_t positions[] = {0, 1, 2, 100, 1000, 50000};
    Tensor cos = zeros(F32, 6, 8), sin = zeros(F32, 6, 8);
    rope_table(cos, sin, TENSOR(positions, I32, 6), 10000.0f, 2, 1.0f);
    rope_forward(y, x, cos, sin);
    rope_backward(z, y, cos, sin);
    EXPECT(relative_error(z.data, x.data, tensor_count(x)) < 1e-6);
    for (int64_t i = 2; i < 8; i++) EXPECT(at(y, i) == at(x, i) && at(y, i + 8) == at(x, i + 8));
    /* position 1, pair 1 of 8: angle 10000^(-1/8) */
    double angle = pow(10000.0, -1.0 / 8), a = at(x, 32 + 1), b = at(x, 32 + 9);
    EXPECT_CLOSE(at(y, 32 + 1), a * cosl(angle) - b * sinl(angle), 1e-5);
}

/* ---- gelu ---- */

typedef struct GateContext {
    Tensor gate, up, dy;
} GateContext;

static double gate_value(GateContext *c) {
    double sum = 0;
    Tensor y = zeros(F32, 1, tensor_count(c->gate));
    gelu_mul_forward(y, c->gate, c->up);
    for (int64_t i = 0; i < tensor_count(y); i++) sum += (double)at(y, i) * at(c->dy, i);
    free(y.data);
    return sum;
}
static double gate_of_gate(Tensor x, void *context) {
    ((GateContext *)context)->gate = x;
    return gate_value(context);
}
static double gate_of_up(Tensor x, void *context) {
    ((GateContext *)context)->up = x;
    return gate_value(context);
}

CASE(kernel_gelu, values_and_gradients_are_right) {
    GateContext c = {RANDOM_TENSOR(F32, 1, 600), RANDOM_TENSOR(F32, 2, 600),
                     RANDOM_TENSOR(F32, 3, 600)};
    Tensor y = zeros(F32, 1, 600), dgate = zeros(F32, 1, 600), dup = zeros(F32, 1, 600);
    gelu_mul_forward(y, c.gate, c.up);
    for (int64_t i = 0; i < 600; i++) {
        double x = at(c.gate, i), u = 0.7978845608028654 * (x + 0.044715 * x * x * x);
        EXPECT_CLOSE(at(y, i), 0.5 * x * (1 + tanh(u)) * at(c.up, i), 1e-6);
    }
    Tensor again = zeros(F32, 1, 600);
    gelu_mul_backward(dgate, dup, again, c.dy, c.gate, c.up);
    EXPECT(!memcmp(again.data, y.data, 600 * sizeof(float)));
    expect_gradient(gate_of_gate, c.gate, dgate, &c, 1e-3, "gate");
    expect_gradient(gate_of_up, c.up, dup, &c, 1e-3, "up");
}

/* ---- attention ---- */

typedef struct AttentionContext {
    Tensor q, k, v, dy, index, first, last;
    int64_t N, H, S, K, C;
} AttentionContext;

static AttentionContext attention_context(int64_t N, int64_t H, int64_t S, int64_t K, int64_t C) {
    AttentionContext c = {.N = N, .H = H, .S = S, .K = K, .C = C};
    c.q = RANDOM_TENSOR(F32, 1, N, H, C), c.k = RANDOM_TENSOR(F32, 2, S, K, C),
    c.v = RANDOM_TENSOR(F32, 3, S, K, C);
    c.dy = RANDOM_TENSOR(F32, 4, N, H, C);
    for (int64_t i = 0; i < N * H * C; i++) ((float *)c.q.data)[i] *= 0.4f;
    c.index = TENSOR(must_calloc((size_t)N, 4), I32, N);
    c.first = TENSOR(must_calloc((size_t)N, 4), I32, N);
    c.last = TENSOR(must_calloc((size_t)N, 4), I32, N);
    for (int64_t n = 0; n < N; n++) { /* a window, a later segment, and a span that looks ahead */
        int32_t place = (int32_t)(n * S / N);
        ((int32_t *)c.index.data)[n] = place;
        ((int32_t *)c.first.data)[n] = place > 9 ? place - 9 : 0;
        ((int32_t *)c.last.data)[n] = n % 3 == 1 && place + 2 < S ? place + 2 : place;
    }
    return c;
}

static double attention_plain(const AttentionContext *c, double *out) {
    double total = 0;
    for (int64_t n = 0; n < c->N; n++)
        for (int64_t h = 0; h < c->H; h++) {
            int64_t g = h / (c->H / c->K), low = ((int32_t *)c->first.data)[n],
                    high = ((int32_t *)c->last.data)[n];
            double sum = 0, top = -1e300, *p = must_calloc((size_t)c->S, sizeof *p);
            for (int64_t j = low; j <= high; j++) {
                for (int64_t i = 0; i < c->C; i++)
                    p[j] += (double)at(c->q, (n * c->H + h) * c->C + i) *
                            at(c->k, (j * c->K + g) * c->C + i);
                top = fmax(top, p[j]);
            }
            for (int64_t j = low; j <= high; j++) sum += p[j] = exp(p[j] - top);
            for (int64_t i = 0; i < c->C; i++) {
                double y = 0;
                for (int64_t j = low; j <= high; j++)
                    y += p[j] / sum * at(c->v, (j * c->K + g) * c->C + i);
                if (out) out[(n * c->H + h) * c->C + i] = y;
                total += y * at(c->dy, (n * c->H + h) * c->C + i);
            }
            free(p);
        }
    return total;
}

static double attention_of_q(Tensor x, void *context) {
    ((AttentionContext *)context)->q = x;
    return attention_plain(context, NULL);
}
static double attention_of_k(Tensor x, void *context) {
    ((AttentionContext *)context)->k = x;
    return attention_plain(context, NULL);
}
static double attention_of_v(Tensor x, void *context) {
    ((AttentionContext *)context)->v = x;
    return attention_plain(context, NULL);
}

/* The way back of heads in one kernel is that through the turn, then the norm; what comes by a
 * second way is added. */
CASE(kernel_heads, gradients_equal_those_a_step_at_a_time) {
    enum { N = 7, HEADS = 3, C = 20 };
    Tensor x = RANDOM_TENSOR(F32, 1, N, HEADS, C), w = RANDOM_TENSOR(F32, 2, C),
           dy = RANDOM_TENSOR(F32, 3, N, HEADS, C), also = RANDOM_TENSOR(F32, 4, N, HEADS, C),
           cos = RANDOM_TENSOR(F32, 5, N, C / 2), sin = RANDOM_TENSOR(F32, 6, N, C / 2),
           rstd = zeros(F32, N, HEADS), y = RANDOM_TENSOR(F32, 7, N, HEADS, C),
           dx = RANDOM_TENSOR(F32, 8, N, HEADS, C), expected = RANDOM_TENSOR(F32, 9, N, HEADS, C),
           none = tensor_absent();
    rmsnorm_forward(y, rstd, x, w, none, 1e-6f);
    rope_backward(expected, dy, cos, sin);
    rmsnorm_backward(expected, SET, none, expected, x, rstd, w);
    rmsnorm_backward(expected, ADD, none, also, x, rstd, none);
    HeadGradient set = {dx, dy, also, x, w, rstd, true};
    heads_backward(&set, 1, cos, sin);
    EXPECT(relative_error(dx.data, expected.data, N * HEADS * C) < 1e-6);
}

CASE(kernel_attention, values_and_gradients_equal_a_plain_loop) {
    static const int64_t shapes[][5] = {{14, 4, 14, 1, 8}, {9, 4, 20, 2, 16}, {70, 8, 70, 8, 4}};
    for (int s = 0; s < 3; s++) {
        AttentionContext c =
            attention_context(shapes[s][0], shapes[s][1], shapes[s][2], shapes[s][3], shapes[s][4]);
        Tensor y = RANDOM_TENSOR(F32, 5, c.N, c.H, c.C), dq = RANDOM_TENSOR(F32, 6, c.N, c.H, c.C),
               lse = zeros(F32, c.N, c.H);
        double *expected = must_malloc((size_t)tensor_count(y) * sizeof *expected);
        int64_t G = attention_partials(c.K);
        Tensor dk = TENSOR(must_calloc((size_t)tensor_count(c.k), 4), F32, c.S, c.K, c.C), dv = dk;
        dv.data = must_calloc((size_t)tensor_count(c.k), 4);
        Tensor partial = G > 1 ? TENSOR(must_calloc((size_t)(2 * G * tensor_count(c.k)), 4), F32,
                                        2 * G, c.S, c.K, c.C)
                               : tensor_absent();
        attention_forward(y, lse, tensor_absent(), c.q, c.k, c.v, c.index, c.first, c.last,
                          tensor_absent(), tensor_absent());
        attention_plain(&c, expected);
        for (int64_t i = 0; i < tensor_count(y); i++) EXPECT_CLOSE(at(y, i), expected[i], 2e-6);
        attention_backward(dq, dk, dv, ADD, c.dy, y, lse, c.q, c.k, c.v, c.index, c.first, c.last,
                           partial);
        if (c.N > 20) continue; /* differences of the larger shape would take minutes */
        expect_gradient(attention_of_q, c.q, dq, &c, 2e-3, "q");
        expect_gradient(attention_of_k, c.k, dk, &c, 2e-3, "k");
        expect_gradient(attention_of_v, c.v, dv, &c, 2e-3, "v");
    }
}

/* The same values in f32. */
static Tensor widened(Tensor x) {
    Tensor y = x;
    y.dtype = F32;
    y.data = must_malloc(tensor_bytes(y));
    scale_copy(y, SET, x, 1.0f);
    return y;
}

static double distance(Tensor a, Tensor b) {
    return relative_error(widened(a).data, widened(b).data, tensor_count(a));
}

/* Attention both ways, of queries with a window or without. */
typedef struct BothWays {
    Tensor y, lse, dq, dk, dv;
} BothWays;

static BothWays both_ways(Tensor q, Tensor k, Tensor v, Tensor dy, int32_t *index, int window) {
    int64_t N = q.shape[0], G = attention_partials(k.shape[1]);
    BothWays b = {q, zeros(F32, N, q.shape[1]), q, k, k};
    Tensor partial = tensor_absent(), first = zeros(I32, N, 1), last = zeros(I32, N, 1);
    Tensor *outs[] = {&b.y, &b.dq, &b.dk, &b.dv};
    for (int i = 0; i < 4; i++) {
        if (i > 1) outs[i]->dtype = F32;
        outs[i]->data = must_calloc(tensor_bytes(*outs[i]), 1);
    }
    if (G > 1)
        partial = TENSOR(must_calloc((size_t)(2 * G * tensor_count(k)), 4), F32, 2 * G, k.shape[0],
                         k.shape[1], k.shape[2]);
    for (int64_t n = 0; n < N; n++) {
        ((int32_t *)first.data)[n] = window && index[n] >= window ? index[n] - window + 1 : 0;
        ((int32_t *)last.data)[n] = index[n];
    }
    attention_forward(b.y, b.lse, tensor_absent(), q, k, v, TENSOR(index, I32, N), first, last,
                      tensor_absent(), tensor_absent());
    attention_backward(b.dq, b.dk, b.dv, SET, dy, b.y, b.lse, q, k, v, TENSOR(index, I32, N), first,
                       last, partial);
    return b;
}

CASE(kernel_attention, of_bf16_follows_f32_and_leaves_out_queries_without_loss_exactly) {
    static const int shapes[][4] = {{8, 1, 256, 0}, {6, 3, 64, 40}, {16, 8, 32, 0}};
    enum { N = 170 };
    for (int i = 0; i < 3; i++) {
        int64_t H = shapes[i][0], K = shapes[i][1], C = shapes[i][2], row = H * C, some = 0;
        int32_t index[N], kept[N];
        Tensor q = RANDOM_TENSOR(BF16, 1, N, H, C), k = RANDOM_TENSOR(BF16, 2, N, K, C),
               v = RANDOM_TENSOR(BF16, 3, N, K, C), dy = RANDOM_TENSOR(BF16, 4, N, H, C);
        scale_copy(q, SET, q, 1 / sqrtf((float)C));
        Tensor few_q = tensor_slice(q, 0, N), few_dy = few_q;
        few_q.data = must_malloc(tensor_bytes(q));
        few_dy.data = must_malloc(tensor_bytes(q));
        for (int n = 0; n < N; n++) {
            uint16_t *own = (uint16_t *)dy.data + n * row;
            index[n] = n;
            if (n % 5 < 2 || n > 150) {
                memcpy((uint16_t *)few_q.data + some * row, (uint16_t *)q.data + n * row,
                       (size_t)row * 2);
                memcpy((uint16_t *)few_dy.data + some * row, own, (size_t)row * 2);
                kept[some++] = n;
            } else {
                memset(own, 0, (size_t)row * 2);
            }
        }
        BothWays all = both_ways(q, k, v, dy, index, shapes[i][3]),
                 few = both_ways(tensor_slice(few_q, 0, some), k, v, tensor_slice(few_dy, 0, some),
                                 kept, shapes[i][3]),
                 wide = both_ways(widened(q), widened(k), widened(v), widened(dy), index,
                                  shapes[i][3]);
        EXPECT(distance(all.y, wide.y) < 4e-3 && distance(all.dq, wide.dq) < 8e-3 &&
                   distance(all.dk, wide.dk) < 8e-3 && distance(all.dv, wide.dv) < 4e-3,
               "heads of %d: %g %g %g %g", (int)C, distance(all.y, wide.y),
               distance(all.dq, wide.dq), distance(all.dk, wide.dk), distance(all.dv, wide.dv));
        for (int64_t m = 0; m < some; m++)
            EXPECT(!memcmp((uint16_t *)all.y.data + kept[m] * row, (uint16_t *)few.y.data + m * row,
                           (size_t)row * 2) &&
                       !memcmp((uint16_t *)all.dq.data + kept[m] * row,
                               (uint16_t *)few.dq.data + m * row, (size_t)row * 2),
                   "heads of %d: row %d has other bits", (int)C, kept[m]);
        for (int64_t j = 0; j < tensor_count(k); j++)
            EXPECT(at(all.dk, j) == at(few.dk, j) && at(all.dv, j) == at(few.dv, j),
                   "heads of %d: element %d", (int)C, (int)j);
    }
}

CASE(kernel_attention, subnormal_results_are_zero_there_and_nowhere_else) {
#ifdef __aarch64__
    SKIP("subnormal results cost nothing here");
#endif
    AttentionContext c = attention_context(70, 8, 70, 8, 4);
    Tensor y = RANDOM_TENSOR(F32, 5, c.N, c.H, c.C), lse = zeros(F32, c.N, c.H);
    fill(c.v, 1e-39f);
    attention_forward(y, lse, tensor_absent(), c.q, c.k, c.v, c.index, c.first, c.last,
                      tensor_absent(), tensor_absent());
    for (int64_t i = 0; i < tensor_count(y); i++) EXPECT(at(y, i) == 0, "element %d", (int)i);
    Tensor a = zeros(F32, 300, 1), b = zeros(F32, 1, 300), product = zeros(F32, 300, 300);
    fill(a, 1e-20f);
    fill(b, 1e-20f);
    matmul_ordered(NN, product, SET, a, b, 1);
    for (int64_t i = 0; i < tensor_count(product); i++)
        EXPECT(at(product, i) > 0, "element %d", (int)i);
}

/* ---- loss ---- */

static double loss_of_logits(Tensor x, void *context) {
    const int32_t *targets = context;
    double total = 0;
    int64_t V = tensor_cols(x);
    for (int64_t r = 0; r < tensor_rows(x); r++) {
        double sum = 0;
        if (targets[r] < 0) continue;
        for (int64_t v = 0; v < V; v++) sum += exp(30 * tanh(at(x, r * V + v) / 30));
        total += 0.5 * (log(sum) - 30 * tanh(at(x, r * V + targets[r]) / 30));
    }
    return total;
}

CASE(kernel_loss, value_and_gradient_match_double_precision) {
    Tensor x = RANDOM_TENSOR(F32, 1, 4, 50), work = RANDOM_TENSOR(F32, 1, 4, 50),
           dx = zeros(F32, 4, 50);
    int32_t targets[] = {3, -1, 49, 0};
    float nll[4], weights[] = {0.5f, 0.5f, 0.5f, 0.5f};
    cross_entropy(TENSOR(nll, F32, 4), dx, work, TENSOR(targets, I32, 4), TENSOR(weights, F32, 4),
                  30.0f);
    EXPECT_CLOSE(0.5 * (nll[0] + nll[1] + nll[2] + nll[3]), loss_of_logits(x, targets), 1e-5);
    EXPECT(nll[1] == 0);
    for (int64_t i = 0; i < 50; i++) EXPECT(at(dx, 50 + i) == 0);
    expect_gradient(loss_of_logits, x, dx, targets, 1e-3, "logits");
}

/* ---- routing ---- */

CASE(kernel_routing, sorted_rows_return_to_their_tokens) {
    int64_t N = 20, E = 6, A = 2, M = routing_rows(N, A, E), D = 5;
    Tensor logits = RANDOM_TENSOR(F32, 1, N, E), probs = zeros(F32, N, E), share = zeros(F32, N, A),
           experts = zeros(I32, N, A);
    Tensor slot = zeros(I32, N, A), offsets = TENSOR(must_calloc(7, 4), I32, E + 1),
           counts = TENSOR(must_calloc(6, 4), I32, E);
    Tensor source = TENSOR(must_calloc((size_t)M, 4), I32, M), x = RANDOM_TENSOR(F32, 2, N, D),
           rows = zeros(F32, M, D);
    Tensor scale = zeros(F32, 1, E), y = zeros(F32, N, D);
    fill(scale, 1.0f);
    router_forward(probs, share, experts, logits);
    routing_sort(offsets, counts, slot, source, experts);
    spread_rows(rows, x, slot, source);
    combine_forward(y, rows, slot, share, experts,
                    scale); /* shares sum to one: the rows come back */
    EXPECT(relative_error(y.data, x.data, N * D) < 1e-6);
    int total = 0;
    for (int64_t e = 0; e < E; e++) {
        total += ((int32_t *)counts.data)[e];
        EXPECT(((int32_t *)offsets.data)[e] % ROUTING_ALIGN == 0);
    }
    EXPECT(total == N * A);
}

CASE(kernel_routing, ties_go_to_the_lowest_expert) {
    Tensor logits = zeros(BF16, 1, 8), probs = zeros(F32, 1, 8), share = zeros(F32, 1, 3),
           experts = zeros(I32, 1, 3);
    router_forward(probs, share, experts, logits);
    for (int i = 0; i < 3; i++) EXPECT(((int32_t *)experts.data)[i] == i);
}

/* ---- the rest ---- */

CASE(kernel_embedding, scatter_adds_repeated_rows_and_skips_the_pad) {
    int32_t ids[] = {2, 0, 2, 1};
    Tensor dy = RANDOM_TENSOR(F32, 1, 4, 700), table = zeros(F32, 3, 700);
    embedding_backward(table, 0, dy, TENSOR(ids, I32, 4), 2.0f, 0);
    for (int64_t i = 0; i < 700; i++) {
        EXPECT(at(table, i) == 0);
        EXPECT_CLOSE(at(table, 1400 + i), 2.0 * (at(dy, i) + at(dy, 1400 + i)), 1e-5);
    }
}

CASE(kernel_dropout, mask_has_its_rate_and_repeats_by_key) {
    Tensor x = zeros(F32, 1, 100000), y = zeros(F32, 1, 100000), z = zeros(F32, 1, 100000);
    fill(x, 1.0f);
    dropout(y, x, 0.25f, 7);
    dropout(z, x, 0.25f, 7);
    EXPECT(!memcmp(y.data, z.data, 400000));
    double kept = 0;
    for (int64_t i = 0; i < 100000; i++) kept += at(y, i) != 0;
    EXPECT_CLOSE(kept / 100000, 0.75, 0.01);
    dropout(z, x, 0.25f, 8);
    EXPECT(memcmp(y.data, z.data, 400000));
}

/* Level of x by looking at all 256. */
static int nearest_level(const float *levels, float x) {
    int best = 0;
    for (int i = 1; i < 256; i++)
        if (fabsf(levels[i] - x) < fabsf(levels[best] - x)) best = i;
    return best;
}

CASE(kernel_update, dynamic_codes_are_the_nearest_levels) {
    for (int is_signed = 0; is_signed < 2; is_signed++) {
        const float *levels = dynamic_levels(is_signed);
        for (uint64_t i = 0; i < 200000; i++) {
            float x = (2.0f * random_uniform(5, 2 * i) - 1.0f) *
                      powf(10.0f, -8.0f * random_uniform(5, 2 * i + 1));
            if (i < 256) x = levels[i];
            if (i >= 256 && i < 511) x = (levels[i - 256] + levels[i - 255]) * 0.5f;
            EXPECT(dynamic_code(levels, x) == nearest_level(levels, x), "%.9g: level %d, not %d", x,
                   dynamic_code(levels, x), nearest_level(levels, x));
        }
    }
}

/* An update from 8-bit states is the f32 update from what they read as; its states are stored as
 * the nearest levels of each block, but never a zero for a second moment above it. */
CASE(kernel_update, eight_bit_states_round_what_the_f32_update_leaves) {
    enum { N = 1000, BLOCKS = 4 };
    Tensor value = RANDOM_TENSOR(F32, 1, N), same = RANDOM_TENSOR(F32, 1, N);
    Tensor m = TENSOR(must_calloc(BLOCKS, 260), DYNAMIC8, BLOCKS, 256);
    Tensor v = TENSOR(must_calloc(BLOCKS, 260), DYNAMIC8_UNSIGNED, BLOCKS, 256);
    Tensor plain_m = zeros(F32, BLOCKS, 256), plain_v = zeros(F32, BLOCKS, 256);
    int kept = 0;
    for (int64_t t = 1; t < 20; t++) {
        Tensor grad = RANDOM_TENSOR(F32, 10 + (uint64_t)t, N);
        for (int i = 0; i < N; i++) ((float *)grad.data)[i] *= i % 7 ? 1e-3f : 1e-7f;
        scale_copy(plain_m, SET, m, 1.0f);
        scale_copy(plain_v, SET, v, 1.0f);
        adamw_update(value, grad, m, v, 1, 1e-3f, 0.9f, 0.999f, 1e-8f, 0.01f, t, 0);
        adamw_update(same, grad, plain_m, plain_v, 1, 1e-3f, 0.9f, 0.999f, 1e-8f, 0.01f, t, 0);
        EXPECT(!memcmp(value.data, same.data, N * 4), "update %d", (int)t);
        for (int k = 0; k < 2; k++)
            for (int i = 0; i < N; i++) {
                const float *x = (k ? plain_v.data : plain_m.data), *levels = dynamic_levels(!k);
                const BlockDynamic8 *b = (const BlockDynamic8 *)(k ? v.data : m.data) + i / 256;
                float most = 0;
                for (int j = i / 256 * 256; j < N && j < i / 256 * 256 + 256; j++)
                    most = fmaxf(most, fabsf(x[j]));
                int code = nearest_level(levels, x[i] * (1.0f / most));
                if (k && !code && x[i] > 0) code = 1, kept++;
                EXPECT(b->absmax == most && b->codes[i % 256] == code,
                       "update %d, %c %d: code %d, not %d", (int)t, k ? 'v' : 'm', i,
                       b->codes[i % 256], code);
            }
    }
    EXPECT(kept > 100, "no second moment was small");
}

CASE(kernel_update, adamw_takes_the_step_of_the_formula) {
    float w[] = {1, -2}, g[] = {0.5f, -0.1f}, m[] = {0.1f, 0}, v[] = {0.01f, 0};
    Tensor value = TENSOR(w, F32, 2), grad = TENSOR(g, F32, 2);
    adamw_update(value, grad, TENSOR(m, F32, 2), TENSOR(v, F32, 2), 2.0f, 0.1f, 0.9f, 0.99f, 1e-8f,
                 0.01f, 3, 0);
    double m0 = 0.9 * 0.1 + 0.1 * 1.0, v0 = 0.99 * 0.01 + 0.01 * 1.0;
    double expected =
        1 * (1 - 0.1 * 0.01) - 0.1 / (1 - 0.729) * m0 / (sqrt(v0 / (1 - 0.970299)) + 1e-8);
    EXPECT_CLOSE(w[0], expected, 1e-5);
}

CASE(kernel_update, values_without_masters_move_as_they_should_on_average) {
    enum { N = 100000 };
    Tensor value = zeros(BF16, 1, N), grad = zeros(F32, 1, N), none = tensor_absent();
    fill(value, 1.0f);
    fill(grad, 1.0f);
    for (int t = 1; t <= 20; t++) /* each far below half of the step to the next bf16 */
        sgd_update(RESHAPE(value, N), RESHAPE(grad, N), none, 1.0f, 1e-4f, 0, 0, t,
                   random_key(3, (uint64_t)t));
    double mean = 0;
    for (int64_t i = 0; i < N; i++) mean += at(value, i) / N;
    EXPECT_CLOSE(mean, 1 - 20e-4, 5e-5);
}

CASE(kernel_levels, every_instruction_level_gives_the_same_norms_and_products) {
    Tensor x = RANDOM_TENSOR(BF16, 1, 5, 300), w = RANDOM_TENSOR(F32, 2, 300),
           a = zeros(BF16, 5, 300), b = zeros(BF16, 5, 300);
    Tensor big = RANDOM_TENSOR(F32, 3, 40, 300), p = zeros(F32, 5, 40), q = zeros(F32, 5, 40);
    cpu_rmsnorm_forward_generic(a, tensor_absent(), x, w, tensor_absent(), 1e-6f);
    cpu_matmul_ordered_several_generic(NT, &p, SET, &x, &big, 1, 1.0f);
    __typeof__(&rmsnorm_forward) norms[] = CPU_TWINS(rmsnorm_forward);
    __typeof__(&matmul_ordered_several) products[] = CPU_TWINS(matmul_ordered_several);
    for (int level = CPU_GENERIC + 1; level <= (int)cpu_level(); level++) {
        norms[level](b, tensor_absent(), x, w, tensor_absent(), 1e-6f);
        products[level](NT, &q, SET, &x, &big, 1, 1.0f);
        int different = 0; /* sums of another order may round the last bf16 bit the other way */
        for (int64_t i = 0; i < 1500; i++) {
            different += at(a, i) != at(b, i);
            EXPECT_CLOSE(at(a, i), at(b, i), 0.01 * fabs(at(a, i)));
        }
        EXPECT(different < 15, "%d of 1500 differ", different);
        EXPECT(relative_error(q.data, p.data, 200) < 1e-6);
    }
    if (cpu_level() == CPU_GENERIC) SKIP("this CPU has only the generic level");
}

CASE(kernel_copy, half_precision_files_convert) {
    uint16_t bits[] = {0x3c00, 0xc000, 0x0001, 0x7bff,
                       0x0000}; /* 1, -2, the smallest, the largest, 0 */
    float expected[] = {1, -2, 0x1p-24f, 65504, 0}, out[5];
    scale_copy(TENSOR(out, F32, 5), SET, TENSOR(bits, F16, 5), 1.0f);
    for (int i = 0; i < 5; i++)
        EXPECT(out[i] == expected[i], "%g, expected %g", out[i], expected[i]);
}

/* Three sequences over scattered pages: one query over many keys, a few, and a long run. */
CASE(kernel_attention, sequences_in_pages_equal_each_in_order) {
    enum { H = 4, K = 2, C = 64, SEQUENCES = 3, PAGES = 24 };
    static const int queries[SEQUENCES] = {1, 5, 100}, keys[SEQUENCES] = {1500, 700, 130};
    int32_t table[SEQUENCES][PAGES], index[106], first[106], last[106], sequence[106];
    int64_t pool = 40 * PAGE_KEYS, N = 0;
    Tensor q = RANDOM_TENSOR(F32, 1, 106, H, C),
           y = TENSOR(must_calloc(106 * H * C, 4), F32, 106, H, C),
           lse = TENSOR(must_calloc(106 * H, 4), F32, 106, H),
           k_pool = RANDOM_TENSOR(F32, 2, pool, K, C), v_pool = RANDOM_TENSOR(F32, 3, pool, K, C);
    for (int r = 0, page = 0; r < SEQUENCES; r++) {
        for (int i = 0; i < PAGES; i++) table[r][i] = -1;
        for (int i = 0; i * PAGE_KEYS < keys[r]; i++) table[r][i] = page++ * 7 % 40;
        for (int i = 0; i < queries[r]; i++, N++) {
            index[N] = last[N] = keys[r] - queries[r] + i;
            first[N] = i % 3 ? 0 : index[N] / 2;
            sequence[N] = r;
        }
    }
    attention_forward(y, lse, tensor_absent(), q, k_pool, v_pool, TENSOR(index, I32, N),
                      TENSOR(first, I32, N), TENSOR(last, I32, N), TENSOR(sequence, I32, N),
                      TENSOR(table, I32, SEQUENCES, PAGES));
    for (int64_t r = 0, n = 0; r < SEQUENCES; n += queries[r++]) {
        int64_t Q = queries[r], size = Q * H * C;
        Tensor k = TENSOR(must_calloc((size_t)keys[r] * K * C, 4), F32, keys[r], K, C),
               v = TENSOR(must_calloc((size_t)keys[r] * K * C, 4), F32, keys[r], K, C),
               one = TENSOR(must_calloc((size_t)size, 4), F32, Q, H, C),
               one_lse = TENSOR(must_calloc((size_t)(Q * H), 4), F32, Q, H);
        for (int64_t s = 0; s < keys[r]; s++) {
            int64_t from = table[r][s / PAGE_KEYS] * PAGE_KEYS + s % PAGE_KEYS;
            memcpy(tensor_at(k, s).data, tensor_at(k_pool, from).data, K * C * 4);
            memcpy(tensor_at(v, s).data, tensor_at(v_pool, from).data, K * C * 4);
        }
        attention_forward(one, one_lse, tensor_absent(), tensor_slice(q, n, Q), k, v,
                          TENSOR(index + n, I32, Q), TENSOR(first + n, I32, Q),
                          TENSOR(last + n, I32, Q), tensor_absent(), tensor_absent());
        EXPECT(relative_error(one.data, tensor_slice(y, n, Q).data, size) < 1e-5);
        EXPECT(relative_error(one_lse.data, tensor_slice(lse, n, Q).data, Q * H) < 1e-5);
    }
}

CASE(kernel_attention, stored_rows_are_where_they_were_put) {
    static const DType dtypes[] = {F32, Q8_0, Q4_0};
    Tensor x = RANDOM_TENSOR(F32, 4, 3, 2, 64);
    int32_t rows[] = {5, 0, 3};
    for (int i = 0; i < 3; i++) {
        size_t bytes = 3 * 128 / dtype_block(dtypes[i]).count * dtype_block(dtypes[i]).bytes;
        char *out = must_calloc(2, bytes), *expected = must_calloc(1, bytes);
        Tensor y = TENSOR(out, dtypes[i], 6, 2, 64), whole = TENSOR(expected, dtypes[i], 3, 2, 64);
        store_rows(y, x, TENSOR(rows, I32, 3));
        if (dtypes[i] == F32)
            memcpy(expected, x.data, bytes);
        else
            quantize(whole, x);
        for (int n = 0; n < 3; n++)
            EXPECT(!memcmp(tensor_at(y, rows[n]).data, tensor_at(whole, n).data, bytes / 3));
    }
}
