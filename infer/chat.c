/* chat.c - turns. */
#include "infer/chat.h"
#include "formats/file.h"
#include "infer/answer.h"
#include "infer/schema.h"

#include <stdlib.h>
#include <string.h>

#define CHUNK 512

Status chat_open(Chat *c, Model *m, const ChatSettings *settings) {
    EngineOptions options = {.sequences = 1, .chunk = CHUNK, .share = true};
    Status status = OK;
    *c = (Chat){.m = m, .settings = *settings, .messages = json_array(), .attached = json_array()};
    int64_t most = m->g.config.max_position_embeddings;
    if (c->settings.context > most) c->settings.context = most;
    options.tokens = c->settings.context + PAGE_KEYS;
    TRY_DONE(sampling_load(&c->sampling, m->dir, &m->g.config));
    if (settings->tools) TRY_DONE(tools_load(&c->tools, settings->tools));
    TRY_DONE(kv_dtype(&options.kv, &m->g, settings->kv));
    if (settings->draft) {
        TRY_DONE(drafter_open(&c->drafter, settings->draft, &m->g));
        options.drafter = &c->drafter;
        options.draft = DRAFT_TOKENS;
    }
    TRY_DONE(engine_init(&c->engine, &m->g, m->tokenizer, &options));
    if (settings->system) chat_set_system(c, settings->system);
done:
    if (status != OK) chat_close(c);
    return status;
}

void chat_close(Chat *c) {
    engine_free(&c->engine);
    drafter_close(&c->drafter);
    tools_free(&c->tools);
    json_decref(c->messages);
    json_decref(c->attached);
    *c = (Chat){0};
}

static bool has_system(const Chat *c) {
    const char *role = json_string_value(json_object_get(json_array_get(c->messages, 0), "role"));
    return role && !strcmp(role, "system");
}

void chat_set_system(Chat *c, const char *text) {
    if (has_system(c)) json_array_remove(c->messages, 0);
    if (*text)
        json_array_insert_new(c->messages, 0,
                              json_pack("{s:s, s:s}", "role", "system", "content", text));
}

void chat_clear(Chat *c) {
    json_array_clear(c->attached);
    while (json_array_size(c->messages) > (size_t)has_system(c))
        json_array_remove(c->messages, json_array_size(c->messages) - 1);
}

/* ---- one answer ---- */

typedef struct Hearing {
    const ChatView *view;
    Pieces pieces;
} Hearing;

static void hear(void *context, Sequence *s) {
    Hearing *h = context;
    pieces_feed(&h->pieces, (Slice){s->stream.text.bytes ? s->stream.text.bytes : "", s->text_size},
                s->ending != ENDING_NONE);
    if (h->view->stopped(h->view->context)) s->cancelled = true;
}

/* The model's next message, in *out; *stopped: the user ended it. */
static Status answer(Chat *c, const ChatView *view, json_t **out, bool *stopped) {
    ChatOptions options = {.format = c->settings.format,
                           .add_generation_prompt = true,
                           .enable_thinking = c->settings.think};
    DialogPrompt prompt;
    Sequence *s;
    Grammar *calls = NULL;
    Hearing hearing = {.view = view};
    Status status = OK;
    TRY(dialog_prompt(&prompt, &c->m->g, c->m->tokenizer, c->messages, c->tools.list, &options,
                      &c->settings.reading));
    TRY_DONE(dialog_soften(&prompt.soft, &c->m->g, &prompt.media, &prompt.ids));
    Slice tail = {prompt.text.bytes, prompt.text.size};
    pieces_init(&hearing.pieces, tail, c->tools.list, view->piece, view->context);
    Request request = {.ids = prompt.ids.ids,
                       .count = prompt.ids.count,
                       .media = prompt.soft.items,
                       .media_count = prompt.soft.count,
                       .sampling = c->sampling,
                       .thought_begin = tokenizer_find(c->m->tokenizer, "<|channel>"),
                       .thought_end = tokenizer_find(c->m->tokenizer, "<channel|>"),
                       .on_token = hear,
                       .context = &hearing};
    request.sampling.max_tokens = c->settings.context;
    request.sampling.seed += (uint64_t)json_array_size(c->messages);
    if (json_array_size(c->tools.list)) {
        TRY_DONE(grammar_calls(&calls, c->m->tokenizer, c->tools.list, NULL, false));
        request.call_grammar = calls;
        request.call_begin = tokenizer_find(c->m->tokenizer, "<|tool_call>");
    }
    if (prompt.ids.count + 1 > c->settings.context)
        FAIL_DONE(ERR_CONFIG, "the conversation has %d tokens, the context %d: /clear starts anew",
                  (int)prompt.ids.count, (int)c->settings.context);
    TRY_DONE(engine_submit(&c->engine, &s, &request));
    while (s->ending == ENDING_NONE) engine_step(&c->engine);
    c->answered += sequence_answered(s);
    *stopped = s->ending == ENDING_CANCELLED;
    *out =
        answer_parse(tail, (Slice){s->stream.text.bytes ? s->stream.text.bytes : "", s->text_size},
                     c->tools.list);
    engine_drop(&c->engine, s);
done:
    grammar_free(calls);
    dialog_prompt_free(&prompt);
    return status;
}

