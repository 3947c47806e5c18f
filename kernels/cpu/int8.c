/* int8.c - products of packed weights with activations in 8 bits, straight from the tiles.
 *
 * Each activation row is rounded in blocks of 32 (scale = largest / 127). A tile holds 16 weight
 * rows, one a lane, so an instruction multiplies 4 columns of 16 rows with 4 activations that all
 * lanes share. Weights are unsigned (code + bias), so -bias * sum of the activations starts each
 * block's sum; integers are exact, and blocks join in f32 in order of K.
 *
 * One row of activations runs at the speed of memory. Whether asking for tiles ahead of time helps,
 * and how far ahead, depends on the machine (measured: 0.90 against 0.69 of the read rate without
 * and with it on one, the reverse on another; 0.77 near, 0.42 far and 0.65 without on a third), so
 * the first large products try all ways and the fastest is kept. Many rows go twelve at a time (a
 * panel, four columns of its rows side by side) against each unpacked tile, over runs of tiles that
 * stay in the second cache. */
#include "kernels/blocks.h"
#include "kernels/cpu/amx.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/scratch.h"
#include "kernels/matmul.h"

#if LANES > 4
#include <immintrin.h>
#elif defined __aarch64__ && !LEVEL_PLAIN
#include <arm_neon.h>
#endif

#define NEAR_BYTES   2880
#define FAR_BYTES    4608
#define CACHE_BYTES  (320 * 1024) /* of tiles that are read again for the next rows */
#define LEAST_GROUPS 4            /* of 16 weight rows that a thread takes at a time */

/* ---- sixteen lanes: int32 sums, f32 totals, 64 weight bytes ---- */

#if LANES == 16

typedef __m512i Ints;
typedef __m512 Floats;
typedef __m512i Bytes;
#define BYTE_BIAS 128

static inline Ints ints_set(int32_t x) {
    return _mm512_set1_epi32(x);
}
static inline Floats floats_zero(void) {
    return _mm512_setzero_ps();
}
static inline Bytes bytes_load(const uint8_t *p) {
    return _mm512_loadu_si512(p);
}
static inline Bytes bytes_low(Bytes v) {
    return _mm512_and_si512(v, _mm512_set1_epi8(15));
}
static inline Bytes bytes_high(Bytes v) {
    return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15));
}
static inline Ints dot_nibbles(Ints sum, Bytes w, int32_t quad) {
    return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(quad));
}
static inline Ints dot_bytes(Ints sum, Bytes w, int32_t quad) {
    return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(quad));
}
static inline Floats scales_load(const uint16_t *d) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)d));
}
static inline Floats add_scaled_ints(Floats total, Ints sum, Floats scale, float d) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scale, _mm512_set1_ps(d)), total);
}
static inline void floats_store(float *out, Floats x) {
    _mm512_storeu_ps(out, x);
}

#elif LANES == 8

typedef struct Ints {
    __m256i a, b;
} Ints;
typedef struct Floats {
    __m256 a, b;
} Floats;
typedef Ints Bytes;
#define BYTE_BIAS 0 /* pairs of 255 * 127 would not fit 16 bits: bytes are multiplied signed */

