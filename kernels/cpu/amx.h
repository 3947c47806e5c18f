/* amx.h - products by the tiles of Intel's AMX, at the level that has them. */
#ifndef AMX_H
#define AMX_H

#include "kernels/cpu/cpu.h"
#include "kernels/matmul.h"

/* What tiles hold: lines of so many bytes. In memory that nobody optimises away, as compilers take
 * the instruction to read less of it. */
typedef struct TileShapes {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t lines[16];
} TileShapes;

/* y (=|+=) a b: a bf16, b bf16 or packed (not in TN), y bf16 | f32; K at least 1. Every element is
 * one sum in order of K that knows nothing of the other rows: fewer rows change no bit of the rest.
 */
void CPU(amx_product)(Layout layout, Tensor y, Write write, Tensor a, Tensor b);

/* Activations and weights in 8 bits, 16 rows of each at a time: amx_int8.c. What int8.c does by
 * vectors, bit for bit. */
#define AMX_ROWS 16

/* A thread calls the first before amx_int8_panel, and the second after the last. */
void CPU(amx_int8_begin)(void);
void CPU(amx_int8_end)(void);

/* Tiles of 16 weight rows (TileQ8_0 if `bytes`, else TileQ4_0) as they are multiplied: of each of
 * K / 32 blocks 512 codes and 16 scales. */
void CPU(amx_int8_unpack)(int8_t *codes, float *scales, const void *tiles, bool bytes, int64_t K);

/* y rows `row` .., columns `column` .., 16 of each, from those and, of each block, 512 codes of
 * activations (32 of a row) and 16 scales. */
void CPU(amx_int8_panel)(Tensor y, int64_t row, int64_t column, const int8_t *codes,
                         const float *scales, const int8_t *q, const float *d, int64_t K);

#endif
