/* scratch.h - working memory of a kernel on one thread, kept from call to call. */
#ifndef SCRATCH_H
#define SCRATCH_H

#include <stddef.h>

/* `count` floats of this thread, 64-byte aligned, with whatever they held before; valid until the
 * thread asks again, so a kernel asks once. */
float *thread_scratch(size_t count);

/* Another one beside it, for a kernel that calls one which asks for the first. */
float *outer_scratch(size_t count);

#endif
