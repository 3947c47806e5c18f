/* sampling.cu - rows are cut in runs, a block each; the best of the runs are ranked by one more. */
#include "kernels/cuda/cuda.h"

extern "C" {
#include "kernels/sampling.h"
}

#define RUN     8192 /* logits of a run, and candidates that are ranked at once */
#define THREADS 512

/* Ascending in value, and among equals descending in id: the largest key is the best token. */
DEVICE_FUNCTION uint64_t key_of(float z, int32_t id) {
    unsigned u = __float_as_uint(z);
    u = u & 0x80000000u ? ~u : u | 0x80000000u;
    return (uint64_t)u << 32 | (0xffffffffu - (unsigned)id);
}
DEVICE_FUNCTION float value_of(uint64_t key) {
    unsigned u = (unsigned)(key >> 32);
    return __uint_as_float(u & 0x80000000u ? u & 0x7fffffffu : ~u);
}
DEVICE_FUNCTION int32_t id_of(uint64_t key) {
    return (int32_t)(0xffffffffu - (unsigned)key);
}

/* Sorts `size` keys, a power of two, the largest first (Batcher's bitonic network). */
DEVICE_FUNCTION void sort_keys(uint64_t *keys, int size) {
    for (int width = 2; width <= size; width *= 2)
        for (int step = width / 2; step; step /= 2) {
            __syncthreads();
            for (int i = threadIdx.x; i < size / 2; i += THREADS) {
                int a = 2 * i - (i & (step - 1)), b = a + step;
                bool down = (a & width) == 0;
                uint64_t x = keys[a], y = keys[b];
                if (down ? x < y : x > y) keys[a] = y, keys[b] = x;
            }
        }
    __syncthreads();
}

/* The best k keys to the front. */
DEVICE_FUNCTION void best_first(uint64_t *keys, int count, int size, int k) {
    __shared__ uint64_t tops[THREADS / 32];
    if (k > 1) {
        sort_keys(keys, size);
        return;
    }
    uint64_t best = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += THREADS) best = keys[i] > best ? keys[i] : best;
    for (int d = 16; d; d >>= 1) {
        uint64_t other = __shfl_xor_sync(0xffffffffu, best, d);
        best = other > best ? other : best;
    }
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = best;
    __syncthreads();
    if (!threadIdx.x) {
        for (int w = 1; w < THREADS / 32; w++) best = tops[w] > best ? tops[w] : best;
        keys[0] = best;
    }
    __syncthreads();
}

/* One run of one row: its best k (fewer where it has fewer; key 0 behind them) and its sums of
 * exp(z - top) and exp((z - top) scale). */
static __global__ void __launch_bounds__(THREADS)
    run_best(uint64_t *best, float *sums, const float *logits, const float *scale, int64_t V, int k,
             int size) {
    DYNAMIC_SHARED(memory);
    __shared__ float space[32];
    uint64_t *keys = (uint64_t *)memory;
    int64_t first = (int64_t)blockIdx.x * RUN, place = (int64_t)blockIdx.y * gridDim.x + blockIdx.x;
    int count = (int)(V - first < RUN ? V - first : RUN);
    const float *z = logits + blockIdx.y * V + first;
    float top = -INFINITY, plain = 0, scaled = 0, s = scale[blockIdx.y];
    for (int i = threadIdx.x; i < count; i += THREADS) top = fmaxf(top, z[i]);
    top = block_max(top, space);
    for (int i = threadIdx.x; i < size; i += THREADS) {
        keys[i] = i < count ? key_of(z[i], (int32_t)(first + i)) : 0;
        if (i >= count || top == -INFINITY) continue;
        plain += expf(z[i] - top);
        scaled += expf((z[i] - top) * s);
    }
    plain = block_sum(plain, space);
    scaled = block_sum(scaled, space);
    best_first(keys, count, size, k);
    for (int i = threadIdx.x; i < k; i += THREADS) best[place * k + i] = i < size ? keys[i] : 0;
    if (threadIdx.x) return;
    sums[3 * place] = top;
    sums[3 * place + 1] = plain;
    sums[3 * place + 2] = scaled;
}

/* The runs' best, RUN candidates at a time, ranked among each other: from `from` groups of k keys
 * to ceil(from / fold). */
