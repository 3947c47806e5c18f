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
    if (!(x > levels[0])) return 0;
    if (x >= levels[255]) return 255;
    int low = 0;
#pragma unroll
    for (int step = 128; step; step /= 2)
        if (levels[low + step] <= x) low += step;
    return (uint8_t)(levels[low + 1] - x < x - levels[low] ? low + 1 : low);
}

/* ---- states: a warp has a block of 256, 8 neighbours to a lane ---- */

struct States {
    void *data;          /* f32, or BlockDynamic8; NULL: there are none */
    const float *levels; /* NULL: f32 */
};

static States states_of(Tensor t) {
    bool packed = t.data && t.dtype != F32;
    return States{t.data, packed ? cuda_dynamic_levels(t.device, t.dtype == DYNAMIC8) : NULL};
}

DEVICE_FUNCTION void load_states(float (&x)[8], States s, int64_t block, int64_t count) {
    int lane = threadIdx.x % 32;
    if (!s.levels) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int64_t k = block * DYNAMIC_BLOCK + lane * 8 + i;
            x[i] = k < count ? ((const float *)s.data)[k] : 0.0f;
        }
        return;
    }
    const BlockDynamic8 *b = (const BlockDynamic8 *)s.data + block;
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = b->absmax * s.levels[b->codes[lane * 8 + i]];
}

/* Elements beyond `count` are zero. A second moment above zero stays above it. */
DEVICE_FUNCTION void store_states(States s, int64_t block, int64_t count, const float (&x)[8],
                                  bool second) {
    int lane = threadIdx.x % 32;
    if (!s.levels) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int64_t k = block * DYNAMIC_BLOCK + lane * 8 + i;
            if (k < count) ((float *)s.data)[k] = x[i];
        }
        return;
    }
    BlockDynamic8 *b = (BlockDynamic8 *)s.data + block;
    float most = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) most = fmaxf(most, fabsf(x[i]));
    most = warp_max(most);
    float inverse = most > 0 ? 1.0f / most : 0.0f;
    if (!lane) b->absmax = most;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (block * DYNAMIC_BLOCK + lane * 8 + i >= count) continue;
        uint8_t code = code_of(s.levels, x[i] * inverse);
        b->codes[lane * 8 + i] = second && x[i] > 0 && !code ? 1 : code;
    }
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
    FOR_BLOCKS(block, count) {
        float first[8], second[8];
        load_states(first, m, block, count);
        load_states(second, v, block, count);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int64_t k = block * DYNAMIC_BLOCK + threadIdx.x % 32 * 8 + i;
            if (k >= count) continue;
            float g = grad[k] * a.scale;
            first[i] += (1.0f - a.beta1) * (g - first[i]);
            second[i] = a.beta2 * second[i] + (1.0f - a.beta2) * g * g;
            float step = a.step * first[i] / (sqrtf(second[i]) * a.root + a.eps);
            put(&value[k], to_float(value[k]) * a.shrink - step, key, k);
        }
        store_states(m, block, count, first, false);
        store_states(v, block, count, second, true);
    }
}

template <typename T>
static __global__ void sgd(T *value, const float *grad, States buffer, int64_t count, float scale,
                           float lr, float momentum, float decay, bool first, uint64_t key) {
    FOR_BLOCKS(block, count) {
        float velocity[8] = {0};
        if (buffer.data) load_states(velocity, buffer, block, count);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int64_t k = block * DYNAMIC_BLOCK + threadIdx.x % 32 * 8 + i;
            if (k >= count) continue;
            float g = grad[k] * scale + decay * to_float(value[k]);
            if (buffer.data) velocity[i] = g = first ? g : momentum * velocity[i] + g;
            put(&value[k], to_float(value[k]) - lr * g, key, k);
        }
        if (buffer.data) store_states(buffer, block, count, velocity, false);
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
