/* nccl.cu - the library's functions by name. */
#include "kernels/cuda/cuda.h"

extern "C" {
#include "kernels/cuda/nccl.h"
}

#include <dlfcn.h>
#include <nccl.h>
#include <stdio.h>
#include <string.h>

#define FUNCTIONS(X)                                                                               \
    X(ncclGetUniqueId)                                                                             \
    X(ncclCommInitRank)                                                                            \
    X(ncclCommDestroy)                                                                             \
    X(ncclGetErrorString)                                                                          \
    X(ncclGroupStart)                                                                              \
    X(ncclGroupEnd)                                                                                \
    X(ncclSend)                                                                                    \
    X(ncclRecv)

/* Types come from the header, functions from the library that is there. */
static struct {
#define POINTER(name) __typeof__(&::name) name;
    FUNCTIONS(POINTER)
#undef POINTER
} nccl;

static_assert(NCCL_UNIQUE_ID_BYTES <= DEVICE_ID_BYTES, "an id of NCCL is longer");

static bool open_library() {
    char name[32];
    if (nccl.ncclGetUniqueId) return true;
    snprintf(name, sizeof name, "libnccl.so.%d", NCCL_MAJOR);
    void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!library) return false;
#define FIND(name)                                                                                 \
    nccl.name = (__typeof__(nccl.name))dlsym(library, #name);                                      \
    if (!nccl.name) give_up("NCCL has no %s", #name);
    FUNCTIONS(FIND)
#undef FIND
    return true;
}

static void check(ncclResult_t result, const char *what) {
    if (result != ncclSuccess)
        give_up("NCCL: %s: %s; what was saved before is whole", what,
                nccl.ncclGetErrorString(result));
}

bool nccl_new_id(void *id) {
    ncclUniqueId made;
    if (!open_library()) return false;
    check(nccl.ncclGetUniqueId(&made), "naming a group");
    memcpy(id, &made, sizeof made);
    return true;
}

void *nccl_join(Device *device, const void *id, int rank, int size) {
    ncclUniqueId made;
    ncclComm_t group;
    if (!open_library())
        give_up("rank %d of the GPUs has no NCCL (%s), but the first one has", rank, dlerror());
    memcpy(&made, id, sizeof made);
    cuda_stream(device);
    check(nccl.ncclCommInitRank(&group, size, made, rank), "joining ranks");
    return group;
}

void nccl_leave(void *group) {
    nccl.ncclCommDestroy((ncclComm_t)group);
}

void nccl_exchange(Device *device, void *group, const DeviceMessage *messages, int count) {
    cudaStream_t stream = cuda_stream(device);
    ncclComm_t comm = (ncclComm_t)group;
    check(nccl.ncclGroupStart(), "beginning to exchange");
    for (int i = 0; i < count; i++) {
        const DeviceMessage *m = &messages[i];
        if (m->to)
            check(nccl.ncclRecv(m->to, m->bytes, ncclInt8, m->peer, comm, stream), "receiving");
        else
            check(nccl.ncclSend(m->from, m->bytes, ncclInt8, m->peer, comm, stream), "sending");
    }
    check(nccl.ncclGroupEnd(), "exchanging");
}
