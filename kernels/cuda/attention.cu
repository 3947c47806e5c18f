/* attention.cu - which kernel takes which attention, and the one that takes any.
 *
 * Heads of 256 and 512 in bf16 go to tensor cores (flash.h). The rest is plain: a warp for each
 * query and head, its lanes sharing the head's numbers; long sights are split among warps and
 * joined in order. The way back has no sums in an order of chance: one pass over keys for each
 * query gives dq, one over queries for each key dk and dv. */
#include "kernels/cuda/flash.h"

#define THREADS   128
#define LANE_MOST 16  /* numbers of a head of 512 that a lane has */
#define SPLIT     512 /* keys of a sight that one warp takes, when it is split */
#define SPLITS    64

/* Runs the statements with D the dtype, as a constant, that keys and values are kept in. */
#define WITH_CACHE(dtype_value, D, ...)                                                            \
    switch (dtype_value) {                                                                         \
        PACKED_CASE(F32, D, __VA_ARGS__)                                                           \
        PACKED_CASE(BF16, D, __VA_ARGS__)                                                          \
        PACKED_CASE(Q8_0, D, __VA_ARGS__)                                                          \
        PACKED_CASE(Q4_0, D, __VA_ARGS__)                                                          \
    default:                                                                                       \
        CHECK(false, "keys in %s on the GPU", dtype_name(dtype_value));                            \
    }

/* Rows of paged queries below which the split of long sights is worth more than tensor cores. */
#define PAGED_ROWS 512

/* Whether tensor cores take heads of this kind: their rows fill tiles, and shared memory suffices.
 */
static bool takes_flash(Tensor q, Tensor k, const Heads &heads, int rows, size_t bytes) {
    return q.dtype == BF16 && k.dtype == BF16 && (heads.C == 256 || heads.C == 512) &&
           rows % heads.group == 0 && bytes <= cuda_shared_most(q.device);
}

/* ---- forward ---- */

/* A lane has numbers 8 lane + 256 i + j (j < 8) of its head: reads of 16 bytes side by side. */
template <int D>
DEVICE_FUNCTION void read_head(float (&x)[LANE_MOST], const PackedView &t, int64_t at, int C) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < LANE_MOST / 8; i++) {
        int c = 8 * lane + 256 * i;
        float part[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        if (c < C) read_up_to_8<D>(part, t, at + c, at + C);
#pragma unroll
        for (int j = 0; j < 8; j++) x[8 * i + j] = part[j];
    }
}

DEVICE_FUNCTION float head_dot(const float (&a)[LANE_MOST], const float (&b)[LANE_MOST]) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < LANE_MOST; i++) sum += a[i] * b[i];
    return warp_sum(sum);
}

template <typename T>
DEVICE_FUNCTION void write_head(T *p, const float (&x)[LANE_MOST], float factor, int C) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < LANE_MOST; i++) {
        int c = 8 * lane + 256 * (i / 8) + i % 8;
        if (c < C) p[c] = from_float<T>(x[i] * factor);
    }
}

/* Keys of part blockIdx.y of each (query, head)'s sight: parts of `each` keys. With one part y and
 * lse are written, else (out, top, total) of each into partial. */
template <typename T, int D>
static __global__ void __launch_bounds__(THREADS)
    attend(T *y, float *lse, float *partial, PackedView q, PackedView k, PackedView v, Heads heads,
           Sight see, int64_t each) {
    int64_t item = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (item >= heads.N * heads.H) return; /* whole warps; nothing below waits for other warps */
    int64_t n = item / heads.H;
    int C = heads.C, h = (int)(item % heads.H), kv = h / heads.group;
    int64_t begin = see.first[n] + blockIdx.y * each, end = see.last[n] + 1;
    if (begin + each < end) end = begin + each;
    float query[LANE_MOST], out[LANE_MOST] = {}, key[LANE_MOST], top = -INFINITY, total = 0;
    read_head<sizeof(T) == 2 ? BF16 : F32>(query, q, item * C, C);
    for (int64_t s = begin; s < end; s++) {
        int64_t at = (key_row(see, n, s) * heads.K + kv) * C;
        read_head<D>(key, k, at, C);
        float score = head_dot(query, key), best = fmaxf(top, score);
        float fade = quick_exp(top - best), weight = quick_exp(score - best);
        read_head<D>(key, v, at, C);
#pragma unroll
        for (int i = 0; i < LANE_MOST; i++) out[i] = out[i] * fade + weight * key[i];
        total = total * fade + weight;
        top = best;
    }
    int lane = threadIdx.x % 32;
    if (partial) {
        float *mine = partial + (blockIdx.y * heads.N * heads.H + item) * (C + 2);
        write_head(mine, out, 1.0f, C);
        if (!lane) mine[C] = top, mine[C + 1] = total;
        return;
    }
    write_head(y + item * C, out, 1.0f / total, C);
    if (!lane) lse[item] = top + logf(total);
}

