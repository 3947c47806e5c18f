/* gguf_model.h - what a Gemma 4 GGUF says, in the words of a checkpoint folder, and the way back.
 *
 * A GGUF holds in metadata what a folder holds in files; each direction stands beside the other:
 * tensor names, config.json, tokenizer.json, generation_config.json, the chat template. */
#ifndef GGUF_MODEL_H
#define GGUF_MODEL_H

#include "configs/model_config.h"
#include "formats/gguf.h"

/* "layers.3.mlp.up_proj.weight" (without the checkpoint's prefix) to "blk.3.ffn_up.weight"; false
 * when GGUF has no such tensor. */
bool gguf_name_of(char *out, size_t size, const char *name);

/* The way back, with `prefix` put before it. */
bool gguf_name_from(char *out, size_t size, const char *gguf_name, const char *prefix);

/* The tensor that GGUF adds: frequency divisors of full attention, (C / 2) f32, 1 where a pair
 * rotates and 1e30 where it does not. */
#define GGUF_ROPE_FREQS "rope_freqs.weight"
void gguf_rope_freqs(float *out, const ModelConfig *c);

/* Whether a path is a GGUF, or a folder that has some and no safetensors of a model. */
bool gguf_is_model(const char *path);

/* Opens it: a text model, or a folder with one and at most one more file, of its towers (mmproj,
 * general.architecture clip; else *towers stays zero). */
Status gguf_open_model(Gguf *text, Gguf *towers, const char *path);

/* The file that a folder would hold under `name` (config.json, tokenizer.json,
 * generation_config.json, chat_template.jinja), made from the metadata; *bytes stays NULL when the
 * file has nothing of the kind. Caller frees. */
Status gguf_companion(const Gguf *g, const Gguf *towers, const char *name, char **bytes,
                      size_t *size);

/* "model.language_model." or "model.": under which names its adapters go. */
const char *gguf_prefix(const Gguf *g);

/* What is written of a model: `dtype` of its matrices. */
typedef struct GgufModel {
    const ModelConfig *config;
    const char *source; /* folder or GGUF that lends tokenizer, template and generation settings */
    const char *name;   /* general.name */
    DType dtype;
} GgufModel;

/* llama.cpp's number of the mix a file mostly is, by the dtype of its matrices. */
uint32_t gguf_file_type(DType dtype);

/* All of the metadata; `parameters` are those of the text tower. */
Status gguf_put_model(GgufWriter *w, const GgufModel *m, int64_t parameters);

#endif
