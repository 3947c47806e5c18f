/* int8.cu - products of packed weights with activations in 8 bits, straight from the tiles.
 *
 * Activations are rounded in blocks of 32 (scale = largest / 127). A tile holds 16 weight rows, the
 * rows of a tensor-core product; a block of 32 columns is its whole depth, so its integer sums are
 * exact and joined with both scales in f32, in order of K. A warp takes 16 weight rows and up to 64
 * rows of activations; where those are few, the warps of a block share K, each every eighth tile,
 * and their sums are added in order. A row or two, or those of an expert, are not worth a tensor
 * core: there tiles pass through shared memory, which keeps many under way, and a lane has 16
 * columns of two weight rows. */
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

/* Tiles that lie side by side, on their way to a warp through shared memory. */
template <typename Tile> struct Stage {
    static constexpr int TILES = sizeof(Tile) < 1024 ? 2 : 1;
    Tile tiles[TILES];
};

/* Asks for a stage's tiles, of which there are `left` bytes; zeros for the others. By a warp. */
template <typename Tile>
DEVICE_FUNCTION void ask_for_stage(Stage<Tile> *to, const char *from, int left) {
#pragma unroll
    for (int at = 16 * (threadIdx.x % 32); at < (int)sizeof *to; at += 16 * 32)
        copy_16((char *)to + at, from + at, at < left);
    copies_close_group();
}

/* A lane's part of a tile: 16 columns of one of its two blocks, of two weight rows. Codes have no
 * sign; those of 4 bits of the second block stay 16 times too large. */
template <typename Tile> struct Part {
    static constexpr bool NIBBLES = sizeof(Tile::qs) == TILE_HEIGHT * TILE_WIDTH / 2;
    int rows, block, column, quads; /* the first row, the block, the first column of it; in qs */
    unsigned mask, zero;            /* zero: what the code of 0 is, four times, below 0 */
    DEVICE_MEMBER Part()
        : rows(threadIdx.x % 8 * 2), block(threadIdx.x / 8 % 2), column(threadIdx.x / 16 % 2 * 16),
          quads(column / 4 + (NIBBLES ? 0 : 8 * block)), mask(!NIBBLES ? 0xffffffffu
                                                              : block  ? 0xf0f0f0f0u
                                                                       : 0x0f0f0f0fu),
          zero(NIBBLES && !block ? 0xf8f8f8f8u : 0x80808080u) {}
    DEVICE_MEMBER float factor() const { return NIBBLES && block ? 1.0f / 16 : 1.0f; }

    /* Four columns of both rows, number j of those. */
    DEVICE_MEMBER uint2 codes(const Tile *tile, int j) const {
        uint2 pair = *(const uint2 *)&tile->qs[quads + j][4 * rows];
        return uint2{pair.x & mask, pair.y & mask};
    }
    /* What products of codes with these activations are too much by, below 0. */
    DEVICE_MEMBER int excess(const uint4 &x) const {
        int sum = __dp4a((int)zero, (int)x.x, __dp4a((int)zero, (int)x.y, 0));
        return __dp4a((int)zero, (int)x.z, __dp4a((int)zero, (int)x.w, sum));
    }
};

/* sum + <four bytes without a sign, four with one>. */
DEVICE_FUNCTION int dot_mixed(unsigned a, unsigned b, int sum) {
#ifdef __CUDACC__
    int y;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(sum));
    return y;
#else
    for (int i = 0; i < 32; i += 8) sum += (int)(a >> i & 255) * (int)(int8_t)(b >> i);
    return sum;
