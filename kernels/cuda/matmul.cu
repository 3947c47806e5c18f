/* matmul.cu - dense and grouped products: which kernel takes which.
 *
 * cuBLASLt has dense products of one dtype. A few rows against a weight are limited by reading it:
 * a warp for each of its rows. Packed weights meet few rows as they are; for many they are unpacked
 * a panel at a time. Where f32 meets bf16 it is taken apart into bf16 numbers, so that those
 * products too are the library's, several of one input at once. Groups go to gemm.h. */
#include "kernels/cuda/blaslt.h"
#include "kernels/cuda/gemm_hopper.h"
#include "kernels/cuda/gemm_pairs.h"

extern "C" {
#include "kernels/elementwise.h"
}

/* ---- a few rows ---- */

#define ROWS_FEW     4                    /* rows of a that the row-by-row kernel takes */
#define ROWS_SMALL   64                   /* rows up to which packed weights are read as they are */
#define GROUPS_PANEL ((int64_t)256 << 20) /* elements of groups unpacked at a time */
#define PANEL        ((int64_t)64 << 20)  /* elements of an unpacked panel */

/* A matrix b (N, K), and where its product goes. */
template <typename Y> struct FewRows {
    Y *y;
    PackedView b;
    int64_t N;
};
template <typename Y> struct FewRowsOfSeveral { FewRows<Y> at[MATRICES_MOST]; };

/* y (rows, N) (=|+=) alpha a b^T of several b, rows <= M: a warp for each row of them, which it
 * reads once. */
template <int M, int D, typename Y, typename A>
static __global__ void __launch_bounds__(256)
    few_rows(FewRowsOfSeveral<Y> several, Write write, const A *a, int rows, int64_t K,
             float alpha) {
    int lane = threadIdx.x % 32;
    int64_t n = (int64_t)blockIdx.x * 8 + threadIdx.x / 32;
    FewRows<Y> one = several.at[0];
#pragma unroll
    for (int i = 1; i < MATRICES_MOST; i++)
        if (n >= one.N) n -= one.N, one = several.at[i];
    const PackedView &b = one.b;
    bool here = n < one.N;
    if constexpr (D == BF16) /* the row's first 2 KB, while the last kernel ends */
        if (here && lane < 16 && lane * 64 < K) ask_for((const bf16 *)b.data + n * K + lane * 64);
    wait_for_last();
    float sums[M] = {};
#pragma unroll(M == 1 ? 4 : 1) /* reads of several chunks under way */
    for (int64_t k = lane * 8; here && k < K; k += 256) {
        float w[8], x[8];
        read8<D>(w, b, n * K + k);
#pragma unroll
        for (int m = 0; m < M; m++) {
            float low[4], high[4];
            const A *row = a + (M > 1 && m >= rows ? 0 : m) * K + k;
            load(low, row);
            load(high, row + 4);
#pragma unroll
            for (int i = 0; i < 8; i++) x[i] = i < 4 ? low[i] : high[i - 4];
#pragma unroll
            for (int i = 0; i < 8; i++) sums[m] += w[i] * x[i];
        }
    }
#pragma unroll
    for (int m = 0; m < M; m++) {
        float sum = warp_sum(sums[m]);
        if (!here || lane || m >= rows) continue;
        Y *to = one.y + m * one.N + n;
        *to = from_float<Y>((write == ADD ? to_float(*to) : 0.0f) + alpha * sum);
    }
}

template <int D, typename Y, typename A>
static void launch_few_rows(const Tensor *y, Write write, Tensor a, const Tensor *b, int count,
                            float alpha) {
    int64_t K = tensor_cols(a), N = 0;
    FewRowsOfSeveral<Y> several = {};
    for (int i = 0; i < count; i++) {
        several.at[i] = FewRows<Y>{data_of<Y>(y[i]), view_of(b[i]), tensor_cols(y[i])};
        N += tensor_cols(y[i]);
    }
    unsigned grid = (unsigned)ceil_div(N, 8);
    int rows = (int)tensor_rows(a);
    if (rows == 1)
        LAUNCH_NEXT(a.device, (few_rows<1, D, Y, A>), grid, 256, several, write, data_of<A>(a),
                    rows, K, alpha);
    else
        LAUNCH_NEXT(a.device, (few_rows<ROWS_FEW, D, Y, A>), grid, 256, several, write,
                    data_of<A>(a), rows, K, alpha);
}

