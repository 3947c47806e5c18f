/* attention.cu - which kernel takes which attention, and the one that takes any.
 *
 * Heads of 256 and 512 in bf16 go to tensor cores (flash_hopper.h and gradients_hopper.h, flash.h).
 * The rest is plain: a warp for each query and head, its lanes sharing the head's numbers; long
 * sights are split among warps and joined in order. The way back has no sums in an order of chance:
 * one pass over keys for each query gives dq, one over queries for each key dk and dv. */
#include "kernels/cuda/codes.h"
#include "kernels/cuda/flash_hopper.h"
#include "kernels/cuda/gradients_hopper.h"

#include <stdlib.h>

extern "C" {
#include "kernels/elementwise.h"
}

#define THREADS    128
#define WARPS      (THREADS / 32)
#define LANE_MOST  16 /* numbers of a head of 512 that a lane has */
#define PART_LEAST 8  /* keys of a part of a sight, at least */
#define SPLITS     32 /* such blocks at most: a lane of a warp for each */

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

/* Whether they go to Hopper's: so many rows of a tile are whole queries too. */
static bool takes_hopper(Tensor q, Tensor k, const Heads &heads, int rows) {
    return cuda_has_wgmma(q.device) && takes_flash(q, k, heads, rows, 0);
}

/* ---- forward ---- */

/* A lane has numbers 8 lane + 256 i + j (j < 8) of its head: reads of 16 bytes side by side. L
 * numbers, 8 for heads up to 256; zeros beyond the head. */
template <int D, int L>
DEVICE_FUNCTION void read_head(float (&x)[L], const PackedView &t, int64_t at, int C) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < L / 8; i++) {
        int c = 8 * lane + 256 * i;
        float part[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        if (c < C) read_up_to_8<D>(part, t, at + c, at + C);
#pragma unroll
        for (int j = 0; j < 8; j++) x[8 * i + j] = part[j];
    }
}

/* The same of heads that are eights and can be read so, and beyond the head what its first lane
 * has. Code that runs once for a token takes as long as it is: this is shorter. */
template <int D, int L>
DEVICE_FUNCTION void read_whole(float (&x)[L], const PackedView &t, int64_t at, int C) {
#pragma unroll
    for (int i = 0; i < L / 8; i++) {
        int c = 8 * (threadIdx.x % 32) + 256 * i;
        float part[8];
        at += c < C ? c : 0;
        if constexpr (D == F32)
            load(part, (const float *)t.data + at);
        else if constexpr (D == BF16)
            load(part, (const bf16 *)t.data + at);
        else
            read8<D>(part, t, at);
        at -= c < C ? c : 0;
#pragma unroll
        for (int j = 0; j < 8; j++) x[8 * i + j] = part[j];
    }
}

template <int L> DEVICE_FUNCTION float head_dot(const float (&a)[L], const float (&b)[L]) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < L; i++) sum += a[i] * b[i];
    return warp_sum(sum);
}

template <typename T, int L>
DEVICE_FUNCTION void write_head(T *p, const float (&x)[L], float factor, int C) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < L; i++) {
        int c = 8 * lane + 256 * (i / 8) + i % 8;
        if (c < C) p[c] = from_float<T>(x[i] * factor);
    }
}

/* What a warp has seen of its query's sight: results, over `total`, under the largest score. */
template <int L> struct Seen { float out[L], top, total; };

