/* answer.h - what a model wrote, read back into a message: thinking, content, calls. */
#ifndef ANSWER_H
#define ANSWER_H

#include "data/json.h"

/* Parses generated text after the tail of its prompt (so that a thought the prompt opened is seen)
 * into {role, thinking?, content?, tool_calls?, bad_calls?}. Never fails: a call that cannot be
 * read stays as text in content and is counted in bad_calls. With tools, string arguments are cast
 * to the types they declare. Caller decrefs. */
json_t *answer_parse(Slice prefix, Slice text, const json_t *tools);

/* The released response template's own rule, weak points included: a later piece replaces an
 * earlier one, a call that is not its JSON dialect is an error. */
Status answer_parse_strict(json_t **message, Slice prefix, Slice text, const json_t *tools);

#endif
