/* simt.h - CUDA's words for the host compiler: the .cu sources run as they are, one thread of a
 * block after the other on a stack of its own, switching where threads wait for each other.
 *
 * Stricter than a GPU, so that errors show here: barriers and warp operations that not every thread
 * reaches are faults, shared memory starts as garbage, memory of the device is out of the host's
 * reach outside kernels, and LAPIDARY_SIMT_ORDER=reversed runs threads and blocks in the other
 * order and does what is asked for (copies, products of a warpgroup) as late as it may be, all of
 * which must change no bit.
 *
 * Compiled with -fsanitize=thread (`make races`) every thread is one of ThreadSanitizer's, ordered
 * with others by what orders them on a GPU and nothing else: barriers, __syncwarp, copies waited
 * for, counting between fences, the end of the kernel before or, in one that is launched early,
 * having waited for it; not shuffles and votes. Two that touch the same bytes without such an order
 * end the program with both places in the source. */
#ifndef SIMT_H
#define SIMT_H

#include <array>
#include <functional>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <tuple>

/* ---- words of the language ---- */

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __shared__ static
#define __constant__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct int2 {
    int x, y;
};
struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

struct SimtThread {
    dim3 thread, block, block_size, grid_size;
    unsigned char *dynamic_shared;
    unsigned cluster_rank;
    size_t cluster_shared; /* bytes from one block's dynamic shared memory to the next one's */
};
extern SimtThread *simt_thread; /* the one that runs now */

#define threadIdx (simt_thread->thread)
#define blockIdx  (simt_thread->block)
#define blockDim  (simt_thread->block_size)
#define gridDim   (simt_thread->grid_size)
#define warpSize  32

/* ---- waiting for each other ---- */

void __syncthreads();
int __syncthreads_or(int value);

/* Every lane of the warp gives `size` bytes; returns what lane i gave at i * 64. Valid until the
 * lane's next exchange. */
const unsigned char *simt_exchange(const void *mine, size_t size);

/* The four warps of this thread's warpgroup. */
void simt_warpgroup_sync();
/* The last so many warpgroups of a block. */
void simt_warpgroups_sync(unsigned many);

/* All threads of a cluster: blocks that run at once, whose dynamic shared memory the others reach
 * (static one they would share). */
void simt_cluster_sync();

void simt_warp_sync();
static inline void __syncwarp(unsigned = 0xffffffffu) {
    simt_warp_sync();
}

/* Between blocks: who has found by counting (integers alone: sums of floats in an order of chance
 * have no place here) that others have counted knows, after a fence, what they wrote before one. */
void __threadfence();
int atomicAdd(int *p, int value);

/* With LAPIDARY_SIMT_FENCES set, in a build for ThreadSanitizer: tensor cores and copy engine read
 * shared memory, of which they see what was fenced for them, or what the engine brought itself. Who
 * waits for them knows what was shown to them, so other races are looked for without. */
void simt_async_read(const void *p, size_t size);
void simt_async_fence();

/* What kernels before this one wrote can be read. */
void simt_wait_for_last();

/* ---- what is asked for and waited for ---- */

enum SimtAsked { SIMT_COPIES, SIMT_PRODUCTS, SIMT_STORES, SIMT_KINDS };

/* Whether it is done when it is waited for, not at once. */
extern bool simt_is_late;

void simt_later(SimtAsked kind, std::function<void()> work);

/* Work this thread asks for, done by the time it has waited for its group. */
template <typename F> void simt_ask(SimtAsked kind, F work) {
    if (simt_is_late)
        simt_later(kind, work);
    else
        work();
}

/* What was asked for since the last call is one group. */
void simt_close_group(SimtAsked kind);

/* Until all but the newest `left` groups are done. */
void simt_wait(SimtAsked kind, size_t left);

/* A barrier in shared memory (bulk.h, "mbarrier"): a phase ends when so many threads have arrived,
 * and all bytes that were announced. */
struct SimtBarrier {
    int32_t bytes;
    uint16_t missing;
    uint8_t threads, phase;
};

/* So many threads have arrived, and so many bytes more, or fewer, are to. */
void simt_count(SimtBarrier *b, int threads, int bytes);

/* Until the phase of this parity has ended. */
void simt_wait_phase(SimtBarrier *b, unsigned parity);

/* Work of the copy engine's, which counts at a barrier when it is done. */
void simt_engine(std::function<void()> work);

