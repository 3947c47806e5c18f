/* sampling.c - rows are cut in runs; each run's best and sums join in order. */
#include "kernels/sampling.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/scratch.h"

#include <stdlib.h>

#define RUN 8192

typedef struct Candidate {
    float z;
    int32_t id;
} Candidate;

static bool better(Candidate a, Candidate b) {
    return a.z > b.z || (a.z == b.z && a.id < b.id);
}

/* A heap with the worst of the best on top. */
static void sift(Candidate *heap, int64_t count, int64_t i) {
    for (int64_t child; (child = 2 * i + 1) < count; i = child) {
        if (child + 1 < count && better(heap[child], heap[child + 1])) child++;
        if (better(heap[child], heap[i])) return;
        Candidate held = heap[i];
        heap[i] = heap[child], heap[child] = held;
    }
}

static void offer(Candidate *heap, int64_t *count, int64_t k, Candidate c) {
    if (*count < k) {
        heap[(*count)++] = c;
        if (*count == k)
            for (int64_t i = k / 2; i-- > 0;) sift(heap, k, i);
    } else if (better(c, heap[0])) {
        heap[0] = c;
        sift(heap, k, 0);
    }
}

/* The best k of z[0 .. n - 1], whose first has id `first`: in the heap, in no order. */
static int64_t best_of(Candidate *heap, int64_t k, const float *z, int64_t n, int32_t first) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += LANES) {
        int64_t end = i + LANES < n ? i + LANES : n;
        if (count == k) { /* most vectors have nothing to offer */
            float most = z[i];
            for (int64_t j = i; j < end; j++) most = z[j] > most ? z[j] : most;
            if (most < heap[0].z) continue;
        }
        for (int64_t j = i; j < end; j++)
            offer(heap, &count, k, (Candidate){z[j], first + (int32_t)j});
    }
    return count;
}

static float sum_of(const float *z, int64_t n, float scale, float top) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += fast_exp((z[i] - top) * scale);
    return sum;
}

/* What a run leaves: its candidates, and its sums relative to its own largest. */
typedef struct Part {
    Candidate *best;
    int64_t count;
    float top, sum[2];
} Part;

static int by_rank(const void *a, const void *b) {
    return better(*(const Candidate *)a, *(const Candidate *)b) ? -1 : 1;
}

void CPU(top_logits)(Tensor values, Tensor ids, Tensor lse, Tensor logits, Tensor scale) {
    int64_t N = tensor_rows(logits), V = tensor_cols(logits), k = tensor_cols(values);
    int64_t runs = (V + RUN - 1) / RUN, most = k < RUN ? k : RUN;
    size_t part_floats = sizeof(Part) / sizeof(float) + 1;
    float *memory =
        outer_scratch((size_t)(N * runs) * ((size_t)(2 * most) + part_floats) + (size_t)(16 + k));
    Part *parts = (Part *)memory;
    Candidate *candidates = (Candidate *)(parts + N * runs);
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t n = 0; n < N; n++)
        for (int64_t run = 0; run < runs; run++) {
            int64_t first = run * RUN, count = V - first < RUN ? V - first : RUN;
            const float *z = (const float *)logits.data + n * V + first;
            Part *p = &parts[n * runs + run];
            p->best = candidates + (n * runs + run) * most;
            p->count = best_of(p->best, count < most ? count : most, z, count, (int32_t)first);
            p->top = -INFINITY;
            for (int64_t i = 0; i < p->count; i++)
                p->top = p->best[i].z > p->top ? p->best[i].z : p->top;
            bool any = p->top > -INFINITY;
            p->sum[0] = any ? sum_of(z, count, 1.0f, p->top) : 0;
            p->sum[1] = any ? sum_of(z, count, ((const float *)scale.data)[n], p->top) : 0;
        }
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        Part *p = parts + n * runs;
        Candidate *all = p[0].best; /* runs lie behind each other: packed, ranked, the best taken */
        int64_t count = 0;
        double total[2] = {0, 0};
        float top = -INFINITY, s = ((const float *)scale.data)[n];
        for (int64_t run = 0; run < runs; run++) top = p[run].top > top ? p[run].top : top;
        for (int64_t run = 0; run < runs; run++) {
            memmove(all + count, p[run].best, (size_t)p[run].count * sizeof *all);
            count += p[run].count;
            if (p[run].top == -INFINITY) continue;
            total[0] += p[run].sum[0] * exp(p[run].top - top);
            total[1] += p[run].sum[1] * exp((double)(p[run].top - top) * s);
        }
        qsort(all, (size_t)count, sizeof *all, by_rank);
        for (int64_t i = 0; i < k; i++) {
            ((float *)values.data)[n * k + i] = all[i].z;
            ((int32_t *)ids.data)[n * k + i] = all[i].id;
        }
        ((float *)lse.data)[2 * n] = top + (float)log(total[0]);
        ((float *)lse.data)[2 * n + 1] = top * s + (float)log(total[1]);
    }
}

void CPU(pick_columns)(Tensor y, Tensor x, Tensor columns) {
    int64_t V = tensor_cols(x);
    for (int64_t n = 0; n < tensor_rows(x); n++) {
        int32_t column = ((const int32_t *)columns.data)[n];
        ((float *)y.data)[n] = column < 0 ? 0.0f : ((const float *)x.data)[n * V + column];
    }
}
