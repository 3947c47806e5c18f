/* math_answer.c - string rules, kept in the order of their authors. */
#include "eval/math_answer.h"
#include "eval/latex.h"
#include "eval/regex.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static Slice slice_text(const Text *t) {
    return (Slice){t->bytes ? t->bytes : "", t->size};
}

static Slice after(Slice s, size_t from) {
    return (Slice){s.bytes + from, s.size - from};
}

static bool begins(Slice s, const char *word) {
    size_t n = strlen(word);
    return s.size >= n && !memcmp(s.bytes, word, n);
}

/* The last place of `needle`; s.size when there is none. */
static size_t find_last(Slice s, const char *needle) {
    size_t n = strlen(needle);
    for (size_t i = s.size + 1; i-- > 0;)
        if (n <= s.size - i && !memcmp(s.bytes + i, needle, n)) return i;
    return s.size;
}

static size_t count_of(Slice s, const char *needle) {
    size_t n = 0;
    for (size_t at = 0; (at = slice_find(s, needle, at)) < s.size; at += strlen(needle)) n++;
    return n;
}

static void replace(Text *t, const char *what, const char *by) {
    Text out = {0};
    size_t done = 0, n = strlen(what);
    Slice s = slice_text(t);
    text_add(&out, "", 0);
    for (size_t at; (at = slice_find(s, what, done)) < s.size; done = at + n) {
        text_add(&out, s.bytes + done, at - done);
        text_adds(&out, by);
    }
    text_add(&out, s.bytes + done, s.size - done);
    text_free(t);
    *t = out;
}

static void substitute(Text *t, const char *pattern, const char *by) {
    Text out = {0};
    Regex *r = regex_get(pattern, 0);
    regex_replace(&out, r, slice_text(t), by);
    regex_close(r);
    text_free(t);
    *t = out;
}

/* The end of the balanced braces that open at or after `from`; 0: they never close. */
static size_t closing(Slice s, size_t from) {
    int open = 0;
    for (size_t i = from; i < s.size; i++) {
        open += s.bytes[i] == '{';
        open -= s.bytes[i] == '}';
        if (s.bytes[i] == '}' && open == 0) return i + 1;
    }
    return 0;
}

bool last_boxed(Slice text, Slice *content) {
    size_t spaced = find_last(text, "\\boxed "), at = find_last(text, "\\boxed");
    if (spaced < text.size) { /* \boxed 5: up to the next $ */
        Slice rest = after(text, spaced + 7);
        *content = (Slice){rest.bytes, slice_find(rest, "$", 0)};
        return true;
    }
    bool framed = at == text.size;
    if (framed && (at = find_last(text, "\\fbox")) == text.size) return false;
    size_t end = closing(text, at);
    if (!end) return false;
    *content = (Slice){text.bytes + at, end - at};
    if (begins(*content, "\\boxed{"))
        *content = (Slice){content->bytes + 7, content->size - 8};
    else if (!framed)
        return false;
    return true;
}

Slice between_dollars(Slice text) {
    size_t first = slice_find(text, "$", 0), last = find_last(text, "$");
    return first == last ? text : (Slice){text.bytes + first + 1, last - first - 1};
}

/* ---- MATH ---- */

/* Code points rather than bytes are what these rules count. */
static size_t point_size(Slice s) {
    uint32_t point;
    int n = utf8_next(s.bytes, s.size, &point);
    return n > 0 ? (size_t)n : s.size ? 1 : 0;
}

/* \sqrt3 to \sqrt{3}; false where nothing follows. */
static bool brace_roots(Text *t) {
    Text out = {0};
    Slice s = slice_text(t);
    size_t at = slice_find(s, "\\sqrt", 0);
    text_add(&out, s.bytes, at);
    while (at < s.size) {
        size_t next = slice_find(s, "\\sqrt", at + 5);
        Slice piece = {s.bytes + at + 5, next - at - 5};
        if (!piece.size) {
            text_free(&out);
            return false;
        }
        text_adds(&out, "\\sqrt");
        size_t n = *piece.bytes == '{' ? 0 : point_size(piece);
        if (n) {
            text_adds(&out, "{");
            text_add(&out, piece.bytes, n);
            text_adds(&out, "}");
        }
        text_add(&out, piece.bytes + n, piece.size - n);
        at = next;
    }
    text_free(t);
    *t = out;
    return true;
}

