/* test.c - the runner: every case in a child process, some at a time; a line for each that has
 * ended, totals. */
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
#define JOBS_MOST    4 /* a case may take gigabytes */

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

/* A case under way. */
typedef struct Running {
    TestCase *test;
    pid_t child;
    int report; /* what it says is read from here */
    struct timespec from;
} Running;

typedef struct Totals {
    int passed, failed, skipped;
} Totals;

static void begin_case(Running *r, TestCase *test) {
    int ends[2];
    if (pipe(ends)) exit(1);
    r->test = test;
    r->report = ends[0];
    clock_gettime(CLOCK_MONOTONIC, &r->from);
    fflush(NULL);
    r->child = fork();
    if (r->child == 0) {
        close(ends[0]);
        report_pipe = ends[1];
        test->run();
        if (*folder) tree_remove(folder);
        fflush(NULL);
        exit(0); /* not _exit: leak checks run */
    }
    close(ends[1]);
}

/* A line for a case that has ended. What it said lies in the pipe, which holds far more. */
static void end_case(Running *r, int status, Totals *totals) {
    char text[2048];
    struct timespec to;
    clock_gettime(CLOCK_MONOTONIC, &to);
    double seconds =
        (double)(to.tv_sec - r->from.tv_sec) + 1e-9 * (double)(to.tv_nsec - r->from.tv_nsec);
    fcntl(r->report, F_SETFL, O_NONBLOCK); /* what it has started may still hold the other end */
    ssize_t got = read(r->report, text, sizeof text - 1);
    text[got > 0 ? got : 0] = 0;
    close(r->report);
    int code = WIFEXITED(status) ? WEXITSTATUS(status) : 1;
    if (WIFSIGNALED(status))
        snprintf(text, sizeof text, "ended by signal %d (%s)", WTERMSIG(status),
                 strsignal(WTERMSIG(status)));
    const char *word = code == 0 ? "ok" : code == EXIT_SKIPPED ? "skipped" : "FAILED";
    printf("%-7s %s.%s (%.2f s)%s%s\n", word, r->test->suite, r->test->name, seconds,
           *text ? ": " : "", text);
    fflush(stdout);
    totals->passed += code == 0;
    totals->skipped += code == EXIT_SKIPPED;
    totals->failed += code != 0 && code != EXIT_SKIPPED;
    r->test = NULL;
}

static bool is_wanted(const TestCase *test, int count, char **words) {
    char name[256];
    snprintf(name, sizeof name, "%s.%s", test->suite, test->name);
    for (int i = 0; i < count; i++)
        if (strstr(name, words[i])) return true;
    return count == 0;
}

/* How many cases run at a time: TEST_JOBS, or as many as there are processors, up to JOBS_MOST. */
static int jobs_of(void) {
    const char *set = getenv("TEST_JOBS");
    long jobs = set ? atol(set) : sysconf(_SC_NPROCESSORS_ONLN);
    return jobs < 1 ? 1 : jobs > JOBS_MOST ? JOBS_MOST : (int)jobs;
}

int main(int argc, char **argv) {
    Running running[JOBS_MOST] = {0};
    Totals totals = {0};
    int jobs = jobs_of(), busy = 0;
    TestCase *next = first_case;
    while (next || busy) {
        for (int i = 0; i < jobs; i++) {
            while (next && !is_wanted(next, argc - 1, argv + 1)) next = next->next;
            if (running[i].test || !next) continue;
            begin_case(&running[i], next);
            next = next->next;
            busy++;
        }
        int status;
        pid_t ended = busy ? wait(&status) : -1;
        for (int i = 0; i < jobs && ended > 0; i++)
            if (running[i].test && running[i].child == ended) {
                end_case(&running[i], status, &totals);
                busy--;
            }
    }
    printf("%d skipped\n%d passed, %d failed\n", totals.skipped, totals.passed, totals.failed);
    return totals.failed != 0;
}