/* Whether the media of a message can be read. */
static Status check_media(const Chat *c, const json_t *content) {
    json_t *messages = json_pack("[{s:s, s:O}]", "role", "user", "content", content);
    MediumOptions reading = c->settings.reading;
    MediumList list = {0};
    reading.config = &c->m->g.config;
    Status status = messages_media_count(messages) ? model_check_media(&c->m->g) : OK;
    if (status == OK) status = media_collect(&list, messages, &reading);
    media_list_free(&list);
    json_decref(messages);
    return status;
}

Status chat_attach(Chat *c, json_t *part) {
    json_t *content = json_pack("[O]", part);
    Status status = check_media(c, content);
    if (status == OK) json_array_append(c->attached, part);
    json_decref(content);
    return status;
}

/* What a call answered, where it shows media that cannot be read: the model is told. */
static json_t *checked_response(const Chat *c, json_t *response) {
    if (!json_is_array(response) || check_media(c, response) == OK) return response;
    json_decref(response);
    return json_pack("{s:s}", "error", status_message());
}

/* Responses as messages of their own, the only form that takes media: objects as their text. */
static void add_tool_messages(Chat *c, json_t *message, const json_t *responses) {
    size_t i;
    json_t *one;
    json_array_foreach(responses, i, one) {
        json_t *response = json_object_get(one, "response"),
               *call = json_array_get(json_object_get(message, "tool_calls"), i);
        char *id = must_format("call_%zu_%zu", json_array_size(c->messages), i);
        Text text = {0};
        json_object_set_new(call, "id", json_string(id));
        if (json_is_object(response)) text_add_json(&text, response);
        json_array_append_new(
            c->messages, json_pack("{s:s, s:s, s:O, s:o}", "role", "tool", "tool_call_id", id,
                                   "name", json_object_get(one, "name"), "content",
                                   text.size ? json_string(text.bytes) : json_incref(response)));
        text_free(&text);
        free(id);
    }
}

/* Runs the calls of a message; what they say. Caller decrefs. */
static json_t *run_calls(Chat *c, const ChatView *view, const json_t *message) {
    json_t *responses = json_array(), *call;
    size_t i;
    json_array_foreach(json_object_get(message, "tool_calls"), i, call) {
        const json_t *function = json_object_get(call, "function"),
                     *arguments = json_object_get(function, "arguments");
        const char *name = json_string_value(json_object_get(function, "name"));
        char *command = tools_command_text(&c->tools, name);
        json_t *response;
        if (!command)
            response = json_pack("{s:o}", "error", json_sprintf("there is no function '%s'", name));
        else if (!view->allow(view->context, name, arguments, command))
            response = json_pack("{s:s}", "error", "the user did not allow this call");
        else
            response =
                checked_response(c, tools_run(&c->tools, name, arguments, c->settings.seconds));
        view->response(view->context, name, response);
        json_array_append_new(responses,
                              json_pack("{s:s, s:o}", "name", name, "response", response));
        free(command);
    }
    return responses;
}

