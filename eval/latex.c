/* latex.c - a recursive descent over the text that computes as it goes. */
#include "eval/latex.h"
#include "kernels/random.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define POINTS    8
#define DEPTH_MAX 64

typedef struct Reader {
    Slice s;
    size_t at;
    int point, depth, variables;
    bool failed;
} Reader;

static double sum_of(Reader *r);

static void skip_space(Reader *r) {
    static const char *const nothing[] = {"\\,", "\\;", "\\!",    "\\:",     "\\ ",
                                          "~",   "$",   "\\left", "\\right", "\\displaystyle"};
    for (bool any = true; any;) {
        any = false;
        while (r->at < r->s.size && (r->s.bytes[r->at] == ' ' || r->s.bytes[r->at] == '\n'))
            r->at++, any = true;
        for (size_t i = 0; i < sizeof nothing / sizeof *nothing; i++) {
            size_t n = strlen(nothing[i]);
            if (n > r->s.size - r->at || memcmp(r->s.bytes + r->at, nothing[i], n)) continue;
            char next = r->at + n < r->s.size ? r->s.bytes[r->at + n] : 0;
            bool longer = n > 2 && ((next >= 'a' && next <= 'z') || (next >= 'A' && next <= 'Z'));
            if (longer) continue; /* \leftarrow is another word */
            r->at += n;
            any = true;
        }
    }
}

static char peek(Reader *r) {
    skip_space(r);
    return r->at < r->s.size ? r->s.bytes[r->at] : 0;
}

static bool accept(Reader *r, const char *word) {
    size_t n = strlen(word);
    skip_space(r);
    if (n > r->s.size - r->at || memcmp(r->s.bytes + r->at, word, n)) return false;
    if (*word == '\\' && n > 1) { /* a command ends where its letters do */
        char next = r->at + n < r->s.size ? r->s.bytes[r->at + n] : 0;
        bool letter = (word[n - 1] >= 'a' && word[n - 1] <= 'z');
        if (letter && ((next >= 'a' && next <= 'z') || (next >= 'A' && next <= 'Z'))) return false;
    }
    r->at += n;
    return true;
}

static double fail(Reader *r) {
    r->failed = true;
    return 0;
}

/* {expression}, or the one character or command that stands for it: \frac12. */
static double argument(Reader *r) {
    if (accept(r, "{")) {
        double x = sum_of(r);
        return accept(r, "}") ? x : fail(r);
    }
    char c = peek(r);
    if (c >= '0' && c <= '9') {
        r->at++;
        return c - '0';
    }
    if (!c) return fail(r);
    Reader one = *r;
    size_t n = 1;
    if (c == '\\')
        while (r->at + n < r->s.size && r->s.bytes[r->at + n] >= 'a' &&
               r->s.bytes[r->at + n] <= 'z')
            n++;
    one.s.size = r->at + n;
    double x = sum_of(&one);
    r->failed |= one.failed || one.at < one.s.size;
    r->variables |= one.variables;
    r->at += n;
    return x;
}

static double variable(Reader *r, Slice name) {
    char text[32] = {0};
    memcpy(text, name.bytes, name.size < 31 ? name.size : 31);
    r->variables++;
    return 0.5 + 1.5 * random_uniform_double(random_key_name(17, text), (uint64_t)r->point);
}

/* Digits with a point, and commas between groups of three. */
static double number(Reader *r) {
    char digits[64];
    size_t n = 0;
    while (r->at < r->s.size && n + 1 < sizeof digits) {
        char c = r->s.bytes[r->at];
        bool group = c == ',' && n && r->at + 3 < r->s.size;
        for (size_t k = 1; group && k <= 3; k++)
            group = r->s.bytes[r->at + k] >= '0' && r->s.bytes[r->at + k] <= '9';
        if (group && r->at + 4 < r->s.size)
            group = r->s.bytes[r->at + 4] < '0' || r->s.bytes[r->at + 4] > '9';
        if ((c >= '0' && c <= '9') || c == '.')
            digits[n++] = c;
        else if (!group)
            break;
        r->at++;
    }
    digits[n] = 0;
    char *end;
    double x = strtod(digits, &end);
    return n && !*end ? x : fail(r);
}

/* \text{...} and the like: units and words count for nothing; a number inside does. */
static bool skip_words(Reader *r, double *x) {
    static const char *const words[] = {"\\text", "\\mbox", "\\mathrm", "\\textbf", "\\mathbf"};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        size_t before = r->at;
        if (!accept(r, words[i])) continue;
        if (!accept(r, "{")) {
            r->at = before;
            return false;
        }
        size_t end = r->at;
        while (end < r->s.size && r->s.bytes[end] != '}') end++;
        Reader inner = *r;
        inner.s.size = end;
        *x = sum_of(&inner);
        if (inner.failed || inner.variables > r->variables || inner.at < end) *x = 1;
        r->at = end < r->s.size ? end + 1 : end;
        return true;
    }
    return false;
}

