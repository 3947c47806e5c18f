/* test_gpu.c - each kernel of the GPU against its twin on the CPU, at ragged sizes as well.
 *
 * The device is the GPU of a CUDA build, or the emulator (tests/simt): then every case also runs
 * with the threads in the other order, which must change no bit. */
#include "kernels/activation.h"
#include "kernels/attention.h"
#include "kernels/convolution.h"
#include "kernels/elementwise.h"
#include "kernels/embedding.h"
#include "kernels/heads.h"
#include "kernels/local_attention.h"
#include "kernels/loss.h"
#include "kernels/matmul.h"
#include "kernels/norm.h"
#include "kernels/quantize.h"
#include "kernels/random.h"
#include "kernels/rope.h"
#include "kernels/routing.h"
#include "kernels/sampling.h"
#include "kernels/update.h"
#include "tests/test.h"

#include <math.h>

#define OUTS 64

/* One run of a case on one device: its tensors are made by the same calls there, and what comes out
 * is kept as floats. */
typedef struct Side {
    Device *device;
    struct {
        const char *name;
        float *values;
        int64_t count;
        double tolerance;
    } outs[OUTS];
    int count;
} Side;

typedef void Work(Side *s, DType dtype);

static Tensor on(Side *s, Tensor host) {
    Tensor t = host;
    t.device = s->device;
    t.data = device_allocate(s->device, tensor_bytes(host) + 64);
    tensor_write(t, host.data);
    return t;
}

/* Normal numbers, rounded to the dtype. */
static Tensor given(Side *s, DType dtype, uint64_t key, int ndim, const int64_t *shape) {
    Tensor values = random_tensor(F32, key, ndim, shape), host = values;
    if (dtype == F32) return on(s, values);
    host.dtype = dtype;
    host.data = device_allocate(device_cpu(), tensor_bytes(host));
    if (dtype_is_packed(dtype))
        quantize(host, values);
    else
        scale_copy(host, SET, values, 1.0f);
    return on(s, host);
}
#define GIVEN(s, dtype, key, ...)                                                                  \
    given(s, dtype, key, (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)),                \
          (const int64_t[]){__VA_ARGS__})

static Tensor space(Side *s, DType dtype, int ndim, const int64_t *shape) {
    Tensor t = tensor_make(NULL, dtype, ndim, shape);
    t.device = s->device;
    t.data = device_allocate(s->device, tensor_bytes(t) + 64);
    return t;
}
#define SPACE(s, dtype, ...)                                                                       \
    space(s, dtype, (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)),                     \
          (const int64_t[]){__VA_ARGS__})

static Tensor ints(Side *s, const int32_t *values, int64_t rows, int64_t cols) {
    return on(s, TENSOR((void *)values, I32, rows, cols));
}

static void result(Side *s, const char *name, Tensor t, double tolerance) {
    int64_t n = tensor_count(t);
    Tensor host = t;
    host.device = device_cpu();
    host.data = device_allocate(device_cpu(), tensor_bytes(t));
    tensor_read(host.data, t);
    float *values = must_malloc((size_t)n * sizeof *values);
    if (t.dtype == I32)
        for (int64_t i = 0; i < n; i++) values[i] = (float)((int32_t *)host.data)[i];
    else
        scale_copy(TENSOR(values, F32, n), SET, host, 1.0f);
    CHECK(s->count < OUTS, "too many results");
    s->outs[s->count].name = name;
    s->outs[s->count].values = values;
    s->outs[s->count].count = n;
    s->outs[s->count++].tolerance = tolerance;
}

static void compare(const Side *a, const Side *b, DType dtype) {
    for (int i = 0; i < a->count; i++) {
        const float *x = a->outs[i].values, *y = b->outs[i].values;
        double error = 0, norm = 0;
        for (int64_t k = 0; k < a->outs[i].count; k++) {
            EXPECT(isfinite(y[k]) || x[k] == y[k], "%s[%d] is %g on the GPU, %g on the CPU (%s)",
                   a->outs[i].name, (int)k, y[k], x[k], dtype_name(dtype));
            if (!isfinite(x[k])) continue;
            error += ((double)x[k] - y[k]) * ((double)x[k] - y[k]);
            norm += (double)x[k] * x[k];
        }
        error = norm > 0 ? sqrt(error / norm) : sqrt(error);
        EXPECT(error <= a->outs[i].tolerance, "%s differs by %.3g, at most %.3g (%s)",
               a->outs[i].name, error, a->outs[i].tolerance, dtype_name(dtype));
    }
}

static void same_bits(const Side *a, const Side *b) {
    for (int i = 0; i < a->count; i++)
        EXPECT(!memcmp(a->outs[i].values, b->outs[i].values, (size_t)a->outs[i].count * 4),
               "%s is another when it is computed again", a->outs[i].name);
}

static void both_sides(Work *work, DType dtype) {
    Device *device;
    Side cpu = {.device = device_cpu()}, gpu = {0}, again = {0};
    if (device_open(&device, "cuda") != OK) SKIP("%s", status_message());
    gpu.device = again.device = device;
    work(&cpu, dtype);
    work(&gpu, dtype);
    compare(&cpu, &gpu, dtype);
    setenv("LAPIDARY_SIMT_ORDER", "reversed", 1);
    work(&again, dtype);
    unsetenv("LAPIDARY_SIMT_ORDER");
    same_bits(&gpu, &again);
}