template <typename T> T simt_from_lane(T value, unsigned lane) {
    static_assert(sizeof(T) <= 64, "what a lane gives");
    T out;
    memcpy(&out, simt_exchange(&value, sizeof value) + 64 * (lane & 31), sizeof out);
    return out;
}
static inline unsigned simt_lane() {
    dim3 t = threadIdx, b = blockDim;
    return (t.x + b.x * (t.y + b.y * t.z)) & 31;
}
template <typename T> T __shfl_sync(unsigned, T value, int lane) {
    return simt_from_lane(value, (unsigned)lane);
}
template <typename T> T __shfl_xor_sync(unsigned, T value, int mask) {
    return simt_from_lane(value, simt_lane() ^ (unsigned)mask);
}
template <typename T> T __shfl_down_sync(unsigned, T value, int delta) {
    unsigned lane = simt_lane();
    return simt_from_lane(value, lane + (unsigned)delta < 32 ? lane + (unsigned)delta : lane);
}
template <typename T> T __shfl_up_sync(unsigned, T value, int delta) {
    unsigned lane = simt_lane();
    return simt_from_lane(value, lane >= (unsigned)delta ? lane - (unsigned)delta : lane);
}
unsigned __ballot_sync(unsigned mask, int value);

/* What five butterflies of shuffles leave in this lane, from one exchange. */
template <typename T, typename F> T simt_butterfly(T value, F join) {
    const unsigned char *all = simt_exchange(&value, sizeof value);
    T now[32], next[32];
    for (int i = 0; i < 32; i++) memcpy(&now[i], all + 64 * i, sizeof(T));
    for (int d = 16; d; d >>= 1) {
        for (int i = 0; i < 32; i++) next[i] = join(now[i], now[i ^ d]);
        memcpy(now, next, sizeof now);
    }
    return now[simt_lane()];
}

/* ---- arithmetic ---- */

static inline float rsqrtf(float x) {
    return 1.0f / sqrtf(x);
}
static inline unsigned __float_as_uint(float x) {
    unsigned u;
    memcpy(&u, &x, 4);
    return u;
}
static inline float __uint_as_float(unsigned u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}
static inline int __float2int_rn(float x) {
    return (int)rintf(x);
}
static inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}
static inline int __clz(int x) {
    return x ? __builtin_clz((unsigned)x) : 32;
}
static inline int __ffs(int x) {
    return __builtin_ffs(x);
}
static inline float __fmul_rn(float a, float b) {
    return a * b;
}
static inline float __fmaf_rn(float a, float b, float c) {
    return fmaf(a, b, c);
}
static inline float __fadd_rn(float a, float b) {
    return a + b;
}
static inline float __fdiv_rn(float a, float b) {
    return a / b;
}
template <typename T> T __ldg(const T *p) {
    return *p;
}
static inline int __dp4a(int a, int b, int c) {
    int8_t x[4], y[4];
    memcpy(x, &a, 4);
    memcpy(y, &b, 4);
    for (int i = 0; i < 4; i++) c += x[i] * y[i];
    return c;
}
template <typename T> T min(T a, T b) {
    return b < a ? b : a;
}
template <typename T> T max(T a, T b) {
    return a < b ? b : a;
}

/* ---- launching ---- */

/* While one lives, what this thread of the host reads, writes, allocates and frees is nothing to
 * kernels: arguments of theirs. */
struct SimtUnseen {
    SimtUnseen();
    ~SimtUnseen();
};

/* Runs every thread of every block before it returns, or notes the launch where a graph is being
 * recorded. */
void simt_launch(const char *name, dim3 grid, dim3 block, size_t shared, unsigned cluster,
                 bool early, std::function<void()> body);

/* ---- the runtime's functions, as far as Lapidary uses them ---- */

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorLaunchFailure = 719,
    cudaErrorNotSupported = 801,
};
enum cudaMemcpyKind {
    cudaMemcpyHostToDevice = 1,
    cudaMemcpyDeviceToHost = 2,
    cudaMemcpyDefault = 4
};
enum cudaDeviceAttr { cudaDevAttrHostRegisterReadOnlySupported = 113 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal = 1 };
enum {
    cudaStreamNonBlocking = 1,
    cudaEventDisableTiming = 2,
    cudaHostRegisterMapped = 2,
    cudaHostRegisterReadOnly = 8,
    cudaHostAllocDefault = 0,
    cudaHostAllocMapped = 2,
};
struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlockOptin;
    int major, minor, multiProcessorCount;
};
typedef struct SimtStream *cudaStream_t;
typedef struct SimtEvent *cudaEvent_t;
typedef struct SimtGraph *cudaGraph_t;
typedef struct SimtGraph *cudaGraphExec_t;

cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device);
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDriverGetVersion(int *version);
cudaError_t cudaRuntimeGetVersion(int *version);
cudaError_t cudaMalloc(void **p, size_t bytes);
cudaError_t cudaFree(void *p);
cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned flags);
cudaError_t cudaFreeHost(void *p);
cudaError_t cudaHostRegister(void *p, size_t bytes, unsigned flags);
cudaError_t cudaHostUnregister(void *p);
cudaError_t cudaHostGetDevicePointer(void **device, void *host, unsigned flags);
cudaError_t cudaMemGetInfo(size_t *available, size_t *total);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);
cudaError_t cudaGetLastError();
const char *cudaGetErrorString(cudaError_t error);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph,
                                 unsigned long long flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec);
template <typename F> cudaError_t cudaFuncSetAttribute(F *, cudaFuncAttribute, int) {
    return cudaSuccess;
}

#endif
