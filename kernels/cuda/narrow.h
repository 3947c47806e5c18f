/* narrow.h - products of adapters, one side of which is only some ranks wide: limited by reading
 * the other.
 *
 * What is narrow is f32 and taken apart into bf16 numbers, whose products tensor cores have. */
#ifndef CUDA_NARROW_H
#define CUDA_NARROW_H

#include "kernels/cuda/gemm.h"

/* A float is the sum of three bf16 numbers, but for the last bits of very small ones. */
#define PIECES 3

/* ---- y += u B^T ---- */

/* Limited by y where K is small, as that of adapters is. A warp has 16 rows by 128 columns, K goes
 * by 16; each float is the sum of two bf16 numbers, the product of both small ones left out: 16
 * bits of the significand, before y rounds to 8. */
#define NARROW_THREADS 128
#define NARROW_ROWS    64
#define NARROW_COLUMNS 128
#define NARROW_STRIDE  24 /* elements from row to row of a tile of 16 columns: banks differ */

/* Where column n of b is kept among its 32: a lane is to have columns 8 t .. 8 t + 7 of the result,
 * where a product has 2 t and 2 t + 1 of eight. */
DEVICE_FUNCTION int narrow_row(int n) {
    return n / 32 * 32 + n % 8 / 2 * 8 + n % 32 / 8 * 2 + n % 2;
}

/* ROWS by 16 of an operand, big and small parts; zeros outside. TURNED: K are its rows. */
template <int ROWS, bool TURNED, bool OF_B>
DEVICE_FUNCTION void load_narrow(bf16 *big, bf16 *small, const float *p, int64_t i0, int64_t k0,
                                 int64_t i_end, int64_t k_end) {
    constexpr int EACH = ROWS * 16 / NARROW_THREADS, WIDTH = TURNED ? ROWS : 16,
                  STEP = NARROW_THREADS / WIDTH; /* a thread has one column, rows STEP apart */
    int row = threadIdx.x / WIDTH, column = threadIdx.x % WIDTH;
    int rows = (int)min((int64_t)(TURNED ? 16 : ROWS), TURNED ? k_end - k0 : i_end - i0) - row;
    bool here = column < (TURNED ? i_end - i0 : k_end - k0);
    int64_t width = TURNED ? i_end : k_end;
    const float *from = p + ((TURNED ? k0 : i0) + row) * width + (TURNED ? i0 : k0) + column;
    float x[EACH];
#pragma unroll
    for (int e = 0; e < EACH; e++) { /* all on their way at once */
        x[e] = here && e * STEP < rows ? *from : 0.0f;
        from += STEP * width;
    }
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        int i = TURNED ? column : row + e * STEP, k = TURNED ? row + e * STEP : column;
        int at = (OF_B ? narrow_row(i) : i) * NARROW_STRIDE + k;
        bf16 high = to_bf16(x[e]);
        big[at] = high;
        small[at] = to_bf16(x[e] - to_float(high));
    }
}

