/* answer.c - the tolerant reader, and the released rule. */
#include "infer/answer.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <wctype.h>

#define QUOTE       "<|\"|>"
#define CALL        "<|tool_call>"
#define CALL_END    "<tool_call|>"
#define THOUGHT     "<|channel>thought"
#define THOUGHT_END "<channel|>"
#define DEPTH_MAX   64

static bool at(Slice s, size_t i, const char *mark) {
    size_t n = strlen(mark);
    return i <= s.size && n <= s.size - i && !memcmp(s.bytes + i, mark, n);
}

/* The prompt after its last start of an answer (all of it when there is none), then the output. */
static Text joined(Slice prefix, Slice text) {
    static const char *const anchors[] = {"<|turn>model\n", "<tool_response|>"};
    size_t start = 0;
    for (int a = 0; a < 2; a++)
        for (size_t i = 0; (i = slice_find(prefix, anchors[a], i)) < prefix.size; i++)
            if (i + strlen(anchors[a]) > start) start = i + strlen(anchors[a]);
    Text all = {0};
    text_add(&all, prefix.bytes + start, prefix.size - start);
    text_add(&all, text.bytes, text.size);
    return all;
}

static json_t *make_call(Slice name, json_t *arguments) {
    json_t *function = json_object();
    json_object_set_new(function, "name", json_stringn_nocheck(name.bytes, name.size));
    json_object_set_new(function, "arguments", arguments);
    json_t *call = json_object();
    json_object_set_new(call, "type", json_string("function"));
    json_object_set_new(call, "function", function);
    return call;
}

/* ---- types a schema declares, and casting strings to them ---- */

static json_t *cast_number(const char *raw, bool integer) {
    char *end;
    while (*raw == ' ' || *raw == '\n' || *raw == '\t') raw++;
    size_t length = strlen(raw);
    while (length && strchr(" \n\t", raw[length - 1])) length--;
    char copy[512];
    if (!length || length >= sizeof copy) return NULL;
    memcpy(copy, raw, length);
    copy[length] = 0;
    if (strspn(copy, "+-0123456789.eE") != length) return NULL;
    errno = 0;
    long long whole = strtoll(copy, &end, 10);
    if (!*end && !errno) return json_integer(whole);
    double value = strtod(copy, &end);
    if (*end || !isfinite(value)) return NULL;
    bool is_whole = value == floor(value) && fabs(value) < 9e18;
    if (integer) return is_whole ? json_integer((json_int_t)value) : NULL;
    return is_whole && !strchr(copy, '.') ? json_integer((json_int_t)value) : json_real(value);
}

static json_t *cast_to(Slice raw, const char *type) {
    Slice s = slice_strip(raw);
    Text lower = {0};
    json_t *result = NULL;
    text_add(&lower, "", 0);
    text_add_lower(&lower, s);
    if (!strcmp(type, "integer") || !strcmp(type, "number")) {
        result = cast_number(raw.bytes, *type == 'i');
    } else if (!strcmp(type, "boolean")) {
        if (!strcmp(lower.bytes, "true") || !strcmp(lower.bytes, "1")) result = json_true();
        if (!strcmp(lower.bytes, "false") || !strcmp(lower.bytes, "0")) result = json_false();
    } else if (!strcmp(type, "null")) {
        if (slice_is(s, "null") || slice_is(s, "None")) result = json_null();
    } else if (!strcmp(type, "object") || !strcmp(type, "array")) {
        json_t *value = NULL;
        if (json_read(&value, s.bytes, s.size, "argument") == OK &&
            (*type == 'o' ? json_is_object(value) : json_is_array(value)))
            result = json_incref(value);
        json_decref(value);
    }
    text_free(&lower);
    return result;
}

/* Tries the declared types in order; NULL: leave the string. */
static json_t *cast_by_schema(Slice raw, const json_t *schema, int depth) {
    const json_t *type = json_object_get(schema, "type");
    static const char *const unions[] = {"anyOf", "oneOf"};
    json_t *result = NULL, *item;
    size_t i;
    if (!json_is_object(schema) || depth > DEPTH_MAX) return NULL;
    if (json_is_string(type)) result = cast_to(raw, json_string_value(type));
    json_array_foreach(type, i, item) if (!result && json_is_string(item)) result =
        cast_to(raw, json_string_value(item));
    for (int u = 0; u < 2 && !result; u++)
        json_array_foreach(json_object_get(schema, unions[u]), i, item) if (!result) result =
            cast_by_schema(raw, item, depth + 1);
    if (!result && json_truth(json_object_get(schema, "nullable"))) result = cast_to(raw, "null");
    return result;
}