/* Keys begin .. end - 1 of query n's sequence, for one of its heads; a warp has a few under way. */
template <int D, bool WHOLE, int L>
DEVICE_FUNCTION void look_at(Seen<L> &seen, const float (&query)[L], const PackedView &k,
                             const PackedView &v, const Heads &heads, const Sight &see, int64_t n,
                             int kv, int begin, int end) {
    constexpr int AT_ONCE = WHOLE && L > 8 ? 2 : 4;
    int C = heads.C, width = heads.K * C;
    const int32_t *pages = see.pages ? see.pages + see.sequence[n] * see.columns : NULL;
    seen.top = -INFINITY;
    seen.total = 0;
#pragma unroll
    for (int i = 0; i < L; i++) seen.out[i] = 0;
#pragma unroll 1
    for (int s = begin; s < end; s += AT_ONCE) {
        float keys[AT_ONCE][L], values[AT_ONCE][L], scores[AT_ONCE], best = seen.top;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            unsigned key = s + i < end ? s + i : s;
            if (pages) key = (unsigned)pages[key / PAGE_KEYS] * PAGE_KEYS + key % PAGE_KEYS;
            int64_t at = (int64_t)key * width + kv * C;
            if constexpr (WHOLE) {
                read_whole<D>(keys[i], k, at, C);
                read_whole<D>(values[i], v, at, C);
            } else {
                read_head<D>(keys[i], k, at, C);
                read_head<D>(values[i], v, at, C);
            }
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            scores[i] = head_dot(query, keys[i]);
            if (s + i >= end) scores[i] = -INFINITY;
            best = fmaxf(best, scores[i]);
        }
        float fade = quick_exp(seen.top - best);
        seen.total *= fade;
        seen.top = best;
#pragma unroll
        for (int i = 0; i < L; i++) seen.out[i] *= fade;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            float weight = quick_exp(scores[i] - seen.top);
            seen.total += weight;
#pragma unroll
            for (int j = 0; j < L; j++) seen.out[j] += weight * values[i][j];
        }
    }
}

/* A warp for each query and head. */
template <typename T, int D, int L>
static __global__ void __launch_bounds__(THREADS)
    attend(T *y, float *lse, PackedView q, PackedView k, PackedView v, Heads heads, Sight see) {
    wait_for_last();
    int64_t item = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
    if (item >= heads.N * heads.H) return; /* whole warps; nothing below waits for other warps */
    int64_t n = item / heads.H;
    float query[L];
    Seen<L> seen;
    read_head<sizeof(T) == 2 ? BF16 : F32>(query, q, item * heads.C, heads.C);
    look_at<D, false>(seen, query, k, v, heads, see, n, (int)(item % heads.H) / heads.group,
                      see.first[n], see.last[n] + 1);
    write_head(y + item * heads.C, seen.out, 1.0f / seen.total, heads.C);
    if (threadIdx.x % 32 == 0) lse[item] = seen.top + logf(seen.total);
}

/* Warps of a block that share a sight of heads of which a lane has L numbers. */
template <int L> __host__ __device__ constexpr int apart_of() {
    return L > 8 ? 8 : 16;
}

/* Results of parts of a sight, each `stride` behind the last: results, then their largest score and
 * the sum under it. */
struct Parts {
    const float *first;
    int64_t stride;
    int count;
};

/* Parts joined, in order, by all threads of a block: write(column, result over `total`), whole
 * warps of columns where C is a multiple of 32. */
template <typename Write> DEVICE_FUNCTION void join_parts(const Parts &parts, int C, Write write) {
    __shared__ float weights[32], all[2];
    if (threadIdx.x < 32) {
        int p = threadIdx.x;
        const float *mine = parts.first + p * parts.stride + C;
        float own = p < parts.count ? mine[0] : -INFINITY, top = warp_max(own);
        float weight = quick_exp(own - (top == -INFINITY ? 0.0f : top));
        float total = warp_sum(p < parts.count ? weight * mine[1] : 0.0f);
        weights[p] = weight;
        if (!p) all[0] = top, all[1] = total;
    }
    __syncthreads();
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        float sum = 0;
#pragma unroll 4
        for (int p = 0; p < parts.count; p++) sum += weights[p] * parts.first[p * parts.stride + c];
        write(c, sum, all[0], all[1]);
    }
}

/* A sight is long or queries are few: a block for part blockIdx.y of what head blockIdx.x of query
 * blockIdx.z sees, each of its warps has a part of that. The block that comes last joins what all
 * have seen. */
