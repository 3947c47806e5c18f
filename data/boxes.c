/* boxes.c - lists of boxes read, frames and labels drawn. */
#include "data/boxes.h"

#include <ctype.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define SIDE 1000.0 /* what the picture's sides are to the model */

/* ---- reading ---- */

/* The value that begins at text[from], which brackets close; false where they do not. */
static bool bracketed(Slice text, size_t from, Slice *value) {
    int depth = 0;
    bool quoted = false;
    for (size_t i = from; i < text.size; i++) {
        char c = text.bytes[i];
        if (quoted && c == '\\')
            i++;
        else if (c == '"')
            quoted = !quoted;
        else if (!quoted && (c == '[' || c == '{'))
            depth++;
        else if (!quoted && (c == ']' || c == '}') && !--depth) {
            *value = (Slice){text.bytes + from, i + 1 - from};
            return true;
        }
    }
    return false;
}

static bool holds_box(const json_t *entry) {
    return json_is_object(entry) && json_object_get(entry, "box_2d") != NULL;
}

/* The first JSON of the text that holds a box: a list of them, or one alone. */
static json_t *find_list(Slice text) {
    for (size_t at = 0; at < text.size; at++) {
        Slice value;
        json_t *list = NULL;
        if (text.bytes[at] != '[' && text.bytes[at] != '{') continue;
        if (!bracketed(text, at, &value)) continue;
        if (json_read(&list, value.bytes, value.size, "boxes") != OK) continue;
        if (holds_box(list)) list = json_pack("[o]", list);
        size_t i;
        json_t *entry;
        json_array_foreach(list, i, entry) if (holds_box(entry)) return list;
        json_decref(list);
    }
    return NULL;
}

/* Whether the entry has a box within the picture's sides, ends behind beginnings. */
static bool read_sides(double sides[4], const json_t *entry) {
    const json_t *box = json_object_get(entry, "box_2d");
    if (json_array_size(box) != 4) return false;
    for (size_t i = 0; i < 4; i++) {
        sides[i] = json_number_value(json_array_get(box, i));
        if (!json_is_number(json_array_get(box, i)) || !(sides[i] >= 0 && sides[i] <= SIDE))
            return false;
    }
    return sides[0] <= sides[2] && sides[1] <= sides[3];
}

static json_t *pixel(double side, int64_t size) {
    int64_t at = llround(side / SIDE * (double)size);
    return json_integer(at < size ? at : size - 1);
}

json_t *boxes_parse(Slice text, int64_t height, int64_t width, int64_t *bad) {
    json_t *list = find_list(text), *boxes = json_array(), *entry;
    size_t i;
    *bad = 0;
    json_array_foreach(list, i, entry) {
        double s[4];
        const char *label = json_string_value(json_object_get(entry, "label"));
        if (!read_sides(s, entry)) {
            ++*bad;
            continue;
        }
        json_t *box = json_pack("{s:O, s:s}", "box_2d", json_object_get(entry, "box_2d"), "label",
                                label ? label : "");
        if (height && width)
            json_object_set_new(box, "pixels",
                                json_pack("[o, o, o, o]", pixel(s[1], width), pixel(s[0], height),
                                          pixel(s[3], width), pixel(s[2], height)));
        json_array_append_new(boxes, box);
    }
    if (!list) {
        json_decref(boxes);
        return NULL;
    }
    json_decref(list);
    return boxes;
}

/* ---- drawing ---- */

#define GLYPH_WIDTH  5
#define GLYPH_HEIGHT 7

/* Letters as dots, a row a number, the leftmost dot highest. Small letters are drawn as capitals.
 */
static const struct {
    char letter;
    uint8_t rows[GLYPH_HEIGHT];
} glyphs[] = {{'A', {14, 17, 17, 31, 17, 17, 17}}, {'B', {30, 17, 17, 30, 17, 17, 30}},
              {'C', {14, 17, 16, 16, 16, 17, 14}}, {'D', {30, 17, 17, 17, 17, 17, 30}},
              {'E', {31, 16, 16, 30, 16, 16, 31}}, {'F', {31, 16, 16, 30, 16, 16, 16}},
              {'G', {14, 17, 16, 23, 17, 17, 15}}, {'H', {17, 17, 17, 31, 17, 17, 17}},
              {'I', {14, 4, 4, 4, 4, 4, 14}},      {'J', {7, 2, 2, 2, 2, 18, 12}},
              {'K', {17, 18, 20, 24, 20, 18, 17}}, {'L', {16, 16, 16, 16, 16, 16, 31}},
              {'M', {17, 27, 21, 21, 17, 17, 17}}, {'N', {17, 17, 25, 21, 19, 17, 17}},
              {'O', {14, 17, 17, 17, 17, 17, 14}}, {'P', {30, 17, 17, 30, 16, 16, 16}},
              {'Q', {14, 17, 17, 17, 21, 18, 13}}, {'R', {30, 17, 17, 30, 20, 18, 17}},
              {'S', {15, 16, 16, 14, 1, 1, 30}},   {'T', {31, 4, 4, 4, 4, 4, 4}},
              {'U', {17, 17, 17, 17, 17, 17, 14}}, {'V', {17, 17, 17, 17, 17, 10, 4}},
              {'W', {17, 17, 17, 21, 21, 27, 17}}, {'X', {17, 17, 10, 4, 10, 17, 17}},
              {'Y', {17, 17, 10, 4, 4, 4, 4}},     {'Z', {31, 1, 2, 4, 8, 16, 31}},
              {'0', {14, 17, 19, 21, 25, 17, 14}}, {'1', {4, 12, 4, 4, 4, 4, 14}},
              {'2', {14, 17, 1, 2, 4, 8, 31}},     {'3', {31, 2, 4, 2, 1, 17, 14}},
              {'4', {2, 6, 10, 18, 31, 2, 2}},     {'5', {31, 16, 30, 1, 1, 17, 14}},
              {'6', {6, 8, 16, 30, 17, 17, 14}},   {'7', {31, 1, 2, 4, 8, 8, 8}},
              {'8', {14, 17, 17, 14, 17, 17, 14}}, {'9', {14, 17, 17, 15, 1, 2, 12}},
              {'.', {0, 0, 0, 0, 0, 12, 12}},      {'-', {0, 0, 0, 31, 0, 0, 0}},
              {'_', {0, 0, 0, 0, 0, 0, 31}},       {'/', {1, 1, 2, 4, 8, 16, 16}},
              {':', {0, 12, 12, 0, 12, 12, 0}},    {'(', {2, 4, 8, 8, 8, 4, 2}},
              {')', {8, 4, 2, 2, 2, 4, 8}},        {'%', {24, 25, 2, 4, 8, 19, 3}},
              {'#', {10, 10, 31, 10, 31, 10, 10}}, {'&', {12, 18, 20, 8, 21, 18, 13}},
              {' ', {0, 0, 0, 0, 0, 0, 0}},        {'?', {14, 17, 1, 2, 4, 0, 4}}};
