/* device.cu - opening GPUs, their memory, and copies to and from them.
 *
 * The runtime opens the driver's library when it is first called, so the program starts without
 * one. Each GPU has one stream: everything happens in order, but for the copies that offload.h asks
 * for, which have another. */
#include "kernels/cuda/bulk.h"

extern "C" {
#include "kernels/cuda/device.h"
#include "kernels/offload.h"
}

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define GRAPHS_MAX 64

/* Whether the build has code for sm_90a; the emulator runs that too. */
#if !defined(__CUDACC__) || defined(LAPIDARY_HOPPER_CODE)
#define HAS_HOPPER_CODE true
#else
#define HAS_HOPPER_CODE false
#endif

/* Bytes that go through pinned memory at a time. */
#define CHUNK ((size_t)16 << 20)

/* Memory of the host that copies read while the host goes on. */
struct Pinned {
    char *memory;
    size_t bytes;
    cudaEvent_t sent;
};

/* Calls kept under a key: seen once they have only run, seen twice they are kept. */
struct Graph {
    uint64_t key, used;
    cudaGraphExec_t calls; /* NULL: not kept yet */
};

struct Gpu {
    Device device;
    bool open;
    cudaStream_t stream;
    cudaStream_t beside; /* for copies beside kernels; NULL until it is needed */
    cudaEvent_t asked;   /* what the newest of them waits for */
    cudaEvent_t left;    /* the end of what cuda_enter_beside began */
    cudaEvent_t copied[OFFLOAD_MOST];
    Pinned staging, chunk[2];
    Graph graphs[GRAPHS_MAX], *recording;
    int graph_count;
    uint64_t turn;
    bool never_replay;
    void *workspace;
    size_t workspace_bytes;
    int *counters;
    int64_t counter_count;
    int processors;
    bool has_wgmma, launches_early;
    size_t shared_most, held;
    char name[300];
};

static Gpu gpus[CUDA_DEVICES];

static Gpu *gpu_of(const Device *device) {
    return &gpus[device->index];
}

/* ---- opening ---- */

int cuda_count(const char **why) {
    static char text[200];
    int count = 0, driver = 0, runtime = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    *why = NULL;
    if (error == cudaSuccess && count > 0) return count < CUDA_DEVICES ? count : CUDA_DEVICES;
    cudaGetLastError();
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    if (!driver)
        *why = "no NVIDIA driver is installed";
    else if (error == cudaErrorInsufficientDriver || driver < runtime / 1000 * 1000) {
        snprintf(text, sizeof text,
                 "the driver is for CUDA %d.%d, this program needs %d.0 or newer", driver / 1000,
                 driver % 100 / 10, runtime / 1000);
        *why = text;
    } else if (error == cudaErrorNoDevice || !count)
        *why = "there is no NVIDIA GPU";
    else
        *why = cudaGetErrorString(error);
    return 0;
}

Status cuda_open(Device **device, int index) {
    const char *why;
    int count = cuda_count(&why);
    if (!count) FAIL(ERR_CONFIG, "device cuda:%d: %s", index, why);
    if (index < 0 || index >= count)
        FAIL(ERR_CONFIG, "device cuda:%d: there are %d GPUs, from cuda:0 on", index, count);
    Gpu *g = &gpus[index];
    *device = &g->device;
    if (g->open) return OK;
    cudaDeviceProp properties;
    cuda_check(cudaGetDeviceProperties(&properties, index), "the GPU's properties");
    if (properties.major < 8)
        FAIL(ERR_CONFIG,
             "device cuda:%d: %s has compute capability %d.%d, this program needs 8.0 (Ampere) or "
             "newer",
             index, properties.name, properties.major, properties.minor);
    g->device = Device{DEVICE_CUDA, index};
    g->processors = properties.multiProcessorCount;
    const char *hopper = getenv("LAPIDARY_HOPPER");
    g->has_wgmma = HAS_HOPPER_CODE && properties.major == 9 && !(hopper && !strcmp(hopper, "0"));
    g->launches_early = properties.major >= 9;
    g->shared_most = properties.sharedMemPerBlockOptin;
    snprintf(g->name, sizeof g->name, "%s, %.0f GB", properties.name,
             (double)properties.totalGlobalMem / 1e9);
    cuda_check(cudaSetDevice(index), "choosing the GPU");
    cudaError_t error = cudaStreamCreateWithFlags(&g->stream, cudaStreamNonBlocking);
    if (error == cudaErrorMemoryAllocation)
        FAIL(ERR_IO, "device cuda:%d: other programs have taken all of its memory", index);
    cuda_check(error, "opening the GPU");
    g->open = true;
    return OK;
}

