/* activation.cu - the gated GELU. */
#include "kernels/cuda/cuda.h"

extern "C" {
#include "kernels/activation.h"
}

#define GELU_FACTOR 0.7978845608028654f /* sqrt(2 / pi) */
#define GELU_CUBE   0.044715f

DEVICE_FUNCTION float gelu_tanh(float x) {
    return tanhf(GELU_FACTOR * (x + GELU_CUBE * x * x * x));
}

/* Element k of (M, F) is at m * stride + f of the gate and of up, which in joined rows lie F apart.
 */
template <typename T, int V>
static __global__ void forward(T *y, const T *gate, const T *up, int64_t count, int64_t F,
                               int64_t stride) {
    FOR_GRID(i, count / V) {
        int64_t k = i * V, at = k / F * stride + k % F;
        float g[V], u[V];
        load(g, gate + at);
        load(u, up + at);
#pragma unroll
        for (int j = 0; j < V; j++)
            g[j] = rounded<T>(0.5f * g[j] * (1.0f + gelu_tanh(g[j]))) * u[j];
        store(y + k, g);
    }
}

template <typename T, int V>
static __global__ void backward(T *dgate, T *dup, const T *dy, const T *gate, const T *up,
                                int64_t count, int64_t F, int64_t stride) {
    FOR_GRID(i, count / V) {
        int64_t k = i * V, at = k / F * stride + k % F;
        float g[V], u[V], d[V], dg[V];
        load(g, gate + at);
        load(u, up + at);
        load(d, dy + k);
#pragma unroll
        for (int j = 0; j < V; j++) {
            float x = g[j], t = gelu_tanh(x);
            float slope = 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * GELU_FACTOR *
                                                  (1.0f + 3.0f * GELU_CUBE * x * x);
            dg[j] = d[j] * u[j] * slope;
            d[j] *= 0.5f * x * (1.0f + t);
        }
        store(dgate + at, dg);
        if (dup) store(dup + at, d);
    }
}

static void launch_forward(Tensor y, Tensor gate, const void *up, int64_t F, int64_t stride,
                           bool fits) {
    int64_t count = tensor_count(y);
    if (!count) return;
    WITH_FLOAT(y.dtype, T, WITH_PACKS(fits, V, {
                   LAUNCH(y.device, (forward<T, V>), grid_for(y.device, count / V, 256), 256, 0,
                          data_of<T>(y), data_of<T>(gate), (const T *)up, count, F, stride);
               }));
}

static void launch_backward(Tensor dgate, void *dup, Tensor dy, Tensor gate, const void *up,
                            int64_t F, int64_t stride, bool fits) {
    int64_t count = tensor_count(dy);
    if (!count) return;
    WITH_FLOAT(dy.dtype, T, WITH_PACKS(fits, V, {
                   LAUNCH(dy.device, (backward<T, V>), grid_for(dy.device, count / V, 256), 256, 0,
                          data_of<T>(dgate), (T *)dup, data_of<T>(dy), data_of<T>(gate),
                          (const T *)up, count, F, stride);
               }));
}

extern "C" void cuda_gelu_mul_forward(Tensor y, Tensor gate, Tensor up) {
    int64_t count = tensor_count(y);
    launch_forward(y, gate, up.data, count, count, fits_packs(count, y, gate, up));
}

extern "C" void cuda_gelu_mul_backward(Tensor dgate, Tensor dup, Tensor dy, Tensor gate,
                                       Tensor up) {
    int64_t count = tensor_count(dy);
    bool fits = fits_packs(count, dgate, dup, dy, gate) && fits_packs(count, up);
    launch_backward(dgate, dup.data, dy, gate, up.data, count, count, fits);
}

/* The second half of joined rows. */
static void *half_of(Tensor both, int64_t F) {
    return (char *)both.data + (size_t)F * dtype_size(both.dtype);
}

extern "C" void cuda_gelu_mul_joined_forward(Tensor y, Tensor both) {
    int64_t F = tensor_cols(y);
    launch_forward(y, both, half_of(both, F), F, 2 * F, fits_packs(F, y, both));
}

extern "C" void cuda_gelu_mul_joined_backward(Tensor dboth, Tensor dy, Tensor both) {
    int64_t F = tensor_cols(dy);
    launch_backward(dboth, half_of(dboth, F), dy, both, half_of(both, F), F, 2 * F,
                    fits_packs(F, dboth, dy, both));
}
