/* matmul.c - which engine a product takes, and the ordered product.
 *
 * Large products of bf16 go to the CPU's tiles where it has them (amx.c); else those of one dtype
 * go to oneDNN (bf16 where the CPU multiplies bf16, else converted in panels to f32); at the
 * generic level, on aarch64 and for two dtypes, the ordered product below does them. */
#include "kernels/matmul.h"
#include "kernels/cpu/amx.h"
#include "kernels/cpu/onednn.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cpu/tile.h"

/* Where oneDNN is fast; elsewhere the ordered product does everything. */
#if defined __aarch64__ || defined NO_ONEDNN
#define HAS_ONEDNN 0
#else
#define HAS_ONEDNN !LEVEL_PLAIN
#endif

#define FEW 4 /* rows that meet a matrix one after the other */

#define PANEL_M 96
#define PANEL_N 256
#define PANEL_K 256

/* a (m_count, k_count) panel at (m, k) of the left operand: f32, element (i, p) at i * *row + p *
 * *col. */
static const float *left_panel(float *buffer, Layout layout, Tensor a, int64_t m, int64_t m_count,
                               int64_t k, int64_t k_count, int64_t *row, int64_t *col) {
    int64_t width = tensor_cols(a);
    if (layout == TN) { /* stored (K, M) */
        *row = 1;
        *col = a.dtype == F32 ? width : m_count;
        if (a.dtype == F32) return (const float *)a.data + k * width + m;
        for (int64_t p = 0; p < k_count; p++)
            load_f32(buffer + p * m_count, a, (k + p) * width + m, m_count);
        return buffer;
    }
    *col = 1;
    *row = a.dtype == F32 ? width : k_count;
    if (a.dtype == F32) return (const float *)a.data + m * width + k;
    for (int64_t i = 0; i < m_count; i++)
        load_f32(buffer + i * k_count, a, (m + i) * width + k, k_count);
    return buffer;
}

/* A (k_count, n_count) panel at (k, n) of the right operand: f32, rows of *stride. */
static const float *right_panel(float *buffer, Layout layout, Tensor b, int64_t n, int64_t n_count,
                                int64_t k, int64_t k_count, int64_t *stride) {
    int64_t width = tensor_cols(b);
    if (layout == NT) { /* stored (N, K) */
        float lines[LANES * PANEL_K];
        *stride = n_count;
        for (int64_t j = 0; j < n_count; j += LANES) {
            int64_t count = n_count - j < LANES ? n_count - j : LANES, apart = width;
            const float *rows = (const float *)b.data + (n + j) * width + k;
            if (b.dtype != F32) {
                for (int64_t i = 0; i < count; i++)
                    load_f32(lines + i * PANEL_K, b, (n + j + i) * width + k, k_count);
                rows = lines;
                apart = PANEL_K;
            }
            turn_around(buffer + j, n_count, rows, apart, count, k_count);
        }
        return buffer;
    }
    *stride = b.dtype == F32 ? width : n_count;
    if (b.dtype == F32) return (const float *)b.data + k * width + n;
    for (int64_t p = 0; p < k_count; p++)
        load_f32(buffer + p * n_count, b, (k + p) * width + n, n_count);
    return buffer;
}

