/* offload.h - tensors that wait in the host's memory while their place on the device serves others.
 *
 * On a GPU that memory is pinned and copies run beside kernels; on the CPU it is other memory of
 * the same kind. */
#ifndef OFFLOAD_H
#define OFFLOAD_H

#include "kernels/tensor.h"

#define OFFLOAD_MOST 128 /* tensors */

typedef struct Offload {
    Device *device;
    char *host; /* `count` places of `bytes` each */
    size_t bytes;
    int count;
} Offload;

/* Places for so many tensors of up to `bytes`; ERR_IO when the memory is not there. */
Status offload_init(Offload *o, Device *device, int count, size_t bytes);
void offload_free(Offload *o);

/* Takes t, as the calls before leave it, to place i. Until offload_wait t is only read. */
void offload_store(Offload *o, int i, Tensor t);

/* Brings place i to t once the calls before are done with t's memory. It is there after
 * offload_wait. */
void offload_fetch(Offload *o, int i, Tensor t);

/* Calls from here on come after the last copy of place i. */
void offload_wait(Offload *o, int i);

#endif
