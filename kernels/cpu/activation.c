/* activation.c - gates and other functions of single elements. */
#include "kernels/activation.h"
#include "kernels/cpu/cpu.h"

#define GELU_FACTOR 0.7978845608028654f /* sqrt(2 / pi) */
#define GELU_CUBE   0.044715f

/* n <= CHUNK elements of y from `first` on, of the gate from `g` on and of up from `u` on. */
static void forward(Tensor y, int64_t first, Tensor gate, int64_t g, Tensor up, int64_t u,
                    int64_t n) {
    float a[CHUNK], b[CHUNK], out[CHUNK];
    const float *x = load_f32(a, gate, g, n), *factor = load_f32(b, up, u, n);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float t = fast_tanh(GELU_FACTOR * (x[i] + GELU_CUBE * x[i] * x[i] * x[i]));
        out[i] = 0.5f * x[i] * (1.0f + t);
    }
    round_to(y.dtype, out, n);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) out[i] *= factor[i];
    store_f32(y, first, n, out);
}

/* n elements of gelu and of its slope. */
static void gelu_row(float *gelu, float *slope, const float *in, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float x = in[i], t = fast_tanh(GELU_FACTOR * (x + GELU_CUBE * x * x * x));
        slope[i] = 0.5f * (1.0f + t) +
                   0.5f * x * (1.0f - t * t) * GELU_FACTOR * (1.0f + 3.0f * GELU_CUBE * x * x);
        gelu[i] = 0.5f * x * (1.0f + t);
    }
}

/* The gradients of `weight` times those n elements: of dgate and the gate from `g` on, of dup, if
 * it is there, and up from `u` on, of y, if it is there, and dy from `first` on. `product`, if it
 * is there, gets what they give of <dy, y>, y rounded to dy's dtype. */
static void backward(Tensor dgate, Tensor dup, Tensor y, Tensor dy, int64_t first, float weight,
                     Tensor gate, int64_t g, Tensor up, int64_t u, int64_t n, float *product) {
    float a[CHUNK], b[CHUNK], c[CHUNK], gate_out[CHUNK], up_out[CHUNK], gelu[CHUNK], slope[CHUNK];
    const float *in = load_f32(a, gate, g, n), *factor = load_f32(b, up, u, n);
    const float *d = load_f32(c, dy, first, n);
    gelu_row(gelu, slope, in, n);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        gate_out[i] = weight * d[i] * factor[i] * slope[i];
        up_out[i] = weight * d[i] * gelu[i];
    }
    if (y.data || product) {
        round_to(dy.dtype, gelu, n);
#pragma omp simd
        for (int64_t i = 0; i < n; i++) gelu[i] *= factor[i];
    }
    if (y.data) store_f32(y, first, n, gelu);
    if (product) {
        round_to(dy.dtype, gelu, n);
        *product += dot(d, gelu, n);
    }
    store_f32(dgate, g, n, gate_out);
    if (dup.data) store_f32(dup, u, n, up_out);
}

void CPU(gelu_mul_forward)(Tensor y, Tensor gate, Tensor up) {
    int64_t count = tensor_count(y);
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < count; first += CHUNK)
        forward(y, first, gate, first, up, first, count - first < CHUNK ? count - first : CHUNK);
}

void CPU(gelu_mul_codes)(Tensor y, Tensor codes, Tensor gate, Tensor up) {
    (void)codes; /* panels have an order of their own */
    CPU(gelu_mul_forward)(y, gate, up);
}

void CPU(gelu_mul_backward)(Tensor dgate, Tensor dup, Tensor y, Tensor dy, Tensor gate, Tensor up) {
    int64_t count = tensor_count(dy);
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < count; first += CHUNK)
        backward(dgate, dup, y, dy, first, 1.0f, gate, first, up, first,
                 count - first < CHUNK ? count - first : CHUNK, NULL);
}

void CPU(gelu_mul_joined_forward)(Tensor y, Tensor both) {
    int64_t M = tensor_rows(y), F = tensor_cols(y);
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t m = 0; m < M; m++)
        for (int64_t first = 0; first < F; first += CHUNK)
            forward(y, m * F + first, both, 2 * m * F + first, both, (2 * m + 1) * F + first,
                    F - first < CHUNK ? F - first : CHUNK);
}

void CPU(gelu_mul_joined_backward)(Tensor dboth, Tensor dweights, Tensor dy, Tensor weights,
                                   Tensor both) {
    int64_t M = tensor_rows(dy), F = tensor_cols(dy);
#pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < M; m++) {
        float sum = 0;
        for (int64_t first = 0; first < F; first += CHUNK) {
            int64_t g = 2 * m * F + first, u = g + F;
            backward(dboth, dboth, tensor_absent(), dy, m * F + first,
                     ((const float *)weights.data)[m], both, g, both, u,
                     F - first < CHUNK ? F - first : CHUNK, &sum);
        }
        ((float *)dweights.data)[m] = sum;
    }
}

