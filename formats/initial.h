/* initial.h - checkpoints with random weights, as the reference initialises them. */
#ifndef INITIAL_H
#define INITIAL_H

#include "model/gemma.h"

/* Writes a checkpoint folder for a config.json text: linears, embeddings and experts N(0, 0.02),
 * row pad_token_id zero, norms and scales one. Streamed: holds one block of rows. `tokenizer_dir`
 * (or NULL) lends its tokenizer, template and generation files. */
Status initial_checkpoint(const char *config_json, const char *tokenizer_dir, uint64_t seed,
                          DType dtype, const char *dir);

/* The same kind of weights straight into a placed model's memory, wherever that is: no file. What
 * is packed repeats a few rows. Adapters are left alone. ERR_IO: no memory. */
Status initial_values(Gemma *g, uint64_t seed);

/* The same weights, rounded to bf16 and then to `dtype`, straight as one GGUF file. */
Status initial_gguf(const char *config_json, const char *tokenizer_dir, uint64_t seed, DType dtype,
                    const char *path);

#endif
