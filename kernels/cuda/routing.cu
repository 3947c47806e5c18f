/* routing.cu - router softmax and top-A, the sorted order, and the weighted join. */
#include "kernels/cuda/cuda.h"

extern "C" {
#include "kernels/routing.h"
}

#define EXPERTS 1024 /* the most there can be */
#define SORTERS 32   /* warps that look for an expert's rows: a lane for each */

/* ---- the router: a warp a row, its probabilities in shared memory ---- */

#define ROUTER_ROWS 4

template <typename T>
static __global__ void choose(float *probs, float *share, int32_t *experts, const T *logits,
                              int64_t N, int E, int A) {
    DYNAMIC_SHARED(memory);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int64_t n = (int64_t)blockIdx.x * ROUTER_ROWS + warp;
    bool here = n < N;
    float *left = (float *)memory + warp * E; /* what has not been chosen yet */
    float top = -INFINITY, sum = 0, total = 0;
    for (int e = lane; here && e < E; e += 32) top = fmaxf(top, to_float(logits[n * E + e]));
    top = warp_max(top);
    for (int e = lane; here && e < E; e += 32)
        sum += left[e] = expf(to_float(logits[n * E + e]) - top);
    sum = warp_sum(sum);
    for (int e = lane; here && e < E; e += 32) probs[n * E + e] = left[e] = left[e] / sum;
    for (int a = 0; a < A; a++) {
        float best = -1;
        int at = E;
        __syncwarp();
        for (int e = lane; here && e < E; e += 32)
            if (left[e] > best) best = left[e], at = e;
#pragma unroll
        for (int d = 16; d; d >>= 1) {
            float other = __shfl_xor_sync(0xffffffffu, best, d);
            int place = __shfl_xor_sync(0xffffffffu, at, d);
            if (other > best || (other == best && place < at)) best = other, at = place;
        }
        __syncwarp(); /* all lanes have read what is left */
        if (!here || lane) continue;
        left[at] = -1;
        experts[n * A + a] = at;
        share[n * A + a] = best;
    }
    __syncwarp();
    if (!here) return;
    for (int a = 0; a < A; a++) total += share[n * A + a];
    __syncwarp();
    for (int a = lane; a < A; a += 32) share[n * A + a] /= total;
}

template <typename T>
static __global__ void choose_backward(T *dlogits, const float *dshare, const float *probs,
                                       const float *share, const int32_t *experts,
                                       const float *balance, int64_t N, int E, int A) {
    int lane = threadIdx.x % 32;
    int64_t n = (int64_t)blockIdx.x * ROUTER_ROWS + threadIdx.x / 32;
    bool here = n < N;
    float mean = 0, average = 0;
    for (int a = lane; here && a < A; a += 32) mean += share[n * A + a] * dshare[n * A + a];
    mean = warp_sum(mean);
    for (int e = lane; here && balance && e < E; e += 32) average += probs[n * E + e] * balance[e];
    average = warp_sum(average);
    for (int e = lane; here && e < E; e += 32) {
        float out = balance ? probs[n * E + e] * (balance[e] - average) : 0.0f;
        for (int a = 0; a < A; a++)
            if (experts[n * A + a] == e) out += share[n * A + a] * (dshare[n * A + a] - mean);
        dlogits[n * E + e] = from_float<T>(out);
    }
}

extern "C" void cuda_router_forward(Tensor probs, Tensor share, Tensor experts, Tensor logits) {
    int64_t N = tensor_rows(logits), E = tensor_cols(logits), A = tensor_cols(share);
    if (!N) return;
    WITH_FLOAT(logits.dtype, T, {
        LAUNCH(logits.device, (choose<T>), (unsigned)ceil_div(N, ROUTER_ROWS), 32 * ROUTER_ROWS,
               (size_t)(ROUTER_ROWS * E) * sizeof(float), data_of<float>(probs),
               data_of<float>(share), data_of<int32_t>(experts), data_of<T>(logits), N, (int)E,
               (int)A);
    });
}

extern "C" void cuda_router_backward(Tensor dlogits, Tensor dshare, Tensor probs, Tensor share,
                                     Tensor experts, Tensor balance) {
    int64_t N = tensor_rows(probs), E = tensor_cols(probs), A = tensor_cols(share);
    if (!N) return;
    WITH_FLOAT(dlogits.dtype, T, {
        LAUNCH(probs.device, (choose_backward<T>), (unsigned)ceil_div(N, ROUTER_ROWS),
               32 * ROUTER_ROWS, 0, data_of<T>(dlogits), data_of<float>(dshare),
               data_of<float>(probs), data_of<float>(share), data_of<int32_t>(experts),
               data_of<float>(balance), N, (int)E, (int)A);
    });
}

/* ---- the sorted order ---- */

/* A block for each expert, whose warps have the entries between them: warp w those from w * each
 * on. visit(entry, the lanes with one of the block's expert) for 32 at a time, in order. */
