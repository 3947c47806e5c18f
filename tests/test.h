/* test.h - cases that register themselves; each runs in a process of its own.
 *
 * CASE(file, what_holds) { ... } fails on the first EXPECT that does not hold. A case that lacks
 * what it needs calls SKIP with the reason: that is neither passed nor failed. */
#ifndef TEST_H
#define TEST_H

#include "kernels/tensor.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct TestCase {
    const char *suite, *name;
    void (*run)(void);
    struct TestCase *next;
} TestCase;

void test_register(TestCase *test);
_Noreturn void test_fail(const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
_Noreturn void test_skip(const char *format, ...) __attribute__((format(printf, 1, 2)));

#define CASE(suite_name, case_name)                                                                \
    static void suite_name##_##case_name(void);                                                    \
    static TestCase suite_name##_##case_name##_case = {#suite_name, #case_name,                    \
                                                       suite_name##_##case_name, NULL};            \
    __attribute__((constructor)) static void suite_name##_##case_name##_register(void) {           \
        test_register(&suite_name##_##case_name##_case);                                           \
    }                                                                                              \
    static void suite_name##_##case_name(void)

#define EXPECT(condition, ...)                                                                     \
    do {                                                                                           \
        if (!(condition)) test_fail(__FILE__, __LINE__, " " __VA_ARGS__);                          \
    } while (0)

#define EXPECT_OK(call)                                                                            \
    do {                                                                                           \
        if ((call) != OK) test_fail(__FILE__, __LINE__, "%s: %s", #call, status_message());        \
    } while (0)

/* The call fails with a message that holds `part`. */
#define EXPECT_ERROR(call, part)                                                                   \
    do {                                                                                           \
        if ((call) == OK) test_fail(__FILE__, __LINE__, "%s succeeded", #call);                    \
        if (!strstr(status_message(), part))                                                       \
            test_fail(__FILE__, __LINE__, "message '%s' lacks '%s'", status_message(), part);      \
    } while (0)

#define EXPECT_CLOSE(a, b, tolerance)                                                              \
    do {                                                                                           \
        double close_a = (a), close_b = (b);                                                       \
        if (!(close_a - close_b <= (tolerance) && close_b - close_a <= (tolerance)))               \
            test_fail(__FILE__, __LINE__, "%s = %.9g, %s = %.9g, beyond %.3g", #a, close_a, #b,    \
                      close_b, (double)(tolerance));                                               \
    } while (0)

/* The statement breaks a contract: the program stops with a fault. Before any other kernel runs. */
bool test_faults(void (*statement)(void));

#define SKIP(...) test_skip(__VA_ARGS__)

/* Norm of difference over norm of b. */
double relative_error(const float *a, const float *b, int64_t n);

/* A fresh folder that goes away with the case. */
const char *test_folder(void);

/* The path of a file below tests/fixtures, or below the shared data (SKIPs when that is absent). */
char *fixture_path(const char *name);
char *shared_path(const char *name);

/* A tensor with normal values on the CPU, from a stream named by `key`. */
Tensor random_tensor(DType dtype, uint64_t key, int ndim, const int64_t *shape);
#define RANDOM_TENSOR(dtype, key, ...)                                                             \
    random_tensor(dtype, key, (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)),           \
                  (const int64_t[]){__VA_ARGS__})

#endif
