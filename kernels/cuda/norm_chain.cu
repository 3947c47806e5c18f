/* norm_chain.cu - one norm to the next in registers: onto a residual, and where branches join. */
#include "kernels/cuda/codes.h"
#include "kernels/cuda/rows.h"

extern "C" {
#include "kernels/elementwise.h"
#include "kernels/norm.h"
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
        norm_rows(y, rstd, x, weight, residual, scale, eps, false);
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
        norm_rows(y, kept(2), fed, j->weight[2], residual, scale, eps, false);
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
        norm_rows(sum, kept(0), x, j->weight[0], none, 1.0f, 0, true);
        norm_rows(sum, kept(1), j->x[1], j->weight[1], sum, 1.0f, 0, true);
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
