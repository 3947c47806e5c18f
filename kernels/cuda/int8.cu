/* int8.cu - products of packed weights with activations in 8 bits, straight from the tiles.
 *
 * Activations are rounded in blocks of 32 (scale = largest / 127). A tile holds 16 weight rows, the
 * rows of a tensor-core product; a block of 32 columns is its whole depth, so its integer sums are
 * exact and joined with both scales in f32, in order of K. A warp takes 16 weight rows and up to 64
 * rows of activations; where those are few, the warps of a block share K, each every eighth tile,
 * and their sums are added in order. A row or two, or those of an expert, are not worth a tensor
 * core: there a lane has four columns of four weight rows. */
#include "kernels/cuda/codes.h"
#include "kernels/cuda/gemm.h"

extern "C" {
#include "kernels/matmul.h"
}

#define WARPS 8

/* ---- activations ---- */

/* A warp a block of 32. */
template <typename T> static __global__ void round_blocks(Codes to, const T *x, int64_t blocks) {
    wait_for_last();
    int lane = threadIdx.x % 32;
    for (int64_t b = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32; b < blocks;
         b += (int64_t)gridDim.x * blockDim.x / 32) {
        const float v[1] = {to_float(x[b * 32 + lane])};
        store_codes(to, b * 32 + lane, v, true);
    }
}

void round_activations(const Device *device, Codes to, Tensor x) {
    int64_t count = tensor_count(x);
    WITH_FLOAT(x.dtype, T, {
        LAUNCH_NEXT(device, (round_blocks<T>), grid_for(device, count, 256), 256, to, data_of<T>(x),
                    count / 32);
    });
}

/* ---- products ---- */

/* The four words of a lane for both blocks of a tile: rows g and g + 8, columns 4 t .. and 16 + 4 t
 * .. of each block. */
DEVICE_FUNCTION void read_tile(unsigned (&first)[4], unsigned (&second)[4], const TileQ4_0 *tile) {
    int row = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        unsigned word = *(const unsigned *)&tile->qs[t + i / 2 * 4][4 * (row + i % 2 * 8)];
        /* 8 is taken off each byte apart: its top bit keeps it from borrowing of the next */
        unsigned low = (word & 0x0f0f0f0fu) | 0x80808080u,
                 high = (word >> 4 & 0x0f0f0f0fu) | 0x80808080u;
        first[i] = (low - 0x08080808u) ^ 0x80808080u;
        second[i] = (high - 0x08080808u) ^ 0x80808080u;
    }
}
DEVICE_FUNCTION void read_tile(unsigned (&first)[4], unsigned (&second)[4], const TileQ8_0 *tile) {
    int row = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        first[i] = *(const unsigned *)&tile->qs[t + i / 2 * 4][4 * (row + i % 2 * 8)] ^ 0x80808080u;
        second[i] =
            *(const unsigned *)&tile->qs[8 + t + i / 2 * 4][4 * (row + i % 2 * 8)] ^ 0x80808080u;
    }
}

