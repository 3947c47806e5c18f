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

/* Whether this level is one that has them. */
static inline bool has_tiles(void) {
#if LANES == 16
    return cpu_level() == CPU_AMX;
#else
    return false;
#endif
}

/* y (=|+=) a b + term. Every element is one sum in order of K that knows nothing of the other rows:
 * fewer rows change no bit of the rest.
 *   y        bf16 | f32
 *   a, b     bf16, b also packed (not in TN), K at least 1; both absent: the term alone
 *   term     of u and v to 2^-16, where y is bf16, not in TN; NULL: none */
void CPU(amx_product)(Layout layout, Tensor y, Write write, Tensor a, Tensor b, const Term *term);

/* y (=|+=) alpha a b, one of them f32 and the other bf16; y bf16 | f32. A float goes as three
 * numbers of bf16, which together are it. In TN, rows that are zero in a or b are left out: without
 * them the bits are the same. */
void CPU(amx_mixed)(Layout layout, Tensor y, Write write, Tensor a, Tensor b, float alpha);

/* Rows that go together by 8-bit tiles. */
#define AMX_ROWS 16

/* y rows `row` .., `panels` times 16 of them, columns of weight rows 16 group .., `groups` times
 * 16: bit for bit what int8.c does by vectors.
 *   b     (N, K)  Q4_0_TILED | Q8_0_TILED
 *   q, d  of each panel and each block of 32 columns: 512 codes, 32 of a row, and 16 scales */
void CPU(amx_int8_product)(Tensor y, int64_t row, int64_t panels, Tensor b, int64_t group,
                           int64_t groups, const int8_t *q, const float *d);

#endif
