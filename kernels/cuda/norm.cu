/* norm.cu - norms, of one kind or several of one x. */
#include "kernels/cuda/columns.h"
#include "kernels/cuda/rows.h"

extern "C" {
#include "kernels/elementwise.h"
#include "kernels/norm.h"
}

/* Blocks of one multiprocessor, for what registers they may have. */
template <typename W, int ROW, int KEPT> __host__ __device__ constexpr int blocks_of() {
    return ROW == LONG                ? 1
           : ROW != MANY              ? (KEPT ? 2 : 4)
           : sizeof(W) > sizeof(bf16) ? 7
           : KEPT > 2                 ? 8
                                      : 10;
}

/* y = scale (residual + x rstd weight), scale 1 without a residual. With `given` rstd is read, else
 * computed and, where wanted, kept. KEPT: how many packs of a row a thread holds, all read at once;
 * 0: a row is read twice. */
template <typename T, typename W, int V, int ROW, int KEPT>
static __global__ void __launch_bounds__(threads_of<ROW>(), (blocks_of<W, ROW, KEPT>()))
    forward(T *y, float *rstd, const T *x, const W *weight, const T *residual, float scale,
            int64_t N, int64_t D, float eps, bool given) {
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
        for (int j = 0; j < V; j++) out[j] = normed(held[i][j], r, weight ? factors[i][j] : 1.0f);
        if (residual)
            add_scaled(more[i], out, more[i], scale);
        else
            more[i].keep(out);
        more[i].write(y + n * D + d);
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
        r = root_of_mean(row_sum<ROW>(sum, space), D, eps);
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
#define WITH_KEPT(T, N, D, V, ROW, KEPT, ...)                                                      \
    do {                                                                                           \
        if (ROW == MANY && (D) <= 2 * MANY * (V)) {                                                \
            constexpr int KEPT = ROW == MANY ? 2 : 0;                                              \
            __VA_ARGS__;                                                                           \
        } else if (ROW == MANY && (D) <= HELD_MANY * MANY * (V)) {                                 \
            constexpr int KEPT = ROW == MANY ? HELD_MANY : 0;                                      \
            __VA_ARGS__;                                                                           \
        } else if (ROW != MANY && (N) <= FEW_ROWS &&                                               \
                   (D) <= (int64_t)held_of<T, ROW>() * ROW * (V)) {                                \
            constexpr int KEPT = ROW != MANY ? held_of<T, ROW>() : 0;                              \
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
    WITH_KEPT(T, N, D, V, ROW, KEPT,
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

void norm_rows(Tensor y, Tensor rstd, Tensor x, Tensor weight, Tensor residual, float scale,
               float eps, bool given) {
    int64_t D = tensor_cols(x), N = tensor_rows(x);
    if (!N) return;
    bool fits = fits_packs(D, y, x, weight, residual);
    DType weight_dtype = weight.data ? weight.dtype : F32;
    WITH_FLOAT(x.dtype, T,
               WITH_FLOAT(weight_dtype, W,
                          WITH_LONG_PACKS(T, D, fits, V, WITH_ROW(N, D, ROW, {
                                              launch_rows<T, W, V, ROW>(
                                                  x.device, N, D, data_of<T>(y),
                                                  data_of<float>(rstd), data_of<T>(x),
                                                  data_of<W>(weight), data_of<T>(residual), scale,
                                                  N, D, eps, given);
                                          }))));
}

extern "C" void cuda_rmsnorm_forward(Tensor y, Tensor rstd, Tensor x, Tensor weight,
                                     Tensor residual, float eps) {
    norm_rows(y, rstd, x, weight, residual, 1.0f, eps, false);
}

extern "C" void cuda_rmsnorm_apply(Tensor y, Tensor rstd, Tensor x, Tensor weight) {
    norm_rows(y, rstd, x, weight, tensor_absent(), 1.0f, 0, true);
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
                                  WITH_KEPT(T, N, D, V, ROW, KEPT, {
                                      LAUNCH_NEXT(x.device, (backward<T, W, V, ROW, KEPT>),
                                                  (unsigned)ceil_div(N, threads_of<ROW>() / ROW),
                                                  threads_of<ROW>(), data_of<T>(dx), write,
                                                  data_of<T>(dy), data_of<T>(x),
                                                  data_of<float>(rstd), data_of<W>(weight), N, D);
                                  });
                              }))));
}

