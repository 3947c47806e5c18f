/* mmproj.h - towers and projections as the GGUF that llama.cpp's multimodal tools load beside a
 * text model's, written and read (spec: llama.cpp's converter and tools/mtmd). */
#ifndef MMPROJ_H
#define MMPROJ_H

#include "formats/gguf.h"
#include "model/gemma.h"

#include <jansson.h>

/* Writes the towers of `g`, declared with its media and loaded, adapters on them merged in:
 * matrices in `dtype` (BF16 or F32), vectors, convolutions, the patch embedder and tables of places
 * in f32. Bounds of clipped linears go along. ERR_CONFIG where the model has no towers, or
 * llama.cpp has a constant where the config says something else. */
Status mmproj_save(const Gemma *g, const char *name, DType dtype, const char *path);

/* What config.json says of these towers, put into that of their text model: vision_config,
 * audio_config, and of a model without towers (12B) its type. */
Status mmproj_config(const Gguf *g, json_t *root);

typedef struct Mmproj {
    Gguf file;
    StoredTensor *tensors; /* under the checkpoint's names and with its shapes */
    int count;
} Mmproj;

/* Finds the towers that `config` declares in the open file; those that lie there in another order
 * are turned into memory. A tensor that is missing, of another shape or left over is an error
 * naming it. */
Status mmproj_read(Mmproj *m, const ModelConfig *config);
void mmproj_close(Mmproj *m); /* accepts a zeroed one */

#endif
