/* amx_int8.c - 16 rows of activations by 16 of weights, both in 8 bits, by tiles.
 *
 * A block of 32 columns is one instruction: 16 lines of 32 activations times 8 rows of 4 codes of
 * 16 weight rows, which is how packed tiles hold them. Its 16 by 16 integers go through memory into
 * registers, where they join the sums in f32, scaled; meanwhile the next two blocks are multiplied.
 */
#include "kernels/blocks.h"
#include "kernels/cpu/amx.h"
#include "kernels/cpu/scratch.h"

#include <immintrin.h>

#define BLOCK 512 /* codes of 16 rows */

/* 0, 1: sums; 2, 3: activations; 4, 5: weights */
static const TileShapes shapes = {1, .bytes = {64, 64, 32, 32, 64, 64},
                                  .lines = {16, 16, 16, 16, 8, 8}};

/* Tiles of 16 weight rows as they are multiplied: of each of K / 32 blocks 512 codes and 16 scales.
 */
static void unpack_group(int8_t *codes, float *scales, const void *tiles, bool bytes, int64_t K) {
    const __m512i low = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8),
                  sign = _mm512_set1_epi8(-128);
    for (int64_t t = 0; t < K / TILE_WIDTH; t++) {
        const char *tile =
            (const char *)tiles + (size_t)t * (bytes ? sizeof(TileQ8_0) : sizeof(TileQ4_0));
        const uint16_t *d = (const uint16_t *)tile;
        const uint8_t *qs = (const uint8_t *)(d + 2 * TILE_HEIGHT);
        for (int half = 0; half < 2; half++) {
            int8_t *to = codes + (2 * t + half) * BLOCK;
            for (int i = 0; i < 8; i++) {
                __m512i v = _mm512_loadu_si512(qs + 64 * (bytes ? 8 * half + i : i));
                if (bytes)
                    v = _mm512_xor_si512(v, sign);
                else
                    v = _mm512_sub_epi8(_mm512_and_si512(half ? _mm512_srli_epi16(v, 4) : v, low),
                                        eight);
                _mm512_storeu_si512(to + 64 * i, v);
            }
            _mm512_storeu_ps(
                scales + (2 * t + half) * AMX_ROWS,
                _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(d + half * TILE_HEIGHT))));
        }
    }
}

/* Two blocks, their integers on the way to memory. */
static inline void multiply(const int8_t *q, const int8_t *codes) {
    _tile_zero(0);
    _tile_loadd(2, q, 32);
    _tile_loadd(4, codes, 64);
    _tile_dpbssd(0, 2, 4);
    _tile_zero(1);
    _tile_loadd(3, q + BLOCK, 32);
    _tile_loadd(5, codes + BLOCK, 64);
    _tile_dpbssd(1, 3, 5);
}

static inline void store(int32_t integers[2][256]) {
    _tile_stored(0, integers[0], 64);
    _tile_stored(1, integers[1], 64);
}

#define EACH_ROW _Pragma("GCC unroll 16") for (int m = 0; m < AMX_ROWS; m++)

/* sums += the integers of two blocks, scaled. */
static inline __attribute__((always_inline)) void
add(__m512 sums[AMX_ROWS], int32_t integers[2][256], const float *scales, const float *d) {
    _Pragma("GCC unroll 2") for (int i = 0; i < 2; i++) {
        __m512 scale = _mm512_loadu_ps(scales + i * AMX_ROWS);
        EACH_ROW {
            __m512 value = _mm512_cvtepi32_ps(_mm512_load_si512(integers[i] + LANES * m));
            __m512 by = _mm512_mul_ps(scale, _mm512_set1_ps(d[i * AMX_ROWS + m]));
            sums[m] = _mm512_fmadd_ps(value, by, sums[m]);
        }
    }
}

/* 16 rows and 16 columns of y. */
static void panel_product(Tensor y, int64_t row, int64_t column, const int8_t *codes,
                          const float *scales, const int8_t *q, const float *d, int64_t K) {
    _Alignas(64) int32_t integers[2][2][256]; /* of the blocks multiplied now and those before */
    __m512 sums[AMX_ROWS];
    EACH_ROW sums[m] = _mm512_setzero_ps();
    multiply(q, codes);
    store(integers[0]);
    int64_t tiles = K / TILE_WIDTH;
    for (int64_t t = 1; t < tiles; t++) {
        multiply(q + 2 * t * BLOCK, codes + 2 * t * BLOCK);
        add(sums, integers[(t - 1) % 2], scales, d);
        store(integers[t % 2]);
        scales += 2 * AMX_ROWS;
        d += 2 * AMX_ROWS;
    }
    add(sums, integers[(tiles - 1) % 2], scales, d);
    EACH_ROW store_f32(y, (row + m) * tensor_cols(y) + column, LANES, (float *)&sums[m]);
}

void CPU(amx_int8_product)(Tensor y, int64_t row, int64_t panels, Tensor b, int64_t group,
                           int64_t groups, const int8_t *q, const float *d) {
    int64_t K = tensor_cols(b), codes_of = AMX_ROWS * K, scales_of = AMX_ROWS * K / 32;
    bool bytes = b.dtype == Q8_0_TILED;
    size_t tiles = (size_t)K / TILE_WIDTH * (bytes ? sizeof(TileQ8_0) : sizeof(TileQ4_0));
    float *scales = outer_scratch((size_t)(groups * (scales_of + codes_of / 4)));
    int8_t *codes = (int8_t *)(scales + groups * scales_of);
    for (int64_t i = 0; i < groups; i++)
        unpack_group(codes + i * codes_of, scales + i * scales_of,
                     (const char *)b.data + (size_t)(group + i) * tiles, bytes, K);
    _tile_loadconfig(&shapes);
    for (int64_t p = 0; p < panels; p++)
        for (int64_t i = 0; i < groups; i++)
            panel_product(y, row + p * AMX_ROWS, (group + i) * AMX_ROWS, codes + i * codes_of,
                          scales + i * scales_of, q + p * codes_of, d + p * scales_of, K);
    _tile_release();
}
