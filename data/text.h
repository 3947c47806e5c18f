/* text.h - growing text, UTF-8 steps, and the string rules of Python that the chat format follows.
 */
#ifndef TEXT_H
#define TEXT_H

#include "kernels/status.h"

#include <stdint.h>

typedef struct Text {
    char *bytes; /* always ends in a zero that `size` does not count; NULL when nothing was added */
    size_t size, capacity;
} Text;

void text_add(Text *text, const char *bytes, size_t size);
void text_adds(Text *text, const char *string);
void text_addf(Text *text, const char *format, ...) __attribute__((format(printf, 2, 3)));
void text_free(Text *text);

/* A piece of somebody else's text. */
typedef struct Slice {
    const char *bytes;
    size_t size;
} Slice;

static inline bool slice_is(Slice s, const char *string) {
    return __builtin_strlen(string) == s.size && !__builtin_memcmp(s.bytes, string, s.size);
}
Slice slice_of(const char *string);

/* str.strip(): all Unicode whitespace off both ends. */
Slice slice_strip(Slice s);

/* The first place of `needle` at or after `from`; s.size when there is none. */
size_t slice_find(Slice s, const char *needle, size_t from);

/* Bytes of the UTF-8 sequence at s (1 to 4), its code point in *point; 0 when the bytes are no
 * UTF-8. */
int utf8_next(const char *s, size_t size, uint32_t *point);
bool utf8_valid(const char *s, size_t size);
void text_add_point(Text *text, uint32_t point);

/* str.lower() and str.upper(), by code point. */
void text_add_lower(Text *text, Slice s);
void text_add_upper(Text *text, Slice s);

#endif
