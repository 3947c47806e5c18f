/* pattern.h - the regular expressions of adapter files (Python's `re` dialect, through PCRE2). */
#ifndef PATTERN_H
#define PATTERN_H

#include "kernels/status.h"

/* Whether all of `text` matches; ERR_CONFIG when the expression is none, or takes too long. */
Status pattern_matches(bool *matches, const char *expression, const char *text);

#endif
