/* quantize.cu - training through rounding, and keys and values stored in blocks. What happens once,
 * when files are read or written, is done by the host. */
#include "kernels/cuda/packed.h"

extern "C" {
#include "kernels/elementwise.h"
#include "kernels/quantize.h"
}

/* ---- scales ---- */

/* Round to nearest, ties to even, as the host's _Float16 does. */
DEVICE_FUNCTION uint16_t to_f16(float x) {
    unsigned u = __float_as_uint(x), sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
    if (rest > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
    if (rest >= 0x477ff000u) return (uint16_t)(sign | 0x7c00); /* rounds to infinity */
    if (rest < 0x38800000u) /* subnormal: adding 0.5 leaves its bits, rounded, at the low end */
        return (uint16_t)(sign | (__float_as_uint(__fadd_rn(__uint_as_float(rest), 0.5f)) -
                                  __float_as_uint(0.5f)));
    rest -= 112u << 23;
    return (uint16_t)(sign | (rest + 0xfff + (rest >> 13 & 1)) >> 13);
}
DEVICE_FUNCTION float f16_rounded(float x) {
    return f16_value(to_f16(x));
}

/* bf16, as the file has it; the smallest as f16 has them. */
DEVICE_FUNCTION float round_scale(float scale) {
    return f16_rounded(rounded<bf16>(scale));
}
DEVICE_FUNCTION float inverse_of(float d) {
    return d != 0 ? __fdiv_rn(1.0f, d) : 0.0f;
}

/* How one block is rounded: see kernels/cpu/quantize.c. */
struct Rule {
    float scale, inverse, base;
    int low, high;
};

/* `most`: the largest magnitude of the block, with its sign where the scheme wants it. */
DEVICE_FUNCTION Rule rule_of(float most, QuantScheme scheme, const float *factor) {
    float d, base;
    switch (scheme) {
    case SCHEME_Q4_0:
        base = most / -8.0f;
        d = factor ? base * *factor : base;
        return Rule{f16_rounded(d), inverse_of(d), base, -8, 7};
    case SCHEME_Q8_0:
        d = __fdiv_rn(most, 127.0f);
        return Rule{f16_rounded(d), inverse_of(d), d, -127, 127};
    case SCHEME_INT8:
        d = round_scale(__fdiv_rn(most, 127.5f));
        return Rule{d, inverse_of(d), d, -128, 127};
    default:
        d = round_scale(__fdiv_rn(most, 7.5f));
        return Rule{d, inverse_of(d), d, -8, 7};
    }
}

DEVICE_FUNCTION int code_of(float x, const Rule &r, QuantScheme scheme) {
    if (scheme == SCHEME_Q4_0) {
        float scaled = __fadd_rn(__fmul_rn(x, r.inverse), 8.5f);
        return scaled < 0 ? -9 : scaled > 100 ? 92 : (int)scaled - 8;
    }
    if (scheme == SCHEME_Q8_0) return (int)roundf(__fmul_rn(x, r.inverse));
    return r.scale != 0 ? (int)rintf(__fdiv_rn(x, r.scale)) : 0;
}
DEVICE_FUNCTION int hold(int code, const Rule &r) {
    return code < r.low ? r.low : code > r.high ? r.high : code;
}

/* Over a warp: the largest magnitude of x, with the sign of the first that has it. */
DEVICE_FUNCTION float signed_largest(float x) {
    int at = threadIdx.x % 32;
#pragma unroll
    for (int d = 16; d; d >>= 1) {
        float other = __shfl_xor_sync(0xffffffffu, x, d);
        int place = __shfl_xor_sync(0xffffffffu, at, d);
        bool more = fabsf(other) > fabsf(x) || (fabsf(other) == fabsf(x) && place < at);
        if (more) x = other, at = place;
    }
    return x;
}

/* ---- training through a scheme ---- */

/* Elements of any float or packed dtype, one at a time. */
template <int D> DEVICE_FUNCTION float read1(const PackedView &t, int64_t i) {
    if constexpr (D == F32) return ((const float *)t.data)[i];
    if constexpr (D == BF16) return to_float(((const bf16 *)t.data)[i]);
    float x[8], out = 0;
    read8<D>(x, t, i / 8 * 8);
#pragma unroll
    for (int j = 0; j < 8; j++)
        if (j == i % 8) out = x[j];
    return out;
}

DEVICE_FUNCTION float blended(float x, const Rule &r, QuantScheme scheme, float blend) {
    float held = r.scale * (float)hold(code_of(x, r, scheme), r);
    return blend == 1.0f ? held : x + blend * (held - x);
}

/* The rule of a block of 32, an element to each lane of a warp. */
DEVICE_FUNCTION Rule block_rule(float x, QuantScheme scheme, const float *factor) {
    float most = signed_largest(x);
    return rule_of(scheme == SCHEME_Q4_0 ? most : fabsf(most), scheme, factor);
}

/* The rule of a row that has one scale, for all threads of a block. */
template <int D>
DEVICE_FUNCTION Rule row_rule(const PackedView &x, int64_t first, QuantScheme scheme,
                              float *space) {
    float most = 0;
    for (int64_t k = threadIdx.x; k < x.cols; k += blockDim.x)
        most = fmaxf(most, fabsf(read1<D>(x, first + k)));
    return rule_of(block_max(most, space), scheme, NULL);
}

/* Blocks of 32: a warp each, one element to a lane. */
template <typename Y, int D>
static __global__ void round_blocks(Y *y, PackedView x, const float *factors, QuantScheme scheme,
                                    float blend, int64_t blocks) {
    int lane = threadIdx.x % 32;
    for (int64_t b = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32; b < blocks;
         b += (int64_t)gridDim.x * blockDim.x / 32) {
        float v = read1<D>(x, b * 32 + lane);
        Rule r = block_rule(v, scheme, factors ? factors + b : NULL);
        y[b * 32 + lane] = from_float<Y>(blended(v, r, scheme, blend));
    }
}

/* One scale a row: a block each. */
template <typename Y, int D>
static __global__ void round_rows(Y *y, PackedView x, QuantScheme scheme, float blend) {
    __shared__ float space[32];
    int64_t K = x.cols, first = blockIdx.x * K;
    Rule r = row_rule<D>(x, first, scheme, space);
    for (int64_t k = threadIdx.x; k < K; k += blockDim.x)
        y[first + k] = from_float<Y>(blended(read1<D>(x, first + k), r, scheme, blend));
}

extern "C" void cuda_fake_quantize(Tensor y, Tensor x, Tensor factors, QuantScheme scheme,
                                   float blend) {
    int64_t count = tensor_count(x), K = tensor_cols(x);
    const Device *device = y.device;
    if (!count) return;
    if (!scheme_has_blocks(scheme)) { /* what stays a float; bf16 where the scheme says so */
        if (scheme == SCHEME_BF16 && y.dtype != BF16) {
            Tensor half = y;
            half.dtype = BF16;
            half.data = cuda_workspace(device, tensor_bytes(half));
            scale_copy(half, SET, x, 1.0f);
            x = half;
        }
        scale_copy(y, SET, x, 1.0f);
        return;
    }
    if (scheme == SCHEME_INT8)
        WITH_FLOAT(y.dtype, Y, WITH_ANY(x.dtype, D, {
                       LAUNCH(device, (round_rows<Y, D>), (unsigned)(count / K), 256, 0,
                              data_of<Y>(y), view_of(x), scheme, blend);
                   }));
    else
        WITH_FLOAT(y.dtype, Y, WITH_ANY(x.dtype, D, {
                       LAUNCH(device, (round_blocks<Y, D>), grid_for(device, count, 256), 256, 0,
                              data_of<Y>(y), view_of(x), data_of<float>(factors), scheme, blend,
                              count / 32);
                   }));
}

/* What one element leaves of its gradient, and adds to that of its block's factor. */
DEVICE_FUNCTION float straight_through(float *g, float x, const Rule &r, QuantScheme scheme,
                                       float blend) {
    int code = code_of(x, r, scheme), held = hold(code, r);
    float slope = *g * ((float)held - (code == held ? x * r.inverse : 0.0f));
    if (code != held) *g *= 1.0f - blend;
    return slope;
}

template <int D>
static __global__ void round_blocks_backward(float *dx, float *dfactors, PackedView x,
                                             const float *factors, QuantScheme scheme, float blend,
                                             int64_t blocks) {
    int lane = threadIdx.x % 32;
    for (int64_t b = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32; b < blocks;
         b += (int64_t)gridDim.x * blockDim.x / 32) {
        float v = read1<D>(x, b * 32 + lane);
        Rule r = block_rule(v, scheme, factors ? factors + b : NULL);
        float sum = warp_sum(straight_through(&dx[b * 32 + lane], v, r, scheme, blend));
        if (dfactors && !lane) dfactors[b] += blend * r.base * sum;
    }
}

template <int D>
static __global__ void round_rows_backward(float *dx, PackedView x, QuantScheme scheme,
                                           float blend) {
    __shared__ float space[32];
    int64_t K = x.cols, first = blockIdx.x * K;
    Rule r = row_rule<D>(x, first, scheme, space);
    for (int64_t k = threadIdx.x; k < K; k += blockDim.x)
        straight_through(&dx[first + k], read1<D>(x, first + k), r, scheme, blend);
}

extern "C" void cuda_fake_quantize_backward(Tensor dx, Tensor dfactors, Tensor x, Tensor factors,
                                            QuantScheme scheme, float blend) {
    int64_t count = tensor_count(x), K = tensor_cols(x);
    if (!count || !scheme_has_blocks(scheme)) return;
    if (scheme == SCHEME_INT8)
        WITH_ANY(x.dtype, D, {
            LAUNCH(dx.device, (round_rows_backward<D>), (unsigned)(count / K), 256, 0,
                   data_of<float>(dx), view_of(x), scheme, blend);
        })
    else
        WITH_ANY(x.dtype, D, {
            LAUNCH(dx.device, (round_blocks_backward<D>), grid_for(dx.device, count, 256), 256, 0,
                   data_of<float>(dx), data_of<float>(dfactors), view_of(x),
                   data_of<float>(factors), scheme, blend, count / 32);
        })
}

template <typename T> static __global__ void round_row(T *y, const T *x, int64_t K) {
    __shared__ float space[32];
    int64_t first = blockIdx.x * K;
    float most = 0;
    for (int64_t k = threadIdx.x; k < K; k += blockDim.x)
        most = fmaxf(most, fabsf(to_float(x[first + k])));
    float d = __fdiv_rn(block_max(most, space), 127.0f), inverse = inverse_of(d);
    for (int64_t k = threadIdx.x; k < K; k += blockDim.x)
        y[first + k] = from_float<T>(d * rintf(__fmul_rn(to_float(x[first + k]), inverse)));
}

extern "C" void cuda_fake_quantize_rows(Tensor y, Tensor x) {
    if (!tensor_count(x)) return;
    CHECK(y.dtype == x.dtype, "fake_quantize_rows: %s from %s", tensor_text(y), tensor_text(x));
    WITH_FLOAT(x.dtype, T, {
        LAUNCH(x.device, (round_row<T>), (unsigned)tensor_rows(x), 256, 0, data_of<T>(y),
               data_of<T>(x), tensor_cols(x));
    });
}

/* ---- keys and values ---- */

template <typename T>
static __global__ void move_rows(T *y, const T *x, const int32_t *rows, int64_t N, int64_t K) {
    wait_for_last();
    FOR_GRID(i, N * K) y[rows[i / K] * K + i % K] = x[i];
}

/* ggml's reference quantisers, a warp a block. */
template <typename T, bool FOUR>
static __global__ void pack_rows(void *y, const T *x, const int32_t *rows, int64_t N, int64_t K) {
    int lane = threadIdx.x % 32;
    for (int64_t b = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32; b < N * K / 32;
         b += (int64_t)gridDim.x * blockDim.x / 32) {
        int64_t n = b / (K / 32), to = rows[n] * (K / 32) + b % (K / 32);
        float v = to_float(x[b * 32 + lane]), most = signed_largest(v);
        float d = FOUR ? most / -8.0f : __fdiv_rn(fabsf(most), 127.0f), inverse = inverse_of(d);
        if (FOUR) {
            int code = (int)__fadd_rn(__fmul_rn(v, inverse), 8.5f);
            code = code > 15 ? 15 : code < 0 ? 0 : code;
            int high = __shfl_xor_sync(0xffffffffu, code, 16);
            BlockQ4_0 *out = (BlockQ4_0 *)y + to;
            if (!lane) out->d = to_f16(d);
            if (lane < 16) out->qs[lane] = (uint8_t)(code | high << 4);
        } else {
            BlockQ8_0 *out = (BlockQ8_0 *)y + to;
            if (!lane) out->d = to_f16(d);
            out->qs[lane] = (int8_t)roundf(__fmul_rn(v, inverse));
        }
    }
}

extern "C" void cuda_store_rows(Tensor y, Tensor x, Tensor rows) {
    int64_t N = x.shape[0], K = N ? tensor_count(x) / N : 0;
    const Device *device = x.device;
    unsigned grid = grid_for(device, N * K, 256);
    const int32_t *to = data_of<int32_t>(rows);
    if (!N) return;
    if (y.dtype == x.dtype)
        WITH_FLOAT(x.dtype, T, {
            LAUNCH_NEXT(device, (move_rows<T>), grid, 256, data_of<T>(y), data_of<T>(x), to, N, K);
        });
    else if (y.dtype == Q4_0)
        WITH_FLOAT(x.dtype, T, {
            LAUNCH(device, (pack_rows<T, true>), grid, 256, 0, y.data, data_of<T>(x), to, N, K);
        });
    else
        WITH_FLOAT(x.dtype, T, {
            LAUNCH(device, (pack_rows<T, false>), grid, 256, 0, y.data, data_of<T>(x), to, N, K);
        });
}

/* ---- checks ---- */

template <int D> static __global__ void find_bad(int *bad, PackedView x, int64_t count) {
    int here = 0;
    FOR_GRID(i, (count + 7) / 8) {
        float v[8];
        read_up_to_8<D>(v, x, 8 * i, count);
#pragma unroll
        for (int j = 0; j < 8; j++) here |= !(fabsf(v[j]) < 65504.0f * 7.0f);
    }
    if (here) *bad = 1; /* whoever writes, writes the same */
}

extern "C" void cuda_check_finite(bool *finite, Tensor x) {
    int64_t count = tensor_count(x);
    int bad = 0, *flag = (int *)cuda_workspace(x.device, sizeof(int));
    cuda_check(cudaMemsetAsync(flag, 0, sizeof(int), cuda_stream(x.device)), "check_finite");
    if (count)
        WITH_ANY(x.dtype, D, {
            LAUNCH(x.device, (find_bad<D>), grid_for(x.device, (count + 7) / 8, 256), 256, 0, flag,
                   view_of(x), count);
        })
    device_copy(device_cpu(), &bad, x.device, flag, sizeof(int));
    *finite = !bad;
}

/* ---- what the host does ---- */

/* A twin on the host with the values of t. */
static Tensor fetched(Tensor t) {
    if (!tensor_present(t)) return t;
    Tensor host = t;
    host.device = device_cpu();
    host.data = device_allocate(device_cpu(), tensor_bytes(t));
    CHECK(host.data, "no memory for %s on the host", tensor_text(t));
    tensor_read(host.data, t);
    return host;
}

static void drop(Tensor host) {
    if (host.data) device_release(device_cpu(), host.data, tensor_bytes(host));
}

static void send_back(Tensor to, Tensor host) {
    tensor_write(to, host.data);
    drop(host);
}

extern "C" void cuda_quantize(Tensor packed, Tensor x) {
    Tensor from = fetched(x), to = fetched(packed);
    quantize(to, from);
    send_back(packed, to);
    drop(from);
}

extern "C" void cuda_repack(Tensor y, Tensor x) {
    Tensor from = fetched(x), to = fetched(y);
    repack(to, from);
    send_back(y, to);
    drop(from);
}

extern "C" void cuda_quantize_scheme(Tensor packed, Tensor x, Tensor factors, QuantScheme scheme) {
    Tensor from = fetched(x), to = fetched(packed), scales = fetched(factors);
    quantize_scheme(to, from, scales, scheme);
    send_back(packed, to);
    drop(from);
    drop(scales);
}
