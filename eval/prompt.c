/* prompt.c - description, examples and question, as plain text or as a chat. */
#include "eval/prompt.h"
#include "data/medium.h"
#include "eval/template.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define BETWEEN "\n\n" /* examples */

Status shots_init(Shots *s, const Task *task, const Suite *suite, const PromptOptions *o) {
    *s = (Shots){.suite = suite, .drawn = task->drawn};
    s->count = o->shots >= 0 && task->shots > 0 ? o->shots : task->shots;
    int64_t there = (int64_t)json_array_size(suite->examples);
    if (there < s->count)
        FAIL(ERR_FORMAT,
             "task '%s': %" PRId64 " few-shot examples are wanted, %" PRId64
             " are there (--shots says how many)",
             suite->name, s->count, there);
    mersenne_seed(&s->generator, o->seed);
    return OK;
}

void shots_next(Shots *s, int64_t *picked) {
    if (s->drawn && s->count)
        mersenne_sample(&s->generator, picked, (int64_t)json_array_size(s->suite->examples),
                        s->count);
    else
        for (int64_t i = 0; i < s->count; i++) picked[i] = i;
}

bool prompt_is_chat(const Task *task, const PromptOptions *o) {
    return task->chat || o->chat;
}

static Status render_worked(Text *out, const Task *task, const json_t *example) {
    const char *text = task->worked ? task->worked : task->answer;
    return template_render(out, text ? text : "{answer}", task, example, NULL);
}

static Status render_plain(Text *out, const Task *task, const PromptOptions *o, const Suite *suite,
                           const json_t *doc, const int64_t *picked, int64_t count) {
    Text lead = {0};
    Status status = OK;
    if (task->description) TRY_DONE(template_render(&lead, task->description, task, doc, NULL));
    if (o->system) {
        Slice s = slice_of(o->system), d = {lead.bytes ? lead.bytes : "", lead.size};
        bool spaced = slice_strip(s).bytes + slice_strip(s).size < s.bytes + s.size ||
                      slice_strip(d).bytes > d.bytes;
        text_add(out, s.bytes, s.size);
        if (!spaced) text_adds(out, BETWEEN);
    }
    if (lead.size) text_add(out, lead.bytes, lead.size);
    for (int64_t i = 0; i < count; i++) {
        const json_t *example = json_array_get(suite->examples, (size_t)picked[i]);
        TRY_DONE(template_render(out, task->question, task, example, NULL));
        text_adds(out, task->delimiter);
        TRY_DONE(render_worked(out, task, example));
        text_adds(out, BETWEEN);
    }
    TRY_DONE(template_render(out, task->question, task, doc, NULL));
    if (task->opening) TRY_DONE(template_render(out, task->opening, task, doc, NULL));
done:
    text_free(&lead);
    return status;
}

static void add_message(json_t *messages, const char *role, const Text *text) {
    json_array_append_new(messages,
                          json_pack("{s:s, s:o}", "role", role, "content",
                                    json_stringn(text->bytes ? text->bytes : "", text->size)));
}

/* A part for each medium that a field names. */
static Status add_media(json_t *parts, const char *type, const Task *task, const char *field,
                        const json_t *doc) {
    const json_t *value = document_field(task, doc, field, strlen(field)), *one;
    size_t n = json_is_array(value) ? json_array_size(value) : 1;
    if (!value) FAIL(ERR_FORMAT, "a document has no '%s', which names its media", field);
    for (size_t i = 0; i < n; i++) {
        one = json_is_array(value) ? json_array_get(value, i) : value;
        if (!json_is_string(one)) FAIL(ERR_FORMAT, "'%s' names no file", field);
        json_array_append_new(parts, json_pack("{s:s, s:O}", "type", type, "path", one));
    }
    return OK;
}

static Status add_question(json_t *messages, const Task *task, const json_t *doc) {
    Text t = {0};
    json_t *parts = json_array();
    Status status = template_render(&t, task->question, task, doc, NULL);
    for (int i = 0; i < task->media_count && status == OK; i++)
        status = add_media(parts, task->media_types[i], task, task->media_fields[i], doc);
    if (status == OK && !json_array_size(parts)) {
        add_message(messages, "user", &t);
    } else if (status == OK) {
        json_array_append_new(parts, json_pack("{s:s, s:o}", "type", "text", "text",
                                               json_stringn(t.bytes ? t.bytes : "", t.size)));
        json_array_append_new(messages, json_pack("{s:s, s:O}", "role", "user", "content", parts));
    }
    json_decref(parts);
    text_free(&t);
    return status;
}

