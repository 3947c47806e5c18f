/* device.c - opening devices, detecting the CPU's level, and taking memory in large pages. */
#include "kernels/device.h"
#ifdef LAPIDARY_CUDA
#include "kernels/cuda/device.h"
#include "kernels/cuda/nccl.h"
#endif

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef __aarch64__
#include <sys/auxv.h>
#else
#include <cpuid.h>
#include <sys/syscall.h>
#endif
#include <sys/mman.h>
#include <unistd.h>

#ifdef __aarch64__

static const char *const level_names[CPU_LEVELS] = {"generic", "dotprod", "i8mm"};

static CpuLevel best_level(void) {
    CpuLevel best = CPU_GENERIC;
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) best = CPU_DOTPROD;
    if (best == CPU_DOTPROD && getauxval(AT_HWCAP2) & HWCAP2_I8MM) best = CPU_I8MM;
    return best;
}

bool cpu_has_bf16_products(void) {
    return false;
}

#else

static const char *const level_names[CPU_LEVELS] = {"generic", "avx2", "avx512", "amx"};

/* Tiles of bf16 and int8, and the system's leave to use them (arch_prctl, ARCH_REQ_XCOMP_PERM of
 * XTILEDATA). */
static bool has_tiles(void) {
    unsigned a, b, c, d, wanted = 1u << 22 | 1u << 24 | 1u << 25; /* bf16, tiles, int8 */
    return __builtin_cpu_supports("avx512bf16") && __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
           (d & wanted) == wanted && !syscall(SYS_arch_prctl, 0x1023, 18);
}