static inline Ints ints_set(int32_t x) {
    return (Ints){_mm256_set1_epi32(x), _mm256_set1_epi32(x)};
}
static inline Floats floats_zero(void) {
    return (Floats){_mm256_setzero_ps(), _mm256_setzero_ps()};
}
static inline Bytes bytes_load(const uint8_t *p) {
    return (Bytes){_mm256_loadu_si256((const __m256i *)p),
                   _mm256_loadu_si256((const __m256i *)(p + 32))};
}
static inline Bytes bytes_low(Bytes v) {
    __m256i mask = _mm256_set1_epi8(15);
    return (Bytes){_mm256_and_si256(v.a, mask), _mm256_and_si256(v.b, mask)};
}
static inline Bytes bytes_high(Bytes v) {
    __m256i mask = _mm256_set1_epi8(15);
    return (Bytes){_mm256_and_si256(_mm256_srli_epi16(v.a, 4), mask),
                   _mm256_and_si256(_mm256_srli_epi16(v.b, 4), mask)};
}
static inline __m256i add_pairs(__m256i sum, __m256i pairs) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
static inline Ints dot_nibbles(Ints sum, Bytes w, int32_t quad) {
    __m256i x = _mm256_set1_epi32(quad);
    return (Ints){add_pairs(sum.a, _mm256_maddubs_epi16(w.a, x)),
                  add_pairs(sum.b, _mm256_maddubs_epi16(w.b, x))};
}
static inline __m256i dot_signed(__m256i sum, __m256i w, __m256i x) {
    w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
    return add_pairs(sum, _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)));
}
static inline Ints dot_bytes(Ints sum, Bytes w, int32_t quad) {
    __m256i x = _mm256_set1_epi32(quad);
    return (Ints){dot_signed(sum.a, w.a, x), dot_signed(sum.b, w.b, x)};
}
static inline Floats scales_load(const uint16_t *d) {
    return (Floats){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)d)),
                    _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(d + 8)))};
}
static inline Floats add_scaled_ints(Floats total, Ints sum, Floats scale, float d) {
    __m256 x = _mm256_set1_ps(d);
    return (Floats){_mm256_fmadd_ps(_mm256_cvtepi32_ps(sum.a), _mm256_mul_ps(scale.a, x), total.a),
                    _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum.b), _mm256_mul_ps(scale.b, x), total.b)};
}
static inline void floats_store(float *out, Floats x) {
    _mm256_storeu_ps(out, x.a);
    _mm256_storeu_ps(out + 8, x.b);
}

#elif defined __aarch64__ && !LEVEL_PLAIN

typedef struct Ints {
    int32x4_t at[4];
} Ints;
typedef struct Floats {
    float32x4_t at[4];
} Floats;
typedef struct Bytes {
    uint8x16_t at[4]; /* 4 rows each */
} Bytes;
#define BYTE_BIAS 0 /* the dot product takes both operands signed */

#define FOUR(expression) _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) expression

static inline Ints ints_set(int32_t x) {
    Ints v;
    FOUR(v.at[i] = vdupq_n_s32(x));
    return v;
}
static inline Floats floats_zero(void) {
    Floats v;
    FOUR(v.at[i] = vdupq_n_f32(0));
    return v;
}
static inline Bytes bytes_load(const uint8_t *p) {
    Bytes v;
    FOUR(v.at[i] = vld1q_u8(p + 16 * i));
    return v;
}
static inline Bytes bytes_low(Bytes v) {
    FOUR(v.at[i] = vandq_u8(v.at[i], vdupq_n_u8(15)));
    return v;
}
static inline Bytes bytes_high(Bytes v) {
    FOUR(v.at[i] = vshrq_n_u8(v.at[i], 4));
    return v;
}
static inline Bytes bytes_signed(Bytes v) {
    FOUR(v.at[i] = veorq_u8(v.at[i], vdupq_n_u8(128)));
    return v;
}
static inline Ints dot_nibbles(Ints sum, Bytes w, int32_t quad) {
    int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(quad));
    FOUR(sum.at[i] = vdotq_s32(sum.at[i], vreinterpretq_s8_u8(w.at[i]), x));
    return sum;
}
static inline Ints dot_bytes(Ints sum, Bytes w, int32_t quad) {
    return dot_nibbles(sum, bytes_signed(w), quad);
}
static inline Floats scales_load(const uint16_t *d) {
    Floats v;
    FOUR(v.at[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(d + 4 * i))));
    return v;
}
static inline Floats add_scaled_ints(Floats total, Ints sum, Floats scale, float d) {
    FOUR(total.at[i] =
             vfmaq_f32(total.at[i], vcvtq_f32_s32(sum.at[i]), vmulq_n_f32(scale.at[i], d)));
    return total;
}
static inline void floats_store(float *out, Floats x) {
    FOUR(vst1q_f32(out + 4 * i, x.at[i]));
}

#else

typedef struct Ints {
    int32_t at[16];
} Ints;
typedef struct Floats {
    float at[16];
} Floats;
typedef struct Bytes {
    uint8_t at[64];
} Bytes;
#define BYTE_BIAS 128

