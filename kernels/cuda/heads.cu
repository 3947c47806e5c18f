/* heads.cu - a warp a head, as norms have for rows of that length, of all sets at once. */
#include "kernels/cuda/rows.h"

extern "C" {
#include "kernels/heads.h"
}

#define WARPS 8

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

/* Both halves of a head are turned by the same lane, P elements of each at a time. A lane has up to
 * ROUNDS packs of a head and asks for all that it reads before it sums. */
template <typename T, int V, int ROUNDS>
static __global__ void __launch_bounds__(32 * WARPS)
    normalise_and_turn(Sets sets, const float *cosines, const float *sines, int N, int C,
                       float eps) {
    constexpr int P = V > 1 ? V / 2 : 1, TURNS = V > 1 ? ROUNDS : ROUNDS / 2;
    wait_for_last();
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, half = C / 2;
    int k = (int)blockIdx.x * WARPS + warp, n = k / sets.heads, h = k % sets.heads;
    if (n >= N) return;
    Set s = sets.at[0];
    for (int i = 1; i < HEAD_SETS && h >= s.heads; i++) {
        h -= s.heads;
        s = sets.at[i];
    }
    const T *x = (const T *)s.x + ((int64_t)n * s.heads + h) * C;
    T *y = (T *)s.y + ((int64_t)(s.rows ? s.rows[n] : n) * s.heads + h) * C;
    Kept<T, V> whole[ROUNDS] = {};
    Kept<T, P> low[TURNS] = {}, high[TURNS] = {};
    Kept<float, P> cosine[TURNS] = {}, sine[TURNS] = {};
#pragma unroll
    for (int i = 0; i < ROUNDS; i++)
        if ((lane + 32 * i) * V < C) whole[i].read(x + (lane + 32 * i) * V);
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        int at = (lane + 32 * i) * P;
        if (!s.turns || at >= half) break;
        low[i].read(x + at);
        high[i].read(x + half + at);
        cosine[i].read(cosines + (int64_t)n * half + at);
        sine[i].read(sines + (int64_t)n * half + at);
    }
    float sum = 0;
#pragma unroll
    for (int i = 0; i < ROUNDS; i++)
#pragma unroll
        for (int j = 0; j < V; j++)
            if ((lane + 32 * i) * V < C) sum += whole[i][j] * whole[i][j];
    float r = root_of_mean(warp_sum(sum), C, eps);
    if (s.rstd && !lane) s.rstd[(int64_t)n * s.heads + h] = r;
    auto normal = [&](auto &v, const auto &pack, int d) {
        constexpr int COUNT = sizeof v / sizeof v[0];
        float w[COUNT];
        if (s.weight && s.wide) load(w, (const float *)s.weight + d);
        if (s.weight && !s.wide) load(w, (const bf16 *)s.weight + d);
#pragma unroll
        for (int j = 0; j < COUNT; j++) v[j] = s.weight ? pack[j] * r * w[j] : pack[j] * r;
        round_all<T>(v);
    };
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
        int d = (lane + 32 * i) * V;
        if (s.turns || d >= C) break;
        float v[V];
        normal(v, whole[i], d);
        store(y + d, v);
    }
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        int at = (lane + 32 * i) * P;
        if (!s.turns || at >= half) break;
        float a[P], b[P];
        normal(a, low[i], at);
        normal(b, high[i], half + at);
#pragma unroll
        for (int j = 0; j < P; j++) turn_pair(a[j], b[j], cosine[i][j], sine[i][j]);
        store(y + at, a);
        store(y + half + at, b);
    }
}

struct BackSet {
    void *dx;
    const void *dy, *x, *weight;
    const float *also, *rstd;
    int heads;
    bool turns, wide, wide_weight; /* wide: dy is f32, not bf16; the weight is */
};

struct BackSets {
    BackSet at[HEAD_SETS];
    int heads; /* of all */
};