static CpuLevel best_level(void) {
    __builtin_cpu_init();
    CpuLevel best = CPU_GENERIC;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = CPU_AVX2;
    if (best == CPU_AVX2 && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
        best = CPU_AVX512;
    if (best == CPU_AVX512 && has_tiles()) best = CPU_AMX;
    return best;
}

/* Without these instructions oneDNN would emulate them, at a third of f32's speed. */
bool cpu_has_bf16_products(void) {
    return cpu_level() >= CPU_AVX512 && __builtin_cpu_supports("avx512bf16");
}

#endif

Device *device_cpu(void) {
    static Device cpu = {DEVICE_CPU, 0};
    return &cpu;
}

Device *device_measure(void) {
    static Device measure = {DEVICE_MEASURE, 0};
    return &measure;
}

#ifdef LAPIDARY_CUDA

static Status open_gpu(Device **device, int index) {
    return cuda_open(device, index);
}

/* A GPU if one can be used; one that is there and cannot is mentioned. */
static void open_best(Device **device) {
    const char *why;
    if (cuda_count(&why) > 0) {
        if (cuda_open(device, 0) == OK) return;
        note("%s; using the CPU", status_message());
    } else if (strstr(why, "driver is for")) {
        note("%s; using the CPU", why);
    }
    *device = device_cpu();
}

#else

static Status open_gpu(Device **device, int index) {
    (void)device;
    FAIL(ERR_CONFIG, "device cuda:%d: this build has no CUDA backend, expected auto or cpu", index);
}

static void open_best(Device **device) {
    *device = device_cpu();
}

#endif

Status device_open(Device **device, const char *name) {
    int index = 0, end = 0;
    *device = device_cpu();
    if (!strcmp(name, "cpu")) return OK;
    if (!strcmp(name, "auto")) {
        open_best(device);
        return OK;
    }
    if (!strcmp(name, "cuda") || (sscanf(name, "cuda:%d%n", &index, &end) == 1 && !name[end]))
        return open_gpu(device, index);
    FAIL(ERR_CONFIG, "device %s is unknown, expected auto, cpu, cuda or cuda:N", name);
}

#ifdef LAPIDARY_CUDA
#define ON_GPU(device, call)                                                                       \
    if ((device)->kind == DEVICE_CUDA) return call
#else
#define ON_GPU(device, call) (void)(device)
#endif

static CpuLevel detect(void) {
    CpuLevel best = best_level();
    const char *forced = getenv("LAPIDARY_CPU");
    if (!forced || !*forced) return best;
    for (int level = CPU_GENERIC; level < CPU_LEVELS; level++) {
        if (strcmp(forced, level_names[level])) continue;
        if ((CpuLevel)level <= best) return level;
        note("LAPIDARY_CPU=%s is beyond this CPU, using %s", forced, level_names[best]);
        return best;
    }
    char known[64] = "";
    for (int level = CPU_GENERIC; level < CPU_LEVELS; level++) {
        strcat(known, level ? ", " : "");
        strcat(known, level_names[level]);
    }
    note("LAPIDARY_CPU=%s is unknown (%s), using %s", forced, known, level_names[best]);
    return best;
}

CpuLevel cpu_level(void) {
    static int level = -1;
    int known = __atomic_load_n(&level, __ATOMIC_RELAXED);
    if (known < 0) {
        known = detect();
        __atomic_store_n(&level, known, __ATOMIC_RELAXED);
    }
    return known;
}

const char *cpu_level_name(void) {
    return level_names[cpu_level()];
}

static const size_t HUGE_PAGE = 2u << 20;

void *device_allocate(Device *device, size_t bytes) {
    ON_GPU(device, cuda_allocate(device, bytes));
    size_t size = bytes < HUGE_PAGE ? bytes : (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    if (bytes < HUGE_PAGE) {
        void *memory = aligned_alloc(64, (size + 63) / 64 * 64 + 64);
        if (memory) memset(memory, 0, size);
        return memory;
    }
    char *raw = mmap(NULL, size + HUGE_PAGE, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED) return NULL;
    size_t head = -(uintptr_t)raw % HUGE_PAGE;
    if (head) munmap(raw, head);
    munmap(raw + head + size, HUGE_PAGE - head);
    madvise(raw + head, size, MADV_HUGEPAGE);
    return raw + head;
}

void device_release(Device *device, void *memory, size_t bytes) {
    if (!memory) return;
    ON_GPU(device, cuda_release(device, memory, bytes));
    if (bytes < HUGE_PAGE)
        free(memory);
    else
        munmap(memory, (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
}

/* What is long goes a large page at a time by all threads: taking memory is what takes long. */
static void host_copy(char *to, const char *from, size_t bytes) {
    bool apart = to + bytes <= from || from + bytes <= to;
    if (!apart || bytes < 2 * HUGE_PAGE) {
        if (to != from) memmove(to, from, bytes);
        return;
    }
#pragma omp parallel for schedule(dynamic)
    for (size_t at = 0; at < bytes; at += HUGE_PAGE)
        memcpy(to + at, from + at, bytes - at < HUGE_PAGE ? bytes - at : HUGE_PAGE);
}

void device_copy(Device *to_device, void *to, Device *from_device, const void *from, size_t bytes) {
    ON_GPU(to_device, cuda_copy(to_device, to, from_device, from, bytes));
    ON_GPU(from_device, cuda_copy(to_device, to, from_device, from, bytes));
    host_copy(to, from, bytes);
}

void *device_staging(Device *device, size_t bytes) {
    ON_GPU(device, cuda_staging(device, bytes));
    (void)bytes;
    return NULL;
}

void device_send(Device *device, void *to, const void *staged, size_t bytes) {
    ON_GPU(device, cuda_send(device, to, staged, bytes));
    (void)to, (void)staged, (void)bytes;
}

void *device_host_memory(Device *device, size_t bytes) {
    ON_GPU(device, cuda_host_memory(device, bytes));
    return device_allocate(device, bytes);
}

void device_host_release(Device *device, void *memory, size_t bytes) {
    if (!memory) return;
    ON_GPU(device, cuda_host_release(device, memory));
    device_release(device, memory, bytes);
}

void device_copy_beside(Device *device, int number, void *to, const void *from, size_t bytes) {
    ON_GPU(device, cuda_copy_beside(device, number, to, from, bytes));
    (void)number;
    memcpy(to, from, bytes);
}

void device_wait_beside(Device *device, int number) {
    ON_GPU(device, cuda_wait_beside(device, number));
    (void)number;
}

void device_enter_beside(Device *device) {
    ON_GPU(device, cuda_enter_beside(device));
}

void device_leave_beside(Device *device) {
    ON_GPU(device, cuda_leave_beside(device));
}

void device_join_beside(Device *device) {
    ON_GPU(device, cuda_join_beside(device));
}

bool device_new_group(Device *device, void *id) {
    ON_GPU(device, nccl_new_id(id));
    (void)id;
    return false;
}

void *device_join_group(Device *device, const void *id, int rank, int size) {
    ON_GPU(device, nccl_join(device, id, rank, size));
    (void)id, (void)rank, (void)size;
    return NULL;
}

void device_leave_group(void *group) {
#ifdef LAPIDARY_CUDA
    nccl_leave(group);
#else
    (void)group;
#endif
}

void device_exchange(Device *device, void *group, const DeviceMessage *messages, int count) {
    ON_GPU(device, nccl_exchange(device, group, messages, count));
    (void)group, (void)messages, (void)count;
}

size_t device_held(Device *device) {
    ON_GPU(device, cuda_held(device));
    return process_resident();
}

bool device_replay(Device *device, uint64_t key) {
    ON_GPU(device, cuda_replay(device, key));
    (void)key;
    return false;
}

void device_recorded(Device *device) {
    ON_GPU(device, cuda_recorded(device));
}

bool device_pin(Device *device, const void *memory, size_t bytes) {
    ON_GPU(device, cuda_pin(device, memory, bytes));
    (void)memory, (void)bytes;
    return true;
}

void device_unpin(Device *device, const void *memory) {
    ON_GPU(device, cuda_unpin(device, memory));
    (void)memory;
}

/* The line "KEY   N kB" of the kernel's account at `path`, in bytes; 0 when there is none. */
static size_t account(const char *path, const char *key) {
    FILE *file = fopen(path, "r");
    unsigned long long kilobytes = 0;
    size_t n = strlen(key);
    char line[256];
    while (file && fgets(line, sizeof line, file))
        if (!strncmp(line, key, n) && sscanf(line + n, ": %llu", &kilobytes) == 1) break;
    if (file) fclose(file);
    return (size_t)kilobytes << 10;
}

size_t process_resident(void) {
    return account("/proc/self/status", "VmRSS");
}

size_t process_private(void) {
    return account("/proc/self/status", "RssAnon");
}

size_t device_available(Device *device) {
    ON_GPU(device, cuda_available(device));
    size_t available = account("/proc/meminfo", "MemAvailable");
    if (available) return available;
    return (size_t)sysconf(_SC_AVPHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE);
}