/* ---- several norms of one x, of many rows ---- */

template <typename T, typename W> struct Several {
    T *y[NORMS_MOST]; /* or dy, which is only read */
    const W *weight[NORMS_MOST];
    float factor[NORMS_MOST]; /* 0: none */
    int count;
};

template <typename T, typename W>
static Several<T, W> several_of(const Tensor *y, const NormWeight *weight, int count) {
    Several<T, W> s = {};
    s.count = count;
    for (int i = 0; i < count; i++) {
        s.y[i] = data_of<T>(y[i]);
        s.weight[i] = data_of<W>(weight[i].weight);
        s.factor[i] = weight[i].factor;
    }
    return s;
}

/* A row in V KEPT elements a thread. */
template <typename T, typename W, int V, int KEPT>
static __global__ void __launch_bounds__(MANY, 8)
    forward_several(Several<T, W> s, float *rstd, const T *x, int64_t D, float eps) {
    wait_for_last();
    __shared__ float space[32];
    int64_t n = blockIdx.x;
    Kept<T, V> held[KEPT] = {};
    float sum = 0;
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        int64_t d = (threadIdx.x + i * MANY) * V;
        if (d < D) held[i].read(x + n * D + d);
    }
#pragma unroll
    for (int i = 0; i < KEPT; i++)
#pragma unroll
        for (int j = 0; j < V; j++) sum += held[i][j] * held[i][j];
    float r = root_of_mean(row_sum<MANY>(sum, space), D, eps);
    if (rstd && !threadIdx.x) rstd[n] = r;
#pragma unroll
    for (int k = 0; k < NORMS_MOST; k++) {
        if (k >= s.count) break;
        const W *weight = s.weight[k];
        Kept<W, V> factors[KEPT] = {};
#pragma unroll
        for (int i = 0; i < KEPT; i++) {
            int64_t d = (threadIdx.x + i * MANY) * V;
            if (weight && d < D) factors[i].read(weight + d);
        }
#pragma unroll
        for (int i = 0; i < KEPT; i++) {
            int64_t d = (threadIdx.x + i * MANY) * V;
            float out[V];
            if (d >= D) break;
            if (s.factor[k]) {
#pragma unroll
                for (int j = 0; j < V; j++) out[j] = held[i][j] * r;
                round_all<T>(out);
#pragma unroll
                for (int j = 0; j < V; j++) out[j] *= factors[i][j];
                round_all<T>(out);
#pragma unroll
                for (int j = 0; j < V; j++) out[j] *= s.factor[k];
            } else {
#pragma unroll
                for (int j = 0; j < V; j++)
                    out[j] = normed(held[i][j], r, weight ? factors[i][j] : 1.0f);
            }
            store(s.y[k] + n * D + d, out);
        }
    }
}

template <typename T, typename W, int V, int KEPT>
static __global__ void __launch_bounds__(MANY, sizeof(W) > sizeof(bf16) ? 4 : 5)
    backward_several(T *dx, Write write, Several<T, W> s, const T *x, const float *rstd,
                     int64_t D) {
    wait_for_last();
    __shared__ float space[32];
    int64_t n = blockIdx.x;
    Kept<T, V> held[KEPT] = {}, old[KEPT] = {};
    float slopes[KEPT][V] = {}, sum = 0, r = rstd[n];
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        int64_t d = (threadIdx.x + i * MANY) * V;
        if (d >= D) break;
        held[i].read(x + n * D + d);
        if (write == ADD) old[i].read(dx + n * D + d);
    }
#pragma unroll
    for (int k = 0; k < NORMS_MOST; k++) {
        if (k >= s.count) break;
        const W *weight = s.weight[k];
        float factor = s.factor[k] ? s.factor[k] : 1.0f;
        Kept<T, V> own[KEPT] = {};
        Kept<W, V> factors[KEPT] = {};
#pragma unroll
        for (int i = 0; i < KEPT; i++) {
            int64_t d = (threadIdx.x + i * MANY) * V;
            if (d >= D) break;
            own[i].read(s.y[k] + n * D + d);
            if (weight) factors[i].read(weight + d);
        }
#pragma unroll
        for (int i = 0; i < KEPT; i++)
#pragma unroll
            for (int j = 0; j < V; j++)
                slopes[i][j] += weight ? own[i][j] * (factor * factors[i][j]) : own[i][j];
    }