/* Everything that is said before the answer. */
static Status make_messages(json_t *messages, const Task *task, const PromptOptions *o,
                            const Suite *suite, const json_t *doc, const int64_t *picked,
                            int64_t count) {
    Text lead = {0}, worked = {0};
    Status status = OK;
    if (o->system) text_adds(&lead, o->system);
    if (task->description && *task->description) {
        if (lead.size) text_adds(&lead, BETWEEN);
        TRY_DONE(template_render(&lead, task->description, task, doc, NULL));
    }
    if (lead.size) add_message(messages, "system", &lead);
    if (task->messages) {
        json_array_extend(messages, json_object_get(doc, "messages"));
        goto done;
    }
    for (int64_t i = 0; i < count; i++) {
        const json_t *example = json_array_get(suite->examples, (size_t)picked[i]);
        TRY_DONE(add_question(messages, task, example));
        worked.size = 0;
        TRY_DONE(render_worked(&worked, task, example));
        add_message(messages, "assistant", &worked);
    }
    TRY_DONE(add_question(messages, task, doc));
done:
    text_free(&lead);
    text_free(&worked);
    return status;
}

ChatOptions prompt_chat_options(const PromptOptions *o) {
    return (ChatOptions){
        .format = o->format, .add_generation_prompt = true, .enable_thinking = o->think};
}

static Status render_chat(Text *out, json_t **kept, const Task *task, const PromptOptions *o,
                          const Suite *suite, const json_t *doc, const int64_t *picked,
                          int64_t count) {
    json_t *messages = json_array(), *tools = task->messages ? json_object_get(doc, "tools") : NULL;
    Rendered rendered = {0};
    ChatOptions chat = prompt_chat_options(o);
    Status status = OK;
    TRY_DONE(make_messages(messages, task, o, suite, doc, picked, count));
    TRY_DONE(chat_render(&rendered, messages, tools, &chat));
    text_add(out, rendered.text.bytes, rendered.text.size);
    if (task->opening && !task->messages)
        TRY_DONE(template_render(out, task->opening, task, doc, NULL));
    if (kept && messages_media_count(messages)) *kept = json_incref(messages);
done:
    rendered_free(&rendered);
    json_decref(messages);
    return status;
}

Status prompt_render(Text *out, json_t **messages, const Task *task, const PromptOptions *o,
                     const Suite *suite, const json_t *doc, const int64_t *picked, int64_t count) {
    text_add(out, "", 0);
    if (messages) *messages = NULL;
    if (!task->question && !task->messages)
        FAIL(ERR_CONFIG, "task '%s' has no 'question'", task->name);
    if (prompt_is_chat(task, o))
        return render_chat(out, messages, task, o, suite, doc, picked, count);
    return render_plain(out, task, o, suite, doc, picked, count);
}

int64_t prompt_choice_count(const json_t *doc) {
    return (int64_t)json_array_size(json_object_get(doc, "choices"));
}

Status prompt_choice(Text *out, const Task *task, const PromptOptions *o, const json_t *doc,
                     int64_t i) {
    const char *kind = task->choices ? task->choices : "texts";
    if (!prompt_is_chat(task, o)) text_adds(out, task->delimiter);
    if (!strcmp(kind, "letters"))
        text_addf(out, "%c", (char)('A' + i));
    else if (!strcmp(kind, "bracketed"))
        text_addf(out, "(%c)", (char)('A' + i));
    else if (!strcmp(kind, "texts"))
        text_add_value(out, json_array_get(json_object_get(doc, "choices"), (size_t)i));
    else
        FAIL(ERR_CONFIG, "task '%s': choices '%s', expected letters, bracketed or texts",
             task->name, kind);
    return OK;
}

Status prompt_gold(int64_t *gold, const Task *task, const json_t *doc) {
    const json_t *answer = document_field(task, doc, "answer", 6);
    const char *text = json_string_value(answer);
    int64_t count = prompt_choice_count(doc);
    *gold = -1;
    if (json_is_integer(answer)) *gold = json_integer_value(answer);
    if (text && *text == '(') text++;
    if (text && *text >= 'A' && *text <= 'Z' && (!text[1] || text[1] == ')')) *gold = *text - 'A';
    for (int64_t i = 0; text && *gold < 0 && i < count; i++)
        if (json_equal(answer, json_array_get(json_object_get(doc, "choices"), (size_t)i)))
            *gold = i;
    if (!answer) FAIL(ERR_FORMAT, "a document has no 'answer'");
    return OK;
}
