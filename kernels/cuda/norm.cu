/* norm.cu - norms: a warp a row where rows are short, else a block. */
#include "kernels/cuda/codes.h"
#include "kernels/cuda/columns.h"

extern "C" {
#include "kernels/elementwise.h"
#include "kernels/norm.h"
}

#define THREADS   256
#define WARP_COLS 1024 /* rows up to here go to one warp */
#define MANY      128  /* threads of a row where rows are many: more of those are under way */

/* Threads of a block, ROW of them for each row; and which row is this thread's. */
template <int ROW> __host__ __device__ constexpr int threads_of() {
    return ROW == 32 ? THREADS : ROW;
}
template <int ROW> DEVICE_FUNCTION int64_t row_of() {
    return (int64_t)blockIdx.x * (threads_of<ROW>() / ROW) + threadIdx.x / ROW;
}
template <int ROW> DEVICE_FUNCTION float row_sum(float x, float *space) {
    return ROW == 32 ? warp_sum(x) : block_sum(x, space);
}

/* Packs of a row that a thread holds where rows are few, and the most where they are many; of
 * longer ones what is added and written is read again. */
#define HELD_MANY 3
#define FEW_ROWS  64
#define LONG      768 /* threads of a long row where they are few */
template <typename T, int ROW> __host__ __device__ constexpr int held_of() {
    return ROW == 32 ? 4 : sizeof(T) / sizeof(bf16);
}

/* x rstd weight, which nothing that is added later joins in one rounding: as in pairs, so alone. */
DEVICE_FUNCTION float normed(float x, float rstd, float weight) {
    return __fmul_rn(x * rstd, weight);
}

/* y = scale (residual + x), rounded where tensors would be. A scale of 1 changes nothing. */
template <typename T, int V>
DEVICE_FUNCTION void add_scaled(Kept<T, V> &y, float (&x)[V], const Kept<T, V> &residual,
                                float scale) {
    round_all<T>(x);
#pragma unroll
    for (int j = 0; j < V; j++) x[j] += residual[j];
    round_all<T>(x);
#pragma unroll
    for (int j = 0; j < V; j++) x[j] *= scale;
    y.keep(x);
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

/* Runs the statements with ROW the threads of a row, where rows are many or nobody waits for few.
 */
#define WITH_MANY(D, ROW, ...)                                                                     \
    do {                                                                                           \
        if ((D) <= WARP_COLS) {                                                                    \
            constexpr int ROW = 32;                                                                \
            __VA_ARGS__;                                                                           \
        } else {                                                                                   \
            constexpr int ROW = MANY;                                                              \
            __VA_ARGS__;                                                                           \
        }                                                                                          \
    } while (0)

/* The same of N rows. */
#define WITH_ROW(N, D, ROW, ...)                                                                   \
    do {                                                                                           \
        if ((D) <= WARP_COLS || (N) > FEW_ROWS) {                                                  \
            WITH_MANY(D, ROW, __VA_ARGS__);                                                        \
        } else if ((D) <= 8 * THREADS) {                                                           \
            constexpr int ROW = THREADS;                                                           \
            __VA_ARGS__;                                                                           \
        } else {                                                                                   \
            constexpr int ROW = LONG;                                                              \
            __VA_ARGS__;                                                                           \
        }                                                                                          \
    } while (0)

static void launch_forward(Tensor y, Tensor rstd, Tensor x, Tensor weight, Tensor residual,
                           float scale, float eps, bool given) {
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
    launch_forward(y, rstd, x, weight, residual, 1.0f, eps, false);
}

extern "C" void cuda_rmsnorm_apply(Tensor y, Tensor rstd, Tensor x, Tensor weight) {
    launch_forward(y, rstd, x, weight, tensor_absent(), 1.0f, 0, true);
}

/* ---- a norm onto a residual and the next one ---- */

/* Packs of a row that a thread holds from one norm to the next. */
template <typename T, int ROW> __host__ __device__ constexpr int linked_packs() {
    return ROW == MANY ? HELD_MANY : held_of<T, ROW>();
}

/* Blocks of one multiprocessor, for what registers they may have. */
template <typename W, int ROW> __host__ __device__ constexpr int linked_blocks() {
    return ROW != MANY ? 1 : sizeof(W) > sizeof(bf16) ? 2 : 3;
}

/* The norm that comes next: y NULL, none. */
template <typename T, typename W> struct Next {
    T *y;
    float *rstd; /* NULL: not kept */
    const W *weight;
    Codes codes;
};

template <typename T, typename W> static Next<T, W> next_of(const NextNorm &next) {
    Codes codes = {};
    if (next.codes.data) codes = codes_in(next.codes.data, tensor_count(next.y));
    return Next<T, W>{data_of<T>(next.y), data_of<float>(next.rstd), data_of<W>(next.weight),
                      codes};
}

/* A row's next norm, of its values as they are held and the sum of their squares. */
template <int ROW, typename T, typename W, int V, int HELD>
DEVICE_FUNCTION void write_next(const Next<T, W> &next, const Kept<T, V> (&row)[HELD],
                                const Kept<W, V> (&weights)[HELD], float squares, float *space,
                                int64_t n, bool here, int64_t D, float eps) {
    int lane = threadIdx.x % ROW;
    float r = root_of_mean(row_sum<ROW>(squares, space), D, eps);
    if (next.rstd && here && !lane) next.rstd[n] = r;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int64_t d = (lane + i * ROW) * V;
        bool inside = here && d < D;
        if (!next.codes.scales && !inside) break;
        float out[V];
#pragma unroll
        for (int j = 0; j < V; j++) out[j] = normed(row[i][j], r, weights[i][j]);
        Kept<T, V> pack;
        pack.keep(out);
        if (inside) pack.write(next.y + n * D + d);
        if (!next.codes.scales) continue;
#pragma unroll
        for (int j = 0; j < V; j++) out[j] = pack[j];
        store_codes(next.codes, n * D + d, out, inside);
    }
}

