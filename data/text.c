/* text.c - growing text and code points. */
#include "data/text.h"

#include <locale.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <wctype.h>

void text_add(Text *text, const char *bytes, size_t size) {
    if (text->size + size + 1 > text->capacity) {
        text->capacity = (text->size + size + 1) * 2;
        text->bytes = must_realloc(text->bytes, text->capacity);
    }
    if (size) memcpy(text->bytes + text->size, bytes, size);
    text->size += size;
    text->bytes[text->size] = 0;
}

void text_adds(Text *text, const char *string) {
    text_add(text, string, strlen(string));
}

void text_addf(Text *text, const char *format, ...) {
    va_list arguments;
    char *formatted;
    va_start(arguments, format);
    int length = vasprintf(&formatted, format, arguments);
    va_end(arguments);
    CHECK(length >= 0, "out of memory");
    text_add(text, formatted, (size_t)length);
    free(formatted);
}

void text_free(Text *text) {
    free(text->bytes);
    *text = (Text){0};
}

Slice slice_of(const char *string) {
    return (Slice){string, strlen(string)};
}

int utf8_next(const char *s, size_t size, uint32_t *point) {
    const uint8_t *b = (const uint8_t *)s;
    if (!size) return 0;
    if (b[0] < 0x80) return *point = b[0], 1;
    int length = b[0] >= 0xf0 ? 4 : b[0] >= 0xe0 ? 3 : 2;
    if (b[0] < 0xc2 || b[0] > 0xf4 || (size_t)length > size) return 0;
    uint32_t value = b[0] & (0x7f >> length);
    for (int i = 1; i < length; i++) {
        if ((b[i] & 0xc0) != 0x80) return 0;
        value = value << 6 | (b[i] & 0x3f);
    }
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    if (value < least[length] || value > 0x10ffff || (value >= 0xd800 && value < 0xe000)) return 0;
    *point = value;
    return length;
}

bool utf8_valid(const char *s, size_t size) {
    uint32_t point;
    for (size_t i = 0; i < size;) {
        int step = utf8_next(s + i, size - i, &point);
        if (!step) return false;
        i += (size_t)step;
    }
    return true;
}

void text_add_point(Text *text, uint32_t point) {
    char b[4];
    size_t n;
    if (point < 0x80) {
        b[0] = (char)point, n = 1;
    } else if (point < 0x800) {
        b[0] = (char)(0xc0 | point >> 6), b[1] = (char)(0x80 | (point & 0x3f)), n = 2;
    } else if (point < 0x10000) {
        b[0] = (char)(0xe0 | point >> 12), b[1] = (char)(0x80 | (point >> 6 & 0x3f));
        b[2] = (char)(0x80 | (point & 0x3f)), n = 3;
    } else {
        b[0] = (char)(0xf0 | point >> 18), b[1] = (char)(0x80 | (point >> 12 & 0x3f));
        b[2] = (char)(0x80 | (point >> 6 & 0x3f)), b[3] = (char)(0x80 | (point & 0x3f)), n = 4;
    }
    text_add(text, b, n);
}

static bool is_space(uint32_t p) {
    return (p >= 9 && p <= 13) || (p >= 0x1c && p <= 0x20) || p == 0x85 || p == 0xa0 ||
           p == 0x1680 || (p >= 0x2000 && p <= 0x200a) || p == 0x2028 || p == 0x2029 ||
           p == 0x202f || p == 0x205f || p == 0x3000;
}

Slice slice_strip(Slice s) {
    uint32_t point;
    while (s.size) {
        int step = utf8_next(s.bytes, s.size, &point);
        if (!step || !is_space(point)) break;
        s.bytes += step;
        s.size -= (size_t)step;
    }
    while (s.size) {
        size_t back = 1;
        while (back < s.size && back < 4 && (s.bytes[s.size - back] & 0xc0) == 0x80) back++;
        int step = utf8_next(s.bytes + s.size - back, back, &point);
        if (step != (int)back || !is_space(point)) break;
        s.size -= back;
    }
    return s;
}

size_t slice_find(Slice s, const char *needle, size_t from) {
    if (from >= s.size) return s.size;
    const char *found = memmem(s.bytes + from, s.size - from, needle, strlen(needle));
    return found ? (size_t)(found - s.bytes) : s.size;
}

static locale_t unicode(void) {
    static locale_t locale;
    if (!locale) locale = newlocale(LC_CTYPE_MASK, "C.UTF-8", NULL);
    return locale;
}

static void add_mapped(Text *text, Slice s, wint_t (*map)(wint_t, locale_t)) {
    for (size_t i = 0; i < s.size;) {
        uint32_t point;
        int step = utf8_next(s.bytes + i, s.size - i, &point);
        if (!step) break;
        text_add_point(text, unicode() ? (uint32_t)map(point, unicode()) : point);
        i += (size_t)step;
    }
}

void text_add_lower(Text *text, Slice s) {
    add_mapped(text, s, towlower_l);
}
void text_add_upper(Text *text, Slice s) {
    add_mapped(text, s, towupper_l);
}
