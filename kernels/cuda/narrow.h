/* narrow.h - products of adapters, one side of which is only some ranks wide: limited by reading
 * the other, or by reading and writing y.
 *
 * What is narrow is f32, taken apart into two bf16 numbers each, 16 bits of the significand; the
 * other side is bf16. Warps go their own ways: a lane reads sixteen bytes of a row at a time, and K
 * is taken in the order in which a lane's numbers come, the same for both operands. */
#ifndef CUDA_NARROW_H
#define CUDA_NARROW_H

#include "kernels/cuda/gemm.h"

#define NARROW_THREADS 256
#define NARROW_WARPS   (NARROW_THREADS / 32)
#define NARROW_RANKS   64 /* at most, of products that are ranks wide */

/* Two floats as pairs of bf16 numbers: the big parts, and what they leave. */
DEVICE_FUNCTION void take_apart(unsigned &big, unsigned &small, float x, float y) {
    big = pack_bf16(x, y);
    small = pack_bf16(x - __uint_as_float(big << 16), y - __uint_as_float(big & 0xffff0000u));
}

/* ---- u = x A^T, du = dy B ---- */

#define IN_ROWS 32 /* of a block, whose warps share K */

/* u (N, R) (=|+=) alpha m f; m (N, W), W a multiple of 8, f (W, R), or (R, W) where it is TURNED.
 * RANKS >= R. A warp takes 32 columns at a time, each eighth of the block's. */
template <int RANKS, bool TURNED>
static __global__ void __launch_bounds__(NARROW_THREADS)
    narrow_in(float *u, Write write, const bf16 *m, const float *f, int64_t N, int64_t W, int R,
              float alpha) {
    constexpr int TILES = RANKS / 8, STEP = NARROW_WARPS * 32,
                  DEEP = RANKS == 16   ? 3
                         : RANKS == 32 ? 2
                                       : 1; /* turns whose reads are under way */
    __shared__ float parts[NARROW_WARPS][IN_ROWS][17];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int64_t n0 = (int64_t)blockIdx.x * IN_ROWS;
    float sums[2][TILES][4] = {};
    uint4 x[DEEP][4]; /* rows g, g + 8, g + 16 and g + 24 */
    float w[DEEP][TILES][8];
    auto fetch = [&](int turn, int64_t c) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int64_t n = n0 + g + 8 * i;
            x[turn][i] = n < N && c < W ? *(const uint4 *)(m + n * W + c) : uint4{0, 0, 0, 0};
        }
#pragma unroll
        for (int j = 0; j < TILES; j++) {
            int r = 8 * j + g;
            bool here = r < R && c < W;
            float(&to)[8] = w[turn][j];
#pragma unroll
            for (int k = 0; k < 8; k += 4) {
                if (TURNED) {
                    float4 four = here ? *(const float4 *)(f + r * W + c + k) : float4{0, 0, 0, 0};
                    to[k] = four.x, to[k + 1] = four.y, to[k + 2] = four.z, to[k + 3] = four.w;
                } else {
#pragma unroll
                    for (int i = k; i < k + 4; i++) to[i] = here ? f[(c + i) * R + r] : 0.0f;
                }
            }
        }
    };
    auto add = [&](int turn) {
#pragma unroll
        for (int j = 0; j < TILES; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) { /* sixteen columns: four of each lane */
                const float *four = w[turn][j] + 4 * half;
                unsigned big[2], small[2];
                take_apart(big[0], small[0], four[0], four[1]);
                take_apart(big[1], small[1], four[2], four[3]);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const uint4 &a = x[turn][2 * i], &b = x[turn][2 * i + 1];
                    unsigned rows[4] = {half ? a.z : a.x, half ? b.z : b.x, half ? a.w : a.y,
                                        half ? b.w : b.y};
                    mma_bf16(sums[i][j], rows, small);
                    mma_bf16(sums[i][j], rows, big);
                }
            }
    };
    int64_t c = warp * 32 + 8 * t;
