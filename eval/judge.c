/* judge.c - running cases one by one, and unwrapping hidden ones. */
#include "eval/judge.h"
#include "eval/sandbox.h"
#include "eval/template.h"

#include <nettle/base64.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

#define CASES_MAX ((size_t)256 << 20)

/* ---- comparing ---- */

static bool next_line(Slice s, size_t *at, Slice *line) {
    if (*at > s.size) return false;
    size_t end = slice_find(s, "\n", *at);
    *line = slice_strip((Slice){s.bytes + *at, end - *at});
    *at = end + 1;
    return true;
}

static bool next_word(Slice s, size_t *at, Slice *word) {
    while (*at < s.size && s.bytes[*at] == ' ') ++*at;
    size_t begin = *at;
    while (*at < s.size && s.bytes[*at] != ' ') ++*at;
    *word = (Slice){s.bytes + begin, *at - begin};
    return word->size > 0;
}

static bool same_bytes(Slice a, Slice b) {
    return a.size == b.size && !memcmp(a.bytes, b.bytes, a.size);
}

static bool number_of(Slice s, double *x) {
    char text[64], *end;
    if (!s.size || s.size >= sizeof text) return false;
    memcpy(text, s.bytes, s.size);
    text[s.size] = 0;
    *x = strtod(text, &end);
    return !*end;
}

static bool same_line(Slice a, Slice b) {
    size_t i = 0, j = 0;
    Slice x, y;
    if (same_bytes(a, b)) return true;
    for (;;) {
        bool more = next_word(a, &i, &x), other = next_word(b, &j, &y);
        double u, v;
        if (!more || !other) return more == other;
        if (!number_of(x, &u) || !number_of(y, &v) || u != v) return false;
    }
}

bool judge_same(Slice a, Slice b) {
    size_t i = 0, j = 0;
    Slice x, y;
    a = slice_strip(a);
    b = slice_strip(b);
    for (;;) {
        bool more = next_line(a, &i, &x), other = next_line(b, &j, &y);
        if (!more || !other) return more == other;
        if (!same_line(x, y)) return false;
    }
}

/* ---- running ---- */

/* Calls the method with each line of input as an argument. */
static void add_driver(Text *program, const char *function) {
    text_adds(program, "\nimport json as _json, sys as _sys\n"
                       "_arguments = [_json.loads(_l) for _l in _sys.stdin.read().split('\\n') if "
                       "_l.strip()]\n");
    text_addf(program,
              "_result = Solution().%s(*_arguments)\n"
              "print(_json.dumps(list(_result) if isinstance(_result, tuple) else "
              "_result))\n",
              function);
}

static bool same_json(Slice a, Slice b) {
    json_t *x = json_loadb(a.bytes, a.size, JSON_DECODE_ANY, NULL),
           *y = json_loadb(b.bytes, b.size, JSON_DECODE_ANY, NULL);
    bool same = x && y && json_equal(x, y);
    json_decref(x);
    json_decref(y);
    return same;
}

Status judge_cases(bool *passed, const Text *program, const json_t *cases, const json_t *function) {
    SandboxLimits limits = sandbox_limits_default();
    Text whole = {0};
    size_t i;
    json_t *one;
    Status status = OK;
    text_adds(&whole,
              "from typing import *\nimport collections, functools, heapq, itertools, math\n");
    text_add(&whole, program->bytes, program->size);
    if (json_is_string(function)) add_driver(&whole, json_string_value(function));
    *passed = json_array_size(cases) > 0;
    json_array_foreach(cases, i, one) {
        SandboxResult r;
        if (!*passed) break;
        status = sandbox_python(&r, (Slice){whole.bytes, whole.size},
                                json_slice(json_object_get(one, "input")), &limits);
        if (status != OK) break;
        Slice expected = json_slice(json_object_get(one, "output")),
              got = {r.output.bytes ? r.output.bytes : "", r.output.size};
        *passed = r.end == SANDBOX_PASSED &&
                  (json_is_string(function) ? same_json(got, expected) : judge_same(got, expected));
        sandbox_free(&r);
    }
    text_free(&whole);
    return status;
}

