/* convolution.cu - unfolding, depthwise convolution, means over rows: a thread an element. */
#include "kernels/cuda/columns.h"

extern "C" {
#include "kernels/convolution.h"
}

typedef struct Plane {
    int64_t T, F, D;
} Plane; /* of x; y has half the rows and columns, rounded up */

template <typename T> static __global__ void unfold(T *y, const T *x, Plane p, int64_t count) {
    int64_t F = (p.F + 1) / 2;
    FOR_GRID(k, count) {
        int64_t place = k / (9 * p.D), tap = k % 9, d = k % (9 * p.D) / 9;
        int64_t s = 2 * (place / F) + tap / 3 - 1, e = 2 * (place % F) + tap % 3 - 1;
        bool inside = s >= 0 && s < p.T && e >= 0 && e < p.F;
        y[k] = inside ? x[(s * p.F + e) * p.D + d] : from_float<T>(0.0f);
    }
}

template <typename T> static __global__ void fold(T *dx, const T *dy, Plane p, int64_t count) {
    int64_t rows = (p.T + 1) / 2, F = (p.F + 1) / 2;
    FOR_GRID(k, count) {
        int64_t d = k % p.D, e = k / p.D % p.F, s = k / p.D / p.F;
        float sum = 0;
        for (int64_t i = 0; i < 3; i++)
            for (int64_t j = 0; j < 3; j++) {
                int64_t t = s + 1 - i, f = e + 1 - j; /* twice the place it went to */
                if (t < 0 || f < 0 || t % 2 || f % 2 || t / 2 >= rows || f / 2 >= F) continue;
                sum += to_float(dy[((t / 2 * F + f / 2) * p.D + d) * 9 + 3 * i + j]);
            }
        dx[k] = from_float<T>(sum);
    }
}

extern "C" void cuda_unfold_forward(Tensor y, Tensor x) {
    int64_t count = tensor_count(y);
    Plane p = {x.shape[0], x.shape[1], x.shape[2]};
    if (!count) return;
    WITH_FLOAT(y.dtype, T, {
        LAUNCH(y.device, (unfold<T>), grid_for(y.device, count, 256), 256, 0, data_of<T>(y),
               data_of<T>(x), p, count);
    });
}

extern "C" void cuda_unfold_backward(Tensor dx, Tensor dy) {
    int64_t count = tensor_count(dx);
    Plane p = {dx.shape[0], dx.shape[1], dx.shape[2]};
    if (!count) return;
    WITH_FLOAT(dx.dtype, T, {
        LAUNCH(dx.device, (fold<T>), grid_for(dx.device, count, 256), 256, 0, data_of<T>(dx),
               data_of<T>(dy), p, count);
    });
}

/* step -1: forward, row t reads those before it; step 1: the way back, it reads those behind it. */
template <typename T, typename W>
static __global__ void depthwise(T *y, const T *x, const W *weight, int64_t rows, int64_t D,
                                 int64_t J, int64_t step) {
    FOR_GRID(k, rows * D) {
        int64_t t = k / D, d = k % D;
        float sum = 0;
        for (int64_t j = 0; j < J; j++) {
            int64_t s = t + step * (J - 1 - j);
            if (s >= 0 && s < rows) sum += to_float(weight[d * J + j]) * to_float(x[s * D + d]);
        }
        y[k] = from_float<T>(sum);
    }
}

static void launch_depthwise(Tensor y, Tensor x, Tensor weight, int64_t step) {
    int64_t count = tensor_count(y);
    if (!count) return;
    WITH_FLOAT(y.dtype, T, WITH_FLOAT(weight.dtype, W, {
                   LAUNCH(y.device, (depthwise<T, W>), grid_for(y.device, count, 256), 256, 0,
                          data_of<T>(y), data_of<T>(x), data_of<W>(weight), tensor_rows(x),
                          tensor_cols(x), tensor_cols(weight), step);
               }));
}

extern "C" void cuda_depthwise_forward(Tensor y, Tensor x, Tensor weight) {
    launch_depthwise(y, x, weight, -1);
}

template <typename T> struct TapTerm {
    const T *dy, *x;
    int64_t D, J;
    __device__ float operator()(int64_t t, int64_t k) const {
        int64_t d = k / J, s = t + k % J - (J - 1);
        return s < 0 ? 0.0f : to_float(dy[t * D + d]) * to_float(x[s * D + d]);
    }
};

extern "C" void cuda_depthwise_backward(Tensor dx, Tensor dweight, Tensor dy, Tensor x,
                                        Tensor weight) {
    int64_t T = tensor_rows(x), D = tensor_cols(x), J = tensor_cols(weight);
    if (dx.data) launch_depthwise(dx, dy, weight, 1);
    if (!dweight.data) return;
    WITH_FLOAT(x.dtype, E,
               add_column_sums(x.device, data_of<float>(dweight), T, D * J,
                               TapTerm<E>{data_of<E>(dy), data_of<E>(x), D, J}));
}

template <typename T>
static __global__ void pool(float *y, const T *x, float alpha, int64_t k, int64_t D,
                            int64_t count) {
    FOR_GRID(i, count) {
        int64_t m = i / D, d = i % D;
        float sum = 0;
        for (int64_t r = 0; r < k; r++) sum += to_float(x[(m * k + r) * D + d]);
        y[i] = alpha * rounded<T>(sum / (float)k);
    }
}

template <typename T>
static __global__ void spread(T *dx, const float *dy, float alpha, int64_t k, int64_t D,
                              int64_t count) {
    FOR_GRID(i, count) dx[i] = from_float<T>(alpha / (float)k * dy[i / D / k * D + i % D]);
}

extern "C" void cuda_pool_rows_forward(Tensor y, Tensor x, float alpha) {
    int64_t count = tensor_count(y), k = tensor_rows(x) / tensor_rows(y);
    WITH_FLOAT(x.dtype, T, {
        LAUNCH(y.device, (pool<T>), grid_for(y.device, count, 256), 256, 0, data_of<float>(y),
               data_of<T>(x), alpha, k, tensor_cols(y), count);
    });
}

extern "C" void cuda_pool_rows_backward(Tensor dx, Tensor dy, float alpha) {
    int64_t count = tensor_count(dx), k = tensor_rows(dx) / tensor_rows(dy);
    WITH_FLOAT(dx.dtype, T, {
        LAUNCH(dx.device, (spread<T>), grid_for(dx.device, count, 256), 256, 0, data_of<T>(dx),
               data_of<float>(dy), alpha, k, tensor_cols(dy), count);
    });
}

template <typename Y, typename W>
static __global__ void shift_scale(Y *y, const float *x, const W *shift, const W *scale, int64_t D,
                                   int64_t count) {
    FOR_GRID(i, count)
    y[i] = from_float<Y>((x[i] - to_float(shift[i % D])) * to_float(scale[i % D]));
}

extern "C" void cuda_standardize(Tensor y, Tensor x, Tensor shift, Tensor scale) {
    int64_t count = tensor_count(x);
    if (!count) return;
    WITH_FLOAT(y.dtype, Y, WITH_FLOAT(shift.dtype, W, {
                   LAUNCH(y.device, (shift_scale<Y, W>), grid_for(y.device, count, 256), 256, 0,
                          data_of<Y>(y), data_of<float>(x), data_of<W>(shift), data_of<W>(scale),
                          tensor_cols(x), count);
               }));
}
