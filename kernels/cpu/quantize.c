/* quantize.c - reading and writing blocks of small integers.
 *
 * Compiled without contracting a * b + c: ggml and bitsandbytes round the product first, and the
 * same bytes must come out at every level. */
#include "kernels/quantize.h"
#include "kernels/blocks.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/scratch.h"
#include "kernels/dynamic.h"

/* ---- reading ---- */

static void read_q4_0(float *out, const BlockQ4_0 *b) {
    float d = f16_to_f32(b->d);
    for (int j = 0; j < 16; j++) {
        out[j] = d * (float)((b->qs[j] & 15) - 8);
        out[16 + j] = d * (float)((b->qs[j] >> 4) - 8);
    }
}

static void read_q8_0(float *out, const BlockQ8_0 *b) {
    float d = f16_to_f32(b->d);
#pragma omp simd
    for (int j = 0; j < 32; j++) out[j] = d * (float)b->qs[j];
}

/* The 6-bit scale and minimum of sub-block j. */
static void read_scale(const uint8_t *s, int j, int *scale, int *min) {
    if (j < 4) {
        *scale = s[j] & 63;
        *min = s[j + 4] & 63;
    } else {
        *scale = (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
        *min = (s[j + 4] >> 4) | (s[j] >> 6) << 4;
    }
}

static void read_q4_k(float *out, const BlockQ4_K *b) {
    float d = f16_to_f32(b->d), dmin = f16_to_f32(b->dmin);
    for (int j = 0; j < 8; j++) {
        int scale, min;
        read_scale(b->scales, j, &scale, &min);
        float s = d * (float)scale, m = dmin * (float)min;
        for (int i = 0; i < 32; i++) {
            int q = b->qs[j / 2 * 32 + i] >> (j % 2 * 4) & 15;
            out[32 * j + i] = s * (float)q - m;
        }
    }
}

static void read_q5_k(float *out, const BlockQ5_K *b) {
    float d = f16_to_f32(b->d), dmin = f16_to_f32(b->dmin);
    for (int j = 0; j < 8; j++) {
        int scale, min;
        read_scale(b->scales, j, &scale, &min);
        float s = d * (float)scale, m = dmin * (float)min;
        for (int i = 0; i < 32; i++) {
            int q = (b->qs[j / 2 * 32 + i] >> (j % 2 * 4) & 15) | (b->qh[i] >> j & 1) << 4;
            out[32 * j + i] = s * (float)q - m;
        }
    }
}

static void read_q6_k(float *out, const BlockQ6_K *b) {
    float d = f16_to_f32(b->d);
    for (int half = 0; half < 2; half++)
        for (int part = 0; part < 4; part++)
            for (int i = 0; i < 32; i++) {
                int low = b->ql[64 * half + 32 * (part % 2) + i] >> (part / 2 * 4) & 15;
                int high = b->qh[32 * half + i] >> (2 * part) & 3;
                float s = d * (float)b->scales[8 * half + 2 * part + i / 16];
                out[128 * half + 32 * part + i] = s * (float)((low | high << 4) - 32);
            }
}

static void read_nf4(float *out, const uint8_t *qs, float absmax) {
    for (int j = 0; j < 32; j++) {
        out[2 * j] = absmax * nf4_levels[qs[j] >> 4];
        out[2 * j + 1] = absmax * nf4_levels[qs[j] & 15];
    }
}

static void read_dynamic8(float *out, const BlockDynamic8 *b, const float *levels) {
    for (int i = 0; i < DYNAMIC_BLOCK; i++) out[i] = b->absmax * levels[b->codes[i]];
}

/* 64 columns of one row of a tile. */
static void read_tile_q4_0(float *out, const TileQ4_0 *t, int row) {
    uint8_t quads[32];
    for (int q = 0; q < 8; q++) memcpy(quads + 4 * q, t->qs[q] + 4 * row, 4);
    float d = f16_to_f32(t->d[0][row]), e = f16_to_f32(t->d[1][row]);
#pragma omp simd
    for (int i = 0; i < 32; i++) out[i] = d * (float)((quads[i] & 15) - 8);
#pragma omp simd
    for (int i = 0; i < 32; i++) out[32 + i] = e * (float)((quads[i] >> 4) - 8);
}

static void read_tile_q8_0(float *out, const TileQ8_0 *t, int row) {
    uint8_t quads[64];
    for (int q = 0; q < 16; q++) memcpy(quads + 4 * q, t->qs[q] + 4 * row, 4);
    float d = f16_to_f32(t->d[0][row]), e = f16_to_f32(t->d[1][row]);
#pragma omp simd
    for (int i = 0; i < 32; i++) out[i] = d * (float)((int)quads[i] - 128);
#pragma omp simd
    for (int i = 32; i < 64; i++) out[i] = e * (float)((int)quads[i] - 128);
}

static const void *tile_at(Tensor t, int64_t row, int64_t col) {
    int64_t cols = tensor_cols(t),
            tile = row / TILE_HEIGHT * (cols / TILE_WIDTH) + col / TILE_WIDTH;
    size_t bytes = t.dtype == Q4_0_TILED ? sizeof(TileQ4_0) : sizeof(TileQ8_0);
    return (const char *)t.data + (size_t)tile * bytes;
}

/* The largest run of elements read at once. */
#define UNIT_MAX 256

static int64_t unit_of(DType dtype) {
    switch (dtype) {
    case NF4:
    case NF4_NESTED:
    case Q4_0_TILED:
    case Q8_0_TILED:
        return 64;
    default:
        return dtype_block(dtype).count;
    }
}

#define FOR_UNITS(Block, statement)                                                                \
    for (int64_t i = 0; i < count; i++, out += size) {                                             \
        const Block *b = (const Block *)t->data + unit + i;                                        \
        statement;                                                                                 \
    }                                                                                              \
    break

/* `count` units from `unit` on, each of `size` elements. */
static void read_units(float *out, const Tensor *t, int64_t unit, int64_t count, int64_t size) {
    switch (t->dtype) {
    case Q4_0:
        FOR_UNITS(BlockQ4_0, read_q4_0(out, b));
    case Q8_0:
        FOR_UNITS(BlockQ8_0, read_q8_0(out, b));
    case Q4_K:
        FOR_UNITS(BlockQ4_K, read_q4_k(out, b));
    case Q5_K:
        FOR_UNITS(BlockQ5_K, read_q5_k(out, b));
    case Q6_K:
        FOR_UNITS(BlockQ6_K, read_q6_k(out, b));
    case NF4:
        FOR_UNITS(BlockNF4, read_nf4(out, b->qs, b->absmax));
    case NF4_NESTED: {
        const float *levels = dynamic_levels(true);
        for (int64_t i = 0; i < count; i++, out += size) {
            int64_t at = unit + i + t->origin / 64;
            const BlockNF4Nested *b = (const BlockNF4Nested *)t->data + at / 256;
            read_nf4(out, b->qs[at % 256], levels[b->absmax[at % 256]] * b->scale + b->offset);
        }
        break;
    }
    case DYNAMIC8:
    case DYNAMIC8_UNSIGNED: {
        const float *levels = dynamic_levels(t->dtype == DYNAMIC8);
        FOR_UNITS(BlockDynamic8, read_dynamic8(out, b, levels));
    }
    case Q4_0_TILED:
    case Q8_0_TILED:
        for (int64_t i = 0; i < count; i++, out += size) {
            int64_t first = (unit + i) * size, row = first / tensor_cols(*t);
            const void *tile = tile_at(*t, row, first % tensor_cols(*t));
            if (t->dtype == Q4_0_TILED)
                read_tile_q4_0(out, tile, (int)(row % TILE_HEIGHT));
            else
                read_tile_q8_0(out, tile, (int)(row % TILE_HEIGHT));
        }
        break;
    default:
        CHECK(false, "cannot read %s", dtype_name(t->dtype));
    }
}

void CPU(load_packed)(float *out, Tensor t, int64_t first, int64_t n) {
    int64_t size = unit_of(t.dtype);
    while (n > 0) {
        int64_t unit = first / size, skip = first % size, count = size - skip;
        if (skip == 0 && n >= size) { /* whole units, as many as there are */
            count = n / size * size;
            read_units(out, &t, unit, n / size, size);
        } else { /* part of one */
            float whole[UNIT_MAX];
            if (count > n) count = n;
            read_units(whole, &t, unit, 1, size);
            memcpy(out, whole + skip, (size_t)count * sizeof *out);
        }
        out += count;
        first += count;
        n -= count;
    }
}

/* ---- writing ---- */

static float largest(const float *x, int64_t n) {
    float most = 0;
    for (int64_t i = 0; i < n; i++) most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
    return most;
}

/* The first element of largest magnitude, with its sign. */
static float signed_largest(const float *x, int n) {
    float most = 0, value = 0;
    for (int i = 0; i < n; i++)
        if (fabsf(x[i]) > most) most = fabsf(x[i]), value = x[i];
    return value;
}

static float inverse(float d) {
    return d != 0 ? 1.0f / d : 0.0f;
}

static int code_q4_0(float x, float id) {
    float scaled = x * id + 8.5f;
    int code = (int)scaled;
    return code > 15 ? 15 : code < 0 ? 0 : code;
}

static void write_q4_0(BlockQ4_0 *b, const float *x) {
    float d = signed_largest(x, 32) / -8.0f, id = inverse(d);
    b->d = f32_to_f16(d);
    for (int j = 0; j < 16; j++)
        b->qs[j] = (uint8_t)(code_q4_0(x[j], id) | code_q4_0(x[16 + j], id) << 4);
}

static void write_q8_0(BlockQ8_0 *b, const float *x) {
    float d = largest(x, 32) / 127.0f, id = inverse(d);
    b->d = f32_to_f16(d);
    for (int j = 0; j < 32; j++) b->qs[j] = (int8_t)roundf(x[j] * id);
}

/* The level whose interval between midpoints holds x. */
static int code_nf4(float x) {
    int code = 0;
    for (int i = 0; i < 15; i++) code += x > (nf4_levels[i] + nf4_levels[i + 1]) * 0.5f;
    return code;
}

static void write_nf4(uint8_t *qs, const float *x, float absmax) {
    float scale = 1.0f / (absmax > 1e-38f ? absmax : 1e-38f);
    for (int j = 0; j < 32; j++)
        qs[j] = (uint8_t)(code_nf4(x[2 * j] * scale) << 4 | code_nf4(x[2 * j + 1] * scale));
}

/* Row `row` of a tile from, or into, the two file blocks of its 64 columns. */
static void tile_write_q4_0(TileQ4_0 *t, int row, const BlockQ4_0 *b) {
    uint8_t codes[2][32];
    for (int k = 0; k < 2; k++) {
        t->d[k][row] = b[k].d;
        for (int j = 0; j < 16; j++)
            codes[k][j] = b[k].qs[j] & 15, codes[k][16 + j] = b[k].qs[j] >> 4;
    }
    for (int q = 0; q < 8; q++)
        for (int j = 0; j < 4; j++)
            t->qs[q][4 * row + j] = (uint8_t)(codes[0][4 * q + j] | codes[1][4 * q + j] << 4);
}

static void tile_read_q4_0(BlockQ4_0 *b, const TileQ4_0 *t, int row) {
    uint8_t codes[2][32];
    for (int q = 0; q < 8; q++)
        for (int j = 0; j < 4; j++) {
            codes[0][4 * q + j] = t->qs[q][4 * row + j] & 15;
            codes[1][4 * q + j] = t->qs[q][4 * row + j] >> 4;
        }
    for (int k = 0; k < 2; k++) {
        b[k].d = t->d[k][row];
        for (int j = 0; j < 16; j++) b[k].qs[j] = (uint8_t)(codes[k][j] | codes[k][16 + j] << 4);
    }
}

static void tile_write_q8_0(TileQ8_0 *t, int row, const BlockQ8_0 *b) {
    for (int k = 0; k < 2; k++) {
        t->d[k][row] = b[k].d;
        for (int j = 0; j < 32; j++)
            t->qs[8 * k + j / 4][4 * row + j % 4] = (uint8_t)(b[k].qs[j] + 128);
    }
}

static void tile_read_q8_0(BlockQ8_0 *b, const TileQ8_0 *t, int row) {
    for (int k = 0; k < 2; k++) {
        b[k].d = t->d[k][row];
        for (int j = 0; j < 32; j++)
            b[k].qs[j] = (int8_t)((int)t->qs[8 * k + j / 4][4 * row + j % 4] - 128);
    }
}

/* One row of blocks in file order. */
static void write_row(void *blocks, const float *x, int64_t K, DType dtype) {
    for (int64_t k = 0; k < K; k += 32) {
        if (dtype == Q4_0)
            write_q4_0((BlockQ4_0 *)blocks + k / 32, x + k);
        else
            write_q8_0((BlockQ8_0 *)blocks + k / 32, x + k);
    }
}

/* Row `row` of a tiled tensor from, or into, its blocks in file order. */
static void tile_row(Tensor tiled, int64_t row, void *blocks, bool into_tiles) {
    int64_t K = tensor_cols(tiled);
    for (int64_t k = 0; k < K; k += TILE_WIDTH) {
        void *tile = (void *)tile_at(tiled, row, k);
        int lane = (int)(row % TILE_HEIGHT);
        if (tiled.dtype == Q4_0_TILED) {
            BlockQ4_0 *b = (BlockQ4_0 *)blocks + k / 32;
            if (into_tiles)
                tile_write_q4_0(tile, lane, b);
            else
                tile_read_q4_0(b, tile, lane);
        } else {
            BlockQ8_0 *b = (BlockQ8_0 *)blocks + k / 32;
            if (into_tiles)
                tile_write_q8_0(tile, lane, b);
            else
                tile_read_q8_0(b, tile, lane);
        }
    }
}

static size_t row_bytes(DType dtype, int64_t K) {
    DTypeBlock block = dtype_block(dtype);
    return (size_t)(K / block.count) * block.bytes;
}

/* Blocks of 64 over the flat tensor; with nested scales their absmax is kept until the mean of all
 * is known. */
static void quantize_nf4(Tensor packed, Tensor x) {
    int64_t blocks = tensor_count(x) / 64;
    if (packed.dtype == NF4) {
#pragma omp parallel for schedule(static)
        for (int64_t i = 0; i < blocks; i++) {
            float buffer[64];
            const float *v = load_f32(buffer, x, i * 64, 64);
            BlockNF4 *b = (BlockNF4 *)packed.data + i;
            b->absmax = largest(v, 64);
            write_nf4(b->qs, v, b->absmax);
        }
        return;
    }
    CHECK(packed.origin == 0, "quantize: a part of a nested tensor");
    const float *levels = dynamic_levels(true);
    float *absmax = thread_scratch((size_t)blocks);
    BlockNF4Nested *out = packed.data;
    double sum = 0;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < blocks; i++) {
        float buffer[64];
        const float *v = load_f32(buffer, x, i * 64, 64);
        absmax[i] = largest(v, 64);
        write_nf4(out[i / 256].qs[i % 256], v, absmax[i]);
    }
    for (int64_t i = 0; i < blocks; i++) sum += absmax[i];
    float offset = (float)(sum / (double)blocks);
#pragma omp parallel for schedule(static)
    for (int64_t s = 0; s < (blocks + 255) / 256; s++) {
        int64_t first = s * 256, count = blocks - first < 256 ? blocks - first : 256;
        for (int64_t i = first; i < first + count; i++) absmax[i] -= offset;
        out[s].offset = offset;
        out[s].scale = largest(absmax + first, count);
        for (int64_t i = 0; i < count; i++)
            out[s].absmax[i] = dynamic_code_grid(levels, absmax[first + i] * inverse(out[s].scale));
    }
}

