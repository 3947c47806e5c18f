/* cuda.h - what the CUDA twins share: launching, both float types, sums over warps and blocks.
 *
 * The sources compile twice: by nvcc for the GPU, and by the host's compiler with
 * tests/simt/simt.h, which runs the same threads one after the other. A file holds kernel, launcher
 * and cuda_NAME, in that order. */
#ifndef CUDA_KERNELS_H
#define CUDA_KERNELS_H

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "simt.h"
#endif

#include <assert.h>
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define INLINE static inline __host__ __device__
#define _Noreturn [[noreturn]]

extern "C" {
#include "kernels/random.h"
#include "kernels/tensor.h"
}

/* ---- the device's side of the host (device.cu) ---- */

#define CUDA_DEVICES 16 /* that a program can see */

/* Makes the device the thread's own and returns the stream that all its work is on. */
cudaStream_t cuda_stream(const Device *device);

/* Ends the program with a message when a call to the device failed (give_up). */
void cuda_check(cudaError_t error, const char *what);

/* Memory of the device for partial results, at least so many bytes, good until the next call on the
 * same stream asks. Grows; a graph being recorded must have asked for as much before. */
void *cuda_workspace(const Device *device, size_t bytes);

/* So many counters of the device's, all 0 when a kernel begins and when it ends (is_last). Grows as
 * the workspace does. */
int *cuda_counters(const Device *device, int64_t count);

/* From here on nothing of this device is kept to be replayed: the host has a part in each pass. */
void cuda_never_replay(const Device *device);

/* Multiprocessors of the device, and the shared memory a block can have. */
int cuda_processors(const Device *device);
size_t cuda_shared_most(const Device *device);

/* Whether the device is a Hopper and the program has code for it (wgmma.h). The environment's
 * LAPIDARY_HOPPER=0 says no, to compare with the kernels that every GPU takes. */
bool cuda_has_wgmma(const Device *device);

/* Whether kernels can be launched before the last has ended (capability 9.0). */
bool cuda_launches_early(const Device *device);

