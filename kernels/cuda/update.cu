/* update.cu - optimizer updates, and the levels that 8-bit states are stored in. */
#include "kernels/cuda/packed.h"

extern "C" {
#include "kernels/dynamic.h"
#include "kernels/update.h"
}

#include <stdlib.h>

/* ---- levels ---- */

const float *cuda_dynamic_levels(const Device *device, bool is_signed) {
    static float *levels[CUDA_DEVICES][2];
    float **mine = &levels[device->index][is_signed];
    if (*mine) return *mine;
    *mine = (float *)device_allocate((Device *)device, 256 * sizeof(float));
    if (!*mine) give_up("the GPU is out of memory for a table of levels");
    device_copy((Device *)device, *mine, device_cpu(), dynamic_levels(is_signed),
                256 * sizeof(float));
    return *mine;
}

/* The nearest level, ties to the lower one, as dynamic_code finds it. */
DEVICE_FUNCTION uint8_t code_of(const float *levels, float x) {
    int low = 0; /* the last level that is not above x, or the first; no branches: many at once */
#pragma unroll
    for (int step = 128; step; step /= 2) low += levels[low + step] <= x ? step : 0;
    float next = levels[low < 255 ? low + 1 : 255];
    return (uint8_t)(low + (low < 255 && next - x < x - levels[low]));
}

/* ---- a warp has a block of 256, 8 neighbours to a lane ---- */

/* Whether eight elements from p on can be read and written four at a time. */
template <typename T> DEVICE_FUNCTION bool in_packs(const T *p, int64_t first, int64_t count) {
    return first + 8 <= count && (uintptr_t)(p + first) % (4 * sizeof(T)) == 0;
}

/* Elements first .. first + 7, zeros from `count` on: all reads are under way at once. */
template <typename T>
DEVICE_FUNCTION void load_eight(float (&x)[8], const T *p, int64_t first, int64_t count) {
    if (in_packs(p, first, count)) {
        float low[4], high[4];
        load(low, p + first);
        load(high, p + first + 4);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = i < 4 ? low[i] : high[i - 4];
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = first + i < count ? to_float(p[first + i]) : 0.0f;
}

/* The states' levels in shared memory, where each lane looks for another. */
typedef float Levels[256];
DEVICE_FUNCTION void read_levels(Levels &to, const float *levels) {
    for (int i = threadIdx.x; levels && i < 256; i += blockDim.x) to[i] = levels[i];
}

/* ---- states ---- */

struct States {
    void *data;          /* f32, or BlockDynamic8; NULL: there are none */
    const float *levels; /* NULL: f32 */
};

static States states_of(Tensor t) {
    bool packed = t.data && t.dtype != F32;
    return States{t.data, packed ? cuda_dynamic_levels(t.device, t.dtype == DYNAMIC8) : NULL};
}

DEVICE_FUNCTION void load_states(float (&x)[8], States s, const Levels &levels, int64_t block,
                                 int64_t count) {
    int lane = threadIdx.x % 32;
    if (!s.levels) {
        load_eight(x, (const float *)s.data, block * DYNAMIC_BLOCK + lane * 8, count);
        return;
    }
    const BlockDynamic8 *b = (const BlockDynamic8 *)s.data + block;
    uint8_t codes[8];
    float most = b->absmax;
#pragma unroll
    for (int i = 0; i < 8; i++) codes[i] = b->codes[lane * 8 + i];
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = most * levels[codes[i]];
}

/* Elements beyond `count` are zero. A second moment above zero stays above it. */
DEVICE_FUNCTION void store_states(States s, const Levels &levels, int64_t block, int64_t count,
                                  const float (&x)[8], bool second) {
    int lane = threadIdx.x % 32;
    int64_t first = block * DYNAMIC_BLOCK + lane * 8;
    if (!s.levels) {
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (first + i < count) ((float *)s.data)[first + i] = x[i];
        return;
    }
    BlockDynamic8 *b = (BlockDynamic8 *)s.data + block;
    float most = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) most = fmaxf(most, fabsf(x[i]));
    most = warp_max(most);
    float inverse = most > 0 ? 1.0f / most : 0.0f;
    __syncwarp(); /* all lanes have read the old one */
    if (!lane) b->absmax = most;
    uint8_t codes[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        codes[i] = code_of(levels, x[i] * inverse);
        if (second && x[i] > 0 && !codes[i]) codes[i] = 1;
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (first + i < count) b->codes[lane * 8 + i] = codes[i];
}

struct Adam {
    float scale, shrink, beta1, beta2, step, root, eps;
};

/* Blocks of this warp, in a grid of any width; all lanes go on together. */
#define FOR_BLOCKS(block, count)                                                                   \
    for (int64_t block = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;                    \
         block * DYNAMIC_BLOCK < (count); block += (int64_t)gridDim.x * blockDim.x / 32)

/* A new value: rounded by chance where it has 16 bits. */
DEVICE_FUNCTION void put(float *p, float x, uint64_t, int64_t) {
    *p = x;
}
DEVICE_FUNCTION void put(bf16 *p, float x, uint64_t key, int64_t i) {
    p->bits = random_bf16(x, key, (uint64_t)i);
}

template <typename T>
static __global__ void adamw(T *value, const float *grad, States m, States v, int64_t count, Adam a,
                             uint64_t key) {
    __shared__ Levels m_levels, v_levels;
    read_levels(m_levels, m.levels);
    read_levels(v_levels, v.levels);
    __syncthreads();
    FOR_BLOCKS(block, count) {
        int64_t at = block * DYNAMIC_BLOCK + threadIdx.x % 32 * 8;
        float first[8], second[8], g[8], x[8];
        load_eight(g, grad, at, count);
        load_eight(x, value, at, count);
        load_states(first, m, m_levels, block, count);
        load_states(second, v, v_levels, block, count);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            g[i] *= a.scale;
            first[i] += (1.0f - a.beta1) * (g[i] - first[i]);
            second[i] = a.beta2 * second[i] + (1.0f - a.beta2) * g[i] * g[i];
            float step = a.step * first[i] / (sqrtf(second[i]) * a.root + a.eps);
            if (at + i < count) put(&value[at + i], x[i] * a.shrink - step, key, at + i);
        }
        store_states(m, m_levels, block, count, first, false);
        store_states(v, v_levels, block, count, second, true);
    }
}