static bool takes_few_rows(Tensor a) {
    int64_t K = tensor_cols(a);
    return tensor_rows(a) <= ROWS_FEW && K % 8 == 0 && (uintptr_t)a.data % 16 == 0;
}

/* ---- tensor cores ---- */

typedef Tiles<128, 128, 2, 4> LargeTiles;
typedef Tiles<16, 64, 1, 4> SmallTiles;

static bool is_aligned(Tensor t) {
    return tensor_cols(t) % 8 == 0 && (uintptr_t)t.data % 16 == 0;
}

/* The least share of the multiprocessors' time that products without groups must use: where the
 * last tiles leave more of them idle, cuBLASLt has better sizes of tiles. */
#define PAIRS_FILL 0.8

/* How many pairs of blocks there are room for. */
static int64_t pairs_most(const Device *device) {
    return cuda_processors(device) / PAIR;
}

/* The share of it that y (M, N) in tiles of so many rows uses. */
static double pairs_fill(const Device *device, int64_t rows, int64_t M, int64_t N) {
    int64_t most = pairs_most(device), columns = PAIR * PAIRS_COLUMNS,
            turns = ceil_div(ceil_div(M, rows) * ceil_div(N, columns), most);
    return (double)(M * N) / (double)(turns * most * rows * columns);
}

/* How many times 64 rows a warpgroup gets of y, which must not be added to for three; 0: neither
 * fills the device. */
static int pairs_blocks(const Device *device, Write write, int64_t M, int64_t N) {
    double two = pairs_fill(device, PAIRS_TILE<2>, M, N),
           three = write == SET ? pairs_fill(device, PAIRS_TILE<3>, M, N) : 0;
    return fmax(two, three) < PAIRS_FILL ? 0 : three > two + 0.05 ? 3 : 2;
}

/* Puts another product a (M, K) b into the sum, of `groups` matrices b (N, K), or TB: (K, N). */
template <bool TB>
static void add_factor(PairMaps *maps, int factor, const void *a, const void *b, int groups,
                       int64_t M, int64_t N, int64_t K) {
    maps->a[factor] = cuda_tile_map(a, 1, M, K, PAIRS_ROWS);
    maps->b[factor] = TB ? cuda_tile_map(b, groups, K, N, PAIRS_DEPTH)
                         : cuda_tile_map(b, groups, N, K, PAIRS_COLUMNS);
    maps->steps[factor] = (int)ceil_div(K, PAIRS_DEPTH);
}

template <bool TB, int BLOCKS, typename Y>
static void launch_gemm_pairs(Tensor y, Write write, PairMaps maps, Groups groups, float alpha) {
    int count = groups.offsets ? groups.count : 1;
    int64_t M = tensor_rows(y), N = tensor_cols(y), most = pairs_most(y.device),
            tiles =
                most_row_tiles(groups, M, PAIRS_TILE<BLOCKS>) * ceil_div(N, PAIR * PAIRS_COLUMNS);
    if (sizeof(Y) == sizeof(bf16)) maps.y = cuda_tile_map(y.data, 1, M, N, PAIRS_ROWS);
    LAUNCH_PAIRS(y.device, (gemm_pairs<TB, BLOCKS, Y>),
                 (unsigned)(tiles < most ? tiles : most) * PAIR, BROUGHT_THREADS,
                 gemm_pairs_bytes<BLOCKS>(count), data_of<Y>(y), write, maps, M, N, groups, alpha);
}

/* Whether shared memory has room for where so many groups' tiles begin. */
template <int BLOCKS> static bool pairs_fit(const Device *device, const Groups &groups) {
    return gemm_pairs_bytes<BLOCKS>(groups.count) <= cuda_shared_most(device);
}

/* Groups of such a size fit into one tall tile each, mostly: their weights are read once. */
static bool are_tall(int64_t M, const Groups &groups) {
    return M > 160 * (int64_t)groups.count && M < 352 * (int64_t)groups.count;
}

template <bool TB, typename Y>
static void pairs_of_groups(Tensor y, Write write, Tensor a, Tensor b, Shape shape, Groups groups,
                            float alpha) {
    PairMaps maps = {};
    add_factor<TB>(&maps, 0, a.data, b.data, groups.count, shape.M, shape.N, shape.K);
    if (write == SET && are_tall(shape.M, groups) && pairs_fit<3>(y.device, groups))
        launch_gemm_pairs<TB, 3, Y>(y, write, maps, groups, alpha);
    else
        launch_gemm_pairs<TB, 2, Y>(y, write, maps, groups, alpha);
}

