/* parts.c - codes and scales from where other programs put them, into blocks. */
#include "formats/parts.h"
#include "kernels/blocks.h"
#include "kernels/dynamic.h"

#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef enum Kind { PACKED, INT8, NF4_CODES, KINDS } Kind;

/* The pieces of one matrix; absent ones are NULL. */
typedef enum Piece { CODES, SCALES, SHAPE, NESTED, NESTED_MAP, STATE, PIECES } Piece;

static const char *const suffixes[KINDS][PIECES] = {
    [PACKED] = {".weight_packed", ".weight_scale", ".weight_shape"},
    [INT8] = {".weight", ".weight_scale"},
    [NF4_CODES] = {".weight", ".weight.absmax", NULL, ".weight.nested_absmax",
                   ".weight.nested_quant_map", ".weight.quant_state.bitsandbytes__nf4"},
};

/* Tensors that come with the pieces and say nothing more: the levels of NF4. */
static const char *const implied[] = {".weight.quant_map"};

/* What some pieces would mean that no block of ours holds. */
static const struct {
    const char *suffix, *what;
} refused[] = {{".weight_zero_point", "asymmetric codes"},
               {".weight_g_idx", "groups in the order of activations"},
               {".weight.quant_state.bitsandbytes__fp4", "fp4"},
               {".weight.SCB", "bitsandbytes' 8-bit rows"},
               {".weight_global_scale", "scales of scales"}};

typedef struct Matrix {
    Kind kind;
    const StoredTensor *pieces[PIECES];
    int64_t out, in;
    float offset;  /* of nested scales */
    char *weight;  /* the parameter it is, or is part of */
    int64_t order; /* its place among the matrices of a fused parameter; -1: it is alone */
} Matrix;

struct Parts {
    Matrix *matrices;
    int count;
};

/* ---- finding ---- */

static bool ends_in(const char *name, const char *end) {
    size_t n = strlen(name), e = strlen(end);
    return n > e && !strcmp(name + n - e, end);
}

static int by_name(const void *a, const void *b) {
    return strcmp((*(StoredTensor *const *)a)->name, (*(StoredTensor *const *)b)->name);
}

/* Index of base + suffix; -1: there is none. */
static int find_piece(const StoredTensor **tensors, int count, const char *name, size_t base,
                      const char *suffix) {
    char *wanted = must_format("%.*s%s", (int)base, name, suffix);
    StoredTensor key = {.name = wanted}, *pointer = &key;
    const StoredTensor **found =
        bsearch(&pointer, tensors, (size_t)count, sizeof *tensors, by_name);
    free(wanted);
    return found ? (int)(found - tensors) : -1;
}

/* Which kind of codes the tensor is, if any; *base: the length of its module's name. */
static Kind kind_of(const StoredTensor **tensors, int count, const StoredTensor *t, size_t *base) {
    for (Kind kind = PACKED; kind < KINDS; kind++) {
        const char *codes = suffixes[kind][CODES];
        if (!ends_in(t->name, codes)) continue;
        *base = strlen(t->name) - strlen(codes);
        if (kind == PACKED) return kind;
        if (kind == INT8 && !strcmp(t->dtype_text, "I8") &&
            find_piece(tensors, count, t->name, *base, suffixes[kind][SCALES]) >= 0)
            return kind;
        if (kind == NF4_CODES &&
            find_piece(tensors, count, t->name, *base, suffixes[kind][STATE]) >= 0)
            return kind;
    }
    return KINDS;
}

/* module.experts.E.gate_proj and its like belong to a fused parameter, gate before up. */
static void name_weight(Matrix *m, const char *name, size_t base) {
    static const struct {
        const char *part, *fused;
        int64_t stride, place;
    } parts[] = {{"gate_proj", "gate_up_proj", 2, 0},
                 {"up_proj", "gate_up_proj", 2, 1},
                 {"down_proj", "down_proj", 1, 0}};
    char *module = must_format("%.*s", (int)base, name), *end;
    char *experts = strstr(module, ".experts.");
    m->order = -1;
    if (experts) {
        char *number = experts + strlen(".experts.");
        int64_t expert = strtol(number, &end, 10);
        bool named = end > number && *end == '.' && expert >= 0 && expert < 1 << 20;
        for (size_t i = 0; i < sizeof parts / sizeof *parts && named; i++)
            if (!strcmp(end + 1, parts[i].part)) {
                m->weight =
                    must_format("%.*s.%s", (int)(number - 1 - module), module, parts[i].fused);
                m->order = expert * parts[i].stride + parts[i].place;
            }
    }
    if (m->order < 0) m->weight = must_format("%s.weight", module);
    free(module);
}