/* y (=|+=) alpha a b, shapes as in gemm16. packs: eight columns of y can be read at a time. */
template <bool TA, bool TB>
static __global__ void __launch_bounds__(NARROW_THREADS, 4)
    gemm_narrow(bf16 *y, Write write, const float *a, const float *b, Shape shape, float alpha,
                bool packs) {
    __shared__ __align__(16) bf16 a_tiles[2][NARROW_ROWS * NARROW_STRIDE];
    __shared__ __align__(16) bf16 b_tiles[2][NARROW_COLUMNS * NARROW_STRIDE];
    int64_t m0 = (int64_t)blockIdx.y * NARROW_ROWS, n0 = (int64_t)blockIdx.x * NARROW_COLUMNS;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    if (packs && write == ADD) { /* half a row for each thread: it comes while the sums are made */
        int64_t m = m0 + threadIdx.x / 2, n = n0 + threadIdx.x % 2 * 64;
        if (m < shape.M && n < shape.N) ask_for(y + m * shape.N + n);
    }
    float sums[NARROW_COLUMNS / 32][4][4] = {}; /* [..][j]: columns 8 t + 2 j and 8 t + 2 j + 1 */
    for (int64_t k = 0; k < shape.K; k += 16) {
        if (k) __syncthreads();
        load_narrow<NARROW_ROWS, TA, false>(a_tiles[0], a_tiles[1], a, m0, k, shape.M, shape.K);
        load_narrow<NARROW_COLUMNS, TB, true>(b_tiles[0], b_tiles[1], b, n0, k, shape.N, shape.K);
        __syncthreads();
        unsigned x[2][4];
#pragma unroll
        for (int p = 0; p < 2; p++)
            load_tiles(x[p], &a_tiles[p][(16 * warp + lane % 16) * NARROW_STRIDE + lane / 16 * 8]);
#pragma unroll
        for (int i = 0; i < NARROW_COLUMNS / 32; i++)
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                unsigned w[2][4];
                int row = 32 * i + 8 * j + lane % 8 + lane / 16 * 8;
#pragma unroll
                for (int p = 0; p < 2; p++)
                    load_tiles(w[p], &b_tiles[p][row * NARROW_STRIDE + lane / 8 % 2 * 8]);
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    unsigned big[2] = {w[0][2 * h], w[0][2 * h + 1]},
                             small[2] = {w[1][2 * h], w[1][2 * h + 1]};
                    mma_bf16(sums[i][j + h], x[1], big);
                    mma_bf16(sums[i][j + h], x[0], small);
                    mma_bf16(sums[i][j + h], x[0], big);
                }
            }
    }
#pragma unroll
    for (int p = 0; p < 2; p++) {
        int64_t m = m0 + 16 * warp + g + 8 * p;
        if (m >= shape.M) continue;
        uint4 old[NARROW_COLUMNS / 32];
#pragma unroll
        for (int i = 0; i < NARROW_COLUMNS / 32; i++) {
            old[i] = uint4{0, 0, 0, 0};
            if (packs && write == ADD && n0 + 32 * i + 8 * t < shape.N)
                old[i] = *(const uint4 *)(y + m * shape.N + n0 + 32 * i + 8 * t);
        }
#pragma unroll
        for (int i = 0; i < NARROW_COLUMNS / 32; i++) {
            int64_t n = n0 + 32 * i + 8 * t;
            bf16 *to = y + m * shape.N + n;
            if (packs && n < shape.N) {
                unsigned was[4] = {old[i].x, old[i].y, old[i].z, old[i].w}, now[4];
#pragma unroll
                for (int j = 0; j < 4; j++)
                    now[j] = pack_bf16(__uint_as_float(was[j] << 16) + alpha * sums[i][j][2 * p],
                                       __uint_as_float(was[j] & 0xffff0000u) +
                                           alpha * sums[i][j][2 * p + 1]);
                *(uint4 *)to = uint4{now[0], now[1], now[2], now[3]};
                continue;
            }
#pragma unroll
            for (int c = 0; c < 8; c++) {
                if (n + c >= shape.N) break;
                float sum = alpha * sums[i][c / 2][2 * p + c % 2];
                to[c] = to_bf16(write == ADD ? to_float(to[c]) + sum : sum);
            }
        }
    }
}

/* ---- u = x A^T, du = dy B, dB += dy^T u, dA += du^T x ---- */

#define PASS_THREADS 256
#define PASS_ROWS    64  /* of the matrix that are there at a time, twice */
#define PASS_COLUMNS 256 /* that a block has of it */
#define PASS_STRIDE                                                                                \
    (PASS_COLUMNS + 8) /* elements from row to row in shared memory: banks differ                  \
                        */
#define GIVEN_STRIDE (PASS_ROWS + 8)
#define PASS_RANKS   64 /* at most */

/* One reading of a matrix m (N, W), block (x, y) its columns from x * PASS_COLUMNS on and `rows`
 * rows from y * rows on. */