const char *cuda_name(const Device *device) {
    return gpu_of(device)->name;
}

int cuda_processors(const Device *device) {
    return gpu_of(device)->processors;
}

size_t cuda_shared_most(const Device *device) {
    return gpu_of(device)->shared_most;
}

bool cuda_has_wgmma(const Device *device) {
    return gpu_of(device)->has_wgmma;
}

TileMap cuda_tile_map(const void *data, int64_t groups, int64_t rows, int64_t cols, int tile_rows,
                      int tile_groups) {
#ifdef __CUDACC__
    static PFN_cuTensorMapEncodeTiled_v12000 encode;
    if (!encode) {
        cudaDriverEntryPointQueryResult found;
        cuda_check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void **)&encode,
                                                    12000, cudaEnableDefault, &found),
                   "cuTensorMapEncodeTiled");
    }
    TileMap map;
    cuuint64_t sizes[3] = {(cuuint64_t)cols, (cuuint64_t)rows, (cuuint64_t)groups},
               strides[2] = {(cuuint64_t)cols * sizeof(bf16),
                             (cuuint64_t)(rows * cols) * sizeof(bf16)};
    cuuint32_t tile[3] = {TILE_COLUMNS, (cuuint32_t)tile_rows, (cuuint32_t)tile_groups},
               steps[3] = {1, 1, 1};
    CHECK(encode && !encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, (void *)data, sizes, strides,
                            tile, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                            CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
          "tiles of %lld matrices (%lld, %lld)", (long long)groups, (long long)rows,
          (long long)cols);
    return map;
#else
    return TileMap{(const bf16 *)data, cols, rows, groups, tile_rows, tile_groups};
#endif
}

bool cuda_launches_early(const Device *device) {
    return gpu_of(device)->launches_early;
}

cudaStream_t cuda_stream(const Device *device) {
    static thread_local int current = -1;
    if (current != device->index) {
        cuda_check(cudaSetDevice(device->index), "choosing the GPU");
        current = device->index;
    }
    return gpu_of(device)->stream;
}

void cuda_check(cudaError_t error, const char *what) {
    if (error == cudaSuccess) return;
    if (error == cudaErrorMemoryAllocation) give_up("the GPU is out of memory (%s)", what);
    if (error == cudaErrorNoKernelImageForDevice)
        give_up("this program has no code for this GPU's architecture (%s); build it with ARCH=all",
                what);
    give_up("the GPU stopped working (%s: %s); what was saved before is whole, a training run goes "
            "on from there with --resume",
            what, cudaGetErrorString(error));
}

/* ---- memory ---- */

/* What was kept knows addresses: it goes when memory does. */
static void drop_graphs(Gpu *g) {
    for (int i = 0; i < g->graph_count; i++)
        if (g->graphs[i].calls)
            cuda_check(cudaGraphExecDestroy(g->graphs[i].calls), "dropping a graph");
    g->graph_count = 0;
}

void *cuda_allocate(Device *device, size_t bytes) {
    void *memory = NULL;
    CHECK(!gpu_of(device)->recording, "memory is taken while calls are recorded");
    cudaStream_t stream = cuda_stream(device);
    cudaError_t error = cudaMalloc(&memory, bytes);
    if (error == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        return NULL;
    }
    cuda_check(error, "taking memory");
    cuda_check(cudaMemsetAsync(memory, 0, bytes, stream), "clearing memory");
    gpu_of(device)->held += bytes;
    return memory;
}

void cuda_release(Device *device, void *memory, size_t bytes) {
    if (!memory) return;
    cuda_check(cudaStreamSynchronize(cuda_stream(device)), "waiting for the GPU");
    drop_graphs(gpu_of(device));
    cuda_check(cudaFree(memory), "giving memory back");
    gpu_of(device)->held -= bytes;
}