template <typename T, typename W, int V, int ROW>
static __global__ void __launch_bounds__(threads_of<ROW>(), (linked_blocks<W, ROW>()))
    pair(T *y, float *rstd, const T *x, const W *weight, const T *residual, float scale,
         Next<T, W> next, int64_t N, int64_t D, float eps) {
    constexpr int HELD = linked_packs<T, ROW>();
    __shared__ float space[2][32];
    int64_t n = row_of<ROW>();
    bool here = n < N;
    int lane = threadIdx.x % ROW;
    Kept<W, V> factors[HELD] = {}, others[HELD] = {};
    if (rstd) wait_for_last(); /* weights may be trained; else they come while it ends */
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int64_t d = (lane + i * ROW) * V;
        if (!here || d >= D) break;
        factors[i].read(weight + d);
        others[i].read(next.weight + d);
    }
    if (!rstd) wait_for_last();
    Kept<T, V> held[HELD] = {}, more[HELD] = {};
    float sum = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int64_t d = (lane + i * ROW) * V;
        if (!here || d >= D) break;
        held[i].read(x + n * D + d);
        more[i].read(residual + n * D + d);
    }
#pragma unroll
    for (int i = 0; i < HELD; i++)
#pragma unroll
        for (int j = 0; j < V; j++) sum += held[i][j] * held[i][j];
    float r = root_of_mean(row_sum<ROW>(sum, space[0]), D, eps);
    if (rstd && here && !lane) rstd[n] = r;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int64_t d = (lane + i * ROW) * V;
        if (!here || d >= D) break;
        float out[V];
#pragma unroll
        for (int j = 0; j < V; j++) out[j] = normed(held[i][j], r, factors[i][j]);
        add_scaled(held[i], out, more[i], scale);
        held[i].write(y + n * D + d);
#pragma unroll
        for (int j = 0; j < V; j++) squares += held[i][j] * held[i][j];
    }
    write_next<ROW>(next, held, others, squares, space[1], n, here, D, eps);
}

/* Whether rows of y go from one norm to the next in registers. */
static bool links(Tensor y, const NextNorm &next, Tensor weight) {
    int64_t D = tensor_cols(y), each = (int64_t)(16 / dtype_size(y.dtype)), longest = 0;
    WITH_FLOAT(y.dtype, T, WITH_ROW(tensor_rows(y), D, ROW, {
                   longest = linked_packs<T, ROW>() * ROW * each;
               }));
    return D % each == 0 && D <= longest && fits_packs(D, y, weight, next.y, next.weight) &&
           (!next.y.data || next.weight.dtype == weight.dtype);
}

/* The next norm by itself. */
static void launch_next(const NextNorm &next, Tensor y, float eps) {
    if (!next.y.data) return;
    cuda_rmsnorm_forward(next.y, next.rstd, y, next.weight, tensor_absent(), eps);
    if (next.codes.data)
        round_activations(y.device, codes_in(next.codes.data, tensor_count(y)), next.y);
}