static __global__ void __launch_bounds__(THREADS)
    join_best(uint64_t *to, const uint64_t *from, int groups, int fold, int k, int size) {
    DYNAMIC_SHARED(memory);
    uint64_t *keys = (uint64_t *)memory;
    int first = blockIdx.x * fold, here = groups - first < fold ? groups - first : fold;
    const uint64_t *mine = from + ((int64_t)blockIdx.y * groups + first) * k;
    for (int i = threadIdx.x; i < size; i += THREADS) keys[i] = i < here * k ? mine[i] : 0;
    best_first(keys, here * k, size, k);
    uint64_t *out = to + ((int64_t)blockIdx.y * gridDim.x + blockIdx.x) * k;
    for (int i = threadIdx.x; i < k; i += THREADS) out[i] = keys[i];
}

static __global__ void write_best(float *values, int32_t *ids, float *lse, const uint64_t *best,
                                  const float *sums, const float *scale, int runs, int k) {
    int64_t n = blockIdx.x;
    for (int i = threadIdx.x; i < k; i += blockDim.x) {
        values[n * k + i] = value_of(best[n * k + i]);
        ids[n * k + i] = id_of(best[n * k + i]);
    }
    if (threadIdx.x) return;
    const float *part = sums + 3 * n * runs;
    float top = -INFINITY, s = scale[n];
    double plain = 0, scaled = 0;
    for (int r = 0; r < runs; r++) top = fmaxf(top, part[3 * r]);
    for (int r = 0; r < runs; r++) {
        if (part[3 * r] == -INFINITY) continue;
        plain += part[3 * r + 1] * exp((double)(part[3 * r] - top));
        scaled += part[3 * r + 2] * exp((double)(part[3 * r] - top) * s);
    }
    lse[2 * n] = top + (float)log(plain);
    lse[2 * n + 1] = top * s + (float)log(scaled);
}

static int power_of_two(int64_t n) {
    int size = 2;
    while (size < n) size *= 2;
    return size;
}

extern "C" void cuda_top_logits(Tensor values, Tensor ids, Tensor lse, Tensor logits,
                                Tensor scale) {
    int64_t N = tensor_rows(logits), V = tensor_cols(logits);
    int k = (int)tensor_cols(values), runs = (int)ceil_div(V, RUN), fold = RUN / k;
    if (!N) return;
    CHECK(k <= RUN / 2, "the best %d of a row on the GPU", k);
    size_t keys = (size_t)N * runs * k;
    uint64_t *best = (uint64_t *)cuda_workspace(
        logits.device, 2 * keys * sizeof(uint64_t) + 3 * (size_t)N * runs * sizeof(float));
    uint64_t *other = best + keys;
    float *sums = (float *)(other + keys);
    int size = power_of_two(V < RUN ? V : RUN);
    LAUNCH(logits.device, (run_best), dim3((unsigned)runs, (unsigned)N), THREADS,
           (size_t)size * sizeof(uint64_t), best, sums, data_of<float>(logits),
           data_of<float>(scale), V, k, size);
    for (int groups = runs; groups > 1;) {
        int left = (groups + fold - 1) / fold;
        size = power_of_two((int64_t)(groups < fold ? groups : fold) * k);
        LAUNCH(logits.device, (join_best), dim3((unsigned)left, (unsigned)N), THREADS,
               (size_t)size * sizeof(uint64_t), other, best, groups, fold, k, size);
        uint64_t *held = best;
        best = other;
        other = held;
        groups = left;
    }
    LAUNCH(logits.device, (write_best), (unsigned)N, 64, 0, data_of<float>(values),
           data_of<int32_t>(ids), data_of<float>(lse), best, sums, data_of<float>(scale), runs, k);
}

static __global__ void pick(float *y, const float *x, const int32_t *columns, int64_t N,
                            int64_t V) {
    FOR_GRID(n, N) y[n] = columns[n] < 0 ? 0.0f : x[n * V + columns[n]];
}

extern "C" void cuda_pick_columns(Tensor y, Tensor x, Tensor columns) {
    int64_t N = tensor_rows(x);
    if (!N) return;
    LAUNCH(x.device, (pick), grid_for(x.device, N, 128), 128, 0, data_of<float>(y),
           data_of<float>(x), data_of<int32_t>(columns), N, tensor_cols(x));
}
