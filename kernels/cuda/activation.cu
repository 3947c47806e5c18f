/* activation.cu - gates and other functions of single elements. */
#include "kernels/cuda/codes.h"

extern "C" {
#include "kernels/activation.h"
}

#define GELU_FACTOR 0.7978845608028654f /* sqrt(2 / pi) */
#define GELU_CUBE   0.044715f

DEVICE_FUNCTION float gelu_tanh(float x) {
    return near_tanh(GELU_FACTOR * (x + GELU_CUBE * x * x * x));
}

/* g becomes gelu(g), rounded, times u. */
template <typename T, int V> DEVICE_FUNCTION void open_gates(float (&g)[V], const float (&u)[V]) {
#pragma unroll
    for (int j = 0; j < V; j++) g[j] = 0.5f * g[j] * (1.0f + gelu_tanh(g[j]));
    round_all<T>(g);
#pragma unroll
    for (int j = 0; j < V; j++) g[j] *= u[j];
}

/* Rows of F elements, of y one behind the other, of gate and up `stride` apart: those lie F apart
 * in joined rows. */
template <typename T, int V>
static __global__ void forward(T *y, const T *gate, const T *up, int64_t rows, int64_t F,
                               int64_t stride) {
    wait_for_last();
    FOR_GRID(i, rows * (F / V)) {
        RowPack pack = row_pack(i, F / V);
        int64_t at = pack.row * stride + pack.at * V;
        float g[V], u[V];
        load(g, gate + at);
        load(u, up + at);
        open_gates<T>(g, u);
        store(y + i * V, g);
    }
}

/* gelu(x) and its slope. */
struct GeluSlope {
    float value, slope;
};
DEVICE_FUNCTION GeluSlope gelu_slope(float x) {
    float t = gelu_tanh(x);
    return GeluSlope{0.5f * x * (1.0f + t),
                     0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * GELU_FACTOR *
                                             (1.0f + 3.0f * GELU_CUBE * x * x)};
}

template <typename T, int V>
static __global__ void backward(T *dgate, T *dup, T *y, const T *dy, const T *gate, const T *up,
                                int64_t count) {
    wait_for_last();
    FOR_GRID(i, count / V) {
        int64_t at = i * V;
        float g[V], u[V], d[V], dg[V];
        load(g, gate + at);
        load(u, up + at);
        load(d, dy + at);
#pragma unroll
        for (int j = 0; j < V; j++) {
            GeluSlope gelu = gelu_slope(g[j]);
            dg[j] = d[j] * u[j] * gelu.slope;
            d[j] *= gelu.value;
            u[j] *= rounded<T>(gelu.value);
        }
        if (y) store(y + at, u);
        store(dgate + at, dg);
        if (dup) store(dup + at, d);
    }
}

/* Rows of gate and up joined, a block a row: of weights[m] times the row, and <dy, y>. */
#define ROW_THREADS 256
template <typename T, int V>
static __global__ void __launch_bounds__(ROW_THREADS)
    backward_weighted(T *dboth, float *dweights, const T *dy, const float *weights, const T *both,
                      int F) {
    wait_for_last();
    __shared__ float space[32];
    int64_t m = blockIdx.x;
    float weight = weights[m], sum = 0;
    const T *gate = both + m * 2 * F, *slopes = dy + m * F;
    T *to = dboth + m * 2 * F;
    for (int at = threadIdx.x * V; at < F; at += blockDim.x * V) {
        float g[V], u[V], d[V], dg[V];
        load(g, gate + at);
        load(u, gate + F + at);
        load(d, slopes + at);
#pragma unroll
        for (int j = 0; j < V; j++) {
            GeluSlope gelu = gelu_slope(g[j]);
            sum += d[j] * rounded<T>(rounded<T>(gelu.value) * u[j]);
            d[j] *= weight;
            dg[j] = d[j] * u[j] * gelu.slope;
            d[j] *= gelu.value;
        }
        store(to + at, dg);
        store(to + F + at, d);
    }
    sum = block_sum(sum, space);
    if (!threadIdx.x) dweights[m] = sum;
}

static void launch_forward(Tensor y, Tensor gate, const void *up, int64_t rows, int64_t stride,
                           bool fits) {
    if (!tensor_count(y)) return;
    int64_t F = tensor_count(y) / rows;
    WITH_FLOAT(y.dtype, T, WITH_LONG_PACKS(T, F, fits, V, {
                   LAUNCH_NEXT(y.device, (forward<T, V>), grid_for(y.device, rows * (F / V), 256),
                               256, data_of<T>(y), data_of<T>(gate), (const T *)up, rows, F,
                               stride);
               }));
}