extern "C" void cuda_rmsnorm_pair(Tensor y, Tensor rstd, Tensor x, Tensor weight, Tensor residual,
                                  float scale, const NextNorm *next, float eps) {
    int64_t D = tensor_cols(x), N = tensor_rows(x);
    if (!N) return;
    if (!next->y.data || !links(y, *next, weight) || !fits_packs(D, x, residual)) {
        launch_forward(y, rstd, x, weight, residual, scale, eps, false);
        launch_next(*next, y, eps);
        return;
    }
    WITH_FLOAT(x.dtype, T,
               WITH_FLOAT(weight.dtype, W, WITH_ROW(N, D, ROW, {
                              constexpr int V = (int)(16 / sizeof(T));
                              LAUNCH_NEXT(x.device, (pair<T, W, V, ROW>),
                                          (unsigned)ceil_div(N, threads_of<ROW>() / ROW),
                                          threads_of<ROW>(), data_of<T>(y), data_of<float>(rstd),
                                          data_of<T>(x), data_of<W>(weight), data_of<T>(residual),
                                          scale, (next_of<T, W>(*next)), N, D, eps);
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
            launch_forward(y[i], rstd, x, apart ? tensor_absent() : weight[i].weight,
                           tensor_absent(), 1.0f, eps, false);
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

/* ---- where two branches join ---- */

template <typename T, typename W> struct Joined {
    const T *x[2];
    const W *weight[3];
    float *rstd; /* (3, N); NULL: not kept */
};

template <typename T, typename W> static Joined<T, W> joined_of(const NormJoin &j) {
    return Joined<T, W>{{data_of<T>(j.x[0]), data_of<T>(j.x[1])},
                        {data_of<W>(j.weight[0]), data_of<W>(j.weight[1]), data_of<W>(j.weight[2])},
                        data_of<float>(j.rstd)};
}

/* Two sums over a row, each as row_sum has it. */
template <int ROW> DEVICE_FUNCTION float2 row_sums(float x, float y, float2 *space) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float2 sums = {warp_sum(x), warp_sum(y)};
    if (ROW == 32) return sums;
    __syncthreads();
    if (!lane) space[warp] = sums;
    __syncthreads();
    sums = lane < ROW / 32 ? space[lane] : float2{0, 0};
    return float2{warp_sum(sums.x), warp_sum(sums.y)};
}

/* What the branches make together: sum = norm(b) + norm(a), each rounded before. */
template <typename T, typename W, int V>
DEVICE_FUNCTION void join_pack(Kept<T, V> &sum, const Kept<T, V> &a, const Kept<T, V> &b,
                               const float2 &r, const Kept<W, V> &weight_a,
                               const Kept<W, V> &weight_b) {
    float x[V], y[V];
#pragma unroll
    for (int j = 0; j < V; j++) {
        x[j] = normed(a[j], r.x, weight_a[j]);
        y[j] = normed(b[j], r.y, weight_b[j]);
    }
    round_all<T>(x);
    round_all<T>(y);
#pragma unroll
    for (int j = 0; j < V; j++) y[j] += x[j];
    sum.keep(y);
}

template <typename T, typename W, int V, int ROW>
static __global__ void __launch_bounds__(threads_of<ROW>(), (linked_blocks<W, ROW>()))
    join(Joined<T, W> of, T *y, const T *residual, float scale, Next<T, W> next, int64_t N,
         int64_t D, float eps) {
    constexpr int HELD = linked_packs<T, ROW>();
    __shared__ float2 pairs[32];
    __shared__ float space[2][32];
    int64_t n = row_of<ROW>();
    bool here = n < N;
    int lane = threadIdx.x % ROW;
    auto place = [&](int i) { return (lane + i * ROW) * (int64_t)V; };
    Kept<W, V> weights[3][HELD] = {}, others[HELD] = {};
    if (of.rstd) wait_for_last(); /* weights may be trained; else they come while it ends */
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        if (!here || place(i) >= D) break;
#pragma unroll
        for (int k = 0; k < 3; k++) weights[k][i].read(of.weight[k] + place(i));
        if (next.y) others[i].read(next.weight + place(i));
    }
    if (!of.rstd) wait_for_last();
    Kept<T, V> a[HELD] = {}, b[HELD] = {}, more[HELD] = {};
    float sum = 0, other_sum = 0;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        if (!here || place(i) >= D) break;
        a[i].read(of.x[0] + n * D + place(i));
        b[i].read(of.x[1] + n * D + place(i));
        more[i].read(residual + n * D + place(i));
    }
#pragma unroll
    for (int i = 0; i < HELD; i++)
#pragma unroll
        for (int j = 0; j < V; j++) sum += a[i][j] * a[i][j], other_sum += b[i][j] * b[i][j];
    float2 r = row_sums<ROW>(sum, other_sum, pairs);
    r = float2{root_of_mean(r.x, D, eps), root_of_mean(r.y, D, eps)};
    sum = 0;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        join_pack(a[i], a[i], b[i], r, weights[0][i], weights[1][i]);
#pragma unroll
        for (int j = 0; j < V; j++) sum += a[i][j] * a[i][j];
    }
    float last = root_of_mean(row_sum<ROW>(sum, space[0]), D, eps);
    if (of.rstd && here && !lane) {
        of.rstd[n] = r.x;
        of.rstd[N + n] = r.y;
        of.rstd[2 * N + n] = last;
    }
    sum = 0;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        if (!here || place(i) >= D) break;
        float out[V];
#pragma unroll
        for (int j = 0; j < V; j++) out[j] = normed(a[i][j], last, weights[2][i][j]);
        add_scaled(a[i], out, more[i], scale);
        a[i].write(y + n * D + place(i));
#pragma unroll
        for (int j = 0; j < V; j++) sum += a[i][j] * a[i][j];
    }
    if (next.y) write_next<ROW>(next, a, others, sum, space[1], n, here, D, eps);
}

