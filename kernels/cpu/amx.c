/* amx.c - products of bf16 by tiles.
 *
 * The instruction adds to a tile of 16 by 16 sums the product of a tile of 16 lines, 32 terms each,
 * with one of 16 pairs of terms, 16 lines each. Lines go two tiles at a time, a pair: four products
 * for four tiles read. Both operands are put into such tiles first, one (the activations) once for
 * all, the other by each thread for its panel of y: that way memory is read in long pieces, and
 * whatever its layout, tiles come straight out of the caches.
 *
 * Of a panel, RUN terms at a time meet all rows of a block: one operand's pair stays in the first
 * cache while those of the other come by, and the sums wait in the second. Where b is stored line
 * by line (NT) its lines are the rows of the tiles, which so are copied, not turned; the sums come
 * out turned and are turned back when they are stored. */
#include "kernels/cpu/amx.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cpu/tile.h"

#include <immintrin.h>

#define TILE         512 /* bf16 of a tile */
#define STEP         32  /* terms of a tile */
#define PAIR         32  /* lines of two tiles */
#define PAIR_STEP    (2 * TILE)
#define PAIR_SUMS    (PAIR * PAIR)
#define RUN          256        /* terms that a sum takes in at a time */
#define BLOCK_ROWS   512        /* of y, against one panel */
#define PASS_ROWS    1024       /* of y, put into tiles at a time */
#define PASS_COUNT   (16 << 20) /* and elements of a */
#define PANEL_COLS   256        /* of y, at most */
#define CHUNK_ALONG  1536       /* terms of a panel that are in tiles at a time, b line by line */
#define CHUNK_ACROSS 1024       /* and term by term */

/* An operand: `lines` rows or columns of the product, `terms` along K. */
typedef struct Side {
    const uint16_t *data;
    int64_t stride, lines, terms;
    bool along; /* stored line by line; else term by term */
} Side;

static int64_t lesser(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static int64_t pairs_of(int64_t lines) {
    return (lines + PAIR - 1) / PAIR;
}

static __mmask32 mask_of(int64_t count) {
    return count >= 32 ? ~(__mmask32)0 : count <= 0 ? 0 : ((__mmask32)1 << count) - 1;
}

static void turn_tile(uint16_t *tile) {
    turn_registers((float *)tile, LANES, (const float *)tile, LANES);
}

/* `pairs` pairs of lines from `line`, `steps` steps of terms from `term`, zeros beyond the operand:
 * pair p, step s at (p steps + s) PAIR_STEP. Tiles hold lines (rows) or pairs of terms. */
static void pack(uint16_t *to, const Side *side, int64_t line, int64_t pairs, int64_t term,
                 int64_t steps, bool rows) {
    if (side->along) {
        for (int64_t l = 0; l < PAIR * pairs; l++) {
            int64_t known = line + l < side->lines ? side->terms - term : 0;
            const uint16_t *from = side->data + (line + l) * side->stride + term;
            uint16_t *out =
                to + l / PAIR * steps * PAIR_STEP + l % PAIR / 16 * TILE + l % 16 * STEP;
            for (int64_t s = 0; s < steps; s++) {
                _mm_prefetch(from + 2 * side->stride + s * STEP, _MM_HINT_T1);
                _mm512_storeu_si512(
                    out + s * PAIR_STEP,
                    _mm512_maskz_loadu_epi16(mask_of(known - s * STEP), from + s * STEP));
            }
        }
    } else {
        const __m512i even = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9,
                                              40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33,
                                              1, 32, 0),
                      odd = _mm512_add_epi16(even, _mm512_set1_epi16(16));
        for (int64_t t = 0; t < STEP * steps; t += 2) {
            const uint16_t *from = side->data + (term + t) * side->stride + line;
            uint16_t *out = to + t / STEP * PAIR_STEP + t % STEP * 16;
            for (int64_t p = 0; p < pairs; p++) {
                __mmask32 mask = mask_of(side->lines - line - p * PAIR);
                _mm_prefetch(from + 8 * side->stride + p * PAIR, _MM_HINT_T0);
                _mm_prefetch(from + 9 * side->stride + p * PAIR, _MM_HINT_T0);
                __m512i a = _mm512_maskz_loadu_epi16(term + t < side->terms ? mask : 0,
                                                     from + p * PAIR),
                        b = _mm512_maskz_loadu_epi16(term + t + 1 < side->terms ? mask : 0,
                                                     from + side->stride + p * PAIR);
                uint16_t *at = out + p * steps * PAIR_STEP;
                _mm512_storeu_si512(at, _mm512_permutex2var_epi16(a, even, b));
                _mm512_storeu_si512(at + TILE, _mm512_permutex2var_epi16(a, odd, b));
            }
        }
    }
    if (side->along != rows)
        for (int64_t i = 0; i < 2 * pairs * steps; i++) turn_tile(to + i * TILE);
}