static void ordered_product(Layout layout, Tensor y, Write write, Tensor a, Tensor b, float alpha) {
    int64_t M = tensor_rows(y), N = tensor_cols(y),
            K = layout == TN ? tensor_rows(a) : tensor_cols(a);
    int64_t m_panels = (M + PANEL_M - 1) / PANEL_M, n_panels = (N + PANEL_N - 1) / PANEL_N;
#pragma omp parallel if (M * N * K > 32768)
    {
        float *memory =
            thread_scratch(PANEL_M * PANEL_K + PANEL_K * PANEL_N + PANEL_M * PANEL_N + PANEL_N);
        float *left = memory, *right = left + PANEL_M * PANEL_K, *sum = right + PANEL_K * PANEL_N;
        float *line = sum + PANEL_M * PANEL_N;
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t mp = 0; mp < m_panels; mp++)
            for (int64_t np = 0; np < n_panels; np++) {
                int64_t m = mp * PANEL_M, n = np * PANEL_N;
                int64_t m_count = M - m < PANEL_M ? M - m : PANEL_M,
                        n_count = N - n < PANEL_N ? N - n : PANEL_N;
                if (!K) memset(sum, 0, (size_t)(m_count * n_count) * sizeof *sum);
                for (int64_t k = 0; k < K; k += PANEL_K) {
                    int64_t k_count = K - k < PANEL_K ? K - k : PANEL_K, row, col, stride;
                    const float *l =
                        left_panel(left, layout, a, m, m_count, k, k_count, &row, &col);
                    const float *r = right_panel(right, layout, b, n, n_count, k, k_count, &stride);
                    tile_product(m_count, n_count, k_count, l, row, col, r, stride, sum, n_count,
                                 k > 0);
                }
                for (int64_t i = 0; i < m_count; i++) {
                    float *row = sum + i * n_count;
                    int64_t first = (m + i) * N + n;
                    const float *old = write == ADD ? load_f32(line, y, first, n_count) : NULL;
                    for (int64_t j = 0; j < n_count; j++)
                        row[j] = alpha * row[j] + (old ? old[j] : 0.0f);
                    store_f32(y, first, n_count, row);
                }
            }
    }
}

/* The same where the CPU has tiles: of f32 and bf16, or of f32 into bf16, by those. */
static void adapter_product(Layout layout, Tensor y, Write write, Tensor a, Tensor b, float alpha) {
#if LANES == 16
    bool many = has_tiles() && tensor_count(a) && (layout != NT || tensor_rows(y) > FEW);
    if (many && a.dtype + b.dtype == F32 + BF16) {
        CPU(amx_mixed)(layout, y, write, a, b, alpha);
        return;
    }
    if (many && layout != TN && a.dtype == F32 && y.dtype == BF16) {
        CPU(amx_product)(layout, y, write, tensor_absent(), tensor_absent(), &(Term){a, b, alpha});
        return;
    }
#endif
    ordered_product(layout, y, write, a, b, alpha);
}

void CPU(matmul_ordered_several)(Layout layout, const Tensor *y, Write write, const Tensor *a,
                                 const Tensor *b, int count, float alpha) {
    for (int i = 0; i < count; i++)
        adapter_product(layout, y[layout == NN ? 0 : i], write, a[layout == NT ? 0 : i],
                        b[layout == TN ? 0 : i], alpha);
}

void CPU(adapters_backward)(const AdapterBack *a, int count) {
    for (int i = 0; i < count; i++) {
        adapter_product(NN, a[i].du, SET, a[i].dy, a[i].B, a[i].scale);
        if (a[i].dB.data) adapter_product(TN, a[i].dB, ADD, a[i].dy, a[i].u, a[i].scale);
    }
}

/* Column n of y takes the totals of its rows. */
static void write_column(Tensor y, Write write, int64_t n, const float *total) {
    int64_t M = tensor_rows(y), N = tensor_cols(y);
    for (int64_t m = 0; m < M; m++) {
        float one, value = total[m];
        if (write == ADD) value += *load_f32(&one, y, m * N + n, 1);
        store_f32(y, m * N + n, 1, &value);
    }
}

/* Few rows against a large (N, K) matrix: every weight is read once and a dot product runs along K.
 */
static void few_rows(Tensor y, Write write, Tensor a, Tensor b) {
    int64_t M = tensor_rows(y), N = tensor_cols(y), K = tensor_cols(a);
    float *rows = thread_scratch((size_t)(M * K));
    for (int64_t m = 0; m < M; m++) {
        const float *row = load_f32(rows + m * K, a, m * K, K);
        if (row != rows + m * K) memcpy(rows + m * K, row, (size_t)K * sizeof *row);
    }
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        float total[4] = {0}, buffer[CHUNK];
        for (int64_t k = 0; k < K; k += CHUNK) {
            int64_t count = K - k < CHUNK ? K - k : CHUNK;
            const float *w = load_f32(buffer, b, n * K + k, count);
            for (int64_t m = 0; m < M; m++) {
                const float *x = rows + m * K + k;
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int64_t i = 0; i < count; i++) sum += w[i] * x[i];
                total[m] += sum;
            }
        }
        write_column(y, write, n, total);
    }
}