static bool function(Reader *r, double *x);
static double power_of(Reader *r);
static bool starts_atom(Reader *r);

/* What a function without braces takes: factors up to the next sign or function. */
static double operand(Reader *r) {
    bool bracket = peek(r) == '(';
    double x = power_of(r), ignored;
    while (!bracket && !r->failed && starts_atom(r)) {
        Reader ahead = *r;
        if (function(&ahead, &ignored)) break;
        x *= power_of(r);
    }
    return x;
}

static bool function(Reader *r, double *x) {
    static const struct {
        const char *name;
        double (*f)(double);
    } functions[] = {{"\\sin", sin},     {"\\cos", cos},     {"\\tan", tan},
                     {"\\arcsin", asin}, {"\\arccos", acos}, {"\\arctan", atan},
                     {"\\ln", log},      {"\\log", log10},   {"\\exp", exp}};
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++)
        if (accept(r, functions[i].name)) {
            double base = 0, power = 1;
            if (i == 7 && accept(r, "_")) base = argument(r);
            if (accept(r, "^")) power = argument(r);
            double value = peek(r) == '{' ? argument(r) : operand(r);
            *x = base > 0 ? log(value) / log(base) : functions[i].f(value);
            *x = power == -1 ? NAN : pow(*x, power);
            return true;
        }
    return false;
}

static double atom(Reader *r) {
    double x, low;
    char c = peek(r);
    if (r->failed || r->depth > DEPTH_MAX) return fail(r);
    if ((c >= '0' && c <= '9') || c == '.') return number(r);
    if (accept(r, "\\frac") || accept(r, "\\dfrac") || accept(r, "\\tfrac") ||
        accept(r, "\\cfrac")) {
        x = argument(r);
        return x / argument(r);
    }
    if (accept(r, "\\sqrt")) {
        double root = 2;
        if (accept(r, "[")) {
            root = sum_of(r);
            if (!accept(r, "]")) return fail(r);
        }
        return pow(argument(r), 1 / root);
    }
    if (accept(r, "\\binom") || accept(r, "\\dbinom")) {
        x = argument(r);
        low = argument(r);
        return exp(lgamma(x + 1) - lgamma(low + 1) - lgamma(x - low + 1));
    }
    if (accept(r, "\\pi")) return 3.14159265358979323846;
    if (accept(r, "\\boxed")) return argument(r);
    if (skip_words(r, &x) || function(r, &x)) return x;
    static const char *const open[] = {"(", "[", "{", "\\{", "|"}, *const close[] = {")", "]", "}",
                                                                                     "\\}", "|"};
    for (int i = 0; i < 5; i++)
        if (accept(r, open[i])) {
            r->depth++;
            x = sum_of(r);
            r->depth--;
            if (!accept(r, close[i])) return fail(r);
            return i == 4 ? fabs(x) : x;
        }
    if (c == 'e' && !(r->at + 1 < r->s.size && r->s.bytes[r->at + 1] >= 'a')) {
        r->at++;
        return 2.71828182845904523536;
    }
    if ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '\\') {
        size_t n = 1;
        while (c == '\\' && r->at + n < r->s.size &&
               ((r->s.bytes[r->at + n] | 32) >= 'a' && (r->s.bytes[r->at + n] | 32) <= 'z'))
            n++;
        if (c == '\\' && n == 1) return fail(r);
        Slice name = {r->s.bytes + r->at, n};
        r->at += n;
        if (r->at < r->s.size && r->s.bytes[r->at] == '_') { /* an index is part of the name */
            size_t end = r->at + 1;
            bool braced = end < r->s.size && r->s.bytes[end] == '{';
            while (end < r->s.size && (braced ? r->s.bytes[end] != '}' : end == r->at + 1)) end++;
            if (braced && end < r->s.size) end++;
            r->at = end;
            name.size = (size_t)(r->s.bytes + end - name.bytes);
        }
        return variable(r, name);
    }
    return fail(r);
}

/* Powers, factorials, percent signs and degrees behind an atom. */
static double power_of(Reader *r) {
    double x = atom(r);
    while (!r->failed) {
        if (accept(r, "^\\circ") || accept(r, "^{\\circ}") || accept(r, "\\circ")) continue;
        if (accept(r, "^")) {
            bool minus = accept(r, "-");
            double y = peek(r) == '{' || minus || peek(r) == '\\' ? argument(r) : argument(r);
            x = pow(x, minus ? -y : y);
        } else if (accept(r, "!")) {
            x = tgamma(x + 1);
        } else if (accept(r, "\\%") || accept(r, "%")) {
            x /= 100;
        } else {
            return x;
        }
    }
    return x;
}

