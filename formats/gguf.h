/* gguf.h - llama.cpp's container: typed key-value metadata, tensor descriptions, aligned data.
 *
 * Reading maps the file and trusts nothing: every count, length, type and offset is checked before
 * use. Writing is one pass: metadata and descriptions first, then the data in the order declared.
 */
#ifndef GGUF_H
#define GGUF_H

#include "formats/safetensors.h"

typedef enum GgufType {
    GGUF_U8,
    GGUF_I8,
    GGUF_U16,
    GGUF_I16,
    GGUF_U32,
    GGUF_I32,
    GGUF_F32,
    GGUF_BOOL,
    GGUF_STRING,
    GGUF_ARRAY,
    GGUF_U64,
    GGUF_I64,
    GGUF_F64,
    GGUF_TYPE_COUNT
} GgufType;

typedef struct GgufValue {
    char *key;
    GgufType type, item; /* item: of an array's elements */
    uint64_t count;      /* elements; 1 unless it is an array */
    const uint8_t *bytes;
    size_t size;
} GgufValue;

typedef struct Gguf {
    char *path;
    uint8_t *map;
    size_t size;
    GgufValue *values; /* sorted by key */
    int value_count;
    StoredTensor *tensors; /* sorted by name; shapes outermost first */
    int count;
} Gguf;

Status gguf_open(Gguf *g, const char *path);

/* The same from bytes in memory that outlive it. */
Status gguf_parse(Gguf *g, const uint8_t *bytes, size_t size, const char *name);
void gguf_close(Gguf *g);

/* Whether a path is a regular file that begins as GGUF does. */
bool gguf_is_file(const char *path);

const GgufValue *gguf_find(const Gguf *g, const char *key);
const StoredTensor *gguf_find_tensor(const Gguf *g, const char *name);

/* Element `index` of a value as a number; ERR_FORMAT naming the key when it is none. */
Status gguf_number(const Gguf *g, const GgufValue *v, uint64_t index, double *out);

/* gguf_find and gguf_number of a single value that must be there. */
Status gguf_get_number(const Gguf *g, const char *key, double *out);

/* The same of a whole number within bounds. */
Status gguf_get_int(const Gguf *g, const char *key, int64_t low, int64_t high, int64_t *out);

/* The same of what was stored as a float: its shortest decimal, finite. */
Status gguf_get_float(const Gguf *g, const char *key, double *out);

/* A string value as bytes in the map; NULL when the key is absent or no string. */
const char *gguf_text(const Gguf *g, const char *key, size_t *size);

/* Walks the strings of an array value: false after the last. */
typedef struct GgufStrings {
    const uint8_t *at;
    uint64_t left;
} GgufStrings;
GgufStrings gguf_strings(const GgufValue *v);
bool gguf_next_string(GgufStrings *s, const char **bytes, size_t *size);

/* ---- writing ---- */

typedef struct GgufWriter GgufWriter;

Status gguf_create(GgufWriter **w, const char *path);

/* Metadata, in the order it shall have. */
void gguf_put_u32(GgufWriter *w, const char *key, uint32_t value);
void gguf_put_i32(GgufWriter *w, const char *key, int32_t value);
void gguf_put_f32(GgufWriter *w, const char *key, float value);
void gguf_put_bool(GgufWriter *w, const char *key, bool value);
void gguf_put_text(GgufWriter *w, const char *key, const char *value);
void gguf_put_bytes(GgufWriter *w, const char *key, const char *bytes, size_t size);

/* An array: announced with its length, then filled one element at a time. */
void gguf_put_array(GgufWriter *w, const char *key, GgufType item, uint64_t count);
void gguf_add_text(GgufWriter *w, const char *bytes, size_t size);
void gguf_add_i32(GgufWriter *w, int32_t value);
void gguf_add_f32(GgufWriter *w, float value);
void gguf_add_bool(GgufWriter *w, bool value);

/* Tensors, shapes outermost first; dtype one that GGUF has. */
void gguf_declare(GgufWriter *w, const char *name, DType dtype, int ndim, const int64_t *shape);
Status gguf_begin(GgufWriter *w);

/* The data of the tensors in order; each must be written to its last byte. */
Status gguf_write(GgufWriter *w, const void *bytes, size_t size);
Status gguf_commit(GgufWriter *w); /* frees the writer */
void gguf_abandon(GgufWriter *w);  /* accepts NULL */

#endif
