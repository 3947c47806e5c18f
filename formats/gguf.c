/* gguf.c - reading through a map, writing in one pass. */
#include "formats/gguf.h"
#include "formats/file.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define ALIGNMENT  32
#define NAME_LIMIT 1024

/* ggml's numbers of the types we read. */
static const struct {
    uint32_t number;
    DType dtype;
    const char *text;
} tensor_types[] = {{0, F32, "F32"},    {1, F16, "F16"},    {2, Q4_0, "Q4_0"},  {8, Q8_0, "Q8_0"},
                    {12, Q4_K, "Q4_K"}, {13, Q5_K, "Q5_K"}, {14, Q6_K, "Q6_K"}, {30, BF16, "BF16"}};
#define TENSOR_TYPES (sizeof tensor_types / sizeof *tensor_types)

static const uint8_t sizes[GGUF_TYPE_COUNT] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

/* ---- reading ---- */

/* A place in the file that refuses to go past its end. */
typedef struct Reader {
    const Gguf *g;
    size_t at;
} Reader;

static Status need(const Reader *r, uint64_t size, const char *what) {
    if (size > r->g->size - r->at)
        FAIL(ERR_FORMAT, "%s: ends inside %s (byte %zu, %" PRIu64 " more expected)", r->g->path,
             what, r->at, size);
    return OK;
}

static uint64_t little(const uint8_t *bytes, int count) {
    uint64_t value = 0;
    for (int i = count - 1; i >= 0; i--) value = value << 8 | bytes[i];
    return value;
}

static Status read_uint(Reader *r, int bytes, uint64_t *out, const char *what) {
    TRY(need(r, (uint64_t)bytes, what));
    *out = little(r->g->map + r->at, bytes);
    r->at += (size_t)bytes;
    return OK;
}

/* A name: caller frees. */
static Status read_name(Reader *r, char **out, const char *what) {
    uint64_t length;
    TRY(read_uint(r, 8, &length, what));
    TRY(need(r, length, what));
    if (!length || length > NAME_LIMIT || memchr(r->g->map + r->at, 0, (size_t)length))
        FAIL(ERR_FORMAT, "%s: %s at byte %zu is no name", r->g->path, what, r->at);
    *out = must_malloc((size_t)length + 1);
    memcpy(*out, r->g->map + r->at, (size_t)length);
    (*out)[length] = 0;
    r->at += (size_t)length;
    return OK;
}

static Status skip_strings(Reader *r, uint64_t count, const char *key) {
    for (uint64_t i = 0; i < count; i++) {
        uint64_t length;
        TRY(read_uint(r, 8, &length, key));
        TRY(need(r, length, key));
        r->at += (size_t)length;
    }
    return OK;
}

static Status read_value(Reader *r, GgufValue *v) {
    uint64_t type;
    TRY(read_name(r, &v->key, "a metadata key"));
    TRY(read_uint(r, 4, &type, v->key));
    if (type >= GGUF_TYPE_COUNT)
        FAIL(ERR_FORMAT, "%s: '%s' has the unknown value type %" PRIu64, r->g->path, v->key, type);
    v->type = v->item = (GgufType)type;
    v->count = 1;
    if (v->type == GGUF_ARRAY) {
        TRY(read_uint(r, 4, &type, v->key));
        TRY(read_uint(r, 8, &v->count, v->key));
        if (type >= GGUF_TYPE_COUNT || type == GGUF_ARRAY)
            FAIL(ERR_FORMAT, "%s: '%s' is an array of the unsupported type %" PRIu64, r->g->path,
                 v->key, type);
        v->item = (GgufType)type;
    }
    size_t begin = r->at;
    v->bytes = r->g->map + begin;
    if (v->item == GGUF_STRING) {
        if (v->count > (r->g->size - r->at) / 8)
            FAIL(ERR_FORMAT, "%s: '%s' promises %" PRIu64 " strings, more than the file holds",
                 r->g->path, v->key, v->count);
        TRY(skip_strings(r, v->count, v->key));
    } else {
        if (v->count > (r->g->size - r->at) / sizes[v->item])
            FAIL(ERR_FORMAT, "%s: '%s' promises %" PRIu64 " elements, more than the file holds",
                 r->g->path, v->key, v->count);
        r->at += (size_t)v->count * sizes[v->item];
    }
    v->size = r->at - begin;
    return OK;
}

