/* device.h - where tensors live and which instructions the CPU kernels may use.
 *
 * The CPU twins are compiled once per level from the same sources; the level is picked when the
 * program starts and LAPIDARY_CPU=generic|avx2|avx512|amx (aarch64: generic|dotprod|i8mm) forces
 * one. Level amx has the twins of avx512, and products of bf16 by tiles (cpu/amx.c). */
#ifndef DEVICE_H
#define DEVICE_H

#include "kernels/status.h"

#include <stdint.h>

typedef enum DeviceKind {
    DEVICE_CPU,
    DEVICE_CUDA,
    DEVICE_MEASURE, /* holds nothing and computes nothing: tensors of a measuring arena live here */
} DeviceKind;

typedef struct Device {
    DeviceKind kind;
    int index; /* of the GPU; 0 for the CPU */
} Device;

/* From the least to the most; each has what those before it have. */
#ifdef __aarch64__
typedef enum CpuLevel { CPU_GENERIC, CPU_DOTPROD, CPU_I8MM, CPU_LEVELS } CpuLevel;
#else
typedef enum CpuLevel { CPU_GENERIC, CPU_AVX2, CPU_AVX512, CPU_AMX, CPU_LEVELS } CpuLevel;
#endif

/* Opens the device that a run file or --device names: auto, cpu, cuda or cuda:N. */
Status device_open(Device **device, const char *name);

/* The CPU, always there. */
Device *device_cpu(void);

/* Where measuring arenas place tensors: kernels whose tensors live here return at once. */
Device *device_measure(void);

/* The level in use. Detected once, or forced through LAPIDARY_CPU. */
CpuLevel cpu_level(void);
const char *cpu_level_name(void);

/* Whether the CPU multiplies bf16 natively well enough for dense products to stay in bf16. */
bool cpu_has_bf16_products(void);

/* Zeroed memory on the device, aligned to 2 MB and advised to huge pages when it is large; NULL
 * when there is not enough. */
void *device_allocate(Device *device, size_t bytes);
void device_release(Device *device, void *memory, size_t bytes);

/* Copies bytes from one device's memory to another's, in order with the calls before; memory of the
 * CPU may be reused on return. */
void device_copy(Device *to_device, void *to, Device *from_device, const void *from, size_t bytes);

/* Host memory to make a pass's inputs in, good until the next call; sending from it (device_send)
 * does not wait. NULL for the CPU, whose inputs are made in place. */
void *device_staging(Device *device, size_t bytes);
void device_send(Device *device, void *to, const void *staged, size_t bytes);

/* Memory of the host that copies beside other work read and write: pinned, for a GPU. NULL when
 * there is not enough. */
void *device_host_memory(Device *device, size_t bytes);
void device_host_release(Device *device, void *memory, size_t bytes);

/* A copy between such memory and the device's, after the calls before and beside those that follow;
 * calls after device_wait_beside come after the newest copy of that number, below OFFLOAD_MOST. */
void device_copy_beside(Device *device, int number, void *to, const void *from, size_t bytes);
void device_wait_beside(Device *device, int number);

/* What device_enter_beside and device_leave_beside have between them runs after the calls before
 * and beside those that follow; calls after device_join_beside come after it. */
void device_enter_beside(Device *device);
void device_leave_beside(Device *device);
void device_join_beside(Device *device);

/* GPUs of several processes that exchange data directly. A group has a name, which one of them
 * makes (false: it cannot) and all join with at once. */
#define DEVICE_ID_BYTES 128
bool device_new_group(Device *device, void *id);
void *device_join_group(Device *device, const void *id, int rank, int size);
void device_leave_group(void *group);

/* Bytes to a rank of a group, or from it. */
typedef struct DeviceMessage {
    int peer;
    void *to;         /* NULL: they are sent */
    const void *from; /* NULL: they are received */
    size_t bytes;
} DeviceMessage;
void device_exchange(Device *device, void *group, const DeviceMessage *messages, int count);

/* Work that comes again, as a token's pass does. device_replay gives the calls of kernels that were
 * kept under `key` to the device at once and says so; when it returns false the caller makes them,
 * then calls device_recorded. Calls under one key must be the same in all but what memory holds.
 * The CPU keeps nothing. */
bool device_replay(Device *device, uint64_t key);
void device_recorded(Device *device);

/* Lets kernels of the device read memory of the host where it is; false when that cannot be had,
 * and they go another way. Undone by device_unpin before the memory goes. */
bool device_pin(Device *device, const void *memory, size_t bytes);
void device_unpin(Device *device, const void *memory);

/* Bytes that could be taken from the device now without swapping. */
size_t device_available(Device *device);

/* Bytes this process holds of the device's memory. */
size_t device_held(Device *device);

/* Bytes this process holds, and those of them that no file backs, by the kernel's account; 0 where
 * it has none. */
size_t process_resident(void);
size_t process_private(void);

#endif
