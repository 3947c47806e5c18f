/* regex.h - Python's `re` as rules use it, over PCRE2: Unicode classes, `.` stops at \n only. */
#ifndef REGEX_EVAL_H
#define REGEX_EVAL_H

#include "data/text.h"

typedef struct Regex Regex;

enum { REGEX_IGNORE_CASE = 1, REGEX_MULTILINE = 2 };

/* ERR_CONFIG with the reason when the pattern is none. */
Status regex_open(Regex **r, const char *pattern, int flags);
void regex_close(Regex *r);

/* A pattern of our own, which is known to be one. */
Regex *regex_get(const char *pattern, int flags);

#define REGEX_GROUPS 8

/* A match, and its groups: bytes NULL where a group took no part. */
typedef struct Match {
    Slice whole, groups[REGEX_GROUPS];
    int count; /* of groups in the pattern */
} Match;

/* The next match at or after *from, which moves behind it; as re.finditer goes on. A text that is
 * not UTF-8 has none. */
bool regex_next(const Regex *r, Slice text, size_t *from, Match *m);

/* Whether the pattern is found; the same for one of our own. */
bool regex_found(const Regex *r, Slice text);
bool text_has(Slice text, const char *pattern, int flags);
int64_t text_count(Slice text, const char *pattern, int flags);

/* Appends text with every match replaced; \1 to \7 in `by` are groups. */
void regex_replace(Text *out, const Regex *r, Slice text, const char *by);

#endif