size_t cuda_held(Device *device) {
    return gpu_of(device)->held;
}

size_t cuda_available(Device *device) {
    size_t available = 0, total = 0;
    cuda_stream(device);
    cuda_check(cudaMemGetInfo(&available, &total), "asking for free memory");
    return available;
}

void *cuda_workspace(const Device *device, size_t bytes) {
    Gpu *g = gpu_of(device);
    if (bytes <= g->workspace_bytes) return g->workspace;
    cuda_release(&g->device, g->workspace, g->workspace_bytes);
    g->workspace = cuda_allocate(&g->device, bytes);
    if (!g->workspace)
        give_up("the GPU is out of memory: %.2f GB for partial results, %.2f GB are available",
                (double)bytes / 1e9, (double)cuda_available(&g->device) / 1e9);
    g->workspace_bytes = bytes;
    return g->workspace;
}

int *cuda_counters(const Device *device, int64_t count) {
    Gpu *g = gpu_of(device);
    size_t bytes = (size_t)count * sizeof(int);
    if (count <= g->counter_count) return g->counters;
    cuda_release(&g->device, g->counters, (size_t)g->counter_count * sizeof(int));
    g->counters = (int *)cuda_allocate(&g->device, bytes);
    if (!g->counters) give_up("the GPU is out of memory: %zu bytes for counters", bytes);
    cuda_check(cudaMemsetAsync(g->counters, 0, bytes, cuda_stream(device)), "clearing counters");
    g->counter_count = count;
    return g->counters;
}

/* At least `bytes` of pinned memory that no copy reads any more. */
static char *pinned(Pinned *p, size_t bytes) {
    if (p->memory) cuda_check(cudaEventSynchronize(p->sent), "waiting for a copy");
    if (bytes <= p->bytes) return p->memory;
    cuda_check(cudaFreeHost(p->memory), "giving pinned memory back");
    cuda_check(cudaHostAlloc((void **)&p->memory, bytes, cudaHostAllocDefault),
               "taking pinned memory");
    if (!p->bytes)
        cuda_check(cudaEventCreateWithFlags(&p->sent, cudaEventDisableTiming), "making an event");
    p->bytes = bytes;
    return p->memory;
}

void *cuda_staging(Device *device, size_t bytes) {
    cuda_stream(device);
    return pinned(&gpu_of(device)->staging, bytes);
}

void cuda_send(Device *device, void *to, const void *staged, size_t bytes) {
    cudaStream_t stream = cuda_stream(device);
    cuda_check(cudaMemcpyAsync(to, staged, bytes, cudaMemcpyHostToDevice, stream),
               "sending a pass's inputs");
    cuda_check(cudaEventRecord(gpu_of(device)->staging.sent, stream), "noting a copy");
}

/* ---- copies beside kernels ---- */

void *cuda_host_memory(Device *device, size_t bytes) {
    void *memory = NULL;
    cuda_stream(device);
    cudaError_t error = cudaHostAlloc(&memory, bytes, cudaHostAllocDefault);
    if (error == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        return NULL;
    }
    cuda_check(error, "taking pinned memory");
    return memory;
}

void cuda_host_release(Device *device, void *memory) {
    Gpu *g = gpu_of(device);
    cuda_check(cudaStreamSynchronize(cuda_stream(device)), "waiting for the GPU");
    if (g->beside) cuda_check(cudaStreamSynchronize(g->beside), "waiting for copies");
    cuda_check(cudaFreeHost(memory), "giving pinned memory back");
}

static void open_beside(Gpu *g) {
    cuda_check(cudaStreamCreateWithFlags(&g->beside, cudaStreamNonBlocking), "opening a stream");
    cuda_check(cudaEventCreateWithFlags(&g->asked, cudaEventDisableTiming), "making an event");
    cuda_check(cudaEventCreateWithFlags(&g->left, cudaEventDisableTiming), "making an event");
    for (int i = 0; i < OFFLOAD_MOST; i++)
        cuda_check(cudaEventCreateWithFlags(&g->copied[i], cudaEventDisableTiming),
                   "making an event");
}