/* \frac12 to \frac{1}{2}, \frac1{72} to \frac{1}{72}; false where a piece is empty. A piece of one
 * character leaves all as it was. */
static bool brace_fractions(Text *t) {
    Text out = {0};
    Slice s = slice_text(t);
    size_t at = slice_find(s, "\\frac", 0);
    bool whole = true, good = true;
    text_add(&out, s.bytes, at);
    while (at < s.size && whole && good) {
        size_t next = slice_find(s, "\\frac", at + 5);
        Slice piece = {s.bytes + at + 5, next - at - 5};
        text_adds(&out, "\\frac");
        at = next;
        if (!piece.size) {
            good = false;
        } else if (*piece.bytes == '{') {
            text_add(&out, piece.bytes, piece.size);
        } else {
            size_t a = point_size(piece), b = point_size(after(piece, a));
            if (!b) {
                whole = false;
                break;
            }
            text_addf(&out, "{%.*s}", (int)a, piece.bytes);
            bool braced = piece.bytes[a] == '{';
            text_addf(&out, braced ? "%.*s" : "{%.*s}", (int)b, piece.bytes + a);
            text_add(&out, piece.bytes + a + b, piece.size - a - b);
        }
    }
    if (whole && good) {
        text_free(t);
        *t = out;
    } else {
        text_free(&out);
    }
    return good;
}

/* An integer as Python's int() reads it and prints it back. */
static bool is_integer(Slice s) {
    size_t i = s.size && *s.bytes == '-';
    if (i == s.size || (s.bytes[i] == '0' && s.size > 1)) return false;
    for (; i < s.size; i++)
        if (s.bytes[i] < '0' || s.bytes[i] > '9') return false;
    return true;
}

/* What int() takes at all: a sign, digits, underscores, white space around. */
static bool int_reads(Slice s) {
    return text_has(slice_strip(s), "\\A[+-]?\\d+(_\\d+)*\\z", 0);
}

/* false where the harness's rule breaks off. */
static bool slash_to_fraction(Text *t) {
    Slice s = slice_text(t);
    size_t slash = slice_find(s, "/", 0);
    if (count_of(s, "/") != 1) return true;
    Slice a = {s.bytes, slash}, b = after(s, slash + 1);
    if (!int_reads(a) || !int_reads(b)) return false;
    if (!is_integer(a) || !is_integer(b)) return true;
    Text out = {0};
    text_addf(&out, "\\frac{%.*s}{%.*s}", (int)a.size, a.bytes, (int)b.size, b.bytes);
    text_free(t);
    *t = out;
    return true;
}

static int64_t points_in(Slice s) {
    int64_t n = 0;
    for (size_t i = 0; i < s.size; i++) n += (s.bytes[i] & 0xc0) != 0x80;
    return n;
}

Text math_normal(Slice answer, bool *odd) {
    static const char *const edits[][2] = {
        {"\n", ""},     {"\\!", ""},     {"\\\\", "\\"},    {"tfrac", "frac"}, {"dfrac", "frac"},
        {"\\left", ""}, {"\\right", ""}, {"^{\\circ}", ""}, {"^\\circ", ""},   {"\\$", ""}};
    Text t = {0};
    text_add(&t, answer.bytes, answer.size);
    *odd = false;
    for (size_t i = 0; i < sizeof edits / sizeof *edits; i++) replace(&t, edits[i][0], edits[i][1]);
    size_t units = count_of(slice_text(&t), "\\text{ ");
    if (units > 1) goto odd;
    if (units) t.bytes[t.size = slice_find(slice_text(&t), "\\text{ ", 0)] = 0;
    replace(&t, "\\%", "");
    replace(&t, " .", " 0.");
    replace(&t, "{.", "{0.");
    if (!t.size) return t;
    if (*t.bytes == '.') {
        Text zero = {0};
        text_addf(&zero, "0%s", t.bytes);
        text_free(&t);
        t = zero;
    }
    if (count_of(slice_text(&t), "=") == 1) {
        size_t at = slice_find(slice_text(&t), "=", 0);
        if (points_in((Slice){t.bytes, at}) <= 2) {
            memmove(t.bytes, t.bytes + at + 1, t.size - at);
            t.size -= at + 1;
        }
    }
    if (!brace_roots(&t)) goto odd;
    replace(&t, " ", "");
    if (!brace_fractions(&t)) goto odd;
    if (slice_is(slice_text(&t), "0.5")) replace(&t, "0.5", "\\frac{1}{2}");
    if (!slash_to_fraction(&t)) goto odd;
    return t;
odd:
    *odd = true;
    t.size = 0;
    text_add(&t, answer.bytes, answer.size);
    return t;
}