template <typename Visit>
DEVICE_FUNCTION void own_entries(const int32_t *experts, int entries, Visit visit) {
    int each = (entries + 32 * SORTERS - 1) / (32 * SORTERS) * 32;
    int first = (int)threadIdx.x / 32 * each, end = min(first + each, entries);
#pragma unroll 4
    for (; first < end; first += 32) {
        int i = first + (int)threadIdx.x % 32;
        visit(i, __ballot_sync(0xffffffffu, i < end && experts[i] == (int)blockIdx.x));
    }
}

/* How many entries of its expert a warp's share has. */
DEVICE_FUNCTION int own_count(const int32_t *experts, int entries) {
    int count = 0;
    own_entries(experts, entries, [&](int, unsigned set) { count += __popc(set); });
    return count;
}

static __global__ void __launch_bounds__(32 * SORTERS)
    count_rows(int32_t *counts, const int32_t *experts, int entries) {
    __shared__ int parts[SORTERS];
    int count = own_count(experts, entries), total = 0;
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = count;
    __syncthreads();
    if (threadIdx.x) return;
    for (int w = 0; w < SORTERS; w++) total += parts[w];
    counts[blockIdx.x] = total;
}

/* By one warp. */
static __global__ void place_groups(int32_t *offsets, const int32_t *counts, int E) {
    int32_t before = 0;
    for (int base = 0; base < E; base += 32) {
        int e = base + (int)threadIdx.x, rows = e < E ? counts[e] : 0;
        rows = (rows + ROUTING_ALIGN - 1) / ROUTING_ALIGN * ROUTING_ALIGN;
        int sum = warp_running_sum(rows);
        if (e < E) offsets[e] = before + sum - rows;
        before += __shfl_sync(0xffffffffu, sum, 31);
    }
    if (!threadIdx.x) offsets[E] = before;
}

/* Rows of an expert, in order; -1 behind them up to where the next begins, or to the end. */
static __global__ void __launch_bounds__(32 * SORTERS)
    place_rows(int32_t *slot, int32_t *source, const int32_t *offsets, const int32_t *experts,
               int entries, int A, int E, int64_t M) {
    __shared__ int parts[SORTERS];
    int count = own_count(experts, entries), last = offsets[blockIdx.x], next = last;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (!lane) parts[warp] = count;
    __syncthreads();
    int sum = warp_running_sum(parts[lane]);
    next += __shfl_sync(0xffffffffu, sum, warp) - count;
    last += __shfl_sync(0xffffffffu, sum, 31);
    own_entries(experts, entries, [&](int i, unsigned set) {
        int place = next + __popc(set & ((1u << lane) - 1));
        next += __popc(set);
        if (!(set >> lane & 1)) return;
        slot[i] = place;
        source[place] = i / A;
    });
    int64_t end = (int)blockIdx.x + 1 == E ? M : offsets[blockIdx.x + 1];
    for (int64_t m = last + threadIdx.x; m < end; m += 32 * SORTERS) source[m] = -1;
}

/* All of it for few entries, in one block. */
#define ENTRIES_FEW 256

static __global__ void __launch_bounds__(ENTRIES_FEW)
    sort_few(int32_t *offsets, int32_t *counts, int32_t *slot, int32_t *source,
             const int32_t *experts, int entries, int A, int E, int64_t M) {
    __shared__ int32_t of[ENTRIES_FEW], sizes[EXPERTS], begins[EXPERTS];
    int i = threadIdx.x, before = 0;
    for (int64_t m = i; m < M; m += ENTRIES_FEW) source[m] = -1;
    if (i < entries) of[i] = experts[i];
    __syncthreads();
    for (int e = i; e < E; e += ENTRIES_FEW) {
        int count = 0;
        for (int k = 0; k < entries; k++) count += of[k] == e;
        counts[e] = count;
        sizes[e] = (count + ROUTING_ALIGN - 1) / ROUTING_ALIGN * ROUTING_ALIGN;
    }
    __syncthreads();
    if (i == 0) {
        int at = 0;
#pragma unroll 8
        for (int e = 0; e < E; e++) {
            begins[e] = at;
            at += sizes[e];
        }
        offsets[E] = at;
    }
    __syncthreads();
    for (int e = i; e < E; e += ENTRIES_FEW) offsets[e] = begins[e];
    if (i >= entries) return;
    for (int k = 0; k < i; k++) before += of[k] == of[i];
    slot[i] = begins[of[i]] + before;
    source[slot[i]] = i / A;
}

extern "C" void cuda_routing_sort(Tensor offsets, Tensor counts, Tensor slot, Tensor source,
                                  Tensor experts) {
    int64_t E = tensor_count(counts), A = tensor_cols(experts), entries = tensor_count(experts);
    const Device *device = experts.device;
    if (entries <= ENTRIES_FEW) {
        LAUNCH(device, (sort_few), 1, ENTRIES_FEW, 0, data_of<int32_t>(offsets),
               data_of<int32_t>(counts), data_of<int32_t>(slot), data_of<int32_t>(source),
               data_of<int32_t>(experts), (int)entries, (int)A, (int)E, tensor_count(source));
        return;
    }
    LAUNCH(device, (count_rows), (unsigned)E, 32 * SORTERS, 0, data_of<int32_t>(counts),
           data_of<int32_t>(experts), (int)entries);
    LAUNCH(device, (place_groups), 1, 32, 0, data_of<int32_t>(offsets), data_of<int32_t>(counts),
           (int)E);
    LAUNCH(device, (place_rows), (unsigned)E, 32 * SORTERS, 0, data_of<int32_t>(slot),
           data_of<int32_t>(source), data_of<int32_t>(offsets), data_of<int32_t>(experts),
           (int)entries, (int)A, (int)E, tensor_count(source));
}

