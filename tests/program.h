/* program.h - running the program under test with a line of arguments. */
#ifndef PROGRAM_H
#define PROGRAM_H

#include "tests/test.h"

/* What the last run wrote to standard output and standard error. */
extern char program_out[1 << 16], program_err[1 << 16];

const char *program_path(void);

/* Both, one after the other. */
const char *program_output(void);

/* Runs it; its exit status. */
int program_run(const char *format, ...) __attribute__((format(printf, 1, 2)));

#define EXPECT_RUN(code, ...)                                                                      \
    do {                                                                                           \
        int run_status = program_run(__VA_ARGS__);                                                 \
        EXPECT(run_status == (code), "exit status %d: %s", run_status, program_err);               \
    } while (0)

#define EXPECT_EXIT(code, part, ...)                                                               \
    do {                                                                                           \
        EXPECT_RUN(code, __VA_ARGS__);                                                             \
        EXPECT(strstr(program_output(), part), "'%s' lacks '%s'", program_output(), part);         \
    } while (0)

#endif