template <typename Y>
static void sums_of_groups(Tensor y, Write write, Tensor a, Tensor b, Shape shape, Groups groups,
                           float alpha) {
    dim3 grid((unsigned)ceil_div(shape.N, HOPPER_COLUMNS), (unsigned)ceil_div(shape.M, HOPPER_ROWS),
              (unsigned)groups.count);
    LAUNCH(a.device, (gemm_hopper<Y>), grid, HOPPER_THREADS, gemm_hopper_bytes(), data_of<Y>(y),
           write, data_of<bf16>(a), data_of<bf16>(b), shape.M, shape.N, groups.offsets, alpha);
}

template <typename S, bool TA, bool TB, int DB, typename Y>
static void launch_gemm16(Tensor y, Write write, Tensor a, Tensor b, Shape shape, Groups groups,
                          float alpha) {
    if constexpr (std::is_same_v<S, LargeTiles>)
        if (cuda_has_wgmma(a.device) && is_aligned(a) && is_aligned(b) && is_aligned(y) &&
            (TA || pairs_fit<2>(a.device, groups))) {
            if constexpr (TA)
                sums_of_groups<Y>(y, write, a, b, shape, groups, alpha);
            else
                pairs_of_groups<TB, Y>(y, write, a, b, shape, groups, alpha);
            return;
        }
    dim3 grid((unsigned)ceil_div(shape.N, S::BN),
              (unsigned)(TA ? ceil_div(shape.M, S::BM) : most_row_tiles(groups, shape.M, S::BM)),
              (unsigned)(TA && groups.offsets ? groups.count : 1));
    LAUNCH(a.device, (gemm16<S, TA, TB, DB, Y>), grid, S::THREADS, 0, data_of<Y>(y), write,
           view_of(a), view_of(b), shape, groups, alpha, is_aligned(a), is_aligned(b));
}

/* Products of bf16 rows with bf16 weights, and of few with packed ones. */
template <typename S>
static void product16(Layout layout, Tensor y, Write write, Tensor a, Tensor b, Shape shape,
                      Groups groups, float alpha) {
    WITH_FLOAT(y.dtype, Y, {
        if (layout == TN)
            launch_gemm16<S, true, true, BF16, Y>(y, write, a, b, shape, groups, alpha);
        else if (b.dtype == BF16 && layout == NT)
            launch_gemm16<S, false, false, BF16, Y>(y, write, a, b, shape, groups, alpha);
        else if (b.dtype == BF16)
            launch_gemm16<S, false, true, BF16, Y>(y, write, a, b, shape, groups, alpha);
        else if constexpr (std::is_same_v<S, LargeTiles>)
            CHECK(false, "large tiles of %s", dtype_name(b.dtype));
        else {
            if (layout == NT)
                WITH_PACKED(
                    b.dtype, D,
                    launch_gemm16<S, false, false, D, Y>(y, write, a, b, shape, groups, alpha))
            else
                WITH_PACKED(
                    b.dtype, D,
                    launch_gemm16<S, false, true, D, Y>(y, write, a, b, shape, groups, alpha))
        }
    });
}

/* Groups' products in f32 accuracy of f32 and bf16. */
static void product32(Layout layout, Tensor y, Write write, Tensor a, Tensor b, Shape shape,
                      Groups groups, float alpha) {
    int64_t tiles =
        layout == TN ? ceil_div(shape.M, BLOCK32) : most_row_tiles(groups, shape.M, BLOCK32);
    dim3 grid((unsigned)ceil_div(shape.N, BLOCK32), (unsigned)tiles,
              (unsigned)(layout == TN ? groups.count : 1));
    WITH_FLOAT(y.dtype, Y, WITH_FLOAT(a.dtype, A, WITH_FLOAT(b.dtype, B, {
                                          const A *left = data_of<A>(a);
                                          const B *right = data_of<B>(b);
                                          if (layout == TN)
                                              LAUNCH(a.device, (gemm32<true, true, Y, A, B>), grid,
                                                     THREADS32, 0, data_of<Y>(y), write, left,
                                                     right, shape, groups, alpha);
                                          else if (layout == NT)
                                              LAUNCH(a.device, (gemm32<false, false, Y, A, B>),
                                                     grid, THREADS32, 0, data_of<Y>(y), write, left,
                                                     right, shape, groups, alpha);
                                          else
                                              LAUNCH(a.device, (gemm32<false, true, Y, A, B>), grid,
                                                     THREADS32, 0, data_of<Y>(y), write, left,
                                                     right, shape, groups, alpha);
                                      })));
}