static bool starts_atom(Reader *r) {
    char c = peek(r);
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '(' ||
           c == '{' || c == '.' ||
           (c == '\\' && r->at + 1 < r->s.size && r->s.bytes[r->at + 1] != '}');
}

static double product_of(Reader *r) {
    double x = power_of(r);
    while (!r->failed) {
        if (accept(r, "\\cdot") || accept(r, "\\times") || accept(r, "*"))
            x *= power_of(r);
        else if (accept(r, "/") || accept(r, "\\div"))
            x /= power_of(r);
        else if (starts_atom(r))
            x *= power_of(r);
        else
            break;
    }
    return x;
}

static double sum_of(Reader *r) {
    double sign = 1, x;
    if (++r->depth > DEPTH_MAX) return fail(r);
    while (peek(r) == '+' || peek(r) == '-') sign *= r->s.bytes[r->at++] == '-' ? -1 : 1;
    x = sign * product_of(r);
    while (!r->failed) {
        if (accept(r, "+"))
            x += product_of(r);
        else if (accept(r, "-"))
            x -= product_of(r);
        else
            break;
    }
    r->depth--;
    return x;
}

static bool read_value(Slice s, int point, double *value, int *variables) {
    Reader r = {.s = s, .point = point};
    *value = sum_of(&r);
    skip_space(&r);
    *variables = r.variables;
    return !r.failed && r.at == s.size && isfinite(*value);
}

bool latex_value(Slice s, int point, double *value) {
    int variables;
    return read_value(s, point, value, &variables);
}

bool latex_number(Slice s, double *value) {
    int variables;
    return read_value(s, 0, value, &variables) && !variables;
}

/* ---- comparing ---- */

/* The next item of a list at its outermost commas. */
static bool next_item(Slice s, size_t *at, Slice *item) {
    int depth = 0;
    size_t begin = *at, i = begin;
    if (begin > s.size) return false;
    for (; i < s.size; i++) {
        char c = s.bytes[i];
        depth += (c == '(' || c == '[' || c == '{') - (c == ')' || c == ']' || c == '}');
        if (c == ',' && depth == 0) break;
    }
    *item = slice_strip((Slice){s.bytes + begin, i - begin});
    *at = i + 1;
    return true;
}

static int64_t count_items(Slice s) {
    size_t at = 0;
    Slice item;
    int64_t n = 0;
    while (next_item(s, &at, &item)) n++;
    return n;
}

/* The brackets around all of it, taken off: ( [ { of the two ends, 0 where there are none. */
static void unwrap(Slice *s, char *open, char *close) {
    *open = *close = 0;
    if (s->size < 2 || !strchr("([", s->bytes[0]) || !strchr(")]", s->bytes[s->size - 1])) return;
    int depth = 0;
    for (size_t i = 0; i < s->size; i++) {
        depth += (strchr("([{", s->bytes[i]) != NULL) - (strchr(")]}", s->bytes[i]) != NULL);
        if (!depth && i + 1 < s->size) return;
    }
    *open = s->bytes[0];
    *close = s->bytes[s->size - 1];
    *s = slice_strip((Slice){s->bytes + 1, s->size - 2});
}

static bool item_equal(Slice a, Slice b) {
    int compared = 0;
    if (a.size == b.size && !memcmp(a.bytes, b.bytes, a.size)) return true;
    for (int point = 0; point < POINTS; point++) {
        double x, y;
        bool first = latex_value(a, point, &x), second = latex_value(b, point, &y);
        if (first != second) return false;
        if (!first) continue; /* neither has a value at this point */
        if (fabs(x - y) > 1e-9 * fmax(1, fmax(fabs(x), fabs(y)))) return false;
        compared++;
    }
    return compared > 0;
}

bool latex_equal(Slice a, Slice b) {
    char ends[4];
    size_t i = 0, j = 0;
    Slice x, y, whole_a = a = slice_strip(a), whole_b = b = slice_strip(b);
    unwrap(&a, &ends[0], &ends[1]);
    unwrap(&b, &ends[2], &ends[3]);
    int64_t n = count_items(a);
    if (n != count_items(b)) return item_equal(whole_a, whole_b);
    if (n == 1) return item_equal(whole_a, whole_b);
    if (ends[0] != ends[2] || ends[1] != ends[3]) return false;
    while (next_item(a, &i, &x) && next_item(b, &j, &y))
        if (!latex_equal(x, y)) return false;
    return true;
}