static inline float sigmoid(float x) {
    return 1.0f / (1.0f + fast_exp(-x));
}

void CPU(glu_forward)(Tensor y, Tensor x) {
    int64_t M = tensor_rows(y), F = tensor_cols(y);
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t m = 0; m < M; m++)
        for (int64_t first = 0; first < F; first += CHUNK) {
            int64_t n = F - first < CHUNK ? F - first : CHUNK;
            float u[CHUNK], v[CHUNK], out[CHUNK];
            const float *a = load_f32(u, x, 2 * m * F + first, n),
                        *b = load_f32(v, x, (2 * m + 1) * F + first, n);
#pragma omp simd
            for (int64_t i = 0; i < n; i++) out[i] = a[i] * sigmoid(b[i]);
            store_f32(y, m * F + first, n, out);
        }
}

void CPU(glu_backward)(Tensor dx, Tensor dy, Tensor x) {
    int64_t M = tensor_rows(dy), F = tensor_cols(dy);
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t m = 0; m < M; m++)
        for (int64_t first = 0; first < F; first += CHUNK) {
            int64_t n = F - first < CHUNK ? F - first : CHUNK;
            float u[CHUNK], v[CHUNK], w[CHUNK], da[CHUNK], db[CHUNK];
            const float *a = load_f32(u, x, 2 * m * F + first, n),
                        *b = load_f32(v, x, (2 * m + 1) * F + first, n),
                        *d = load_f32(w, dy, m * F + first, n);
#pragma omp simd
            for (int64_t i = 0; i < n; i++) {
                float gate = sigmoid(b[i]);
                da[i] = d[i] * gate;
                db[i] = d[i] * a[i] * gate * (1.0f - gate);
            }
            store_f32(dx, 2 * m * F + first, n, da);
            store_f32(dx, (2 * m + 1) * F + first, n, db);
        }
}

/* y[i] (=|+=) VALUE, an expression of x = in[i] and g = d[i], for all elements; `other` is what
 * d reads, absent for none. */
#define MAP(y, write, other, x, VALUE)                                                             \
    do {                                                                                           \
        int64_t count = tensor_count(y);                                                           \
        _Pragma("omp parallel for schedule(static)") for (int64_t first = 0; first < count;        \
                                                          first += CHUNK) {                        \
            int64_t n = count - first < CHUNK ? count - first : CHUNK;                             \
            float buffer[3][CHUNK], out[CHUNK];                                                    \
            const float *in = load_f32(buffer[0], x, first, n);                                    \
            const float *d = (other).data ? load_f32(buffer[1], other, first, n) : in;             \
            const float *old = (write) == ADD ? load_f32(buffer[2], y, first, n) : NULL;           \
            _Pragma("omp simd") for (int64_t i = 0; i < n; i++) {                                  \
                float x = in[i], g = d[i];                                                         \
                (void)g;                                                                           \
                out[i] = VALUE;                                                                    \
            }                                                                                      \
            for (int64_t i = 0; old && i < n; i++) out[i] += old[i];                               \
            store_f32(y, first, n, out);                                                           \
        }                                                                                          \
    } while (0)

void CPU(activation_forward)(Tensor y, Tensor x, Activation f) {
    Tensor none = tensor_absent();
    if (f == RELU)
        MAP(y, SET, none, x, x > 0 ? x : 0);
    else if (f == SILU)
        MAP(y, SET, none, x, x * sigmoid(x));
    else
        MAP(y, SET, none, x, x > 20.0f ? x : log1pf(expf(x)));
}

void CPU(activation_backward)(Tensor dx, Write write, Tensor dy, Tensor x, Activation f) {
    if (f == RELU)
        MAP(dx, write, dy, x, x > 0 ? g : 0);
    else if (f == SILU)
        MAP(dx, write, dy, x, g * sigmoid(x) * (1.0f + x * (1.0f - sigmoid(x))));
    else
        MAP(dx, write, dy, x, g * sigmoid(x));
}

void CPU(clamp_forward)(Tensor y, Tensor x, float low, float high) {
    MAP(y, SET, tensor_absent(), x, x < low ? low : x > high ? high : x);
}

void CPU(clamp_backward)(Tensor dx, Write write, Tensor dy, Tensor x, float low, float high) {
    MAP(dx, write, dy, x, x > low && x < high ? g : 0);
}