/* LAUNCH(device, (kernel<...>), grid, block, shared bytes, arguments...) */
#define UNWRAP(...) __VA_ARGS__
#define PAIR        2 /* blocks that run at once and reach each other's shared memory */
#ifdef __CUDACC__
/* Lets the kernel take so much dynamic shared memory; asked once for each device. */
#define ALLOW_SHARED(device, kernel, shared)                                                       \
    do {                                                                                           \
        static size_t launch_shared[CUDA_DEVICES]; /* what it may take on each device */           \
        if ((shared) > 48 * 1024 && (shared) > launch_shared[(device)->index]) {                   \
            cuda_check(cudaFuncSetAttribute(UNWRAP kernel,                                         \
                                            cudaFuncAttributeMaxDynamicSharedMemorySize,           \
                                            (int)(shared)),                                        \
                       #kernel);                                                                   \
            launch_shared[(device)->index] = (shared);                                             \
        }                                                                                          \
    } while (0)
#define LAUNCH(device, kernel, grid, block, shared, ...)                                           \
    do {                                                                                           \
        cudaStream_t launch_stream = cuda_stream(device);                                          \
        ALLOW_SHARED(device, kernel, shared);                                                      \
        UNWRAP kernel<<<grid, block, shared, launch_stream>>>(__VA_ARGS__);                        \
        cuda_check(cudaGetLastError(), #kernel);                                                   \
    } while (0)
/* The same for a kernel that begins with wait_for_last(): it gets ready while the last one ends. */
#define LAUNCH_NEXT(device, kernel, grid, block, ...)                                              \
    do {                                                                                           \
        cudaLaunchAttribute launch_early = {};                                                     \
        launch_early.id = cudaLaunchAttributeProgrammaticStreamSerialization;                      \
        launch_early.val.programmaticStreamSerializationAllowed = 1;                               \
        cudaLaunchConfig_t launch_config = {};                                                     \
        launch_config.gridDim = grid;                                                              \
        launch_config.blockDim = block;                                                            \
        launch_config.stream = cuda_stream(device);                                                \
        launch_config.attrs = &launch_early;                                                       \
        launch_config.numAttrs = cuda_launches_early(device) ? 1 : 0;                              \
        cuda_check(cudaLaunchKernelEx(&launch_config, UNWRAP kernel, __VA_ARGS__), #kernel);       \
    } while (0)
/* The same in pairs of blocks (bulk.h), with dynamic shared memory. */
#define LAUNCH_PAIRS(device, kernel, grid, block, shared, ...)                                     \
    do {                                                                                           \
        cudaLaunchAttribute launch_pairs[2] = {};                                                  \
        launch_pairs[0].id = cudaLaunchAttributeClusterDimension;                                  \
        launch_pairs[0].val.clusterDim.x = PAIR;                                                   \
        launch_pairs[0].val.clusterDim.y = launch_pairs[0].val.clusterDim.z = 1;                   \
        launch_pairs[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;                   \
        launch_pairs[1].val.programmaticStreamSerializationAllowed = 1;                            \
        cudaLaunchConfig_t launch_config = {};                                                     \
        launch_config.gridDim = grid;                                                              \
        launch_config.blockDim = block;                                                            \
        launch_config.dynamicSmemBytes = shared;                                                   \
        launch_config.stream = cuda_stream(device);                                                \
        launch_config.attrs = launch_pairs;                                                        \
        launch_config.numAttrs = cuda_launches_early(device) ? 2 : 1;                              \
        ALLOW_SHARED(device, kernel, shared);                                                      \
        cuda_check(cudaLaunchKernelEx(&launch_config, UNWRAP kernel, __VA_ARGS__), #kernel);       \
    } while (0)
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#define DEVICE_FUNCTION      static __device__ __forceinline__
#define DEVICE_MEMBER        __device__ __forceinline__
#else
#define LAUNCH_BLOCKS(device, kernel, grid, block, shared, cluster, early, ...)                    \
    do {                                                                                           \
        cuda_stream(device);                                                                       \
        {                                                                                          \
            SimtUnseen launch_unseen;                                                              \
            simt_launch(#kernel, grid, block, shared, cluster, early,                              \
                        [arguments = std::make_tuple(__VA_ARGS__)] {                               \
                            std::apply([](auto... a) { UNWRAP kernel(a...); }, arguments);         \
                        });                                                                        \
        }                                                                                          \
        cuda_check(cudaGetLastError(), #kernel);                                                   \
    } while (0)
#define LAUNCH(device, kernel, grid, block, shared, ...)                                           \
    LAUNCH_BLOCKS(device, kernel, grid, block, shared, 1, false, __VA_ARGS__)
#define LAUNCH_PAIRS(device, kernel, grid, block, shared, ...)                                     \
    LAUNCH_BLOCKS(device, kernel, grid, block, shared, PAIR, true, __VA_ARGS__)
#define LAUNCH_NEXT(device, kernel, grid, block, ...)                                              \
    LAUNCH_BLOCKS(device, kernel, grid, block, 0, 1, true, __VA_ARGS__)
#define DYNAMIC_SHARED(name) unsigned char *name = simt_thread->dynamic_shared
#define DEVICE_FUNCTION      static inline
#define DEVICE_MEMBER        inline
#endif

/* Until all kernels before this one have ended and what they wrote can be read; the next may get
 * ready. Before anything else in a kernel of LAUNCH_NEXT. */
DEVICE_FUNCTION void wait_for_last() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#elif !defined(__CUDACC__)
    simt_wait_for_last();
#endif
}

/* x, of which the compiler knows nothing before here: what is made of it in a loop is not kept from
 * turn to turn, where registers are scarce. */
DEVICE_FUNCTION int known_here(int x) {
#ifdef __CUDACC__
    asm volatile("" : "+r"(x));
#endif
    return x;
}

/* x, which all lanes of a warp have alike: the compiler keeps it, and what is made of it, once for
 * the warp (uniform registers, which operands of wgmma.h are read from). */
DEVICE_FUNCTION int same_in_warp(int x) {
#ifdef __CUDACC__
    return __shfl_sync(0xffffffffu, x, 0);
#else
    return x;
#endif
}

/* Asks for 128 bytes that are read soon, of memory that no kernel under way writes: it may come
 * before wait_for_last. */
DEVICE_FUNCTION void ask_for(const void *p) {
#ifdef __CUDACC__
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#else
    (void)p;
#endif
}

/* Of `count` blocks that meet at a counter, whether this one comes last: what the others wrote
 * before it can be read. By one thread, which has met those of its block that wrote, each after a
 * __threadfence(); who reads does so after another. */
DEVICE_FUNCTION bool is_last(int *counter, int count) {
    if (atomicAdd(counter, 1) < count - 1) return false;
    *counter = 0;
    return true;
}

/* Writes what will not be read soon: caches keep what they have. */
template <typename U> DEVICE_FUNCTION void store_past(U *p, U value) {
#ifdef __CUDACC__
    if constexpr (sizeof(U) == sizeof(uint4)) {
        __stcs((uint4 *)p, (uint4)value);
        return;
    }
#endif
    *p = value;
}

/* ---- float types ---- */

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

DEVICE_FUNCTION float to_float(float x) {
    return x;
}
DEVICE_FUNCTION float to_float(bf16 x) {
    return __uint_as_float((unsigned)x.bits << 16);
}
/* Subnormals included; infinities and NaN stay what they are. */
DEVICE_FUNCTION float to_float(f16 x) {
#ifdef __CUDACC__
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
#else
    unsigned sign = (unsigned)(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
    if (rest >= 0x7c00) return __uint_as_float(sign | 0x7f800000u | (rest & 0x3ff) << 13);
    /* The exponent's bias differs by 112: a product by 2^112 mends it, whatever the exponent. */
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest << 13) * 0x1p112f));
#endif
}

/* Round to nearest, ties to even; NaN stays NaN. On the GPU as one of two: that instruction is of
 * full rate, the one for a single number is of the unit for exponentials. */
DEVICE_FUNCTION bf16 to_bf16(float x) {
#ifdef __CUDACC__
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(0.0f), "f"(x));
    return bf16{(uint16_t)both};
#else
    unsigned u = __float_as_uint(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{(uint16_t)(u >> 16 | 0x40)};
    return bf16{(uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16)};
#endif
}

/* Two floats as two bf16, the first in the low half. */
DEVICE_FUNCTION unsigned pack_bf16(float low, float high) {
#ifdef __CUDACC__
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
#else
    return (unsigned)to_bf16(low).bits | (unsigned)to_bf16(high).bits << 16;
#endif
}

template <typename T> DEVICE_FUNCTION T from_float(float x) {
    if constexpr (sizeof(T) == sizeof(float))
        return x;
    else
        return to_bf16(x);
}

/* What a tensor of T would hold of x. */
template <typename T> DEVICE_FUNCTION float rounded(float x) {
    return to_float(from_float<T>(x));
}

/* V elements that are read and written at once, kept as they lie in memory: a compiler would give
 * each bf16 of them a register of its own. */
template <typename T, int V> struct Kept {
    static constexpr int WORDS = sizeof(T) * V / 4;
    struct alignas(4 * WORDS < 16 ? 4 * WORDS : 16) Words {
        unsigned at[WORDS];
    } words;
    DEVICE_MEMBER void read(const T *p) { words = *(const Words *)p; }
    DEVICE_MEMBER void write(T *p) const { *(Words *)p = words; }
    DEVICE_MEMBER void keep(const float (&x)[V]) {
#pragma unroll
        for (int i = 0; i < WORDS; i++)
            if constexpr (sizeof(T) == sizeof(float))
                words.at[i] = __float_as_uint(x[i]);
            else
                words.at[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
    }
    DEVICE_MEMBER float operator[](int i) const {
        if constexpr (sizeof(T) == sizeof(float))
            return __uint_as_float(words.at[i]);
        else
            return __uint_as_float(i % 2 ? words.at[i / 2] & 0xffff0000u : words.at[i / 2] << 16);
    }
};
template <typename T> struct Kept<T, 1> {
    T value;
    DEVICE_MEMBER void read(const T *p) { value = *p; }
    DEVICE_MEMBER void write(T *p) const { *p = value; }
    DEVICE_MEMBER void keep(const float (&x)[1]) { value = from_float<T>(x[0]); }
    DEVICE_MEMBER float operator[](int) const { return to_float(value); }
};

template <int V, typename T> DEVICE_FUNCTION void load(float (&x)[V], const T *p) {
    Kept<T, V> pack;
    pack.read(p);
#pragma unroll
    for (int i = 0; i < V; i++) x[i] = pack[i];
}
template <int V, typename T> DEVICE_FUNCTION void store(T *p, const float (&x)[V]) {
    Kept<T, V> pack;
    pack.keep(x);
    pack.write(p);
}

/* Each becomes what a tensor of T would hold of it. */
template <typename T, int V> DEVICE_FUNCTION void round_all(float (&x)[V]) {
    Kept<T, V> pack;
    pack.keep(x);
#pragma unroll
    for (int j = 0; j < V; j++) x[j] = pack[j];
}

/* Runs the statements with T the element type of a dtype. */
#define WITH_FLOAT(dtype, T, ...)                                                                  \
    do {                                                                                           \
        if ((dtype) == F32) {                                                                      \
            typedef float T;                                                                       \
            __VA_ARGS__;                                                                           \
        } else {                                                                                   \
            CHECK((dtype) == BF16, "%s on the GPU", dtype_name(dtype));                            \
            typedef bf16 T;                                                                        \
            __VA_ARGS__;                                                                           \
        }                                                                                          \
    } while (0)

/* The same with V = 4 where rows of `cols` elements at each of the addresses can be read 4 at a
 * time, else 1. */
#define WITH_PACKS(fits, V, ...)                                                                   \
    do {                                                                                           \
        if (fits) {                                                                                \
            constexpr int V = 4;                                                                   \
            __VA_ARGS__;                                                                           \
        } else {                                                                                   \
            constexpr int V = 1;                                                                   \
            __VA_ARGS__;                                                                           \
        }                                                                                          \
    } while (0)

/* The same with packs of 16 bytes of T where rows of `cols` allow it. */
#define WITH_LONG_PACKS(T, cols, fits, V, ...)                                                     \
    do {                                                                                           \
        if ((fits) && (cols) % (int)(16 / sizeof(T)) == 0) {                                       \
            constexpr int V = (int)(16 / sizeof(T));                                               \
            __VA_ARGS__;                                                                           \
        } else {                                                                                   \
            WITH_PACKS(fits, V, __VA_ARGS__);                                                      \
        }                                                                                          \
    } while (0)

/* Whether all present tensors can be read in packs of 4 along `cols` elements. */
template <typename... Tensors> static inline bool fits_packs(int64_t cols, Tensors... tensors) {
    uintptr_t places = (uintptr_t(0) | ... | (uintptr_t)tensors.data);
    return cols % 4 == 0 && places % 16 == 0;
}

template <typename T> static inline T *data_of(Tensor t) {
    return (T *)t.data;
}

/* ---- sums ---- */

/* exp to some 1e-6 of its value. */
DEVICE_FUNCTION float quick_exp(float x) {
#ifdef __CUDACC__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
    return y;
#else
    return expf(x);
#endif
}

/* 1 / x to its last bit but one; 0 of infinity. */
DEVICE_FUNCTION float quick_inverse(float x) {
#ifdef __CUDACC__
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return 1.0f / x;
#endif
}

/* 1 / sqrt(sum / count + eps), eps above 0, right to two units in the last place and the same bits
 * in every kernel: some ten instructions, where division and root are a hundred. */
DEVICE_FUNCTION float root_of_mean(float sum, int64_t count, float eps) {
    float mean = __fmaf_rn(sum, quick_inverse((float)(int)count), eps), r;
#ifdef __CUDACC__
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(mean));
#else
    r = rsqrtf(mean);
#endif
    float step = __fmaf_rn(__fmul_rn(__fmul_rn(-0.5f, mean), r), r, 1.5f); /* Newton's */
    return __fmul_rn(r, step);
}

/* tanh, of which one is added or subtracted or that is a bound: right to 1e-7. */
DEVICE_FUNCTION float near_tanh(float z) {
    return 1.0f - 2.0f * quick_inverse(1.0f + quick_exp(2.0f * z));
}

/* A pair turned by an angle, each product and sum rounded: the same bits in every kernel. */
DEVICE_FUNCTION void turn_pair(float &a, float &b, float cosine, float sine) {
    float first = __fadd_rn(__fmul_rn(a, cosine), -__fmul_rn(b, sine));
    b = __fadd_rn(__fmul_rn(b, cosine), __fmul_rn(a, sine));
    a = first;
}

DEVICE_FUNCTION float warp_sum(float x) {
#ifdef __CUDACC__
#pragma unroll
    for (int d = 16; d; d >>= 1) x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
#else
    return simt_butterfly(x, [](float a, float b) { return a + b; });
#endif
}
DEVICE_FUNCTION float warp_max(float x) {
#ifdef __CUDACC__
#pragma unroll
    for (int d = 16; d; d >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
    return x;
#else
    return simt_butterfly(x, [](float a, float b) { return fmaxf(a, b); });
#endif
}

/* Of this lane and all before it. */
DEVICE_FUNCTION int warp_running_sum(int x) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        int other = __shfl_up_sync(0xffffffffu, x, d);
        if (lane >= d) x += other;
    }
    return x;
}

/* Over all threads of the block, the same value in each, in an order that only the block's size
 * decides. `space`: 32 floats of shared memory of the caller's. */
DEVICE_FUNCTION float block_sum(float x, float *space) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = (blockDim.x + 31) >> 5;
    x = warp_sum(x);
    __syncthreads();
    if (!lane) space[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? space[lane] : 0.0f);
}
DEVICE_FUNCTION float block_max(float x, float *space) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = (blockDim.x + 31) >> 5;
    x = warp_max(x);
    __syncthreads();
    if (!lane) space[warp] = x;
    __syncthreads();
    return warp_max(lane < warps ? space[lane] : -INFINITY);
}

/* ---- shapes of launches ---- */

static inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

/* Blocks for `items` threads of work where each goes on by the grid's width: enough to fill the
 * device, and no more. */
static inline unsigned grid_for(const Device *device, int64_t items, int threads) {
    int64_t blocks = ceil_div(items, threads), most = (int64_t)cuda_processors(device) * 16;
    return (unsigned)(blocks < 1 ? 1 : blocks < most ? blocks : most);
}

/* Pack i of rows that have `each`: its row, and its number there. */
struct RowPack {
    int64_t row, at;
};
DEVICE_FUNCTION RowPack row_pack(int64_t i, int64_t each) {
    if ((i | each) >> 32) return RowPack{i / each, i % each}; /* some hundred instructions */
    unsigned row = (unsigned)i / (unsigned)each;
    return RowPack{row, (unsigned)i - row * (unsigned)each};
}

/* Every index of `count` that is this thread's, in a grid of any width. */
#define FOR_GRID(i, count)                                                                         \
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < (count);                  \
         i += (int64_t)gridDim.x * blockDim.x)

#endif
