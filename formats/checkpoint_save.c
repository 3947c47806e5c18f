/* checkpoint_save.c - a model as a checkpoint folder, dense or in the codes of compressed-tensors,
 * a few rows at a time. */
#include "formats/checkpoint.h"
#include "formats/companion.h"
#include "formats/file.h"
#include "formats/learned_scales.h"
#include "formats/shards.h"
#include "kernels/blocks.h"
#include "kernels/elementwise.h"
#include "kernels/quantize.h"
#include "model/merge.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

/* Elements of rows held at a time. */
#define BLOCK (1 << 20)

/* What of a parameter, or of one matrix of its experts, an item holds. */
typedef enum Piece { DENSE, SHAPE, CODES, SCALES } Piece;

typedef struct Item {
    const StoredTensor *stored; /* carried through; or */
    Param *p;                   /* rows first .. first + rows - 1 of this one */
    Piece piece;
    int64_t first, rows, cols;
    int64_t shape[4]; /* of the piece */
    char name[PARAM_NAME_MAX + 32];
} Item;

typedef struct Saving {
    const Checkpoint *source;
    Gemma *g;
    DType dtype;
    QuantScheme scheme;
    Item *items;
    int count, capacity;
    const Param *unpacked; /* whose blocks are in file order below */
    uint8_t *blocks;
    uint8_t *scales; /* of the module whose codes were just written: its scales come next */
} Saving;

/* ---- what goes into the folder ---- */

static Item *add_item(Saving *s, Param *p, Piece piece, const char *name) {
    if (s->count == s->capacity) {
        s->capacity = 2 * s->capacity + 1024;
        s->items = must_realloc(s->items, (size_t)s->capacity * sizeof *s->items);
    }
    Item *item = &s->items[s->count++];
    *item = (Item){.p = p, .piece = piece};
    CHECK(snprintf(item->name, sizeof item->name, "%s", name) < (int)sizeof item->name,
          "name too long: %s", name);
    return item;
}

static void add_dense(Saving *s, Param *p) {
    Item *item = add_item(s, p, DENSE, p->name);
    Tensor whole = p->value;
    if (p->groups) whole.shape[0] = p->groups;
    memcpy(item->shape, whole.shape, sizeof item->shape);
    item->cols = whole.ndim > 1 ? tensor_cols(whole) : tensor_count(whole);
    item->rows = item->cols ? tensor_count(whole) / item->cols : 0;
}

/* The piece of `rows` rows from `first` on: of the module `name`. */
static void add_piece(Saving *s, Param *p, Piece piece, const char *name, int64_t first,
                      int64_t rows) {
    bool int4 = s->scheme == SCHEME_INT4;
    const char *suffix = piece == SHAPE    ? "weight_shape"
                         : piece == SCALES ? "weight_scale"
                         : int4            ? "weight_packed"
                                           : "weight";
    char full[PARAM_NAME_MAX + 32];
    int64_t cols = tensor_cols(p->value);
    CHECK(snprintf(full, sizeof full, "%s.%s", name, suffix) < (int)sizeof full,
          "name too long: %s", name);
    Item *item = add_item(s, p, piece, full);
    item->first = first;
    item->rows = rows;
    item->cols = cols;
    item->shape[0] = piece == SHAPE ? 2 : rows;
    item->shape[1] = piece == SCALES ? cols / scheme_block(s->scheme, cols)
                     : int4          ? cols / 8
                                     : cols;
}

/* The shape of a module, or its codes and, right behind them, their scales. */
static void add_module(Saving *s, Param *p, bool shape, const char *name, int64_t first,
                       int64_t rows) {
    add_piece(s, p, shape ? SHAPE : CODES, name, first, rows);
    if (!shape) add_piece(s, p, SCALES, name, first, rows);
}

/* The modules of a matrix: itself, or of every expert its own. */
static void add_modules(Saving *s, Param *p, bool shape) {
    char name[PARAM_NAME_MAX + 32];
    size_t base = (size_t)(strrchr(p->name, '.') - p->name); /* leaves .weight or the fused name */
    if (p->value.ndim == 2) {
        snprintf(name, sizeof name, "%.*s", (int)base, p->name);
        add_module(s, p, shape, name, 0, p->value.shape[0]);
        return;
    }
    bool pairs = strstr(p->name, ".gate_up_proj") != NULL;
    int64_t out = p->value.shape[1], rows = pairs ? out / 2 : out;
    for (int64_t row = 0; row < p->value.shape[0] * out; row += rows) {
        const char *part = !pairs ? "down_proj" : row / rows % 2 ? "up_proj" : "gate_proj";
        snprintf(name, sizeof name, "%.*s.%d.%s", (int)base, p->name, (int)(row / out), part);
        add_module(s, p, shape, name, row, rows);
    }
}

