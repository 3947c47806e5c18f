/* nccl.h - messages between GPUs through NCCL, which is opened when first needed; the emulator has
 * a body of its own. */
#ifndef CUDA_NCCL_H
#define CUDA_NCCL_H

#include "kernels/device.h"

/* A name for a new group, made by one rank and told to the others; false where there is no NCCL. */
bool nccl_new_id(void *id);

/* All ranks of the group call it at once. */
void *nccl_join(Device *device, const void *id, int rank, int size);
void nccl_leave(void *group);

/* Messages of one call pass each other, after the device's work before and before that after. */
void nccl_exchange(Device *device, void *group, const DeviceMessage *messages, int count);

#endif