template <typename T>
static __global__ void sgd(T *value, const float *grad, States buffer, int64_t count, float scale,
                           float lr, float momentum, float decay, bool first, uint64_t key) {
    __shared__ Levels levels;
    read_levels(levels, buffer.levels);
    __syncthreads();
    FOR_BLOCKS(block, count) {
        int64_t at = block * DYNAMIC_BLOCK + threadIdx.x % 32 * 8;
        float velocity[8] = {0}, g[8], x[8];
        load_eight(g, grad, at, count);
        load_eight(x, value, at, count);
        if (buffer.data) load_states(velocity, buffer, levels, block, count);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            g[i] = g[i] * scale + decay * x[i];
            if (buffer.data) velocity[i] = g[i] = first ? g[i] : momentum * velocity[i] + g[i];
            if (at + i < count) put(&value[at + i], x[i] - lr * g[i], key, at + i);
        }
        if (buffer.data) store_states(buffer, levels, block, count, velocity, false);
    }
}

extern "C" void cuda_adamw_update(Tensor value, Tensor grad, Tensor m, Tensor v, float scale,
                                  float lr, float beta1, float beta2, float eps, float decay,
                                  int64_t t, uint64_t key) {
    int64_t count = tensor_count(value);
    if (!count) return;
    Adam a = {scale, 1.0f - lr * decay, beta1, beta2, 0, 0, eps};
    a.step = (float)(lr / (1.0 - pow((double)beta1, (double)t)));
    a.root = (float)(1.0 / sqrt(1.0 - pow((double)beta2, (double)t)));
    WITH_FLOAT(value.dtype, T, {
        LAUNCH(value.device, (adamw<T>), grid_for(value.device, count / 8 + 32, 256), 256, 0,
               data_of<T>(value), data_of<float>(grad), states_of(m), states_of(v), count, a, key);
    });
}

extern "C" void cuda_sgd_update(Tensor value, Tensor grad, Tensor buffer, float scale, float lr,
                                float momentum, float decay, int64_t t, uint64_t key) {
    int64_t count = tensor_count(value);
    if (!count) return;
    if (momentum == 0) buffer = tensor_absent();
    WITH_FLOAT(value.dtype, T, {
        LAUNCH(value.device, (sgd<T>), grid_for(value.device, count / 8 + 32, 256), 256, 0,
               data_of<T>(value), data_of<float>(grad), states_of(buffer), count, scale, lr,
               momentum, decay, t == 1, key);
    });
}

/* ---- the norm ---- */

#define SUM_BLOCK 65536

static __global__ void squares(double *partial, const float *x, int64_t count) {
    __shared__ double sums[256];
    int64_t first = (int64_t)blockIdx.x * SUM_BLOCK;
    double sum = 0;
    for (int64_t i = first + threadIdx.x; i < first + SUM_BLOCK && i < count; i += blockDim.x)
        sum += (double)x[i] * x[i];
    sums[threadIdx.x] = sum;
    for (int half = 128; half; half /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (!threadIdx.x) partial[blockIdx.x] = sums[0];
}

extern "C" void cuda_sum_of_squares(double *sum, Tensor x) {
    int64_t count = tensor_count(x), blocks = ceil_div(count, SUM_BLOCK);
    *sum = 0;
    if (!count) return;
    double *partial = (double *)cuda_workspace(x.device, (size_t)blocks * sizeof(double));
    LAUNCH(x.device, (squares), (unsigned)blocks, 256, 0, partial, data_of<float>(x), count);
    double *host = (double *)must_malloc((size_t)blocks * sizeof(double));
    device_copy(device_cpu(), host, x.device, partial, (size_t)blocks * sizeof(double));
    for (int64_t b = 0; b < blocks; b++) *sum += host[b];
    free(host);
}