#pragma unroll
    for (int s = 0; s < DEEP - 1; s++) fetch(s, c + s * STEP);
    for (; c - 8 * t < W; c += DEEP * STEP)
#pragma unroll
        for (int s = 0; s < DEEP; s++) {
            fetch((s + DEEP - 1) % DEEP, c + (s + DEEP - 1) * STEP);
            add(s);
        }
#pragma unroll
    for (int j = 0; j < TILES; j += 2) { /* sixteen ranks at a time */
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 16; i++)
            parts[warp][i / 8 * 16 + g + i / 2 % 2 * 8][i / 4 % 2 * 8 + 2 * t + i % 2] =
                sums[i / 8][j + i / 4 % 2][i % 4];
        __syncthreads();
        for (int i = threadIdx.x; i < IN_ROWS * 16; i += NARROW_THREADS) {
            int64_t n = n0 + i / 16;
            int r = 8 * j + i % 16;
            if (n >= N || r >= R) continue;
            float sum = 0;
#pragma unroll
            for (int p = 0; p < NARROW_WARPS; p++) sum += parts[p][i / 16][i % 16];
            u[n * R + r] = (write == ADD ? u[n * R + r] : 0.0f) + alpha * sum;
        }
    }
}

/* ---- dB += dy^T u, dA += du^T x ---- */

#define SUM_COLUMNS 64 /* of a block, whose warps share the rows */
#define SUM_DEPTH   16 /* rows that a warp has at a time */
#define SUM_STAGES  4
#define SUM_STRIDE  (SUM_COLUMNS + 8) /* elements from row to row in shared memory: banks differ */

static inline size_t narrow_sums_bytes() {
    return sizeof(bf16) * NARROW_WARPS * SUM_STAGES * SUM_DEPTH * SUM_STRIDE;
}

/* out (W, R), or (R, W) where it is TURNED, (=|+=) alpha m^T v; m (N, W), W a multiple of 8, v
 * (N, R). Block (x, y): SUM_COLUMNS columns and `rows` rows; with several blocks of rows out is a
 * matrix for each, which are then added up. */
