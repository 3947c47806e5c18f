/* safetensors.h - named tensors in a file: eight bytes of length, a JSON header, the data.
 *
 * Reading maps the file and trusts nothing: every offset, shape and dtype is checked before use. */
#ifndef SAFETENSORS_H
#define SAFETENSORS_H

#include "kernels/tensor.h"

typedef struct StoredTensor {
    char *name;
    char dtype_text[16]; /* as written: BF16, F32, F16, I64, ... */
    DType dtype;         /* DTYPE_COUNT when it is none of ours */
    int ndim;
    int64_t shape[8];
    const uint8_t *bytes; /* in the mapped file; any alignment */
    size_t size;
    const char *file;          /* the path it came from */
    bool turned;               /* bytes are not in the map: they lie there in another order */
    const struct Parts *parts; /* bytes is NULL: it is made from these (parts.h) */
} StoredTensor;

typedef struct Safetensors {
    char *path;
    uint8_t *map;
    size_t size;
    StoredTensor *tensors; /* sorted by name */
    int count;
    char *metadata; /* JSON text of __metadata__, or NULL */
} Safetensors;

Status safetensors_open(Safetensors *s, const char *path);

/* The same from bytes in memory that outlive it; nothing is unmapped on close. */
Status safetensors_parse(Safetensors *s, const uint8_t *bytes, size_t size, const char *name);
void safetensors_close(Safetensors *s);

const StoredTensor *safetensors_find(const Safetensors *s, const char *name);

/* Copies a stored tensor into `to`, converting f32, bf16 and f16; the caller has checked the shape.
 */
Status stored_tensor_read(const StoredTensor *t, Tensor to);

/* Lets the kernel drop the pages of a tensor that was read. */
void stored_tensor_release(const StoredTensor *t);

/* ERR_FORMAT naming two tensors of one file that share bytes. */
Status stored_tensors_check_overlap(const StoredTensor *tensors, int count);

/* Writing, in two steps: say what comes, in order, then write the data in that order. */
typedef struct SafetensorsWriter SafetensorsWriter;

Status safetensors_create(SafetensorsWriter **w, const char *path);
void safetensors_declare(SafetensorsWriter *w, const char *name, const char *dtype_text, int ndim,
                         const int64_t *shape, size_t size);
Status safetensors_begin(SafetensorsWriter *w);
Status safetensors_write(SafetensorsWriter *w, const void *bytes, size_t size);
Status safetensors_commit(SafetensorsWriter *w); /* frees the writer */
void safetensors_abandon(SafetensorsWriter *w);  /* accepts NULL */

const char *dtype_text(DType dtype); /* "BF16" and the like */

#endif