void CPU(quantize)(Tensor packed, Tensor x) {
    int64_t K = tensor_cols(x), rows = tensor_count(x) / K;
    if (packed.dtype == NF4 || packed.dtype == NF4_NESTED) {
        quantize_nf4(packed, x);
        return;
    }
    DType dtype = dtype_untiled(packed.dtype);
    CHECK(dtype == Q4_0 || dtype == Q8_0, "quantize: %s is not written here", dtype_name(dtype));
    size_t bytes = row_bytes(dtype, K);
#pragma omp parallel
    {
        float *buffer = thread_scratch((size_t)K + bytes / 4 + 1);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            const float *row = load_f32(buffer, x, r * K, K);
            bool tiled = dtype_is_tiled(packed.dtype);
            void *blocks = tiled ? (char *)(buffer + K) : (char *)packed.data + (size_t)r * bytes;
            write_row(blocks, row, K, dtype);
            if (tiled) tile_row(packed, r, blocks, true);
        }
    }
}

void CPU(store_rows)(Tensor y, Tensor x, Tensor rows) {
    int64_t N = x.shape[0], K = tensor_count(x) / N;
    size_t bytes = tensor_bytes(y) / (size_t)y.shape[0];
    const int32_t *to = rows.data;
#pragma omp parallel
    {
        float *buffer = thread_scratch((size_t)K);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++) {
            char *row = (char *)y.data + (size_t)to[n] * bytes;
            if (y.dtype == x.dtype)
                memcpy(row, (const char *)x.data + (size_t)n * bytes, bytes);
            else
                write_row(row, load_f32(buffer, x, n * K, K), K, y.dtype);
        }
    }
}