/* SHARE: the warps share K of the same 16 weight rows, else each has 16 of its own. */
template <typename Tile, int NT, bool SHARE, typename Y>
static __global__ void __launch_bounds__(32 * WARPS)
    multiply(Y *y, const Tile *tiles, const int8_t *codes, const float *scales, int64_t M,
             int64_t N, int64_t K, Groups groups) {
    __shared__ float parts[SHARE ? WARPS : 1][SHARE ? 16 * 8 * NT : 1];
    RowTile rows = find_rows<8 * NT>(groups, M, blockIdx.y);
    if (rows.first == rows.last) return;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int64_t n0 = ((int64_t)blockIdx.x * (SHARE ? 1 : WARPS) + (SHARE ? 0 : warp)) * 16;
    int64_t across = K / TILE_WIDTH, blocks = K / 32;
    bool here = n0 < N;
    const Tile *mine = tiles + (rows.g * N + n0) / 16 * across;
    float sums[NT][4] = {};
#pragma unroll(NT == 1 ? 4 : 1) /* reads of several tiles under way */
    for (int64_t tile = SHARE ? warp : 0; here && tile < across; tile += SHARE ? WARPS : 1) {
        unsigned words[2][4];
        read_tile(words[0], words[1], mine + tile);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float d[2] = {f16_value(mine[tile].d[half][g]), f16_value(mine[tile].d[half][g + 8])};
            int64_t block = 2 * tile + half;
#pragma unroll
            for (int j = 0; j < NT; j++) {
                int64_t row = rows.first + 8 * j + g, pair = rows.first + 8 * j + 2 * t;
                unsigned x[2] = {0, 0};
                if (row < rows.last) {
                    const unsigned *from = (const unsigned *)(codes + row * K + block * 32);
                    x[0] = from[t];
                    x[1] = from[4 + t];
                }
                float a0 = pair < rows.last ? scales[pair * blocks + block] : 0.0f,
                      a1 = pair + 1 < rows.last ? scales[(pair + 1) * blocks + block] : 0.0f;
                int whole[4] = {0, 0, 0, 0};
                mma_int8(whole, words[half], x);
                sums[j][0] += (float)whole[0] * (d[0] * a0);
                sums[j][1] += (float)whole[1] * (d[0] * a1);
                sums[j][2] += (float)whole[2] * (d[1] * a0);
                sums[j][3] += (float)whole[3] * (d[1] * a1);
            }
        }
    }
    if constexpr (SHARE) {
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int p = 0; p < 4; p++)
                parts[warp][(g + p / 2 * 8) * 8 * NT + 8 * j + 2 * t + p % 2] = sums[j][p];
        __syncthreads();
        for (int i = threadIdx.x; i < 16 * 8 * NT; i += 32 * WARPS) {
            float sum = 0;
            for (int w = 0; w < WARPS; w++) sum += parts[w][i];
            int64_t m = rows.first + i % (8 * NT), n = n0 + i / (8 * NT);
            if (m < rows.last && n < N) y[m * N + n] = from_float<Y>(sum);
        }
    } else {
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int p = 0; p < 4; p++) {
                int64_t m = rows.first + 8 * j + 2 * t + p % 2, n = n0 + g + p / 2 * 8;
                if (here && m < rows.last) y[m * N + n] = from_float<Y>(sums[j][p]);
            }
    }
}

/* Rows of activations that the kernel without tensor cores takes at a time. */
#define ROWS_DOT 8

/* A lane's part of a tile, for four weight rows from 4 (lane % 4) on: four columns of each of its
 * two blocks. What they make with activations a and b of those columns. */
DEVICE_FUNCTION void dot_tile(int (&sums)[4][2], const TileQ4_0 *tile, unsigned a, unsigned b) {
    uint4 all = *((const uint4 *)tile->qs + threadIdx.x % 32);
    const unsigned words[4] = {all.x, all.y, all.z, all.w};
    int less_a = __dp4a((int)0xf8f8f8f8u, (int)a, 0), /* codes are 8 too high */
        less_b = __dp4a((int)0xf8f8f8f8u, (int)b, 0);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        sums[i][0] = __dp4a((int)(words[i] & 0x0f0f0f0fu), (int)a, less_a);
        sums[i][1] = __dp4a((int)(words[i] >> 4 & 0x0f0f0f0fu), (int)b, less_b);
    }
}
DEVICE_FUNCTION void dot_tile(int (&sums)[4][2], const TileQ8_0 *tile, unsigned a, unsigned b) {
    const uint4 *from = (const uint4 *)tile->qs + threadIdx.x % 32;
    uint4 first = from[0], second = from[32];
    const unsigned words[2][4] = {{first.x, first.y, first.z, first.w},
                                  {second.x, second.y, second.z, second.w}};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        sums[i][0] = __dp4a((int)(words[0][i] ^ 0x80808080u), (int)a, 0);
        sums[i][1] = __dp4a((int)(words[1][i] ^ 0x80808080u), (int)b, 0);
    }
}

