/* sha256.c - sums of bytes and files, through nettle. */
#include "formats/sha256.h"

#include <errno.h>
#include <nettle/sha2.h>
#include <stdio.h>
#include <string.h>

static void hex(char out[65], const uint8_t digest[SHA256_DIGEST_SIZE]) {
    for (int i = 0; i < SHA256_DIGEST_SIZE; i++) snprintf(out + 2 * i, 3, "%02x", digest[i]);
}

void sha256_text(char out[65], const void *bytes, size_t size) {
    struct sha256_ctx context;
    uint8_t digest[SHA256_DIGEST_SIZE];
    sha256_init(&context);
    sha256_update(&context, size, bytes);
    sha256_digest(&context, sizeof digest, digest);
    hex(out, digest);
}

Status sha256_file(char out[65], const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) FAIL(ERR_IO, "%s: %s", path, strerror(errno));
    struct sha256_ctx context;
    uint8_t digest[SHA256_DIGEST_SIZE], buffer[65536];
    sha256_init(&context);
    for (size_t got; (got = fread(buffer, 1, sizeof buffer, file));)
        sha256_update(&context, got, buffer);
    bool failed = ferror(file);
    fclose(file);
    if (failed) FAIL(ERR_IO, "%s: cannot be read", path);
    sha256_digest(&context, sizeof digest, digest);
    hex(out, digest);
    return OK;
}
