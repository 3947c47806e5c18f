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

/* Both halves of a head are turned by the same lane, P elements of each at a time. */
template <typename T, int V>
static __global__ void __launch_bounds__(32 * WARPS)
    normalise_and_turn(Sets sets, const float *cosines, const float *sines, int64_t N, int C,
                       float eps) {
    constexpr int P = V > 1 ? V / 2 : 1;
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
    float sum = 0;
    for (int d = lane * V; d < C; d += 32 * V) {
        float v[V];
        load(v, x + d);
#pragma unroll
        for (int j = 0; j < V; j++) sum += v[j] * v[j];
    }
    float r = 1.0f / sqrtf(warp_sum(sum) / (float)C + eps);
    if (s.rstd && !lane) s.rstd[n * s.heads + h] = r;
    auto normal = [&](auto &v, int d) {
        constexpr int COUNT = sizeof v / sizeof v[0];
        float w[COUNT];
        load(v, x + d);
        if (s.weight && s.wide) load(w, (const float *)s.weight + d);
        if (s.weight && !s.wide) load(w, (const bf16 *)s.weight + d);
#pragma unroll
        for (int j = 0; j < COUNT; j++) v[j] = rounded<T>(s.weight ? v[j] * r * w[j] : v[j] * r);
    };
    for (int d = lane * V; d < C && !s.turns; d += 32 * V) {
        float v[V];
        normal(v, d);
        store(y + d, v);
    }
    for (int i = lane * P; i < half && s.turns; i += 32 * P) {
        float a[P], b[P], c[P], t[P];
        load(c, cosines + n * half + i);
        load(t, sines + n * half + i);
        normal(a, i);
        normal(b, i + half);
#pragma unroll
        for (int j = 0; j < P; j++) turn_pair(a[j], b[j], c[j], t[j]);
        store(y + i, a);
        store(y + i + half, b);
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
