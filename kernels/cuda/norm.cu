/* norm.cu - norms: a warp a row where rows are short, else a block. */
#include "kernels/cuda/columns.h"
#include "kernels/cuda/norm.h"

extern "C" {
#include "kernels/elementwise.h"
}

/* Blocks of one multiprocessor, for what registers they may have. */
template <typename W, int ROW, int KEPT> __host__ __device__ constexpr int blocks_of() {
    return ROW != MANY ? (KEPT ? 2 : 4) : sizeof(W) > sizeof(bf16) ? 7 : KEPT > 2 ? 8 : 10;
}

/* y = residual + x rstd weight. With `given` rstd is read, else computed and, where wanted, kept.
 * KEPT: how many packs of a row a thread holds, all read at once; 0: a row is read twice. */
template <typename T, typename W, int V, int ROW, int KEPT>
static __global__ void __launch_bounds__(threads_of<ROW>(), (blocks_of<W, ROW, KEPT>()))
    forward(T *y, float *rstd, const T *x, const W *weight, const T *residual, int64_t N, int64_t D,
            float eps, bool given) {
    wait_for_last();
    __shared__ float space[32];
    int64_t n = row_of<ROW>();
    bool here = n < N; /* every thread goes on to the sums */
    int lane = threadIdx.x % ROW;
    const T *row = x + n * D, *other = residual ? residual + n * D : NULL;
    constexpr int ROOM = KEPT ? KEPT : 1;
    Kept<T, V> held[ROOM] = {}, more[ROOM] = {};
    Kept<W, V> factors[ROOM] = {};
    float r = 0, sum = 0;
    auto read_others = [&](int i, int64_t d) {
        if (weight) factors[i].read(weight + d);
        if (residual) more[i].read(other + d);
    };
    if constexpr (KEPT > 0) {
#pragma unroll
        for (int i = 0; i < KEPT; i++) {
            int64_t d = (lane + i * ROW) * V;
            if (!here || d >= D) break;
            held[i].read(row + d);
            read_others(i, d);
        }
    }
    auto add_squares = [&](const Kept<T, V> &pack) {
#pragma unroll
        for (int j = 0; j < V; j++) sum += pack[j] * pack[j];
    };
    auto write = [&](int i, int64_t d) {
        float out[V];
#pragma unroll
        for (int j = 0; j < V; j++) {
            out[j] = normed(held[i][j], r, weight ? factors[i][j] : 1.0f);
            if (residual) out[j] = rounded<T>(out[j]) + more[i][j];
        }
        store(y + n * D + d, out);
    };
    if (given) {
        r = here ? rstd[n] : 0;
    } else {
        if constexpr (KEPT > 0) {
#pragma unroll
            for (int i = 0; i < KEPT; i++)
                if (here && (lane + i * ROW) * V < D) add_squares(held[i]);
        } else {
            for (int64_t d = lane * V; here && d < D; d += ROW * V) {
                held[0].read(row + d);
                add_squares(held[0]);
            }
        }
        r = 1.0f / sqrtf(row_sum<ROW>(sum, space) / (float)D + eps);
        if (here && rstd && !lane) rstd[n] = r;
    }
    if constexpr (KEPT > 0) {
#pragma unroll
        for (int i = 0; i < KEPT; i++)
            if (here && (lane + i * ROW) * V < D) write(i, (lane + i * ROW) * V);
    } else {
        for (int64_t d = lane * V; here && d < D; d += ROW * V) {
            held[0].read(row + d);
            read_others(0, d);
            write(0, d);
        }
    }
}

/* Runs the statements with KEPT the packs that a thread holds of N rows. */
#define WITH_KEPT(N, D, V, ROW, KEPT, ...)                                                         \
    do {                                                                                           \
        if (ROW == MANY && (D) <= 2 * MANY * (V)) {                                                \
            constexpr int KEPT = ROW == MANY ? 2 : 0;                                              \
            __VA_ARGS__;                                                                           \
        } else if (ROW == MANY && (D) <= HELD_MANY * MANY * (V)) {                                 \
            constexpr int KEPT = ROW == MANY ? HELD_MANY : 0;                                      \
            __VA_ARGS__;                                                                           \
        } else if (ROW != MANY && (N) <= FEW_ROWS && (D) <= (int64_t)HELD * ROW * (V)) {           \
            constexpr int KEPT = ROW != MANY ? HELD : 0;                                           \
            __VA_ARGS__;                                                                           \
        } else {                                                                                   \
            constexpr int KEPT = 0;                                                                \
            __VA_ARGS__;                                                                           \
        }                                                                                          \
    } while (0)