/* Pairs of bf16 as words: what a shift and what a mask leave of one are the floats of its halves.
 */
typedef uint32_t Words __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

/* How far ahead weights are fetched into the second cache: 0.93 of what memory gives on one
 * machine, 0.76 without. */
#define AHEAD_BYTES 2880

/* total (M) = one row of weights, `pairs` pairs, times M rows of `x`, each its even elements and
 * then its odd ones. */
static inline __attribute__((always_inline)) void
dot_pairs(const int M, float *total, const uint16_t *weights, const float *x, int64_t pairs) {
    Vec even[4], odd[4];
    for (int m = 0; m < M; m++) even[m] = odd[m] = (Vec){0};
    int64_t i = 0;
    for (; i + LANES <= pairs; i += LANES) {
        Words w = *(const Words *)(weights + 2 * i);
        __builtin_prefetch((const char *)(weights + 2 * i) + AHEAD_BYTES, 0, 2);
        for (int m = 0; m < M; m++) {
            even[m] += (Vec)(w << 16) * *(const Vec *)(x + 2 * m * pairs + i);
            odd[m] += (Vec)(w & 0xffff0000u) * *(const Vec *)(x + (2 * m + 1) * pairs + i);
        }
    }
    for (int m = 0; m < M; m++) {
        total[m] = 0;
        for (int64_t k = i; k < pairs; k++)
            total[m] += bf16_to_f32(weights[2 * k]) * x[2 * m * pairs + k] +
                        bf16_to_f32(weights[2 * k + 1]) * x[(2 * m + 1) * pairs + k];
        even[m] += odd[m];
        for (int lane = 0; lane < LANES; lane++) total[m] += even[m][lane];
    }
}

/* few_rows for weights in bf16. */
static void few_rows_bf16(Tensor y, Write write, Tensor a, Tensor b) {
    int64_t M = tensor_rows(y), N = tensor_cols(y), K = tensor_cols(a), pairs = K / 2;
    float *x = thread_scratch((size_t)((M + 1) * K)), *line = x + M * K;
    for (int64_t m = 0; m < M; m++) {
        const float *row = load_f32(line, a, m * K, K);
        for (int64_t k = 0; k < pairs; k++) {
            x[2 * m * pairs + k] = row[2 * k];
            x[(2 * m + 1) * pairs + k] = row[2 * k + 1];
        }
    }
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const uint16_t *weights = (const uint16_t *)b.data + n * K;
        float total[4];
        if (M == 1)
            dot_pairs(1, total, weights, x, pairs);
        else if (M == 2)
            dot_pairs(2, total, weights, x, pairs);
        else if (M == 3)
            dot_pairs(3, total, weights, x, pairs);
        else
            dot_pairs(4, total, weights, x, pairs);
        write_column(y, write, n, total);
    }
}

static void widen(float *out, Tensor x) {
    int64_t count = tensor_count(x);
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < count; first += CHUNK)
        load_f32(out + first, x, first, count - first < CHUNK ? count - first : CHUNK);
}

/* Columns first .. first + n of b as f32, contiguous. Their pieces of rows lie too far apart for
 * the processor to read ahead by itself. */
#define ROWS_AHEAD 16
static void widen_columns(float *out, Tensor b, int64_t first, int64_t n) {
    int64_t cols = tensor_cols(b);
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < tensor_rows(b); r++)
        for (int64_t k = 0; k < n; k += CHUNK) {
            int64_t count = n - k < CHUNK ? n - k : CHUNK;
            float *to = out + r * n + k;
            if (b.dtype == BF16 && r + ROWS_AHEAD < tensor_rows(b))
                for (int64_t i = 0; i < count; i += 32) /* a cache line */
                    __builtin_prefetch((const uint16_t *)b.data + (r + ROWS_AHEAD) * cols + first +
                                       k + i);
            const float *from = load_f32(to, b, r * cols + first + k, count);
            if (from != to) memcpy(to, from, (size_t)count * sizeof *to);
        }
}