static inline Ints ints_set(int32_t x) {
    Ints v;
    for (int i = 0; i < 16; i++) v.at[i] = x;
    return v;
}
static inline Floats floats_zero(void) {
    return (Floats){{0}};
}
static inline Bytes bytes_load(const uint8_t *p) {
    Bytes v;
    memcpy(v.at, p, 64);
    return v;
}
static inline Bytes bytes_low(Bytes v) {
    for (int i = 0; i < 64; i++) v.at[i] &= 15;
    return v;
}
static inline Bytes bytes_high(Bytes v) {
    for (int i = 0; i < 64; i++) v.at[i] >>= 4;
    return v;
}
static inline Ints dot_bytes(Ints sum, Bytes w, int32_t quad) {
    int8_t x[4];
    memcpy(x, &quad, 4);
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 4; j++) sum.at[i] += (int32_t)w.at[4 * i + j] * x[j];
    return sum;
}
static inline Ints dot_nibbles(Ints sum, Bytes w, int32_t quad) {
    return dot_bytes(sum, w, quad);
}
static inline Floats scales_load(const uint16_t *d) {
    Floats v;
    for (int i = 0; i < 16; i++) v.at[i] = f16_to_f32(d[i]);
    return v;
}
static inline Floats add_scaled_ints(Floats total, Ints sum, Floats scale, float d) {
    for (int i = 0; i < 16; i++) total.at[i] += (float)sum.at[i] * (scale.at[i] * d);
    return total;
}
static inline void floats_store(float *out, Floats x) {
    memcpy(out, x.at, sizeof x.at);
}

#endif

/* ---- activations ---- */

/* Rows that go together; the widths that exist are those of width_of. */
typedef struct Panel {
    int64_t first; /* row of a and of y */
    int width;
    int group;
} Panel;

#if LANES == 16
#define WIDTH_MAX 12
#else
#define WIDTH_MAX 4
#endif

static int width_of(int64_t rows, bool tiles) {
    if (rows >= AMX_ROWS && tiles) return AMX_ROWS;
    if (rows >= 12 && WIDTH_MAX >= 12) return 12;
    if (rows >= 8 && WIDTH_MAX >= 8) return 8;
    if (rows >= 6 && WIDTH_MAX >= 6) return 6;
    return rows >= 4 ? 4 : (int)rows;
}

/* Activations in 8 bits; those of a panel of W rows that starts at row r:
 *   q      K * W bytes from r * K: columns 4 i .. 4 i + 3 of row m at 4 (i W + m); of 16 rows, by
 *          tiles, block i of row m at 32 (i W + m)
 *   d      scale of block i of row m at r K / 32 + i W + m
 *   start  -bias * sum of the block, likewise */
typedef struct Activations {
    int8_t *q;
    float *d;
    int32_t *start;
} Activations;

static size_t activation_floats(int64_t M, int64_t K) {
    return (size_t)(M * (K / 4 + K / 16) + 64);
}

static Activations activations_in(float *memory, int64_t M, int64_t K) {
    Activations a = {.q = (int8_t *)memory, .d = memory + M * K / 4};
    a.start = (int32_t *)(a.d + M * K / 32);
    return a;
}

/* One block of 32 columns; q points at row m's first quad, quads are 4 W bytes apart. */
static inline int32_t quantize_block(int8_t *q, int width, float *d, const float *v) {
    int8_t codes[32];
    float most = 0;
    int32_t sum = 0;
#pragma omp simd reduction(max : most)
    for (int i = 0; i < 32; i++) most = fabsf(v[i]) > most ? fabsf(v[i]) : most;
    float id = most > 0 ? 127.0f / most : 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < 32; i++) {
        union {
            float f;
            int32_t i;
        } rounded = {v[i] * id + 12582912.0f}; /* 1.5 * 2^23: the integer is in the low bits */
        int32_t code = rounded.i - 0x4b400000;
        codes[i] = (int8_t)code;
        sum += code;
    }
    *d = most / 127.0f;
    if (width == 1 || width == AMX_ROWS)
        memcpy(q, codes, 32);
    else
        for (int i = 0; i < 8; i++) memcpy(q + 4 * width * i, codes + 4 * i, 4);
    return sum;
}

