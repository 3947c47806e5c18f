/* template.c - filling in fields. */
#include "eval/template.h"
#include "eval/math_answer.h"
#include "eval/regex.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const json_t *document_field(const Task *task, const json_t *doc, const char *name, size_t size) {
    char key[128];
    snprintf(key, sizeof key, "%.*s", (int)size, name);
    for (int i = 0; i < task->field_count; i++)
        if (!strcmp(task->fields[i].name, key))
            for (int k = 0; k < task->fields[i].names.count; k++) {
                const json_t *value = json_object_get(doc, task->fields[i].names.items[k]);
                if (value) return value;
            }
    return json_object_get(doc, key);
}

void text_add_value(Text *out, const json_t *value) {
    if (json_is_string(value))
        text_add(out, json_string_value(value), json_string_length(value));
    else if (json_is_number(value))
        text_add_number(out, value);
    else
        text_add_json(out, value);
}

static Slice slice_text(const Text *t) {
    return (Slice){t->bytes ? t->bytes : "", t->size};
}

static void add_lettered(Text *out, const json_t *list, bool strip) {
    for (size_t i = 0; i < json_array_size(list) && i < 10; i++) {
        Text item = {0};
        text_add_value(&item, json_array_get(list, i));
        text_addf(out, "%c. ", (char)('A' + i));
        Slice s = strip ? slice_strip(slice_text(&item)) : slice_text(&item);
        text_add(out, s.bytes, s.size);
        text_adds(out, "\n");
        text_free(&item);
    }
}

static void add_without(Text *out, Slice s, const char *what) {
    for (size_t done = 0;;) {
        size_t at = slice_find(s, what, done);
        text_add(out, s.bytes + done, at - done);
        if (at == s.size) return;
        done = at + strlen(what);
    }
}

/* The reply follows an opened fence; its first word may be swallowed as the fence's language. */
static void add_fenced(Text *out, Slice reply) {
    Text fenced = {0};
    text_adds(&fenced, "```");
    text_add(&fenced, reply.bytes, reply.size);
    Regex *r = regex_get("(?s)```(?:\\w+)?\\n?(.*?)\\n?```", 0);
    size_t from = 0;
    Match m;
    if (regex_next(r, slice_text(&fenced), &from, &m))
        text_add(out, m.groups[0].bytes, m.groups[0].size);
    regex_close(r);
    text_free(&fenced);
}

/* The lines between the last two fences. */
static void add_last_block(Text *out, Slice reply) {
    size_t open = reply.size, shut = reply.size;
    for (size_t at = 0; (at = slice_find(reply, "```", at)) < reply.size; at += 3)
        open = shut, shut = at;
    if (open == reply.size) return;
    size_t line = slice_find(reply, "\n", open);
    if (line < shut) text_add(out, reply.bytes + line + 1, shut - line - 1);
}

/* Whether `rule` is `name`. */
static bool is(Slice rule, const char *name) {
    return slice_is(rule, name);
}

static Status add_ruled(Text *out, const json_t *value, Slice rule, const char *text) {
    Text plain = {0};
    Status status = OK;
    Slice s, boxed;
    text_add_value(&plain, value);
    s = slice_text(&plain);
    if (is(rule, "strip")) {
        s = slice_strip(s);
        text_add(out, s.bytes, s.size);
    } else if (is(rule, "words")) {
        for (size_t i = 0; i < s.size; i++) text_add(out, s.bytes[i] == '_' ? " " : s.bytes + i, 1);
    } else if (is(rule, "letter")) {
        if (json_is_integer(value))
            text_addf(out, "%c", (char)('A' + json_integer_value(value)));
        else
            text_add(out, s.bytes, s.size);
    } else if (is(rule, "lettered") || is(rule, "lettered_stripped")) {
        add_lettered(out, value, rule.size > 8);
    } else if (rule.size > 8 && !memcmp(rule.bytes, "without ", 8)) {
        char what[128];
        snprintf(what, sizeof what, "%.*s", (int)(rule.size - 8), rule.bytes + 8);
        add_without(out, s, what);
    } else if (is(rule, "after_hashes")) {
        for (size_t at; (at = slice_find(s, "### ", 0)) < s.size;)
            s = (Slice){s.bytes + at + 4, s.size - at - 4};
        text_add(out, s.bytes, s.size);
    } else if (is(rule, "boxed")) {
        if (last_boxed(s, &boxed))
            text_add(out, boxed.bytes, boxed.size);
        else
            status = status_fail(ERR_FORMAT, "the solution boxes no answer");
    } else if (is(rule, "without_box_request")) {
        Regex *r = regex_get("\\s*Please reason step by step, and put your final answer within "
                             "\\\\boxed\\{\\}\\.\\s*\\z",
                             0);
        regex_replace(out, r, s, "");
        regex_close(r);
    } else if (is(rule, "starter_format")) {
        text_addf(out,
                  s.size ? "### Format: You will use the following starter code to write the "
                           "solution to the problem and enclose your code within "
                           "delimiters.\n```python\n%.*s\n```\n\n"
                         : "### Format: Read the inputs from stdin solve the problem and "
                           "write the answer to stdout (do not directly test on the sample "
                           "inputs). Enclose your code within delimiters as follows. Ensure "
                           "that when the python program runs, it reads the inputs, runs the "
                           "algorithm and writes output to STDOUT.\n```python\n# YOUR CODE "
                           "HERE\n```\n\n%.*s",
                  (int)s.size, s.bytes);
    } else if (is(rule, "last_block")) {
        add_last_block(out, s);
    } else if (is(rule, "before_fence")) {
        text_add(out, s.bytes, slice_find(s, "```", 0));
    } else if (is(rule, "fenced")) {
        add_fenced(out, s);
    } else {
        status = status_fail(ERR_CONFIG, "template '%.60s': unknown rule '%.*s'", text,
                             (int)rule.size, rule.bytes);
    }
    text_free(&plain);
    return status;
}

/* One field, between braces. */
static Status add_field(Text *out, Slice field, const char *text, const Task *task,
                        const json_t *doc, const json_t *more) {
    size_t bar = slice_find(field, "|", 0), dot = slice_find(field, ".", 0);
    size_t end = dot < bar ? dot : bar;
    char key[128];
    snprintf(key, sizeof key, "%.*s", (int)end, field.bytes);
    const json_t *value = more ? json_object_get(more, key) : NULL;
    if (!value) value = document_field(task, doc, field.bytes, end);
    if (value && dot < bar) value = json_array_get(value, (size_t)atoi(field.bytes + dot + 1));
    if (!value || json_is_null(value))
        FAIL(ERR_FORMAT, "a document has no '%.*s'", (int)(bar < field.size ? bar : field.size),
             field.bytes);
    if (bar < field.size)
        return add_ruled(out, value, (Slice){field.bytes + bar + 1, field.size - bar - 1}, text);
    text_add_value(out, value);
    return OK;
}

Status template_render(Text *out, const char *text, const Task *task, const json_t *doc,
                       const json_t *more) {
    text_add(out, "", 0);
    for (const char *c = text; *c;) {
        if ((*c == '{' && c[1] == '{') || (*c == '}' && c[1] == '}')) {
            text_add(out, c, 1);
            c += 2;
        } else if (*c == '{') {
            const char *end = strchr(c, '}');
            if (!end) FAIL(ERR_CONFIG, "template '%.60s': a brace is not closed", text);
            TRY(add_field(out, (Slice){c + 1, (size_t)(end - c - 1)}, text, task, doc, more));
            c = end + 1;
        } else {
            text_add(out, c++, 1);
        }
    }
    return OK;
}