void CPU(repack)(Tensor y, Tensor x) {
    int64_t K = tensor_cols(x), rows = tensor_count(x) / K;
    if (x.dtype == y.dtype) {
        memcpy(y.data, x.data, tensor_bytes(x));
        return;
    }
    bool into = dtype_is_tiled(y.dtype);
    Tensor tiled = into ? y : x;
    char *blocks = into ? x.data : y.data;
    size_t bytes = row_bytes(dtype_untiled(x.dtype), K);
#pragma omp parallel for schedule(static)
    for (int64_t group = 0; group < rows; group += TILE_HEIGHT)
        for (int64_t r = group; r < group + TILE_HEIGHT; r++)
            tile_row(tiled, r, blocks + (size_t)r * bytes, into);
}

void CPU(check_finite)(bool *finite, Tensor x) {
    int64_t count = tensor_count(x), blocks = (count + CHUNK - 1) / CHUNK;
    int bad = 0;
#pragma omp parallel for schedule(static) reduction(| : bad)
    for (int64_t block = 0; block < blocks; block++) {
        int64_t first = block * CHUNK, n = count - first < CHUNK ? count - first : CHUNK;
        float buffer[CHUNK];
        const float *v = load_f32(buffer, x, first, n);
        int here = 0;
        for (int64_t i = 0; i < n; i++) here |= !(fabsf(v[i]) < 65504.0f * 7.0f);
        bad |= here;
    }
    *finite = !bad;
}