static Status read_tensor(Reader *r, StoredTensor *t, uint64_t *offset) {
    const Gguf *g = r->g;
    uint64_t ndim, type, dims[4];
    TRY(read_name(r, &t->name, "a tensor name"));
    TRY(read_uint(r, 4, &ndim, t->name));
    if (ndim < 1 || ndim > 4)
        FAIL(ERR_FORMAT, "%s: tensor '%s' has %" PRIu64 " dimensions, expected 1 to 4", g->path,
             t->name, ndim);
    for (uint64_t i = 0; i < ndim; i++) TRY(read_uint(r, 8, &dims[i], t->name));
    TRY(read_uint(r, 4, &type, t->name));
    TRY(read_uint(r, 8, offset, t->name));
    t->dtype = DTYPE_COUNT;
    for (size_t i = 0; i < TENSOR_TYPES; i++)
        if (tensor_types[i].number == type) {
            t->dtype = tensor_types[i].dtype;
            snprintf(t->dtype_text, sizeof t->dtype_text, "%s", tensor_types[i].text);
        }
    if (t->dtype == DTYPE_COUNT)
        FAIL(ERR_FORMAT,
             "%s: tensor '%s' has ggml's type %" PRIu64
             ", expected F32, F16, BF16, Q4_0, Q8_0, Q4_K, Q5_K or Q6_K",
             g->path, t->name, type);
    DTypeBlock block = dtype_block(t->dtype);
    uint64_t count = 1;
    t->ndim = (int)ndim;
    for (uint64_t i = 0; i < ndim; i++) {
        if (!dims[i] || __builtin_mul_overflow(count, dims[i], &count) || count > (uint64_t)1 << 48)
            FAIL(ERR_FORMAT, "%s: tensor '%s' has an impossible shape", g->path, t->name);
        t->shape[ndim - 1 - i] = (int64_t)dims[i];
    }
    if (dims[0] % block.count)
        FAIL(ERR_FORMAT, "%s: tensor '%s' has rows of %" PRIu64 ", %s needs multiples of %u",
             g->path, t->name, dims[0], t->dtype_text, block.count);
    t->size = (size_t)(count / block.count) * block.bytes;
    t->file = g->path;
    return OK;
}

static int by_key(const void *a, const void *b) {
    return strcmp(((const GgufValue *)a)->key, ((const GgufValue *)b)->key);
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const StoredTensor *)a)->name, ((const StoredTensor *)b)->name);
}

static Status read_alignment(const Gguf *g, uint64_t *alignment) {
    const GgufValue *v = gguf_find(g, "general.alignment");
    double value;
    *alignment = ALIGNMENT;
    if (!v) return OK;
    TRY(gguf_number(g, v, 0, &value));
    if (value < 1 || value > 1 << 20 || value != (double)(uint64_t)value)
        FAIL(ERR_FORMAT, "%s: general.alignment is %g", g->path, value);
    *alignment = (uint64_t)value;
    return OK;
}

/* Gives each tensor its bytes, in order of the offsets, which may not overlap. */
static Status place_tensors(Gguf *g, const uint64_t *offsets, size_t data, uint64_t alignment) {
    size_t space = g->size - data;
    for (int i = 0; i < g->count; i++) {
        StoredTensor *t = &g->tensors[i];
        if (offsets[i] % alignment || offsets[i] > space || t->size > space - offsets[i])
            FAIL(ERR_FORMAT,
                 "%s: tensor '%s' lies at %" PRIu64 " with %zu bytes, the file holds %zu, aligned "
                 "to %" PRIu64,
                 g->path, t->name, offsets[i], t->size, space, alignment);
        t->bytes = g->map + data + offsets[i];
    }
    return OK;
}