static void quantize_panel(const Activations *a, const Panel *p, Tensor x, int bias) {
    int64_t K = tensor_cols(x), blocks = K / 32;
    for (int m = 0; m < p->width; m++)
        for (int64_t first = 0; first < K; first += CHUNK) {
            int64_t n = K - first < CHUNK ? K - first : CHUNK;
            float buffer[CHUNK];
            const float *v = load_f32(buffer, x, (p->first + m) * K + first, n);
            for (int64_t k = 0; k < n; k += 32) {
                int64_t at = p->first * blocks + (first + k) / 32 * p->width + m;
                int8_t *q = a->q + p->first * K + (first + k) * p->width +
                            (p->width == AMX_ROWS ? 32 : 4) * m;
                a->start[at] = -bias * quantize_block(q, p->width, &a->d[at], v + k);
            }
        }
}

/* ---- one group of 16 weight rows against a panel ---- */

/* Tiles asked for ahead of time. */
typedef enum Ahead { AHEAD_NONE, AHEAD_NEAR, AHEAD_FAR, AHEAD_WAYS } Ahead;

/* In registers everything is written out, for each width of a panel. Plain C has none to fill:
 * there it would be minutes of compiling and slower code. */
#if LEVEL_PLAIN
#define ALWAYS static inline
#define UNROLL(n)
#else
#define ALWAYS    static inline __attribute__((always_inline))
#define UNROLL(n) _Pragma(#n)
#endif

/* `half` of a tile, 32 columns, added to totals (W). */
ALWAYS void half_tile(Floats *total, const int W, const bool bytes, const int half,
                      const uint8_t (*qs)[64], const uint16_t *scales, const int8_t *q,
                      const float *d, const int32_t *start) {
    Ints sum[WIDTH_MAX];
    UNROLL(GCC unroll 12)
    for (int m = 0; m < W; m++) sum[m] = ints_set(start[m]);
    UNROLL(GCC unroll 8)
    for (int i = 0; i < 8; i++) {
        Bytes v = bytes_load(qs[bytes ? 8 * half + i : i]);
        if (!bytes) v = half ? bytes_high(v) : bytes_low(v);
        UNROLL(GCC unroll 12)
        for (int m = 0; m < W; m++) {
            int32_t quad;
            memcpy(&quad, q + 4 * (i * W + m), 4);
            sum[m] = bytes ? dot_bytes(sum[m], v, quad) : dot_nibbles(sum[m], v, quad);
        }
    }
    Floats scale = scales_load(scales);
    UNROLL(GCC unroll 12)
    for (int m = 0; m < W; m++) total[m] = add_scaled_ints(total[m], sum[m], scale, d[m]);
}

#ifdef __ARM_FEATURE_MATMUL_INT8
#define HAS_PAIRS 1

/* The same for an even W by products of 2 x 8 with 8 x 2: two quads of two weight rows side by side
 * against two quads of two activation rows. */