/* ---- training through a scheme ---- */

/* How one block is rounded: codes low .. high times `scale`. */
typedef struct Rule {
    float scale, inverse; /* as stored; 1 / what it was before it was rounded to f16 */
    float base;           /* what a learned factor multiplies */
    int low, high;
} Rule;

/* bf16, as the file has it; the smallest as f16 has them, which every reader of ours holds. */
static float round_scale(float scale) {
    return f16_to_f32(f32_to_f16(bf16_to_f32(f32_to_bf16(scale))));
}

static Rule rule_of(const float *x, int64_t n, QuantScheme scheme, const float *factor) {
    float d, base;
    switch (scheme) {
    case SCHEME_Q4_0:
        base = signed_largest(x, (int)n) / -8.0f;
        d = factor ? base * *factor : base;
        return (Rule){f16_to_f32(f32_to_f16(d)), inverse(d), base, -8, 7};
    case SCHEME_Q8_0:
        d = largest(x, n) / 127.0f;
        return (Rule){f16_to_f32(f32_to_f16(d)), inverse(d), d, -127, 127};
    case SCHEME_INT8:
        d = round_scale(largest(x, n) / 127.5f);
        return (Rule){d, inverse(d), d, -128, 127};
    default:
        d = round_scale(largest(x, n) / 7.5f);
        return (Rule){d, inverse(d), d, -8, 7};
    }
}