template <typename T, typename W, int V, int ROW>
static __global__ void __launch_bounds__(threads_of<ROW>(), (linked_blocks<W, ROW>()))
    join_backward(Joined<T, W> of, T *da, T *db, T *dresidual, T *fed, T *dfed, const T *dy,
                  float scale, int64_t N, int64_t D) {
    wait_for_last();
    constexpr int HELD = linked_packs<T, ROW>();
    __shared__ float2 pairs[32];
    __shared__ float space[32];
    int64_t n = row_of<ROW>();
    bool here = n < N;
    int lane = threadIdx.x % ROW;
    auto place = [&](int i) { return (lane + i * ROW) * (int64_t)V; };
    Kept<T, V> a[HELD] = {}, b[HELD] = {}, slopes[HELD] = {}, sums[HELD] = {};
    Kept<W, V> weights[3][HELD] = {};
    float2 r = {0, 0};
    float last = 0, product = 0, other = 0;
    if (here) r = float2{of.rstd[n], of.rstd[N + n]}, last = of.rstd[2 * N + n];
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        if (!here || place(i) >= D) break;
        slopes[i].read(dy + n * D + place(i));
        a[i].read(of.x[0] + n * D + place(i));
        b[i].read(of.x[1] + n * D + place(i));
#pragma unroll
        for (int k = 0; k < 3; k++) weights[k][i].read(of.weight[k] + place(i));
    }
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        float slope[V];
#pragma unroll
        for (int j = 0; j < V; j++) slope[j] = scale * slopes[i][j];
        slopes[i].keep(slope);
        join_pack(sums[i], a[i], b[i], r, weights[0][i], weights[1][i]);
#pragma unroll
        for (int j = 0; j < V; j++) product += slopes[i][j] * weights[2][i][j] * sums[i][j];
        if (!here || place(i) >= D) continue;
        slopes[i].write(dresidual + n * D + place(i));
        if (fed) sums[i].write(fed + n * D + place(i));
    }
    float mean = row_sum<ROW>(product, space) / (float)D * last * last;
    product = 0;
#pragma unroll
    for (int i = 0; i < HELD; i++) { /* from here on slopes are those of the sum */
        float out[V];
#pragma unroll
        for (int j = 0; j < V; j++)
            out[j] = last * (slopes[i][j] * weights[2][i][j] - sums[i][j] * mean);
        slopes[i].keep(out);
#pragma unroll
        for (int j = 0; j < V; j++) {
            product += slopes[i][j] * weights[0][i][j] * a[i][j];
            other += slopes[i][j] * weights[1][i][j] * b[i][j];
        }
        if (dfed && here && place(i) < D) slopes[i].write(dfed + n * D + place(i));
    }
    float2 means = row_sums<ROW>(product, other, pairs);
    means = float2{means.x / (float)D * r.x * r.x, means.y / (float)D * r.y * r.y};
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        float one[V], two[V];
        if (!here || place(i) >= D) break;