/* ---- dense products ---- */

/* Packed weights for many rows: panels of b's rows, unpacked to the dtype of the activations, give
 * columns of y (NT) or parts of the sum (NN). */
static void by_panels(Layout layout, Tensor y, Write write, Tensor a, Tensor b, float alpha) {
    int64_t rows = tensor_rows(b), cols = tensor_cols(b), M = tensor_rows(y), N = tensor_cols(y);
    int64_t each = PANEL / cols / 64 * 64;
    if (each < 64) each = 64;
    if (each > rows) each = rows;
    size_t a_size = dtype_size(a.dtype), y_size = dtype_size(y.dtype);
    Tensor panel = b;
    panel.dtype = a.dtype;
    panel.origin = 0;
    panel.data = cuda_workspace(a.device, (size_t)(each * cols) * a_size);
    b.ndim = panel.ndim = 2;
    b.shape[0] = rows;
    b.shape[1] = panel.shape[1] = cols;
    for (int64_t first = 0; first < rows; first += each) {
        int64_t n = rows - first < each ? rows - first : each;
        panel.shape[0] = n;
        scale_copy(panel, SET, tensor_slice(b, first, n), 1.0f);
        if (layout == NT)
            blaslt_matmul(a.device, NT, (char *)y.data + (size_t)first * y_size, y.dtype, N, write,
                          a.data, tensor_cols(a), panel.data, a.dtype, M, n, cols, alpha);
        else
            blaslt_matmul(a.device, NN, y.data, y.dtype, N, first ? ADD : write,
                          (char *)a.data + (size_t)first * a_size, rows, panel.data, a.dtype, M, N,
                          n, alpha);
    }
}

/* ---- f32 among bf16 ---- */

/* A float is taken apart into two bf16 numbers: 17 bits of it, where what it meets has eight. */
#define PIECES 2

/* Up to MATRICES_MOST matrices that make one of (rows, cols): beside each other, matrix i up to
 * column ends[i], or below each other, up to row ends[i]. The pieces lie likewise: those of a row
 * beside each other, or one whole below the other. */
template <typename T> struct Stack {
    T *parts[MATRICES_MOST];
    int64_t ends[MATRICES_MOST], rows, cols;
    bool beside;
};

template <typename T> static Stack<T> stack_of(const Tensor *t, int count, bool beside) {
    Stack<T> s = {};
    s.beside = beside;
    for (int i = 0; i < count; i++) {
        s.parts[i] = data_of<T>(t[i]);
        s.rows = (beside ? 0 : s.rows) + tensor_rows(t[i]);
        s.cols = (beside ? s.cols : 0) + tensor_cols(t[i]);
        s.ends[i] = beside ? s.cols : s.rows;
    }
    return s;
}

/* An element of the whole, in its own matrix. */
template <typename T> DEVICE_FUNCTION T *element_of(const Stack<T> &s, const RowPack &p) {
    int64_t begin = 0, end = s.ends[0], at = s.beside ? p.at : p.row;
    T *part = s.parts[0];
#pragma unroll
    for (int k = 1; k < MATRICES_MOST; k++)
        if (at >= end && s.ends[k]) begin = end, end = s.ends[k], part = s.parts[k];
    return s.beside ? part + p.row * (end - begin) + p.at - begin
                    : part + (p.row - begin) * s.cols + p.at;
}

template <typename T>
DEVICE_FUNCTION int64_t piece_at(const Stack<T> &s, const RowPack &p, int piece) {
    int64_t row = s.beside ? p.row * PIECES + piece : piece * s.rows + p.row;
    return row * s.cols + p.at;
}

/* Stacks that one kernel takes apart or puts together: elements begin[k] on of all are those of
 * stack k, whose pieces lie from element places[k] on. */
#define STACKS_MOST (2 * MATRICES_MOST)
template <typename T> struct Stacks {
    Stack<T> of[STACKS_MOST];
    int64_t begin[STACKS_MOST + 1], places[STACKS_MOST];
    int count;
};

/* Sums of pieces become y (=|+=) alpha times them. */
template <typename Y> struct Sums {
    Stacks<Y> y;
    Write write[STACKS_MOST];
    float alpha[STACKS_MOST];
};

/* The new stack's pieces lie from `place` on; returns where the next ones may. */
template <typename T> static int64_t add_stack(Stacks<T> *all, Stack<T> s, int64_t place) {
    int k = all->count++;
    all->of[k] = s;
    all->places[k] = place;
    all->begin[k + 1] = all->begin[k] + s.rows * s.cols;
    return place + (s.rows * s.cols * PIECES + 127) / 128 * 128;
}