static const TileShapes shapes = {1, .bytes = {64, 64, 64, 64, 64, 64, 64, 64},
                                  .lines = {16, 16, 16, 16, 16, 16, 16, 16}};

/* sums (32, 32), four tiles, = what they were if `add` + a pair of rows times a pair of columns.
 * Meanwhile four lines a step of what comes next are fetched. */
static void multiply(float *sums, bool add, const uint16_t *rows, const uint16_t *columns,
                     int64_t steps, const uint16_t *next) {
    if (add) {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + 256, 64);
        _tile_loadd(2, sums + 512, 64);
        _tile_loadd(3, sums + 768, 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t s = 0; s < steps; s++) {
        _tile_loadd(4, rows, 64);
        _tile_loadd(6, columns, 64);
        _tile_loadd(7, columns + TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, rows + TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        for (int line = 0; line < 4; line++) _mm_prefetch(next + 32 * line, _MM_HINT_T1);
        rows += PAIR_STEP;
        columns += PAIR_STEP;
        next += 128;
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
}

/* 32 columns of one row from two registers. */
static inline void store_row(Tensor y, Write write, int64_t first, int64_t count, __m512 low,
                             __m512 high) {
    if (y.dtype == BF16 && write == SET) {
        _mm512_mask_storeu_epi16((uint16_t *)y.data + first, mask_of(count),
                                 (__m512i)_mm512_cvtne2ps_pbh(high, low));
        return;
    }
    float values[PAIR], buffer[PAIR];
    _mm512_storeu_ps(values, low);
    _mm512_storeu_ps(values + LANES, high);
    if (write == ADD) {
        const float *old = load_f32(buffer, y, first, lesser(count, PAIR));
        for (int64_t i = 0; i < lesser(count, PAIR); i++) values[i] += old[i];
    }
    store_f32(y, first, lesser(count, PAIR), values);
}

/* The sums of a pair of rows and a pair of columns of y, `turned` or not. */
static void store_pair(Tensor y, Write write, int64_t row, int64_t column, float *sums,
                       bool turned) {
    int64_t M = tensor_rows(y), N = tensor_cols(y);
    if (turned)
        for (int i = 0; i < 4; i++) turn_tile((uint16_t *)(sums + 256 * i));
    for (int64_t r = 0; r < PAIR && row + r < M; r++) {
        /* turned, the second tile is the next rows' and the third the next columns' */
        const float *low = sums + r / 16 * (turned ? 256 : 512) + r % 16 * LANES;
        store_row(y, write, (row + r) * N + column, N - column, _mm512_loadu_ps(low),
                  _mm512_loadu_ps(low + (turned ? 512 : 256)));
    }
}

/* What all threads share of a pass: rows `first` .. of y and terms `term` .. of K. */
typedef struct Pass {
    Tensor y, b;
    Side a;
    Layout layout;
    Write write;
    int64_t first, pairs;       /* of rows */
    int64_t term, steps, terms; /* terms: K */
    uint16_t *tiles;            /* of a: runs of all pairs, one behind the other */
    float *sums;                /* of all panels, where K takes several passes */
    int64_t width;              /* pairs of columns of a panel */
} Pass;

static bool b_along(const Pass *pass) {
    return pass->layout == NT;
}

/* Pairs of columns `column` .. of b into tiles, of packed weights by way of dense ones. */
static void pack_panel(uint16_t *to, uint16_t *dense, const Pass *pass, int64_t column,
                       int64_t pairs, int64_t term, int64_t steps) {
    bool along = b_along(pass);
    int64_t N = tensor_cols(pass->y), K = pass->terms;
    Side side = {pass->b.data, along ? K : N, N, K, along};
    if (dtype_is_packed(pass->b.dtype)) {
        int64_t lines = lesser(PAIR * pairs, N - column), terms = lesser(STEP * steps, K - term);
        Tensor panel = TENSOR(dense, BF16, along ? lines : terms, along ? terms : lines);
        CPU(unpack)(panel, pass->b, along ? column : term, along ? term : column);
        side = (Side){dense, along ? terms : lines, lines, terms, along};
        column = term = 0;
    }
    pack(to, &side, column, pairs, term, steps, along);
}

/* Panel `panel` of y for the block of rows `block` of the pass. */
static void panel_product(const Pass *pass, int64_t block, int64_t panel) {
    bool turned = b_along(pass), whole = pass->steps * STEP >= pass->terms;
    int64_t chunk = (turned ? CHUNK_ALONG : CHUNK_ACROSS) / STEP, run = RUN / STEP;
    int64_t column = panel * pass->width, columns = pairs_of(tensor_cols(pass->y));
    int64_t width = lesser(pass->width, columns - column);
    int64_t row = block * (BLOCK_ROWS / PAIR),
            height = lesser(BLOCK_ROWS / PAIR, pass->pairs - row);
    size_t kept = (size_t)(width * height * PAIR_SUMS), held = (size_t)(width * chunk * PAIR_STEP);
    float *memory = thread_scratch(kept + held);
    uint16_t *tiles = (uint16_t *)(memory + kept), *dense = tiles + held;
    float *sums = whole ? memory : pass->sums + (column * pass->pairs + row * width) * PAIR_SUMS;
    for (int64_t c = 0; c < pass->steps; c += chunk) {
        int64_t steps = lesser(chunk, pass->steps - c);
        pack_panel(tiles, dense, pass, column * PAIR, width, pass->term + c * STEP, steps);
        for (int64_t s = 0; s < steps; s += run) {
            int64_t length = lesser(run, steps - s),
                    after = (c + s + run) % pass->steps / run * run;
            const uint16_t *next = pass->tiles + (after * pass->pairs + row * run) * PAIR_STEP;
            for (int64_t i = 0; i < width * height; i++) {
                const uint16_t *other = tiles + (i / height * steps + s) * PAIR_STEP;
                const uint16_t *own =
                    pass->tiles + ((c + s) * pass->pairs + (row + i % height) * length) * PAIR_STEP;
                multiply(sums + i * PAIR_SUMS, pass->term || c || s, turned ? other : own,
                         turned ? own : other, length, next + i * length * 128);
            }
        }
    }
    if (pass->term + pass->steps * STEP < pass->terms) return;
    for (int64_t r = 0; r < height; r++)
        for (int64_t w = 0; w < width; w++)
            store_pair(pass->y, pass->write, pass->first + (row + r) * PAIR, (column + w) * PAIR,
                       sums + (w * height + r) * PAIR_SUMS, turned);
}

/* In pairs: narrow enough that every thread has some, but no narrower than packed weights unpack.
 */
static int64_t panel_width(int64_t N, int64_t blocks) {
    int64_t width = PANEL_COLS, threads = omp_get_max_threads();
    while (width > 2 * PAIR &&
           blocks * ((N + width - 1) / width) < (width > PANEL_COLS / 2 ? 2 * threads : threads))
        width /= 2;
    return width / PAIR;
}

static void run_pass(const Pass *pass) {
    int64_t blocks = (pass->pairs * PAIR + BLOCK_ROWS - 1) / BLOCK_ROWS;
    int64_t columns = pairs_of(tensor_cols(pass->y));
    int64_t panels = (columns + pass->width - 1) / pass->width;
    int64_t run = RUN / STEP, runs = (pass->steps + run - 1) / run;
#pragma omp parallel
    {
        _tile_loadconfig(&shapes);
#pragma omp for schedule(static) collapse(2)
        for (int64_t p = 0; p < pass->pairs; p++)
            for (int64_t r = 0; r < runs; r++) {
                int64_t s = r * run, length = lesser(run, pass->steps - s);
                pack(pass->tiles + (s * pass->pairs + p * length) * PAIR_STEP, &pass->a,
                     pass->first + p * PAIR, 1, pass->term + s * STEP, length, !b_along(pass));
            }
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t panel = 0; panel < panels; panel++)
            for (int64_t block = 0; block < blocks; block++) panel_product(pass, block, panel);
        _tile_release();
    }
}

void CPU(amx_product)(Layout layout, Tensor y, Write write, Tensor a, Tensor b) {
    int64_t M = tensor_rows(y), N = tensor_cols(y), K = tensor_count(a) / M;
    int64_t rows = lesser(PASS_ROWS, pairs_of(M) * PAIR), columns = pairs_of(N);
    int64_t terms = lesser(PASS_COUNT / rows / RUN * RUN, (K + STEP - 1) / STEP * STEP);
    size_t tiles = (size_t)(rows * terms / 2),
           sums = terms < K ? (size_t)(rows * columns * PAIR) : 0;
    Pass pass = {.y = y, .b = b, .layout = layout, .write = write, .terms = K};
    pass.a = (Side){a.data, layout == TN ? M : K, M, K, layout != TN};
    pass.sums = outer_scratch(sums + tiles);
    pass.tiles = (uint16_t *)(pass.sums + sums);
    pass.width = panel_width(N, (M + BLOCK_ROWS - 1) / BLOCK_ROWS);
    for (pass.first = 0; pass.first < M; pass.first += rows) {
        pass.pairs = pairs_of(lesser(rows, M - pass.first));
        for (pass.term = 0; pass.term < K; pass.term += terms) {
            pass.steps = (lesser(terms, K - pass.term) + STEP - 1) / STEP;
            run_pass(&pass);
        }
    }
}
