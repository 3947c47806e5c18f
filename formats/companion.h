/* companion.h - the files beside a model's weights, whether it is a folder or one GGUF file.
 *
 * In a folder they are files; of a GGUF they are made from its metadata, so that config, tokenizer,
 * template and generation settings have one reader each. */
#ifndef COMPANION_H
#define COMPANION_H

#include "kernels/status.h"

/* The bytes of model/name, with a zero behind them; NULL when the model has nothing of the kind.
 * Caller frees. */
Status companion_find(char **bytes, size_t *size, const char *model, const char *name);

/* The same of what must be there. */
Status companion_read(char **bytes, size_t *size, const char *model, const char *name);

/* How messages name it: model/name, or model alone when that is a file. Caller frees. */
char *companion_path(const char *model, const char *name);

/* Writes every companion that `model` has, but for config.json, into a folder. */
Status companions_copy(const char *model, const char *dir);

#endif