/* Which part element i of all is in, part k's from begin[k] on. */
template <typename I> DEVICE_FUNCTION int part_with(const I *begin, int64_t i) {
    int k = 0;
    while (i >= begin[k + 1]) k++;
    return k;
}

static __global__ void take_apart(bf16 *out, const __grid_constant__ Stacks<const float> all) {
    wait_for_last();
    FOR_GRID(i, all.begin[all.count]) {
        int k = part_with(all.begin, i);
        const Stack<const float> &x = all.of[k];
        RowPack own = row_pack(i - all.begin[k], x.cols);
        bf16 *to = out + all.places[k];
        float whole = *element_of(x, own);
        bf16 big = to_bf16(whole);
        to[piece_at(x, own, 0)] = big;
        to[piece_at(x, own, 1)] = to_bf16(whole - to_float(big));
    }
}

template <typename Y>
static __global__ void put_together(const __grid_constant__ Sums<Y> all, const float *x) {
    wait_for_last();
    FOR_GRID(i, all.y.begin[all.y.count]) {
        int k = part_with(all.y.begin, i);
        const Stack<Y> &y = all.y.of[k];
        RowPack own = row_pack(i - all.y.begin[k], y.cols);
        const float *from = x + all.y.places[k];
        float sum = from[piece_at(y, own, 1)] + from[piece_at(y, own, 0)];
        Y *to = element_of(y, own);
        *to = from_float<Y>((all.write[k] == ADD ? to_float(*to) : 0.0f) + all.alpha[k] * sum);
    }
}

/* A product, or several that share an operand (NT, TN), one side of which is f32. */
struct Pieced {
    Layout layout;
    const Tensor *y;
    Write write;
    const Tensor *a, *b;
    int count;
    float alpha;
    bool left() const { return a->dtype == F32; }
};

/* The pieces of what is f32 make so many times the rows or columns of y. */
template <typename Y> static void products_of_pieces(const Pieced *products, int count) {
    const Device *device = products->a->device;
    Stacks<const float> apart = {};
    Sums<Y> sums = {};
    int64_t pieces = 0, results = 0;
    for (int k = 0; k < count; k++) {
        const Pieced &p = products[k];
        bool left = p.left();
        pieces = add_stack(&apart,
                           stack_of<const float>(left ? p.a : p.b, p.count,
                                                 left ? p.layout == TN : p.layout != NT),
                           pieces);
        results = add_stack(&sums.y, stack_of<Y>(p.y, p.count, !left), results);
        sums.write[k] = p.write;
        sums.alpha[k] = p.alpha;
    }
    char *memory = (char *)cuda_workspace(device, (size_t)pieces * sizeof(bf16) +
                                                      (size_t)results * sizeof(float));
    bf16 *parts = (bf16 *)memory;
    float *made = (float *)(parts + pieces);
    LAUNCH_NEXT(device, (take_apart), grid_for(device, apart.begin[count], 256), 256, parts, apart);
    for (int k = 0; k < count; k++) {
        const Pieced &p = products[k];
        bf16 *own = parts + apart.places[k];
        int64_t K = p.layout == TN ? tensor_rows(*p.a) : tensor_cols(*p.a),
                M = sums.y.of[k].rows * (p.left() ? PIECES : 1),
                N = sums.y.of[k].cols * (p.left() ? 1 : PIECES);
        blaslt_matmul(device, p.layout, made + sums.y.places[k], F32, N, SET,
                      p.left() ? own : p.a->data, p.layout == TN ? M : K,
                      p.left() ? p.b->data : own, BF16, M, N, K, 1.0f);
    }
    LAUNCH_NEXT(device, (put_together<Y>), grid_for(device, sums.y.begin[count], 256), 256, sums,
                made);
}

static void product_of_pieces(Layout layout, const Tensor *y, Write write, const Tensor *a,
                              const Tensor *b, int count, float alpha) {
    Pieced product = {layout, y, write, a, b, count, alpha};
    WITH_FLOAT(y->dtype, Y, products_of_pieces<Y>(&product, 1));
}

