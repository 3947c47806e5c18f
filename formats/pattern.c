/* pattern.c - one full match. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "formats/pattern.h"

#include <pcre2.h>

Status pattern_matches(bool *matches, const char *expression, const char *text) {
    int code;
    PCRE2_SIZE at;
    pcre2_code *compiled =
        pcre2_compile((PCRE2_SPTR)expression, PCRE2_ZERO_TERMINATED,
                      PCRE2_ANCHORED | PCRE2_ENDANCHORED | PCRE2_UTF, &code, &at, NULL);
    if (!compiled) {
        PCRE2_UCHAR reason[160];
        pcre2_get_error_message(code, reason, sizeof reason);
        FAIL(ERR_CONFIG, "pattern '%s': %s at character %zu", expression, (char *)reason,
             (size_t)at);
    }
    pcre2_match_data *data = pcre2_match_data_create_from_pattern(compiled, NULL);
    pcre2_match_context *limits = pcre2_match_context_create(NULL);
    pcre2_set_match_limit(limits, 1000000);
    int found = pcre2_match(compiled, (PCRE2_SPTR)text, PCRE2_ZERO_TERMINATED, 0, 0, data, limits);
    pcre2_match_context_free(limits);
    pcre2_match_data_free(data);
    pcre2_code_free(compiled);
    if (found < 0 && found != PCRE2_ERROR_NOMATCH)
        FAIL(ERR_CONFIG, "pattern '%s' cannot be matched against '%s'", expression, text);
    *matches = found >= 0;
    return OK;
}
