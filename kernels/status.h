/* status.h - errors (the world's fault) and faults (ours).
 *
 * A function that touches files, configuration or memory limits returns a Status. FAIL records one
 * message for the calling thread, naming file, thing and expectation; TRY forwards it; main prints
 * it once. A broken promise inside the program is a fault: CHECK prints it and aborts. */
#ifndef STATUS_H
#define STATUS_H

#include <stdbool.h>
#include <stddef.h>

typedef enum Status {
    OK = 0,
    ERR_IO,      /* reading, writing, memory */
    ERR_FORMAT,  /* bytes that do not mean what they should */
    ERR_CONFIG,  /* a key, value or combination that is refused */
    ERR_USAGE,   /* the command line: exit status 2 */
    ERR_STOPPED, /* asked to stop, state saved: exit status 143 */
} Status;

/* Records the message of this thread's newest error and returns `status`. */
Status status_fail(Status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* The message of this thread's newest error; valid until the next one. */
const char *status_message(void);

/* Puts "text: " before the newest message and returns `status`. */
Status status_prefix(Status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* A warning or note for the person: one line on standard error, `lapidary: note: ...`. */
void note(const char *format, ...) __attribute__((format(printf, 1, 2)));

_Noreturn void fault(const char *file, int line, const char *condition, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

/* The machine gives way where no Status can be returned (a lost GPU): prints one line as main would
 * and ends the program with status 1, leaving every file as it is. */
_Noreturn void give_up(const char *format, ...) __attribute__((format(printf, 1, 2)));

#define FAIL(status, ...) return status_fail(status, __VA_ARGS__)

#define TRY(call)                                                                                  \
    do {                                                                                           \
        Status try_status = (call);                                                                \
        if (try_status != OK) return try_status;                                                   \
    } while (0)

/* TRY for functions that own something: leaves through `done` with the status in `status`. */
#define TRY_DONE(call)                                                                             \
    do {                                                                                           \
        status = (call);                                                                           \
        if (status != OK) goto done;                                                               \
    } while (0)

#define FAIL_DONE(code, ...)                                                                       \
    do {                                                                                           \
        status = status_fail(code, __VA_ARGS__);                                                   \
        goto done;                                                                                 \
    } while (0)

#define CHECK(condition, ...)                                                                      \
    do {                                                                                           \
        if (!(condition)) fault(__FILE__, __LINE__, #condition, __VA_ARGS__);                      \
    } while (0)

/* malloc, calloc and realloc whose failure is a fault: for small things whose absence leaves
 * nothing to do. What depends on the size of a model or a file is allocated by Status-returning
 * code. */
void *must_malloc(size_t bytes);
void *must_calloc(size_t count, size_t size);
void *must_realloc(void *old, size_t bytes);
char *must_strdup(const char *text);
char *must_format(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