bool math_equal(Slice a, Slice b) {
    bool odd_a, odd_b;
    Text x = math_normal(a, &odd_a), y = math_normal(b, &odd_b);
    bool same = x.size == y.size && !memcmp(x.bytes, y.bytes, x.size);
    if (odd_a || odd_b) same = a.size == b.size && !memcmp(a.bytes, b.bytes, a.size);
    text_free(&x);
    text_free(&y);
    return same;
}

/* ---- Minerva ---- */

Slice minerva_answer(Slice text) {
    Text closed = {0};
    text_add(&closed, text.bytes, text.size);
    text_adds(&closed, "I hope it is correct.");
    Regex *r = regex_get("Final Answer: The final answer is(.*?). I hope it is correct.", 0);
    size_t from = 0;
    Match m;
    Slice found = slice_of("[invalidanswer]");
    if (regex_next(r, slice_text(&closed), &from, &m)) { /* it lies in the text as given */
        size_t at = (size_t)(m.groups[0].bytes - closed.bytes);
        size_t size = m.groups[0].size;
        if (at > text.size) at = text.size;
        if (at + size > text.size) size = text.size - at;
        found = slice_strip((Slice){text.bytes + at, size});
    }
    regex_close(r);
    text_free(&closed);
    return found;
}

/* Units and words that answers carry, which count for nothing. */
static const char *const minerva_words[] = {
    "square",   "ways",    "integers", "dollars",  "mph",
    "inches",   "ft",      "hours",    "km",       "units",
    "sue",      "points",  "feet",     "minutes",  "digits",
    "cents",    "degrees", "cm",       "gm",       "pounds",
    "meters",   "meals",   "edges",    "students", "childrentickets",
    "multiples"};
#define MINERVA_WORDS (sizeof minerva_words / sizeof *minerva_words)

/* Removes a word wherever it stands, except within a LaTeX command's name. */
static void remove_glued(Text *t, const char *word) {
    Text out = {0};
    Regex *r = regex_get("\\\\[a-zA-Z]+", 0);
    Slice s = slice_text(t);
    size_t from = 0, done = 0;
    Match m;
    text_add(&out, "", 0);
    for (bool more = true; more;) {
        more = regex_next(r, s, &from, &m);
        size_t end = more ? (size_t)(m.whole.bytes - s.bytes) : s.size;
        Text plain = {0};
        text_add(&plain, s.bytes + done, end - done);
        replace(&plain, word, "");
        text_add(&out, plain.bytes, plain.size);
        text_free(&plain);
        if (more) text_add(&out, m.whole.bytes, m.whole.size);
        done = end + (more ? m.whole.size : 0);
    }
    regex_close(r);
    text_free(t);
    *t = out;
}

Text minerva_normal(Slice answer) {
    static const char *const edits[][2] = {{"an ", ""},          {"a ", ""},
                                           {".$", "$"},          {"\\$", ""},
                                           {"\\ ", ""},          {" ", ""},
                                           {"mbox", "text"},     {",\\text{and}", ","},
                                           {"\\text{and}", ","}, {"\\text{m}", "\\text{}"}};
    /* In the order of the paper; NULL stands for the plain words at that place. */
    static const char *const removed[] = {"\\ldots",      "\\text{s}",  "\\text{.}",  "\\text{\ns}",
                                          "\\text{}^2",   "\\text{}^3", "\\text{\n}", "\\text{}",
                                          "\\mathrm{th}", "^\\circ",    "^{\\circ}",  "\\;",
                                          ",\\!",         "{,}",        "\"",         "\\dots"};
    static const char *const shapes[][2] = {{"(.*?)(\\$)(.*?)(\\$)(.*)", "$\\3$"},
                                            {"(\\\\text\\{)(.*?)(\\})", "\\2"},
                                            {"(\\\\textbf\\{)(.*?)(\\})", "\\2"},
                                            {"(\\\\overline\\{)(.*?)(\\})", "\\2"},
                                            {"(\\\\boxed\\{)(.*)(\\})", "\\2"},
                                            {"(frac)([^{])(.)", "frac{\\2}{\\3}"},
                                            {"(sqrt)(\\[[^\\]]*\\])(\\w)", "\\1\\2{\\3}"},
                                            {"(sqrt)(?!\\[)([^{])", "sqrt{\\2}"}};
    size_t equals = find_last(answer, "=");
    Text t = {0};
    if (equals < answer.size) answer = after(answer, equals + 1);
    text_add(&t, answer.bytes, answer.size);
    for (size_t i = 0; i < MINERVA_WORDS; i++) {
        char pattern[64];
        snprintf(pattern, sizeof pattern, "(?<!\\\\)\\b%s\\b", minerva_words[i]);
        substitute(&t, pattern, "");
    }
    for (size_t i = 0; i < sizeof edits / sizeof *edits; i++) replace(&t, edits[i][0], edits[i][1]);
    for (size_t i = 0; i < MINERVA_WORDS; i++) {
        remove_glued(&t, minerva_words[i]);
        if (!strcmp(minerva_words[i], "units")) replace(&t, removed[0], "");
    }
    for (size_t i = 1; i < sizeof removed / sizeof *removed; i++) replace(&t, removed[i], "");
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        substitute(&t, shapes[i][0], shapes[i][1]);
    replace(&t, "$", "");
    if (text_has(slice_text(&t), "\\A-?\\d{1,3}(,\\d{3})+\\z", 0)) replace(&t, ",", "");
    return t;
}

