/* sandbox.h - running programs that a model wrote.
 *
 * A program gets namespaces of its own (users, mounts, processes, network, IPC), a root of a few
 * read-only system folders and a small /tmp, limits on time, memory, files and output, and a filter
 * that denies it new processes, sockets and mounts. Where the kernel does not grant that, nothing
 * is run. */
#ifndef SANDBOX_H
#define SANDBOX_H

#include "data/text.h"

typedef struct SandboxLimits {
    double seconds; /* of the clock */
    int64_t memory; /* bytes of address space */
    int64_t files;  /* bytes of a file, and of /tmp */
    int64_t output; /* bytes kept of what it prints */
} SandboxLimits;

typedef enum SandboxEnd {
    SANDBOX_PASSED, /* exit status 0 */
    SANDBOX_FAILED, /* another one, or a signal */
    SANDBOX_TIMEOUT,
} SandboxEnd;

typedef struct SandboxResult {
    SandboxEnd end;
    int status;  /* exit status, or 128 + signal */
    Text output; /* standard output and error */
} SandboxResult;

SandboxLimits sandbox_limits_default(void);

/* Whether programs can be contained here; ERR_CONFIG says what is missing. */
Status sandbox_check(void);

/* Runs a Python program with `input` on standard input. ERR_CONFIG when it cannot be contained. */
Status sandbox_python(SandboxResult *r, Slice program, Slice input, const SandboxLimits *limits);
void sandbox_free(SandboxResult *r);

#endif