ALWAYS void half_tile_pairs(Floats *total, const int W, const bool bytes, const int half,
                            const uint8_t (*qs)[64], const uint16_t *scales, const int8_t *q,
                            const float *d, const int32_t *start) {
    int32x4_t sum[8][WIDTH_MAX / 2]; /* weight rows 2 k, 2 k + 1 by activations 2 j, 2 j + 1 */
    UNROLL(GCC unroll 2)
    for (int j = 0; j < W / 2; j++) {
        int32x2_t begin = vld1_s32(start + 2 * j);
        UNROLL(GCC unroll 8)
        for (int k = 0; k < 8; k++) sum[k][j] = vcombine_s32(begin, begin);
    }
    UNROLL(GCC unroll 4)
    for (int i = 0; i < 8; i += 2) {
        Bytes a = bytes_load(qs[bytes ? 8 * half + i : i]),
              b = bytes_load(qs[bytes ? 8 * half + i + 1 : i + 1]);
        if (bytes)
            a = bytes_signed(a), b = bytes_signed(b);
        else
            a = half ? bytes_high(a) : bytes_low(a), b = half ? bytes_high(b) : bytes_low(b);
        int8x16_t x[WIDTH_MAX / 2];
        UNROLL(GCC unroll 2)
        for (int j = 0; j < W / 2; j++) {
            const int8_t *at = q + 4 * (i * W + 2 * j);
            int32x2x2_t rows = vzip_s32(vreinterpret_s32_s8(vld1_s8(at)),
                                        vreinterpret_s32_s8(vld1_s8(at + 4 * W)));
            x[j] = vreinterpretq_s8_s32(vcombine_s32(rows.val[0], rows.val[1]));
        }
        UNROLL(GCC unroll 4)
        for (int part = 0; part < 4; part++) {
            int32x4_t u = vreinterpretq_s32_u8(a.at[part]), v = vreinterpretq_s32_u8(b.at[part]);
            int8x16_t low = vreinterpretq_s8_s32(vzip1q_s32(u, v)),
                      high = vreinterpretq_s8_s32(vzip2q_s32(u, v));
            UNROLL(GCC unroll 2)
            for (int j = 0; j < W / 2; j++) {
                sum[2 * part][j] = vmmlaq_s32(sum[2 * part][j], low, x[j]);
                sum[2 * part + 1][j] = vmmlaq_s32(sum[2 * part + 1][j], high, x[j]);
            }
        }
    }
    Floats scale = scales_load(scales);
    UNROLL(GCC unroll 2)
    for (int j = 0; j < W / 2; j++) {
        Ints even, odd;
        FOUR(even.at[i] = vuzp1q_s32(sum[2 * i][j], sum[2 * i + 1][j]));
        FOUR(odd.at[i] = vuzp2q_s32(sum[2 * i][j], sum[2 * i + 1][j]));
        total[2 * j] = add_scaled_ints(total[2 * j], even, scale, d[2 * j]);
        total[2 * j + 1] = add_scaled_ints(total[2 * j + 1], odd, scale, d[2 * j + 1]);
    }
}
#else
#define HAS_PAIRS       0
#define half_tile_pairs half_tile
#endif

/* Columns 16 group .. of the panel's rows of y; `bytes`: tiles of Q8_0, else of Q4_0. */
ALWAYS void group_product(Tensor y, const int W, const bool bytes, const void *tiles,
                          int64_t tile_count, int64_t group, const Panel *p, const int8_t *q,
                          const float *d, const int32_t *start, Ahead ahead) {
    Floats total[WIDTH_MAX];
    UNROLL(GCC unroll 12)
    for (int m = 0; m < W; m++) total[m] = floats_zero();
    for (int64_t t = 0; t < tile_count; t++) {
        const char *tile =
            (const char *)tiles + (size_t)t * (bytes ? sizeof(TileQ8_0) : sizeof(TileQ4_0));
        const uint16_t(*scales)[TILE_HEIGHT] = (const uint16_t(*)[TILE_HEIGHT])tile;
        const uint8_t(*qs)[64] = (const uint8_t(*)[64])(tile + sizeof *scales * 2);
        if (W <= 2 && ahead != AHEAD_NONE) {
            for (int line = 0; line < (bytes ? 17 : 9); line++)
                if (ahead == AHEAD_NEAR)
                    __builtin_prefetch(tile + NEAR_BYTES + 64 * line, 0, 2); /* second cache */
                else
                    __builtin_prefetch(tile + FAR_BYTES + 64 * line);
        }
        if (HAS_PAIRS && W % 2 == 0) {
            half_tile_pairs(total, W, bytes, 0, qs, scales[0], q, d, start);
            half_tile_pairs(total, W, bytes, 1, qs, scales[1], q + 32 * W, d + W, start + W);
        } else {
            half_tile(total, W, bytes, 0, qs, scales[0], q, d, start);
            half_tile(total, W, bytes, 1, qs, scales[1], q + 32 * W, d + W, start + W);
        }
        q += 64 * W;
        d += 2 * W;
        start += 2 * W;
    }
    int64_t N = tensor_cols(y);
    UNROLL(GCC unroll 12)
    for (int m = 0; m < W; m++) {
        float out[16];
        floats_store(out, total[m]);
        store_f32(y, (p->first + m) * N + 16 * group, 16, out);
    }
}

