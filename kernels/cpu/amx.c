/* amx.c - products of bf16 by tiles.
 *
 * Both operands are put into tiles first, one (the activations) once for all, the other by each
 * thread for its panel of y: that way memory is read in long pieces, and whatever its layout, tiles
 * come straight out of the caches.
 *
 * Of a panel, RUN terms at a time meet all rows of a block: one operand's pair stays in the first
 * cache while those of the other come by, and the sums wait in the second. Where b is stored line
 * by line (NT) its lines are the rows of the tiles, which so are copied, not turned; the sums come
 * out turned and are turned back when they are stored. */
#include "kernels/cpu/amx_tiles.h"
#include "kernels/cpu/scratch.h"

#define FETCHED      4          /* lines of tiles a step */
#define RUN          256        /* terms that a sum takes in at a time */
#define BLOCK_ROWS   512        /* of y, against one panel */
#define PASS_ROWS    1024       /* of y, put into tiles at a time */
#define PASS_COUNT   (16 << 20) /* and elements of a */
#define PANEL_COLS   256        /* of y, at most */
#define CHUNK_ALONG  1536       /* terms of a panel that are in tiles at a time, b line by line */
#define CHUNK_ACROSS 1024       /* and term by term */

/* sums (32, 32), four tiles, = what they were if `add` + a pair of rows times a pair of columns.
 * Not inline: narrow products would take 5 % longer. */
static __attribute__((noinline)) void multiply(float *sums, bool add, const uint16_t *rows,
                                               const uint16_t *columns, int64_t steps,
                                               const uint16_t *next) {
    multiply_pair((Sums){sums, 16, 256, 512}, add, rows_in_tiles(rows), columns, steps, FETCHED,
                  next);
}

/* 32 columns of one row from two registers. */
static inline void store_row(Tensor y, Write write, int64_t first, int64_t count, __m512 low,
                             __m512 high) {
    __mmask32 mask = mask_of(count);
    if (y.dtype == F32) {
        float *to = (float *)y.data + first;
        __mmask16 lower = (__mmask16)mask, upper = (__mmask16)(mask >> LANES);
        if (write == ADD) {
            low = _mm512_add_ps(low, _mm512_maskz_loadu_ps(lower, to));
            high = _mm512_add_ps(high, _mm512_maskz_loadu_ps(upper, to + LANES));
        }
        _mm512_mask_storeu_ps(to, lower, low);
        _mm512_mask_storeu_ps(to + LANES, upper, high);
        return;
    }
    uint16_t *to = (uint16_t *)y.data + first;
    if (write == ADD) {
        __m512i old = _mm512_maskz_loadu_epi16(mask, to);
        low = _mm512_add_ps(low, _mm512_cvtpbh_ps((__m256bh)_mm512_castsi512_si256(old)));
        high = _mm512_add_ps(high, _mm512_cvtpbh_ps((__m256bh)_mm512_extracti64x4_epi64(old, 1)));
    }
    _mm512_mask_storeu_epi16(to, mask, (__m512i)_mm512_cvtne2ps_pbh(high, low));
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
    Tensor y, packed; /* packed: b's weights, where they are that */
    Write write;
    Side a, b, more_a, more_b;  /* more: terms that follow those of a and b */
    int64_t first, pairs;       /* of rows */
    int64_t term, steps, extra; /* extra: steps of what follows */
    uint16_t *tiles; /* of a: runs of all pairs, one behind the other, and what follows */
    float *sums;     /* of all panels, where K takes several passes */
    int64_t width;   /* pairs of columns of a panel */
} Pass;

/* Pairs of columns `column` .. of b into tiles, of packed weights by way of dense ones. */
static void pack_panel(uint16_t *to, uint16_t *dense, const Pass *pass, int64_t column,
                       int64_t pairs, int64_t term, int64_t steps) {
    Side side = pass->b;
    bool along = side.along;
    if (pass->packed.data) {
        int64_t lines = lesser(PAIR * pairs, side.lines - column),
                terms = lesser(STEP * steps, side.terms - term);
        Tensor panel = TENSOR(dense, BF16, along ? lines : terms, along ? terms : lines);
        CPU(unpack)(panel, pass->packed, along ? column : term, along ? term : column);
        side = side_of(panel, along);
        column = term = 0;
    }
    pack(to, &side, column, pairs, term, steps, along);
}