bool minerva_equal(Slice a, Slice b) {
    if (a.size && a.size == b.size && !memcmp(a.bytes, b.bytes, a.size)) return true;
    return latex_equal(a, b);
}

/* ---- by value, wherever the answer stands ---- */

/* The last box, else the last $...$ or \(...\), else the last number. */
static bool find_answer(Slice text, Slice *answer) {
    static const char *const patterns[] = {"\\$\\$?([^$]+)\\$", "\\\\\\((.+?)\\\\\\)",
                                           "\\\\\\[(.+?)\\\\\\]", "-?\\d[\\d,]*(?:\\.\\d+)?"};
    if (last_boxed(text, answer)) return true;
    for (size_t i = 0; i < sizeof patterns / sizeof *patterns; i++) {
        Regex *r = regex_get(patterns[i], 0);
        size_t from = 0;
        Match m;
        bool found = false;
        while (regex_next(r, text, &from, &m))
            *answer = m.count ? m.groups[0] : m.whole, found = true;
        regex_close(r);
        if (found) return true;
    }
    return false;
}

bool math_verified(Slice solution, Slice response) {
    Slice gold, mine;
    if (!find_answer(solution, &gold) || !find_answer(response, &mine)) return false;
    Text a = minerva_normal(gold), b = minerva_normal(mine);
    bool same = minerva_equal(slice_text(&a), slice_text(&b));
    text_free(&a);
    text_free(&b);
    return same;
}

/* ---- MathArena ---- */

bool matharena_answer(Slice text, double *value, int *warning) {
    Text t = {0};
    Slice content, last = {NULL, 0};
    bool found = false;
    text_add(&t, text.bytes, text.size);
    replace(&t, "\xe2\x88\x92", "-"); /* the minus sign */
    *warning = 0;
    size_t boxed = find_last(slice_text(&t), "\\boxed"),
           framed = find_last(slice_text(&t), "\\fbox");
    size_t at = boxed == t.size ? framed : framed == t.size || boxed > framed ? boxed : framed;
    size_t end = at < t.size ? closing(slice_text(&t), at) : 0;
    if (end) {
        size_t open = slice_find(slice_text(&t), "{", at);
        content = (Slice){t.bytes + open + 1, end - open - 2};
        size_t equals = find_last(content, "=");
        if (equals < content.size) content = after(content, equals + 1);
        Text plain = {0};
        text_add(&plain, content.bytes, content.size);
        substitute(&plain, "\\\\text\\{[^{}]*\\}", "");
        found = latex_number(slice_strip(slice_text(&plain)), value);
        text_free(&plain);
    }
    if (!found) {
        Regex *r = regex_get("(?<![\\w.])-?\\d+(?![\\w])", 0);
        size_t from = 0;
        Match m;
        while (regex_next(r, slice_text(&t), &from, &m)) last = m.whole;
        regex_close(r);
        *warning = 3;
        found = last.size > 0 && last.size < 18;
        if (found) {
            char digits[32] = {0};
            memcpy(digits, last.bytes, last.size);
            *value = strtod(digits, NULL);
        }
    }
    text_free(&t);
    return found;
}