#define GLYPHS (sizeof glyphs / sizeof *glyphs)

static const uint8_t palette[][3] = {{230, 57, 70},  {29, 120, 200}, {42, 157, 80}, {244, 140, 6},
                                     {131, 56, 176}, {0, 150, 160},  {200, 40, 140}};
#define COLOURS (sizeof palette / sizeof *palette)

static void fill_rectangle(Picture *p, int64_t x0, int64_t y0, int64_t x1, int64_t y1,
                           const uint8_t *colour) {
    for (int64_t y = y0 < 0 ? 0 : y0; y < y1 && y < p->height; y++)
        for (int64_t x = x0 < 0 ? 0 : x0; x < x1 && x < p->width; x++)
            memcpy(p->pixels + 3 * (y * p->width + x), colour, 3);
}

static const uint8_t *glyph_of(char letter) {
    char upper = (char)toupper((unsigned char)letter);
    for (size_t i = 0; i < GLYPHS; i++)
        if (glyphs[i].letter == upper) return glyphs[i].rows;
    return glyphs[GLYPHS - 1].rows;
}

/* White letters on the colour, `dot` pixels a dot; above y where there is room, else below. */
static void draw_label(Picture *p, int64_t x, int64_t y, const char *text, int64_t dot,
                       const uint8_t *colour) {
    static const uint8_t white[3] = {255, 255, 255};
    int64_t advance = (GLYPH_WIDTH + 1) * dot, height = (GLYPH_HEIGHT + 2) * dot;
    int64_t letters = 0;
    for (const char *c = text; *c; c++) letters += (*c & 0xc0) != 0x80; /* of UTF-8 */
    if (y >= height) y -= height;
    fill_rectangle(p, x, y, x + letters * advance + dot, y + height, colour);
    for (const char *c = text; *c; c++) {
        if ((*c & 0xc0) == 0x80) continue;
        const uint8_t *rows = glyph_of(*c);
        for (int r = 0; r < GLYPH_HEIGHT; r++)
            for (int d = 0; d < GLYPH_WIDTH; d++)
                if (rows[r] >> (GLYPH_WIDTH - 1 - d) & 1)
                    fill_rectangle(p, x + (d + 1) * dot, y + (r + 1) * dot, x + (d + 2) * dot,
                                   y + (r + 2) * dot, white);
        x += advance;
    }
}

void boxes_draw(Picture *p, const json_t *boxes) {
    int64_t shorter = p->height < p->width ? p->height : p->width,
            line = shorter < 300 ? 1 : shorter / 200, dot = shorter < 300 ? 1 : shorter / 250;
    size_t i;
    json_t *box;
    json_array_foreach(boxes, i, box) {
        const json_t *at = json_object_get(box, "pixels");
        const uint8_t *colour = palette[i % COLOURS];
        int64_t s[4];
        for (size_t k = 0; k < 4; k++) s[k] = json_integer_value(json_array_get(at, k));
        fill_rectangle(p, s[0], s[1], s[2] + 1, s[1] + line, colour);
        fill_rectangle(p, s[0], s[3] + 1 - line, s[2] + 1, s[3] + 1, colour);
        fill_rectangle(p, s[0], s[1], s[0] + line, s[3] + 1, colour);
        fill_rectangle(p, s[2] + 1 - line, s[1], s[2] + 1, s[3] + 1, colour);
    }
    json_array_foreach(boxes, i, box) { /* labels above all frames */
        const json_t *at = json_object_get(box, "pixels");
        const char *label = json_string_value(json_object_get(box, "label"));
        if (*label)
            draw_label(p, json_integer_value(json_array_get(at, 0)),
                       json_integer_value(json_array_get(at, 1)), label, dot, palette[i % COLOURS]);
    }
}