static Status read_all(Gguf *g) {
    Reader r = {g, 0};
    uint64_t magic, version, tensors, values, alignment, *offsets = NULL;
    Status status = OK;
    TRY(read_uint(&r, 4, &magic, "the header"));
    TRY(read_uint(&r, 4, &version, "the header"));
    if (magic != 0x46554747) FAIL(ERR_FORMAT, "%s: is no GGUF file", g->path);
    if (version != 2 && version != 3)
        FAIL(ERR_FORMAT, "%s: is GGUF version %" PRIu64 ", expected 2 or 3", g->path, version);
    TRY(read_uint(&r, 8, &tensors, "the header"));
    TRY(read_uint(&r, 8, &values, "the header"));
    /* The least a value and a tensor take in the file. */
    if (values > g->size / 13 || tensors > g->size / 25)
        FAIL(ERR_FORMAT, "%s: promises %" PRIu64 " values and %" PRIu64 " tensors in %zu bytes",
             g->path, values, tensors, g->size);
    g->values = must_calloc((size_t)values + 1, sizeof *g->values);
    g->tensors = must_calloc((size_t)tensors + 1, sizeof *g->tensors);
    offsets = must_calloc((size_t)tensors + 1, sizeof *offsets);
    for (uint64_t i = 0; i < values; i++) {
        g->value_count++;
        TRY_DONE(read_value(&r, &g->values[i]));
    }
    qsort(g->values, (size_t)g->value_count, sizeof *g->values, by_key);
    for (int i = 1; i < g->value_count; i++)
        if (!strcmp(g->values[i - 1].key, g->values[i].key))
            FAIL_DONE(ERR_FORMAT, "%s: the key '%s' is there twice", g->path, g->values[i].key);
    for (uint64_t i = 0; i < tensors; i++) {
        g->count++;
        TRY_DONE(read_tensor(&r, &g->tensors[i], &offsets[i]));
    }
    TRY_DONE(read_alignment(g, &alignment));
    size_t data = (r.at + alignment - 1) / alignment * alignment;
    if (data > g->size) data = g->size;
    TRY_DONE(place_tensors(g, offsets, data, alignment));
    qsort(g->tensors, (size_t)g->count, sizeof *g->tensors, by_name);
    for (int i = 1; i < g->count; i++)
        if (!strcmp(g->tensors[i - 1].name, g->tensors[i].name))
            FAIL_DONE(ERR_FORMAT, "%s: tensor '%s' is there twice", g->path, g->tensors[i].name);
    TRY_DONE(stored_tensors_check_overlap(g->tensors, g->count));
done:
    free(offsets);
    return status;
}

Status gguf_parse(Gguf *g, const uint8_t *bytes, size_t size, const char *name) {
    *g = (Gguf){.path = must_strdup(name), .map = (uint8_t *)bytes, .size = size};
    Status status = read_all(g);
    g->map = NULL; /* not ours */
    if (status != OK) gguf_close(g);
    return status;
}

Status gguf_open(Gguf *g, const char *path) {
    *g = (Gguf){.path = must_strdup(path)};
    Status status = file_map(&g->map, &g->size, path);
    if (status == OK) status = read_all(g);
    if (status != OK) gguf_close(g);
    return status;
}

void gguf_close(Gguf *g) {
    for (int i = 0; i < g->value_count; i++) free(g->values[i].key);
    for (int i = 0; i < g->count; i++) free(g->tensors[i].name);
    free(g->values);
    free(g->tensors);
    free(g->path);
    if (g->map) munmap(g->map, g->size);
    *g = (Gguf){0};
}

bool gguf_is_file(const char *path) {
    char magic[4] = {0};
    struct stat info;
    FILE *file = stat(path, &info) || !S_ISREG(info.st_mode) ? NULL : fopen(path, "rb");
    if (!file) return false;
    bool is = fread(magic, 1, 4, file) == 4 && !memcmp(magic, "GGUF", 4);
    size_t n = strlen(path);
    fclose(file);
    return is || (n > 5 && !strcmp(path + n - 5, ".gguf"));
}

const GgufValue *gguf_find(const Gguf *g, const char *key) {
    GgufValue wanted = {.key = (char *)key};
    return bsearch(&wanted, g->values, (size_t)g->value_count, sizeof *g->values, by_key);
}

const StoredTensor *gguf_find_tensor(const Gguf *g, const char *name) {
    StoredTensor wanted = {.name = (char *)name};
    return bsearch(&wanted, g->tensors, (size_t)g->count, sizeof *g->tensors, by_name);
}

Status gguf_number(const Gguf *g, const GgufValue *v, uint64_t index, double *out) {
    if (index >= v->count || v->item == GGUF_STRING)
        FAIL(ERR_FORMAT, "%s: '%s' has no number %" PRIu64, g->path, v->key, index);
    int size = sizes[v->item];
    uint64_t bits = little(v->bytes + index * (uint64_t)size, size);
    union {
        uint32_t u;
        float f;
    } single = {(uint32_t)bits};
    union {
        uint64_t u;
        double d;
    } twice = {bits};
    switch (v->item) {
    case GGUF_I8:
        *out = (int8_t)bits;
        break;
    case GGUF_I16:
        *out = (int16_t)bits;
        break;
    case GGUF_I32:
        *out = (int32_t)bits;
        break;
    case GGUF_I64:
        *out = (double)(int64_t)bits;
        break;
    case GGUF_F32:
        *out = single.f;
        break;
    case GGUF_F64:
        *out = twice.d;
        break;
    default:
        *out = (double)bits;
    }
    return OK;
}

