/* status.c - the one message a thread keeps, and the ways to end. */
#include "kernels/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static _Thread_local char message[2048];

const char *status_message(void) {
    return message;
}

Status status_fail(Status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    return status;
}

Status status_prefix(Status status, const char *format, ...) {
    char old[sizeof message], prefix[512];
    memcpy(old, message, sizeof old);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(prefix, sizeof prefix, format, arguments);
    va_end(arguments);
    return status_fail(status, "%s: %s", prefix, old);
}

void note(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    flockfile(stderr);
    fputs("lapidary: note: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    funlockfile(stderr);
    va_end(arguments);
}

_Noreturn void fault(const char *file, int line, const char *condition, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "lapidary: fault at %s:%d: %s: ", file, line, condition);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    abort();
}

_Noreturn void give_up(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("lapidary: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    _exit(1);
}

void *must_malloc(size_t bytes) {
    void *memory = malloc(bytes ? bytes : 1);
    CHECK(memory, "out of memory for %zu bytes", bytes);
    return memory;
}

void *must_calloc(size_t count, size_t size) {
    void *memory = calloc(count ? count : 1, size ? size : 1);
    CHECK(memory, "out of memory for %zu x %zu bytes", count, size);
    return memory;
}

void *must_realloc(void *old, size_t bytes) {
    void *memory = realloc(old, bytes ? bytes : 1);
    CHECK(memory, "out of memory for %zu bytes", bytes);
    return memory;
}

char *must_strdup(const char *text) {
    char *copy = strdup(text);
    CHECK(copy, "out of memory");
    return copy;
}

char *must_format(const char *format, ...) {
    va_list arguments;
    char *text = NULL;
    va_start(arguments, format);
    int length = vasprintf(&text, format, arguments);
    va_end(arguments);
    CHECK(length >= 0, "out of memory");
    return text;
}