static bool in_codes(const Saving *s, const Param *p) {
    FakeQuant fake = {.scheme = s->scheme};
    return s->scheme != SCHEME_NONE && gemma_owner(s->g, p) && param_takes_blocks(p) &&
           fake_quant_fits(&fake, tensor_cols(p->value));
}

/* Shapes, then codes with their scales, then what is dense: each is aligned so. K and V that no
 * layer uses go into dense folders only: no loader of the others wants them. */
static Status list_items(Saving *s) {
    enum { SHAPES, MODULES, REST };
    for (int pass = s->scheme == SCHEME_INT4 ? SHAPES : MODULES; pass <= REST; pass++)
        for (int i = 0; i < s->g->params.count; i++) {
            Param *p = s->g->params.items[i];
            if (p->adapter || in_codes(s, p) != (pass != REST)) continue;
            if (pass == REST)
                add_dense(s, p);
            else
                add_modules(s, p, pass == SHAPES);
        }
    for (int i = 0; i < s->source->count; i++) {
        const CheckpointTensor *t = &s->source->tensors[i];
        if (t->role == ROLE_TOWER && params_find(&s->g->params, t->stored->name)) continue;
        if (t->role == ROLE_TOWER && t->stored->parts)
            FAIL(ERR_FORMAT,
                 "%s: tensor '%s' of a tower is quantised and cannot go into another checkpoint",
                 t->stored->file, t->stored->name);
        bool dead = t->role == ROLE_DEAD && s->scheme == SCHEME_NONE && !t->stored->parts;
        if (dead || t->role == ROLE_TOWER)
            add_item(s, NULL, DENSE, t->stored->name)->stored = t->stored;
    }
    return OK;
}

static ShardItem describe(const Saving *s, const Item *item) {
    const Param *p = item->p;
    const StoredTensor *t = item->stored;
    if (t) return (ShardItem){item->name, t->dtype_text, t->ndim, t->shape, t->size, item};
    size_t count = (size_t)(item->rows * item->shape[1]); /* of codes or scales */
    switch (item->piece) {
    case SHAPE:
        return (ShardItem){item->name, "I64", 1, item->shape, 16, item};
    case CODES:
        if (s->scheme == SCHEME_INT4)
            return (ShardItem){item->name, "I32", 2, item->shape, count * 4, item};
        return (ShardItem){item->name, "I8", 2, item->shape, count, item};
    case SCALES:
        return (ShardItem){item->name, "BF16", 2, item->shape, count * 2, item};
    default:
        return (ShardItem){item->name,
                           dtype_text(s->dtype),
                           p->value.ndim,
                           item->shape,
                           (size_t)(item->rows * item->cols) * dtype_size(s->dtype),
                           item};
    }
}

/* ---- blocks of the scheme ---- */

/* Whether the scales of a row of blocks can be written: bf16, and one a row where the scheme says
 * so. */
static bool row_passes(const Saving *s, const uint8_t *blocks, int64_t cols) {
    DTypeBlock block = dtype_block(scheme_dtype(s->scheme));
    for (int64_t b = 0; b < cols / 32; b++) {
        uint16_t d, first;
        memcpy(&d, blocks + (size_t)b * block.bytes, 2);
        memcpy(&first, blocks, 2);
        float scale = f16_to_f32(d);
        if (bf16_to_f32(f32_to_bf16(scale)) != scale) return false;
        if (s->scheme == SCHEME_INT8 && d != first) return false;
    }
    return true;
}

/* Blocks that the source has already, in file order and kept until the next parameter. */
static Status unpack(Saving *s, const Param *p) {
    if (s->unpacked == p) return OK;
    Tensor to = p->value;
    to.dtype = dtype_untiled(to.dtype);
    s->blocks = must_realloc(s->blocks, tensor_bytes(to));
    to.data = s->blocks;
    repack(to, p->value);
    s->unpacked = p;
    size_t row = tensor_bytes(to) / (size_t)tensor_rows(to);
    for (int64_t r = 0; r < tensor_rows(to); r++)
        if (!row_passes(s, s->blocks + (size_t)r * row, tensor_cols(to)))
            FAIL(ERR_FORMAT,
                 "%s: tensor '%s' is in %s blocks, whose scales this format cannot hold; export it "
                 "to a GGUF",
                 s->source->dir, p->name, dtype_name(to.dtype));
    return OK;
}

