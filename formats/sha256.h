/* sha256.h - sums of bytes and files. */
#ifndef SHA256_H
#define SHA256_H

#include "kernels/status.h"

/* SHA-256 in hexadecimal. */
void sha256_text(char out[65], const void *bytes, size_t size);
Status sha256_file(char out[65], const char *path);

#endif