struct NarrowPass {
    const bf16 *m;
    int64_t N, W, rows;
    int R;
    const float *factor; /* (W, R), or (R, W) where it is turned */
    bool factor_turned;
    float *products;    /* m factor, a part for each block of columns: (gridDim.x, N, R) */
    const float *given; /* (N, R) */
    float *sums; /* m^T given, a part for each block of rows: (gridDim.y, W, R), or (.., R, W) */
    bool sums_turned;
};

/* Shared memory: two tiles of the matrix, the pieces of the factor's part and of what is given for
 * a tile, and half of a tile's products. */
template <int RANKS> struct NarrowMemory {
    bf16 tiles[2][PASS_ROWS * PASS_STRIDE];
    bf16 factor[PIECES][RANKS * PASS_STRIDE], given[PIECES][RANKS * GIVEN_STRIDE];
    float halves[PASS_ROWS * RANKS];
};

/* x as bf16 numbers, each `apart` elements behind the last. */
DEVICE_FUNCTION void put_pieces(bf16 *to, int apart, float x) {
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        bf16 piece = to_bf16(x);
        to[p * apart] = piece;
        x -= to_float(piece);
    }
}

/* sums += a b for all ranks and pieces: b lies as rows of ranks, sixteen of K from `b` on. */
template <int RANKS>
DEVICE_FUNCTION void add_pieces(float (&sums)[RANKS / 8][4], const unsigned (&a)[4], const bf16 *b,
                                int stride, int apart) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int p = PIECES - 1; p >= 0; p--)
#pragma unroll
        for (int j = 0; j < RANKS / 8; j += 2) {
            unsigned x[4];
            load_tiles(x, b + p * apart + (8 * j + lane % 8 + lane / 16 * 8) * stride +
                              lane / 8 % 2 * 8);
            unsigned left[2] = {x[0], x[1]}, right[2] = {x[2], x[3]};
            mma_bf16(sums[j], a, left);
            mma_bf16(sums[j + 1], a, right);
        }
}