static void cast_arguments(json_t *call, const json_t *tools) {
    json_t *function = json_object_get(call, "function"),
           *arguments = json_object_get(function, "arguments");
    size_t i;
    json_t *tool, *value;
    const char *key;
    json_array_foreach(tools, i, tool) {
        const json_t *declared = json_object_get(tool, "function");
        if (!declared) declared = tool;
        if (!json_equal(json_object_get(declared, "name"), json_object_get(function, "name")))
            continue;
        const json_t *properties =
            json_object_get(json_object_get(declared, "parameters"), "properties");
        json_object_foreach(arguments, key, value) {
            const json_t *schema = json_object_get(properties, key);
            if (!json_is_string(value) || json_big_integer(value) || !schema) continue;
            json_t *cast = cast_by_schema(json_slice(value), schema, 0);
            if (cast) json_object_set_new(arguments, key, cast);
        }
    }
}

/* ---- the tolerant object ---- */

typedef struct Reader {
    Slice s;
    size_t i;
} Reader;

static void skip_space(Reader *r) {
    while (r->i < r->s.size && strchr(" \t\r\n", r->s.bytes[r->i]) && r->s.bytes[r->i]) r->i++;
}

static json_t *read_value(Reader *r, int depth);

/* A string in "..." or between quote tokens; NULL when it is cut. */
static json_t *read_string(Reader *r) {
    if (at(r->s, r->i, QUOTE)) {
        size_t begin = r->i + strlen(QUOTE), end = slice_find(r->s, QUOTE, begin);
        if (end == r->s.size) return NULL;
        r->i = end + strlen(QUOTE);
        return json_stringn_nocheck(r->s.bytes + begin, end - begin);
    }
    size_t begin = r->i++;
    while (r->i < r->s.size && r->s.bytes[r->i] != '"') r->i += r->s.bytes[r->i] == '\\' ? 2 : 1;
    if (r->i >= r->s.size) return NULL;
    r->i++;
    json_t *value =
        json_loadb(r->s.bytes + begin, r->i - begin, JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
    if (value) return value;
    return json_stringn_nocheck(r->s.bytes + begin + 1,
                                r->i - begin - 2); /* bad escapes: as it stands */
}

static bool is_quoted(Reader *r) {
    return at(r->s, r->i, QUOTE) || at(r->s, r->i, "\"");
}

/* Key bytes up to one of : , { } < */
static bool read_key(Reader *r, Text *key) {
    if (is_quoted(r)) {
        json_t *value = read_string(r);
        if (!value) return false;
        Slice s = json_slice(value);
        text_add(key, s.bytes, s.size);
        json_decref(value);
        return !memchr(key->bytes, 0, key->size);
    }
    size_t begin = r->i;
    while (r->i < r->s.size && !strchr(":,{}<", r->s.bytes[r->i])) r->i++;
    Slice s = slice_strip((Slice){r->s.bytes + begin, r->i - begin});
    text_add(key, s.bytes, s.size);
    return s.size > 0 && !memchr(s.bytes, 0, s.size);
}

static json_t *read_object(Reader *r, int depth) {
    json_t *map = json_object();
    r->i++; /* { */
    for (;;) {
        skip_space(r);
        if (at(r->s, r->i, "}")) {
            r->i++;
            return map;
        }
        Text key = {0};
        json_t *value = NULL;
        bool good = read_key(r, &key);
        skip_space(r);
        if (good && at(r->s, r->i, ":")) {
            r->i++;
            skip_space(r);
            value = read_value(r, depth + 1);
        }
        if (value) json_object_setn_new_nocheck(map, key.bytes, key.size, value);
        text_free(&key);
        skip_space(r);
        if (!value || (!at(r->s, r->i, ",") && !at(r->s, r->i, "}"))) {
            json_decref(map);
            return NULL;
        }
        if (at(r->s, r->i, ",")) r->i++;
    }
}

static json_t *read_list(Reader *r, int depth) {
    json_t *list = json_array();
    r->i++; /* [ */
    for (;;) {
        skip_space(r);
        if (at(r->s, r->i, "]")) {
            r->i++;
            return list;
        }
        json_t *value = read_value(r, depth + 1);
        if (value) json_array_append_new(list, value);
        skip_space(r);
        if (!value || (!at(r->s, r->i, ",") && !at(r->s, r->i, "]"))) {
            json_decref(list);
            return NULL;
        }
        if (at(r->s, r->i, ",")) r->i++;
    }
}

static json_t *read_bare(Reader *r) {
    size_t begin = r->i;
    while (r->i < r->s.size && !strchr(",}]<{[", r->s.bytes[r->i])) r->i++;
    Slice word = slice_strip((Slice){r->s.bytes + begin, r->i - begin});
    if (!word.size) return NULL;
    if (slice_is(word, "true") || slice_is(word, "True")) return json_true();
    if (slice_is(word, "false") || slice_is(word, "False")) return json_false();
    if (slice_is(word, "null") || slice_is(word, "None")) return json_null();
    json_t *value = NULL;
    if (strchr("-0123456789", word.bytes[0]) && json_read(&value, word.bytes, word.size, "") == OK)
        return value;
    return json_stringn_nocheck(word.bytes, word.size);
}

static json_t *read_value(Reader *r, int depth) {
    if (depth > DEPTH_MAX) return NULL;
    if (is_quoted(r)) return read_string(r);
    if (at(r->s, r->i, "{")) return read_object(r, depth);
    if (at(r->s, r->i, "[")) return read_list(r, depth);
    return read_bare(r);
}

/* A call at s[*i] = "<|tool_call>call:"; NULL when it cannot be read, *i then unchanged. */
static json_t *read_call(Slice s, size_t *i) {
    static const char *const marks[] = {CALL,      THOUGHT, THOUGHT_END,
                                        "<turn|>", "<eos>", "<|tool_response>"};
    Reader r = {s, *i + strlen(CALL "call:")};
    size_t begin = r.i;
    while (r.i < s.size && !strchr("{<(", s.bytes[r.i])) r.i++;
    Slice name = slice_strip((Slice){s.bytes + begin, r.i - begin});
    if (!name.size || !at(s, r.i, "{")) return NULL;
    json_t *arguments = read_object(&r, 0);
    if (!arguments) return NULL;
    skip_space(&r);
    bool closed = at(s, r.i, CALL_END) || r.i >= s.size;
    for (size_t m = 0; !closed && m < sizeof marks / sizeof *marks; m++)
        closed = at(s, r.i, marks[m]);
    if (!closed) {
        json_decref(arguments);
        return NULL;
    }
    *i = r.i + (at(s, r.i, CALL_END) ? strlen(CALL_END) : 0);
    return make_call(name, arguments);
}

static void set_text(json_t *message, const char *key, Slice s) {
    s = slice_strip(s);
    if (s.size) json_object_set_new(message, key, json_stringn_nocheck(s.bytes, s.size));
}

/* The thought that opens at s[i]; adds it and returns where it ends. */
static size_t read_thought(Slice s, size_t i, Text *thinking) {
    static const char *const ends[] = {THOUGHT_END, "<eos>", "<turn|>"};
    size_t begin = i + strlen(THOUGHT), end = s.size, next;
    bool closed = false;
    for (int e = 0; e < 3; e++)
        if ((next = slice_find(s, ends[e], begin)) < end) end = next, closed = e == 0;
    Slice thought = slice_strip((Slice){s.bytes + begin, end - begin});
    if (thought.size) {
        if (thinking->size) text_adds(thinking, "\n");
        text_add(thinking, thought.bytes, thought.size);
    }
    return closed ? end + strlen(THOUGHT_END) : end;
}

json_t *answer_parse(Slice prefix, Slice text, const json_t *tools) {
    Text all = joined(prefix, text), content = {0}, thinking = {0};
    Slice s = {all.bytes, all.size};
    json_t *calls = json_array(), *message = json_object();
    int bad = 0;
    text_add(&content, "", 0);
    text_add(&thinking, "", 0);
    for (size_t i = 0; i < s.size;) {
        if (at(s, i, "<turn|>") || at(s, i, "<eos>") || at(s, i, "<|tool_response>")) break;
        if (at(s, i, THOUGHT)) {
            i = read_thought(s, i, &thinking);
        } else if (at(s, i, THOUGHT_END)) {
            i += strlen(THOUGHT_END);
        } else if (at(s, i, CALL "call:")) {
            json_t *call = read_call(s, &i);
            if (call) {
                cast_arguments(call, tools);
                json_array_append_new(calls, call);
            } else {
                bad++;
                text_adds(&content, CALL);
                i += strlen(CALL);
            }
        } else {
            text_add(&content, s.bytes + i, 1);
            i++;
        }
    }
    json_object_set_new(message, "role", json_string("assistant"));
    set_text(message, "thinking", (Slice){thinking.bytes, thinking.size});
    set_text(message, "content", (Slice){content.bytes, content.size});
    if (json_array_size(calls)) json_object_set(message, "tool_calls", calls);
    if (bad) json_object_set_new(message, "bad_calls", json_integer(bad));
    json_decref(calls);
    text_free(&all);
    text_free(&content);
    text_free(&thinking);
    return message;
}

/* ---- the released rule ---- */

static size_t word_length(Slice s, size_t i) {
    size_t begin = i;
    while (i < s.size) {
        uint32_t point;
        int step = utf8_next(s.bytes + i, s.size - i, &point);
        bool word = step && (point == '_' ||
                             (point < 0x80 ? (point >= '0' && point <= '9') ||
                                                 ((point | 32) >= 'a' && (point | 32) <= 'z')
                                           : iswalnum((wint_t)point)));
        if (!word) break;
        i += (size_t)step;
    }
    return i - begin;
}

/* Body of a call in the JSON dialect: strings between quote tokens, bare words as keys right after
 * { or ,. */
static Status read_dialect(json_t **value, Slice body) {
    Text out = {0};
    char before = 0;
    for (size_t i = 0; i < body.size;) {
        size_t word, end;
        if (at(body, i, QUOTE) && (end = slice_find(body, QUOTE, i + strlen(QUOTE))) < body.size) {
            size_t begin = i + strlen(QUOTE);
            text_add_json_string(&out, (Slice){body.bytes + begin, end - begin});
            i = end + strlen(QUOTE);
            before = '"';
        } else if ((before == '{' || before == ',') && (word = word_length(body, i)) &&
                   at(body, i + word, ":")) {
            text_add_json_string(&out, (Slice){body.bytes + i, word});
            i += word;
            before = '"';
        } else {
            before = body.bytes[i];
            text_add(&out, body.bytes + i++, 1);
        }
    }
    Status status = json_read(value, out.bytes ? out.bytes : "", out.size, "json");
    text_free(&out);
    return status;
}

Status answer_parse_strict(json_t **message, Slice prefix, Slice text, const json_t *tools) {
    static const char *const ends[] = {"<turn|>", "<|tool_response>", "<eos>"};
    Text all = joined(prefix, text), content = {0}, thinking = {0}, piece = {0};
    Slice s = {all.bytes, all.size};
    json_t *calls = json_array();
    Status status = OK;
    text_add(&content, "", 0);
    text_add(&thinking, "", 0);
    for (size_t i = 0; i <= s.size;) {
        const char *stop = NULL;
        for (int e = 0; e < 3; e++)
            if (at(s, i, ends[e])) stop = ends[e];
        size_t name_at = i + strlen(CALL "call:");
        size_t name = at(s, i, CALL "call:") ? word_length(s, name_at) : 0;
        bool thought = at(s, i, THOUGHT "\n");
        if (!stop && !name && !thought && i < s.size) {
            text_add(&piece, s.bytes + i++, 1);
            continue;
        }
        if (piece.size) { /* a later piece replaces an earlier one */
            content.size = 0;
            text_add(&content, piece.bytes, piece.size);
            piece.size = 0;
        }
        if (i == s.size) break;
        if (stop) {
            i += strlen(stop);
        } else if (thought) {
            size_t begin = i + strlen(THOUGHT "\n"), end = slice_find(s, THOUGHT_END, begin);
            thinking.size = 0;
            text_add(&thinking, s.bytes + begin, end - begin);
            i = end < s.size ? end + strlen(THOUGHT_END) : s.size;
        } else {
            size_t begin = name_at + name, end = slice_find(s, CALL_END, begin);
            json_t *arguments;
            TRY_DONE(read_dialect(&arguments, (Slice){s.bytes + begin, end - begin}));
            json_t *call = make_call((Slice){s.bytes + name_at, name}, arguments);
            cast_arguments(call, tools);
            json_array_append_new(calls, call);
            i = end < s.size ? end + strlen(CALL_END) : s.size;
        }
    }
    *message = json_object();
    json_object_set_new(*message, "role", json_string("assistant"));
    set_text(*message, "thinking", (Slice){thinking.bytes, thinking.size});
    set_text(*message, "content", (Slice){content.bytes, content.size});
    if (json_array_size(calls)) json_object_set(*message, "tool_calls", calls);
done:
    json_decref(calls);
    text_free(&all);
    text_free(&content);
    text_free(&thinking);
    text_free(&piece);
    return status;
}
