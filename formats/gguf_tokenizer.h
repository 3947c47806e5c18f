/* gguf_tokenizer.h - tokenizer.json as GGUF metadata, and back. */
#ifndef GGUF_TOKENIZER_H
#define GGUF_TOKENIZER_H

#include "formats/gguf.h"

/* A tokenizer.json of Gemma 4's structure from tokenizer.ggml.*; caller frees. */
Status gguf_tokenizer_json(const Gguf *g, char **json);

/* tokenizer.ggml.* and the chat template of a model folder or GGUF. */
Status gguf_put_tokenizer(GgufWriter *w, const char *source);

#endif