/* GPU_CASE(name, side, dtype) { ... } runs for f32 and bf16; FLOAT_CASE for f32 alone. */
#define GPU_CASE(name, s, dtype)                                                                   \
    static void work_##name(Side *s, DType dtype);                                                 \
    CASE(gpu, name) {                                                                              \
        both_sides(work_##name, F32);                                                              \
        both_sides(work_##name, BF16);                                                             \
    }                                                                                              \
    static void work_##name(Side *s, DType dtype)
#define FLOAT_CASE(name, s)                                                                        \
    static void work_##name(Side *s, DType dtype);                                                 \
    CASE(gpu, name) {                                                                              \
        both_sides(work_##name, F32);                                                              \
    }                                                                                              \
    static void work_##name(Side *s, __attribute__((unused)) DType dtype)

/* Rounding once in another place. */
static double near(DType dtype) {
    return dtype == F32 ? 2e-6 : 2e-3;
}

/* ---- norms, rotations, gates ---- */

GPU_CASE(rmsnorm, s, dtype) {
    static const int64_t widths[] = {7, 64, 260, 1540, 2048, 2816, 4096, 5376};
    for (int i = 0; i < 8; i++) {
        int64_t N = i % 2 ? 70 : 11, D = widths[i]; /* many rows and few */
        Tensor x = GIVEN(s, dtype, 1, N, D), w = GIVEN(s, i % 2 ? F32 : dtype, 2, D),
               r = GIVEN(s, dtype, 3, N, D), dy = GIVEN(s, dtype, 4, N, D),
               y = SPACE(s, dtype, N, D), rstd = SPACE(s, F32, N), dx = GIVEN(s, dtype, 5, N, D),
               dw = GIVEN(s, F32, 6, D);
        rmsnorm_forward(y, rstd, x, w, i % 2 ? r : tensor_absent(), 1e-6f);
        result(s, "y", y, near(dtype));
        result(s, "rstd", rstd, 1e-6);
        rmsnorm_apply(y, rstd, x, i > 2 ? tensor_absent() : w);
        result(s, "y again", y, near(dtype));
        rmsnorm_backward(dx, i % 2 ? ADD : SET, i < 3 ? dw : tensor_absent(), dy, x, rstd, w);
        result(s, "dx", dx, near(dtype));
        if (i < 3) result(s, "dweight", dw, 1e-5);
    }
}

static void expect_equal(const char *what, Tensor a, Tensor b) {
    size_t bytes = tensor_bytes(a);
    char *x = must_malloc(bytes), *y = must_malloc(bytes);
    tensor_read(x, a);
    tensor_read(y, b);
    EXPECT(bytes == tensor_bytes(b) && !memcmp(x, y, bytes), "%s: another than by single kernels",
           what);
    free(x), free(y);
}

/* The codes of x are those that a product would make of it. */
static void expect_codes(Side *s, Tensor x, Tensor codes, DType kind) {
    int64_t N = tensor_rows(x);
    Tensor b = GIVEN(s, kind, 9, 32, tensor_cols(x)), one = SPACE(s, x.dtype, N, 32),
           other = SPACE(s, x.dtype, N, 32);
    matmul_int8_several(&one, x, codes, &b, 1);
    matmul_int8(other, x, b);
    expect_equal("a product of the codes", one, other);
}

/* Several norms of one input are each of them; their gradients, the sum. */
GPU_CASE(several_norms, s, dtype) {
    static const int64_t widths[] = {64, 1540, 2816, 2048};
    for (int i = 0; i < 4; i++) {
        int64_t N = i % 2 ? 11 : 70, D = widths[i];
        Tensor none = tensor_absent(), x = GIVEN(s, dtype, 1, N, D), y[3], dy[3],
               rstd = SPACE(s, F32, N), one = SPACE(s, dtype, N, D), dx = GIVEN(s, dtype, 4, N, D);
        NormWeight w[] = {
            {GIVEN(s, dtype, 2, D), 0}, {GIVEN(s, dtype, 3, D), 0.37f}, {.weight = none}};
        for (int k = 0; k < 3; k++) {
            y[k] = SPACE(s, dtype, N, D);
            dy[k] = GIVEN(s, dtype, 5 + k, N, D);
        }
        rmsnorm_forward_several(y, rstd, x, w, 3, 1e-6f);
        for (int k = 0; k < 3; k++) {
            rmsnorm_forward(one, none, x, k == 1 ? none : w[k].weight, none, 1e-6f);
            if (k == 1) scale_columns(one, SET, one, w[k].weight, w[k].factor);
            expect_equal("one of several", y[k], one);
        }
        result(s, "rstd", rstd, 1e-6);
        rmsnorm_backward_several(dx, i % 2 ? SET : ADD, dy, x, rstd, w, 2 + i % 2);
        result(s, "dx", dx, 2 * near(dtype));
    }
}

/* Where branches join, norms are what they are one by one; so are the gradients, with all that
 * weights' gradients are made of. */
GPU_CASE(norms_of_branches, s, dtype) {
    static const int64_t widths[] = {64, 320, 1536, 2816, 100, 4096};
    for (int i = 0; i < 6; i++) {
        int64_t N = i % 2 ? 70 : 3, D = widths[i];
        float scale = i % 3 ? 0.37f : 1.0f;
        DType kind = i % 4 ? dtype : F32;
        Tensor none = tensor_absent(), rstd = SPACE(s, F32, 3, N), y = SPACE(s, dtype, N, D),
               next = SPACE(s, dtype, N, D), v = GIVEN(s, kind, 1, D), r = GIVEN(s, dtype, 2, N, D),
               dy = GIVEN(s, dtype, 3, N, D);
        NormJoin join = {
            .x = {GIVEN(s, dtype, 4, N, D), GIVEN(s, dtype, 5, N, D)},
            .weight = {GIVEN(s, kind, 6, D), GIVEN(s, kind, 7, D), GIVEN(s, kind, 8, D)},
            .rstd = rstd};
        Tensor fed = SPACE(s, dtype, N, D), one = SPACE(s, dtype, N, D), own = SPACE(s, F32, 3, N),
               codes = none;
        int64_t bytes = int8_codes(s->device, N, D);
        if (bytes) codes = SPACE(s, U8, bytes);
        rmsnorm_forward(fed, tensor_slice(own, 0, 1), join.x[0], join.weight[0], none, 1e-6f);
        rmsnorm_forward(fed, tensor_slice(own, 1, 1), join.x[1], join.weight[1], fed, 1e-6f);
        rmsnorm_forward(one, tensor_slice(own, 2, 1), fed, join.weight[2], r, 1e-6f);
        if (scale != 1.0f) scale_copy(one, SET, one, scale);
        NextNorm no = {.y = none}, after = {next, none, v, codes};
        rmsnorm_join(y, &join, r, scale, &no, 1e-6f);
        expect_equal("y", y, one);
        expect_equal("rstd", rstd, own);
        result(s, "y", y, 2 * near(dtype));

        Tensor dx[] = {SPACE(s, dtype, N, D), SPACE(s, dtype, N, D)}, dr = SPACE(s, dtype, N, D),
               fed_too = SPACE(s, dtype, N, D), dfed = SPACE(s, dtype, N, D),
               dfed1 = SPACE(s, dtype, N, D);
        rmsnorm_join_backward(dx, dr, fed_too, dfed, dy, &join, scale);
        scale_copy(one, SET, dy, scale);
        expect_equal("the residual's gradient", dr, one);
        expect_equal("fed", fed_too, fed);
        rmsnorm_backward(dfed1, SET, none, one, fed, tensor_slice(rstd, 2, 1), join.weight[2]);
        result(s, "dfed", dfed, 2 * near(dtype));
        result(s, "dfed by a single kernel", dfed1, 2 * near(dtype));
        for (int k = 0; k < 2; k++) {
            rmsnorm_backward(one, SET, none, dfed, join.x[k], tensor_slice(rstd, k, 1),
                             join.weight[k]);
            result(s, "dx", dx[k], 3 * near(dtype));
            result(s, "dx by a single kernel", one, 3 * near(dtype));
        }
        rmsnorm_join_backward(dx, dy, none, none, dy, &join, scale); /* in place, no more kept */
        expect_equal("the residual's gradient in its place", dy, dr);

        join.rstd = none;
        rmsnorm_join(r, &join, r, scale, &after, 1e-6f); /* in place too */
        rmsnorm_forward(one, none, y, v, none, 1e-6f);
        expect_equal("y in its place", r, y);
        expect_equal("next", next, one);
        if (D % 64 == 0) expect_codes(s, next, codes, Q4_0_TILED);
    }
}

/* Two norms at once are those two, and the codes those that a product would make. */
GPU_CASE(norms_in_pairs, s, dtype) {
    static const int64_t widths[] = {64, 320, 1536, 2816, 5376, 100, 2560, 5376, 64};
    for (int i = 0; i < 9; i++) {
        int64_t N = i == 2 || i > 5 ? 70 : 3, D = widths[i]; /* many rows and few */
        float scale = i % 2 ? 0.37f : 1.0f;
        Tensor x = GIVEN(s, dtype, 1, N, D), r = GIVEN(s, dtype, 2, N, D),
               w = GIVEN(s, i % 3 ? dtype : F32, 3, D), v = GIVEN(s, i % 3 ? dtype : F32, 4, D),
               y = SPACE(s, dtype, N, D), next = SPACE(s, dtype, N, D), y1 = SPACE(s, dtype, N, D),
               next1 = SPACE(s, dtype, N, D), codes = tensor_absent();
        int64_t bytes = int8_codes(s->device, N, D);
        if (bytes) codes = SPACE(s, U8, bytes);
        Tensor none = tensor_absent(), rstd[4];
        for (int k = 0; k < 4; k++) rstd[k] = SPACE(s, F32, N);
        NextNorm after = {next, none, v, codes}, kept = {next, rstd[1], v, none}, no = {.y = none};
        rmsnorm_forward(y1, rstd[2], x, w, r, 1e-6f);
        if (scale != 1.0f) scale_copy(y1, SET, y1, scale);
        rmsnorm_forward(next1, rstd[3], y1, v, none, 1e-6f);
        rmsnorm_pair(y, none, x, w, r, scale, &no, 1e-6f);
        expect_equal("y alone", y, y1);
        rmsnorm_pair(y, rstd[0], x, w, r, scale, &kept, 1e-6f);
        expect_equal("y with what is kept", y, y1);
        expect_equal("next with what is kept", next, next1);
        expect_equal("rstd", rstd[0], rstd[2]);
        expect_equal("the next rstd", rstd[1], rstd[3]);
        rmsnorm_pair(r, none, x, w, r, scale, &after, 1e-6f); /* in place */
        expect_equal("y", r, y1);
        expect_equal("next", next, next1);
        result(s, "next", next, near(dtype));
        if (D % 64 == 0) expect_codes(s, next, codes, Q4_0_TILED);
    }
}

/* Gates with their codes. */
GPU_CASE(gates_with_codes, s, dtype) {
    for (int64_t N = 1; N <= 64; N += 63) {
        Tensor gate = GIVEN(s, dtype, 1, N, 192), up = GIVEN(s, dtype, 2, N, 192),
               y = SPACE(s, dtype, N, 192), y1 = SPACE(s, dtype, N, 192),
               codes = SPACE(s, U8, N * 192 + N * 24);
        gelu_mul_codes(y, codes, gate, up);
        gelu_mul_forward(y1, gate, up);
        expect_equal("y", y, y1);
        expect_codes(s, y, codes, Q8_0_TILED);
        result(s, "y", y, near(dtype));
    }
}

/* Queries, keys and values: normalised, turned, and put in rows of their own. */
GPU_CASE(heads, s, dtype) {
    static const int64_t sizes[] = {16, 256, 512, 20};
    static const int32_t places[] = {4, 0, 7, 2, 3};
    for (int i = 0; i < 4; i++) {
        int64_t C = sizes[i], N = i ? 5 : 1;
        Tensor q = GIVEN(s, dtype, 1, N, 6, C), k = GIVEN(s, dtype, 2, N, 2, C),
               v = GIVEN(s, dtype, 3, N, 2, C), wq = GIVEN(s, i % 2 ? F32 : dtype, 4, C),
               wk = GIVEN(s, i % 2 ? F32 : dtype, 5, C), cos = GIVEN(s, F32, 6, N, C / 2),
               sin = GIVEN(s, F32, 7, N, C / 2), none = tensor_absent(),
               rows = ints(s, places, N, 1), q1 = SPACE(s, dtype, N, 6, C),
               k0 = SPACE(s, dtype, N, 2, C), v0 = SPACE(s, dtype, N, 2, C),
               k1 = SPACE(s, dtype, 8, 2, C), v1 = SPACE(s, dtype, 8, 2, C),
               q2 = SPACE(s, dtype, N, 6, C), k2 = SPACE(s, dtype, 8, 2, C),
               v2 = SPACE(s, dtype, 8, 2, C);
        Tensor q_rstd = SPACE(s, F32, N, 6), v_rstd = SPACE(s, F32, N, 2),
               rstd[] = {SPACE(s, F32, N, 6), SPACE(s, F32, N, 2)};
        HeadSet sets[] = {{q2, q, wq, none, rstd[0], true},
                          {k2, k, wk, rows, none, true},
                          {v2, v, none, rows, rstd[1], false}};
        heads_forward(sets, 3, cos, sin, 1e-6f);
        rmsnorm_forward(q1, q_rstd, q, wq, none, 1e-6f);
        rmsnorm_forward(k0, none, k, wk, none, 1e-6f);
        rmsnorm_forward(v0, v_rstd, v, none, none, 1e-6f);
        rope_forward(q1, q1, cos, sin);
        rope_forward(k0, k0, cos, sin);
        store_rows(k1, k0, rows);
        store_rows(v1, v0, rows);
        expect_equal("queries", q2, q1);
        expect_equal("keys", k2, k1);
        expect_equal("values", v2, v1);
        expect_equal("1 / norm of queries", rstd[0], q_rstd);
        expect_equal("1 / norm of values", rstd[1], v_rstd);
        result(s, "keys", k2, near(dtype));
        heads_forward(sets, 1, cos, sin, 1e-6f);
        expect_equal("queries alone", q2, q1);
    }
}

/* The way back of heads: turned back, then through the norm. */
GPU_CASE(gradients_of_heads, s, dtype) {
    static const int64_t sizes[] = {16, 256, 512, 20};
    for (int i = 0; i < 4; i++) {
        int64_t C = sizes[i], N = i ? 5 : 1;
        Tensor q = GIVEN(s, dtype, 1, N, 6, C), k = GIVEN(s, dtype, 2, N, 2, C),
               v = GIVEN(s, dtype, 3, N, 2, C), wq = GIVEN(s, i % 2 ? F32 : BF16, 4, C),
               wk = GIVEN(s, i % 2 ? F32 : dtype, 5, C), cos = GIVEN(s, F32, 6, N, C / 2),
               sin = GIVEN(s, F32, 7, N, C / 2), none = tensor_absent(),
               dq = GIVEN(s, dtype, 8, N, 6, C), dk = GIVEN(s, F32, 9, N, 2, C),
               dv = GIVEN(s, F32, 10, N, 2, C), q_rstd = SPACE(s, F32, N, 6),
               k_rstd = SPACE(s, F32, N, 2), v_rstd = SPACE(s, F32, N, 2),
               y = SPACE(s, dtype, N, 6, C), dk1 = SPACE(s, dtype, N, 2, C),
               dv1 = SPACE(s, dtype, N, 2, C), both = SPACE(s, dtype, N, 2, C);
        rmsnorm_forward(y, q_rstd, q, wq, none, 1e-6f);
        rmsnorm_forward(dk1, k_rstd, k, wk, none, 1e-6f);
        rmsnorm_forward(dv1, v_rstd, v, none, none, 1e-6f);
        HeadGradient sets[] = {{dq, dq, none, q, wq, q_rstd, true},
                               {dk1, dk, none, k, wk, k_rstd, true},
                               {dv1, dv, none, v, none, v_rstd, false}};
        heads_backward(sets, 3, cos, sin);
        result(s, "dq", dq, near(dtype));
        result(s, "dk", dk1, near(dtype));
        result(s, "dv", dv1, near(dtype));
        sets[1].also = dv;
        sets[1].dx = both;
        heads_backward(sets + 1, 1, cos, sin);
        result(s, "dk of both", both, near(dtype));
    }
}

GPU_CASE(rope, s, dtype) {
    for (int64_t C = 6; C <= 64; C += 58) {
        int32_t places[] = {0, 5, 131000, 7, 1};
        Tensor x = GIVEN(s, dtype, 1, 5, 3, C), cos = SPACE(s, F32, 5, C / 2),
               sin = SPACE(s, F32, 5, C / 2), dy = GIVEN(s, F32, 2, 5, 3, C);
        rope_table(cos, sin, ints(s, places, 5, 1), 1e6f, C / 8, 2.0f);
        result(s, "cos", cos, 1e-5);
        result(s, "sin", sin, 1e-5);
        rope_forward(x, x, cos, sin);
        result(s, "y", x, near(dtype));
        Tensor dx = SPACE(s, dtype, 5, 3, C);
        rope_backward(dx, dy, cos, sin);
        result(s, "dx", dx, near(dtype));
    }
}

GPU_CASE(gated_gelu, s, dtype) {
    for (int64_t F = 9; F <= 64; F += 55) {
        Tensor gate = GIVEN(s, dtype, 1, 13, F), up = GIVEN(s, dtype, 2, 13, F),
               dy = GIVEN(s, dtype, 3, 13, F), y = SPACE(s, dtype, 13, F);
        Tensor both = GIVEN(s, dtype, 4, 13, 2 * F), dboth = SPACE(s, dtype, 13, 2 * F);
        gelu_mul_forward(y, gate, up);
        result(s, "y", y, 2 * near(dtype));
        gelu_mul_joined_forward(y, both);
        result(s, "y of joined", y, 2 * near(dtype));
        Tensor weights = GIVEN(s, F32, 5, 13), dweights = SPACE(s, F32, 13);
        gelu_mul_joined_backward(dboth, dweights, dy, weights, both);
        result(s, "dboth", dboth, 2 * near(dtype));
        result(s, "dweights", dweights, 1e-3);
        Tensor again = F > 9 ? SPACE(s, dtype, 13, F) : tensor_absent();
        gelu_mul_forward(y, gate, up);
        gelu_mul_backward(gate, F > 9 ? dy : tensor_absent(), again, dy, gate, up);
        if (F > 9) expect_equal("the product again", again, y);
        result(s, "dgate", gate, 2 * near(dtype));
        result(s, "dup", dy, 2 * near(dtype));
    }
}

/* ---- copies and sums ---- */

GPU_CASE(copies, s, dtype) {
    static const DType kinds[] = {F32, BF16, F16};
    for (int i = 0; i < 3; i++) {
        Tensor x = GIVEN(s, kinds[i], 1, 3, 67), y = GIVEN(s, dtype, 2, 3, 67);
        scale_copy(y, i % 2 ? ADD : SET, x, 0.5f);
        result(s, "y", y, near(dtype));
    }
    Tensor a = GIVEN(s, dtype, 3, 5, 33), b = GIVEN(s, dtype, 4, 5, 33), y = SPACE(s, dtype, 5, 33);
    add_scaled(y, a, b, 0.7f);
    result(s, "sum", y, near(dtype));
    fill(y, 3.5f);
    result(s, "filled", y, 0);
    fill_normal(y, 99, 0.02f);
    result(s, "drawn", y, near(dtype));
    dropout(y, a, 0.3f, 77);
    result(s, "dropped", y, near(dtype));
    Tensor swapped = SPACE(s, dtype, 3, 4, 10), x = GIVEN(s, dtype, 5, 4, 3, 10);
    swap_outer(swapped, x);
    result(s, "swapped", swapped, 0);
}

FLOAT_CASE(packed_weights_are_read, s) {
    static const DType kinds[] = {Q4_0, Q8_0, NF4, NF4_NESTED, Q4_0_TILED, Q8_0_TILED};
    for (int i = 0; i < 6; i++) {
        Tensor x = GIVEN(s, kinds[i], 1, 32, 512), y = SPACE(s, F32, 32, 512);
        scale_copy(y, SET, x, 1.0f);
        result(s, dtype_name(kinds[i]), y, 1e-7);
        Tensor part = tensor_slice(x, 16, 16), half = SPACE(s, BF16, 16, 512);
        scale_copy(half, SET, part, 2.0f);
        result(s, "a part", half, 1e-7);
    }
}

CASE(gpu, k_quants_are_read) {
    static const DType kinds[] = {Q4_K, Q5_K, Q6_K};
    Device *device;
    if (device_open(&device, "cuda") != OK) SKIP("%s", status_message());
    for (int i = 0; i < 3; i++) {
        Tensor x = TENSOR(NULL, kinds[i], 8, 512), z = x;
        size_t bytes = tensor_bytes(x);
        uint8_t *blocks = must_malloc(bytes);
        for (size_t b = 0; b < bytes; b++) blocks[b] = (uint8_t)random_u64(5, b);
        size_t each = dtype_block(kinds[i]).bytes, scale = kinds[i] == Q6_K ? 208 : 0;
        for (size_t b = 0; b < bytes; b += each) { /* scales that are finite */
            memcpy(blocks + b + scale, (uint16_t[]){f32_to_f16(0.01f)}, 2);
            if (!scale) memcpy(blocks + b + 2, (uint16_t[]){f32_to_f16(0.3f)}, 2);
        }
        x.data = blocks;
        Side gpu = {.device = device};
        z = on(&gpu, x);
        Tensor y = SPACE(&gpu, F32, 8, 512);
        float *expected = must_malloc(8 * 512 * 4), *got = must_malloc(8 * 512 * 4);
        scale_copy(TENSOR(expected, F32, 8, 512), SET, x, 1.0f);
        scale_copy(y, SET, z, 1.0f);
        tensor_read(got, y);
        EXPECT(relative_error(got, expected, 8 * 512) < 1e-7, "%s", dtype_name(kinds[i]));
    }
}

GPU_CASE(rows, s, dtype) {
    static const int32_t rows[] = {4, -1, 0, 2}, slots[] = {0, 3, 1, 1, 2, 0},
                         places[] = {5, 1, 0, 3, 2, 7}, sources[] = {1, 0, 2, 1, -1, 0, -1, 2};
    for (int64_t D = 5; D <= 24; D += 19) {
        Tensor x = GIVEN(s, dtype, 1, 6, D), y = GIVEN(s, dtype, 2, 4, D),
               few = GIVEN(s, dtype, 3, 3, D), which = ints(s, rows, 4, 1);
        gather_rows(y, x, which);
        result(s, "gathered", y, 0);
        scatter_rows(x, ADD, y, which);
        result(s, "scattered onto", x, near(dtype));
        scatter_rows(x, SET, y, which);
        result(s, "scattered", x, 0);
        gather_sums(few, y, ints(s, slots, 3, 2));
        result(s, "sums of gathered", few, near(dtype));
        Tensor spread = SPACE(s, dtype, 8, D);
        fill(spread, 3.0f);
        spread_rows(spread, few, ints(s, places, 3, 2), ints(s, sources, 8, 1));
        result(s, "spread", spread, 0);
    }
}

GPU_CASE(factors_of_rows_and_columns, s, dtype) {
    Tensor x = GIVEN(s, dtype, 1, 150, 37), y = GIVEN(s, dtype, 2, 150, 37),
           w = GIVEN(s, F32, 3, 37), v = GIVEN(s, F32, 4, 150), sums = GIVEN(s, F32, 5, 37),
           z = GIVEN(s, F32, 6, 150, 37);
    scale_columns(y, ADD, x, w, 1.0f);
    scale_columns(y, ADD, x, GIVEN(s, BF16, 7, 37), 0.3f);
    result(s, "columns", y, near(dtype));
    scale_rows(y, x, v);
    result(s, "rows", y, near(dtype));
    dot_columns(sums, x, z);
    result(s, "dots", sums, 1e-5);
    dot_columns(sums, x, tensor_absent());
    result(s, "sums", sums, 1e-5);
    row_norms(v, z);
    result(s, "norms", v, 1e-6);
    Tensor a = GIVEN(s, F32, 7, 37);
    quotient(sums, ADD, a, w);
    result(s, "quotients", sums, 1e-5);
}

/* ---- embeddings ---- */

GPU_CASE(embedding, s, dtype) {
    static const int32_t names[] = {3, 0, 3, 9, 1, 3, 0, 2};
    static const DType kinds[] = {F32, BF16, F16, Q4_0, NF4};
    Tensor ids = ints(s, names, 8, 1), dtable = GIVEN(s, F32, 3, 10, 64),
           dy = GIVEN(s, dtype, 4, 8, 40);
    for (int i = 0; i < 5; i++) {
        Tensor table = GIVEN(s, kinds[i], 1, 10, 64), y = SPACE(s, dtype, 8, 24);
        embedding_forward(y, table, 32, ids, 1.5f);
        result(s, dtype_name(kinds[i]), y, near(dtype));
    }
    embedding_backward(dtable, 11, dy, ids, 0.5f, 0);
    result(s, "dtable", dtable, 1e-6);
    Tensor odd = GIVEN(s, dtype, 5, 10, 7), y = SPACE(s, dtype, 8, 5);
    embedding_forward(y, odd, 1, ids, 1.0f);
    result(s, "an odd width", y, near(dtype));
}

GPU_CASE(a_table_of_the_host_is_read_from_the_device, s, dtype) {
    static const int32_t names[] = {3, 0, 7};
    Tensor table = RANDOM_TENSOR(BF16, 1, 10, 64), ids = ints(s, names, 3, 1),
           y = SPACE(s, dtype, 3, 64);
    embedding_forward(y, table, 0, ids, 2.0f); /* gathered by the host */
    result(s, "gathered", y, near(dtype));
    for (int copied = 0; copied <= 1; copied++) {
        if (copied) setenv("LAPIDARY_SIMT_FAIL", "register", 1);
        EXPECT(device_pin(s->device, table.data, tensor_bytes(table)));
        unsetenv("LAPIDARY_SIMT_FAIL");
        embedding_forward(y, table, 0, ids, 2.0f);
        result(s, copied ? "reached in a copy" : "reached", y, near(dtype));
        device_unpin(s->device, table.data);
    }
}

/* ---- loss and sampling ---- */

GPU_CASE(cross_entropy, s, dtype) {
    static const int32_t wanted[] = {5, -1, 0, 1002};
    for (int64_t V = 1003; V <= 2048; V += 1045) {
        Tensor z = GIVEN(s, F32, 1, 4, V), nll = SPACE(s, F32, 4), dz = SPACE(s, dtype, 4, V),
               weights = GIVEN(s, F32, 2, 4);
        scale_copy(z, SET, z, 20.0f);
        cross_entropy(nll, dz, z, ints(s, wanted, 4, 1), weights, 30.0f);
        result(s, "nll", nll, 1e-5);
        result(s, "dlogits", dz, dtype == F32 ? 2e-5 : 3e-3);
        z = GIVEN(s, F32, 1, 4, V);
        cross_entropy(nll, tensor_absent(), z, ints(s, wanted, 4, 1), tensor_absent(), 2.0f);
        result(s, "nll alone", nll, 1e-5);
        result(s, "capped", z, 1e-6);
        cross_entropy(nll, tensor_absent(), z, ints(s, wanted, 4, 1), tensor_absent(), 0);
        result(s, "nll without a cap", nll, 1e-5);
        softcap_forward(z, 10.0f);
        result(s, "softened", z, 1e-6);
    }
}

static void sample(Side *s, int64_t V, int64_t k) {
    static const int32_t columns[] = {3, -1, 17};
    Tensor z = GIVEN(s, BF16, 1, 3, V), wide = SPACE(s, F32, 3, V), values = SPACE(s, F32, 3, k),
           ids = SPACE(s, I32, 3, k), lse = SPACE(s, F32, 3, 2), scale = GIVEN(s, F32, 2, 3),
           asked = SPACE(s, F32, 3);
    scale_copy(wide, SET, z, 2.0f); /* many equals */
    top_logits(values, ids, lse, wide, scale);
    result(s, "values", values, 0);
    result(s, "ids", ids, 0);
    result(s, "lse", lse, 1e-5);
    pick_columns(asked, wide, ints(s, columns, 3, 1));
    result(s, "asked", asked, 0);
}

FLOAT_CASE(the_best_logits_of_short_rows, s) {
    sample(s, 50, 1);
    sample(s, 50, 7);
}

FLOAT_CASE(the_best_logits_of_long_rows, s) {
    sample(s, 20000, 1);
    sample(s, 20000, 256);
}

/* ---- experts ---- */

static void route(Side *s, DType dtype, int64_t N, int64_t E) {
    int64_t A = 3, D = 40, M = routing_rows(N, A, E);
    Tensor logits = GIVEN(s, dtype, 1, N, E), probs = SPACE(s, F32, N, E),
           share = SPACE(s, F32, N, A), experts = SPACE(s, I32, N, A),
           offsets = SPACE(s, I32, E + 1), counts = SPACE(s, I32, E), slot = SPACE(s, I32, N, A),
           source = SPACE(s, I32, M), scale = GIVEN(s, dtype, 2, E), x = GIVEN(s, dtype, 3, N, D),
           rows = SPACE(s, dtype, M, D), y = SPACE(s, dtype, N, D);
    router_forward(probs, share, experts, logits);
    result(s, "probs", probs, 1e-6);
    result(s, "share", share, 1e-6);
    result(s, "experts", experts, 0);
    routing_sort(offsets, counts, slot, source, experts);
    result(s, "offsets", offsets, 0);
    result(s, "counts", counts, 0);
    result(s, "slot", slot, 0);
    result(s, "source", source, 0);
    gather_rows(rows, x, source);
    combine_forward(y, rows, slot, share, experts, scale);
    result(s, "y", y, near(dtype));
    Tensor weights = SPACE(s, F32, M), dweights = GIVEN(s, F32, 5, M), dshare = SPACE(s, F32, N, A),
           dscale = GIVEN(s, F32, 4, E), dlogits = SPACE(s, dtype, N, E),
           load = GIVEN(s, F32, 6, E);
    row_weights(weights, slot, source, share, experts, scale);
    result(s, "weights", weights, 1e-6);
    row_weights_backward(dshare, dscale, dweights, slot, share, experts, scale);
    result(s, "dshare", dshare, 1e-5);
    result(s, "dscale", dscale, 1e-5);
    router_backward(dlogits, dshare, probs, share, experts, load);
    result(s, "dlogits", dlogits, near(dtype) + 1e-5);
    router_backward(dlogits, dshare, probs, share, experts, tensor_absent());
    result(s, "dlogits without a load", dlogits, near(dtype) + 1e-5);
}

GPU_CASE(experts, s, dtype) {
    route(s, dtype, 437, 12);
    route(s, dtype, 37, 12);
    route(s, dtype, 2, 300);
}

/* ---- products ---- */

GPU_CASE(products, s, dtype) {
    static const int64_t sizes[][3] = {{1, 33, 64}, {3, 20, 40}, {37, 70, 96}, {130, 65, 24}};
    for (int i = 0; i < 4; i++) {
        int64_t M = sizes[i][0], N = sizes[i][1], K = sizes[i][2];
        Tensor a = GIVEN(s, dtype, 1, M, K), b = GIVEN(s, dtype, 2, N, K),
               c = GIVEN(s, dtype, 3, K, N), y = GIVEN(s, dtype, 4, M, N),
               g = GIVEN(s, F32, 5, K, N), d = GIVEN(s, dtype, 6, M, N);
        matmul(NT, y, i % 2 ? ADD : SET, a, b, 0.5f);
        result(s, "a b^T", y, near(dtype));
        matmul(NN, y, SET, a, c, 1.0f);
        result(s, "a b", y, near(dtype));
        matmul(TN, g, ADD, a, d, 1.0f);
        result(s, "a^T b", g, near(dtype));
        Tensor matrices[] = {b, GIVEN(s, dtype, 7, 11, K), GIVEN(s, dtype, 8, 24, K)},
               many[] = {SPACE(s, dtype, M, N), SPACE(s, dtype, M, 11), SPACE(s, dtype, M, 24)};
        matmul_several(many, a, matrices, NULL, 3);
        for (int k = 0; k < 3; k++) {
            Tensor one = SPACE(s, dtype, M, tensor_cols(many[k]));
            matmul(NT, one, SET, a, matrices[k], 1.0f);
            expect_equal("one of several", many[k], one);
        }
        result(s, "several", many[2], near(dtype));
    }
}

GPU_CASE(products_of_packed_weights, s, dtype) {
    static const DType kinds[] = {Q4_0, NF4_NESTED, Q8_0_TILED};
    static const int64_t rows[] = {1, 3, 20, 70};
    for (int i = 0; i < 3; i++)
        for (int r = 0; r < 4; r++) {
            Tensor w = GIVEN(s, kinds[i], 1, 64, 256), a = GIVEN(s, dtype, 2, rows[r], 256),
                   y = GIVEN(s, dtype, 3, rows[r], 64), dy = GIVEN(s, dtype, 4, rows[r], 64),
                   dx = GIVEN(s, dtype, 5, rows[r], 256);
            matmul(NT, y, r % 2 ? ADD : SET, a, w, 1.0f);
            result(s, "y", y, dtype == F32 ? 2e-6 : 4e-3);
            matmul(NN, dx, SET, dy, w, 1.0f);
            result(s, "dx", dx, dtype == F32 ? 2e-6 : 4e-3);
        }
}

/* Floats that meet bf16 are two bf16 numbers on a GPU. */
static double of_pieces(DType dtype) {
    return dtype == F32 ? 3e-6 : 5e-6;
}

GPU_CASE(products_of_adapters, s, dtype) {
    static const int64_t sizes[][4] = {{5, 4, 72, 40},    {70, 5, 72, 40},     {1100, 6, 72, 40},
                                       {70, 8, 128, 64},  {1100, 16, 64, 192}, {130, 32, 192, 128},
                                       {70, 48, 128, 64}, {33, 64, 64, 64}};
    for (int i = 0; i < 8; i++) {
        int64_t N = sizes[i][0], R = sizes[i][1], in = sizes[i][2], out = sizes[i][3];
        Tensor x = GIVEN(s, dtype, 1, N, in), A = GIVEN(s, F32, 2, R, in),
               B = GIVEN(s, F32, 3, out, R), u = SPACE(s, F32, N, R),
               y = GIVEN(s, dtype, 4, N, out), dy = GIVEN(s, dtype, 5, N, out),
               du = SPACE(s, F32, N, R), dA = GIVEN(s, F32, 6, R, in),
               dB = GIVEN(s, F32, 7, out, R), dx = GIVEN(s, dtype, 8, N, in);
        matmul_ordered(NT, u, SET, x, A, 1.0f);
        result(s, "u", u, of_pieces(dtype));
        matmul_ordered(NT, y, ADD, u, B, 2.0f);
        result(s, "y", y, 2 * near(dtype));
        matmul_ordered(NN, du, SET, dy, B, 2.0f);
        result(s, "du", du, of_pieces(dtype));
        matmul_ordered(TN, dB, ADD, dy, u, 2.0f);
        result(s, "dB", dB, of_pieces(dtype));
        matmul_ordered(TN, dA, ADD, du, x, 1.0f);
        result(s, "dA", dA, of_pieces(dtype));
        matmul_ordered(NN, dx, ADD, du, A, 1.0f);
        result(s, "dx", dx, 2 * near(dtype));
    }
}

GPU_CASE(products_of_several_adapters, s, dtype) {
    static const int64_t sizes[][5] = {{70, 72, 6, 18, 8},
                                       {1100, 72, 6, 18, 8},
                                       {1100, 192, 16, 16, 16},
                                       {130, 128, 8, 16, 8},
                                       {70, 64, 16, 8, 24}};
    for (int i = 0; i < 5; i++) {
        int64_t N = sizes[i][0], K = sizes[i][1], R = sizes[i][2], S = sizes[i][3], T = sizes[i][4];
        Tensor x = GIVEN(s, dtype, 1, N, K), dx = GIVEN(s, dtype, 2, N, K),
               u[] = {SPACE(s, F32, N, R), SPACE(s, F32, N, S), SPACE(s, F32, N, T)},
               A[] = {GIVEN(s, F32, 3, R, K), GIVEN(s, F32, 4, S, K), GIVEN(s, F32, 5, T, K)},
               dA[] = {GIVEN(s, F32, 6, R, K), GIVEN(s, F32, 7, S, K), GIVEN(s, F32, 8, T, K)};
        for (int n = 2; n <= 3; n++) {
            matmul_ordered_several(NT, u, SET, &x, A, n, 1.0f);
            matmul_ordered_several(TN, dA, ADD, u, &x, n, 1.0f);
            matmul_ordered_several(NN, &dx, ADD, u, A, n, 0.01f);
            for (int k = 0; k < n; k++) {
                result(s, "u", u[k], of_pieces(dtype));
                result(s, "dA", dA[k], of_pieces(dtype));
            }
            result(s, "dx", dx, 3 * near(dtype));
        }
    }
}

/* What adapters add to products, inside those whose tiles fill the device, and beside others; as
 * in bf16 the second sum is not rounded before, they are nearer to what is meant. */
GPU_CASE(products_with_terms, s, dtype) {
    static const int64_t sizes[][3] = {
        {510, 248, 248}, {380, 1000, 40}, {380, 40, 1016}, {70, 40, 64}, {3, 24, 64}};
    for (int i = 0; i < 5; i++) {
        int64_t M = sizes[i][0], N = sizes[i][1], K = sizes[i][2], R = 5 + 7 * i;
        Tensor x = GIVEN(s, dtype, 1, M, K),
               W[] = {GIVEN(s, dtype, 2, N, K), GIVEN(s, dtype, 3, 24, K)},
               y[] = {SPACE(s, dtype, M, N), SPACE(s, dtype, M, 24)},
               dy[] = {GIVEN(s, dtype, 4, M, N), GIVEN(s, dtype, 5, M, N)},
               V[] = {GIVEN(s, dtype, 6, N, K), GIVEN(s, dtype, 7, N, K)},
               dx = GIVEN(s, dtype, 8, M, K), u = GIVEN(s, F32, 9, M, R);
        Term terms[] = {{u, GIVEN(s, F32, 10, N, R), 0.7f}, {u, GIVEN(s, F32, 11, 24, R), 0.3f}},
             back[] = {{u, GIVEN(s, F32, 12, R, K), 0.9f}, {u, GIVEN(s, F32, 13, R, K), 0.9f}};
        matmul_several(y, x, W, terms, 2);
        result(s, "y", y[0], 2 * near(dtype));
        result(s, "the other y", y[1], 2 * near(dtype));
        terms[0].u = tensor_absent();
        matmul_several(y, x, W, terms, 1);
        result(s, "y without a term", y[0], near(dtype));
        matmul_sum(dx, ADD, dy, V, back, 2);
        result(s, "dx", dx, 3 * near(dtype));
        matmul_sum(dx, SET, dy, V, back, 1);
        result(s, "dx of one", dx, 2 * near(dtype));
        matmul_sum(dx, SET, dy, V, NULL, 2);
        result(s, "dx without terms", dx, 2 * near(dtype));
    }
}

/* Rows of three groups, the second empty; what lies behind them is not looked at. */
static void grouped(Side *s, DType dtype, DType weights, int64_t M, int64_t N, int64_t K,
                    const int32_t *bounds) {
    Tensor offsets = ints(s, bounds, 4, 1), a = GIVEN(s, dtype, 1, M, K),
           w = GIVEN(s, weights, 2, 3, N, K), y = GIVEN(s, dtype, 3, M, N),
           dy = GIVEN(s, dtype, 4, M, N), dx = GIVEN(s, dtype, 5, M, K),
           g = GIVEN(s, F32, 6, 3, N, K);
    grouped_matmul(NT, y, ADD, a, w, offsets, 0.5f);
    result(s, "y", y, dtype == F32 ? 5e-6 : 4e-3);
    grouped_matmul(NN, dx, SET, dy, w, offsets, 1.0f);
    result(s, "dx", dx, dtype == F32 ? 5e-6 : 4e-3);
    grouped_matmul(TN, g, ADD, dy, a, offsets, 1.0f);
    result(s, "dW", g, 5e-6);
}

GPU_CASE(products_of_groups, s, dtype) {
    static const int32_t few[] = {0, 16, 16, 48}, many[] = {0, 150, 150, 360},
                         some[] = {0, 30, 30, 100}, full[] = {0, 600, 600, 660};
    grouped(s, dtype, dtype, 64, 64, 128, few);
    grouped(s, dtype, NF4, 64, 64, 128, few);
    grouped(s, dtype, dtype, 370, 64, 384, many);
    grouped(s, dtype, dtype, 100, 136, 264, some);
    grouped(s, dtype, dtype, 670, 520, 72, full);
    grouped(s, dtype, NF4, 100, 136, 256, some);
}

/* So many that a Hopper's shared memory has no room for them. */
GPU_CASE(products_of_many_groups, s, dtype) {
    int32_t bounds[401];
    for (int i = 0; i <= 400; i++) bounds[i] = 32 * i;
    Tensor a = GIVEN(s, dtype, 1, 12800, 16), b = GIVEN(s, dtype, 2, 400, 16, 16),
           y = SPACE(s, dtype, 12800, 16);
    grouped_matmul(NT, y, SET, a, b, ints(s, bounds, 401, 1), 1.0f);
    result(s, "y", y, near(dtype));
}

/* As on a GPU that is no Hopper. */
CASE(gpu, products_of_groups_on_any_gpu) {
    setenv("LAPIDARY_HOPPER", "0", 1);
    both_sides(work_products_of_groups, BF16);
}

FLOAT_CASE(products_of_adapters_in_groups, s) {
    static const int32_t bounds[] = {0, 16, 16, 96};
    Tensor offsets = ints(s, bounds, 4, 1), x = GIVEN(s, BF16, 1, 100, 64),
           A = GIVEN(s, F32, 2, 3, 4, 64), u = SPACE(s, F32, 100, 4),
           dA = GIVEN(s, F32, 3, 3, 4, 64);
    grouped_matmul(NT, u, SET, x, A, offsets, 1.0f);
    result(s, "u", u, 3e-6);
    grouped_matmul(TN, dA, ADD, u, x, offsets, 1.0f);
    result(s, "dA", dA, 3e-6);
}

GPU_CASE(products_with_activations_in_8_bits, s, dtype) {
    static const DType kinds[] = {Q4_0_TILED, Q8_0_TILED};
    static const int64_t rows[] = {1, 2, 9, 70}, depths[] = {6208, 1216, 640, 704};
    static const int32_t bounds[] = {0, 16, 16, 112}, counts[] = {3, 0, 90};
    for (int i = 0; i < 2; i++) {
        for (int r = 0; r < 4; r++) {
            int64_t K = depths[r];
            Tensor w = GIVEN(s, kinds[i], 1, 48, K), a = GIVEN(s, dtype, 2, rows[r], K),
                   y = SPACE(s, dtype, rows[r], 48);
            matmul_int8(y, a, w);
            result(s, "y", y, near(dtype));
            Tensor many[] = {SPACE(s, dtype, rows[r], 48), SPACE(s, dtype, rows[r], 16),
                             SPACE(s, dtype, rows[r], 80)},
                   matrices[] = {w, GIVEN(s, kinds[i], 8, 16, K), GIVEN(s, kinds[i], 9, 80, K)};
            matmul_int8_several(many, a, tensor_absent(), matrices, 3);
            for (int m = 0; m < 3; m++) {
                Tensor one = SPACE(s, dtype, rows[r], tensor_cols(many[m]));
                matmul_int8(one, a, matrices[m]);
                expect_equal("one of several", many[m], one);
            }
        }
        Tensor w = GIVEN(s, kinds[i], 1, 3, 32, 128);
        for (int64_t M = 112; M <= 128; M += 16) {
            Tensor a = GIVEN(s, dtype, 2, M, 128), y = SPACE(s, dtype, M, 32);
            grouped_matmul_int8(y, a, w, ints(s, bounds, 4, 1), ints(s, counts, 3, 1));
            result(s, "y of groups", y, near(dtype));
        }
    }
}

/* ---- attention ---- */

/* Causal rows with a window, a bidirectional span and two segments. */
static void fill_sights(int32_t *index, int32_t *first, int32_t *last, int N, int window) {
    for (int n = 0; n < N; n++) {
        int start = n >= N / 3 ? N / 3 : 0, low = n - window + 1;
        index[n] = n;
        first[n] = low > start ? low : start;
        last[n] = n >= 4 && n < 7 ? 6 : n;
    }
}

/* N queries, the last of S keys. */
static void attend(Side *s, DType dtype, int64_t N, int64_t S, int64_t H, int64_t K, int64_t C,
                   int window) {
    int32_t at[200], from[200], to[200];
    fill_sights(at, from, to, (int)N, window);
    for (int64_t n = 0; n < N && S > N; n++) at[n] += S - N, to[n] += S - N;
    Tensor q = GIVEN(s, dtype, 1, N, H, C), k = GIVEN(s, dtype, 2, S, K, C),
           v = GIVEN(s, dtype, 3, S, K, C), y = SPACE(s, dtype, N, H, C), lse = SPACE(s, F32, N, H),
           dy = GIVEN(s, dtype, 4, N, H, C), dq = SPACE(s, dtype, N, H, C),
           dk = GIVEN(s, F32, 5, S, K, C), dv = GIVEN(s, F32, 6, S, K, C),
           index = ints(s, at, N, 1), first = ints(s, from, N, 1), last = ints(s, to, N, 1),
           none = tensor_absent();
    int64_t G = attention_partials(K);
    Tensor partial = G > 1 ? SPACE(s, F32, 2 * G, S, K, C) : none;
    scale_copy(q, SET, q, 2.0f / sqrtf((float)C));
    attention_forward(y, lse, tensor_absent(), q, k, v, index, first, last, none, none);
    result(s, "y", y, dtype == F32 ? 1e-5 : 6e-3);
    result(s, "lse", lse, 1e-5);
    for (int i = 0; i < 2; i++) { /* in place of what is there, then added to it */
        attention_backward(dq, dk, dv, i ? ADD : SET, dy, y, lse, q, k, v, index, first, last,
                           partial);
        result(s, "dq", dq, dtype == F32 ? 1e-5 : 1e-2);
        result(s, "dk", dk, dtype == F32 ? 1e-5 : 1e-2);
        result(s, "dv", dv, dtype == F32 ? 1e-5 : 1e-2);
    }
}

GPU_CASE(attention, s, dtype) {
    attend(s, dtype, 40, 40, 4, 2, 20, 12);
    attend(s, dtype, 37, 37, 2, 2, 64, 1000);
}

GPU_CASE(attention_of_heads_of_256, s, dtype) {
    attend(s, dtype, 70, 70, 4, 2, 256, 30);
    attend(s, dtype, 200, 200, 2, 1, 256, 1000);
    attend(s, dtype, 20, 1500, 2, 1, 256, 1000); /* more tiles of keys than blocks share */
}

GPU_CASE(attention_of_heads_of_512, s, dtype) {
    attend(s, dtype, 70, 70, 4, 1, 512, 1000);
    attend(s, dtype, 150, 150, 2, 1, 512, 90);
    attend(s, dtype, 20, 700, 4, 1, 512, 600); /* units of keys and values come round */
}

/* Of two tiles of rows at a time, and of one. */
CASE(gpu, attention_in_slabs) {
    setenv("LAPIDARY_SIMT_SLAB", "131072", 1);
    both_sides(work_attention_of_heads_of_256, BF16);
    setenv("LAPIDARY_SIMT_SLAB", "1", 1);
    both_sides(work_attention_of_heads_of_512, BF16);
}

/* As on a GPU that is no Hopper. */
CASE(gpu, attention_on_any_gpu) {
    setenv("LAPIDARY_HOPPER", "0", 1);
    both_sides(work_attention_of_heads_of_256, BF16);
    both_sides(work_attention_of_heads_of_512, BF16);
}

/* Two sequences whose keys lie in pages; cached as they are, or packed. Each has `each` queries at
 * the end of what is there of it. */
static void attend_pages(Side *s, DType dtype, DType cached, int64_t each, int64_t H, int64_t K,
                         int64_t C) {
    static const int32_t pages[] = {2, 0, 1, 3, 5, 4};
    int32_t rows[6 * PAGE_KEYS], at[400], from[400], to[400], whose[400];
    int64_t N = 2 * each;
    for (int i = 0; i < 6 * PAGE_KEYS; i++) rows[i] = (i * 7) % (6 * PAGE_KEYS); /* 7 is coprime */
    for (int n = 0; n < N; n++) {
        whose[n] = n >= each;
        at[n] = to[n] = (whose[n] ? 190 : 170) - (int)each + n % (int)each;
        from[n] = whose[n] && at[n] > 60 ? at[n] - 60 : 0;
    }
    Tensor k = SPACE(s, cached, 6 * PAGE_KEYS, K, C), v = SPACE(s, cached, 6 * PAGE_KEYS, K, C),
           places = ints(s, rows, 6 * PAGE_KEYS, 1);
    store_rows(k, GIVEN(s, dtype, 2, 6 * PAGE_KEYS, K, C), places);
    store_rows(v, GIVEN(s, dtype, 3, 6 * PAGE_KEYS, K, C), places);
    result(s, "stored", k, 1e-6);
    for (int i = 0; i < 2 && cached == dtype; i++) { /* behind the last key: anything */
        fill(tensor_slice(i ? v : k, 1 * PAGE_KEYS + 170 % PAGE_KEYS, 192 - 170), NAN);
        fill(tensor_slice(i ? v : k, 4 * PAGE_KEYS + 190 % PAGE_KEYS, 192 - 190), NAN);
    }
    Tensor q = GIVEN(s, dtype, 1, N, H, C), y = SPACE(s, dtype, N, H, C), lse = SPACE(s, F32, N, H),
           codes = tensor_absent();
    int64_t bytes = int8_codes(s->device, N, H * C);
    if (bytes) codes = SPACE(s, U8, bytes);
    scale_copy(q, SET, q, 2.0f / sqrtf((float)C));
    attention_forward(y, lse, codes, q, k, v, ints(s, at, N, 1), ints(s, from, N, 1),
                      ints(s, to, N, 1), ints(s, whose, N, 1), ints(s, pages, 2, 3));
    result(s, "y", y, dtype == F32 ? 1e-5 : 6e-3);
    result(s, "lse", lse, 1e-5);
    expect_codes(s, RESHAPE(y, N, H * C), codes, Q8_0_TILED);
}

GPU_CASE(attention_over_pages, s, dtype) {
    attend_pages(s, dtype, dtype, 3, 4, 2, 64);
    attend_pages(s, dtype, Q8_0, 3, 4, 1, 64);
    attend_pages(s, dtype, Q4_0, 3, 4, 1, 64);
    attend_pages(s, dtype, dtype, 2, 4, 2, 256);
}

/* One query of each sequence: blocks share what it sees, and the last that comes joins it. */
GPU_CASE(attention_of_one_query_over_pages, s, dtype) {
    attend_pages(s, dtype, dtype, 1, 1, 1, 256);
    attend_pages(s, dtype, dtype, 1, 1, 1, 512);
    attend_pages(s, dtype, dtype, 1, 1, 1, 64);
    attend_pages(s, dtype, Q8_0, 1, 1, 1, 256);
    attend_pages(s, dtype, Q4_0, 1, 1, 1, 512);
}

/* Enough of them for tensor cores, where a tile has queries of both. */
static void work_many_queries(Side *s, DType dtype) {
    attend_pages(s, dtype, dtype, 67, 8, 2, 256);
    attend_pages(s, dtype, dtype, 67, 4, 1, 512);
}
CASE(gpu, attention_of_many_queries_over_pages) {
    both_sides(work_many_queries, BF16);
}

/* ---- rounding ---- */

GPU_CASE(training_through_rounding, s, dtype) {
    for (int scheme = SCHEME_Q4_0; scheme < SCHEMES; scheme++)
        for (int learned = 0; learned <= (scheme == SCHEME_Q4_0); learned++) {
            Tensor x = GIVEN(s, dtype, 1, 6, 96), y = SPACE(s, dtype, 6, 96),
                   dx = GIVEN(s, F32, 2, 6, 96), factors = GIVEN(s, F32, 3, 6, 3),
                   dfactors = GIVEN(s, F32, 4, 6, 3);
            Tensor none = tensor_absent();
            scale_copy(factors, SET, factors, 0.3f);
            fake_quantize(y, x, learned ? factors : none, (QuantScheme)scheme,
                          learned ? 0.5f : 1.0f);
            result(s, "y", y, 1e-7);
            fake_quantize_backward(dx, learned ? dfactors : none, x, learned ? factors : none,
                                   (QuantScheme)scheme, 0.75f);
            result(s, "dx", dx, 1e-7);
            if (learned) result(s, "dfactors", dfactors, 1e-4);
        }
    Tensor x = GIVEN(s, dtype, 1, 6, 96), y = SPACE(s, dtype, 6, 96);
    fake_quantize_rows(y, x);
    result(s, "rows", y, 1e-7);
}

GPU_CASE(packing, s, dtype) {
    static const DType kinds[] = {Q4_0, Q8_0_TILED, NF4_NESTED};
    for (int i = 0; i < 3; i++) {
        Tensor x = GIVEN(s, dtype, 1, 16, 128), packed = SPACE(s, kinds[i], 16, 128);
        quantize(packed, x);
        result(s, dtype_name(kinds[i]), packed, 1e-7);
    }
    Tensor x = GIVEN(s, dtype, 1, 16, 128), tiled = SPACE(s, Q4_0_TILED, 16, 128),
           plain = SPACE(s, Q4_0, 16, 128), codes = SPACE(s, Q8_0, 16, 128);
    quantize(tiled, x);
    repack(plain, tiled);
    result(s, "repacked", plain, 1e-7);
    quantize_scheme(codes, x, tensor_absent(), SCHEME_INT8);
    result(s, "int8", codes, 1e-7);
    bool good = false, bad = true;
    float *values = must_calloc(100, sizeof *values);
    check_finite(&good, x);
    values[97] = INFINITY;
    check_finite(&bad, on(s, TENSOR(values, F32, 100)));
    EXPECT(good && !bad, "finite: %d %d", good, bad);
}

/* ---- updates ---- */

FLOAT_CASE(updates, s) {
    static const DType kinds[] = {F32, DYNAMIC8};
    int64_t n = 1000, blocks = 4;
    for (int i = 0; i < 2; i++) {
        Tensor value = GIVEN(s, F32, 1, n), grad = GIVEN(s, F32, 2, n),
               m = SPACE(s, kinds[i], blocks, 256),
               v = SPACE(s, i ? DYNAMIC8_UNSIGNED : F32, blocks, 256);
        for (int t = 1; t <= 3; t++)
            adamw_update(value, grad, m, v, 0.5f, 0.01f, 0.9f, 0.99f, 1e-8f, 0.1f, t, 0);
        result(s, "adamw", value, 1e-6);
        result(s, "m", m, 1e-6);
        result(s, "v", v, 1e-6);
        for (int t = 1; t <= 2; t++) sgd_update(value, grad, m, 0.5f, 0.1f, 0.9f, 0.01f, t, 0);
        result(s, "sgd", value, 1e-6);
    }
    Tensor half = GIVEN(s, BF16, 4, n), slope = GIVEN(s, F32, 5, n), m = SPACE(s, F32, blocks, 256),
           v = SPACE(s, F32, blocks, 256);
    adamw_update(half, slope, m, v, 1.0f, 1e-3f, 0.9f, 0.99f, 1e-8f, 0.1f, 1, 77);
    sgd_update(half, slope, m, 1.0f, 1e-3f, 0.9f, 0.1f, 2, 78);
    result(s, "without masters", half, 1e-3);
    Tensor x = GIVEN(s, F32, 3, 70000), out = SPACE(s, F32, 1);
    double sum;
    sum_of_squares(&sum, x);
    fill(out, (float)sum);
    result(s, "squares", out, 1e-6);
}

/* ---- the towers' ---- */

GPU_CASE(gates_and_clamps, s, dtype) {
    double tolerance = dtype == F32 ? 2e-6 : 1e-2;
    for (int64_t F = 5; F <= 512 + 5; F += 512) {
        Tensor x = GIVEN(s, dtype, 1, 7, 2 * F), dy = GIVEN(s, dtype, 2, 7, F),
               y = SPACE(s, dtype, 7, F), dx = SPACE(s, dtype, 7, 2 * F);
        glu_forward(y, x);
        result(s, "glu", y, tolerance);
        glu_backward(dx, dy, x);
        result(s, "glu backward", dx, tolerance);
        Tensor a = GIVEN(s, dtype, 3, 7, F), da = GIVEN(s, dtype, 4, 7, F);
        for (int f = RELU; f <= SOFTPLUS; f++) {
            activation_forward(y, a, (Activation)f);
            result(s, "activation", y, tolerance);
            activation_backward(da, ADD, dy, a, (Activation)f);
            result(s, "activation backward", da, tolerance);
        }
        clamp_forward(y, a, -0.5f, 0.25f);
        result(s, "clamp", y, tolerance);
        clamp_backward(da, SET, dy, a, -0.5f, 0.25f);
        result(s, "clamp backward", da, tolerance);
    }
}

GPU_CASE(layer_norms, s, dtype) {
    double tolerance = dtype == F32 ? 1e-5 : 1e-2;
    for (int64_t D = 33; D <= 1300; D += 1267) {
        Tensor x = GIVEN(s, dtype, 1, 6, D), dy = GIVEN(s, dtype, 2, 6, D),
               weight = GIVEN(s, dtype, 3, D), bias = GIVEN(s, dtype, 4, D),
               y = SPACE(s, dtype, 6, D), mean = SPACE(s, F32, 6), rstd = SPACE(s, F32, 6),
               dweight = GIVEN(s, F32, 5, D), dbias = GIVEN(s, F32, 6, D);
        layernorm_forward(y, mean, rstd, x, weight, bias, 1e-6f);
        result(s, "layernorm", y, tolerance);
        layernorm_backward(dy, dweight, dbias, dy, x, mean, rstd, weight);
        result(s, "layernorm dx", dy, tolerance);
        result(s, "layernorm dweight", dweight, tolerance);
        result(s, "layernorm dbias", dbias, tolerance);
        layernorm_forward(y, mean, rstd, x, weight, tensor_absent(), 1e-6f);
        result(s, "layernorm without bias", y, tolerance);
    }
}

GPU_CASE(convolutions_and_means, s, dtype) {
    double tolerance = dtype == F32 ? 1e-5 : 1e-2;
    Tensor x = GIVEN(s, dtype, 1, 7, 6, 3), y = SPACE(s, dtype, 4, 3, 27),
           dy = GIVEN(s, dtype, 2, 4, 3, 27), dx = SPACE(s, dtype, 7, 6, 3);
    unfold_forward(y, x);
    result(s, "unfold", y, 0);
    unfold_backward(dx, dy);
    result(s, "unfold backward", dx, tolerance);
    Tensor a = GIVEN(s, dtype, 3, 9, 34), da = SPACE(s, dtype, 9, 34),
           weight = GIVEN(s, dtype, 4, 34, 5), dweight = GIVEN(s, F32, 5, 34, 5),
           out = SPACE(s, dtype, 9, 34);
    depthwise_forward(out, a, weight);
    result(s, "depthwise", out, tolerance);
    depthwise_backward(da, dweight, out, a, weight);
    result(s, "depthwise dx", da, tolerance);
    result(s, "depthwise dweight", dweight, tolerance);
    Tensor means = SPACE(s, F32, 3, 34), shift = GIVEN(s, dtype, 6, 34),
           scale = GIVEN(s, dtype, 7, 34), z = SPACE(s, dtype, 3, 34);
    pool_rows_forward(means, a, 5.5f);
    result(s, "pool", means, tolerance);
    pool_rows_backward(da, means, 5.5f);
    result(s, "pool backward", da, tolerance);
    standardize(z, means, shift, scale);
    result(s, "standardize", z, tolerance);
}

FLOAT_CASE(local_attention, s) {
    for (int64_t T = 3; T <= 30; T += 27) {
        Tensor q = GIVEN(s, F32, 1, T, 2, 40), k = GIVEN(s, F32, 2, T, 2, 40),
               v = GIVEN(s, F32, 3, T, 2, 40), places = GIVEN(s, F32, 4, 12, 2, 40),
               dy = GIVEN(s, F32, 5, T, 2, 40), y = SPACE(s, F32, T, 2, 40),
               kept = SPACE(s, F32, 2, T, 2, 12), scores = SPACE(s, F32, T, 2, 12),
               dq = SPACE(s, F32, T, 2, 40), dk = SPACE(s, F32, T, 2, 40),
               dv = SPACE(s, F32, T, 2, 40), dplaces = SPACE(s, F32, 12, 2, 40);
        local_attention_forward(y, kept, q, k, v, places, 5.0f);
        result(s, "y", y, 1e-5);
        local_attention_backward(dq, dk, dv, dplaces, scores, dy, kept, q, k, v, places);
        result(s, "dq", dq, 1e-5);
        result(s, "dk", dk, 1e-5);
        result(s, "dv", dv, 1e-5);
        result(s, "drelative", dplaces, 1e-5);
    }
}

GPU_CASE(rotations_of_two_axes, s, dtype) {
    static const int32_t places[] = {0, 0, 1, 0, 2, 3, 7, 5};
    double tolerance = dtype == F32 ? 1e-5 : 1e-2;
    Tensor x = GIVEN(s, dtype, 1, 4, 3, 24), y = SPACE(s, dtype, 4, 3, 24),
           cosines = SPACE(s, F32, 8, 6), sines = SPACE(s, F32, 8, 6);
    rope_table(cosines, sines, ints(s, places, 8, 1), 100.0f, 6, 1.0f);
    rope_forward(y, x, RESHAPE(cosines, 4, 2, 6), RESHAPE(sines, 4, 2, 6));
    result(s, "turned", y, tolerance);
    rope_backward(x, y, RESHAPE(cosines, 4, 2, 6), RESHAPE(sines, 4, 2, 6));
    result(s, "turned back", x, tolerance);
}
