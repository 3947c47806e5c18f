/* mmproj.h - towers and projections as the GGUF that llama.cpp's multimodal tools load beside a
 * text model's (spec: llama.cpp's converter and tools/mtmd). */
#ifndef MMPROJ_H
#define MMPROJ_H

#include "formats/gguf.h"
#include "model/gemma.h"

/* Writes the towers of `g`, declared with its media and loaded, adapters on them merged in:
 * matrices in `dtype` (BF16 or F32), vectors, convolutions, the patch embedder and tables of places
 * in f32. Bounds of clipped linears go along. ERR_CONFIG where the model has no towers, or
 * llama.cpp has a constant where the config says something else. */
Status mmproj_save(const Gemma *g, const char *name, DType dtype, const char *path);

#endif