/* Four f16 side by side. */
DEVICE_FUNCTION void read_scales(float (&d)[4], const uint16_t *from) {
    uint2 all = *(const uint2 *)from;
    d[0] = f16_value((uint16_t)all.x), d[1] = f16_value((uint16_t)(all.x >> 16));
    d[2] = f16_value((uint16_t)all.y), d[3] = f16_value((uint16_t)(all.y >> 16));
}

/* Matrices that one launch multiplies: block `begin` of i and on has 16 rows each of matrix i. */
template <typename Tile, typename Y> struct Matrices {
    Y *y[MATRICES_MOST];
    const Tile *tiles[MATRICES_MOST];
    int64_t N[MATRICES_MOST];
    int begin[MATRICES_MOST + 1];
};

/* ROWS of activations at most; the warps share K of 16 weight rows. */
template <typename Tile, int ROWS, typename Y>
static __global__ void __launch_bounds__(32 * WARPS, ROWS == 1 ? 4 : 2)
    multiply_rows(Matrices<Tile, Y> all, const int8_t *codes, const float *scales, int64_t M,
                  int64_t K, Groups groups) {
    __shared__ float parts[WARPS][16 * ROWS];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, block = (int)blockIdx.x;
    int which = (block >= all.begin[1]) + (block >= all.begin[2]);
    Y *y = which == 0 ? all.y[0] : which == 1 ? all.y[1] : all.y[2];
    const Tile *tiles = which == 0 ? all.tiles[0] : which == 1 ? all.tiles[1] : all.tiles[2];
    int64_t N = which == 0 ? all.N[0] : which == 1 ? all.N[1] : all.N[2];
    block -= which == 0 ? 0 : which == 1 ? all.begin[1] : all.begin[2];
    if (!groups.offsets) { /* the warp's first tiles, while the last kernel ends */
        int tile = warp + lane / 8 * WARPS, line = lane % 8 * 128;
        const Tile *first = tiles + (int64_t)block * (K / TILE_WIDTH) + tile;
        if (tile < K / TILE_WIDTH && line < (int)sizeof(Tile)) ask_for((const char *)first + line);
    }
    wait_for_last();
    RowTile rows = find_rows<8>(groups, M, blockIdx.y);
    int count = (int)(rows.last - rows.first);
    if (!count) return;
    int64_t n0 = (int64_t)block * 16;
    int across = (int)(K / TILE_WIDTH), blocks = (int)(K / 32);
    const Tile *mine = tiles + (rows.g * N + n0) / 16 * across;
    const int8_t *x = codes + rows.first * K + lane / 4 * 4;
    const float *steps = scales + rows.first * blocks;
    float sums[ROWS][4] = {};
#pragma unroll 4
    for (int tile = warp; tile < across; tile += WARPS) {
        float d0[4], d1[4];
        read_scales(d0, &mine[tile].d[0][lane % 4 * 4]);
        read_scales(d1, &mine[tile].d[1][lane % 4 * 4]);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (ROWS > 1 && r >= count) break;
            const int8_t *from = x + r * K + tile * TILE_WIDTH;
            float2 step = *(const float2 *)(steps + r * blocks + 2 * tile);
            int whole[4][2];
            dot_tile(whole, mine + tile, *(const unsigned *)from, *(const unsigned *)(from + 32));
#pragma unroll
            for (int i = 0; i < 4; i++) {
                sums[r][i] += (float)whole[i][0] * (d0[i] * step.x);
                sums[r][i] += (float)whole[i][1] * (d1[i] * step.y);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float sum = sums[r][i];
#pragma unroll
            for (int d = 16; d >= 4; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
            if (lane < 4) parts[warp][16 * r + 4 * lane + i] = sum;
        }
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * count; i += 32 * WARPS) {
        float sum = 0;
        for (int w = 0; w < WARPS; w++) sum += parts[w][i];
        y[(rows.first + i / 16) * N + n0 + i % 16] = from_float<Y>(sum);
    }
}

/* Rows that are too few for tensor cores: all matrices at once. */
template <typename Tile, typename Y>
static void launch_rows(const Tensor *y, Tensor a, const Tensor *b, int count, Groups groups,
                        const int8_t *codes, const float *scales) {
    int64_t M = tensor_rows(a), K = tensor_cols(a);
    Matrices<Tile, Y> all = {};
    for (int i = 0; i < MATRICES_MOST; i++) {
        const Tensor *mine = &y[i < count ? i : 0];
        all.y[i] = data_of<Y>(*mine);
        all.tiles[i] = (const Tile *)b[i < count ? i : 0].data;
        all.N[i] = tensor_cols(*mine);
        all.begin[i + 1] = all.begin[i] + (i < count ? (int)(all.N[i] / 16) : 0);
    }
    /* groups begin at multiples of 8 rows: of M there are no more tiles than without them */
    dim3 grid((unsigned)all.begin[count], (unsigned)ceil_div(M, 8));
    for (int i = count; i < MATRICES_MOST; i++) all.begin[i] = (int)grid.x;
    if (M == 1 && !groups.offsets)
        LAUNCH_NEXT(a.device, (multiply_rows<Tile, 1, Y>), grid, 32 * WARPS, all, codes, scales, M,
                    K, groups);
    else
        LAUNCH_NEXT(a.device, (multiply_rows<Tile, ROWS_DOT, Y>), grid, 32 * WARPS, all, codes,
                    scales, M, K, groups);
}

template <typename Tile, typename Y>
static void launch(const Tensor *y, Tensor a, const Tensor *b, int count, Groups groups,
                   const int8_t *codes, const float *scales) {
    int64_t M = tensor_rows(a), K = tensor_cols(a);
    bool few = groups.offsets ? M < 32 * (int64_t)groups.count : M <= 16;
    if (few && (groups.offsets || M <= 2)) {
        launch_rows<Tile, Y>(y, a, b, count, groups, codes, scales);
        return;
    }
    for (int i = 0; i < count; i++) {
        int64_t N = tensor_cols(y[i]);
        const Tile *tiles = (const Tile *)b[i].data;
        if (few)
            LAUNCH(a.device, (multiply<Tile, 1, true, Y>),
                   dim3((unsigned)(N / 16), (unsigned)ceil_div(M, 8)), 32 * WARPS, 0,
                   data_of<Y>(y[i]), tiles, codes, scales, M, N, K, groups);
        else
            LAUNCH(a.device, (multiply<Tile, 8, false, Y>),
                   dim3((unsigned)ceil_div(N, 16 * WARPS), (unsigned)most_row_tiles(groups, M, 64)),
                   32 * WARPS, 0, data_of<Y>(y[i]), tiles, codes, scales, M, N, K, groups);
    }
}

static void product(const Tensor *y, Tensor a, Tensor codes, const Tensor *b, int count,
                    Groups groups) {
    int64_t n = tensor_count(a);
    if (!n) return;
    Codes c = codes_in(codes.data ? codes.data : cuda_workspace(a.device, (size_t)(n + n / 8)), n);
    if (!codes.data) round_activations(a.device, c, a);
    WITH_FLOAT(y->dtype, Y, {
        if (b->dtype == Q4_0_TILED)
            launch<TileQ4_0, Y>(y, a, b, count, groups, c.codes, c.scales);
        else
            launch<TileQ8_0, Y>(y, a, b, count, groups, c.codes, c.scales);
    });
}

extern "C" void cuda_matmul_int8_several(const Tensor *y, Tensor a, Tensor codes, const Tensor *b,
                                         int count) {
    product(y, a, codes, b, count, Groups{});
}

extern "C" void cuda_grouped_matmul_int8(Tensor y, Tensor a, Tensor b, Tensor offsets,
                                         Tensor counts) {
    product(&y, a, tensor_absent(), &b, 1,
            Groups{data_of<int32_t>(offsets), (int)tensor_count(counts), data_of<int32_t>(counts)});
}