template <int RANKS, bool TURNED>
static __global__ void __launch_bounds__(NARROW_THREADS)
    narrow_sums(float *out, Write write, const bf16 *m, const float *v, int64_t N, int64_t W, int R,
                int64_t rows, float alpha) {
    constexpr int TILES = RANKS / 8, STAGE = SUM_DEPTH * SUM_STRIDE;
    DYNAMIC_SHARED(memory);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int64_t c0 = (int64_t)blockIdx.x * SUM_COLUMNS, n0 = blockIdx.y * rows + warp * SUM_DEPTH,
            end = min(N, (blockIdx.y + 1) * rows);
    constexpr int STEP = NARROW_WARPS * SUM_DEPTH;
    bf16 *mine = (bf16 *)memory + warp * SUM_STAGES * STAGE;
    auto bring = [&](int64_t n, int stage) {
#pragma unroll
        for (int i = 0; i < SUM_DEPTH; i += 4) {
            int64_t row = n + lane / 8 + i, c = c0 + lane % 8 * 8;
            bool here = row < end && c < W;
            copy_16(mine + stage * STAGE + (lane / 8 + i) * SUM_STRIDE + lane % 8 * 8,
                    m + (here ? row * W + c : 0), here);
        }
        copies_close_group();
    };
    auto given = [&](float(&x)[TILES][4],
                     int64_t n) { /* rows 2 t, 2 t + 1, 2 t + 8, 2 t + 9 */
#pragma unroll
                                  for (int j = 0; j < TILES; j++)
#pragma unroll
                                      for (int i = 0; i < 4; i++) {
                                          int64_t row = n + 2 * t + i % 2 + i / 2 * 8;
                                          x[j][i] = row < end && 8 * j + g < R
                                                        ? v[row * R + 8 * j + g]
                                                        : 0.0f;
                                      }
    };
    float sums[SUM_COLUMNS / 16][TILES][4] = {}, next[TILES][4];
    for (int s = 0; s < SUM_STAGES - 1; s++) bring(n0 + s * STEP, s);
    given(next, n0);
    int stage = 0;
    for (int64_t n = n0; n < end; n += STEP) {
        unsigned big[TILES][2], small[TILES][2];
#pragma unroll
        for (int j = 0; j < TILES; j++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                take_apart(big[j][i], small[j][i], next[j][2 * i], next[j][2 * i + 1]);
        copies_wait<SUM_STAGES - 2>();
        __syncwarp();
        bring(n + (SUM_STAGES - 1) * STEP, (stage + SUM_STAGES - 1) % SUM_STAGES);
        given(next, n + STEP);
#pragma unroll
        for (int i = 0; i < SUM_COLUMNS / 16; i++) {
            unsigned a[4];
            load_turned_tiles(a, mine + stage * STAGE + (lane % 8 + lane / 16 * 8) * SUM_STRIDE +
                                     16 * i + lane / 8 % 2 * 8);
#pragma unroll
            for (int j = 0; j < TILES; j++) {
                mma_bf16(sums[i][j], a, small[j]);
                mma_bf16(sums[i][j], a, big[j]);
            }
        }
        stage = (stage + 1) % SUM_STAGES;
    }
    copies_wait<0>();
    out += blockIdx.y * W * R;
    float *parts = (float *)memory; /* (warps, columns, 16): the stages have been read */
#pragma unroll
    for (int j = 0; j < TILES; j += 2) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < SUM_COLUMNS / 2; i++)
            parts[(warp * SUM_COLUMNS + i / 8 * 16 + g + i / 2 % 2 * 8) * 16 + i / 4 % 2 * 8 +
                  2 * t + i % 2] = sums[i / 8][j + i / 4 % 2][i % 4];
        __syncthreads();
        for (int i = threadIdx.x; i < SUM_COLUMNS * 16; i += NARROW_THREADS) {
            int column = TURNED ? i % SUM_COLUMNS : i / 16,
                rank = TURNED ? i / SUM_COLUMNS : i % 16;
            int64_t c = c0 + column;
            int r = 8 * j + rank;
            if (c >= W || r >= R) continue;
            float sum = 0;
#pragma unroll
            for (int p = 0; p < NARROW_WARPS; p++)
                sum += parts[(p * SUM_COLUMNS + column) * 16 + rank];
            float *to = out + (TURNED ? r * W + c : c * R + r);
            *to = (write == ADD ? *to : 0.0f) + alpha * sum;
        }
    }
}

/* out (=|+=) the parts, one behind the other, added in order. */
static __global__ void join_sums(float *out, Write write, const float *parts, int64_t count,
                                 int number) {
    wait_for_last();
    FOR_GRID(i, count) {
        float sum = 0;
#pragma unroll 4
        for (int p = 0; p < number; p++) sum += parts[p * count + i];
        out[i] = (write == ADD ? out[i] : 0.0f) + sum;
    }
}

/* ---- y += u B^T, dx += du A ---- */

#define OUT_THREADS 128
#define OUT_COLUMNS 128 /* of a warp, which takes sixteen rows at a time */

/* Four neighbours' worth of b for a lane: column n of rows 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of
 * sixteen from k0 on; zeros outside. TURNED: K are its rows. */
template <bool TURNED>
DEVICE_FUNCTION void read_narrow(unsigned (&big)[2], unsigned (&small)[2], const float *p,
                                 int64_t i, int64_t k0, int64_t i_end, int64_t k_end) {
    float x[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        int64_t k = k0 + threadIdx.x % 4 * 2 + j % 2 + j / 2 * 8;
        x[j] = i < i_end && k < k_end ? p[TURNED ? k * i_end + i : i * k_end + k] : 0.0f;
    }
    take_apart(big[0], small[0], x[0], x[1]);
    take_apart(big[1], small[1], x[2], x[3]);
}

