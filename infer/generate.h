/* generate.h - one answer from prompt to stop. */
#ifndef GENERATE_H
#define GENERATE_H

#include "infer/engine.h"
#include "infer/soft.h"

/* Generates after `prompt`, whose media are `media` (NULL: none), until a stop token (kept) or
 * max_tokens. `show`, if given, is called after each token. kv: how keys and values are kept
 * (kv_dtype). ids: those of the answer, added to; *text: without the stop token. draft: an
 * assistant's folder, or NULL. *counts, if given, says what the engine did. */
Status generate(Model *m, const Tokens *prompt, const SoftMedia *media, const Sampling *s,
                const char *kv, const char *draft, Tokens *ids, Text *text, SequenceFunction *show,
                void *context, EngineCounts *counts);

#endif
