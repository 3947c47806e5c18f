/* int8.cu - products of packed weights with activations in 8 bits, straight from the tiles.
 *
 * Activations are rounded in blocks of 32 (scale = largest / 127). A tile holds 16 weight rows, the
 * rows of a tensor-core product; a block of 32 columns is its whole depth, so its integer sums are
 * exact and joined with both scales in f32, in order of K. A warp takes 16 weight rows and up to 64
 * rows of activations; where those are few, the warps of a block share K, each every eighth tile,
 * and their sums are added in order. A row or two, or those of an expert, are not worth a tensor
 * core: there a lane has half the columns of a weight row. */
#include "kernels/cuda/bulk.h"
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

DEVICE_FUNCTION unsigned and_xor(unsigned x, unsigned mask, unsigned flip) {
#ifdef __CUDACC__
    unsigned y;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(y) : "r"(x), "r"(mask), "r"(flip));
    return y;
#else
    return (x & mask) ^ flip;
#endif
}

/* A lane's part of a tile: of weight row lane % 16 the half lane / 16 of each block's columns. */
template <typename Tile> struct LanePart {
    static constexpr bool SMALL = sizeof(Tile) == sizeof(TileQ4_0);
    static constexpr int WORDS = SMALL ? 4 : 8, FACTOR = SMALL ? 16 : 1;
    static constexpr int TOGETHER = SMALL ? 2 : 1; /* tiles that are read at once */
    unsigned words[WORDS];
    uint16_t d[2];
    DEVICE_MEMBER void read(const Tile *tile) {
        int half = threadIdx.x % 32 / 16, row = threadIdx.x % 16;
#pragma unroll
        for (int i = 0; i < WORDS; i++)
            words[i] = *(const unsigned *)&tile->qs[i / 4 * 8 + half * 4 + i % 4][4 * row];
        d[0] = tile->d[0][row];
        d[1] = tile->d[1][row];
    }
    /* FACTOR times block b with its activations: codes get their sign by their top bit, and those
     * of 4 bits stay in the upper half of a byte. */
    DEVICE_MEMBER int dot(int b, const uint4 &activations) const {
        const unsigned x[4] = {activations.x, activations.y, activations.z, activations.w};
        int sum = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            unsigned word = SMALL ? words[i] << (b ? 0 : 4) : words[WORDS - 8 + 4 * b + i];
            sum =
                __dp4a((int)and_xor(word, SMALL ? 0xf0f0f0f0u : ~0u, 0x80808080u), (int)x[i], sum);
        }
        return sum;
    }
};

/* Matrices that one launch multiplies: block `begin` of i and on has 16 rows each of matrix i. */
template <typename Tile, typename Y> struct Matrices {
    Y *y[MATRICES_MOST];
    const Tile *tiles[MATRICES_MOST];
    int64_t N[MATRICES_MOST];
    int begin[MATRICES_MOST + 1];
};

/* On Hopper a warp's tiles come into shared memory by its copy engine, some while others are
 * multiplied: no registers wait for them. */
#define SLOTS 4 /* of a warp: TOGETHER tiles each */
template <typename Tile> struct alignas(128) TileRing {
    Tile tiles[WARPS][SLOTS][LanePart<Tile>::TOGETHER];
    Barrier full[WARPS][SLOTS];
};

/* ROWS of activations at most; the warps share K of 16 weight rows, each every eighth TOGETHER.
 * With RING weights are read before the last kernel ends: none that is launched early writes them.
 */
