/* safetensors.c - reading through a map, writing in one pass. */
#include "formats/safetensors.h"
#include "formats/file.h"
#include "kernels/elementwise.h"

#include <inttypes.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static const struct {
    const char *text;
    size_t size;
    DType dtype;
} dtypes[] = {{"BF16", 2, BF16},
              {"F32", 4, F32},
              {"F16", 2, F16},
              {"I32", 4, I32},
              {"U8", 1, U8},
              {"I8", 1, DTYPE_COUNT},
              {"I16", 2, DTYPE_COUNT},
              {"U16", 2, DTYPE_COUNT},
              {"U32", 4, DTYPE_COUNT},
              {"I64", 8, DTYPE_COUNT},
              {"U64", 8, DTYPE_COUNT},
              {"F64", 8, DTYPE_COUNT},
              {"BOOL", 1, DTYPE_COUNT},
              {"F8_E4M3", 1, DTYPE_COUNT},
              {"F8_E5M2", 1, DTYPE_COUNT}};

const char *dtype_text(DType dtype) {
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++)
        if (dtypes[i].dtype == dtype) return dtypes[i].text;
    return "?";
}

static Status read_entry(Safetensors *s, StoredTensor *t, const char *name, json_t *entry,
                         size_t data, size_t space) {
    const char *type = json_string_value(json_object_get(entry, "dtype"));
    json_t *shape = json_object_get(entry, "shape"),
           *offsets = json_object_get(entry, "data_offsets");
    if (!type || !json_is_array(shape) || !json_is_array(offsets) || json_array_size(offsets) != 2)
        FAIL(ERR_FORMAT, "%s: tensor '%s' lacks dtype, shape or data_offsets", s->path, name);
    size_t element = 0;
    t->dtype = DTYPE_COUNT;
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++)
        if (!strcmp(dtypes[i].text, type)) element = dtypes[i].size, t->dtype = dtypes[i].dtype;
    if (!element)
        FAIL(ERR_FORMAT, "%s: tensor '%s' has the unknown dtype '%s'", s->path, name, type);
    snprintf(t->dtype_text, sizeof t->dtype_text, "%s", type);
    if (json_array_size(shape) > 8)
        FAIL(ERR_FORMAT, "%s: tensor '%s' has more than 8 dimensions", s->path, name);
    t->ndim = (int)json_array_size(shape);
    size_t bytes = element;
    for (int i = 0; i < t->ndim; i++) {
        json_t *dim = json_array_get(shape, (size_t)i);
        t->shape[i] = json_integer_value(dim);
        if (!json_is_integer(dim) || t->shape[i] < 0 ||
            __builtin_mul_overflow(bytes, (size_t)t->shape[i], &bytes))
            FAIL(ERR_FORMAT, "%s: tensor '%s' has an impossible shape", s->path, name);
    }
    json_t *from = json_array_get(offsets, 0), *to = json_array_get(offsets, 1);
    json_int_t begin = json_integer_value(from), end = json_integer_value(to);
    if (!json_is_integer(from) || !json_is_integer(to) || begin < 0 || end < begin ||
        (size_t)end > space)
        FAIL(ERR_FORMAT,
             "%s: tensor '%s' lies at bytes %" PRId64 " to %" PRId64 ", the file holds %zu",
             s->path, name, (int64_t)begin, (int64_t)end, space);
    if ((size_t)(end - begin) != bytes)
        FAIL(ERR_FORMAT, "%s: tensor '%s' has %" PRId64 " bytes, its shape and dtype make %zu",
             s->path, name, (int64_t)(end - begin), bytes);
    t->name = must_strdup(name);
    t->bytes = s->map + data + begin;
    t->size = bytes;
    t->file = s->path;
    return OK;
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const StoredTensor *)a)->name, ((const StoredTensor *)b)->name);
}

static int by_place(const void *a, const void *b) {
    const StoredTensor *x = *(StoredTensor *const *)a, *y = *(StoredTensor *const *)b;
    return x->bytes < y->bytes ? -1 : x->bytes > y->bytes;
}

Status stored_tensors_check_overlap(const StoredTensor *tensors, int count) {
    const StoredTensor **order = must_malloc((size_t)(count + 1) * sizeof *order);
    Status status = OK;
    for (int i = 0; i < count; i++) order[i] = &tensors[i];
    qsort(order, (size_t)count, sizeof *order, by_place);
    for (int i = 1; i < count && status == OK; i++)
        if (order[i - 1]->bytes + order[i - 1]->size > order[i]->bytes && order[i]->size)
            status = status_fail(ERR_FORMAT, "%s: tensors '%s' and '%s' overlap", order[i]->file,
                                 order[i - 1]->name, order[i]->name);
    free(order);
    return status;
}

static Status read_header(Safetensors *s) {
    if (s->size < 8) FAIL(ERR_FORMAT, "%s: %zu bytes is too short for a header", s->path, s->size);
    uint64_t length = 0;
    for (int i = 7; i >= 0; i--) length = length << 8 | s->map[i];
    if (length > s->size - 8 || length > (256u << 20))
        FAIL(ERR_FORMAT, "%s: a header of %" PRIu64 " bytes exceeds the file of %zu", s->path,
             length, s->size);
    json_error_t error;
    json_t *root =
        json_loadb((const char *)s->map + 8, (size_t)length, JSON_REJECT_DUPLICATES, &error);
    if (!root) FAIL(ERR_FORMAT, "%s: the header is no JSON: %s", s->path, error.text);
    Status status = OK;
    if (!json_is_object(root)) FAIL_DONE(ERR_FORMAT, "%s: the header is not an object", s->path);
    s->tensors = must_calloc(json_object_size(root) + 1, sizeof *s->tensors);
    const char *name;
    json_t *entry;
    json_object_foreach(root, name, entry) {
        if (!strcmp(name, "__metadata__")) {
            s->metadata = json_dumps(entry, JSON_COMPACT);
            continue;
        }
        TRY_DONE(read_entry(s, &s->tensors[s->count], name, entry, 8 + (size_t)length,
                            s->size - 8 - (size_t)length));
        s->count++;
    }
    qsort(s->tensors, (size_t)s->count, sizeof *s->tensors, by_name);
    TRY_DONE(stored_tensors_check_overlap(s->tensors, s->count));
done:
    json_decref(root);
    return status;
}