/* Both are f32 and y is not: what adapters add to their linear, or several to their input (NN). */
static void product_rounded(Layout layout, Tensor y, Write write, const Tensor *a, const Tensor *b,
                            int count, float alpha) {
    int64_t M = tensor_rows(y), N = tensor_cols(y);
    dim3 grid((unsigned)ceil_div(N, NARROW_COLUMNS), (unsigned)ceil_div(M, NARROW_ROWS));
    bool packs = N % 8 == 0 && (uintptr_t)y.data % 16 == 0;
    bf16 *to = data_of<bf16>(y);
    NarrowTerms terms = {};
    for (int i = 0; i < count; i++)
        terms.at[terms.count++] = {data_of<float>(a[i]), data_of<float>(b[i]),
                                   layout == TN ? tensor_rows(a[i]) : tensor_cols(a[i])};
    if (layout == NT)
        LAUNCH(y.device, (gemm_narrow<false, false>), grid, NARROW_THREADS, 0, to, write, terms, M,
               N, alpha, packs);
    else if (layout == NN)
        LAUNCH(y.device, (gemm_narrow<false, true>), grid, NARROW_THREADS, 0, to, write, terms, M,
               N, alpha, packs);
    else
        LAUNCH(y.device, (gemm_narrow<true, true>), grid, NARROW_THREADS, 0, to, write, terms, M, N,
               alpha, packs);
}

/* ---- with adapters' terms ---- */

/* One side of a term as bf16: K of three times its rank, for what is big of both, and small of
 * either, and up to a multiple of 8, `own`, zeros. out: `own` of a row's `stride`, or, TURNED,
 * lines of `rows`; x: u or v. */
struct TermSide {
    bf16 *out;
    const float *x;
    int rows, stride, rank, own;
    bool turned, right;
    float scale;
};

/* Those that are made at once: eights of elements begin[k] on of all are those of side k. */
struct TermSides {
    TermSide of[2 * MATRICES_MOST];
    int begin[2 * MATRICES_MOST + 1], count;
    void add(const TermSide &side) {
        of[count] = side;
        begin[count + 1] = begin[count] + side.rows * (side.own / 8);
        count++;
    }
};

/* Eight elements that lie side by side, number `i` of those: along K, or, turned, along rows. */
DEVICE_FUNCTION void spread_eight(const TermSide &side, int i) {
    int across = (side.turned ? side.rows : side.own) / 8, line = i / across, at = i % across * 8;
    float out[8];
#pragma unroll
    for (int j = 0; j < 8; j++) {
        int row = side.turned ? at + j : line, k = side.turned ? line : at + j;
        int part = (k >= side.rank) + (k >= 2 * side.rank), r = k - part * side.rank;
        float x = 0;
        if (r < side.rank) {
            x = side.scale * side.x[side.turned ? r * side.rows + row : row * side.rank + r];
            if (part == (side.right ? 2 : 1)) x -= rounded<bf16>(x);
        }
        out[j] = x;
    }
    store(side.out + (int64_t)line * (side.turned ? side.rows : side.stride) + at, out);
}

static __global__ void spread_terms(const __grid_constant__ TermSides all) {
    wait_for_last();
    FOR_GRID(i, all.begin[all.count]) {
        int k = part_with(all.begin, i);
        spread_eight(all.of[k], (int)i - all.begin[k]);
    }
}

/* What a term takes of K. */
static int64_t spread_of(const Term &term) {
    return (3 * tensor_cols(term.u) + 7) / 8 * 8;
}

/* Whether one kernel has these products and their terms. */
static bool takes_terms(Tensor y, Write write, const Tensor *a, const Tensor *b, const Term *terms,
                        int count) {
    bool any = false, fits = y.dtype == BF16 && is_aligned(y) && cuda_has_wgmma(y.device) &&
                             pairs_blocks(y.device, write, tensor_rows(y), tensor_cols(y));
    for (int i = 0; i < count; i++) {
        any = any || has_term(terms, i);
        fits = fits && a[i].dtype == BF16 && b[i].dtype == BF16 && is_aligned(a[i]) &&
               is_aligned(b[i]);
    }
    return any && fits;
}