/* ---- shapes ---- */

static Status refuse(const Matrix *m, const char *why) {
    FAIL(ERR_FORMAT, "%s: tensor '%s' %s", m->pieces[CODES]->file, m->pieces[CODES]->name, why);
}

static bool is_float(const StoredTensor *t) {
    return t->dtype == F32 || t->dtype == BF16 || t->dtype == F16;
}

static Status read_integers(Matrix *m) {
    const StoredTensor *codes = m->pieces[CODES], *scales = m->pieces[SCALES],
                       *shape = m->pieces[SHAPE];
    if (codes->ndim != 2) return refuse(m, "is no matrix of codes");
    m->out = codes->shape[0];
    m->in = codes->shape[1];
    if (m->kind == PACKED) {
        int64_t sizes[2];
        if (strcmp(shape->dtype_text, "I64") || shape->size != sizeof sizes)
            return refuse(m, "has a weight_shape that is no pair of I64");
        memcpy(sizes, shape->bytes, sizeof sizes);
        if (codes->dtype != I32 || sizes[0] != m->out ||
            (sizes[1] != 8 * m->in && sizes[1] != 4 * m->in))
            return refuse(m, "does not hold 4-bit or 8-bit codes of its weight_shape in I32");
        m->in = sizes[1];
    }
    if (!is_float(scales) || scales->ndim != 2 || scales->shape[0] != m->out ||
        scales->shape[1] < 1 || m->in % scales->shape[1])
        return refuse(m, "has scales that are no groups of its rows");
    if (m->in % 32 || m->in / scales->shape[1] % 32)
        return refuse(m, "has groups that are no whole blocks of 32");
    return OK;
}

static Status read_state(Matrix *m, const json_t *state) {
    const StoredTensor *codes = m->pieces[CODES], *absmax = m->pieces[SCALES],
                       *nested = m->pieces[NESTED], *map = m->pieces[NESTED_MAP];
    json_t *shape = json_object_get(state, "shape");
    m->out = json_integer_value(json_array_get(shape, 0));
    m->in = json_integer_value(json_array_get(shape, 1));
    const char *type = json_string_value(json_object_get(state, "quant_type"));
    if (!type || strcmp(type, "nf4") ||
        json_integer_value(json_object_get(state, "blocksize")) != 64)
        return refuse(m, "is not nf4 in blocks of 64");
    if (json_array_size(shape) != 2 || m->out < 1 || m->in < 1 || m->in > INT32_MAX ||
        m->out > INT32_MAX || m->out * m->in % 64 || codes->dtype != U8 ||
        codes->size != (size_t)(m->out * m->in / 2))
        return refuse(m, "does not hold the codes of the shape in its quant_state");
    size_t blocks = (size_t)(m->out * m->in / 64);
    if (!nested) {
        if (absmax->dtype != F32 || absmax->size != blocks * 4)
            return refuse(m, "has an absmax that is not one F32 a block");
        return OK;
    }
    if (absmax->dtype != U8 || absmax->size != blocks || nested->dtype != F32 ||
        nested->size != (blocks + 255) / 256 * 4 || !map || map->dtype != F32 ||
        map->size != 256 * 4 ||
        json_integer_value(json_object_get(state, "nested_blocksize")) != 256)
        return refuse(m, "has nested scales that are not one byte a block and one F32 for 256");
    if (memcmp(map->bytes, dynamic_levels(true), map->size))
        return refuse(m, "has other levels of nested scales than bitsandbytes' dynamic map");
    m->offset = (float)json_number_value(json_object_get(state, "nested_offset"));
    return OK;
}

static Status read_shapes(Matrix *m) {
    if (m->kind != NF4_CODES) return read_integers(m);
    const StoredTensor *t = m->pieces[STATE];
    json_t *state = json_loadb((const char *)t->bytes, t->size, 0, NULL);
    Status status = state ? read_state(m, state) : refuse(m, "has a quant_state that is no JSON");
    json_decref(state);
    return status;
}

/* ---- gathering ---- */

static DType dtype_of(const Matrix *m) {
    if (m->kind == NF4_CODES) return m->pieces[NESTED] ? NF4_NESTED : NF4;
    return m->kind == PACKED && m->in == 8 * m->pieces[CODES]->shape[1] ? Q4_0 : Q8_0;
}

