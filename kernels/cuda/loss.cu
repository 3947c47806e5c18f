/* loss.cu - softcap and cross-entropy, a block for each row of the vocabulary. */
#include "kernels/cuda/cuda.h"

extern "C" {
#include "kernels/loss.h"
}

#define THREADS 512
#define AHEAD   4 /* packs that a thread has under way: a row has one multiprocessor */

DEVICE_FUNCTION float capped(float z, float cap, float inverse) {
    return cap != 0 ? cap * near_tanh(z * inverse) : z;
}

template <int V>
static __global__ void soften(float *logits, float cap, float inverse, int64_t packs) {
    FOR_GRID(i, packs) {
        float z[V];
        load(z, logits + V * i);
#pragma unroll
        for (int j = 0; j < V; j++) z[j] = capped(z[j], cap, inverse);
        store(logits + V * i, z);
    }
}

extern "C" void cuda_softcap_forward(Tensor logits, float cap) {
    int64_t count = tensor_count(logits);
    if (cap == 0 || !count) return;
    bool fits = fits_packs(count, logits);
    WITH_PACKS(fits, V, {
        LAUNCH(logits.device, (soften<V>), grid_for(logits.device, count / V, 256), 256, 0,
               data_of<float>(logits), cap, 1.0f / cap, count / V);
    });
}

/* Sum of exp(z) relative to top, so that parts join. */
struct Sum {
    float top, total;
};

DEVICE_FUNCTION Sum join(Sum a, Sum b) {
    float top = fmaxf(a.top, b.top);
    if (top == -INFINITY) return Sum{top, 0};
    return Sum{top, a.total * expf(a.top - top) + b.total * expf(b.top - top)};
}

/* A thread's next packs of a row; -inf, which weighs nothing, behind its end. */
template <int V>
DEVICE_FUNCTION void load_ahead(float (&z)[AHEAD][V], const float *row, int64_t first,
                                int64_t vocab) {
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
#pragma unroll
        for (int j = 0; j < V; j++) z[u][j] = -INFINITY;
        if (first + u * THREADS * V < vocab) load(z[u], row + first + u * THREADS * V);
    }
}

/* First all logits are capped and summed up, then read again for their gradients; or, where there
 * are none, written back. */
template <typename T, int V>
static __global__ void __launch_bounds__(THREADS)
    cross_entropy_row(float *nll, T *dlogits, float *logits, const int32_t *targets,
                      const float *weights, int64_t vocab, float cap, float inverse) {
    __shared__ float tops[32], totals[32];
    float *row = logits + blockIdx.x * vocab;
    Sum sum = {-INFINITY, 0};
    for (int64_t first = threadIdx.x * V; first < vocab; first += AHEAD * THREADS * V) {
        float z[AHEAD][V], top = sum.top;
        load_ahead<V>(z, row, first, vocab);
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            int64_t i = first + u * THREADS * V;
            if (i >= vocab) break;
#pragma unroll
            for (int j = 0; j < V; j++) {
                z[u][j] = capped(z[u][j], cap, inverse);
                top = fmaxf(top, z[u][j]);
            }
            if (!dlogits) store(row + i, z[u]);
        }
        if (top == -INFINITY) continue;
        sum.total *= expf(sum.top - top);
#pragma unroll
        for (int u = 0; u < AHEAD; u++)
#pragma unroll
            for (int j = 0; j < V; j++) sum.total += quick_exp(z[u][j] - top);
        sum.top = top;
    }
#pragma unroll
    for (int d = 16; d; d >>= 1) {
        Sum other = {__shfl_xor_sync(0xffffffffu, sum.top, d),
                     __shfl_xor_sync(0xffffffffu, sum.total, d)};
        sum = join(sum, other);
    }
    if (threadIdx.x % 32 == 0) {
        tops[threadIdx.x / 32] = sum.top;
        totals[threadIdx.x / 32] = sum.total;
    }
    __syncthreads();
    sum = Sum{tops[0], totals[0]};
    for (int w = 1; w < THREADS / 32; w++) sum = join(sum, Sum{tops[w], totals[w]});
    float lse = sum.top + logf(sum.total);
    int32_t target = targets[blockIdx.x];
    float at = target >= 0 ? row[target] : 0.0f; /* written, if it was, before the barrier above */
    if (dlogits) at = capped(at, cap, inverse);
    if (!threadIdx.x) nll[blockIdx.x] = target >= 0 ? lse - at : 0.0f;
    if (!dlogits) return;
    float weight = target >= 0 ? weights[blockIdx.x] : 0.0f;
    float slope = cap != 0 ? 1.0f / (cap * cap) : 0.0f;
    for (int64_t first = threadIdx.x * V; first < vocab; first += AHEAD * THREADS * V) {
        float z[AHEAD][V];
        load_ahead<V>(z, row, first, vocab);
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            int64_t i = first + u * THREADS * V;
            if (i >= vocab) break;
#pragma unroll
            for (int j = 0; j < V; j++) {
                float x = capped(z[u][j], cap, inverse), p = quick_exp(x - lse);
                if (i + j == target) p = expf(x - lse) - 1.0f;
                z[u][j] = weight * p * (1.0f - x * x * slope);
            }
            store(dlogits + blockIdx.x * vocab + i, z[u]);
        }
    }
}

extern "C" void cuda_cross_entropy(Tensor nll, Tensor dlogits, Tensor logits, Tensor targets,
                                   Tensor weights, float cap) {
    int64_t R = tensor_rows(logits), vocab = tensor_cols(logits);
    if (!R) return;
    bool fits = fits_packs(vocab, logits, dlogits);
    WITH_FLOAT(dlogits.data ? dlogits.dtype : F32, T, WITH_PACKS(fits, V, {
                   LAUNCH(logits.device, (cross_entropy_row<T, V>), (unsigned)R, THREADS, 0,
                          data_of<float>(nll), data_of<T>(dlogits), data_of<float>(logits),
                          data_of<int32_t>(targets), data_of<float>(weights), vocab, cap,
                          cap != 0 ? 1.0f / cap : 0.0f);
               }));
}