/* The parts of a sight, joined in order. */
template <typename T>
static __global__ void __launch_bounds__(THREADS)
    join_parts(T *y, float *lse, const float *partial, Heads heads, int parts) {
    int64_t item = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (item >= heads.N * heads.H) return;
    int C = heads.C, lane = threadIdx.x % 32;
    int64_t stride = heads.N * heads.H * (C + 2);
    const float *mine = partial + item * (C + 2);
    float top = -INFINITY, total = 0;
#pragma unroll 1
    for (int p = 0; p < parts; p++) top = fmaxf(top, mine[p * stride + C]);
#pragma unroll 1
    for (int p = 0; p < parts; p++)
        if (mine[p * stride + C] > -INFINITY)
            total += mine[p * stride + C + 1] * expf(mine[p * stride + C] - top);
    for (int c = lane; c < C; c += 32) {
        float sum = 0;
#pragma unroll 1
        for (int p = 0; p < parts; p++)
            if (mine[p * stride + C] > -INFINITY)
                sum += mine[p * stride + c] * expf(mine[p * stride + C] - top);
        y[item * C + c] = from_float<T>(sum / total);
    }
    if (!lane) lse[item] = top + logf(total);
}

static void launch_flash(Tensor y, Tensor lse, Tensor q, Tensor k, Tensor v, Heads heads, Sight see,
                         size_t bytes) {
    dim3 grid((unsigned)ceil_div(heads.N, FORWARD_ROWS / heads.group), (unsigned)heads.K);
    if (heads.C == 256)
        LAUNCH(q.device, (flash_forward<256>), grid, FLASH_THREADS, bytes, data_of<bf16>(y),
               data_of<float>(lse), data_of<bf16>(q), data_of<bf16>(k), data_of<bf16>(v), heads,
               see);
    else
        LAUNCH(q.device, (flash_forward<512>), grid, FLASH_THREADS, bytes, data_of<bf16>(y),
               data_of<float>(lse), data_of<bf16>(q), data_of<bf16>(k), data_of<bf16>(v), heads,
               see);
}

extern "C" void cuda_attention_forward(Tensor y, Tensor lse, Tensor q, Tensor k, Tensor v,
                                       Tensor index, Tensor first, Tensor last, Tensor sequence,
                                       Tensor pages) {
    (void)index;
    Heads heads = heads_of(q, k);
    Sight see = {data_of<int32_t>(first), data_of<int32_t>(last), data_of<int32_t>(sequence),
                 data_of<int32_t>(pages), pages.data ? tensor_cols(pages) : 0};
    if (!heads.N) return;
    size_t bytes = flash_forward_bytes(heads.C);
    if (takes_flash(q, k, heads, FORWARD_ROWS, bytes) &&
        (!pages.data || heads.N * heads.group >= PAGED_ROWS)) {
        launch_flash(y, lse, q, k, v, heads, see, bytes);
        return;
    }
    int64_t items = heads.N * heads.H, longest = pages.data ? see.columns * PAGE_KEYS : heads.S;
    /* Few queries and many keys: more warps than queries. */
    int64_t parts = items < 4096 ? ceil_div(longest, SPLIT) : 1, each = longest;
    if (parts > SPLITS) parts = SPLITS;
    if (parts > 1) each = ceil_div(longest, parts);
    float *partial =
        parts > 1 ? (float *)cuda_workspace(q.device, (size_t)(parts * items * (heads.C + 2)) * 4)
                  : NULL;
    dim3 grid((unsigned)ceil_div(items, THREADS / 32), (unsigned)parts);
    WITH_FLOAT(q.dtype, T, {
        WITH_CACHE(k.dtype, D, {
            LAUNCH(q.device, (attend<T, D>), grid, THREADS, 0, data_of<T>(y), data_of<float>(lse),
                   partial, view_of(q), view_of(k), view_of(v), heads, see, each);
        })
        if (partial)
            LAUNCH(q.device, (join_parts<T>), grid.x, THREADS, 0, data_of<T>(y),
                   data_of<float>(lse), partial, heads, (int)parts);
    });
}