/* Columns first .. first + n of y take the product's. */
static void narrow_columns(Tensor y, int64_t stride, int64_t first, int64_t n, Write write,
                           float *product) {
#pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < tensor_rows(y); m++)
        for (int64_t k = 0; k < n; k += CHUNK) {
            int64_t count = n - k < CHUNK ? n - k : CHUNK;
            float buffer[CHUNK], *out = product + m * n + k;
            if (write == ADD) {
                const float *old = load_f32(buffer, y, m * stride + first + k, count);
                for (int64_t i = 0; i < count; i++) out[i] += old[i];
            }
            store_f32(y, m * stride + first + k, count, out);
        }
}

/* Elements of b widened at a time: panels of columns stay in the caches (twice as fast for NN). */
#define WIDENED (1 << 20)

/* Products of bf16 on a CPU without them: both operands as f32, the result rounded once. */
static void convert_and_multiply(Layout layout, Tensor y, int64_t stride, Write write, Tensor a,
                                 Tensor b) {
    int64_t N = tensor_cols(y), M = tensor_rows(y), K = tensor_count(b) / N;
    int64_t part = WIDENED / K / 64 * 64;
    part = part < 64 ? 64 : part;
    if (part > N) part = N;
    float *left = thread_scratch((size_t)(tensor_count(a) + part * (K + M)));
    float *right = left + tensor_count(a), *product = right + part * K;
    widen(left, a);
    a.dtype = F32;
    a.data = left;
    for (int64_t first = 0; first < N; first += part) {
        int64_t n = N - first < part ? N - first : part;
        Tensor panel = TENSOR(right, F32, layout == NT ? n : K, layout == NT ? K : n);
        if (layout == NT)
            widen(right, tensor_slice(b, first, n));
        else
            widen_columns(right, b, first, n);
        onednn_product(layout, TENSOR(product, F32, M, n), n, SET, a, panel);
        narrow_columns(y, stride, first, n, write, product);
    }
}

/* A large product of one dtype; rows of y are `stride` elements apart. */
static void dense_product(Layout layout, Tensor y, int64_t stride, Write write, Tensor a,
                          Tensor b) {
    if (a.dtype == BF16 && !cpu_has_bf16_products())
        convert_and_multiply(layout, y, stride, write, a, b);
    else
        onednn_product(layout, y, stride, write, a, b);
}

/* Elements unpacked at a time: 8 MB of bf16 stay in the third cache. */
#define UNPACKED (4 << 20)

/* Packed weights unpack in panels: of output rows for NT, of columns for NN, so that every element
 * of y is one product. */
/* NN over so many rows that panels of columns would be slivers (the head's backward): panels of
 * rows, their products summed in f32. */
static void packed_sum(Tensor y, Write write, Tensor a, Tensor b) {
    int64_t rows = tensor_rows(b), cols = tensor_cols(b), M = tensor_rows(y), count = M * cols;
    int64_t part = UNPACKED / cols / TILE_HEIGHT * TILE_HEIGHT;
    float *memory = outer_scratch((size_t)(part * cols + M * part + count));
    float *left = memory + part * cols, *sum = left + M * part;
    Tensor total = TENSOR(sum, F32, M, cols);
    size_t size = dtype_size(a.dtype);
    for (int64_t first = 0; first < rows; first += part) {
        int64_t n = rows - first < part ? rows - first : part;
        Tensor panel = TENSOR(memory, a.dtype, n, cols), some = TENSOR(left, a.dtype, M, n);
        CPU(unpack)(panel, b, first, 0);
        for (int64_t m = 0; m < M; m++)
            memcpy((char *)some.data + (size_t)(m * n) * size,
                   (char *)a.data + (size_t)(m * rows + first) * size, (size_t)n * size);
        dense_product(NN, total, cols, first ? ADD : SET, some, panel);
    }
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < count; first += CHUNK) {
        int64_t n = count - first < CHUNK ? count - first : CHUNK;
        float buffer[CHUNK];
        if (write == ADD) {
            const float *old = load_f32(buffer, y, first, n);
            for (int64_t i = 0; i < n; i++) sum[first + i] += old[i];
        }
        store_f32(y, first, n, sum + first);
    }
}