template <typename T, int D, int L>
static __global__ void __launch_bounds__(32 * apart_of<L>())
    attend_apart(T *y, float *lse, Codes codes, float *partial, int *counters, PackedView q,
                 PackedView k, PackedView v, Heads heads, Sight see) {
    constexpr int APART = apart_of<L>();
    wait_for_last();
    __shared__ float own[APART][32 * L + 2];
    __shared__ bool last;
    int C = heads.C, lane = threadIdx.x % 32, warp = threadIdx.x / 32, n = blockIdx.z;
    int item = n * heads.H + (int)blockIdx.x, items = (int)(heads.N * heads.H);
    int end = see.last[n] + 1, begin = see.first[n], parts = (int)gridDim.y * APART;
    float query[L];
    Seen<L> seen;
    read_whole<sizeof(T) == 2 ? BF16 : F32>(query, q, (int64_t)item * C, C);
#pragma unroll
    for (int i = 0; i < L; i++)
        if (8 * lane + 256 * (i / 8) >= C) query[i] = 0;
    int each = PART_LEAST, blocks = 1; /* that have any keys */
    if (end - begin > PART_LEAST * APART) {
        each = max((end - begin + parts - 1) / parts, PART_LEAST);
        blocks = (end - begin + each * APART - 1) / (each * APART);
    }
    if ((int)blockIdx.y >= blocks) return;
    begin += ((int)blockIdx.y * APART + warp) * each;
    end = min(end, begin + each);
    look_at<D, true>(seen, query, k, v, heads, see, n, (int)blockIdx.x / heads.group, begin, end);
    write_head(own[warp], seen.out, 1.0f, C);
    if (!lane) own[warp][C] = seen.top, own[warp][C + 1] = seen.total;
    __syncthreads();
    Parts parts_seen = {own[0], 32 * L + 2, APART};
    if (blocks > 1) {
        float *mine = partial + ((int64_t)blockIdx.y * items + item) * (C + 2);
        join_parts(parts_seen, C, [&](int c, float sum, float top, float total) {
            mine[c] = sum;
            if (!c) mine[C] = top, mine[C + 1] = total;
        });
        __threadfence();
        __syncthreads();
        if (!threadIdx.x) last = is_last(counters + item, blocks);
        __syncthreads();
        if (!last) return;
        __threadfence();
        parts_seen = Parts{partial + (int64_t)item * (C + 2), (int64_t)items * (C + 2), blocks};
    }
    join_parts(parts_seen, C, [&](int c, float sum, float top, float total) {
        const float result[1] = {rounded<T>(sum * quick_inverse(total))};
        int64_t at = (int64_t)item * C + c;
        y[at] = from_float<T>(result[0]);
        if (codes.scales) store_codes(codes, at, result, true);
        if (!c) lse[item] = top + logf(total);
    });
}

