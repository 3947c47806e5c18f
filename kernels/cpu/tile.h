/* tile.h - small f32 products in registers: c (m, n) (=|+=) a (m, k) b (k, n).
 *
 * Element (i, p) of a is a[i * a_row + p * a_col], so a may be transposed; b and c have rows of
 * ldb and ldc floats. Every element of c is one chain of multiply-adds in order of p, whatever m
 * and n are: adding rows or columns, or terms that are zero, changes no bit of the rest. */
#ifndef TILE_H
#define TILE_H

#include "kernels/cpu/cpu.h"

#if LANES == 16 || (defined __aarch64__ && !LEVEL_PLAIN) /* 32 registers */
#define TILE_ROWS 6
#define TILE_VECS 4
#else
#define TILE_ROWS 4
#define TILE_VECS 2
#endif

/* Half a register, for columns that fill no whole one: heads of 72. */
typedef float Half __attribute__((vector_size(LANES * 2), aligned(4), may_alias));

/* rows by vecs registers of c, each of one type: Vec, or Half. */
#define TILE_REGISTERS(name, Type)                                                                 \
    static inline __attribute__((always_inline)) void name(                                        \
        const int rows, const int vecs, int64_t k, const float *a, int64_t a_row, int64_t a_col,   \
        const float *b, int64_t ldb, float *c, int64_t ldc, bool add) {                            \
        const int64_t lanes = sizeof(Type) / sizeof(float);                                        \
        Type sum[TILE_ROWS][TILE_VECS];                                                            \
        for (int i = 0; i < rows; i++)                                                             \
            for (int j = 0; j < vecs; j++)                                                         \
                sum[i][j] = add ? *(const Type *)(c + i * ldc + j * lanes) : (Type){0};            \
        for (int64_t p = 0; p < k; p++) {                                                          \
            Type row[TILE_VECS];                                                                   \
            for (int j = 0; j < vecs; j++) row[j] = *(const Type *)(b + p * ldb + j * lanes);      \
            for (int i = 0; i < rows; i++) {                                                       \
                float factor = a[i * a_row + p * a_col];                                           \
                for (int j = 0; j < vecs; j++) sum[i][j] += factor * row[j];                       \
            }                                                                                      \
        }                                                                                          \
        for (int i = 0; i < rows; i++)                                                             \
            for (int j = 0; j < vecs; j++) *(Type *)(c + i * ldc + j * lanes) = sum[i][j];         \
    }
TILE_REGISTERS(tile_registers, Vec)
TILE_REGISTERS(tile_halves, Half)

#if TILE_ROWS > 4
#define TILE_MANY(name, V)                                                                         \
    case 5:                                                                                        \
        name(5, V, k, a, a_row, a_col, b + j, ldb, c + j, ldc, add);                               \
        break;                                                                                     \
    case 6:                                                                                        \
        name(6, V, k, a, a_row, a_col, b + j, ldb, c + j, ldc, add);                               \
        break;
#else
#define TILE_MANY(name, V)
#endif
/* `rows` as a constant, so that sums stay in registers. */
#define TILE_BY_ROWS(name, V)                                                                      \
    switch (rows) {                                                                                \
    case 1:                                                                                        \
        name(1, V, k, a, a_row, a_col, b + j, ldb, c + j, ldc, add);                               \
        break;                                                                                     \
    case 2:                                                                                        \
        name(2, V, k, a, a_row, a_col, b + j, ldb, c + j, ldc, add);                               \
        break;                                                                                     \
    case 3:                                                                                        \
        name(3, V, k, a, a_row, a_col, b + j, ldb, c + j, ldc, add);                               \
        break;                                                                                     \
    case 4:                                                                                        \
        name(4, V, k, a, a_row, a_col, b + j, ldb, c + j, ldc, add);                               \
        break;                                                                                     \
        TILE_MANY(name, V)                                                                         \
    }

static inline void tile_rows(int rows, int64_t n, int64_t k, const float *a, int64_t a_row,
                             int64_t a_col, const float *b, int64_t ldb, float *c, int64_t ldc,
                             bool add) {
    int64_t j = 0;
    for (; j + TILE_VECS * LANES <= n; j += TILE_VECS * LANES)
        TILE_BY_ROWS(tile_registers, TILE_VECS)
    for (; j + LANES <= n; j += LANES) TILE_BY_ROWS(tile_registers, 1)
    for (; j + LANES / 2 <= n; j += LANES / 2) TILE_BY_ROWS(tile_halves, 1)
    for (; j < n; j++)
        for (int i = 0; i < rows; i++) {
            float sum = add ? c[i * ldc + j] : 0;
            for (int64_t p = 0; p < k; p++) sum += a[i * a_row + p * a_col] * b[p * ldb + j];
            c[i * ldc + j] = sum;
        }
}

static inline void tile_product(int64_t m, int64_t n, int64_t k, const float *a, int64_t a_row,
                                int64_t a_col, const float *b, int64_t ldb, float *c, int64_t ldc,
                                bool add) {
    for (int64_t i = 0; i < m; i += TILE_ROWS) {
        int rows = m - i < TILE_ROWS ? (int)(m - i) : TILE_ROWS;
        tile_rows(rows, n, k, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc, add);
    }
}

#endif