void cuda_copy_beside(Device *device, int number, void *to, const void *from, size_t bytes) {
    Gpu *g = gpu_of(device);
    cudaStream_t stream = cuda_stream(device);
    if (!g->beside) open_beside(g);
    cuda_check(cudaEventRecord(g->asked, stream), "noting a copy");
    cuda_check(cudaStreamWaitEvent(g->beside, g->asked, 0), "ordering a copy");
    cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, g->beside),
               "a copy beside kernels");
    cuda_check(cudaEventRecord(g->copied[number], g->beside), "noting a copy");
}

void cuda_wait_beside(Device *device, int number) {
    Gpu *g = gpu_of(device);
    if (g->beside)
        cuda_check(cudaStreamWaitEvent(cuda_stream(device), g->copied[number], 0),
                   "waiting for a copy");
}

/* ---- kernels beside kernels ---- */

static void swap_streams(Gpu *g) {
    cudaStream_t stream = g->stream;
    g->stream = g->beside;
    g->beside = stream;
}

void cuda_enter_beside(Device *device) {
    Gpu *g = gpu_of(device);
    cudaStream_t stream = cuda_stream(device);
    if (!g->beside) open_beside(g);
    cuda_check(cudaEventRecord(g->asked, stream), "noting where work begins");
    cuda_check(cudaStreamWaitEvent(g->beside, g->asked, 0), "ordering work");
    swap_streams(g);
}

void cuda_leave_beside(Device *device) {
    Gpu *g = gpu_of(device);
    cuda_check(cudaEventRecord(g->left, cuda_stream(device)), "noting where work ends");
    swap_streams(g);
}

void cuda_join_beside(Device *device) {
    Gpu *g = gpu_of(device);
    if (g->beside)
        cuda_check(cudaStreamWaitEvent(cuda_stream(device), g->left, 0), "waiting for work");
}

/* ---- graphs ---- */

void cuda_never_replay(const Device *device) {
    Gpu *g = gpu_of(device);
    CHECK(!g->recording, "the host takes part in what is recorded");
    g->never_replay = true;
}

/* The entry of a key; a new one takes the place of the one unused longest. */
static Graph *graph_of(Gpu *g, uint64_t key, bool *is_new) {
    Graph *oldest = &g->graphs[0];
    *is_new = false;
    for (int i = 0; i < g->graph_count; i++) {
        if (g->graphs[i].key == key) return &g->graphs[i];
        if (g->graphs[i].used < oldest->used) oldest = &g->graphs[i];
    }
    Graph *mine = oldest;
    if (g->graph_count < GRAPHS_MAX)
        mine = &g->graphs[g->graph_count++];
    else if (mine->calls)
        cuda_check(cudaGraphExecDestroy(mine->calls), "dropping a graph");
    mine->key = key;
    mine->used = 0;
    mine->calls = NULL;
    *is_new = true;
    return mine;
}

bool cuda_replay(Device *device, uint64_t key) {
    Gpu *g = gpu_of(device);
    bool is_new;
    if (g->never_replay) return false;
    cudaStream_t stream = cuda_stream(device);
    Graph *graph = graph_of(g, key, &is_new);
    graph->used = ++g->turn;
    if (graph->calls) {
        cuda_check(cudaGraphLaunch(graph->calls, stream), "replaying calls");
        return true;
    }
    if (is_new) return false; /* the first time memory is taken and plans are made */
    cuda_check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "recording calls");
    g->recording = graph;
    return false;
}

void cuda_recorded(Device *device) {
    Gpu *g = gpu_of(device);
    Graph *graph = g->recording;
    cudaGraph_t calls;
    if (!graph) return;
    g->recording = NULL;
    cuda_check(cudaStreamEndCapture(cuda_stream(device), &calls), "recording calls");
    cuda_check(cudaGraphInstantiate(&graph->calls, calls, 0), "keeping calls");
    cuda_check(cudaGraphDestroy(calls), "keeping calls");
    cuda_check(cudaGraphLaunch(graph->calls, cuda_stream(device)), "replaying calls");
}

/* ---- the host's memory as the GPU sees it ---- */

#define RANGES_MAX 64

/* Pages of the host that the GPU reads where they are; or, where the driver does not pin such pages
 * (of a file, often), a copy that it does. */
struct Range {
    const char *begin;
    size_t bytes;
    char *reached;
    void *copy; /* NULL: the pages themselves */
};
static Range ranges[RANGES_MAX];
static int range_count;

