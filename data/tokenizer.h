/* tokenizer.h - byte-pair encoding read from a tokenizer.json of Gemma 4's structure.
 *
 * Added tokens are found first, leftmost and longest; a space becomes U+2581; what is left is one
 * word of code points (or byte tokens) merged by rank. Nothing is normalised, nothing is put in
 * front. */
#ifndef TOKENIZER_H
#define TOKENIZER_H

#include "data/text.h"

typedef struct Tokenizer Tokenizer;

/* A byte range of text in which added tokens are not recognised. */
typedef struct Range {
    size_t begin, end;
} Range;

typedef struct Tokens {
    int32_t *ids;
    uint32_t *ends; /* byte of the text after each token; NULL unless asked for */
    int64_t count, capacity;
} Tokens;

/* Reads DIR/tokenizer.json. A structure other than Gemma 4's is an error. */
Status tokenizer_load(Tokenizer **t, const char *dir);
Status tokenizer_parse(Tokenizer **t, const char *json, size_t size, const char *name);
void tokenizer_free(Tokenizer *t); /* accepts NULL */

/* One more than the largest id. */
int64_t tokenizer_size(const Tokenizer *t);

/* SHA-256 of tokenizer.json. */
const char *tokenizer_hash(const Tokenizer *t);

/* The id of a token's exact text, or -1. */
int32_t tokenizer_find(const Tokenizer *t, const char *text);
bool tokenizer_is_special(const Tokenizer *t, int32_t id);

/* Whether the id stands for one byte of a text: only runs of them that are UTF-8 are text. */
bool tokenizer_is_byte(const Tokenizer *t, int32_t id);
int tokenizer_byte(const Tokenizer *t, int32_t id); /* which; -1: none */

/* The first byte of what the id decodes to; -1 for special and unknown ones. */
int tokenizer_first_byte(const Tokenizer *t, int32_t id);

/* Appends the ids of valid UTF-8 text. `literal`: ascending ranges without added tokens. With
 * `ends` the byte after each token is kept too. */
void tokenizer_encode(const Tokenizer *t, Tokens *out, const char *text, size_t size,
                      const Range *literal, int literals, bool ends);
void tokens_add(Tokens *tokens, int32_t id);
void tokens_free(Tokens *tokens);

/* Appends the text of ids; runs of byte tokens that are no UTF-8 become U+FFFD. Unknown ids are
 * skipped. */
void tokenizer_decode(const Tokenizer *t, Text *out, const int32_t *ids, int64_t count,
                      bool skip_special);

#endif
