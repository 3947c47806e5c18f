/* offload.c - places in the host's memory. */
#include "kernels/offload.h"

Status offload_init(Offload *o, Device *device, int count, size_t bytes) {
    CHECK(count <= OFFLOAD_MOST, "offload of %d tensors", count);
    *o = (Offload){.device = device, .bytes = (bytes + 63) / 64 * 64, .count = count};
    size_t all = o->bytes * (size_t)count;
    if (!all) return OK;
    o->host = device_host_memory(device, all);
    if (!o->host)
        FAIL(ERR_IO,
             "out of memory: what waits in the host's memory needs %.2f GB, %.2f GB are available",
             (double)all / 1e9, (double)device_available(device_cpu()) / 1e9);
    return OK;
}

void offload_free(Offload *o) {
    device_host_release(o->device, o->host, o->bytes * (size_t)o->count);
    *o = (Offload){0};
}

static char *place(const Offload *o, int i, Tensor t) {
    CHECK(i >= 0 && i < o->count && tensor_bytes(t) <= o->bytes, "place %d of %d for %s", i,
          o->count, tensor_text(t));
    return o->host + o->bytes * (size_t)i;
}

void offload_store(Offload *o, int i, Tensor t) {
    device_copy_beside(o->device, i, place(o, i, t), t.data, tensor_bytes(t));
}

void offload_fetch(Offload *o, int i, Tensor t) {
    device_copy_beside(o->device, i, t.data, place(o, i, t), tensor_bytes(t));
}

void offload_wait(Offload *o, int i) {
    device_wait_beside(o->device, i);
}
