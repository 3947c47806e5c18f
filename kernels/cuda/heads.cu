/* heads.cu - a warp a head, of all sets at once. */
#include "kernels/cuda/cuda.h"

extern "C" {
#include "kernels/heads.h"
}

#define WARPS     8
#define HEAD_MOST 1024 /* as norm.cu gives to a warp: the same sums */

struct Set {
    void *y;
    const void *x, *weight;
    const int32_t *rows;
    float *rstd;
    int heads;
    bool turns, wide; /* wide: weights are f32 */
};

struct Sets {
    Set at[HEAD_SETS];
    int heads; /* of all */
};

template <typename T, int V>
static __global__ void __launch_bounds__(32 * WARPS)
    normalise_and_turn(Sets sets, const float *cosines, const float *sines, int64_t N, int C,
                       float eps) {
    __shared__ float space[WARPS][HEAD_MOST];
    wait_for_last();
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, half = C / 2;
    int64_t k = (int64_t)blockIdx.x * WARPS + warp, n = k / sets.heads;
    if (n >= N) return;
    int h = (int)(k % sets.heads);
    Set s = sets.at[0];
    for (int i = 1; i < HEAD_SETS && h >= s.heads; i++) {
        h -= s.heads;
        s = sets.at[i];
    }
    const T *x = (const T *)s.x + (n * s.heads + h) * C;
    T *y = (T *)s.y + ((s.rows ? s.rows[n] : n) * s.heads + h) * C;
    float *row = space[warp], sum = 0;
    for (int d = lane * V; d < C; d += 32 * V) {
        float v[V];
        load(v, x + d);
#pragma unroll
        for (int j = 0; j < V; j++) sum += v[j] * v[j];
    }
    float r = 1.0f / sqrtf(warp_sum(sum) / (float)C + eps);
    if (s.rstd && !lane) s.rstd[n * s.heads + h] = r;
    for (int d = lane * V; d < C; d += 32 * V) {
        float v[V], w[V];
        load(v, x + d);
        if (s.weight && s.wide) load(w, (const float *)s.weight + d);
        if (s.weight && !s.wide) load(w, (const bf16 *)s.weight + d);
#pragma unroll
        for (int j = 0; j < V; j++) v[j] = s.weight ? v[j] * r * w[j] : v[j] * r;
        if (!s.turns) store(y + d, v);
#pragma unroll
        for (int j = 0; j < V && s.turns; j++) row[d + j] = rounded<T>(v[j]);
    }
    if (!s.turns) return;
    __syncwarp();
    for (int i = lane; i < half; i += 32) {
        float a = row[i], b = row[i + half], c = cosines[n * half + i], t = sines[n * half + i];
        y[i] = from_float<T>(a * c - b * t);
        y[i + half] = from_float<T>(b * c + a * t);
    }
}

extern "C" void cuda_heads_forward(const HeadSet *sets, int count, Tensor cosines, Tensor sines,
                                   float eps) {
    int64_t N = sets->x.shape[0];
    int C = (int)sets->x.shape[2];
    const Device *device = sets->x.device;
    bool fits = true;
    Sets all = {};
    CHECK(C <= HEAD_MOST, "heads of %d", C);
    for (int i = 0; i < count; i++) {
        const HeadSet *s = &sets[i];
        fits = fits && fits_packs(C, s->y, s->x, s->weight);
        all.at[i] = Set{s->y.data,
                        s->x.data,
                        s->weight.data,
                        data_of<int32_t>(s->rows),
                        data_of<float>(s->rstd),
                        (int)s->x.shape[1],
                        s->turns,
                        s->weight.dtype == F32};
        all.heads += (int)s->x.shape[1];
    }
    unsigned blocks = (unsigned)ceil_div(N * all.heads, WARPS);
    WITH_FLOAT(sets->x.dtype, T, WITH_LONG_PACKS(T, C, fits, V, {
                   LAUNCH_NEXT(device, (normalise_and_turn<T, V>), blocks, 32 * WARPS, all,
                               data_of<float>(cosines), data_of<float>(sines), N, C, eps);
               }));
}