/* ---- the join ---- */

template <typename T, typename S, int V>
static __global__ void combine(T *y, const T *rows, const int32_t *slot, const float *share,
                               const int32_t *experts, const S *scale, int64_t N, int64_t D,
                               int A) {
    FOR_GRID(i, N * (D / V)) {
        RowPack pack = row_pack(i, D / V);
        float sum[V] = {0}, a[V];
#pragma unroll 4
        for (int k = 0; k < A; k++) {
            int64_t choice = pack.row * A + k;
            float weight = share[choice] * to_float(scale[experts[choice]]);
            load(a, rows + slot[choice] * D + pack.at * V);
#pragma unroll
            for (int j = 0; j < V; j++) sum[j] += weight * a[j];
        }
        store(y + i * V, sum);
    }
}

template <typename S>
static __global__ void weigh_rows(float *weights, const int32_t *slot, const int32_t *source,
                                  const float *share, const int32_t *experts, const S *scale,
                                  int64_t entries, int64_t M) {
    FOR_GRID(i, M) {
        if (source[i] < 0) weights[i] = 0;
        if (i < entries) weights[slot[i]] = share[i] * to_float(scale[experts[i]]);
    }
}

/* A block for each expert: dscale[e] += sum of share * product over the rows it got. */
static __global__ void __launch_bounds__(256)
    add_scales(float *dscale, const float *share, const float *dweights, const int32_t *slot,
               const int32_t *experts, int64_t entries) {
    __shared__ float space[32];
    float sum = 0;
    for (int64_t i = threadIdx.x; i < entries; i += 256)
        if (experts[i] == (int)blockIdx.x) sum += share[i] * dweights[slot[i]];
    sum = block_sum(sum, space);
    if (!threadIdx.x) dscale[blockIdx.x] += sum;
}

template <typename S>
static __global__ void scale_shares(float *dshare, const float *dweights, const int32_t *slot,
                                    const int32_t *experts, const S *scale, int64_t entries) {
    FOR_GRID(i, entries) dshare[i] = dweights[slot[i]] * to_float(scale[experts[i]]);
}

extern "C" void cuda_combine_forward(Tensor y, Tensor rows, Tensor slot, Tensor share,
                                     Tensor experts, Tensor scale) {
    int64_t N = tensor_rows(y), D = tensor_cols(y), A = tensor_cols(slot);
    bool fits = fits_packs(D, y, rows);
    if (!N) return;
    WITH_FLOAT(y.dtype, T, WITH_FLOAT(scale.dtype, S, WITH_LONG_PACKS(T, D, fits, V, {
                                          LAUNCH(y.device, (combine<T, S, V>),
                                                 grid_for(y.device, N * (D / V), 256), 256, 0,
                                                 data_of<T>(y), data_of<T>(rows),
                                                 data_of<int32_t>(slot), data_of<float>(share),
                                                 data_of<int32_t>(experts), data_of<S>(scale), N, D,
                                                 (int)A);
                                      })));
}

extern "C" void cuda_row_weights(Tensor weights, Tensor slot, Tensor source, Tensor share,
                                 Tensor experts, Tensor scale) {
    int64_t entries = tensor_count(slot), M = tensor_count(source);
    if (!entries) return;
    WITH_FLOAT(scale.dtype, S, {
        LAUNCH(slot.device, (weigh_rows<S>), grid_for(slot.device, M, 256), 256, 0,
               data_of<float>(weights), data_of<int32_t>(slot), data_of<int32_t>(source),
               data_of<float>(share), data_of<int32_t>(experts), data_of<S>(scale), entries, M);
    });
}

extern "C" void cuda_row_weights_backward(Tensor dshare, Tensor dscale, Tensor dweights,
                                          Tensor slot, Tensor share, Tensor experts, Tensor scale) {
    int64_t entries = tensor_count(slot);
    const Device *device = slot.device;
    if (!entries) return;
    if (dscale.data)
        LAUNCH(device, (add_scales), (unsigned)tensor_count(dscale), 256, 0, data_of<float>(dscale),
               data_of<float>(share), data_of<float>(dweights), data_of<int32_t>(slot),
               data_of<int32_t>(experts), entries);
    WITH_FLOAT(scale.dtype, S, {
        LAUNCH(device, (scale_shares<S>), grid_for(device, entries, 256), 256, 0,
               data_of<float>(dshare), data_of<float>(dweights), data_of<int32_t>(slot),
               data_of<int32_t>(experts), data_of<S>(scale), entries);
    });
}