template <bool TB>
static void products_with_terms(Tensor y, Write write, const Tensor *a, const Tensor *b,
                                const Term *terms, int count) {
    const Device *device = y.device;
    int64_t M = tensor_rows(y), N = tensor_cols(y), more = 0, at = 0;
    PairMaps maps = {};
    for (int i = 0; i < count; i++) {
        add_factor<TB>(&maps, i, a[i].data, b[i].data, 1, M, N, tensor_cols(a[i]));
        if (has_term(terms, i)) more += spread_of(terms[i]);
    }
    bf16 *left = (bf16 *)cuda_workspace(device, (size_t)((M + N) * more) * sizeof(bf16)),
         *right = left + M * more;
    TermSides sides = {};
    for (int i = 0; i < count; i++) {
        if (!has_term(terms, i)) continue;
        const Term &term = terms[i];
        int rank = (int)tensor_cols(term.u), own = (int)spread_of(term);
        sides.add({left + at, data_of<float>(term.u), (int)M, (int)more, rank, own, false, false,
                   term.scale});
        sides.add({right + at * (TB ? N : 1), data_of<float>(term.v), (int)N, (int)more, rank, own,
                   TB, true, 1.0f});
        at += own;
    }
    LAUNCH_NEXT(device, (spread_terms), grid_for(device, sides.begin[sides.count], 256), 256,
                sides);
    add_factor<TB>(&maps, count, left, right, 1, M, N, more);
    if (pairs_blocks(device, write, M, N) == 3)
        launch_gemm_pairs<TB, 3, bf16>(y, write, maps, Groups{}, 1.0f);
    else
        launch_gemm_pairs<TB, 2, bf16>(y, write, maps, Groups{}, 1.0f);
}

/* ---- which product is whose ---- */

static void dense_product(Layout layout, Tensor y, Write write, Tensor a, Tensor b, float alpha) {
    int64_t M = tensor_rows(y), N = tensor_cols(y),
            K = layout == TN ? tensor_rows(a) : tensor_cols(a);
    if (a.dtype != b.dtype)
        product_of_pieces(layout, &y, write, &a, &b, 1, alpha);
    else if (a.dtype == F32 && y.dtype != F32)
        product_rounded(layout, y, write, &a, &b, 1, alpha);
    else
        blaslt_matmul(a.device, layout, y.data, y.dtype, N, write, a.data, layout == TN ? M : K,
                      b.data, a.dtype, M, N, K, alpha);
}

extern "C" void cuda_matmul(Layout layout, Tensor y, Write write, Tensor a, Tensor b, float alpha) {
    if (layout == NT && takes_few_rows(a))
        WITH_FLOAT(y.dtype, Y, WITH_FLOAT(a.dtype, A, WITH_ANY(b.dtype, D, {
                                              launch_few_rows<D, Y, A>(&y, write, a, &b, 1, alpha);
                                          })));
    else if (!dtype_is_packed(b.dtype))
        dense_product(layout, y, write, a, b, alpha);
    else if (tensor_rows(y) <= ROWS_SMALL && a.dtype == BF16)
        product16<SmallTiles>(layout, y, write, a, b,
                              Shape{tensor_rows(y), tensor_cols(y), tensor_cols(a)}, Groups{},
                              alpha);
    else
        by_panels(layout, y, write, a, b, alpha);
}

/* The library's order of sums is its own, and fixed for a shape; unlike the host's, rows of zeros
 * may change bits. */
extern "C" void cuda_matmul_ordered_several(Layout layout, const Tensor *y, Write write,
                                            const Tensor *a, const Tensor *b, int count,
                                            float alpha) {
    if (layout != NN && (layout == NT ? b : a)->dtype == F32 &&
        (layout == NT ? a : b)->dtype == BF16)
        product_of_pieces(layout, y, write, a, b, count, alpha);
    else if (layout == NN && a->dtype == F32 && b->dtype == F32 && y->dtype == BF16)
        product_rounded(layout, *y, write, a, b, count, alpha);
    else
        for (int i = 0; i < count; i++)
            dense_product(layout, y[layout == NN ? 0 : i], write, a[layout == NT ? 0 : i],
                          b[layout == TN ? 0 : i], alpha);
}

extern "C" void cuda_adapters_backward(const AdapterBack *a, int count) {
    Pieced products[STACKS_MOST];
    int made = 0;
    bool pieces = true;
    for (int i = 0; i < count; i++) {
        products[made++] = {NN, &a[i].du, SET, &a[i].dy, &a[i].B, 1, a[i].scale};
        if (a[i].dB.data) products[made++] = {TN, &a[i].dB, ADD, &a[i].dy, &a[i].u, 1, a[i].scale};
        pieces = pieces && a[i].dy.dtype == BF16;
    }
    if (pieces) {
        products_of_pieces<float>(products, made);
        return;
    }
    for (int i = 0; i < made; i++) {
        const Pieced &p = products[i];
        dense_product(p.layout, *p.y, p.write, *p.a, *p.b, p.alpha);
    }
}

