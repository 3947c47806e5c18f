/* rope.cu - rotary tables and rotations. */
#include "kernels/cuda/cuda.h"

extern "C" {
#include "kernels/rope.h"
}

static __global__ void table(float *cosines, float *sines, const int32_t *positions, int64_t N,
                             int64_t half, double theta, int64_t rotated, float factor) {
    FOR_GRID(k, N * half) {
        int64_t i = k % half;
        double exponent = (double)i / (double)half;
        float frequency = i < rotated ? (float)(1.0 / pow(theta, exponent)) / factor : 0.0f;
        float angle = (float)positions[k / half] * frequency;
        cosines[k] = i < rotated ? cosf(angle) : 1.0f;
        sines[k] = i < rotated ? sinf(angle) : 0.0f;
    }
}

/* Pairs of one run lie half a run apart; a row has `runs`, which take its axes by turns. */
template <typename Y, typename X, int V>
static __global__ void rotate(Y *y, const X *x, const float *cosines, const float *sines,
                              int64_t pairs, int64_t runs, int64_t axes, int64_t half, float sign) {
    wait_for_last();
    FOR_GRID(k, pairs / V) {
        int64_t i = k * V % half, run = k * V / half, n = run / runs * axes + run % axes;
        const X *from = x + run * 2 * half + i;
        Y *to = y + run * 2 * half + i;
        float a[V], b[V], c[V], s[V];
        load(a, from);
        load(b, from + half);
        load(c, cosines + n * half + i);
        load(s, sines + n * half + i);
#pragma unroll
        for (int j = 0; j < V; j++) turn_pair(a[j], b[j], c[j], sign * s[j]);
        store(to, a);
        store(to + half, b);
    }
}

extern "C" void cuda_rope_table(Tensor cosines, Tensor sines, Tensor positions, float theta,
                                int64_t rotated, float factor) {
    int64_t half = tensor_cols(cosines), N = tensor_count(positions);
    if (!N) return;
    LAUNCH(positions.device, (table), grid_for(positions.device, N * half, 256), 256, 0,
           data_of<float>(cosines), data_of<float>(sines), data_of<int32_t>(positions), N, half,
           (double)theta, rotated, factor);
}

static void launch_rotate(Tensor y, Tensor x, Tensor cosines, Tensor sines, float sign) {
    int64_t axes = cosines.ndim == 3 ? cosines.shape[1] : 1;
    int64_t half = x.shape[2] / axes / 2, pairs = tensor_count(x) / 2;
    if (!pairs) return;
    bool fits = fits_packs(half, y, x, cosines, sines);
    WITH_FLOAT(y.dtype, Y, WITH_FLOAT(x.dtype, X, WITH_PACKS(fits, V, {
                                          LAUNCH_NEXT(x.device, (rotate<Y, X, V>),
                                                      grid_for(x.device, pairs / V, 256), 256,
                                                      data_of<Y>(y), data_of<X>(x),
                                                      data_of<float>(cosines),
                                                      data_of<float>(sines), pairs,
                                                      x.shape[1] * axes, axes, half, sign);
                                      })));
}

extern "C" void cuda_rope_forward(Tensor y, Tensor x, Tensor cosines, Tensor sines) {
    launch_rotate(y, x, cosines, sines, 1.0f);
}

extern "C" void cuda_rope_backward(Tensor dx, Tensor dy, Tensor cosines, Tensor sines) {
    launch_rotate(dx, dy, cosines, sines, -1.0f);
}