/* The code before it is held in range. */
static int code_of(float x, const Rule *r, QuantScheme scheme) {
    if (scheme == SCHEME_Q4_0) {
        float scaled = x * r->inverse + 8.5f;
        return scaled < 0 ? -9 : scaled > 100 ? 92 : (int)scaled - 8;
    }
    if (scheme == SCHEME_Q8_0) return (int)roundf(x * r->inverse);
    return r->scale != 0 ? (int)rintf(x / r->scale) : 0;
}

static int hold(int code, const Rule *r) {
    return code < r->low ? r->low : code > r->high ? r->high : code;
}

/* y = x, rounded to bf16 where the scheme says so. */
static void pass_through(Tensor y, Tensor x, QuantScheme scheme) {
    int64_t count = tensor_count(x), blocks = (count + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        int64_t first = block * CHUNK, n = count - first < CHUNK ? count - first : CHUNK;
        float buffer[CHUNK];
        const float *v = load_f32(buffer, x, first, n);
        if (v != buffer) memcpy(buffer, v, (size_t)n * sizeof *buffer);
        round_to(scheme == SCHEME_BF16 ? BF16 : F32, buffer, n);
        store_f32(y, first, n, buffer);
    }
}

void CPU(fake_quantize)(Tensor y, Tensor x, Tensor factors, QuantScheme scheme, float blend) {
    if (!scheme_has_blocks(scheme)) {
        pass_through(y, x, scheme);
        return;
    }
    int64_t n = scheme_block(scheme, tensor_cols(x)), blocks = tensor_count(x) / n;
#pragma omp parallel
    {
        float *memory = thread_scratch((size_t)(2 * n));
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; b++) {
            float *out = memory + n;
            const float *v = load_f32(memory, x, b * n, n);
            Rule r = rule_of(v, n, scheme, factors.data ? (const float *)factors.data + b : NULL);
            for (int64_t i = 0; i < n; i++)
                out[i] = r.scale * (float)hold(code_of(v[i], &r, scheme), &r);
            if (blend != 1.0f)
                for (int64_t i = 0; i < n; i++) out[i] = v[i] + blend * (out[i] - v[i]);
            store_f32(y, b * n, n, out);
        }
    }
}