extern "C" void cuda_matmul_several(const Tensor *y, Tensor a, const Tensor *b, const Term *terms,
                                    int count) {
    bool alike = takes_few_rows(a);
    for (int i = 1; i < count; i++) alike = alike && b[i].dtype == b->dtype;
    if (alike)
        WITH_FLOAT(y->dtype, Y, WITH_FLOAT(a.dtype, A, WITH_ANY(b->dtype, D, {
                                               launch_few_rows<D, Y, A>(y, SET, a, b, count, 1.0f);
                                           })));
    for (int i = 0; i < count; i++) {
        const Term *term = has_term(terms, i) ? &terms[i] : NULL;
        if (!alike && takes_terms(y[i], SET, &a, &b[i], term, 1)) {
            products_with_terms<false>(y[i], SET, &a, &b[i], term, 1);
            continue;
        }
        if (!alike) cuda_matmul(NT, y[i], SET, a, b[i], 1.0f);
        if (term) dense_product(NT, y[i], ADD, term->u, term->v, term->scale);
    }
}

/* Terms that no product took are added at once. */
extern "C" void cuda_matmul_sum(Tensor y, Write write, const Tensor *a, const Tensor *b,
                                const Term *terms, int count) {
    Tensor u[MATRICES_MOST], v[MATRICES_MOST];
    float scale = 0;
    int left = 0;
    if (takes_terms(y, write, a, b, terms, count)) {
        products_with_terms<true>(y, write, a, b, terms, count);
        return;
    }
    for (int i = 0; i < count; i++) {
        cuda_matmul(NN, y, i ? ADD : write, a[i], b[i], 1.0f);
        if (!has_term(terms, i)) continue;
        u[left] = terms[i].u;
        v[left++] = terms[i].v;
        scale = terms[i].scale;
    }
    if (left) cuda_matmul_ordered_several(NN, &y, ADD, u, v, left, scale);
}

/* ---- groups ---- */

/* Whether groups have so few rows that small tiles take them, and packed weights are read as they
 * are. */
static bool are_few(const Shape &shape, const Groups &groups) {
    return shape.M < 32 * (int64_t)groups.count;
}

static void product_of_groups(Layout layout, Tensor y, Write write, Tensor a, Tensor b, Shape shape,
                              Groups groups, float alpha) {
    if (a.dtype != BF16 || b.dtype == F32)
        product32(layout, y, write, a, b, shape, groups, alpha);
    else if (layout != TN && are_few(shape, groups))
        product16<SmallTiles>(layout, y, write, a, b, shape, groups, alpha);
    else
        product16<LargeTiles>(layout, y, write, a, b, shape, groups, alpha);
}

/* Packed weights for many rows: those of some groups at a time are unpacked to the dtype of the
 * activations. */
static void groups_by_panels(Layout layout, Tensor y, Write write, Tensor a, Tensor b, Shape shape,
                             Groups groups, float alpha) {
    int64_t one = b.shape[1] * b.shape[2], each = GROUPS_PANEL / one;
    if (each < 1) each = 1;
    if (each > groups.count) each = groups.count;
    Tensor panel = b;
    panel.dtype = a.dtype;
    panel.origin = 0;
    panel.data = cuda_workspace(a.device, (size_t)(each * one) * dtype_size(a.dtype));
    for (int64_t first = 0; first < groups.count; first += each) {
        panel.shape[0] = groups.count - first < each ? groups.count - first : each;
        scale_copy(panel, SET, tensor_slice(b, first, panel.shape[0]), 1.0f);
        product_of_groups(layout, y, write, a, panel, shape,
                          Groups{groups.offsets + first, (int)panel.shape[0], NULL}, alpha);
    }
}

extern "C" void cuda_grouped_matmul(Layout layout, Tensor y, Write write, Tensor a, Tensor b,
                                    Tensor offsets, float alpha) {
    int groups = (int)tensor_count(offsets) - 1;
    Groups g = {data_of<int32_t>(offsets), groups, NULL};
    bool sums = layout == TN;
    Shape shape = {sums ? y.shape[1] : tensor_rows(a), tensor_cols(y),
                   sums ? tensor_rows(a) : tensor_cols(a)};
    if (!tensor_count(a)) return;
    if (dtype_is_packed(b.dtype) && (a.dtype == F32 || !are_few(shape, g)))
        groups_by_panels(layout, y, write, a, b, shape, g, alpha);
    else
        product_of_groups(layout, y, write, a, b, shape, g, alpha);
}