#pragma unroll
        for (int j = 0; j < V; j++) {
            one[j] = r.x * (slopes[i][j] * weights[0][i][j] - a[i][j] * means.x);
            two[j] = r.y * (slopes[i][j] * weights[1][i][j] - b[i][j] * means.y);
        }
        store(da + n * D + place(i), one);
        store(db + n * D + place(i), two);
    }
}

extern "C" void cuda_rmsnorm_join(Tensor y, const NormJoin *j, Tensor residual, float scale,
                                  const NextNorm *next, float eps) {
    Tensor x = j->x[0], none = tensor_absent();
    int64_t D = tensor_cols(x), N = tensor_rows(x);
    if (!N) return;
    if (!links(y, *next, j->weight[0]) ||
        !fits_packs(D, x, j->x[1], residual, j->weight[1], j->weight[2])) {
        Tensor fed = x;
        fed.data = cuda_workspace(x.device, tensor_bytes(x));
        auto kept = [&](int i) { return tensor_slice(j->rstd, i, 1); };
        cuda_rmsnorm_forward(fed, kept(0), x, j->weight[0], none, eps);
        cuda_rmsnorm_forward(fed, kept(1), j->x[1], j->weight[1], fed, eps);
        launch_forward(y, kept(2), fed, j->weight[2], residual, scale, eps, false);
        launch_next(*next, y, eps);
        return;
    }
    WITH_FLOAT(x.dtype, T,
               WITH_FLOAT(j->weight[0].dtype, W, WITH_ROW(N, D, ROW, {
                              constexpr int V = (int)(16 / sizeof(T));
                              LAUNCH_NEXT(x.device, (join<T, W, V, ROW>),
                                          (unsigned)ceil_div(N, threads_of<ROW>() / ROW),
                                          threads_of<ROW>(), (joined_of<T, W>(*j)), data_of<T>(y),
                                          data_of<T>(residual), scale, (next_of<T, W>(*next)), N, D,
                                          eps);
                          })));
}

extern "C" void cuda_rmsnorm_join_backward(const Tensor *dx, Tensor dresidual, Tensor fed,
                                           Tensor dfed, Tensor dy, const NormJoin *j, float scale) {
    Tensor x = j->x[0], none = tensor_absent();
    int64_t D = tensor_cols(x), N = tensor_rows(x);
    if (!N) return;
    int64_t each = (int64_t)(16 / dtype_size(x.dtype)), longest = 0;
    WITH_FLOAT(x.dtype, T, WITH_MANY(D, ROW, { longest = linked_packs<T, ROW>() * ROW * each; }));
    if (D % each || D > longest || !fits_packs(D, x, j->x[1], dx[0], dx[1], dresidual, dy) ||
        !fits_packs(D, fed, dfed, j->weight[0], j->weight[1], j->weight[2])) {
        size_t bytes = tensor_bytes(x);
        char *memory = (char *)cuda_workspace(x.device, 2 * bytes);
        auto kept = [&](int i) { return tensor_slice(j->rstd, i, 1); };
        Tensor sum = x, dsum = x;
        sum.data = fed.data ? fed.data : memory;
        dsum.data = dfed.data ? dfed.data : memory + bytes;
        cuda_scale_copy(dresidual, SET, dy, scale);
        launch_forward(sum, kept(0), x, j->weight[0], none, 1.0f, 0, true);
        launch_forward(sum, kept(1), j->x[1], j->weight[1], sum, 1.0f, 0, true);
        cuda_rmsnorm_backward(dsum, SET, none, dresidual, sum, kept(2), j->weight[2]);
        for (int i = 0; i < 2; i++)
            cuda_rmsnorm_backward(dx[i], SET, none, dsum, j->x[i], kept(i), j->weight[i]);
        return;
    }
    WITH_FLOAT(x.dtype, T,
               WITH_FLOAT(j->weight[0].dtype, W, WITH_MANY(D, ROW, {
                              constexpr int V = (int)(16 / sizeof(T));
                              LAUNCH_NEXT(x.device, (join_backward<T, W, V, ROW>),
                                          (unsigned)ceil_div(N, threads_of<ROW>() / ROW),
                                          threads_of<ROW>(), (joined_of<T, W>(*j)),
                                          data_of<T>(dx[0]), data_of<T>(dx[1]),
                                          data_of<T>(dresidual), data_of<T>(fed), data_of<T>(dfed),
                                          data_of<T>(dy), scale, N, D);
                          })));
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