static int by_weight(const void *a, const void *b) {
    const Matrix *x = a, *y = b;
    int order = strcmp(x->weight, y->weight);
    return order ? order : x->order < y->order ? -1 : x->order > y->order;
}

/* The weight that matrices[0 .. count - 1] make. */
static Status make_whole(StoredTensor *whole, const Matrix *matrices, int count) {
    const Matrix *m = matrices;
    bool fused = m->order >= 0, pairs = fused && ends_in(m->weight, ".gate_up_proj");
    for (int i = 0; i < count; i++)
        if ((fused && matrices[i].order != i) || (!fused && i) || matrices[i].out != m->out ||
            matrices[i].in != m->in || dtype_of(&matrices[i]) != dtype_of(m) ||
            (fused && m->kind == NF4_CODES))
            return refuse(&matrices[i], "does not fit the other experts, or one is missing");
    if (pairs && count % 2) return refuse(m, "has no up_proj in its last expert");
    *whole = (StoredTensor){.name = must_strdup(m->weight),
                            .dtype = dtype_of(m),
                            .ndim = fused ? 3 : 2,
                            .file = m->pieces[CODES]->file};
    snprintf(whole->dtype_text, sizeof whole->dtype_text, "%s", dtype_name(whole->dtype));
    int64_t *shape = whole->shape;
    if (fused) *shape++ = pairs ? count / 2 : count;
    shape[0] = pairs ? 2 * m->out : m->out;
    shape[1] = m->in;
    whole->size = tensor_bytes(tensor_make(NULL, whole->dtype, whole->ndim, whole->shape));
    Parts *parts = must_calloc(1, sizeof *parts);
    parts->matrices = must_malloc((size_t)count * sizeof *matrices);
    memcpy(parts->matrices, matrices, (size_t)count * sizeof *matrices);
    parts->count = count;
    whole->parts = parts;
    return OK;
}

/* Takes the pieces of one matrix out of the list. */
static Status take_pieces(Matrix *m, const StoredTensor **tensors, int count, bool *taken, int at,
                          size_t base) {
    const char *name = tensors[at]->name;
    m->pieces[CODES] = tensors[at];
    for (int piece = 0; piece < PIECES; piece++) {
        const char *suffix = suffixes[m->kind][piece];
        int i = suffix ? find_piece(tensors, count, name, base, suffix) : -1;
        if (i >= 0) {
            m->pieces[piece] = tensors[i];
            taken[i] = true;
        } else if (suffix && piece != NESTED && piece != NESTED_MAP) {
            FAIL(ERR_FORMAT, "%s: tensor '%.*s%s' is missing beside '%s'", tensors[at]->file,
                 (int)base, name, suffix, name);
        }
    }
    for (size_t i = 0; i < sizeof implied / sizeof *implied; i++) {
        int found = find_piece(tensors, count, name, base, implied[i]);
        if (found >= 0) taken[found] = true;
    }
    return OK;
}

Status parts_collect(PartsList *list, const StoredTensor **tensors, int *count) {
    *list = (PartsList){0};
    Status status = OK;
    int n = *count, found = 0;
    bool *taken = must_calloc((size_t)n + 1, sizeof *taken);
    Matrix *matrices = must_calloc((size_t)n + 1, sizeof *matrices);
    for (int i = 0; i < n; i++) {
        size_t base;
        for (size_t r = 0; r < sizeof refused / sizeof *refused; r++)
            if (ends_in(tensors[i]->name, refused[r].suffix))
                FAIL_DONE(ERR_FORMAT, "%s: tensor '%s' means %s, which no format here holds",
                          tensors[i]->file, tensors[i]->name, refused[r].what);
        Kind kind = kind_of(tensors, n, tensors[i], &base);
        if (kind == KINDS) continue;
        Matrix *m = &matrices[found++];
        m->kind = kind;
        name_weight(m, tensors[i]->name, base);
        TRY_DONE(take_pieces(m, tensors, n, taken, i, base));
        TRY_DONE(read_shapes(m));
    }
    qsort(matrices, (size_t)found, sizeof *matrices, by_weight);
    list->whole = must_calloc((size_t)found + 1, sizeof *list->whole);
    for (int first = 0, end; first < found; first = end) {
        end = first + 1;
        while (end < found && !strcmp(matrices[end].weight, matrices[first].weight)) end++;
        TRY_DONE(make_whole(&list->whole[list->count], matrices + first, end - first));
        list->count++;
    }
    *count = 0;
    for (int i = 0; i < n; i++)
        if (!taken[i]) tensors[(*count)++] = tensors[i];
done:
    for (int i = 0; i < found; i++) free(matrices[i].weight);
    free(matrices);
    free(taken);
    if (status != OK) parts_free(list);
    return status;
}

