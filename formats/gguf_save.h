/* gguf_save.h - models and adapters written as GGUF, a few rows at a time. */
#ifndef GGUF_SAVE_H
#define GGUF_SAVE_H

#include "formats/adapter.h"
#include "formats/gguf_model.h"

/* Where the rows of a parameter come from: rows first .. first + count - 1 as f32, all leading
 * dimensions flattened, a vector being one row. `done`, when given, is called after the last row of
 * each parameter. */
typedef struct RowSource {
    void (*rows)(void *context, const Param *p, int64_t first, int64_t count, float *out);
    Tensor (*packed)(void *context, const Param *p); /* blocks to copy as they are; absent: none */
    void (*done)(void *context, const Param *p);
    void *context;
} RowSource;

/* The dtype a parameter has in a file whose matrices are `dtype`: vectors and the router stay f32,
 * a matrix whose rows are no whole blocks is bf16. */
DType gguf_param_dtype(const Param *p, DType dtype);

/* Writes the model `g` was declared for. A value that is not finite is an error naming its tensor.
 */
Status gguf_save(const GgufModel *m, const Gemma *g, const RowSource *source, const char *path);

/* Writes the adapter of `g` as llama.cpp's convert_lora_to_gguf does. What that format or llama.cpp
 * cannot say (DoRA, whole trained modules, adapters of per_layer_model_projection) is an error. */
Status gguf_save_adapter(const Gemma *g, const AdapterSpec *spec, const char *path);

#endif