static void panel_product(Tensor y, Tensor b, int64_t group, const Activations *a, const Panel *p,
                          Ahead ahead) {
    int64_t K = tensor_cols(b), tile_count = K / TILE_WIDTH;
    bool bytes = b.dtype == Q8_0_TILED;
    const void *tiles = (const char *)b.data + (size_t)(group * tile_count) *
                                                   (bytes ? sizeof(TileQ8_0) : sizeof(TileQ4_0));
    const int8_t *q = a->q + p->first * K;
    const float *d = a->d + p->first * (K / 32);
    const int32_t *start = a->start + p->first * (K / 32);
#define WIDTH_CASE(W)                                                                              \
    case W:                                                                                        \
        if (bytes)                                                                                 \
            group_product(y, W, true, tiles, tile_count, group, p, q, d, start, ahead);            \
        else                                                                                       \
            group_product(y, W, false, tiles, tile_count, group, p, q, d, start, ahead);           \
        break;
    switch (p->width) {
        WIDTH_CASE(1)
        WIDTH_CASE(2)
        WIDTH_CASE(3)
        WIDTH_CASE(4)
#if WIDTH_MAX == 12
        WIDTH_CASE(6)
        WIDTH_CASE(8)
        WIDTH_CASE(12)
#endif
    }
#undef WIDTH_CASE
}

/* ---- products ---- */

/* Which way of reading is fastest here. */
#define TRIALS      48
#define TRIAL_BYTES (4 << 20)
static struct {
    int calls;
    double bytes[AHEAD_WAYS], seconds[AHEAD_WAYS];
} trial;

static Ahead way_that_pays(void) {
    if (trial.calls < AHEAD_WAYS * TRIALS) return (Ahead)(trial.calls % AHEAD_WAYS);
    Ahead best = AHEAD_NONE;
    for (int way = 1; way < AHEAD_WAYS; way++)
        if (trial.bytes[way] * trial.seconds[best] > trial.bytes[best] * trial.seconds[way])
            best = (Ahead)way;
    return best;
}

static void trial_add(Ahead ahead, size_t bytes, double seconds) {
    if (trial.calls >= AHEAD_WAYS * TRIALS || bytes < TRIAL_BYTES) return;
    trial.bytes[ahead] += (double)bytes;
    trial.seconds[ahead] += seconds;
    trial.calls++;
}

/* Groups of rows that share a matrix; an ordinary product is one group of all rows. */
typedef struct Groups {
    const int32_t *offsets, *counts;
    int64_t count;
} Groups;

static int64_t list_panels(Panel *panels, const Groups *g) {
    int64_t count = 0;
    for (int e = 0; e < g->count; e++) {
        bool tiles = has_tiles() && g->counts[e] >= 2 * AMX_ROWS; /* fewer do not repay unpacking */
        for (int64_t row = 0; row < g->counts[e]; row += panels[count++].width)
            panels[count] = (Panel){g->offsets[e] + row, width_of(g->counts[e] - row, tiles), e};
    }
    return count;
}

/* A thread's next share of `total` groups of weight rows, at most `most`: long runs while much is
 * left, which memory likes, and short ones at the end, so that nobody waits long for the other. */
static int64_t take(int64_t *next, int64_t total, int64_t most, int64_t *first) {
    int64_t count, threads = omp_get_num_threads();
    *first = __atomic_load_n(next, __ATOMIC_RELAXED);
    do {
        int64_t left = total - *first;
        if (left <= 0) return 0;
        count = left / (2 * threads);
        count = count > most ? most : count < LEAST_GROUPS ? LEAST_GROUPS : count;
        if (count > left) count = left;
    } while (!__atomic_compare_exchange_n(next, first, *first + count, true, __ATOMIC_RELAXED,
                                          __ATOMIC_RELAXED));
    return count;
}