void CPU(fake_quantize_backward)(Tensor dx, Tensor dfactors, Tensor x, Tensor factors,
                                 QuantScheme scheme, float blend) {
    if (!scheme_has_blocks(scheme)) return;
    int64_t n = scheme_block(scheme, tensor_cols(x)), blocks = tensor_count(x) / n;
#pragma omp parallel
    {
        float *memory = thread_scratch((size_t)n);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; b++) {
            const float *v = load_f32(memory, x, b * n, n);
            float *g = (float *)dx.data + b * n, sum = 0;
            Rule r = rule_of(v, n, scheme, factors.data ? (const float *)factors.data + b : NULL);
            for (int64_t i = 0; i < n; i++) {
                int code = code_of(v[i], &r, scheme), held = hold(code, &r);
                float slope = (float)held - (code == held ? v[i] * r.inverse : 0.0f);
                sum += g[i] * slope;
                if (code != held) g[i] *= 1.0f - blend;
            }
            if (dfactors.data) ((float *)dfactors.data)[b] += blend * r.base * sum;
        }
    }
}

void CPU(quantize_scheme)(Tensor packed, Tensor x, Tensor factors, QuantScheme scheme) {
    int64_t n = scheme_block(scheme, tensor_cols(x)), blocks = tensor_count(x) / n;
#pragma omp parallel
    {
        float *memory = thread_scratch((size_t)n);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; b++) {
            const float *v = load_f32(memory, x, b * n, n);
            Rule r = rule_of(v, n, scheme, factors.data ? (const float *)factors.data + b : NULL);
            for (int64_t k = 0; k < n; k += 32) {
                int64_t at = (b * n + k) / 32;
                int codes[32];
                for (int i = 0; i < 32; i++) codes[i] = hold(code_of(v[k + i], &r, scheme), &r);
                if (packed.dtype == Q4_0) {
                    BlockQ4_0 *out = (BlockQ4_0 *)packed.data + at;
                    out->d = f32_to_f16(r.scale);
                    for (int j = 0; j < 16; j++)
                        out->qs[j] = (uint8_t)((codes[j] + 8) | (codes[16 + j] + 8) << 4);
                } else {
                    BlockQ8_0 *out = (BlockQ8_0 *)packed.data + at;
                    out->d = f32_to_f16(r.scale);
                    for (int j = 0; j < 32; j++) out->qs[j] = (int8_t)codes[j];
                }
            }
        }
    }
}

void CPU(fake_quantize_rows)(Tensor y, Tensor x) {
    int64_t K = tensor_cols(x), rows = tensor_rows(x);
#pragma omp parallel
    {
        float *memory = thread_scratch((size_t)(2 * K));
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            float *out = memory + K;
            const float *v = load_f32(memory, x, r * K, K);
            float d = largest(v, K) / 127.0f, id = inverse(d);
            for (int64_t k = 0; k < K; k++) out[k] = d * rintf(v[k] * id);
            store_f32(y, r * K, K, out);
        }
    }
}