/* The way back; lanes have both halves of a head as they do on the way forward. */
template <typename T, int P, int TURNS>
static __global__ void __launch_bounds__(32 * WARPS)
    turn_back(BackSets sets, const float *cosines, const float *sines, int N, int C) {
    wait_for_last();
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, half = C / 2;
    int k = (int)blockIdx.x * WARPS + warp, n = k / sets.heads, h = k % sets.heads;
    if (n >= N) return;
    BackSet s = sets.at[0];
    for (int i = 1; i < HEAD_SETS && h >= s.heads; i++) {
        h -= s.heads;
        s = sets.at[i];
    }
    int64_t head = (int64_t)n * s.heads + h;
    const T *x = (const T *)s.x + head * C;
    Kept<T, P> low[TURNS] = {}, high[TURNS] = {};
    float a[TURNS][P] = {}, b[TURNS][P] = {}, r = s.rstd[head], sum = 0;
    auto read = [&](float(&v)[P], const void *from, bool wide, int64_t at) {
        if (wide)
            load(v, (const float *)from + at);
        else
            load(v, (const bf16 *)from + at);
    };
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        int at = (lane + 32 * i) * P;
        if (at >= half) break;
        low[i].read(x + at);
        high[i].read(x + half + at);
        read(a[i], s.dy, s.wide, head * C + at);
        read(b[i], s.dy, s.wide, head * C + half + at);
    }
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        int at = (lane + 32 * i) * P;
        if (at >= half) break;
        if (s.turns) {
            float cosine[P], sine[P];
            load(cosine, cosines + (int64_t)n * half + at);
            load(sine, sines + (int64_t)n * half + at);
#pragma unroll
            for (int j = 0; j < P; j++) turn_pair(a[i][j], b[i][j], cosine[j], -sine[j]);
        }
        if (s.weight) {
            float first[P], second[P];
            read(first, s.weight, s.wide_weight, at);
            read(second, s.weight, s.wide_weight, half + at);
#pragma unroll
            for (int j = 0; j < P; j++) a[i][j] *= first[j], b[i][j] *= second[j];
        }
        if (s.also) {
            float first[P], second[P];
            load(first, s.also + head * C + at);
            load(second, s.also + head * C + half + at);
#pragma unroll
            for (int j = 0; j < P; j++) a[i][j] += first[j], b[i][j] += second[j];
        }
#pragma unroll
        for (int j = 0; j < P; j++) sum += a[i][j] * low[i][j] + b[i][j] * high[i][j];
    }
    float mean = warp_sum(sum) / (float)C * r * r;
    T *dx = (T *)s.dx + head * C;
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        int at = (lane + 32 * i) * P;
        if (at >= half) break;
#pragma unroll
        for (int j = 0; j < P; j++) {
            a[i][j] = r * (a[i][j] - low[i][j] * mean);
            b[i][j] = r * (b[i][j] - high[i][j] * mean);
        }
        store(dx + at, a[i]);
        store(dx + half + at, b[i]);
    }
}

/* Runs the statements with ROUNDS the packs of a head that a lane has. */
#define WITH_ROUNDS(C, V, ROUNDS, ...)                                                             \
    do {                                                                                           \
        if (V > 1 && (C) <= 32 * V) {                                                              \
            constexpr int ROUNDS = V > 1 ? 1 : 2;                                                  \
            __VA_ARGS__;                                                                           \
        } else if ((C) <= 64 * V) {                                                                \
            constexpr int ROUNDS = 2;                                                              \
            __VA_ARGS__;                                                                           \
        } else {                                                                                   \
            constexpr int ROUNDS = WARP_COLS / (32 * V);                                           \
            __VA_ARGS__;                                                                           \
        }                                                                                          \
    } while (0)

extern "C" void cuda_heads_forward(const HeadSet *sets, int count, Tensor cosines, Tensor sines,
                                   float eps) {
    int64_t N = sets->x.shape[0];
    int C = (int)sets->x.shape[2];
    const Device *device = sets->x.device;
    bool fits = true;
    Sets all = {};
    CHECK(C <= WARP_COLS, "heads of %d", C);
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
    WITH_FLOAT(sets->x.dtype, T,
               WITH_LONG_PACKS(T, C, fits, V, WITH_ROUNDS(C, V, ROUNDS, {
                                   LAUNCH_NEXT(device, (normalise_and_turn<T, V, ROUNDS>), blocks,
                                               32 * WARPS, all, data_of<float>(cosines),
                                               data_of<float>(sines), (int)N, C, eps);
                               })));
}

extern "C" void cuda_heads_backward(const HeadGradient *sets, int count, Tensor cosines,
                                    Tensor sines) {
    int64_t N = sets->x.shape[0];
    int C = (int)sets->x.shape[2];
    const Device *device = sets->x.device;
    bool fits = true;
    BackSets all = {};
    CHECK(C <= WARP_COLS, "heads of %d", C);
    for (int i = 0; i < count; i++) {
        const HeadGradient *s = &sets[i];
        fits = fits && fits_packs(C, s->dx, s->dy, s->x, s->weight) && fits_packs(C, s->also);
        all.at[i] = BackSet{s->dx.data,
                            s->dy.data,
                            s->x.data,
                            s->weight.data,
                            data_of<float>(s->also),
                            data_of<float>(s->rstd),
                            (int)s->x.shape[1],
                            s->turns,
                            s->dy.dtype == F32,
                            s->weight.dtype == F32};
        all.heads += (int)s->x.shape[1];
    }
    unsigned blocks = (unsigned)ceil_div(N * all.heads, WARPS);
    WITH_FLOAT(sets->x.dtype, T,
               WITH_LONG_PACKS(T, C, fits, V, WITH_ROUNDS(C, V, ROUNDS, {
                                   constexpr int P = V > 1 ? V / 2 : 1,
                                                 TURNS = V > 1 ? ROUNDS : ROUNDS / 2;
                                   LAUNCH_NEXT(device, (turn_back<T, P, TURNS>), blocks, 32 * WARPS,
                                               all, data_of<float>(cosines), data_of<float>(sines),
                                               (int)N, C);
                               })));
}