bool cuda_pin(Device *device, const void *memory, size_t bytes) {
    const size_t PAGE = 4096;
    uintptr_t begin = (uintptr_t)memory / PAGE * PAGE,
              end = ((uintptr_t)memory + bytes + PAGE - 1) / PAGE * PAGE;
    Range r = {(const char *)begin, end - begin, NULL, NULL};
    void *reached = NULL;
    cuda_stream(device);
    if (range_count == RANGES_MAX) return false;
    if (cudaHostRegister((void *)r.begin, r.bytes,
                         cudaHostRegisterMapped | cudaHostRegisterReadOnly) != cudaSuccess) {
        cudaGetLastError();
        r.begin = (const char *)memory;
        r.bytes = bytes;
        if (cudaHostAlloc(&r.copy, bytes, cudaHostAllocMapped) != cudaSuccess) {
            cudaGetLastError();
            return false;
        }
        memcpy(r.copy, memory, bytes);
    }
    cuda_check(cudaHostGetDevicePointer(&reached, r.copy ? r.copy : (void *)r.begin, 0),
               "reaching the host's memory");
    r.reached = (char *)reached;
    ranges[range_count++] = r;
    return true;
}

void cuda_unpin(Device *device, const void *memory) {
    for (int i = 0; i < range_count; i++) {
        const char *at = (const char *)memory;
        if (at < ranges[i].begin || at >= ranges[i].begin + ranges[i].bytes) continue;
        cuda_check(cudaStreamSynchronize(cuda_stream(device)), "waiting for the GPU");
        cuda_check(ranges[i].copy ? cudaFreeHost(ranges[i].copy)
                                  : cudaHostUnregister((void *)ranges[i].begin),
                   "giving pinned memory back");
        ranges[i] = ranges[--range_count];
        return;
    }
}

void *cuda_reach(const Device *device, const void *memory) {
    (void)device;
    const char *at = (const char *)memory;
    for (int i = 0; i < range_count; i++)
        if (at >= ranges[i].begin && at < ranges[i].begin + ranges[i].bytes)
            return ranges[i].reached + (at - ranges[i].begin);
    return NULL;
}

/* ---- copies ---- */

/* Pageable memory goes through two pinned chunks by turns: the host fills one while the other
 * travels. */
static void send_chunks(Gpu *g, char *to, const char *from, size_t bytes) {
    cudaStream_t stream = cuda_stream(&g->device);
    for (size_t done = 0, turn = 0; done < bytes; done += CHUNK, turn ^= 1) {
        size_t n = bytes - done < CHUNK ? bytes - done : CHUNK;
        char *chunk = pinned(&g->chunk[turn], CHUNK);
        memcpy(chunk, from + done, n);
        cuda_check(cudaMemcpyAsync(to + done, chunk, n, cudaMemcpyHostToDevice, stream),
                   "a copy to the GPU");
        cuda_check(cudaEventRecord(g->chunk[turn].sent, stream), "noting a copy");
    }
}

static void fetch_chunks(Gpu *g, char *to, const char *from, size_t bytes) {
    cudaStream_t stream = cuda_stream(&g->device);
    for (size_t done = 0; done < bytes; done += CHUNK) {
        size_t n = bytes - done < CHUNK ? bytes - done : CHUNK;
        char *chunk = pinned(&g->chunk[0], n < 65536 ? 65536 : CHUNK);
        cuda_check(cudaMemcpyAsync(chunk, from + done, n, cudaMemcpyDeviceToHost, stream),
                   "a copy from the GPU");
        cuda_check(cudaStreamSynchronize(stream), "waiting for the GPU");
        memcpy(to + done, chunk, n);
    }
}

void cuda_copy(Device *to_device, void *to, Device *from_device, const void *from, size_t bytes) {
    if (!bytes) return;
    if (from_device->kind == DEVICE_CPU) {
        send_chunks(gpu_of(to_device), (char *)to, (const char *)from, bytes);
    } else if (to_device->kind == DEVICE_CPU) {
        fetch_chunks(gpu_of(from_device), (char *)to, (const char *)from, bytes);
    } else {
        cudaStream_t stream = cuda_stream(to_device);
        cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream),
                   "a copy on the GPU");
    }
}