static void packed_product(Layout layout, Tensor y, Write write, Tensor a, Tensor b) {
    int64_t rows = tensor_rows(b), cols = tensor_cols(b), M = tensor_rows(y), N = tensor_cols(y);
    int64_t across = layout == NT ? rows : cols, along = layout == NT ? cols : rows;
    if (layout == NN && UNPACKED / along < 128 && cols > 128) {
        packed_sum(y, write, a, b);
        return;
    }
    int64_t part = UNPACKED / along / 64 * 64;
    if (part < 64) part = 64;
    if (part > across) part = across;
    void *memory = outer_scratch((size_t)(part * along));
    for (int64_t first = 0; first < across; first += part) {
        int64_t n = across - first < part ? across - first : part;
        Tensor panel = TENSOR(memory, a.dtype, layout == NT ? n : rows, layout == NT ? cols : n);
        CPU(unpack)(panel, b, layout == NT ? first : 0, layout == NT ? 0 : first);
        Tensor out = TENSOR(y.data, y.dtype, M, n);
        out.data = (char *)y.data + (size_t)first * dtype_size(y.dtype);
        dense_product(layout, out, N, write, a, panel);
    }
}

/* y (=|+=) alpha a b + term; NULL: no term. */
static void product(Layout layout, Tensor y, Write write, Tensor a, Tensor b, float alpha,
                    const Term *term) {
    bool packed = dtype_is_packed(b.dtype);
    bool dense =
        (a.dtype == b.dtype || packed) && alpha == 1.0f && (y.dtype == a.dtype || y.dtype == F32);
    if (layout == NT && tensor_rows(y) <= FEW && alpha == 1.0f && !LEVEL_PLAIN) {
        (b.dtype == BF16 && tensor_cols(a) % 2 == 0 ? few_rows_bf16 : few_rows)(y, write, a, b);
#if LANES == 16
    } else if (dense && a.dtype == BF16 && has_tiles() && tensor_count(a)) {
        bool within = term && y.dtype == BF16;
        CPU(amx_product)(layout, y, write, a, b, within ? term : NULL);
        if (within) return;
#endif
    } else if (!dense) {
        adapter_product(layout, y, write, a, b, alpha);
    } else if (!HAS_ONEDNN) {
        ordered_product(layout, y, write, a, b, alpha);
    } else if (packed) {
        packed_product(layout, y, write, a, b);
    } else {
        dense_product(layout, y, tensor_cols(y), write, a, b);
    }
    if (term) adapter_product(layout, y, ADD, term->u, term->v, term->scale);
}

void CPU(matmul)(Layout layout, Tensor y, Write write, Tensor a, Tensor b, float alpha) {
    product(layout, y, write, a, b, alpha, NULL);
}

static const Term *term_of(const Term *terms, int i) {
    return has_term(terms, i) ? &terms[i] : NULL;
}

void CPU(matmul_several)(const Tensor *y, Tensor a, const Tensor *b, const Term *terms, int count) {
    for (int i = 0; i < count; i++) product(NT, y[i], SET, a, b[i], 1.0f, term_of(terms, i));
}

void CPU(matmul_sum)(Tensor y, Write write, const Tensor *a, const Tensor *b, const Term *terms,
                     int count) {
    for (int i = 0; i < count; i++)
        product(NN, y, i ? ADD : write, a[i], b[i], 1.0f, term_of(terms, i));
}

void CPU(grouped_matmul)(Layout layout, Tensor y, Write write, Tensor a, Tensor b, Tensor offsets,
                         float alpha) {
    const int32_t *bounds = offsets.data;
    for (int64_t g = 0; g + 1 < tensor_count(offsets); g++) {
        int64_t first = bounds[g], count = bounds[g + 1] - first;
        if (!count) continue;
        Tensor rows = tensor_slice(a, first, count);
        if (layout == TN)
            product(TN, tensor_at(y, g), ADD, rows, tensor_slice(b, first, count), alpha, NULL);
        else
            product(layout, tensor_slice(y, first, count), write, rows, tensor_at(b, g), alpha,
                    NULL);
    }
}