/* ---- backward ---- */

/* delta[n, h] = <dy, y>. */
template <typename T>
static __global__ void __launch_bounds__(THREADS)
    row_deltas(float *delta, PackedView dy, PackedView y, int64_t items, int C) {
    constexpr int D = sizeof(T) == 2 ? BF16 : F32;
    int64_t item = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (item >= items) return;
    float a[LANE_MOST], b[LANE_MOST];
    read_head<D>(a, dy, item * C, C);
    read_head<D>(b, y, item * C, C);
    float sum = head_dot(a, b);
    if (threadIdx.x % 32 == 0) delta[item] = sum;
}

template <typename T>
static __global__ void __launch_bounds__(THREADS)
    query_gradients(T *dq, PackedView dy, const float *delta, const float *lse, PackedView q,
                    PackedView k, PackedView v, Heads heads, Sight see) {
    constexpr int D = sizeof(T) == 2 ? BF16 : F32;
    int64_t item = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (item >= heads.N * heads.H) return;
    int64_t n = item / heads.H;
    int C = heads.C, kv = (int)(item % heads.H) / heads.group;
    float query[LANE_MOST], dout[LANE_MOST], sum[LANE_MOST] = {}, key[LANE_MOST];
    read_head<D>(query, q, item * C, C);
    read_head<D>(dout, dy, item * C, C);
    for (int64_t s = see.first[n]; s <= see.last[n]; s++) {
        int64_t at = (s * heads.K + kv) * C;
        read_head<D>(key, v, at, C);
        float slope = head_dot(dout, key) - delta[item];
        read_head<D>(key, k, at, C);
        slope *= quick_exp(head_dot(query, key) - lse[item]);
#pragma unroll
        for (int i = 0; i < LANE_MOST; i++) sum[i] += slope * key[i];
    }
    write_head(dq + item * C, sum, 1.0f, C);
}

/* A warp for each key and head of keys. */
template <typename T>
static __global__ void __launch_bounds__(THREADS)
    key_gradients(float *dk, float *dv, PackedView dy, const float *delta, const float *lse,
                  PackedView q, PackedView k, PackedView v, Heads heads, Sight see) {
    constexpr int D = sizeof(T) == 2 ? BF16 : F32;
    int64_t item = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (item >= heads.S * heads.K) return;
    int64_t s = item / heads.K;
    int C = heads.C, kv = (int)(item % heads.K);
    float key[LANE_MOST], value[LANE_MOST], a[LANE_MOST], b[LANE_MOST], sum_k[LANE_MOST] = {},
                                                                        sum_v[LANE_MOST] = {};
    read_head<D>(key, k, item * C, C);
    read_head<D>(value, v, item * C, C);
    for (int64_t n = 0; n < heads.N; n++) {
        if (see.first[n] > s || see.last[n] < s) continue;
        for (int g = 0; g < heads.group; g++) {
            int64_t row = n * heads.H + kv * heads.group + g;
            read_head<D>(a, q, row * C, C);
            read_head<D>(b, dy, row * C, C);
            float weight = quick_exp(head_dot(a, key) - lse[row]);
            float slope = weight * (head_dot(b, value) - delta[row]);
#pragma unroll
            for (int i = 0; i < LANE_MOST; i++) {
                sum_k[i] += slope * a[i];
                sum_v[i] += weight * b[i];
            }
        }
    }
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < LANE_MOST; i++) {
        int c = 8 * lane + 256 * (i / 8) + i % 8;
        if (c >= C) continue;
        dk[item * C + c] += sum_k[i];
        dv[item * C + c] += sum_v[i];
    }
}