#pragma unroll
    for (int i = 0; i < KEPT; i++)
#pragma unroll
        for (int j = 0; j < V; j++) sum += slopes[i][j] * held[i][j];
    float mean = row_sum<MANY>(sum, space) / (float)D * r * r;
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        int64_t d = (threadIdx.x + i * MANY) * V;
        float out[V];
        if (d >= D) break;
#pragma unroll
        for (int j = 0; j < V; j++)
            out[j] = old[i][j] + r * (slopes[i][j] - held[i][j] * mean); /* or 0, and that */
        store(dx + n * D + d, out);
    }
}

/* Whether those take rows of x with these, their weights of one dtype, which is given. */
static bool takes_several(Tensor dx, const Tensor *y, Tensor x, const NormWeight *weight, int count,
                          DType *dtype) {
    int64_t D = tensor_cols(x), each = (int64_t)(16 / dtype_size(x.dtype));
    bool fits = fits_packs(D, dx, x) && D % each == 0 && D <= HELD_MANY * MANY * each;
    *dtype = x.dtype;
    for (int i = 0; i < count; i++)
        if (weight[i].weight.data) *dtype = weight[i].weight.dtype;
    for (int i = 0; i < count; i++)
        fits = fits && fits_packs(D, y[i], weight[i].weight) &&
               (!weight[i].weight.data || weight[i].weight.dtype == *dtype);
    return fits && tensor_rows(x) > FEW_ROWS;
}

extern "C" void cuda_rmsnorm_forward_several(const Tensor *y, Tensor rstd, Tensor x,
                                             const NormWeight *weight, int count, float eps) {
    int64_t D = tensor_cols(x), N = tensor_rows(x);
    DType dtype;
    if (!N) return;
    if (!takes_several(x, y, x, weight, count, &dtype)) {
        for (int i = 0; i < count; i++) {
            bool apart = weight[i].factor != 0;
            norm_rows(y[i], rstd, x, apart ? tensor_absent() : weight[i].weight, tensor_absent(),
                      1.0f, eps, false);
            if (apart) cuda_scale_columns(y[i], SET, y[i], weight[i].weight, weight[i].factor);
        }
        return;
    }
    WITH_FLOAT(x.dtype, T, WITH_FLOAT(dtype, W, {
                   constexpr int V = (int)(16 / sizeof(T));
                   LAUNCH_NEXT(x.device, (forward_several<T, W, V, HELD_MANY>), (unsigned)N, MANY,
                               (several_of<T, W>(y, weight, count)), data_of<float>(rstd),
                               data_of<T>(x), D, eps);
               }));
}

extern "C" void cuda_rmsnorm_backward_several(Tensor dx, Write write, const Tensor *dy, Tensor x,
                                              Tensor rstd, const NormWeight *weight, int count) {
    int64_t D = tensor_cols(x), N = tensor_rows(x);
    DType dtype;
    if (!N) return;
    if (!takes_several(dx, dy, x, weight, count, &dtype)) {
        for (int i = 0; i < count; i++) {
            Tensor own = weight[i].weight;
            if (weight[i].factor) {
                own.dtype = F32;
                own.data = cuda_workspace(x.device, tensor_bytes(own));
                cuda_scale_copy(own, SET, weight[i].weight, weight[i].factor);
            }
            cuda_rmsnorm_backward(dx, i ? ADD : write, tensor_absent(), dy[i], x, rstd, own);
        }
        return;
    }
    WITH_FLOAT(x.dtype, T, WITH_FLOAT(dtype, W, {
                   constexpr int V = (int)(16 / sizeof(T));
                   LAUNCH_NEXT(x.device, (backward_several<T, W, V, HELD_MANY>), (unsigned)N, MANY,
                               data_of<T>(dx), write, (several_of<T, W>(dy, weight, count)),
                               data_of<T>(x), data_of<float>(rstd), D);
               }));
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