template <typename T, typename W, int V, int ROW, typename... More>
static void launch_rows(const Device *device, int64_t N, int64_t D, More... more) {
    constexpr int BLOCK = threads_of<ROW>();
    unsigned blocks = (unsigned)ceil_div(N, BLOCK / ROW);
    WITH_KEPT(N, D, V, ROW, KEPT,
              { LAUNCH_NEXT(device, (forward<T, W, V, ROW, KEPT>), blocks, BLOCK, more...); });
}

template <typename T, typename W, int V, int ROW, int KEPT>
static __global__ void
__launch_bounds__(threads_of<ROW>(), ROW == MANY ? (blocks_of<W, ROW, KEPT>()) - (KEPT == 0) : 1)
    backward(T *dx, Write write, const T *dy, const T *x, const float *rstd, const W *weight,
             int64_t N, int64_t D) {
    wait_for_last();
    __shared__ float space[32];
    int64_t n = row_of<ROW>();
    bool here = n < N;
    int lane = threadIdx.x % ROW;
    constexpr int ROOM = KEPT ? KEPT : 1;
    Kept<T, V> slopes[ROOM] = {}, held[ROOM] = {};
    Kept<W, V> factors[ROOM] = {};
    float sum = 0, r = here ? rstd[n] : 0;
    auto read = [&](int i, int64_t d) {
        slopes[i].read(dy + n * D + d);
        held[i].read(x + n * D + d);
        if (weight) factors[i].read(weight + d);
    };
    auto slope = [&](int i, int j) { return weight ? slopes[i][j] * factors[i][j] : slopes[i][j]; };
    auto add_products = [&](int i) {
#pragma unroll
        for (int j = 0; j < V; j++) sum += slope(i, j) * held[i][j];
    };
    if constexpr (KEPT > 0) {
#pragma unroll
        for (int i = 0; i < KEPT; i++)
            if (here && (lane + i * ROW) * V < D) read(i, (lane + i * ROW) * V);
#pragma unroll
        for (int i = 0; i < KEPT; i++)
            if (here && (lane + i * ROW) * V < D) add_products(i);
    } else {
        for (int64_t d = lane * V; here && d < D; d += ROW * V) {
            read(0, d);
            add_products(0);
        }
    }
    float mean = row_sum<ROW>(sum, space) / (float)D * r * r;
    auto finish = [&](int i, int64_t d) {
        float old[V], out[V];
        if (write == ADD) load(old, dx + n * D + d);
#pragma unroll
        for (int j = 0; j < V; j++) {
            float step = r * (slope(i, j) - held[i][j] * mean);
            out[j] = write == ADD ? old[j] + step : step;
        }
        store(dx + n * D + d, out);
    };
    if constexpr (KEPT > 0) {
#pragma unroll
        for (int i = 0; i < KEPT; i++)
            if (here && (lane + i * ROW) * V < D) finish(i, (lane + i * ROW) * V);
    } else {
        for (int64_t d = lane * V; here && d < D; d += ROW * V) {
            read(0, d);
            finish(0, d);
        }
    }
}

/* Runs the statements with ROW the threads of a row, of N. */
#define WITH_ROW(N, D, ROW, ...)                                                                   \
    do {                                                                                           \
        if ((D) <= WARP_COLS) {                                                                    \
            constexpr int ROW = 32;                                                                \
            __VA_ARGS__;                                                                           \
        } else if ((N) > FEW_ROWS) {                                                               \
            constexpr int ROW = MANY;                                                              \
            __VA_ARGS__;                                                                           \
        } else {                                                                                   \
            constexpr int ROW = NORM_THREADS;                                                      \
            __VA_ARGS__;                                                                           \
        }                                                                                          \
    } while (0)

static void launch_forward(Tensor y, Tensor rstd, Tensor x, Tensor weight, Tensor residual,
                           float eps, bool given) {
    int64_t D = tensor_cols(x), N = tensor_rows(x);
    if (!N) return;
    bool fits = fits_packs(D, y, x, weight, residual);
    DType weight_dtype = weight.data ? weight.dtype : F32;
    WITH_FLOAT(
        x.dtype, T,
        WITH_FLOAT(weight_dtype, W, WITH_LONG_PACKS(T, D, fits, V, WITH_ROW(N, D, ROW, {
                                                        launch_rows<T, W, V, ROW>(
                                                            x.device, N, D, data_of<T>(y),
                                                            data_of<float>(rstd), data_of<T>(x),
                                                            data_of<W>(weight),
                                                            data_of<T>(residual), N, D, eps, given);
                                                    }))));
}