/* y (=|+=) alpha a b, both f32, shapes as in gemm16. A lane has columns 8 t .. 8 t + 7 of each 32
 * of the result, where a product has 2 t and 2 t + 1 of eight. packs: eight columns of y can be
 * read at a time. ONCE: K is at most 16, so b's part stays in registers. */
template <bool TA, bool TB, bool ONCE>
static __global__ void __launch_bounds__(OUT_THREADS)
    narrow_out(bf16 *y, Write write, const float *a, const float *b, Shape shape, float alpha,
               bool packs) {
    constexpr int GROUPS = OUT_COLUMNS / 32;
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int64_t n0 = (int64_t)blockIdx.x * OUT_COLUMNS, warps = gridDim.y * (OUT_THREADS / 32),
            warp = blockIdx.y * (OUT_THREADS / 32) + threadIdx.x / 32;
    unsigned big[GROUPS][4][2], small[GROUPS][4][2];
    auto read_b = [&](int i, int64_t k) {
#pragma unroll
        for (int j = 0; j < 4; j++)
            read_narrow<TB>(big[i][j], small[i][j], b, n0 + 32 * i + g / 2 * 8 + 2 * j + g % 2, k,
                            shape.N, shape.K);
    };
    if (ONCE)
#pragma unroll
        for (int i = 0; i < GROUPS; i++) read_b(i, 0);
    for (int64_t m0 = warp * 16; m0 < shape.M; m0 += warps * 16) {
        uint4 old[2][GROUPS];
#pragma unroll
        for (int p = 0; p < 2; p++)
#pragma unroll
            for (int i = 0; i < GROUPS; i++) {
                int64_t m = m0 + g + 8 * p, n = n0 + 32 * i + 8 * t;
                old[p][i] = uint4{0, 0, 0, 0};
                if (packs && write == ADD && m < shape.M && n < shape.N)
                    old[p][i] = *(const uint4 *)(y + m * shape.N + n);
            }
        float sums[GROUPS][4][4] = {};
        for (int64_t k = 0; k < shape.K; k += 16) {
            unsigned a_big[4], a_small[4];
#pragma unroll
            for (int p = 0; p < 2; p++) {
                unsigned first[2], second[2];
                read_narrow<TA>(first, second, a, m0 + g + 8 * p, k, shape.M, shape.K);
                a_big[p] = first[0], a_big[2 + p] = first[1];
                a_small[p] = second[0], a_small[2 + p] = second[1];
            }
#pragma unroll
            for (int i = 0; i < GROUPS; i++) {
                if (!ONCE) read_b(i, k);
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    mma_bf16(sums[i][j], a_small, big[i][j]);
                    mma_bf16(sums[i][j], a_big, small[i][j]);
                    mma_bf16(sums[i][j], a_big, big[i][j]);
                }
            }
        }
#pragma unroll
        for (int p = 0; p < 2; p++) {
            int64_t m = m0 + g + 8 * p;
            if (m >= shape.M) continue;
#pragma unroll
            for (int i = 0; i < GROUPS; i++) {
                int64_t n = n0 + 32 * i + 8 * t;
                bf16 *to = y + m * shape.N + n;
                if (packs && n < shape.N) {
                    unsigned was[4] = {old[p][i].x, old[p][i].y, old[p][i].z, old[p][i].w}, now[4];
#pragma unroll
                    for (int j = 0; j < 4; j++)
                        now[j] = pack_bf16(
                            __uint_as_float(was[j] << 16) + alpha * sums[i][j][2 * p],
                            __uint_as_float(was[j] & 0xffff0000u) + alpha * sums[i][j][2 * p + 1]);
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
}

#endif
