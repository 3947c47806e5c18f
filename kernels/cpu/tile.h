/* tile.h - matrices turned around and small f32 products in registers: c (m, n) (=|+=) a (m, k)
 * b (k, n).
 *
 * Element (i, p) of a is a[i * a_row + p * a_col], so a may be transposed; b and c have rows of
 * ldb and ldc floats. Every element of c is one chain of multiply-adds in order of p, whatever m
 * and n are: adding rows or columns, or terms that are zero, changes no bit of the rest. */
#ifndef TILE_H
#define TILE_H

#include "kernels/cpu/cpu.h"

/* ---- turning around ---- */

#if LANES == 16
#define EACH_LANE(f, s)                                                                            \
    f(0, s), f(1, s), f(2, s), f(3, s), f(4, s), f(5, s), f(6, s), f(7, s), f(8, s), f(9, s),      \
        f(10, s), f(11, s), f(12, s), f(13, s), f(14, s), f(15, s)
#elif LANES == 8
#define EACH_LANE(f, s) f(0, s), f(1, s), f(2, s), f(3, s), f(4, s), f(5, s), f(6, s), f(7, s)
#else
#define EACH_LANE(f, s) f(0, s), f(1, s), f(2, s), f(3, s)
#endif
#define LANE_OF_FIRST(l, s)  ((l) & (s) ? LANES + (l) - (s) : (l))
#define LANE_OF_SECOND(l, s) ((l) & (s) ? LANES + (l) : (l) + (s))

/* Rows whose numbers differ in one bit swap the lanes that differ in it the other way. */
#define EXCHANGE_LANES(rows, s)                                                                    \
    for (int i = 0; i < LANES; i++)                                                                \
        if (!(i & (s))) {                                                                          \
            Vec a = rows[i], b = rows[i + (s)];                                                    \
            rows[i] = __builtin_shufflevector(a, b, EACH_LANE(LANE_OF_FIRST, s));                  \
            rows[i + (s)] = __builtin_shufflevector(a, b, EACH_LANE(LANE_OF_SECOND, s));           \
        }

static inline void turn_registers(float *out, int64_t out_stride, const float *in, int64_t stride) {
    Vec rows[LANES];
    for (int i = 0; i < LANES; i++) rows[i] = *(const Vec *)(in + i * stride);
#if LANES >= 16
    EXCHANGE_LANES(rows, 8)
#endif
#if LANES >= 8
    EXCHANGE_LANES(rows, 4)
#endif
    EXCHANGE_LANES(rows, 2)
    EXCHANGE_LANES(rows, 1)
    for (int i = 0; i < LANES; i++) *(Vec *)(out + i * out_stride) = rows[i];
}

/* out (cols, rows) <- in (rows, cols), each with rows `stride` floats apart. */
static inline void turn_around(float *out, int64_t out_stride, const float *in, int64_t stride,
                               int64_t rows, int64_t cols) {
    int64_t whole_rows = rows / LANES * LANES, whole_cols = cols / LANES * LANES;
    for (int64_t r = 0; r < whole_rows; r += LANES)
        for (int64_t c = 0; c < whole_cols; c += LANES)
            turn_registers(out + c * out_stride + r, out_stride, in + r * stride + c, stride);
    for (int64_t c = 0; c < cols; c++)
        for (int64_t r = c < whole_cols ? whole_rows : 0; r < rows; r++)
            out[c * out_stride + r] = in[r * stride + c];
}

/* ---- products ---- */

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