extern "C" void cuda_gelu_mul_forward(Tensor y, Tensor gate, Tensor up) {
    int64_t count = tensor_count(y);
    launch_forward(y, gate, up.data, 1, count, fits_packs(count, y, gate, up));
}

/* A warp 32 V elements, whose codes it makes too. */
template <typename T, int V>
static __global__ void __launch_bounds__(256)
    forward_codes(T *y, Codes codes, const T *gate, const T *up, int64_t count) {
    wait_for_last();
    int64_t at = ((int64_t)blockIdx.x * 256 + threadIdx.x) * V;
    bool here = at < count;
    float g[V] = {}, u[V];
    if (here) {
        load(g, gate + at);
        load(u, up + at);
        open_gates<T>(g, u);
        Kept<T, V> pack;
        pack.keep(g);
        pack.write(y + at);
#pragma unroll
        for (int j = 0; j < V; j++) g[j] = pack[j];
    }
    store_codes(codes, at, g, here);
}

extern "C" void cuda_gelu_mul_codes(Tensor y, Tensor codes, Tensor gate, Tensor up) {
    int64_t count = tensor_count(y);
    Codes to = codes_in(codes.data, count);
    if (!count) return;
    if (!fits_packs(count, y, gate, up)) {
        cuda_gelu_mul_forward(y, gate, up);
        round_activations(y.device, to, y);
        return;
    }
    WITH_FLOAT(y.dtype, T, {
        constexpr int V = (int)(16 / sizeof(T));
        LAUNCH_NEXT(y.device, (forward_codes<T, V>), (unsigned)ceil_div(count, 256 * V), 256,
                    data_of<T>(y), to, data_of<T>(gate), data_of<T>(up), count);
    });
}

extern "C" void cuda_gelu_mul_backward(Tensor dgate, Tensor dup, Tensor y, Tensor dy, Tensor gate,
                                       Tensor up) {
    int64_t count = tensor_count(dy);
    bool fits = fits_packs(count, dgate, dup, dy, gate) && fits_packs(count, up, y);
    if (!count) return;
    WITH_FLOAT(dy.dtype, T, WITH_LONG_PACKS(T, count, fits, V, {
                   LAUNCH_NEXT(dy.device, (backward<T, V>), grid_for(dy.device, count / V, 256),
                               256, data_of<T>(dgate), data_of<T>(dup), data_of<T>(y),
                               data_of<T>(dy), data_of<T>(gate), data_of<T>(up), count);
               }));
}

/* The second half of joined rows. */
static void *half_of(Tensor both, int64_t F) {
    return (char *)both.data + (size_t)F * dtype_size(both.dtype);
}

extern "C" void cuda_gelu_mul_joined_forward(Tensor y, Tensor both) {
    int64_t F = tensor_cols(y);
    launch_forward(y, both, half_of(both, F), tensor_rows(y), 2 * F, fits_packs(F, y, both));
}

extern "C" void cuda_gelu_mul_joined_backward(Tensor dboth, Tensor dweights, Tensor dy,
                                              Tensor weights, Tensor both) {
    int64_t F = tensor_cols(dy), M = tensor_rows(dy);
    bool fits = fits_packs(F, dboth, dy, both);
    if (!tensor_count(dy)) return;
    WITH_FLOAT(dy.dtype, T, WITH_LONG_PACKS(T, F, fits, V, {
                   int64_t threads = ceil_div(F, 32 * V) * 32;
                   LAUNCH_NEXT(dy.device, (backward_weighted<T, V>), (unsigned)M,
                               (unsigned)(threads < ROW_THREADS ? threads : ROW_THREADS),
                               data_of<T>(dboth), data_of<float>(dweights), data_of<T>(dy),
                               data_of<float>(weights), data_of<T>(both), (int)F);
               }));
}

DEVICE_FUNCTION float sigmoid(float x) {
    return 1.0f / (1.0f + expf(-x));
}

template <typename T> static __global__ void glu(T *y, const T *x, int64_t count, int64_t F) {
    FOR_GRID(k, count) {
        int64_t at = k / F * 2 * F + k % F;
        y[k] = from_float<T>(to_float(x[at]) * sigmoid(to_float(x[at + F])));
    }
}

template <typename T>
static __global__ void glu_both(T *dx, const T *dy, const T *x, int64_t count, int64_t F) {
    FOR_GRID(k, count) {
        int64_t at = k / F * 2 * F + k % F;
        float d = to_float(dy[k]), gate = sigmoid(to_float(x[at + F]));
        dx[at] = from_float<T>(d * gate);
        dx[at + F] = from_float<T>(d * to_float(x[at]) * gate * (1.0f - gate));
    }
}