/* sums (width, height) pairs (=|+=) `length` steps of columns and rows, whose tiles are so many
 * steps apart. Meanwhile what comes next is fetched. */
static void multiply_pairs(const Pass *pass, float *sums, bool add, const uint16_t *columns,
                           int64_t columns_apart, int64_t width, const uint16_t *rows,
                           int64_t rows_apart, int64_t height, int64_t length,
                           const uint16_t *next) {
    for (int64_t i = 0; i < width * height; i++) {
        const uint16_t *column = columns + i / height * columns_apart * PAIR_STEP,
                       *row = rows + i % height * rows_apart * PAIR_STEP;
        multiply(sums + i * PAIR_SUMS, add, pass->b.along ? column : row,
                 pass->b.along ? row : column, length, next + i * length * FETCHED * 32);
    }
}

/* Panel `panel` of y for the block of rows `block` of the pass. */
static void panel_product(const Pass *pass, int64_t block, int64_t panel) {
    int64_t K = pass->a.terms, chunk = (pass->b.along ? CHUNK_ALONG : CHUNK_ACROSS) / STEP,
            run = RUN / STEP;
    int64_t column = panel * pass->width, columns = pairs_of(tensor_cols(pass->y));
    int64_t width = lesser(pass->width, columns - column);
    int64_t row = block * (BLOCK_ROWS / PAIR),
            height = lesser(BLOCK_ROWS / PAIR, pass->pairs - row);
    size_t kept = (size_t)(width * height * PAIR_SUMS), held = (size_t)(width * chunk * PAIR_STEP);
    float *memory = thread_scratch(kept + held);
    uint16_t *tiles = (uint16_t *)(memory + kept), *dense = tiles + held;
    float *sums =
        pass->sums ? pass->sums + (column * pass->pairs + row * width) * PAIR_SUMS : memory;
    for (int64_t c = 0; c < pass->steps; c += chunk) {
        int64_t steps = lesser(chunk, pass->steps - c);
        pack_panel(tiles, dense, pass, column * PAIR, width, pass->term + c * STEP, steps);
        for (int64_t s = 0; s < steps; s += run) {
            int64_t length = lesser(run, steps - s),
                    after = (c + s + run) % pass->steps / run * run;
            multiply_pairs(pass, sums, pass->term || c || s, tiles + s * PAIR_STEP, steps, width,
                           pass->tiles + ((c + s) * pass->pairs + row * length) * PAIR_STEP, length,
                           height, length,
                           pass->tiles + (after * pass->pairs + row * run) * PAIR_STEP);
        }
    }
    if (pass->term + pass->steps * STEP < K) return;
    const uint16_t *more =
        pass->tiles + (pass->steps * pass->pairs + row * pass->extra) * PAIR_STEP;
    for (int64_t c = 0; c < pass->extra; c += chunk) {
        int64_t steps = lesser(chunk, pass->extra - c);
        pack(tiles, &pass->more_b, column * PAIR, width, c * STEP, steps, pass->b.along);
        multiply_pairs(pass, sums, K || c, tiles, steps, width, more + c * PAIR_STEP, pass->extra,
                       height, steps, more);
    }
    for (int64_t r = 0; r < height; r++)
        for (int64_t w = 0; w < width; w++)
            store_pair(pass->y, pass->write, pass->first + (row + r) * PAIR, (column + w) * PAIR,
                       sums + (w * height + r) * PAIR_SUMS, pass->b.along);
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
        _tile_loadconfig(&bf16_tiles);
#pragma omp for schedule(static) collapse(2)
        for (int64_t p = 0; p < pass->pairs; p++)
            for (int64_t r = 0; r < runs; r++) {
                int64_t s = r * run, length = lesser(run, pass->steps - s);
                pack(pass->tiles + (s * pass->pairs + p * length) * PAIR_STEP, &pass->a,
                     pass->first + p * PAIR, 1, pass->term + s * STEP, length, !pass->b.along);
            }
#pragma omp for schedule(static)
        for (int64_t p = 0; p < pass->pairs; p++)
            pack(pass->tiles + (pass->steps * pass->pairs + p * pass->extra) * PAIR_STEP,
                 &pass->more_a, pass->first + p * PAIR, 1, 0, pass->extra, !pass->b.along);
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t panel = 0; panel < panels; panel++)
            for (int64_t block = 0; block < blocks; block++) panel_product(pass, block, panel);
        _tile_release();
    }
}