/* `n` rows of a parameter from `row` on as blocks: as they are, or merged and rounded. */
static Status make_blocks(Saving *s, const Param *p, int64_t row, int64_t n, float *values,
                          void *blocks) {
    int64_t cols = tensor_cols(p->value);
    const Linear *l = gemma_owner(s->g, p);
    Tensor to = TENSOR(blocks, scheme_dtype(s->scheme), n, cols),
           from = TENSOR(values, F32, n, cols);
    if (!l->lora && !p->trainable && scheme_holds(s->scheme, p->value.dtype)) {
        TRY(unpack(s, p));
        size_t bytes = tensor_bytes(to) / (size_t)n;
        memcpy(blocks, s->blocks + (size_t)row * bytes, (size_t)n * bytes);
        return OK;
    }
    bool finite = true;
    merged_rows(s->g, p, row, n, values);
    check_finite(&finite, from);
    if (!finite)
        FAIL(
            ERR_FORMAT,
            "%s: tensor '%s' holds infinities, NaN or numbers no scale reaches; nothing is written",
            s->source->dir, p->name);
    quantize_scheme(to, from, tensor_absent(), s->scheme);
    return OK;
}

/* The codes of one block as the format has them: 4 bits plus 8, lowest first, or int8. */
static size_t put_codes(uint8_t *out, const uint8_t *block, QuantScheme scheme) {
    if (scheme == SCHEME_INT8) {
        memcpy(out, ((const BlockQ8_0 *)(const void *)block)->qs, 32);
        return 32;
    }
    const uint8_t *qs = block + 2;
    for (int j = 0; j < 8; j++) {
        out[j] = (uint8_t)((qs[2 * j] & 15) | (qs[2 * j + 1] & 15) << 4);
        out[8 + j] = (uint8_t)(qs[2 * j] >> 4 | (qs[2 * j + 1] & 0xf0));
    }
    return 16;
}

static size_t put_scale(uint8_t *out, const uint8_t *block) {
    uint16_t d;
    memcpy(&d, block, 2);
    d = f32_to_bf16(f16_to_f32(d));
    memcpy(out, &d, 2);
    return 2;
}

/* ---- writing ---- */

static int64_t rows_at_once(int64_t cols) {
    return cols > BLOCK ? 1 : BLOCK / (cols ? cols : 1) + 1;
}

/* The codes of a module; its scales are kept. */
static Status write_codes(Saving *s, SafetensorsWriter *w, const Item *item) {
    int64_t block = rows_at_once(item->cols), wide = item->cols / 32;
    int64_t each = scheme_block(s->scheme, item->cols) / 32; /* blocks that share a scale */
    size_t bytes = dtype_block(scheme_dtype(s->scheme)).bytes, scales = 0;
    s->scales = must_realloc(s->scales, (size_t)(item->rows * wide / each) * 2);
    float *values = must_malloc((size_t)(block * item->cols) * sizeof *values);
    uint8_t *blocks = must_malloc((size_t)(block * wide) * bytes),
            *out = must_malloc((size_t)(block * item->cols));
    Status status = OK;
    for (int64_t row = 0; row < item->rows; row += block) {
        int64_t n = item->rows - row < block ? item->rows - row : block;
        size_t size = 0;
        TRY_DONE(make_blocks(s, item->p, item->first + row, n, values, blocks));
        for (int64_t b = 0; b < n * wide; b++) {
            const uint8_t *from = blocks + (size_t)b * bytes;
            size += put_codes(out + size, from, s->scheme);
            if (b % each == 0) scales += put_scale(s->scales + scales, from);
        }
        TRY_DONE(safetensors_write(w, out, size));
    }
done:
    free(values);
    free(blocks);
    free(out);
    return status;
}

static Status write_dense(Saving *s, SafetensorsWriter *w, const Item *item) {
    int64_t cols = item->cols, block = rows_at_once(cols);
    float *values = must_malloc((size_t)(block * cols) * sizeof *values);
    uint16_t *halves = must_malloc((size_t)(block * cols) * sizeof *halves);
    Status status = OK;
    for (int64_t first = 0; first < item->rows && status == OK; first += block) {
        int64_t n = item->rows - first < block ? item->rows - first : block;
        bool half = s->dtype == BF16;
        merged_rows(s->g, item->p, first, n, values);
        if (half)
            scale_copy(TENSOR(halves, BF16, n * cols), SET, TENSOR(values, F32, n * cols), 1.0f);
        status = safetensors_write(w, half ? (void *)halves : (void *)values,
                                   (size_t)(n * cols) * dtype_size(s->dtype));
    }
    free(values);
    free(halves);
    return status;
}

static Status write_item(SafetensorsWriter *w, const ShardItem *shard, void *context) {
    Saving *s = context;
    const Item *item = shard->what;
    Status status;
    if (item->stored) {
        TRY(safetensors_write(w, item->stored->bytes, item->stored->size));
        stored_tensor_release(item->stored);
        return OK;
    }
    if (item->piece == SHAPE) {
        int64_t shape[] = {item->rows, item->cols};
        return safetensors_write(w, shape, sizeof shape);
    }
    if (item->piece == SCALES) return safetensors_write(w, s->scales, shard->size);
    TRY(param_fetch(&s->g->params, item->p));
    status = item->piece == DENSE ? write_dense(s, w, item) : write_codes(s, w, item);
    param_release(item->p);
    checkpoint_release(s->source, item->p);
    return status;
}

