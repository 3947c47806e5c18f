/* bench.c - lapidary bench: kernels on this machine against the limits it shows in the same run. */
#include "cli/command.h"
#include "kernels/arena.h"
#include "kernels/matmul.h"
#include "kernels/quantize.h"
#include "kernels/random.h"

#include <inttypes.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static double now(void) {
    return omp_get_wtime();
}

/* Bytes a second that all threads together read from memory: the best of several passes over what
 * no cache holds. */
static double read_rate(const uint64_t *words, size_t count) {
    double best = 0;
    for (int pass = 0; pass < 3; pass++) {
        double start = now();
        uint64_t total = 0;
#pragma omp parallel for simd schedule(static) reduction(^ : total)
        for (size_t i = 0; i < count; i++) total ^= words[i];
        double rate = (double)(count * 8) / (now() - start);
        if (rate > best) best = rate;
        if (total == 1) best += 1e-9; /* the sum is used */
    }
    return best;
}

static void fill_random(Tensor t) {
    int64_t n = tensor_count(t);
    float *row = must_malloc(65536 * sizeof *row);
    for (int64_t first = 0; first < n; first += 65536) {
        int64_t count = n - first < 65536 ? n - first : 65536;
        random_normal(row, 7, (uint64_t)first, count);
        for (int64_t i = 0; i < count; i++) {
            if (t.dtype == F32)
                ((float *)t.data)[first + i] = row[i] * 0.02f;
            else
                ((uint16_t *)t.data)[first + i] = f32_to_bf16(row[i] * 0.02f);
        }
    }
    free(row);
}

/* One product of E2B's width, repeated over `copies` matrices so that none stays in a cache. */
typedef struct Case {
    const char *name;
    DType weight;
    Layout layout;
    int64_t M;
    bool int8;
} Case;

#define IN     1536
#define OUT    12288
#define COPIES 24

static Status run_case(const Case *c, double probe) {
    Arena arena, weights = {0};
    Status status = OK;
    int64_t M = c->M;
    Tensor x, y, plain;
    size_t bytes = (size_t)(M * OUT) * 2 + (size_t)(M * IN) * 2 + (size_t)OUT * IN * 2 + 4096;
    TRY(arena_init(&arena, device_cpu(), bytes, "the operands"));
    plain = ARENA_TENSOR(&arena, BF16, OUT, IN);
    x = ARENA_TENSOR(&arena, BF16, M, c->layout == NT ? IN : OUT);
    y = ARENA_TENSOR(&arena, BF16, M, c->layout == NT ? OUT : IN);
    fill_random(plain);
    fill_random(x);
    Tensor one = {.dtype = c->weight, .ndim = 2, .shape = {OUT, IN}};
    TRY_DONE(arena_init(&weights, device_cpu(), COPIES * ((tensor_bytes(one) + 63) / 64 * 64),
                        "the weights"));
    Tensor w[COPIES];
    for (int i = 0; i < COPIES; i++) {
        w[i] = ARENA_TENSOR(&weights, c->weight, OUT, IN);
        if (i)
            memcpy(w[i].data, w[0].data, tensor_bytes(one));
        else if (dtype_is_packed(c->weight))
            quantize(w[0], plain);
        else
            memcpy(w[0].data, plain.data, tensor_bytes(one));
    }
    double best = 1e9;
    int used = M > 64 ? 6 : COPIES;
    for (int pass = 0; pass < 4; pass++) {
        double start = now();
        for (int i = 0; i < used; i++) {
            if (c->int8)
                matmul_int8(y, x, w[i]);
            else
                matmul(c->layout, y, SET, x, w[i], 1.0f);
        }
        double seconds = (now() - start) / used;
        if (seconds < best) best = seconds;
    }
    double rate = (double)tensor_bytes(one) / best;
    printf("%-44s %9.1f us %8.2f GB/s (%3.0f %%) %9.1f Gop/s\n", c->name, best * 1e6, rate / 1e9,
           100 * rate / probe, 2e-9 * (double)(M * IN * OUT) / best);
done:
    arena_free(&weights);
    arena_free(&arena);
    return status;
}

Status command_bench(int argc, char **argv) {
    static const Case cases[] = {
        {"decode: 1 row, q4_0, 8-bit activations", Q4_0_TILED, NT, 1, true},
        {"decode: 1 row, q8_0, 8-bit activations", Q8_0_TILED, NT, 1, true},
        {"decode: 1 row, bf16", BF16, NT, 1, false},
        {"decode: 4 rows, q4_0, 8-bit activations", Q4_0_TILED, NT, 4, true},
        {"prefill: 512 rows, q4_0, 8-bit activations", Q4_0_TILED, NT, 512, true},
        {"prefill: 512 rows, q8_0, 8-bit activations", Q8_0_TILED, NT, 512, true},
        {"train: 512 rows, bf16", BF16, NT, 512, false},
        {"train: 512 rows, q4_0", Q4_0_TILED, NT, 512, false},
        {"train: 512 rows, nf4", NF4_NESTED, NT, 512, false},
        {"train, backward: 512 rows, bf16", BF16, NN, 512, false},
        {"train, backward: 512 rows, q4_0", Q4_0_TILED, NN, 512, false},
        {"train, backward: 512 rows, nf4", NF4_NESTED, NN, 512, false},
    };
    Option options[] = {{NULL, OPTION_FLAG, NULL, NULL}};
    Arguments a = {.usage = "bench [NAME]",
                   .about =
                       "Times the products of a 1536 x 12288 layer on this machine. NAME keeps "
                       "those whose name contains it.",
                   .options = options,
                   .least = 0,
                   .most = 1};
    TRY(arguments_parse(&a, argc, argv));
    if (a.helped) return OK;
    size_t words = (size_t)1 << 27;
    Arena memory;
    TRY(arena_init(&memory, device_cpu(), words * 8, "the memory probe"));
    double probe = read_rate((const uint64_t *)memory.base, words);
    printf("level %s, %d threads, memory reads %.1f GB/s\n", cpu_level_name(),
           omp_get_max_threads(), probe / 1e9);
    Status status = OK;
    for (size_t i = 0; i < sizeof cases / sizeof *cases && status == OK; i++)
        if (!a.count || strstr(cases[i].name, a.positional[0])) status = run_case(&cases[i], probe);
    if (status == OK)
        printf("memory reads %.1f GB/s at the end\n",
               read_rate((const uint64_t *)memory.base, words) / 1e9);
    arena_free(&memory);
    return status;
}
