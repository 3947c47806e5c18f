/* regex.c - matching, one match after the other. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "eval/regex.h"

#include <pcre2.h>
#include <stdlib.h>

#define MATCH_LIMIT 10000000

struct Regex {
    pcre2_code *code;
    pcre2_match_data *data;
    pcre2_match_context *limits;
    int groups;
};

Status regex_open(Regex **out, const char *pattern, int flags) {
    int reason_code;
    PCRE2_SIZE at;
    uint32_t groups, options = PCRE2_UTF | PCRE2_UCP;
    if (flags & REGEX_IGNORE_CASE) options |= PCRE2_CASELESS;
    if (flags & REGEX_MULTILINE) options |= PCRE2_MULTILINE;
    pcre2_compile_context *lines = pcre2_compile_context_create(NULL);
    pcre2_set_newline(lines, PCRE2_NEWLINE_LF);
    pcre2_code *code = pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED, options,
                                     &reason_code, &at, lines);
    pcre2_compile_context_free(lines);
    if (!code) {
        PCRE2_UCHAR reason[160];
        pcre2_get_error_message(reason_code, reason, sizeof reason);
        FAIL(ERR_CONFIG, "pattern '%s': %s at character %zu", pattern, (char *)reason, (size_t)at);
    }
    pcre2_pattern_info(code, PCRE2_INFO_CAPTURECOUNT, &groups);
    Regex *r = must_calloc(1, sizeof *r);
    *r = (Regex){code, pcre2_match_data_create_from_pattern(code, NULL),
                 pcre2_match_context_create(NULL), (int)groups};
    pcre2_set_match_limit(r->limits, MATCH_LIMIT);
    *out = r;
    return OK;
}

void regex_close(Regex *r) {
    if (!r) return;
    pcre2_match_context_free(r->limits);
    pcre2_match_data_free(r->data);
    pcre2_code_free(r->code);
    free(r);
}

Regex *regex_get(const char *pattern, int flags) {
    Regex *r;
    CHECK(regex_open(&r, pattern, flags) == OK, "%s", status_message());
    return r;
}

static Slice group_of(Slice text, const PCRE2_SIZE *ends, int i, int found) {
    if (i >= found || ends[2 * i] == PCRE2_UNSET) return (Slice){NULL, 0};
    return (Slice){text.bytes + ends[2 * i], ends[2 * i + 1] - ends[2 * i]};
}

/* After an empty match the next may start at the same place but may not be empty. *from holds the
 * place in its upper bits and in the lowest whether the last match was empty. */
bool regex_next(const Regex *r, Slice text, size_t *from, Match *m) {
    size_t at = *from >> 1;
    uint32_t options = *from & 1 ? PCRE2_NOTEMPTY_ATSTART : 0;
    if (at > text.size) return false;
    int found = pcre2_match(r->code, (PCRE2_SPTR)(text.bytes ? text.bytes : ""), text.size, at,
                            options, r->data, r->limits);
    if (found < 0) return false;
    const PCRE2_SIZE *ends = pcre2_get_ovector_pointer(r->data);
    m->whole = group_of(text, ends, 0, found);
    m->count = r->groups < REGEX_GROUPS ? r->groups : REGEX_GROUPS;
    for (int i = 0; i < m->count; i++) m->groups[i] = group_of(text, ends, i + 1, found);
    *from = ends[1] << 1 | (ends[1] == ends[0]);
    return true;
}

bool regex_found(const Regex *r, Slice text) {
    size_t from = 0;
    Match m;
    return regex_next(r, text, &from, &m);
}

bool text_has(Slice text, const char *pattern, int flags) {
    Regex *r = regex_get(pattern, flags);
    bool found = regex_found(r, text);
    regex_close(r);
    return found;
}

int64_t text_count(Slice text, const char *pattern, int flags) {
    Regex *r = regex_get(pattern, flags);
    size_t from = 0;
    Match m;
    int64_t count = 0;
    while (regex_next(r, text, &from, &m)) count++;
    regex_close(r);
    return count;
}

void regex_replace(Text *out, const Regex *r, Slice text, const char *by) {
    size_t from = 0, done = 0;
    Match m;
    text_add(out, "", 0);
    while (regex_next(r, text, &from, &m)) {
        size_t begin = (size_t)(m.whole.bytes - text.bytes);
        text_add(out, text.bytes + done, begin - done);
        for (const char *c = by; *c; c++) {
            if (*c == '\\' && c[1] >= '1' && c[1] <= '7') {
                Slice group = m.groups[*++c - '1'];
                if (group.bytes) text_add(out, group.bytes, group.size);
            } else {
                text_add(out, c, 1);
            }
        }
        done = begin + m.whole.size;
    }
    text_add(out, text.bytes + done, text.size - done);
}
