/* test.c - the runner: every case in a child process, a line for what failed or was skipped,
 * totals. */
#include "tests/test.h"
#include "formats/file.h"
#include "kernels/elementwise.h"
#include "kernels/random.h"

#include <fcntl.h>
#include <math.h>
#include <stdarg.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define EXIT_SKIPPED 77

static TestCase *first_case, **last_case = &first_case;
static int report_pipe = -1;
static char folder[256];

void test_register(TestCase *test) {
    *last_case = test;
    last_case = &test->next;
}

static _Noreturn void leave(int code, const char *text) {
    if (report_pipe >= 0 && write(report_pipe, text, strlen(text)) < 0) code = 1;
    if (*folder) tree_remove(folder);
    fflush(NULL);
    _exit(code);
}

_Noreturn void test_fail(const char *file, int line, const char *format, ...) {
    char text[1200], whole[1400];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    snprintf(whole, sizeof whole, "%s:%d: %s", file, line, text);
    leave(1, whole);
}

_Noreturn void test_skip(const char *format, ...) {
    char text[400];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    leave(EXIT_SKIPPED, text);
}

bool test_faults(void (*statement)(void)) {
    pid_t child = fork();
    if (child == 0) {
        int null = open("/dev/null", O_WRONLY);
        dup2(null, 2);
        statement();
        _exit(0);
    }
    int status;
    waitpid(child, &status, 0);
    return WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
}

double relative_error(const float *a, const float *b, int64_t n) {
    double difference = 0, norm = 0;
    for (int64_t i = 0; i < n; i++) {
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        norm += (double)b[i] * b[i];
    }
    if (!isfinite(difference)) return INFINITY;
    return norm > 0 ? sqrt(difference / norm) : sqrt(difference);
}

const char *test_folder(void) {
    if (!*folder) {
        const char *base = getenv("TMPDIR");
        snprintf(folder, sizeof folder, "%s/lapidary-test-XXXXXX", base ? base : "/tmp");
        if (!mkdtemp(folder)) test_fail(__FILE__, __LINE__, "no temporary folder");
    }
    return folder;
}

char *fixture_path(const char *name) {
    return path_join("tests/fixtures", name);
}

char *shared_path(const char *name) {
    const char *base = getenv("LAPIDARY_SHARED");
    char *path = path_join(base ? base : "../shared", name);
    if (!file_exists(path)) test_skip("%s is not here", path);
    return path;
}

Tensor random_tensor(DType dtype, uint64_t key, int ndim, const int64_t *shape) {
    Tensor t = tensor_make(NULL, F32, ndim, shape);
    int64_t n = tensor_count(t);
    t.data = must_malloc((size_t)n * sizeof(float));
    random_normal(t.data, random_key(1, key), 0, n);
    if (dtype == F32) return t;
    Tensor half = tensor_make(must_malloc((size_t)n * 2), dtype, ndim, shape);
    scale_copy(half, SET, t, 1.0f);
    free(t.data);
    return half;
}

static int run_case(TestCase *test, char *text, size_t size, double *seconds) {
    int ends[2];
    if (pipe(ends)) exit(1);
    struct timespec from, to;
    clock_gettime(CLOCK_MONOTONIC, &from);
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        close(ends[0]);
        report_pipe = ends[1];
        test->run();
        if (*folder) tree_remove(folder);
        fflush(NULL);
        exit(0); /* not _exit: leak checks run */
    }
    close(ends[1]);
    size_t used = 0;
    for (ssize_t got; (got = read(ends[0], text + used, size - 1 - used)) > 0;) used += (size_t)got;
    text[used] = 0;
    close(ends[0]);
    int status;
    waitpid(child, &status, 0);
    clock_gettime(CLOCK_MONOTONIC, &to);
    *seconds = (double)(to.tv_sec - from.tv_sec) + 1e-9 * (double)(to.tv_nsec - from.tv_nsec);
    if (WIFSIGNALED(status)) {
        snprintf(text + used, size - used, "ended by signal %d (%s)", WTERMSIG(status),
                 strsignal(WTERMSIG(status)));
        return 1;
    }
    return WEXITSTATUS(status);
}

int main(int argc, char **argv) {
    int passed = 0, failed = 0, skipped = 0;
    char text[2048];
    for (TestCase *test = first_case; test; test = test->next) {
        char name[256];
        snprintf(name, sizeof name, "%s.%s", test->suite, test->name);
        bool wanted = argc < 2;
        for (int i = 1; i < argc; i++) wanted |= strstr(name, argv[i]) != NULL;
        if (!wanted) continue;
        double seconds;
        int code = run_case(test, text, sizeof text, &seconds);
        const char *word = code == 0 ? "ok" : code == EXIT_SKIPPED ? "skipped" : "FAILED";
        printf("%-7s %s (%.2f s)%s%s\n", word, name, seconds, *text ? ": " : "", text);
        fflush(stdout);
        passed += code == 0;
        skipped += code == EXIT_SKIPPED;
        failed += code != 0 && code != EXIT_SKIPPED;
    }
    printf("%d skipped\n%d passed, %d failed\n", skipped, passed, failed);
    return failed != 0;
}