/* Floats that end where 64 bytes do. */
static int64_t aligned(int64_t floats) {
    return (floats + LANES - 1) / LANES * LANES;
}

/* Rows and terms of a pass, and the floats of its tiles and sums. */
typedef struct Room {
    int64_t rows, terms;
    size_t tiles, sums;
} Room;

static Room room_of(const Pass *p) {
    int64_t columns = pairs_of(tensor_cols(p->y)), steps = steps_of(p->a.terms);
    Room r = {.rows = lesser(PASS_ROWS, pairs_of(tensor_rows(p->y)) * PAIR)};
    r.terms = lesser(PASS_COUNT / r.rows / RUN * RUN, steps * STEP);
    r.tiles = (size_t)(r.rows * (r.terms + p->extra * STEP) / 2);
    r.sums = r.terms < p->a.terms ? (size_t)(r.rows * columns * PAIR) : 0;
    return r;
}

static void run_product(Pass *pass, const Room *room, float *memory) {
    int64_t M = tensor_rows(pass->y), K = pass->a.terms;
    pass->sums = room->sums ? memory : NULL;
    pass->tiles = (uint16_t *)(memory + room->sums);
    pass->width = panel_width(tensor_cols(pass->y), (M + BLOCK_ROWS - 1) / BLOCK_ROWS);
    for (pass->first = 0; pass->first < M; pass->first += room->rows) {
        pass->pairs = pairs_of(lesser(room->rows, M - pass->first));
        pass->term = 0;
        do {
            pass->steps = steps_of(lesser(room->terms, K - pass->term));
            run_pass(pass);
            pass->term += room->terms;
        } while (pass->term < K);
    }
}

/* ---- where f32 meets bf16 ---- */

/* What a part holds of a float: of three bf16 numbers that are it, the big, middle or small one. */
typedef enum Piece { BIG, MIDDLE, SMALL } Piece;

/* Rows of scale x in parts. A row's parts lie side by side, or all rows of a part after those of
 * the one before. order: which rows; NULL: so many from the first. */
static void take_apart(uint16_t *out, Tensor x, float scale, const Piece *parts, int count,
                       bool beside, const int32_t *order, int64_t rows) {
    int64_t cols = tensor_cols(x);
#pragma omp parallel for schedule(static) if (rows * cols > 4096)
    for (int64_t r = 0; r < rows; r++) {
        const float *from = (const float *)x.data + (order ? order[r] : r) * cols;
        for (int64_t c = 0; c < cols; c += LANES) {
            __mmask16 mask = (__mmask16)mask_of(lesser(LANES, cols - c));
            __m512 rest =
                _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, from + c), _mm512_set1_ps(scale));
            __m256bh pieces[3];
            for (int i = 0; i < 3; i++) {
                pieces[i] = _mm512_cvtneps_pbh(rest);
                rest = _mm512_sub_ps(rest, _mm512_cvtpbh_ps(pieces[i]));
            }
            for (int i = 0; i < count; i++)
                _mm256_mask_storeu_epi16(out + (beside ? r * count + i : i * rows + r) * cols + c,
                                         mask, (__m256i)pieces[parts[i]]);
        }
    }
}

/* The products of pieces that a sum which is rounded to bf16 needs. */
#define TERM_PARTS 3
static const Piece parts_of_u[TERM_PARTS] = {BIG, MIDDLE, BIG},
                   parts_of_v[TERM_PARTS] = {BIG, BIG, MIDDLE};

void CPU(amx_product)(Layout layout, Tensor y, Write write, Tensor a, Tensor b, const Term *term) {
    int64_t M = tensor_rows(y), N = tensor_cols(y), along = layout == NT;
    int64_t more = term ? TERM_PARTS * tensor_cols(term->u) : 0;
    Pass pass = {.y = y, .write = write, .extra = steps_of(more)};
    if (a.data) pass.a = side_of(a, layout != TN), pass.b = side_of(b, along);
    if (a.data && dtype_is_packed(b.dtype)) pass.packed = b;
    pass.b.along = along;
    Room room = room_of(&pass);
    float *memory = outer_scratch(room.sums + room.tiles + (size_t)((M + N) * more + 1) / 2);
    if (term) {
        uint16_t *u = (uint16_t *)(memory + room.sums + room.tiles), *v = u + M * more;
        take_apart(u, term->u, term->scale, parts_of_u, TERM_PARTS, true, NULL, M);
        take_apart(v, term->v, 1.0f, parts_of_v, TERM_PARTS, along, NULL, tensor_rows(term->v));
        pass.more_a = side_of(TENSOR(u, BF16, M, more), true);
        pass.more_b = side_of(TENSOR(v, BF16, along ? N : more, along ? more : N), along);
    }
    run_product(&pass, &room, memory);
}

