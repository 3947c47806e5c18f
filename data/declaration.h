/* declaration.h - functions and values as the chat format writes them. */
#ifndef DECLARATION_H
#define DECLARATION_H

#include "data/json.h"

/* declaration:NAME{description:...,parameters:{...}} of one OpenAI-style tool. */
void declaration_write(Text *out, const json_t *tool);

/* A value: strings between quote tokens, mappings sorted without case; keys bare, or quoted as
 * well. */
void value_write(Text *out, const json_t *value, bool quoted_keys);

/* A mapping with bare keys; {} for anything else. */
void mapping_write(Text *out, const json_t *map);

#endif