static void launch_hopper(Tensor y, Tensor lse, Tensor q, Tensor k, Tensor v, Heads heads,
                          Sight see) {
    int queries = SEEN_ROWS / heads.group;
    unsigned tiles = (unsigned)ceil_div(heads.N, queries), K = (unsigned)heads.K;
    bool paired = heads.C == 512;
    SeenMaps maps = {};
    maps.rows = cuda_tile_map(q.data, heads.N, heads.H, heads.C, heads.group,
                              paired ? queries / PAIR : queries);
    maps.results = cuda_tile_map(y.data, heads.N, heads.H, heads.C, heads.group, 64 / heads.group);
    maps.keys = cuda_tile_map(k.data, 1, heads.S, K * heads.C, SEEN_KEYS);
    maps.values = cuda_tile_map(v.data, 1, heads.S, K * heads.C, paired ? UNIT_VALUES : SEEN_KEYS);
    if (paired)
        LAUNCH_PAIRS(q.device, (hopper_forward_512), dim3(PAIR * tiles, K), BROUGHT_THREADS,
                     sizeof(Seen512), data_of<float>(lse), maps, heads, see);
    else
        LAUNCH(q.device, (hopper_forward_256), dim3(tiles, K), BROUGHT_THREADS, sizeof(Seen256),
               data_of<float>(lse), maps, heads, see);
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

template <typename T, int D, int L>
static void launch_plain(Tensor y, Tensor lse, Codes codes, float *partial, int *counters, Tensor q,
                         Tensor k, Tensor v, Heads heads, Sight see, unsigned parts) {
    int64_t items = heads.N * heads.H;
    if (partial)
        LAUNCH_NEXT(q.device, (attend_apart<T, D, L>),
                    dim3((unsigned)heads.H, parts, (unsigned)heads.N), 32 * apart_of<L>(),
                    data_of<T>(y), data_of<float>(lse), codes, partial, counters, view_of(q),
                    view_of(k), view_of(v), heads, see);
    else
        LAUNCH_NEXT(q.device, (attend<T, D, L>), (unsigned)ceil_div(items, WARPS), THREADS,
                    data_of<T>(y), data_of<float>(lse), view_of(q), view_of(k), view_of(v), heads,
                    see);
}

extern "C" void cuda_attention_forward(Tensor y, Tensor lse, Tensor codes, Tensor q, Tensor k,
                                       Tensor v, Tensor index, Tensor first, Tensor last,
                                       Tensor sequence, Tensor pages) {
    (void)index;
    Heads heads = heads_of(q, k);
    Sight see = {data_of<int32_t>(first), data_of<int32_t>(last), data_of<int32_t>(sequence),
                 data_of<int32_t>(pages), pages.data ? tensor_cols(pages) : 0};
    if (!heads.N) return;
    size_t bytes = flash_forward_bytes(heads.C);
    bool many = !pages.data || heads.N * heads.group >= PAGED_ROWS;
    Codes to = codes.data ? codes_in(codes.data, tensor_count(y)) : Codes{};
    bool hopper = many && takes_hopper(q, k, heads, SEEN_ROWS / PAIR);
    if (hopper || (many && takes_flash(q, k, heads, FORWARD_ROWS, bytes))) {
        if (hopper)
            launch_hopper(y, lse, q, k, v, heads, see);
        else
            launch_flash(y, lse, q, k, v, heads, see, bytes);
        if (to.scales) round_activations(q.device, to, y);
        return;
    }
    int64_t items = heads.N * heads.H, longest = pages.data ? see.columns * PAGE_KEYS : heads.S;
    /* Few queries: more warps than queries. */
    int apart_warps = heads.C > 256 ? apart_of<LANE_MOST>() : apart_of<8>();
    int64_t parts = ceil_div(longest, PART_LEAST * apart_warps),
            most = ceil_div(16 / apart_warps * (int64_t)cuda_processors(q.device), items);
    if (parts > most) parts = most;
    if (parts > SPLITS) parts = SPLITS;
    auto whole = [](Tensor t) { return dtype_is_packed(t.dtype) || (uintptr_t)t.data % 16 == 0; };
    bool apart = most > 1 && heads.C % 8 == 0 && whole(q) && whole(k) && whole(v),
         coded = apart && heads.C % 32 == 0;
    float *partial =
        apart ? (float *)cuda_workspace(q.device, (size_t)(parts * items * (heads.C + 2)) * 4)
              : NULL;
    int *counters = apart ? cuda_counters(q.device, items) : NULL;
    WITH_FLOAT(q.dtype, T, WITH_CACHE(k.dtype, D, {
                   if (heads.C <= 256)
                       launch_plain<T, D, 8>(y, lse, coded ? to : Codes{}, partial, counters, q, k,
                                             v, heads, see, (unsigned)parts);
                   else
                       launch_plain<T, D, LANE_MOST>(y, lse, coded ? to : Codes{}, partial,
                                                     counters, q, k, v, heads, see,
                                                     (unsigned)parts);
               }));
    if (to.scales && !coded) round_activations(q.device, to, y);
}

/* ---- backward ---- */

/* delta[n, h] = <dy, y>. */
template <typename T, int L>
static __global__ void __launch_bounds__(THREADS)
    row_deltas(float *delta, PackedView dy, PackedView y, int64_t items, int C) {
    constexpr int D = sizeof(T) == 2 ? BF16 : F32;
    int64_t item = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (item >= items) return;
    float a[L], b[L];
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
    LAUNCH(device, (find_queries), tiles, FLASH_THREADS, 0, ranges, heads, see, FLASH_KEYS);
    LAUNCH(device, (flash_keys_backward<C>), dim3(tiles, (unsigned)heads.K), FLASH_THREADS, bytes,
           data_of<float>(dk), data_of<float>(dv), data_of<bf16>(dy), delta, data_of<float>(lse),
           data_of<bf16>(q), data_of<bf16>(k), data_of<bf16>(v), ranges, heads, see);
    LAUNCH(device, (flash_rows_backward<C>), dim3(rows, (unsigned)heads.K), FLASH_THREADS, bytes,
           data_of<bf16>(dq), data_of<bf16>(dy), delta, data_of<float>(lse), data_of<bf16>(q),
           data_of<bf16>(k), data_of<bf16>(v), heads, see);
}

/* Elements of the weights, and of the slopes, that are there at a time: all queries' where they are
 * not more. */
#define SLAB_MOST ((int64_t)256 << 20)
static int64_t slab_most() {
#ifndef __CUDACC__
    const char *few = getenv("LAPIDARY_SIMT_SLAB"); /* so that small shapes have several slabs */
    if (few) return atoll(few);
#endif
    return SLAB_MOST;
}

/* Memory of the way back: the spans of all tiles of rows, a slab's weights and slopes, (K,
 * slab_tiles * HOPPER_ROWS, width) each, and partial dk and dv. */
struct GradientPlan {
    int64_t tiles, slab_tiles, width, parts;
    size_t spans_bytes, slab_bytes, parts_bytes;
};

/* Parts that the rows which see a tile of keys are taken in, so many blocks each: enough for all
 * processors twice over, or one less where the last of them would leave most idle. */
static int64_t parts_for(int64_t blocks, int64_t processors) {
    auto used = [=](int64_t parts) {
        return (double)(parts * blocks) /
               (double)(ceil_div(parts * blocks, processors) * processors);
    };
    int64_t parts = ceil_div(2 * processors, blocks);
    if (parts > 1 && used(parts - 1) > used(parts) + 0.05) parts--;
    return parts < 8 ? parts : 8;
}

static GradientPlan plan_gradients(const Device *device, const Heads &heads) {
    GradientPlan p = {};
    p.width = slab_width(heads);
    p.tiles = ceil_div(heads.N * heads.group, HOPPER_ROWS);
    int64_t one = heads.K * HOPPER_ROWS * p.width, most = slab_most() / one;
    p.slab_tiles = most < 1 ? 1 : most < p.tiles ? most : p.tiles;
    int64_t blocks = ceil_div(heads.S, HOPPER_ROWS) * heads.K * 2 * heads.C / HOPPER_COLUMNS;
    p.parts = parts_for(blocks, cuda_processors(device));
    p.spans_bytes = ((size_t)p.tiles * 2 * sizeof(int) + 255) / 256 * 256;
    p.slab_bytes = (size_t)(p.slab_tiles * one) * sizeof(bf16);
    p.parts_bytes =
        p.parts > 1 ? (size_t)(p.parts * heads.S * heads.K * heads.C) * sizeof(float) : 0;
    return p;
}

template <int C>
static void launch_hopper_backward(const Device *device, GradientSides sides, Write write,
                                   char *memory, const GradientPlan &plan, Heads heads, Sight see) {
    int *spans = (int *)memory;
    bf16 *weights = (bf16 *)(memory + plan.spans_bytes),
         *slopes = (bf16 *)(memory + plan.spans_bytes + plan.slab_bytes);
    float *partial = (float *)(memory + plan.spans_bytes + 2 * plan.slab_bytes), *dk = sides.dk,
          *dv = sides.dv;
    int group_bits = 0;
    while (1 << group_bits < heads.group) group_bits++; /* a power of two: it divides HOPPER_ROWS */
    unsigned K = (unsigned)heads.K, key_tiles = (unsigned)ceil_div(heads.S, HOPPER_ROWS) * K;
    if (plan.parts > 1) {
        sides.dk = partial;
        sides.dv = partial + plan.parts_bytes / sizeof(float);
    }
    LAUNCH(device, (find_spans), (unsigned)ceil_div(plan.tiles, THREADS / 32), THREADS, 0, spans,
           heads, see, plan.tiles);
    for (int64_t first = 0; first < plan.tiles; first += plan.slab_tiles) {
        int64_t tiles = plan.tiles - first < plan.slab_tiles ? plan.tiles - first : plan.slab_tiles;
        Slab slab = {spans + 2 * first, first * (HOPPER_ROWS / heads.group), (int)tiles, group_bits,
                     first > 0 || (plan.parts == 1 && write == ADD)};
        int64_t rows = K * tiles * HOPPER_ROWS;
        int queries = HOPPER_DEPTH / heads.group;
        SlopeMaps maps = {};
        maps.rows[0] = cuda_tile_map(sides.q, heads.N, heads.H, C, heads.group, 2 * queries);
        maps.rows[1] = cuda_tile_map(sides.dy, heads.N, heads.H, C, heads.group, 2 * queries);
        maps.keys[0] = cuda_tile_map(sides.k, 1, heads.S, heads.K * C, HOPPER_COLUMNS);
        maps.keys[1] = cuda_tile_map(sides.v, 1, heads.S, heads.K * C, HOPPER_COLUMNS);
        maps.results[0] = cuda_tile_map(weights, 1, rows, plan.width, 64);
        maps.results[1] = cuda_tile_map(slopes, 1, rows, plan.width, 64);
        LAUNCH(device, (attention_slopes<C>), dim3(SLOPE_BLOCKS, (unsigned)tiles, K),
               BROUGHT_THREADS, sizeof(SlopeMemory), sides, maps, heads, see, slab);
        GradientMaps of_rows = {}, of_keys = {};
        of_rows.left[0] = cuda_tile_map(slopes, 1, rows, plan.width, HOPPER_ROWS);
        of_rows.right[0] = cuda_tile_map(sides.k, 1, heads.S, heads.K * C, HOPPER_DEPTH);
        of_keys.left[0] = cuda_tile_map(slopes, 1, rows, plan.width, HOPPER_DEPTH);
        of_keys.left[1] = cuda_tile_map(weights, 1, rows, plan.width, HOPPER_DEPTH);
        of_keys.right[0] = cuda_tile_map(sides.q, heads.N, heads.H, C, heads.group, queries);
        of_keys.right[1] = cuda_tile_map(sides.dy, heads.N, heads.H, C, heads.group, queries);
        LAUNCH(device, (query_products<C>), dim3(C / HOPPER_COLUMNS, (unsigned)tiles, K),
               BROUGHT_THREADS, sizeof(GradientMemory), sides, of_rows, heads, slab);
        LAUNCH(device, (key_products<C>),
               dim3(2 * C / HOPPER_COLUMNS, key_tiles, (unsigned)plan.parts), BROUGHT_THREADS,
               sizeof(GradientMemory), sides, of_keys, heads, slab);
    }
    int64_t count = heads.S * heads.K * heads.C; /* a multiple of 256 */
    if (plan.parts > 1)
        LAUNCH_NEXT(device, (join_gradients), grid_for(device, count / 2, 256), 256, dk, dv, write,
                    partial, count, (int)plan.parts);
}

extern "C" void cuda_attention_backward(Tensor dq, Tensor dk, Tensor dv, Write write, Tensor dy,
                                        Tensor y, Tensor lse, Tensor q, Tensor k, Tensor v,
                                        Tensor index, Tensor first, Tensor last, Tensor partial) {
    (void)index, (void)partial;
    Heads heads = heads_of(q, k);
    Sight see = {data_of<int32_t>(first), data_of<int32_t>(last), NULL, NULL, 0};
    int64_t items = heads.N * heads.H, each = THREADS / 32;
    bool hopper = items && takes_hopper(q, k, heads, HOPPER_DEPTH);
    if (write == SET && !hopper) { /* which has to read them for nothing else */
        cuda_fill(dk, 0.0f);
        cuda_fill(dv, 0.0f);
    }
    if (!items) return;
    size_t delta_bytes = ((size_t)items * sizeof(float) + 255) / 256 * 256;
    size_t range_bytes =
        ((size_t)ceil_div(heads.S, FLASH_KEYS) * 2 * sizeof(int) + 255) / 256 * 256;
    GradientPlan plan = {};
    if (hopper) plan = plan_gradients(q.device, heads);
    char *memory = (char *)cuda_workspace(
        q.device,
        delta_bytes +
            (hopper ? plan.spans_bytes + 2 * plan.slab_bytes + 2 * plan.parts_bytes : range_bytes));
    float *delta = (float *)memory;
    int *ranges = (int *)(memory + delta_bytes);
    WITH_FLOAT(q.dtype, T, {
        if (heads.C <= 256)
            LAUNCH(q.device, (row_deltas<T, 8>), (unsigned)ceil_div(items, each), THREADS, 0, delta,
                   view_of(dy), view_of(y), items, heads.C);
        else
            LAUNCH(q.device, (row_deltas<T, LANE_MOST>), (unsigned)ceil_div(items, each), THREADS,
                   0, delta, view_of(dy), view_of(y), items, heads.C);
    });
    if (hopper) {
        GradientSides sides = {
            data_of<bf16>(dq),   data_of<float>(dk), data_of<float>(dv), data_of<bf16>(dy), delta,
            data_of<float>(lse), data_of<bf16>(q),   data_of<bf16>(k),   data_of<bf16>(v)};
        if (heads.C == 256)
            launch_hopper_backward<256>(q.device, sides, write, memory + delta_bytes, plan, heads,
                                        see);
        else
            launch_hopper_backward<512>(q.device, sides, write, memory + delta_bytes, plan, heads,
                                        see);
        return;
    }
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
