/* kernel_times.c - time of each GPU kernel of a program, without a profiler's programs.
 *
 *   make build/static/kernel_times.so
 *   CUDA_INJECTION64_PATH=$PWD/build/static/kernel_times.so ./lapidary bench --preset e2b --train
 * lora --tokens 4096
 *
 * At its end the program prints, on stderr, a line for each kernel and grid, dearest first:
 * milliseconds together, share, runs, microseconds a run, name and grid; and how much of the time
 * from the first kernel to the last the GPU was idle. A kernel's time begins where the last one
 * before it ended, if it got ready earlier; in brackets what it took from its own start on.
 * KERNEL_TIMES_TOP lines, by default 40. */
#include <cupti.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NAMES  4096
#define BUFFER ((size_t)8 << 20)

char *__cxa_demangle(const char *name, char *buffer, size_t *size, int *status);

typedef struct Entry {
    char *name;
    double ns, from_start;
    long runs;
    int grid[3], block;
} Entry;

static Entry entries[NAMES];
static int count;
static double busy, first = 1e30, last;

static const int none[3];

static void add(const char *name, double start, double end, const int *grid, int block) {
    int i = 0;
    double begin = start > last ? start : last, ns = end > begin ? end - begin : 0;
    while (i < count &&
           (strcmp(entries[i].name, name) || memcmp(entries[i].grid, grid, sizeof entries[i].grid)))
        i++;
    if (i == NAMES) return;
    if (i == count) {
        entries[count++].name = strdup(name);
        memcpy(entries[i].grid, grid, sizeof entries[i].grid);
        entries[i].block = block;
    }
    entries[i].ns += ns;
    entries[i].from_start += end - start;
    entries[i].runs++;
    busy += ns;
    if (start < first) first = start;
    if (end > last) last = end;
}

static void CUPTIAPI want(uint8_t **buffer, size_t *size, size_t *most) {
    *buffer = aligned_alloc(8, BUFFER);
    *size = BUFFER;
    *most = 0;
}

static void CUPTIAPI take(CUcontext context, uint32_t stream, uint8_t *buffer, size_t size,
                          size_t valid) {
    CUpti_Activity *record = NULL;
    (void)context, (void)stream, (void)size;
    while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
        if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
            const CUpti_ActivityKernel10 *k = (const CUpti_ActivityKernel10 *)record;
            int grid[3] = {k->gridX, k->gridY, k->gridZ};
            add(k->name, (double)k->start, (double)k->end, grid, k->blockX * k->blockY * k->blockZ);
        } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
            const CUpti_ActivityMemcpy6 *m = (const CUpti_ActivityMemcpy6 *)record;
            const char *names[] = {"copy", "copy to the GPU", "copy from the GPU"};
            add(names[m->copyKind == 1   ? 1
                      : m->copyKind == 2 ? 2
                                         : 0],
                (double)m->start, (double)m->end, none, 0);
        } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMSET) {
            const CUpti_ActivityMemset4 *m = (const CUpti_ActivityMemset4 *)record;
            char name[64];
            snprintf(name, sizeof name, "memset of %llu bytes", (unsigned long long)m->bytes);
            add(name, (double)m->start, (double)m->end, none, 0);
        }
    }
    free(buffer);
}

static int dearer(const void *a, const void *b) {
    double x = ((const Entry *)a)->ns, y = ((const Entry *)b)->ns;
    return x < y ? 1 : x > y ? -1 : 0;
}

static void report(void) {
    const char *top = getenv("KERNEL_TIMES_TOP");
    int most = top ? atoi(top) : 40;
    cuptiActivityFlushAll(1);
    qsort(entries, (size_t)count, sizeof *entries, dearer);
    for (int i = 0; i < count && i < most; i++) {
        int status = -1;
        char *name = __cxa_demangle(entries[i].name, NULL, NULL, &status);
        fprintf(stderr, "%9.2f ms %5.1f %% %6ld x %9.1f (%.1f) us  %.110s (%d %d %d) %d\n",
                entries[i].ns / 1e6, 100 * entries[i].ns / busy, entries[i].runs,
                entries[i].ns / 1e3 / (double)entries[i].runs,
                entries[i].from_start / 1e3 / (double)entries[i].runs,
                status ? entries[i].name : name, entries[i].grid[0], entries[i].grid[1],
                entries[i].grid[2], entries[i].block);
        free(name);
    }
    fprintf(stderr, "%9.2f ms busy of %.2f\n", busy / 1e6, (last - first) / 1e6);
}

int InitializeInjection(void) {
    cuptiActivityRegisterCallbacks(want, take);
    cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
    cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMCPY);
    cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMSET);
    atexit(report);
    return 1;
}
