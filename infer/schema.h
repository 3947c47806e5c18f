/* schema.h - grammars of JSON schemas and of calls of declared functions. */
#ifndef SCHEMA_H
#define SCHEMA_H

#include "data/json.h"
#include "infer/grammar.h"

/* JSON that fits a schema; NULL: any object. Objects have the properties that are listed, in that
 * order, those not required may be missing. With `tools` calls of those may stand in its place.
 * ERR_CONFIG names what of a schema is not understood. */
Status grammar_json(Grammar **g, const json_t *schema, const Tokenizer *t, const json_t *tools);

/* Calls in Gemma 4's notation, of any of the functions (a list of declarations), or of `name`
 * alone. `whole`: one call or several, marks and all, are the whole answer; else what follows
 * <|tool_call> up to its end. Of the schemas of arguments the types, enums and required properties
 * hold; the rest is the model's to keep. ERR_USAGE where no function has the name. */
Status grammar_calls(Grammar **g, const Tokenizer *t, const json_t *tools, const char *name,
                     bool whole);

#endif
