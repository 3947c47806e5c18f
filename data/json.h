/* json.h - JSON values the way rows need them, over jansson.
 *
 * Integers and reals stay apart, key order is kept, an integer beyond 64 bits is kept as its
 * digits. */
#ifndef JSON_H
#define JSON_H

#include "data/text.h"

#include <jansson.h>

/* Parses one value. The error says line and reason under `name`. Caller decrefs. */
Status json_read(json_t **value, const char *bytes, size_t size, const char *name);

/* An integer beyond 64 bits: its digits, else NULL. */
const char *json_big_integer(const json_t *value);

/* Text of a string value; empty for anything else. */
Slice json_slice(const json_t *value);

/* What Python's truth is: not null, false, 0, "", [] or {}. */
bool json_truth(const json_t *value);

/* repr(float): the shortest digits that read back, exponent form below 1e-4 and from 1e16. */
void text_add_real(Text *text, double value);

/* A number as the chat format writes it. */
void text_add_number(Text *text, const json_t *value);

/* Compact JSON with the same numbers; strings escaped, non-ASCII kept. */
void text_add_json(Text *text, const json_t *value);
void text_add_json_string(Text *text, Slice s);

#endif
