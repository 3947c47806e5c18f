/* table.c - JSON, CSV and text to rows. */
#include "eval/table.h"
#include "data/json.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

#define FILE_MAX ((size_t)1 << 30)

bool table_is(const char *path, const char *ending) {
    size_t n = strlen(path), m = strlen(ending);
    if (n > 3 && !strcmp(path + n - 3, ".gz")) n -= 3;
    return n >= m && !memcmp(path + n - m, ending, m);
}

/* Plain or gzipped. */
Status table_text(Text *out, const char *path) {
    gzFile file = gzopen(path, "rb");
    if (!file) FAIL(ERR_IO, "%s: %s", path, strerror(errno));
    char buffer[1 << 16];
    int n;
    text_add(out, "", 0);
    while ((n = gzread(file, buffer, sizeof buffer)) > 0 && out->size < FILE_MAX)
        text_add(out, buffer, (size_t)n);
    int reason = Z_OK;
    const char *message = n < 0 ? gzerror(file, &reason) : NULL;
    Status status = OK;
    if (n < 0)
        status = status_fail(ERR_IO, "%s: %s", path, reason == Z_ERRNO ? strerror(errno) : message);
    else if (out->size >= FILE_MAX)
        status = status_fail(ERR_FORMAT, "%s: larger than %zu bytes", path, FILE_MAX);
    gzclose(file);
    return status;
}

Status table_csv(json_t **rows, Slice text, const char *name) {
    json_t *all = json_array(), *row = json_array();
    Text cell = {0};
    int line = 1;
    bool quoted = false, closed = false, any = false;
    if (text.size >= 3 && !memcmp(text.bytes, "\xef\xbb\xbf", 3))
        text = (Slice){text.bytes + 3, text.size - 3};
    text_add(&cell, "", 0);
    for (size_t i = 0; i <= text.size; i++) {
        char c = i < text.size ? text.bytes[i] : '\n';
        line += c == '\n';
        if (quoted && i < text.size) {
            if (c != '"') {
                text_add(&cell, &c, 1);
            } else if (i + 1 < text.size && text.bytes[i + 1] == '"') {
                text_add(&cell, &c, 1);
                i++;
            } else {
                quoted = false;
                closed = true;
            }
            continue;
        }
        if (quoted) break;
        if (c == '"' && !cell.size && !closed) {
            quoted = any = true;
        } else if (c == ',' || c == '\n') {
            if (c == '\n' && cell.size && cell.bytes[cell.size - 1] == '\r' && !closed) cell.size--;
            json_t *string = json_stringn(cell.bytes, cell.size);
            if (!string) break;
            any |= c == ',' || cell.size;
            json_array_append_new(row, string);
            cell.size = 0;
            closed = false;
            if (c == '\n') {
                if (any) json_array_append(all, row);
                json_decref(row);
                row = json_array();
                any = false;
            }
        } else if (c != '\r' || !closed) {
            text_add(&cell, &c, 1);
        }
        if (i == text.size) {
            text_free(&cell);
            json_decref(row);
            *rows = all;
            return OK;
        }
    }
    text_free(&cell);
    json_decref(row);
    json_decref(all);
    FAIL(ERR_FORMAT, "%s:%d: %s", name, line,
         quoted ? "a quoted cell is never closed" : "a cell is not UTF-8");
}

/* Cells under the names of the first row. */
static Status named_cells(json_t **rows, const json_t *cells, const char *path) {
    const json_t *header = json_array_get(cells, 0);
    json_t *out = json_array();
    for (size_t i = 1; i < json_array_size(cells); i++) {
        const json_t *row = json_array_get(cells, i);
        if (json_array_size(row) != json_array_size(header)) {
            json_decref(out);
            FAIL(ERR_FORMAT, "%s: row %zu has %zu cells, the header %zu", path, i,
                 json_array_size(row), json_array_size(header));
        }
        json_t *object = json_object();
        for (size_t k = 0; k < json_array_size(row); k++)
            json_object_set(object, json_string_value(json_array_get(header, k)),
                            json_array_get(row, k));
        json_array_append_new(out, object);
    }
    *rows = out;
    return OK;
}

static Status json_lines(json_t **rows, Slice text, const char *path) {
    json_t *out = json_array();
    int64_t number = 0;
    for (size_t at = 0; at < text.size;) {
        size_t end = slice_find(text, "\n", at);
        Slice line = slice_strip((Slice){text.bytes + at, end - at});
        at = end + 1;
        number++;
        if (!line.size) continue;
        char *name = must_format("%s:%" PRId64, path, number);
        json_t *row = NULL;
        Status status = json_read(&row, line.bytes, line.size, name);
        if (status == OK && !json_is_object(row))
            status = status_fail(ERR_FORMAT, "%s: a row is no object", name);
        free(name);
        if (status != OK) {
            json_decref(row);
            json_decref(out);
            return status;
        }
        json_array_append_new(out, row);
    }
    *rows = out;
    return OK;
}

Status table_load(json_t **rows, const char *path) {
    Text text = {0};
    json_t *cells = NULL;
    Status status = OK;
    *rows = NULL;
    if (table_is(path, ".h5") || table_is(path, ".hdf5")) return table_hdf5(rows, path);
    TRY_DONE(table_text(&text, path));
    Slice s = {text.bytes, text.size}, stripped = slice_strip(s);
    if (!utf8_valid(s.bytes, s.size)) FAIL_DONE(ERR_FORMAT, "%s: not UTF-8", path);
    if (table_is(path, ".csv")) {
        TRY_DONE(table_csv(&cells, s, path));
        TRY_DONE(named_cells(rows, cells, path));
    } else if (table_is(path, ".txt")) {
        *rows = json_pack("[{s:o}]", "text", json_stringn(s.bytes, s.size));
    } else if (stripped.size && *stripped.bytes == '[') {
        TRY_DONE(json_read(rows, stripped.bytes, stripped.size, path));
    } else {
        TRY_DONE(json_lines(rows, s, path));
    }
    for (size_t i = 0; i < json_array_size(*rows); i++)
        if (!json_is_object(json_array_get(*rows, i)))
            FAIL_DONE(ERR_FORMAT, "%s: row %zu is no object", path, i + 1);
done:
    json_decref(cells);
    text_free(&text);
    return status;
}