Status gguf_get_number(const Gguf *g, const char *key, double *out) {
    const GgufValue *v = gguf_find(g, key);
    if (!v) FAIL(ERR_FORMAT, "%s: the key '%s' is missing", g->path, key);
    return gguf_number(g, v, 0, out);
}

GgufStrings gguf_strings(const GgufValue *v) {
    return (GgufStrings){v->bytes, v->item == GGUF_STRING ? v->count : 0};
}

bool gguf_next_string(GgufStrings *s, const char **bytes, size_t *size) {
    if (!s->left) return false;
    *size = (size_t)little(s->at, 8);
    *bytes = (const char *)s->at + 8;
    s->at += 8 + *size;
    s->left--;
    return true;
}

Status gguf_get_int(const Gguf *g, const char *key, int64_t low, int64_t high, int64_t *out) {
    double value;
    TRY(gguf_get_number(g, key, &value));
    if (!(value >= (double)low && value <= (double)high) || value != floor(value))
        FAIL(ERR_FORMAT, "%s: '%s' is %g, expected %" PRId64 " to %" PRId64, g->path, key, value,
             low, high);
    *out = (int64_t)value;
    return OK;
}

Status gguf_get_float(const Gguf *g, const char *key, double *out) {
    char shortest[32];
    TRY(gguf_get_number(g, key, out));
    if (!isfinite(*out)) FAIL(ERR_FORMAT, "%s: '%s' is no finite number", g->path, key);
    snprintf(shortest, sizeof shortest, "%.7g", *out);
    *out = strtod(shortest, NULL);
    return OK;
}

const char *gguf_text(const Gguf *g, const char *key, size_t *size) {
    const GgufValue *v = gguf_find(g, key);
    if (!v || v->type != GGUF_STRING) return NULL;
    GgufStrings s = gguf_strings(v);
    const char *bytes = NULL;
    gguf_next_string(&s, &bytes, size);
    return bytes;
}

/* ---- writing ---- */

typedef struct Bytes {
    uint8_t *data;
    size_t size, capacity;
} Bytes;

struct GgufWriter {
    FileWriter file;
    Bytes values, tensors;
    uint64_t value_count, tensor_count;
    size_t data_size; /* of tensors declared, with padding */
    size_t *ends;     /* of each tensor's data, without padding */
    size_t written;
    uint64_t current; /* tensor being written */
};

static void put(Bytes *b, const void *bytes, size_t size) {
    if (b->size + size > b->capacity) {
        b->capacity = 2 * (b->size + size) + 256;
        b->data = must_realloc(b->data, b->capacity);
    }
    if (size) memcpy(b->data + b->size, bytes, size);
    b->size += size;
}

static void put_uint(Bytes *b, uint64_t value, int count) {
    uint8_t bytes[8];
    for (int i = 0; i < count; i++) bytes[i] = (uint8_t)(value >> (8 * i));
    put(b, bytes, (size_t)count);
}

static void put_string(Bytes *b, const char *bytes, size_t size) {
    put_uint(b, size, 8);
    put(b, bytes, size);
}

static void put_key(GgufWriter *w, const char *key, GgufType type) {
    put_string(&w->values, key, strlen(key));
    put_uint(&w->values, type, 4);
    w->value_count++;
}

static uint32_t float_bits(float value) {
    union {
        float f;
        uint32_t u;
    } bits = {value};
    return bits.u;
}

Status gguf_create(GgufWriter **w, const char *path) {
    GgufWriter *writer = must_calloc(1, sizeof *writer);
    Status status = file_writer_open(&writer->file, path);
    if (status != OK) {
        free(writer);
        return status;
    }
    *w = writer;
    return OK;
}

void gguf_put_u32(GgufWriter *w, const char *key, uint32_t value) {
    put_key(w, key, GGUF_U32);
    put_uint(&w->values, value, 4);
}

void gguf_put_i32(GgufWriter *w, const char *key, int32_t value) {
    put_key(w, key, GGUF_I32);
    put_uint(&w->values, (uint32_t)value, 4);
}

