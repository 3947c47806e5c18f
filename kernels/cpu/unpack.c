/* unpack.c - panels of packed matrices as dense ones, for products that take them so.
 *
 * To bf16 at the AVX-512 level a 4-bit block is a table of 16 values, made once and looked up by
 * permutation, 32 codes an instruction: a product with a Q4_0 matrix then costs 1.0 to 1.2 times
 * one with bf16, against 1.4 to 1.7 by the plain path. */
#include "kernels/blocks.h"
#include "kernels/cpu/cpu.h"
#include "kernels/dynamic.h"

#if LANES == 16
#include <immintrin.h>

/* The 16 values as bf16, twice in one register. */
static inline __m512i table_bf16(__m512 values) {
    __m512i bits = _mm512_castps_si512(values);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __m256i words = _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
    return _mm512_broadcast_i64x4(words);
}

/* 32 nibbles, one a byte, through a table. */
static inline void store_codes(uint16_t *out, __m256i nibbles, __m512i table) {
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(nibbles), table));
}

/* Vector q holds quad q of 16 rows: rows[r] gets the 8 quads of row r. */
static inline void turn_quads(__m256i rows[16], const uint8_t (*qs)[64]) {
    for (int part = 0; part < 2; part++) { /* rows 8 part .. */
        __m256i v[8], a[8], b[8];
        for (int q = 0; q < 8; q++) v[q] = _mm256_loadu_si256((const __m256i *)(qs[q] + 32 * part));
        for (int q = 0; q < 8; q += 2) {
            a[q] = _mm256_unpacklo_epi32(v[q], v[q + 1]);
            a[q + 1] = _mm256_unpackhi_epi32(v[q], v[q + 1]);
        }
        for (int q = 0; q < 8; q += 4)
            for (int k = 0; k < 2; k++) {
                b[q + 2 * k] = _mm256_unpacklo_epi64(a[q + k], a[q + 2 + k]);
                b[q + 2 * k + 1] = _mm256_unpackhi_epi64(a[q + k], a[q + 2 + k]);
            }
        for (int r = 0; r < 4; r++) {
            rows[8 * part + r] = _mm256_permute2x128_si256(b[r], b[r + 4], 0x20);
            rows[8 * part + 4 + r] = _mm256_permute2x128_si256(b[r], b[r + 4], 0x31);
        }
    }
}

static inline __m512 q4_0_values(uint16_t d) {
    const __m512 codes = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
    return _mm512_mul_ps(codes, _mm512_set1_ps(f16_to_f32(d)));
}

/* 16 rows by 64 columns; rows of out are `stride` apart. */
static void unpack_tile_q4_0(uint16_t *out, int64_t stride, const TileQ4_0 *tile) {
    const __m256i mask = _mm256_set1_epi8(15);
    __m256i rows[16];
    turn_quads(rows, tile->qs);
    for (int r = 0; r < 16; r++) {
        __m256i low = _mm256_and_si256(rows[r], mask);
        __m256i high = _mm256_and_si256(_mm256_srli_epi16(rows[r], 4), mask);
        store_codes(out + r * stride, low, table_bf16(q4_0_values(tile->d[0][r])));
        store_codes(out + r * stride + 32, high, table_bf16(q4_0_values(tile->d[1][r])));
    }
}

static void unpack_nf4(uint16_t *out, const uint8_t *qs, float absmax) {
    __m512 values = _mm512_mul_ps(_mm512_loadu_ps(nf4_levels), _mm512_set1_ps(absmax));
    __m512i table = table_bf16(values), mask = _mm512_set1_epi32(0x000f000f);
    for (int part = 0; part < 2; part++) { /* the high nibble of a byte comes first */
        __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(qs + 16 * part)));
        __m512i pairs = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
        _mm512_storeu_si512(out + 32 * part,
                            _mm512_permutexvar_epi16(_mm512_and_si512(pairs, mask), table));
    }
}

/* Whether the panel was done. */
static bool unpack_fast(Tensor panel, Tensor b, int64_t first, int64_t col) {
    int64_t count = tensor_rows(panel), cols = tensor_cols(panel), K = tensor_cols(b);
    uint16_t *out = panel.data;
    if (panel.dtype != BF16) return false;
    if (b.dtype == Q4_0_TILED && first % TILE_HEIGHT == 0 && count % TILE_HEIGHT == 0) {
#pragma omp parallel for schedule(static)
        for (int64_t r = 0; r < count; r += TILE_HEIGHT) {
            const TileQ4_0 *tiles = (const TileQ4_0 *)b.data +
                                    (first + r) / TILE_HEIGHT * (K / TILE_WIDTH) + col / TILE_WIDTH;
            for (int64_t k = 0; k < cols; k += TILE_WIDTH)
                unpack_tile_q4_0(out + r * cols + k, cols, tiles + k / TILE_WIDTH);
        }
        return true;
    }
    if ((b.dtype == NF4 || b.dtype == NF4_NESTED) && K % 64 == 0) {
        const float *levels = dynamic_levels(true);
#pragma omp parallel for schedule(static)
        for (int64_t r = 0; r < count; r++)
            for (int64_t k = 0; k < cols; k += 64) {
                int64_t at = ((first + r) * K + col + k) / 64 + b.origin / 64;
                const BlockNF4 *plain = (const BlockNF4 *)b.data + at;
                const BlockNF4Nested *n = (const BlockNF4Nested *)b.data + at / 256;
                if (b.dtype == NF4)
                    unpack_nf4(out + r * cols + k, plain->qs, plain->absmax);
                else
                    unpack_nf4(out + r * cols + k, n->qs[at % 256],
                               levels[n->absmax[at % 256]] * n->scale + n->offset);
            }
        return true;
    }
    return false;
}

#else

static bool unpack_fast(Tensor panel, Tensor b, int64_t first, int64_t col) {
    (void)panel, (void)b, (void)first, (void)col;
    return false;
}

#endif

void CPU(unpack)(Tensor panel, Tensor b, int64_t first, int64_t col) {
    int64_t count = tensor_rows(panel), cols = tensor_cols(panel), K = tensor_cols(b);
    if (unpack_fast(panel, b, first, col)) return;
#pragma omp parallel for schedule(static)
    for (int64_t group = 0; group < count; group += TILE_HEIGHT)
        for (int64_t k = 0; k < cols; k += CHUNK) /* columns outside: a tile serves its 16 rows */
            for (int64_t r = group; r < count && r < group + TILE_HEIGHT; r++) {
                int64_t n = cols - k < CHUNK ? cols - k : CHUNK;
                float buffer[CHUNK];
                store_f32(panel, r * cols + k, n,
                          load_f32(buffer, b, (first + r) * K + col + k, n));
            }
}