/* order <- the rows of a and b that are zero in neither, then zeros up to `length`; how many. */
static int64_t rows_that_count(int32_t *order, int64_t length, Tensor a, Tensor b) {
    int64_t rows = tensor_rows(a), count = 0;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++)
        order[r] = row_is_zero(a, r) || row_is_zero(b, r) ? -1 : (int32_t)r;
    for (int64_t r = 0; r < rows; r++)
        if (order[r] >= 0) order[count++] = order[r];
    for (int64_t r = count; r < length; r++) order[r] = 0;
    return count;
}

/* y (=|+=) alpha (the sum of the thirds of sums (3 n, m)), `turned`: y is (m, n). */
static void join_parts(Tensor y, Write write, float *sums, int64_t n, int64_t m, bool turned,
                       float alpha) {
    enum { COLS = 64 };
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < m; first += COLS) {
        int64_t count = lesser(COLS, m - first);
        float lines[LANES * COLS], buffer[COLS];
        for (int64_t r = 0; r < n; r += LANES) {
            int64_t rows = lesser(LANES, n - r);
            float *big = sums + r * m + first;
            for (int64_t i = 0; i < rows; i++, big += m)
                for (int64_t c = 0; c < count; c++)
                    big[c] = alpha * (big[c] + (big[n * m + c] + big[2 * n * m + c]));
            big -= rows * m;
            if (turned) turn_around(lines, LANES, big, m, rows, count);
            for (int64_t i = 0; i < (turned ? count : rows); i++) {
                int64_t at = turned ? (first + i) * n + r : (r + i) * m + first,
                        length = turned ? rows : count;
                float *values = turned ? lines + i * LANES : big + i * m;
                const float *old = write == ADD ? load_f32(buffer, y, at, length) : NULL;
                for (int64_t c = 0; old && c < length; c++) values[c] += old[c];
                store_f32(y, at, length, values);
            }
        }
    }
}

void CPU(amx_mixed)(Layout layout, Tensor y, Write write, Tensor a, Tensor b, float alpha) {
    static const Piece all[] = {BIG, MIDDLE, SMALL};
    bool left = a.dtype == F32, along = left ? layout != TN : layout == NT;
    Tensor x = left ? a : b;
    int64_t n = left ? tensor_rows(y) : tensor_cols(y), m = tensor_count(y) / n;
    int64_t K = tensor_count(x) / n, count = K, listed = layout == TN ? aligned(K + 2 * STEP) : 0;
    Tensor sums = TENSOR(NULL, F32, 3 * n, m),
           parts = TENSOR(NULL, BF16, along ? 3 * n : K, along ? K : 3 * n);
    Pass pass = {.y = sums, .write = SET, .a = side_of(parts, along)};
    pass.b = side_of(left ? b : a, left ? layout == NT : layout != TN);
    Room room = room_of(&pass);
    int64_t sums_room = aligned(3 * n * m), parts_room = aligned((3 * n * K + 1) / 2);
    float *memory =
        outer_scratch((size_t)(sums_room + parts_room + listed) + room.sums + room.tiles);
    pass.y.data = sums.data = memory;
    pass.a.data = parts.data = memory + sums_room;
    int32_t *order = (int32_t *)(memory + sums_room + parts_room);
    if (listed) count = rows_that_count(order, listed, a, b);
    if (count) {
        pass.a.terms = pass.b.terms = count;
        pass.b.order = count < K ? order : NULL;
        take_apart(parts.data, x, 1.0f, all, 3, !along, pass.b.order, along ? n : count);
        run_product(&pass, &room, (float *)order + listed);
    } else {
        memset(sums.data, 0, tensor_bytes(sums));
    }
    join_parts(y, write, sums.data, n, m, !left, alpha);
}
