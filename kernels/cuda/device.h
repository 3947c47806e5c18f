/* device.h - the GPU behind kernels/device.h; only in a build with CUDA. */
#ifndef CUDA_DEVICE_H
#define CUDA_DEVICE_H

#include "kernels/device.h"

/* GPU `index`, opened when first asked for. ERR_CONFIG saying what is in the way: no driver or one
 * too old, no such GPU, an architecture this program has no code for. */
Status cuda_open(Device **device, int index);

/* How many GPUs there are; 0 with *why set when they cannot be used. */
int cuda_count(const char **why);

void *cuda_allocate(Device *device, size_t bytes);
void cuda_release(Device *device, void *memory, size_t bytes);
size_t cuda_held(Device *device);
void cuda_copy(Device *to_device, void *to, Device *from_device, const void *from, size_t bytes);
void *cuda_staging(Device *device, size_t bytes);
void cuda_send(Device *device, void *to, const void *staged, size_t bytes);
size_t cuda_available(Device *device);
void *cuda_host_memory(Device *device, size_t bytes);
void cuda_host_release(Device *device, void *memory);
void cuda_copy_beside(Device *device, int number, void *to, const void *from, size_t bytes);
void cuda_wait_beside(Device *device, int number);
void cuda_enter_beside(Device *device);
void cuda_leave_beside(Device *device);
void cuda_join_beside(Device *device);
bool cuda_replay(Device *device, uint64_t key);
void cuda_recorded(Device *device);

bool cuda_pin(Device *device, const void *memory, size_t bytes);
void cuda_unpin(Device *device, const void *memory);

/* Where the GPU finds pinned memory of the host; NULL for memory that is not. */
void *cuda_reach(const Device *device, const void *memory);
const char *cuda_name(const Device *device);

#endif
