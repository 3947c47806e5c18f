/* json.c - reading with big integers, writing with Python's floats. */
#include "data/json.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* jansson has no integers beyond 64 bits. Before parsing, such a literal becomes a string that
 * starts with a zero byte, which no row means to hold; json_big_integer knows it again. */
#define BIG_MARK "\\u0000int:"

static bool fits_int64(const char *digits, size_t length, bool negative) {
    const char *limit = negative ? "9223372036854775808" : "9223372036854775807";
    while (length > 1 && *digits == '0') digits++, length--;
    return length < 19 || (length == 19 && memcmp(digits, limit, 19) <= 0);
}

/* A copy with big integers marked; NULL when there are none. */
static char *mark_big_integers(const char *bytes, size_t size, size_t *out_size) {
    Text out = {0};
    size_t copied = 0;
    bool in_string = false;
    for (size_t i = 0; i < size; i++) {
        if (in_string) {
            if (bytes[i] == '\\')
                i++;
            else if (bytes[i] == '"')
                in_string = false;
            continue;
        }
        if (bytes[i] == '"') {
            in_string = true;
        } else if (bytes[i] == '-' || (bytes[i] >= '0' && bytes[i] <= '9')) {
            size_t begin = i;
            bool negative = bytes[i] == '-', real = false;
            if (negative) i++;
            size_t digits = i;
            while (i < size && strchr("0123456789+-.eE", bytes[i]) && bytes[i])
                real |= strchr(".eE", bytes[i]) != NULL, i++;
            if (!real && i > digits && bytes[digits] != '0' &&
                !fits_int64(bytes + digits, i - digits, negative)) {
                text_add(&out, bytes + copied, begin - copied);
                text_adds(&out, "\"" BIG_MARK);
                text_add(&out, bytes + begin, i - begin);
                text_adds(&out, "\"");
                copied = i;
            }
            i--;
        }
    }
    if (!out.bytes) return NULL;
    text_add(&out, bytes + copied, size - copied);
    *out_size = out.size;
    return out.bytes;
}

Status json_read(json_t **value, const char *bytes, size_t size, const char *name) {
    json_error_t error;
    char *marked = mark_big_integers(bytes, size, &size);
    *value = json_loadb(marked ? marked : bytes, size, JSON_DECODE_ANY | JSON_ALLOW_NUL, &error);
    free(marked);
    if (!*value) FAIL(ERR_FORMAT, "%s: no JSON: %s at column %d", name, error.text, error.column);
    return OK;
}

const char *json_big_integer(const json_t *value) {
    if (!json_is_string(value) || json_string_length(value) < 5) return NULL;
    const char *s = json_string_value(value);
    return !memcmp(s, "\0int:", 5) ? s + 5 : NULL;
}

Slice json_slice(const json_t *value) {
    if (!json_is_string(value)) return (Slice){"", 0};
    return (Slice){json_string_value(value), json_string_length(value)};
}

bool json_truth(const json_t *value) {
    if (!value || json_is_null(value) || json_is_false(value)) return false;
    if (json_is_string(value)) return json_string_length(value) > 0;
    if (json_is_array(value)) return json_array_size(value) > 0;
    if (json_is_object(value)) return json_object_size(value) > 0;
    if (json_is_number(value)) return json_number_value(value) != 0;
    return true;
}

void text_add_real(Text *text, double value) {
    char digits[40];
    int precision = 0;
    do snprintf(digits, sizeof digits, "%.*e", precision, value);
    while (strtod(digits, NULL) != value && ++precision < 17);
    char *e = strchr(digits, 'e');
    int exponent = e ? atoi(e + 1) : 0;
    if (!e) { /* inf, nan */
        text_adds(text, digits);
    } else if (exponent < -4 || exponent >= 16) {
        *e = 0;
        text_addf(text, "%se%c%02d", digits, exponent < 0 ? '-' : '+', abs(exponent));
    } else {
        int decimals = precision - exponent;
        text_addf(text, "%.*f", decimals < 1 ? 1 : decimals, value);
    }
}

void text_add_number(Text *text, const json_t *value) {
    if (json_is_integer(value))
        text_addf(text, "%" PRId64, (int64_t)json_integer_value(value));
    else
        text_add_real(text, json_real_value(value));
}

void text_add_json_string(Text *text, Slice s) {
    text_adds(text, "\"");
    size_t from = 0;
    for (size_t i = 0; i < s.size; i++) {
        unsigned char c = (unsigned char)s.bytes[i];
        if (c >= 0x20 && c != '"' && c != '\\' && c != 0x7f) continue;
        text_add(text, s.bytes + from, i - from);
        from = i + 1;
        if (c == '"' || c == '\\')
            text_addf(text, "\\%c", c);
        else if (c == '\n')
            text_adds(text, "\\n");
        else if (c == '\t')
            text_adds(text, "\\t");
        else if (c == '\r')
            text_adds(text, "\\r");
        else
            text_addf(text, "\\u%04x", c);
    }
    text_add(text, s.bytes + from, s.size - from);
    text_adds(text, "\"");
}

void text_add_json(Text *text, const json_t *value) {
    if (json_big_integer(value)) {
        text_adds(text, json_big_integer(value));
    } else if (json_is_string(value)) {
        text_add_json_string(text, json_slice(value));
    } else if (json_is_number(value)) {
        text_add_number(text, value);
    } else if (json_is_array(value)) {
        size_t i;
        json_t *item;
        text_adds(text, "[");
        json_array_foreach(value, i, item) {
            if (i) text_adds(text, ", ");
            text_add_json(text, item);
        }
        text_adds(text, "]");
    } else if (json_is_object(value)) {
        const char *key, *separator = "";
        json_t *item;
        text_adds(text, "{");
        json_object_foreach((json_t *)value, key, item) {
            text_adds(text, separator);
            text_add_json_string(text, slice_of(key));
            text_adds(text, ": ");
            text_add_json(text, item);
            separator = ", ";
        }
        text_adds(text, "}");
    } else {
        text_adds(text, json_is_true(value) ? "true" : json_is_false(value) ? "false" : "null");
    }
}