Status judge_program(Verdict *v, const Task *task, const json_t *doc) {
    const json_t *cases = json_object_get(doc, "test_cases");
    Text program = {0};
    Slice code = json_slice(v->extracted);
    bool passed = false;
    Status status = OK;
    text_add(&program, code.bytes, code.size);
    text_adds(&program, "\n");
    if (cases) {
        status = judge_cases(&passed, &program, cases, json_object_get(doc, "func_name"));
    } else {
        SandboxLimits limits = sandbox_limits_default();
        SandboxResult result;
        status = template_render(&program, task->tests, task, doc, NULL);
        if (status == OK)
            status = sandbox_python(&result, (Slice){program.bytes, program.size}, (Slice){"", 0},
                                    &limits);
        if (status == OK) {
            passed = result.end == SANDBOX_PASSED;
            sandbox_free(&result);
        }
    }
    text_free(&program);
    json_decref(v->score);
    v->score = json_real(passed);
    return status;
}

/* ---- hidden cases ---- */

static Status inflate_all(Text *out, const uint8_t *bytes, size_t size) {
    z_stream z = {.next_in = (uint8_t *)bytes, .avail_in = (uInt)size};
    char buffer[1 << 16];
    int code = inflateInit(&z);
    while (code == Z_OK && out->size < CASES_MAX) {
        z.next_out = (uint8_t *)buffer;
        z.avail_out = sizeof buffer;
        code = inflate(&z, Z_NO_FLUSH);
        text_add(out, buffer, sizeof buffer - z.avail_out);
    }
    inflateEnd(&z);
    if (code != Z_STREAM_END) FAIL(ERR_FORMAT, "hidden cases are no zlib stream");
    return OK;
}

/* The one string of a pickle: protocol mark and frame are passed over. */
static Status unpickle(Slice *string, const Text *t) {
    const uint8_t *p = (const uint8_t *)t->bytes, *end = p + t->size;
    while (p < end) {
        uint8_t op = *p++;
        size_t head = op == 0x80 ? 1 : op == 0x95 ? 8 : 0, width;
        if (head) {
            if ((size_t)(end - p) < head) break;
            p += head;
            continue;
        }
        width = op == 'X' ? 4 : op == 0x8c ? 1 : op == 0x8d ? 8 : 0;
        if (!width || (size_t)(end - p) < width) break;
        uint64_t size = 0;
        for (size_t i = 0; i < width; i++) size |= (uint64_t)p[i] << (8 * i);
        p += width;
        if (size > (uint64_t)(end - p)) break;
        *string = (Slice){(const char *)p, (size_t)size};
        return OK;
    }
    FAIL(ERR_FORMAT, "hidden cases are no pickled string");
}

Status judge_decode(json_t **cases, Slice text) {
    struct base64_decode_ctx decode;
    Text inflated = {0};
    Slice string = {NULL, 0};
    uint8_t *bytes = NULL;
    Status status = OK;
    *cases = NULL;
    text = slice_strip(text);
    if (text.size && *text.bytes == '[') return json_read(cases, text.bytes, text.size, "cases");
    bytes = must_malloc(BASE64_DECODE_LENGTH(text.size) + 1);
    size_t size = BASE64_DECODE_LENGTH(text.size);
    base64_decode_init(&decode);
    if (!base64_decode_update(&decode, &size, bytes, text.size, text.bytes) ||
        !base64_decode_final(&decode))
        FAIL_DONE(ERR_FORMAT, "hidden cases are not in base 64");
    TRY_DONE(inflate_all(&inflated, bytes, size));
    TRY_DONE(unpickle(&string, &inflated));
    TRY_DONE(json_read(cases, string.bytes, string.size, "hidden cases"));
    if (!json_is_array(*cases)) FAIL_DONE(ERR_FORMAT, "hidden cases are no list");
done:
    if (status != OK) {
        json_decref(*cases);
        *cases = NULL;
    }
    free(bytes);
    text_free(&inflated);
    return status;
}