extern "C" void cuda_rmsnorm_forward(Tensor y, Tensor rstd, Tensor x, Tensor weight,
                                     Tensor residual, float eps) {
    launch_forward(y, rstd, x, weight, residual, eps, false);
}

extern "C" void cuda_rmsnorm_apply(Tensor y, Tensor rstd, Tensor x, Tensor weight) {
    launch_forward(y, rstd, x, weight, tensor_absent(), 0, true);
}

/* A row of few. */
template <typename T, typename W, int V, int ROW>
static __global__ void __launch_bounds__(threads_of<ROW>()) pair(PairOf<T, W> p, int64_t N) {
    int64_t n = row_of<ROW>();
    normalise_pair<V, ROW, true>(p, n, n < N);
}

extern "C" void cuda_rmsnorm_pair(const NormPair *p) {
    int64_t D = tensor_cols(p->x), N = tensor_rows(p->x);
    if (!N) return;
    if (!pair_is_one(*p)) {
        cuda_rmsnorm_forward(p->y, tensor_absent(), p->x, p->weight, p->residual, p->eps);
        if (p->scale != 1.0f) cuda_scale_copy(p->y, SET, p->y, p->scale);
        cuda_rmsnorm_forward(p->next, tensor_absent(), p->y, p->next_weight, tensor_absent(),
                             p->eps);
        if (p->codes.data) round_activations(p->x.device, codes_in(p->codes.data, N * D), p->next);
        return;
    }
    WITH_FLOAT(p->x.dtype, T,
               WITH_FLOAT(p->weight.dtype, W, WITH_ROW(N, D, ROW, {
                              constexpr int V = (int)(16 / sizeof(T));
                              LAUNCH_NEXT(p->x.device, (pair<T, W, V, ROW>),
                                          (unsigned)ceil_div(N, threads_of<ROW>() / ROW),
                                          threads_of<ROW>(), (pair_of<T, W>(*p)), N);
                          })));
}

template <typename T> struct WeightTerm {
    const T *dy, *x;
    const float *rstd;
    int64_t D;
    __device__ float operator()(int64_t n, int64_t d) const {
        return to_float(dy[n * D + d]) * (to_float(x[n * D + d]) * rstd[n]);
    }
};

extern "C" void cuda_rmsnorm_backward(Tensor dx, Write write, Tensor dweight, Tensor dy, Tensor x,
                                      Tensor rstd, Tensor weight) {
    int64_t D = tensor_cols(x), N = tensor_rows(x);
    if (!N) return;
    if (dweight.data) /* first: it reads dy, which dx may overwrite */
        WITH_FLOAT(
            x.dtype, T,
            add_column_sums(x.device, data_of<float>(dweight), N, D,
                            WeightTerm<T>{data_of<T>(dy), data_of<T>(x), data_of<float>(rstd), D}));
    if (!dx.data) return;
    bool fits = fits_packs(D, dx, dy, x, weight);
    DType weight_dtype = weight.data ? weight.dtype : F32;
    WITH_FLOAT(x.dtype, T,
               WITH_FLOAT(weight_dtype, W,
                          WITH_LONG_PACKS(
                              T, D, fits, V, WITH_ROW(N, D, ROW, {
                                  WITH_KEPT(N, D, V, ROW, KEPT, {
                                      LAUNCH_NEXT(x.device, (backward<T, W, V, ROW, KEPT>),
                                                  (unsigned)ceil_div(N, threads_of<ROW>() / ROW),
                                                  threads_of<ROW>(), data_of<T>(dx), write,
                                                  data_of<T>(dy), data_of<T>(x),
                                                  data_of<float>(rstd), data_of<W>(weight), N, D);
                                  });
                              }))));
}

/* ---- layer norm ---- */

template <typename T, typename W, int ROW>
static __global__ void __launch_bounds__(threads_of<ROW>())
    layer_forward(T *y, float *mean, float *rstd, const T *x, const W *weight, const W *bias,
                  int64_t N, int64_t D, float eps) {
    __shared__ float space[32];
    int64_t n = row_of<ROW>();
    bool here = n < N; /* every thread goes on to the sums */
    int lane = threadIdx.x % ROW;
    const T *row = x + n * D;
    float sum = 0, squares = 0;
    for (int64_t d = lane; here && d < D; d += ROW) sum += to_float(row[d]);
    float m = row_sum<ROW>(sum, space) / (float)D;
    for (int64_t d = lane; here && d < D; d += ROW)
        squares += (to_float(row[d]) - m) * (to_float(row[d]) - m);
    float r = 1.0f / sqrtf(row_sum<ROW>(squares, space) / (float)D + eps);
    if (!here) return;
    if (!lane) mean[n] = m, rstd[n] = r;
    for (int64_t d = lane; d < D; d += ROW)
        y[n * D + d] = from_float<T>((to_float(row[d]) - m) * r * to_float(weight[d]) +
                                     (bias ? to_float(bias[d]) : 0.0f));
}

