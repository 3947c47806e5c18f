/* local_attention.cu - attention over the last few rows: a warp a row and head. */
#include "kernels/cuda/columns.h"

extern "C" {
#include "kernels/elementwise.h"
#include "kernels/local_attention.h"
}

#define WARPS 4

typedef struct Sizes {
    int64_t T, H, C, W;
} Sizes;

/* The lanes' sum of a . b. */
DEVICE_FUNCTION float warp_dot(const float *a, const float *b, int64_t n) {
    float sum = 0;
    for (int64_t i = threadIdx.x & 31; i < n; i += 32) sum += a[i] * b[i];
    return warp_sum(sum);
}

/* Lane r has key r of its row. */
static __global__ void __launch_bounds__(32 * WARPS)
    attend(float *y, float *probs, float *slopes, const float *q, const float *k, const float *v,
           const float *relative, float cap, Sizes z) {
    int64_t item = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32, t = item / z.H, h = item % z.H;
    int lane = threadIdx.x & 31;
    if (item >= z.T * z.H) return; /* whole warps */
    int64_t n = t + 1 < z.W ? t + 1 : z.W;
    const float *mine = q + item * z.C;
    float score = -INFINITY;
    for (int64_t r = 0; r < n; r++) {
        float a = warp_dot(mine, k + ((t - r) * z.H + h) * z.C, z.C) +
                  warp_dot(mine, relative + (r * z.H + h) * z.C, z.C);
        if (lane != r) continue;
        float turn = tanhf(a / cap);
        slopes[item * z.W + r] = 1.0f - turn * turn;
        score = cap * turn;
    }
    float most = warp_max(score), e = lane < n ? expf(score - most) : 0.0f;
    float p = e / warp_sum(e);
    if (lane < z.W) probs[item * z.W + lane] = p;
    __syncwarp();
    for (int64_t c = lane; c < z.C; c += 32) {
        float sum = 0;
        for (int64_t r = 0; r < n; r++)
            sum += probs[item * z.W + r] * v[((t - r) * z.H + h) * z.C + c];
        y[item * z.C + c] = sum;
    }
}

static __global__ void __launch_bounds__(32 * WARPS)
    score_gradients(float *da, const float *dy, const float *probs, const float *slopes,
                    const float *v, Sizes z) {
    int64_t item = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32, t = item / z.H, h = item % z.H;
    int lane = threadIdx.x & 31;
    if (item >= z.T * z.H) return;
    int64_t n = t + 1 < z.W ? t + 1 : z.W;
    float mine = 0;
    for (int64_t r = 0; r < n; r++) {
        float dp = warp_dot(dy + item * z.C, v + ((t - r) * z.H + h) * z.C, z.C);
        if (lane == r) mine = dp;
    }
    float p = lane < n ? probs[item * z.W + lane] : 0;
    float mean = warp_sum(p * mine);
    if (lane < z.W)
        da[item * z.W + lane] = lane < n ? p * (mine - mean) * slopes[item * z.W + lane] : 0;
}

static __global__ void row_gradients(float *dq, float *dk, float *dv, const float *da,
                                     const float *dy, const float *probs, const float *q,
                                     const float *k, const float *relative, Sizes z) {
    FOR_GRID(i, z.T * z.H * z.C) {
        int64_t c = i % z.C, item = i / z.C, t = item / z.H, h = item % z.H;
        float to_q = 0, to_k = 0, to_v = 0;
        for (int64_t r = 0; r < z.W; r++) {
            if (r <= t)
                to_q += da[item * z.W + r] *
                        (k[((t - r) * z.H + h) * z.C + c] + relative[(r * z.H + h) * z.C + c]);
            if (t + r < z.T) {
                int64_t from = (t + r) * z.H + h;
                to_k += da[from * z.W + r] * q[from * z.C + c];
                to_v += probs[from * z.W + r] * dy[from * z.C + c];
            }
        }
        dq[i] = to_q, dk[i] = to_k, dv[i] = to_v;
    }
}

struct RelativeTerm {
    const float *da, *q;
    Sizes z;
    __device__ float operator()(int64_t t, int64_t k) const {
        int64_t c = k % z.C, h = k / z.C % z.H, r = k / z.C / z.H;
        return da[(t * z.H + h) * z.W + r] * q[(t * z.H + h) * z.C + c];
    }
};

static Sizes sizes_of(Tensor q, Tensor relative) {
    return Sizes{q.shape[0], q.shape[1], q.shape[2], relative.shape[0]};
}

extern "C" void cuda_local_attention_forward(Tensor y, Tensor kept, Tensor q, Tensor k, Tensor v,
                                             Tensor relative, float cap) {
    Sizes z = sizes_of(q, relative);
    if (!z.T) return;
    LAUNCH(q.device, (attend), (unsigned)ceil_div(z.T * z.H, WARPS), 32 * WARPS, 0,
           data_of<float>(y), data_of<float>(kept), data_of<float>(kept) + z.T * z.H * z.W,
           data_of<float>(q), data_of<float>(k), data_of<float>(v), data_of<float>(relative), cap,
           z);
}

extern "C" void cuda_local_attention_backward(Tensor dq, Tensor dk, Tensor dv, Tensor drelative,
                                              Tensor scores, Tensor dy, Tensor kept, Tensor q,
                                              Tensor k, Tensor v, Tensor relative) {
    Sizes z = sizes_of(q, relative);
    const float *probs = data_of<float>(kept), *slopes = probs + z.T * z.H * z.W;
    cuda_fill(drelative, 0.0f);
    if (!z.T) return;
    LAUNCH(q.device, (score_gradients), (unsigned)ceil_div(z.T * z.H, WARPS), 32 * WARPS, 0,
           data_of<float>(scores), data_of<float>(dy), probs, slopes, data_of<float>(v), z);
    LAUNCH(q.device, (row_gradients), grid_for(q.device, z.T * z.H * z.C, 256), 256, 0,
           data_of<float>(dq), data_of<float>(dk), data_of<float>(dv), data_of<float>(scores),
           data_of<float>(dy), probs, data_of<float>(q), data_of<float>(k),
           data_of<float>(relative), z);
    add_column_sums(q.device, data_of<float>(drelative), z.T, z.W * z.H * z.C,
                    RelativeTerm{data_of<float>(scores), data_of<float>(q), z});
}
