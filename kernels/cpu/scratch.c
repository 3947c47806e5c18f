/* scratch.c - growing buffers of a thread. Taking and returning megabytes on every call cost a
 * tenth of a training step in page faults. */
#include "kernels/cpu/scratch.h"
#include "kernels/status.h"

#include <stdlib.h>

typedef struct Buffer {
    float *values;
    size_t capacity;
} Buffer;

static float *grow(Buffer *b, size_t count) {
    if (count > b->capacity) {
        free(b->values);
        b->capacity = (count + 1023) / 1024 * 1024;
        b->values = aligned_alloc(64, b->capacity * sizeof *b->values);
        CHECK(b->values, "out of memory for %zu floats", b->capacity);
    }
    return b->values;
}

float *thread_scratch(size_t count) {
    static _Thread_local Buffer buffer;
    return grow(&buffer, count);
}

float *outer_scratch(size_t count) {
    static _Thread_local Buffer buffer;
    return grow(&buffer, count);
}