void parts_free(PartsList *list) {
    for (int i = 0; i < list->count; i++) {
        free(list->whole[i].name);
        free(list->whole[i].parts->matrices);
        free((void *)list->whole[i].parts);
    }
    free(list->whole);
    *list = (PartsList){0};
}

/* ---- reading ---- */

/* Scale `i` as f16. */
static Status read_scale(const Matrix *m, int64_t i, uint16_t *half) {
    const StoredTensor *t = m->pieces[SCALES];
    uint16_t bits;
    float scale;
    if (t->dtype == F32) {
        memcpy(&scale, t->bytes + 4 * i, 4);
    } else {
        memcpy(&bits, t->bytes + 2 * i, 2);
        scale = t->dtype == BF16 ? bf16_to_f32(bits) : f16_to_f32(bits);
    }
    *half = f32_to_f16(scale);
    if (!(fabsf(f16_to_f32(*half) - scale) <= fabsf(scale) / 2048))
        FAIL(ERR_FORMAT, "%s: tensor '%s' holds %g, which f16 does not reach", t->file, t->name,
             scale);
    return OK;
}

/* 32 codes from byte `at` on: pack-quantized stores q + 8 or q + 128, lowest bits first. */
static void read_codes(const Matrix *m, DType dtype, size_t at, void *block) {
    const uint8_t *bytes = m->pieces[CODES]->bytes + at;
    if (dtype == Q4_0) {
        BlockQ4_0 *b = block;
        for (int j = 0; j < 8; j++) {
            b->qs[2 * j] = (uint8_t)((bytes[j] & 15) | (bytes[8 + j] & 15) << 4);
            b->qs[2 * j + 1] = (uint8_t)(bytes[j] >> 4 | (bytes[8 + j] & 0xf0));
        }
    } else {
        uint8_t bias = m->kind == PACKED ? 128 : 0;
        for (int j = 0; j < 32; j++) ((BlockQ8_0 *)block)->qs[j] = (int8_t)(bytes[j] - bias);
    }
}

static Status read_blocks(const Matrix *m, DType dtype, uint8_t *out) {
    DTypeBlock block = dtype_block(dtype);
    int64_t blocks = m->in / 32, groups = m->pieces[SCALES]->shape[1];
    for (int64_t r = 0; r < m->out; r++)
        for (int64_t b = 0; b < blocks; b++, out += block.bytes) {
            uint16_t scale;
            TRY(read_scale(m, r * groups + b * groups / blocks, &scale));
            memcpy(out, &scale, 2);
            read_codes(m, dtype, (size_t)(r * blocks + b) * (dtype == Q4_0 ? 16 : 32), out);
        }
    return OK;
}

static void read_nf4(const Matrix *m, void *out) {
    int64_t blocks = m->out * m->in / 64;
    const uint8_t *codes = m->pieces[CODES]->bytes, *absmax = m->pieces[SCALES]->bytes;
    if (!m->pieces[NESTED]) {
        BlockNF4 *b = out;
        for (int64_t i = 0; i < blocks; i++) {
            memcpy(&b[i].absmax, absmax + 4 * i, 4);
            memcpy(b[i].qs, codes + 32 * i, 32);
        }
        return;
    }
    for (int64_t first = 0; first < blocks; first += 256) {
        BlockNF4Nested *b = (BlockNF4Nested *)out + first / 256;
        size_t n = (size_t)(blocks - first < 256 ? blocks - first : 256);
        b->offset = m->offset;
        memcpy(&b->scale, m->pieces[NESTED]->bytes + 4 * (first / 256), 4);
        memcpy(b->absmax, absmax + first, n);
        memcpy(b->qs, codes + 32 * first, 32 * n);
    }
}

Status parts_read(const StoredTensor *t, void *blocks) {
    const Parts *parts = t->parts;
    size_t each = t->size / (size_t)parts->count;
    for (int i = 0; i < parts->count; i++) {
        const Matrix *m = &parts->matrices[i];
        if (m->kind == NF4_CODES)
            read_nf4(m, blocks);
        else
            TRY(read_blocks(m, t->dtype, (uint8_t *)blocks + (size_t)i * each));
        stored_tensor_release(m->pieces[CODES]);
    }
    return OK;
}