#endif
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
    constexpr int TILES = Stage<Tile>::TILES, SIZE = TILES * (int)sizeof(Tile);
    constexpr int STAGES = ROWS == 1 ? 5 : 4; /* under way to a warp */
    __shared__ float parts[WARPS][16 * ROWS];
    __shared__ __align__(16) Stage<Tile> rings[WARPS][STAGES];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, block = (int)blockIdx.x;
    int which = (block >= all.begin[1]) + (block >= all.begin[2]);
    Y *y = which == 0 ? all.y[0] : which == 1 ? all.y[1] : all.y[2];
    const Tile *tiles = which == 0 ? all.tiles[0] : which == 1 ? all.tiles[1] : all.tiles[2];
    int64_t N = which == 0 ? all.N[0] : which == 1 ? all.N[1] : all.N[2];
    block -= which == 0 ? 0 : which == 1 ? all.begin[1] : all.begin[2];
    int across = (int)(K / TILE_WIDTH), left = across * (int)sizeof(Tile) - warp * SIZE;
    const char *next = (const char *)(tiles + (int64_t)block * across) + warp * SIZE;
    Stage<Tile> *ring = rings[warp], *stage = ring;
    auto bring = [&](Stage<Tile> *to) {
        ask_for_stage(to, next, left);
        next += WARPS * SIZE;
        left -= WARPS * SIZE;
    };
    auto start = [&] {
#pragma unroll
        for (int i = 0; i < STAGES - 1; i++) bring(ring + i);
    };
    bool grouped = ROWS > 1 && groups.offsets;
    if (!grouped) start(); /* weights come while the last kernel ends */
    wait_for_last();
    RowTile rows = ROWS > 1 ? find_rows<8>(groups, M, blockIdx.y) : RowTile{0, 0, 1};
    int count = (int)(rows.last - rows.first);
    if (!count) return;
    if (grouped) {
        next += rows.g * (N / 16) * across * (int64_t)sizeof(Tile);
        start();
    }
    Part<Tile> part;
    const int8_t *x = codes + rows.first * K + part.block * 32 + part.column;
    const float *steps = scales + rows.first * (K / 32) + part.block;
    float sums[ROWS][2] = {};
    Stage<Tile> *used = ring + STAGES - 1;
    uint4 near[TILES], next_near[TILES]; /* of the first row: read a turn ahead */
    float step[TILES], next_step[TILES];
    auto read = [&](uint4 &to, float &factor, int tile, int r) {
        tile = min(tile, across - 1);
        to = *(const uint4 *)(x + r * K + tile * TILE_WIDTH);
        factor = steps[r * (K / 32) + 2 * tile];
    };
#pragma unroll
    for (int u = 0; u < TILES; u++) read(next_near[u], next_step[u], warp * TILES + u, 0);
    for (int tile = warp * TILES; tile < across; tile += WARPS * TILES) {
        copies_wait<STAGES - 2>();
        __syncwarp(); /* the stage is there for all lanes, and the one before has been used */
        bring(used);
#pragma unroll
        for (int u = 0; u < TILES; u++) {
            near[u] = next_near[u], step[u] = next_step[u];
            if (tile + WARPS * TILES < across)
                read(next_near[u], next_step[u], tile + WARPS * TILES + u, 0);
        }
#pragma unroll
        for (int u = 0; u < TILES; u++) {
            const Tile *mine = &stage->tiles[u];
            unsigned both = *(const unsigned *)&mine->d[part.block][part.rows];
            float d0 = f16_value((uint16_t)both), d1 = f16_value((uint16_t)(both >> 16));
            uint2 w[4];
#pragma unroll
            for (int j = 0; j < 4; j++) w[j] = part.codes(mine, j);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                if (r >= count) break;
                if (r) read(near[u], step[u], tile + u, r);
                const unsigned a[4] = {near[u].x, near[u].y, near[u].z, near[u].w};
                int low = part.excess(near[u]), high = low;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    low = dot_mixed(w[j].x, a[j], low);
                    high = dot_mixed(w[j].y, a[j], high);
                }
                sums[r][0] += (float)low * (d0 * step[u]);
                sums[r][1] += (float)high * (d1 * step[u]);
            }
        }
        used = stage;
        stage = stage == ring + STAGES - 1 ? ring : stage + 1;
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float sum = part.factor() * sums[r][i];
#pragma unroll
            for (int d = 16; d >= 8; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
            if (lane < 8) parts[warp][16 * r + part.rows + i] = sum;
        }
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * count; i += 32 * WARPS) {
        float sum = 0;
        for (int w = 0; w < WARPS; w++) sum += parts[w][i];
        y[(rows.first + i / 16) * N + (int64_t)block * 16 + i % 16] = from_float<Y>(sum);
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