static bool shows_media(const json_t *responses) {
    size_t i;
    json_t *one;
    bool any = false;
    json_array_foreach(responses, i, one) any |= json_is_array(json_object_get(one, "response"));
    return any;
}

/* What is said before a call stands in a message of its own, or the template would move it behind
 * the call's response. Thoughts stay while the turn goes on. */
static void keep_message(Chat *c, json_t *message, const json_t *responses) {
    json_t *thinking = json_object_get(message, "thinking"),
           *calls = json_object_get(message, "tool_calls"),
           *content = json_object_get(message, "content");
    if (thinking) {
        json_object_set(message, "reasoning", thinking);
        json_object_del(message, "thinking");
    }
    json_object_del(message, "bad_calls");
    if (calls && content) {
        json_t *said = json_pack("{s:s, s:O}", "role", "assistant", "content", content);
        if (thinking) {
            json_object_set(said, "reasoning", json_object_get(message, "reasoning"));
            json_object_del(message, "reasoning");
        }
        json_object_del(message, "content");
        json_array_append_new(c->messages, said);
    }
    if (!calls && !content) json_object_set_new(message, "content", json_string(""));
    json_array_append(c->messages, message);
    if (shows_media(responses))
        add_tool_messages(c, message, responses);
    else if (responses)
        json_object_set(message, "tool_responses", (json_t *)responses);
}

/* Thoughts are not kept in history. */
static void drop_thoughts(Chat *c) {
    size_t i;
    json_t *message;
    json_array_foreach(c->messages, i, message) json_object_del(message, "reasoning");
}

Status chat_say(Chat *c, const char *text, const ChatView *view) {
    size_t before = json_array_size(c->messages);
    Status status = OK;
    c->answered = 0;
    if (!utf8_valid(text, strlen(text))) FAIL(ERR_FORMAT, "what you said is not UTF-8");
    json_t *content = json_string(text);
    if (json_array_size(c->attached)) {
        json_t *part = json_pack("{s:s, s:o}", "type", "text", "text", content);
        content = json_copy(c->attached);
        json_array_append_new(content, part);
    }
    json_array_append_new(c->messages, json_pack("{s:s, s:o}", "role", "user", "content", content));
    for (int round = 0; status == OK; round++) {
        json_t *message = NULL;
        bool stopped = false;
        status = answer(c, view, &message, &stopped);
        if (status != OK) break;
        bool calls = json_array_size(json_object_get(message, "tool_calls")) > 0;
        if (calls && (stopped || round >= c->settings.rounds)) {
            json_object_del(message, "tool_calls");
            calls = false;
        }
        json_t *responses = calls ? run_calls(c, view, message) : NULL;
        keep_message(c, message, responses);
        json_decref(responses);
        json_decref(message);
        if (!calls) break;
    }
    while (status != OK && json_array_size(c->messages) > before)
        json_array_remove(c->messages, json_array_size(c->messages) - 1);
    if (status == OK) json_array_clear(c->attached);
    drop_thoughts(c);
    return status;
}

/* ---- files ---- */

Status chat_save(const Chat *c, const char *path) {
    json_t *row = json_pack("{s:O}", "messages", c->messages);
    if (json_array_size(c->tools.list)) json_object_set(row, "tools", c->tools.list);
    Text line = {0};
    text_add_json(&line, row);
    text_adds(&line, "\n");
    Status status = file_write(path, line.bytes, line.size);
    text_free(&line);
    json_decref(row);
    return status;
}

Status chat_load(Chat *c, const char *path) {
    char *bytes;
    size_t size;
    json_t *row = NULL;
    TRY(file_read(&bytes, &size, path, (size_t)64 << 20));
    Slice s = slice_strip((Slice){bytes, size});
    s.size = slice_find(s, "\n", 0);
    Status status = json_read(&row, s.bytes, s.size, path);
    json_t *messages = json_object_get(row, "messages");
    if (status == OK && !json_is_array(messages))
        status = status_fail(ERR_FORMAT, "%s: the first row has no messages", path);
    if (status == OK) {
        json_decref(c->messages);
        c->messages = json_deep_copy(messages);
    }
    json_decref(row);
    free(bytes);
    return status;
}
