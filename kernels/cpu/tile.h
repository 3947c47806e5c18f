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

static inline __attribute__((always_inline)) void
tile_registers(const int rows, const int vecs, int64_t k, const float *a, int64_t a_row,
               int64_t a_col, const float *b, int64_t ldb, float *c, int64_t ldc, bool add) {
    Vec sum[TILE_ROWS][TILE_VECS];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vecs; j++)
            sum[i][j] = add ? *(const Vec *)(c + i * ldc + j * LANES) : (Vec){0};
    for (int64_t p = 0; p < k; p++) {
        Vec row[TILE_VECS];
        for (int j = 0; j < vecs; j++) row[j] = *(const Vec *)(b + p * ldb + j * LANES);
        for (int i = 0; i < rows; i++) {
            float factor = a[i * a_row + p * a_col];
            for (int j = 0; j < vecs; j++) sum[i][j] += factor * row[j];
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vecs; j++) *(Vec *)(c + i * ldc + j * LANES) = sum[i][j];
}

static inline void tile_rows(int rows, int64_t n, int64_t k, const float *a, int64_t a_row,
                             int64_t a_col, const float *b, int64_t ldb, float *c, int64_t ldc,
                             bool add) {
#define TILE_CASE(R, V) tile_registers(R, V, k, a, a_row, a_col, b + j, ldb, c + j, ldc, add)
    int64_t j = 0;
    for (; j + TILE_VECS * LANES <= n; j += TILE_VECS * LANES) {
        switch (rows) {
        case 1:
            TILE_CASE(1, TILE_VECS);
            break;
        case 2:
            TILE_CASE(2, TILE_VECS);
            break;
        case 3:
            TILE_CASE(3, TILE_VECS);
            break;
        case 4:
            TILE_CASE(4, TILE_VECS);
            break;
#if TILE_ROWS > 4
        case 5:
            TILE_CASE(5, TILE_VECS);
            break;
        case 6:
            TILE_CASE(6, TILE_VECS);
            break;
#endif
        }
    }
    for (; j + LANES <= n; j += LANES) {
        switch (rows) {
        case 1:
            TILE_CASE(1, 1);
            break;
        case 2:
            TILE_CASE(2, 1);
            break;
        case 3:
            TILE_CASE(3, 1);
            break;
        case 4:
            TILE_CASE(4, 1);
            break;
#if TILE_ROWS > 4
        case 5:
            TILE_CASE(5, 1);
            break;
        case 6:
            TILE_CASE(6, 1);
            break;
#endif
        }
    }
#undef TILE_CASE
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