template <int RANKS, bool PRODUCTS, bool SUMS>
static __global__ void __launch_bounds__(PASS_THREADS) narrow_pass(NarrowPass of) {
    DYNAMIC_SHARED(memory);
    NarrowMemory<RANKS> *space = (NarrowMemory<RANKS> *)memory;
    int64_t c0 = (int64_t)blockIdx.x * PASS_COLUMNS, n0 = blockIdx.y * of.rows,
            end = min(of.N, n0 + of.rows);
    int columns = (int)min((int64_t)PASS_COLUMNS, of.W - c0), R = of.R;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    auto bring = [&](int64_t n, int turn) {
        if (n < end)
#pragma unroll
            for (int i = 0; i < PASS_ROWS * PASS_COLUMNS / 8 / PASS_THREADS; i++) {
                int r = threadIdx.x / (PASS_COLUMNS / 8) + i * (PASS_THREADS * 8 / PASS_COLUMNS),
                    c = threadIdx.x % (PASS_COLUMNS / 8) * 8;
                bool here = n + r < end && c < columns;
                copy_16(space->tiles[turn] + r * PASS_STRIDE + c,
                        of.m + (here ? (n + r) * of.W + c0 + c : 0), here);
            }
        copies_close_group();
    };
    bring(n0, 0);
    if (PRODUCTS) {
        for (int i = threadIdx.x; i < PASS_COLUMNS * RANKS; i += PASS_THREADS) {
            int c = of.factor_turned ? i % PASS_COLUMNS : i / RANKS,
                r = of.factor_turned ? i / PASS_COLUMNS : i % RANKS;
            int64_t at = of.factor_turned ? r * of.W + c0 + c : (c0 + c) * R + r;
            put_pieces(space->factor[0] + r * PASS_STRIDE + c, RANKS * PASS_STRIDE,
                       r < R && c < columns ? of.factor[at] : 0.0f);
        }
    }
    float sums[SUMS ? 2 : 1][RANKS / 8][4] = {}; /* of columns 32 warp .. 32 warp + 31 */
    int turn = 0;
    for (int64_t n = n0; n < end; n += PASS_ROWS, turn ^= 1) {
        bring(n + PASS_ROWS, turn ^ 1);
        if (SUMS)
#pragma unroll
            for (int i = threadIdx.x; i < PASS_ROWS * RANKS; i += PASS_THREADS) {
                int row = i / RANKS, r = i % RANKS;
                put_pieces(space->given[0] + r * GIVEN_STRIDE + row, RANKS * GIVEN_STRIDE,
                           r < R && n + row < end ? of.given[(n + row) * R + r] : 0.0f);
            }
        copies_wait<1>();
        __syncthreads();
        const bf16 *tile = space->tiles[turn];
        float products[RANKS / 8][4] = {}; /* of rows 16 (warp % 4) .., half of the columns */
        int row = warp % 4 * 16, half = warp / 4 * (PASS_COLUMNS / 2);
        if (PRODUCTS) {
#pragma unroll 4
            for (int c = half; c < half + PASS_COLUMNS / 2; c += 16) {
                unsigned a[4];
                load_tiles(a, tile + (row + lane % 16) * PASS_STRIDE + c + lane / 16 * 8);
                add_pieces<RANKS>(products, a, space->factor[0] + c, PASS_STRIDE,
                                  RANKS * PASS_STRIDE);
            }
            if (half)
#pragma unroll
                for (int i = 0; i < RANKS / 2; i++)
                    space->halves[(row + g + i / 2 % 2 * 8) * RANKS + i / 4 * 8 + 2 * t + i % 2] =
                        products[i / 4][i % 4];
        }
        if (SUMS) {
#pragma unroll
            for (int k = 0; k < PASS_ROWS; k += 16)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    unsigned a[4];
                    load_turned_tiles(a, tile + (k + lane % 8 + lane / 16 * 8) * PASS_STRIDE +
                                             32 * warp + 16 * i + lane / 8 % 2 * 8);
                    add_pieces<RANKS>(sums[i], a, space->given[0] + k, GIVEN_STRIDE,
                                      RANKS * GIVEN_STRIDE);
                }
        }
        __syncthreads();
        if (PRODUCTS && !half)
#pragma unroll
            for (int i = 0; i < RANKS / 2; i++) {
                int m = row + g + i / 2 % 2 * 8, r = i / 4 * 8 + 2 * t + i % 2;
                if (n + m < end && r < R)
                    of.products[(blockIdx.x * of.N + n + m) * R + r] =
                        products[i / 4][i % 4] + space->halves[m * RANKS + r];
            }
    }
    copies_wait<0>();
    if (!SUMS) return;
    float *to = of.sums + blockIdx.y * of.W * R;
#pragma unroll
    for (int i = 0; i < RANKS; i++) {
        int c = 32 * warp + i / (RANKS / 2) * 16 + g + i / 2 % 2 * 8,
            r = i % (RANKS / 2) / 4 * 8 + 2 * t + i % 2;
        if (c < columns && r < R)
            to[of.sums_turned ? r * of.W + c0 + c : (c0 + c) * R + r] =
                sums[i / (RANKS / 2)][i % (RANKS / 2) / 4][i % 4];
    }
}

/* out (=|+=) alpha times the sum of `parts` parts, `count` elements each. */
struct Joined {
    float *out;
    const float *from;
    int64_t count;
    int parts;
    Write write;
    float alpha;
};

struct BothJoined {
    Joined of[2];
};
/* One for each blockIdx.y. */
static __global__ void join_passes(BothJoined both) {
    wait_for_last();
    const Joined &of = both.of[blockIdx.y];
    FOR_GRID(i, of.count) {
        float sum = 0;
#pragma unroll 4
        for (int p = 0; p < of.parts; p++) sum += of.from[p * of.count + i];
        of.out[i] = (of.write == ADD ? of.out[i] : 0.0f) + of.alpha * sum;
    }
}

#endif