Status safetensors_parse(Safetensors *s, const uint8_t *bytes, size_t size, const char *name) {
    *s = (Safetensors){.path = must_strdup(name), .map = (uint8_t *)bytes, .size = size};
    Status status = read_header(s);
    s->map = NULL; /* not ours */
    if (status != OK) safetensors_close(s);
    return status;
}

Status safetensors_open(Safetensors *s, const char *path) {
    *s = (Safetensors){.path = must_strdup(path)};
    Status status = file_map(&s->map, &s->size, path);
    if (status == OK) status = read_header(s);
    if (status != OK) safetensors_close(s);
    return status;
}

void safetensors_close(Safetensors *s) {
    for (int i = 0; i < s->count; i++) free(s->tensors[i].name);
    free(s->tensors);
    free(s->metadata);
    free(s->path);
    if (s->map) munmap(s->map, s->size);
    *s = (Safetensors){0};
}

const StoredTensor *safetensors_find(const Safetensors *s, const char *name) {
    StoredTensor key = {.name = (char *)name};
    return bsearch(&key, s->tensors, (size_t)s->count, sizeof *s->tensors, by_name);
}

/* The values in another dtype, on the CPU. */
static Status convert(const StoredTensor *t, Tensor to) {
    Tensor from = to;
    from.dtype = t->dtype;
    from.data = (void *)t->bytes;
    size_t element = dtype_is_packed(t->dtype) ? 2 : dtype_size(t->dtype);
    if ((uintptr_t)t->bytes % element == 0) {
        scale_copy(to, SET, from, 1.0f);
        return OK;
    }
    void *copy = malloc(t->size + 1); /* a header of odd length */
    if (!copy) FAIL(ERR_IO, "%s: out of memory for tensor '%s'", t->file, t->name);
    from.data = memcpy(copy, t->bytes, t->size);
    scale_copy(to, SET, from, 1.0f);
    free(copy);
    return OK;
}

Status stored_tensor_read(const StoredTensor *t, Tensor to) {
    Tensor host;
    if (t->dtype != F32 && t->dtype != BF16 && t->dtype != F16 && !dtype_is_packed(t->dtype))
        FAIL(ERR_FORMAT, "%s: tensor '%s' is %s, expected BF16, F16 or F32", t->file, t->name,
             t->dtype_text);
    if (t->dtype == to.dtype) {
        tensor_write(to, t->bytes);
        return OK;
    }
    TRY(tensor_stage(&host, to));
    Status status = convert(t, host);
    tensor_unstage(to, host, status != OK);
    return status;
}

void stored_tensor_release(const StoredTensor *t) {
    if (t->turned) return;
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE),
              begin = ((uintptr_t)t->bytes + page - 1) / page * page;
    uintptr_t end = ((uintptr_t)t->bytes + t->size) / page * page;
    if (end > begin) madvise((void *)begin, end - begin, MADV_DONTNEED);
}

struct SafetensorsWriter {
    FileWriter file;
    json_t *header;
    size_t declared, written;
};

Status safetensors_create(SafetensorsWriter **w, const char *path) {
    SafetensorsWriter *writer = must_calloc(1, sizeof *writer);
    Status status = file_writer_open(&writer->file, path);
    if (status != OK) {
        free(writer);
        return status;
    }
    writer->header = json_pack("{s:{s:s}}", "__metadata__", "format", "pt");
    *w = writer;
    return OK;
}

void safetensors_declare(SafetensorsWriter *w, const char *name, const char *type, int ndim,
                         const int64_t *shape, size_t size) {
    json_t *dims = json_array();
    for (int i = 0; i < ndim; i++) json_array_append_new(dims, json_integer(shape[i]));
    json_object_set_new(w->header, name,
                        json_pack("{s:s, s:o, s:[I,I]}", "dtype", type, "shape", dims,
                                  "data_offsets", (json_int_t)w->declared,
                                  (json_int_t)(w->declared + size)));
    w->declared += size;
}

Status safetensors_begin(SafetensorsWriter *w) {
    char *text = json_dumps(w->header, JSON_COMPACT);
    size_t length = strlen(text), padded = (length + 7) / 8 * 8;
    uint8_t prefix[8];
    for (int i = 0; i < 8; i++) prefix[i] = (uint8_t)(padded >> (8 * i));
    Status status = file_writer_write(&w->file, prefix, 8);
    if (status == OK) status = file_writer_write(&w->file, text, length);
    if (status == OK) status = file_writer_write(&w->file, "        ", padded - length);
    free(text);
    return status;
}

Status safetensors_write(SafetensorsWriter *w, const void *bytes, size_t size) {
    w->written += size;
    return file_writer_write(&w->file, bytes, size);
}

Status safetensors_commit(SafetensorsWriter *w) {
    CHECK(w->written == w->declared, "%s: %zu bytes written, %zu declared", w->file.path,
          w->written, w->declared);
    Status status = file_writer_commit(&w->file);
    json_decref(w->header);
    free(w);
    return status;
}

void safetensors_abandon(SafetensorsWriter *w) {
    if (!w) return;
    file_writer_abandon(&w->file);
    json_decref(w->header);
    free(w);
}