extern "C" void cuda_glu_forward(Tensor y, Tensor x) {
    int64_t count = tensor_count(y);
    if (!count) return;
    WITH_FLOAT(y.dtype, T, {
        LAUNCH(y.device, (glu<T>), grid_for(y.device, count, 256), 256, 0, data_of<T>(y),
               data_of<T>(x), count, tensor_cols(y));
    });
}

extern "C" void cuda_glu_backward(Tensor dx, Tensor dy, Tensor x) {
    int64_t count = tensor_count(dy);
    if (!count) return;
    WITH_FLOAT(dy.dtype, T, {
        LAUNCH(dy.device, (glu_both<T>), grid_for(dy.device, count, 256), 256, 0, data_of<T>(dx),
               data_of<T>(dy), data_of<T>(x), count, tensor_cols(dy));
    });
}

DEVICE_FUNCTION float value_of(Activation f, float x) {
    if (f == RELU) return x > 0 ? x : 0;
    if (f == SILU) return x * sigmoid(x);
    return x > 20.0f ? x : log1pf(expf(x));
}
DEVICE_FUNCTION float slope_of(Activation f, float x) {
    if (f == RELU) return x > 0 ? 1.0f : 0.0f;
    if (f == SILU) return sigmoid(x) * (1.0f + x * (1.0f - sigmoid(x)));
    return sigmoid(x);
}

template <typename Y, typename X>
static __global__ void activate(Y *y, const X *x, Activation f, int64_t count) {
    FOR_GRID(k, count) y[k] = from_float<Y>(value_of(f, to_float(x[k])));
}

template <typename Y, typename X>
static __global__ void activate_backward(Y *dx, Write write, const X *dy, const X *x, Activation f,
                                         int64_t count) {
    FOR_GRID(k, count) {
        float d = to_float(dy[k]) * slope_of(f, to_float(x[k]));
        dx[k] = from_float<Y>(write == ADD ? to_float(dx[k]) + d : d);
    }
}

extern "C" void cuda_activation_forward(Tensor y, Tensor x, Activation f) {
    int64_t count = tensor_count(y);
    if (!count) return;
    WITH_FLOAT(y.dtype, Y, WITH_FLOAT(x.dtype, X, {
                   LAUNCH(y.device, (activate<Y, X>), grid_for(y.device, count, 256), 256, 0,
                          data_of<Y>(y), data_of<X>(x), f, count);
               }));
}

extern "C" void cuda_activation_backward(Tensor dx, Write write, Tensor dy, Tensor x,
                                         Activation f) {
    int64_t count = tensor_count(dy);
    if (!count) return;
    WITH_FLOAT(dx.dtype, Y, WITH_FLOAT(x.dtype, X, {
                   LAUNCH(dy.device, (activate_backward<Y, X>), grid_for(dy.device, count, 256),
                          256, 0, data_of<Y>(dx), write, data_of<X>(dy), data_of<X>(x), f, count);
               }));
}

template <typename T>
static __global__ void clamp(T *y, const T *x, float low, float high, int64_t count) {
    FOR_GRID(k, count) y[k] = from_float<T>(fminf(fmaxf(to_float(x[k]), low), high));
}

template <typename T>
static __global__ void clamp_mask(T *dx, Write write, const T *dy, const T *x, float low,
                                  float high, int64_t count) {
    FOR_GRID(k, count) {
        float v = to_float(x[k]), d = v > low && v < high ? to_float(dy[k]) : 0.0f;
        dx[k] = from_float<T>(write == ADD ? to_float(dx[k]) + d : d);
    }
}

extern "C" void cuda_clamp_forward(Tensor y, Tensor x, float low, float high) {
    int64_t count = tensor_count(y);
    if (!count) return;
    WITH_FLOAT(y.dtype, T, {
        LAUNCH(y.device, (clamp<T>), grid_for(y.device, count, 256), 256, 0, data_of<T>(y),
               data_of<T>(x), low, high, count);
    });
}

extern "C" void cuda_clamp_backward(Tensor dx, Write write, Tensor dy, Tensor x, float low,
                                    float high) {
    int64_t count = tensor_count(dy);
    if (!count) return;
    WITH_FLOAT(dy.dtype, T, {
        LAUNCH(dy.device, (clamp_mask<T>), grid_for(dy.device, count, 256), 256, 0, data_of<T>(dx),
               write, data_of<T>(dy), data_of<T>(x), low, high, count);
    });
}