template <typename T, typename W, int ROW>
static __global__ void __launch_bounds__(threads_of<ROW>())
    layer_backward(T *dx, const T *dy, const T *x, const float *mean, const float *rstd,
                   const W *weight, int64_t N, int64_t D) {
    __shared__ float space[32];
    int64_t n = row_of<ROW>();
    bool here = n < N;
    int lane = threadIdx.x % ROW;
    float sum = 0, product = 0, m = here ? mean[n] : 0, r = here ? rstd[n] : 0;
    for (int64_t d = lane; here && d < D; d += ROW) {
        float u = to_float(dy[n * D + d]) * to_float(weight[d]);
        sum += u;
        product += u * (to_float(x[n * D + d]) - m) * r;
    }
    sum = row_sum<ROW>(sum, space) / (float)D;
    product = row_sum<ROW>(product, space) / (float)D;
    for (int64_t d = lane; here && d < D; d += ROW) {
        float u = to_float(dy[n * D + d]) * to_float(weight[d]);
        float normal = (to_float(x[n * D + d]) - m) * r;
        dx[n * D + d] = from_float<T>(r * (u - sum - normal * product));
    }
}

extern "C" void cuda_layernorm_forward(Tensor y, Tensor mean, Tensor rstd, Tensor x, Tensor weight,
                                       Tensor bias, float eps) {
    int64_t D = tensor_cols(x), N = tensor_rows(x);
    if (!N) return;
    WITH_FLOAT(x.dtype, T, WITH_FLOAT(weight.dtype, W, WITH_ROW(N, D, ROW, {
                                          LAUNCH(x.device, (layer_forward<T, W, ROW>),
                                                 (unsigned)ceil_div(N, threads_of<ROW>() / ROW),
                                                 threads_of<ROW>(), 0, data_of<T>(y),
                                                 data_of<float>(mean), data_of<float>(rstd),
                                                 data_of<T>(x), data_of<W>(weight),
                                                 data_of<W>(bias), N, D, eps);
                                      })));
}

template <typename T> struct LayerWeightTerm {
    const T *dy, *x;
    const float *mean, *rstd;
    int64_t D;
    __device__ float operator()(int64_t n, int64_t d) const {
        return to_float(dy[n * D + d]) * (to_float(x[n * D + d]) - mean[n]) * rstd[n];
    }
};
template <typename T> struct LayerBiasTerm {
    const T *dy;
    int64_t D;
    __device__ float operator()(int64_t n, int64_t d) const { return to_float(dy[n * D + d]); }
};

extern "C" void cuda_layernorm_backward(Tensor dx, Tensor dweight, Tensor dbias, Tensor dy,
                                        Tensor x, Tensor mean, Tensor rstd, Tensor weight) {
    int64_t D = tensor_cols(x), N = tensor_rows(x);
    if (!N) return;
    if (dweight.data) /* first: they read dy, which dx may overwrite */
        WITH_FLOAT(
            x.dtype, T,
            add_column_sums(x.device, data_of<float>(dweight), N, D,
                            LayerWeightTerm<T>{data_of<T>(dy), data_of<T>(x), data_of<float>(mean),
                                               data_of<float>(rstd), D}));
    if (dbias.data)
        WITH_FLOAT(x.dtype, T,
                   add_column_sums(x.device, data_of<float>(dbias), N, D,
                                   LayerBiasTerm<T>{data_of<T>(dy), D}));
    if (!dx.data) return;
    WITH_FLOAT(x.dtype, T, WITH_FLOAT(weight.dtype, W, WITH_ROW(N, D, ROW, {
                                          LAUNCH(x.device, (layer_backward<T, W, ROW>),
                                                 (unsigned)ceil_div(N, threads_of<ROW>() / ROW),
                                                 threads_of<ROW>(), 0, data_of<T>(dx),
                                                 data_of<T>(dy), data_of<T>(x),
                                                 data_of<float>(mean), data_of<float>(rstd),
                                                 data_of<W>(weight), N, D);
                                      })));
}