void gguf_put_f32(GgufWriter *w, const char *key, float value) {
    put_key(w, key, GGUF_F32);
    put_uint(&w->values, float_bits(value), 4);
}

void gguf_put_bool(GgufWriter *w, const char *key, bool value) {
    put_key(w, key, GGUF_BOOL);
    put_uint(&w->values, value, 1);
}

void gguf_put_bytes(GgufWriter *w, const char *key, const char *bytes, size_t size) {
    put_key(w, key, GGUF_STRING);
    put_string(&w->values, bytes, size);
}

void gguf_put_text(GgufWriter *w, const char *key, const char *value) {
    gguf_put_bytes(w, key, value, strlen(value));
}

void gguf_put_array(GgufWriter *w, const char *key, GgufType item, uint64_t count) {
    put_key(w, key, GGUF_ARRAY);
    put_uint(&w->values, item, 4);
    put_uint(&w->values, count, 8);
}

void gguf_add_text(GgufWriter *w, const char *bytes, size_t size) {
    put_string(&w->values, bytes, size);
}

void gguf_add_i32(GgufWriter *w, int32_t value) {
    put_uint(&w->values, (uint32_t)value, 4);
}

void gguf_add_f32(GgufWriter *w, float value) {
    put_uint(&w->values, float_bits(value), 4);
}

void gguf_add_bool(GgufWriter *w, bool value) {
    put_uint(&w->values, value, 1);
}

void gguf_declare(GgufWriter *w, const char *name, DType dtype, int ndim, const int64_t *shape) {
    size_t type = 0;
    while (type < TENSOR_TYPES && tensor_types[type].dtype != dtype) type++;
    CHECK(type < TENSOR_TYPES, "GGUF has no %s", dtype_name(dtype));
    Tensor t = tensor_make(NULL, dtype, ndim, shape);
    put_string(&w->tensors, name, strlen(name));
    put_uint(&w->tensors, (uint64_t)ndim, 4);
    for (int i = ndim - 1; i >= 0; i--) put_uint(&w->tensors, (uint64_t)shape[i], 8);
    put_uint(&w->tensors, tensor_types[type].number, 4);
    put_uint(&w->tensors, w->data_size, 8);
    w->ends = must_realloc(w->ends, (size_t)(w->tensor_count + 1) * sizeof *w->ends);
    w->ends[w->tensor_count++] = w->data_size + tensor_bytes(t);
    w->data_size = (w->data_size + tensor_bytes(t) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static Status pad(GgufWriter *w, size_t from) {
    static const uint8_t zeros[ALIGNMENT];
    return file_writer_write(&w->file, zeros, (ALIGNMENT - from % ALIGNMENT) % ALIGNMENT);
}

Status gguf_begin(GgufWriter *w) {
    Bytes header = {0};
    put(&header, "GGUF", 4);
    put_uint(&header, 3, 4);
    put_uint(&header, w->tensor_count, 8);
    put_uint(&header, w->value_count, 8);
    Status status = file_writer_write(&w->file, header.data, header.size);
    if (status == OK) status = file_writer_write(&w->file, w->values.data, w->values.size);
    if (status == OK && w->tensors.size)
        status = file_writer_write(&w->file, w->tensors.data, w->tensors.size);
    if (status == OK) status = pad(w, header.size + w->values.size + w->tensors.size);
    free(header.data);
    return status;
}

Status gguf_write(GgufWriter *w, const void *bytes, size_t size) {
    CHECK(w->current < w->tensor_count && w->written + size <= w->ends[w->current],
          "%s: more data than declared", w->file.path);
    TRY(file_writer_write(&w->file, bytes, size));
    w->written += size;
    if (w->written < w->ends[w->current]) return OK;
    TRY(pad(w, w->written));
    w->written = (w->written + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    w->current++;
    return OK;
}

static void writer_free(GgufWriter *w) {
    free(w->values.data);
    free(w->tensors.data);
    free(w->ends);
    free(w);
}

Status gguf_commit(GgufWriter *w) {
    CHECK(w->current == w->tensor_count, "%s: %d of %d tensors written", w->file.path,
          (int)w->current, (int)w->tensor_count);
    Status status = file_writer_commit(&w->file);
    writer_free(w);
    return status;
}

void gguf_abandon(GgufWriter *w) {
    if (!w) return;
    file_writer_abandon(&w->file);
    writer_free(w);
}