template <int C>
static void launch_flash_backward(Tensor dq, Tensor dk, Tensor dv, Tensor dy, Tensor lse, Tensor q,
                                  Tensor k, Tensor v, const float *delta, int *ranges, Heads heads,
                                  Sight see) {
    const Device *device = q.device;
    size_t bytes = flash_backward_bytes(C);
    unsigned tiles = (unsigned)ceil_div(heads.S, FLASH_KEYS),
             rows = (unsigned)ceil_div(heads.N, BACKWARD_ROWS / heads.group);
    LAUNCH(device, (find_queries), tiles, FLASH_THREADS, 0, ranges, heads, see);
    LAUNCH(device, (flash_keys_backward<C>), dim3(tiles, (unsigned)heads.K), FLASH_THREADS, bytes,
           data_of<float>(dk), data_of<float>(dv), data_of<bf16>(dy), delta, data_of<float>(lse),
           data_of<bf16>(q), data_of<bf16>(k), data_of<bf16>(v), ranges, heads, see);
    LAUNCH(device, (flash_rows_backward<C>), dim3(rows, (unsigned)heads.K), FLASH_THREADS, bytes,
           data_of<bf16>(dq), data_of<bf16>(dy), delta, data_of<float>(lse), data_of<bf16>(q),
           data_of<bf16>(k), data_of<bf16>(v), heads, see);
}

extern "C" void cuda_attention_backward(Tensor dq, Tensor dk, Tensor dv, Tensor dy, Tensor y,
                                        Tensor lse, Tensor q, Tensor k, Tensor v, Tensor index,
                                        Tensor first, Tensor last, Tensor partial) {
    (void)index, (void)partial;
    Heads heads = heads_of(q, k);
    Sight see = {data_of<int32_t>(first), data_of<int32_t>(last), NULL, NULL, 0};
    int64_t items = heads.N * heads.H, each = THREADS / 32;
    if (!items) return;
    size_t delta_bytes = ((size_t)items * sizeof(float) + 255) / 256 * 256;
    size_t range_bytes = (size_t)ceil_div(heads.S, FLASH_KEYS) * 2 * sizeof(int);
    char *memory = (char *)cuda_workspace(q.device, delta_bytes + range_bytes);
    float *delta = (float *)memory;
    int *ranges = (int *)(memory + delta_bytes);
    WITH_FLOAT(q.dtype, T, {
        LAUNCH(q.device, (row_deltas<T>), (unsigned)ceil_div(items, each), THREADS, 0, delta,
               view_of(dy), view_of(y), items, heads.C);
    });
    if (takes_flash(q, k, heads, BACKWARD_ROWS, flash_backward_bytes(heads.C))) {
        if (heads.C == 256)
            launch_flash_backward<256>(dq, dk, dv, dy, lse, q, k, v, delta, ranges, heads, see);
        else
            launch_flash_backward<512>(dq, dk, dv, dy, lse, q, k, v, delta, ranges, heads, see);
        return;
    }
    WITH_FLOAT(q.dtype, T, {
        LAUNCH(q.device, (query_gradients<T>), (unsigned)ceil_div(items, each), THREADS, 0,
               data_of<T>(dq), view_of(dy), delta, data_of<float>(lse), view_of(q), view_of(k),
               view_of(v), heads, see);
        LAUNCH(q.device, (key_gradients<T>), (unsigned)ceil_div(heads.S * heads.K, each), THREADS,
               0, data_of<float>(dk), data_of<float>(dv), view_of(dy), delta, data_of<float>(lse),
               view_of(q), view_of(k), view_of(v), heads, see);
    });
}
