/* scratch.c - one growing buffer a thread. Taking and returning megabytes on every call cost a
 * tenth of a training step in page faults. */
#include "kernels/cpu/scratch.h"
#include "kernels/status.h"

#include <stdlib.h>

float *thread_scratch(size_t count) {
    static _Thread_local float *buffer;
    static _Thread_local size_t capacity;
    if (count > capacity) {
        free(buffer);
        capacity = (count + 1023) / 1024 * 1024;
        buffer = aligned_alloc(64, capacity * sizeof *buffer);
        CHECK(buffer, "out of memory for %zu floats", capacity);
    }
    return buffer;
}
