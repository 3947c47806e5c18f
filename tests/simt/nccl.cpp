/* nccl.cpp - the emulator's messages between GPUs: MPI's in place of NCCL. */
#include "kernels/cuda/cuda.h"

extern "C" {
#include "kernels/cuda/nccl.h"
}

#include <functional>
#include <string.h>
#include <vector>

void simt_host_call(std::function<void()> work);

#ifdef HAVE_MPI
#define OMPI_SKIP_MPICXX  1
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>

/* What groups made at one time have in common is that their ids differ. */
bool nccl_new_id(void *id) {
    static int made;
    int rank, name;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    name = made++ << 12 | rank;
    memset(id, 0, DEVICE_ID_BYTES);
    memcpy(id, &name, sizeof name);
    return true;
}

void *nccl_join(Device *device, const void *id, int rank, int) {
    MPI_Comm *group = new MPI_Comm;
    int name;
    cuda_stream(device);
    memcpy(&name, id, sizeof name);
    MPI_Comm_split(MPI_COMM_WORLD, name, rank, group);
    return group;
}

void nccl_leave(void *group) {
    MPI_Comm_free((MPI_Comm *)group);
    delete (MPI_Comm *)group;
}

void nccl_exchange(Device *device, void *group, const DeviceMessage *messages, int count) {
    cuda_stream(device);
    simt_host_call([=] {
        std::vector<MPI_Request> requests(count);
        for (int i = 0; i < count; i++) {
            const DeviceMessage *m = &messages[i];
            MPI_Comm among = *(MPI_Comm *)group;
            if (m->to)
                MPI_Irecv(m->to, (int)m->bytes, MPI_BYTE, m->peer, 0, among, &requests[i]);
            else
                MPI_Isend(m->from, (int)m->bytes, MPI_BYTE, m->peer, 0, among, &requests[i]);
        }
        MPI_Waitall(count, requests.data(), MPI_STATUSES_IGNORE);
    });
}

#else

bool nccl_new_id(void *) {
    return false;
}
void *nccl_join(Device *, const void *, int, int) {
    return NULL;
}
void nccl_leave(void *) {}
void nccl_exchange(Device *, void *, const DeviceMessage *, int) {}

#endif