template <typename Tile, int ROWS, bool RING, typename Y>
static __global__ void __launch_bounds__(32 * WARPS, ROWS > 1 ? 2
                                                     : RING   ? 6
                                                              : 4)
    multiply_rows(Matrices<Tile, Y> all, const int8_t *codes, const float *scales, int64_t M,
                  int64_t K, Groups groups) {
    constexpr int TOGETHER = LanePart<Tile>::TOGETHER;
    __shared__ float parts[WARPS][16 * ROWS];
    __shared__ std::conditional_t<RING, TileRing<Tile>, char> ring;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, block = (int)blockIdx.x;
    int which = (block >= all.begin[1]) + (block >= all.begin[2]);
    Y *y = which == 0 ? all.y[0] : which == 1 ? all.y[1] : all.y[2];
    const Tile *tiles = which == 0 ? all.tiles[0] : which == 1 ? all.tiles[1] : all.tiles[2];
    int64_t N = which == 0 ? all.N[0] : which == 1 ? all.N[1] : all.N[2];
    block -= which == 0 ? 0 : which == 1 ? all.begin[1] : all.begin[2];
    int64_t n0 = (int64_t)block * 16;
    int across = (int)(K / TILE_WIDTH), blocks = (int)(K / 32);
    const Tile *mine = tiles + block * (int64_t)across;
    auto ask = [&](int first) { /* for the warp's tiles from there on */
                                if constexpr (RING) {
                                    int slot = first / (WARPS * TOGETHER) % SLOTS;
                                    int bytes = min(TOGETHER, across - first) * (int)sizeof(Tile);
                                    if (lane || first >= across) return;
                                    barrier_announce(&ring.full[warp][slot], bytes);
                                    copy_bytes(ring.tiles[warp][slot], &ring.full[warp][slot],
                                               mine + first, bytes);
                                }
    };
    auto ask_first = [&] {
        for (int i = 0; i < SLOTS; i++) ask((i * WARPS + warp) * TOGETHER);
    };
    if constexpr (RING) {
        if (!lane)
            for (int i = 0; i < SLOTS; i++) barrier_begin(&ring.full[warp][i], 1);
        __syncwarp();
        if (!groups.offsets) ask_first();
    } else if (!groups.offsets) { /* the warp's first tiles */
        int tile = warp * TOGETHER + lane / 8 * WARPS, line = lane % 8 * 128;
        if (tile < across && line < (int)sizeof(Tile)) ask_for((const char *)(mine + tile) + line);
    }
    wait_for_last();
    RowTile rows = find_rows<8>(groups, M, blockIdx.y);
    int count = (int)(rows.last - rows.first);
    if (!count) return;
    if (groups.offsets) {
        mine += rows.g * N / 16 * across;
        ask_first();
    }
    const int8_t *x = codes + rows.first * K + lane / 16 * 16;
    const float *steps = scales + rows.first * blocks;
    float sums[ROWS] = {};
    for (int first = warp * TOGETHER, turn = 0; first < across; first += WARPS * TOGETHER, turn++) {
        LanePart<Tile> read[TOGETHER];
        const Tile *from_here = mine + first;
        if constexpr (RING) {
            barrier_wait(&ring.full[warp][turn % SLOTS], turn / SLOTS % 2);
            from_here = ring.tiles[warp][turn % SLOTS];
        }
#pragma unroll
        for (int i = 0; i < TOGETHER; i++)
            if (first + i < across) read[i].read(from_here + i);
        if constexpr (RING) {
            __syncwarp();
            ask(first + SLOTS * WARPS * TOGETHER);
        }
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            int tile = first + i;
            if (tile >= across) break;
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                if (ROWS > 1 && r >= count) break;
                const int8_t *from = x + r * K + tile * TILE_WIDTH;
                float2 step = *(const float2 *)(steps + r * blocks + 2 * tile);
                sums[r] += (float)read[i].dot(0, *(const uint4 *)from) *
                           (f16_value(read[i].d[0]) * step.x);
                sums[r] += (float)read[i].dot(1, *(const uint4 *)(from + 32)) *
                           (f16_value(read[i].d[1]) * step.y);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float sum = sums[r] + __shfl_xor_sync(0xffffffffu, sums[r], 16);
        if (lane < 16) parts[warp][16 * r + lane] = sum * (1.0f / LanePart<Tile>::FACTOR);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * count; i += 32 * WARPS) {
        float sum = 0;
        for (int w = 0; w < WARPS; w++) sum += parts[w][i];
        y[(rows.first + i / 16) * N + n0 + i % 16] = from_float<Y>(sum);
    }
}

#define WITH_RING(device, RING, ...)                                                               \
    do {                                                                                           \
        if (cuda_has_wgmma(device)) {                                                              \
            constexpr bool RING = true;                                                            \
            __VA_ARGS__;                                                                           \
        } else {                                                                                   \
            constexpr bool RING = false;                                                           \
            __VA_ARGS__;                                                                           \
        }                                                                                          \
    } while (0)

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
    bool one = M == 1 && !groups.offsets;
    WITH_RING(a.device, RING, {
        if (one)
            LAUNCH_NEXT(a.device, (multiply_rows<Tile, 1, RING, Y>), grid, 32 * WARPS, all, codes,
                        scales, M, K, groups);
        else
            LAUNCH_NEXT(a.device, (multiply_rows<Tile, ROWS_DOT, RING, Y>), grid, 32 * WARPS, all,
                        codes, scales, M, K, groups);
    });
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