/* ---- config.json ---- */

/* What compressed-tensors reads to know which modules are in codes. */
static json_t *quantization(const Saving *s) {
    bool int4 = s->scheme == SCHEME_INT4;
    json_t *ignore = json_pack("[s, s, s, s]", "lm_head", "re:.*router.*",
                               "re:.*(vision|audio)_tower.*", "re:.*embed_(vision|audio).*");
    for (const Linear *l = s->g->linears.first; l; l = l->next)
        if (param_takes_blocks(l->weight) && !in_codes(s, l->weight))
            json_array_append_new(ignore, json_string(l->name));
    json_t *weights =
        json_pack("{s:i, s:s, s:b, s:b, s:s, s:o}", "num_bits", int4 ? 4 : 8, "type", "int",
                  "symmetric", 1, "dynamic", 0, "strategy", int4 ? "group" : "channel",
                  "group_size", int4 ? json_integer(32) : json_null());
    json_t *activations = int4
                              ? json_null()
                              : json_pack("{s:i, s:s, s:b, s:b, s:s}", "num_bits", 8, "type", "int",
                                          "symmetric", 1, "dynamic", 1, "strategy", "token");
    return json_pack("{s:s, s:s, s:s, s:{s:{s:[s], s:o, s:o, s:n}}, s:o, s:n}", "quant_method",
                     "compressed-tensors", "format", int4 ? "pack-quantized" : "int-quantized",
                     "quantization_status", "compressed", "config_groups", "group_0", "targets",
                     "Linear", "weights", weights, "input_activations", activations,
                     "output_activations", "ignore", ignore, "kv_cache_scheme");
}

/* config.json as it was, but for what is said of the weights now beside it. */
static Status write_config(const Saving *s, const char *dir) {
    char *to = path_join(dir, "config.json"), *bytes = NULL;
    size_t size;
    json_t *root = NULL;
    Status status = OK;
    const char *name = s->dtype == BF16 ? "bfloat16" : "float32";
    TRY_DONE(companion_read(&bytes, &size, s->source->dir, "config.json"));
    root = json_loadb(bytes, size, 0, NULL);
    bool changed = s->scheme != SCHEME_NONE;
    json_t *maps[] = {root, json_object_get(root, "text_config")};
    for (int i = 0; i < 2; i++) {
        const char *old = json_string_value(json_object_get(maps[i], "dtype"));
        changed |= maps[i] && !json_object_del(maps[i], "quantization_config");
        if (!maps[i] || (old && !strcmp(old, name)) || (!old && i)) continue;
        json_object_set_new(maps[i], "dtype", json_string(name));
        changed = true;
    }
    if (s->scheme != SCHEME_NONE) json_object_set_new(root, "quantization_config", quantization(s));
    if (changed) {
        free(bytes);
        bytes = json_dumps(root, JSON_INDENT(2) | JSON_REAL_PRECISION(15));
        size = strlen(bytes);
    }
    TRY_DONE(file_write(to, bytes, size));
done:
    json_decref(root);
    free(bytes);
    free(to);
    return status;
}

Status checkpoint_save_along(const Checkpoint *source, Gemma *g) {
    Saving s = {.source = source, .g = g, .dtype = g->dtype, .scheme = SCHEME_NONE};
    Status status = list_items(&s);
    for (int i = 0; i < s.count && status == OK; i++) {
        if (!s.items[i].p) continue;
        status = param_fetch(&g->params, s.items[i].p);
        param_release(s.items[i].p);
    }
    free(s.items);
    return status;
}

Status checkpoint_save(const Checkpoint *source, Gemma *g, DType dtype, QuantScheme scheme,
                       const char *dir) {
    Saving s = {.source = source, .g = g, .dtype = dtype, .scheme = scheme};
    char *temporary = NULL;
    ShardItem *shards = NULL;
    Status status = OK;
    TRY_DONE(list_items(&s));
    shards = must_calloc((size_t)s.count + 1, sizeof *shards);
    for (int i = 0; i < s.count; i++) shards[i] = describe(&s, &s.items[i]);
    TRY_DONE(folder_begin(&temporary, dir));
    TRY_DONE(write_config(&s, temporary));
    TRY_DONE(companions_copy(source->dir, temporary));
    TRY_DONE(shards_write(temporary, shards, s.count, write_item, &s));
    if (scheme == SCHEME_NONE) TRY_DONE(learned_scales_save(g, temporary));
    status = folder_commit(temporary, dir);
    temporary = NULL;
done:
    folder_abandon(temporary);
    free(shards);
    free(s.items);
    free(s.blocks);
    free(s.scales);
    return status;
}
