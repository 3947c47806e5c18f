/* blocks.h - the bytes of packed weights.
 *
 * Tiled order: 16 rows by 64 columns, two blocks of each row, in one piece, so that a product
 * reads memory straight through and each lane of a vector is a row.
 *   Q4_0  16 f16 scales of the first blocks, 16 of the second; then 8 vectors of 64 bytes. Byte
 *         4 r + j of vector q holds columns 4 q + j (low nibble) and 32 + 4 q + j (high) of row r.
 *   Q8_0  the 32 scales; then 16 vectors: byte 4 r + j of vector q is column 4 q + j of row r,
 *         plus 128, so that the unsigned operand of a byte product can be the weight. */
#ifndef BLOCKS_H
#define BLOCKS_H

#include "kernels/tensor.h"

#include <assert.h>

typedef struct BlockQ4_0 {
    uint16_t d;     /* f16; value = d * (code - 8) */
    uint8_t qs[16]; /* element j: low nibble, element 16 + j: high */
} BlockQ4_0;

typedef struct BlockQ8_0 {
    uint16_t d;
    int8_t qs[32];
} BlockQ8_0;

/* ggml's K-quants: 8 sub-blocks of 32 with 6-bit scales and minima; value = d s q - dmin m. */
typedef struct BlockQ4_K {
    uint16_t d, dmin;
    uint8_t scales[12], qs[128];
} BlockQ4_K;

typedef struct BlockQ5_K {
    uint16_t d, dmin;
    uint8_t scales[12], qh[32], qs[128];
} BlockQ5_K;

/* 16 sub-blocks of 16 with 8-bit scales; value = d s (q - 32). */
typedef struct BlockQ6_K {
    uint8_t ql[128], qh[64];
    int8_t scales[16];
    uint16_t d;
} BlockQ6_K;

/* bitsandbytes: element 2 j is the high nibble of byte j; value = absmax * level[code]. */
typedef struct BlockNF4 {
    float absmax;
    uint8_t qs[32];
} BlockNF4;

/* 256 blocks of 64 whose absmax is itself in 8 bits: dynamic[code] * scale + offset. */
typedef struct BlockNF4Nested {
    float scale, offset;
    uint8_t absmax[256], qs[256][32];
} BlockNF4Nested;

/* value = absmax * level[code] of the dynamic levels. */
typedef struct BlockDynamic8 {
    float absmax;
    uint8_t codes[DYNAMIC_BLOCK];
} BlockDynamic8;

typedef struct TileQ4_0 {
    uint16_t d[2][TILE_HEIGHT];
    uint8_t qs[8][64];
} TileQ4_0;

typedef struct TileQ8_0 {
    uint16_t d[2][TILE_HEIGHT];
    uint8_t qs[16][64];
} TileQ8_0;

static_assert(sizeof(BlockQ4_0) == 18 && sizeof(BlockQ8_0) == 34, "ggml's blocks");
static_assert(sizeof(BlockQ4_K) == 144 && sizeof(BlockQ5_K) == 176 && sizeof(BlockQ6_K) == 210,
              "ggml's super-blocks");
static_assert(sizeof(BlockNF4) == 36 && sizeof(BlockNF4Nested) == 8456, "NF4 blocks");
static_assert(sizeof(BlockDynamic8) == 260, "blocks of states");
static_assert(sizeof(TileQ4_0) == 576 && sizeof(TileQ8_0) == 1088, "tiles");

/* The levels of NF4 (Dettmers et al. 2023). */
#define NF4_LEVELS                                                                                 \
    {                                                                                              \
        -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,                  \
            -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,             \
            0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f,                      \
            0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f,  \
            1.0f                                                                                   \
    }

static const float nf4_levels[16] = NF4_LEVELS;

#endif