/* Multiplies those of the panels that are of 16 rows, which come first, by tiles; how many. */
static int64_t tiled_panels(Tensor y, Tensor b, int64_t group, int64_t groups, const Activations *a,
                            const Panel *panels, int64_t count) {
    int64_t tiled = 0, row = panels->first;
    while (tiled < count && panels[tiled].width == AMX_ROWS) tiled++;
#if LANES == 16
    if (tiled) {
        int64_t K = tensor_cols(b);
        CPU(amx_int8_product)(y, row, tiled, b, group, groups, a->q + row * K, a->d + row * K / 32);
    }
#else
    (void)y, (void)b, (void)group, (void)groups, (void)a, (void)row;
#endif
    return tiled;
}

/* A thread's shares of one matrix, or of those of `active` groups. */
static void multiply(Tensor y, Tensor b, const Activations *x, const Panel *panels,
                     const int64_t *begins, int active, int64_t most, Ahead ahead, int64_t *next) {
    int64_t row_groups = tensor_cols(y) / TILE_HEIGHT;
    for (int64_t at, left; (left = take(next, row_groups * active, most, &at));)
        for (int64_t count; left; at += count, left -= count) { /* of one matrix */
            int64_t begin = at % row_groups, matrix = at / row_groups;
            count = row_groups - begin < left ? row_groups - begin : left;
            int64_t first = begins[matrix], last = begins[matrix + 1];
            Tensor w = b.ndim == 3 ? tensor_at(b, panels[first].group) : b;
            first += tiled_panels(y, w, begin, count, x, panels + first, last - first);
            for (int64_t i = first; i < last; i++)
                for (int64_t group = begin; group < begin + count; group++)
                    panel_product(y, w, group, x, &panels[i], ahead);
        }
}

/* Not inlined: GCC 12 then takes `a` for uninitialised. */
__attribute__((noinline)) static void product(const Tensor *y, Tensor a, const Tensor *b,
                                              int matrices, const Groups *g) {
    int64_t K = tensor_cols(a), M = tensor_rows(a), row_groups = 0, next[MATRICES_MOST] = {0};
    int bias = b->dtype == Q4_0_TILED ? 8 : BYTE_BIAS;
    for (int i = 0; i < matrices; i++) row_groups += b[i].shape[b[i].ndim - 2] / TILE_HEIGHT;
    Panel panels[M / WIDTH_MAX + 5 * (g->count < M ? g->count : M) + 1];
    int64_t panel_count = list_panels(panels, g), begins[g->count + 1];
    int active = 0; /* groups with rows; begins: their first panels */
    for (int64_t i = 0; i < panel_count; i++)
        if (!i || panels[i].group != panels[i - 1].group) begins[active++] = i;
    begins[active] = panel_count;
    size_t bytes = (size_t)K / TILE_WIDTH * (bias == 8 ? sizeof(TileQ4_0) : sizeof(TileQ8_0));
    bool few = M <= 2; /* each thread rounds them for itself: cheaper than a barrier */
    Ahead ahead = few ? way_that_pays() : AHEAD_NONE;
    int64_t most = few ? row_groups : (int64_t)(CACHE_BYTES / bytes) + 1;
    double began = omp_get_wtime();
    float *shared = few ? NULL : thread_scratch(activation_floats(M, K));
#pragma omp parallel
    {
        Activations x =
            activations_in(few ? thread_scratch(activation_floats(M, K)) : shared, M, K);
        if (few) {
            for (int64_t i = 0; i < panel_count; i++) quantize_panel(&x, &panels[i], a, bias);
        } else {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < panel_count; i++) quantize_panel(&x, &panels[i], a, bias);
        }
        for (int i = 0; i < matrices; i++)
            multiply(y[i], b[i], &x, panels, begins, active, most, ahead, &next[i]);
    }
    if (few) trial_add(ahead, bytes * (size_t)(row_groups * active), omp_get_wtime() - began);
}

void CPU(matmul_int8_several)(const Tensor *y, Tensor a, Tensor codes, const Tensor *b, int count) {
    (void)codes; /* panels have an order of their own */
    int32_t zero = 0, rows = (int32_t)tensor_rows(a);
    product(y, a, b, count, &(Groups){&zero, &rows, 1});
}

void CPU(grouped_matmul_int8)(Tensor y, Tensor a, Tensor b, Tensor offsets, Tensor counts) {
    product(&y, a, &b, 1, &(Groups){offsets.data, counts.data, tensor_count(counts)});
}
