/* chat.c - the turns of a conversation. */
#include "data/chat.h"
#include "data/declaration.h"
#include "formats/companion.h"
#include "formats/file.h"
#include "formats/sha256.h"

#include <stdlib.h>
#include <string.h>

static const struct {
    const char *name, *hash;
    int format;       /* -1: recognised, but not rendered */
    const char *flaw; /* of one that is not */
} templates[] = {
    {"2026-07-large", "ae53464bf3be25802b3a5b37def7fd89667067d7577049b3b2d74c4d8de4c6d4",
     CHAT_LARGE, NULL},
    {"2026-07-small", "0a2c8073c878ab1da004bee933a998606537bbb62016310352c7285c3f01c5b5",
     CHAT_SMALL, NULL},
    {"2026-05-31b", "85a08664d16d8f3be4416c92427b3ac10df1024ac566cc0b4bc3bab409393f98", -1,
     "which drops pictures and sound that tools answer with"},
    {"interleaved-llamacpp", "65f93a25708c952457106a30e185ba7beffddd726121c8d7e3f3e08b23c16c67", -1,
     "which makes answers of tools turns of their own"},
    {"2026-04-first", "2dfbfc7d538912f4ea11d29d85b4e25d7bc26386e53f57529f1d707c28b5828c", -1,
     "which makes answers of tools turns of their own"},
};

const char *chat_format_name(ChatFormat format) {
    return format == CHAT_LARGE ? "large" : "small";
}

static Status format_of_template(ChatFormat *format, const char *bytes, size_t size,
                                 const char *path) {
    char hash[65];
    sha256_text(hash, bytes, size);
    for (size_t i = 0; i < sizeof templates / sizeof *templates; i++) {
        if (strcmp(templates[i].hash, hash)) continue;
        if (templates[i].format < 0)
            FAIL(ERR_CONFIG,
                 "%s: is the earlier template '%s', %s; it is not rendered: give --chat-format "
                 "large or small (data.chat_format in a run file) to use the July 2026 format",
                 path, templates[i].name, templates[i].flaw);
        *format = (ChatFormat)templates[i].format;
        return OK;
    }
    FAIL(ERR_CONFIG,
         "%s: an unknown chat template (sha256 %.12s...); give --chat-format large or small "
         "(data.chat_format in a run file)",
         path, hash);
}

Status chat_format_find(ChatFormat *format, const char *dir, const char *choice) {
    if (!strcmp(choice, "large") || !strcmp(choice, "small")) {
        *format = *choice == 'l' ? CHAT_LARGE : CHAT_SMALL;
        return OK;
    }
    if (strcmp(choice, "auto"))
        FAIL(ERR_CONFIG, "chat format '%s', expected auto, large or small", choice);
    char *path = companion_path(dir, "chat_template.jinja"),
         *config = companion_path(dir, "tokenizer_config.json");
    char *bytes = NULL;
    size_t size;
    json_t *root = NULL;
    Status status = OK;
    TRY_DONE(companion_find(&bytes, &size, dir, "chat_template.jinja"));
    if (bytes) {
        TRY_DONE(format_of_template(format, bytes, size, path));
        goto done;
    }
    TRY_DONE(companion_find(&bytes, &size, dir, "tokenizer_config.json"));
    if (bytes) {
        TRY_DONE(json_read(&root, bytes, size, config));
        Slice text = json_slice(json_object_get(root, "chat_template"));
        if (text.size) {
            TRY_DONE(format_of_template(format, text.bytes, text.size, config));
            goto done;
        }
    }
    FAIL_DONE(
        ERR_CONFIG,
        "%s: no chat template; give --chat-format large or small (data.chat_format in a run file)",
        dir);
done:
    json_decref(root);
    free(bytes);
    free(path);
    free(config);
    return status;
}

static void add_range(Range **ranges, int *count, size_t begin, size_t end) {
    if (begin == end) return;
    if (*count && (*ranges)[*count - 1].end == begin) { /* neighbours are one */
        (*ranges)[*count - 1].end = end;
        return;
    }
    *ranges = must_realloc(*ranges, (size_t)(*count + 1) * sizeof **ranges);
    (*ranges)[(*count)++] = (Range){begin, end};
}

typedef struct Writer {
    Rendered *out;
    const json_t *messages;
    const ChatOptions *options;
    int last_user; /* index of the last user message, or -1 */
} Writer;

static void add_content(Writer *w, Slice s) {
    size_t begin = w->out->text.size;
    text_add(&w->out->text, s.bytes, s.size);
    add_range(&w->out->content, &w->out->content_count, begin, w->out->text.size);
}

/* The text from `begin` on is trained, when message i is. */
static void train(Writer *w, int i, size_t begin) {
    if (i >= w->options->train_from)
        add_range(&w->out->trained, &w->out->trained_count, begin, w->out->text.size);
}

static bool has_role(const json_t *message, const char *role) {
    return slice_is(json_slice(json_object_get(message, "role")), role);
}

/* Thoughts written inside an assistant's text are dropped: what follows <|channel> in each piece
 * that <channel|> ends. */
static void strip_thoughts(Text *out, Slice s) {
    for (size_t from = 0; from <= s.size;) {
        size_t end = slice_find(s, "<channel|>", from);
        Slice piece = {s.bytes + from, end - from};
        text_add(out, piece.bytes, slice_find(piece, "<|channel>", 0));
        from = end + strlen("<channel|>");
    }
}

static const char *placeholder(const json_t *part) {
    static const char *const marks[][2] = {{"image", "<|image|>"},
                                           {"image_url", "<|image|>"},
                                           {"audio", "<|audio|>"},
                                           {"input_audio", "<|audio|>"},
                                           {"video", "<|video|>"}};
    for (size_t i = 0; i < sizeof marks / sizeof *marks; i++)
        if (slice_is(json_slice(json_object_get(part, "type")), marks[i][0])) return marks[i][1];
    return NULL;
}

static void write_text(Writer *w, Slice s, bool assistant) {
    if (!assistant) {
        add_content(w, slice_strip(s));
        return;
    }
    Text stripped = {0};
    text_add(&stripped, "", 0);
    strip_thoughts(&stripped, s);
    add_content(w, slice_strip((Slice){stripped.bytes, stripped.size}));
    text_free(&stripped);
}

static void write_content(Writer *w, const json_t *content, bool assistant) {
    size_t i;
    json_t *part;
    if (json_is_string(content)) write_text(w, json_slice(content), assistant);
    if (!json_is_array(content)) return;
    json_array_foreach(content, i, part) {
        const char *mark = placeholder(part);
        if (mark)
            text_adds(&w->out->text, mark);
        else if (slice_is(json_slice(json_object_get(part, "type")), "text"))
            write_text(w, json_slice(json_object_get(part, "text")), assistant);
    }
}

static void write_system(Writer *w, const json_t *first, const json_t *tools) {
    Text *text = &w->out->text;
    size_t i;
    json_t *item;
    text_adds(text, "<|turn>system\n");
    if (w->options->enable_thinking) text_adds(text, "<|think|>\n");
    const json_t *content = first ? json_object_get(first, "content") : NULL;
    if (json_is_string(content)) add_content(w, slice_strip(json_slice(content)));
    json_array_foreach(content, i, item) {
        if (!slice_is(json_slice(json_object_get(item, "type")), "text")) continue;
        add_content(w, slice_strip(json_slice(json_object_get(item, "text"))));
        text_adds(text, " ");
    }
    json_array_foreach(tools, i, item) {
        text_adds(text, "<|tool>");
        declaration_write(text, item);
        text_adds(text, "<tool|>");
    }
    text_adds(text, "<turn|>\n");
}

static Status write_calls(Writer *w, const json_t *calls) {
    size_t i;
    json_t *call;
    json_array_foreach(calls, i, call) {
        const json_t *function = json_object_get(call, "function"),
                     *arguments = json_object_get(function, "arguments");
        if (json_is_string(arguments))
            FAIL(ERR_FORMAT,
                 "tool_calls[].function.arguments must be a JSON object (mapping), not a string");
        if (json_truth(arguments) && !json_is_object(arguments))
            FAIL(ERR_FORMAT, "tool_calls[].function.arguments must be a JSON object (mapping)");
        Slice name = json_slice(json_object_get(function, "name"));
        if (!name.size) FAIL(ERR_FORMAT, "tool_calls[] has no function.name");
        text_adds(&w->out->text, "<|tool_call>call:");
        add_content(w, name);
        size_t begin = w->out->text.size;
        mapping_write(&w->out->text, arguments);
        add_range(&w->out->content, &w->out->content_count, begin, w->out->text.size);
        text_adds(&w->out->text, "<tool_call|>");
    }
    return OK;
}

/* One response; the first of a group has its opening mark trained: on it the model stops. */
static void write_response(Writer *w, int i, Slice name, const json_t *value, bool first) {
    Text *text = &w->out->text;
    size_t begin = text->size;
    text_adds(text, "<|tool_response>");
    if (first && !w->options->trl_mask) train(w, i, begin);
    text_adds(text, "response:");
    add_content(w, name.size ? name : slice_of("unknown"));
    begin = text->size;
    if (json_is_object(value)) {
        mapping_write(text, value);
    } else {
        text_adds(text, "{value:");
        value_write(text, value, false);
        text_adds(text, "}");
    }
    add_range(&w->out->content, &w->out->content_count, begin, text->size);
    text_adds(text, "<tool_response|>");
}

/* The name of the call a tool message answers: the last call of the same id, both absent included.
 */
static Slice answered_name(const json_t *calls, const json_t *message) {
    Slice name = json_slice(json_object_get(message, "name"));
    const json_t *wanted = json_object_get(message, "tool_call_id");
    size_t i;
    json_t *call;
    json_array_foreach(calls, i, call) {
        const json_t *id = json_object_get(call, "id");
        bool absent = (!id || json_is_null(id)) && (!wanted || json_is_null(wanted));
        if (absent || (id && wanted && json_equal((json_t *)id, (json_t *)wanted)))
            name = json_slice(json_object_get(json_object_get(call, "function"), "name"));
    }
    return name;
}

static Status write_tool_message(Writer *w, int i, const json_t *calls, const json_t *message,
                                 bool first) {
    const json_t *content = json_object_get(message, "content");
    Slice name = answered_name(calls, message);
    if (json_is_object(content))
        FAIL(ERR_FORMAT, "a tool message's content is a mapping, expected a string, a list of "
                         "parts or a plain value");
    if (!json_is_array(content)) {
        json_t *null = json_null();
        write_response(w, i, name, content ? content : null, first);
        return OK;
    }
    Text joined = {0};
    size_t p;
    json_t *part;
    text_add(&joined, "", 0);
    json_array_foreach(content, p, part) {
        if (!slice_is(json_slice(json_object_get(part, "type")), "text")) continue;
        Slice s = json_slice(json_object_get(part, "text"));
        text_add(&joined, s.bytes, s.size);
    }
    json_t *value = json_stringn_nocheck(joined.bytes, joined.size);
    write_response(w, i, name, value, first);
    json_decref(value);
    text_free(&joined);
    json_array_foreach(content, p, part) {
        const char *mark = placeholder(part);
        if (mark) text_adds(&w->out->text, mark);
    }
    return OK;
}

/* The responses to message i: its own tool_responses, else the tool messages after it. */
static Status write_responses(Writer *w, int i, bool *written) {
    const json_t *message = json_array_get(w->messages, (size_t)i),
                 *calls = json_object_get(message, "tool_calls");
    const json_t *own = json_object_get(message, "tool_responses");
    size_t k;
    json_t *response;
    *written = false;
    if (json_truth(own)) {
        json_array_foreach(own, k, response) {
            const json_t *value = json_object_get(response, "response");
            write_response(w, i, json_slice(json_object_get(response, "name")),
                           value ? value : json_null(), !*written);
            *written = true;
        }
        return OK;
    }
    if (!json_truth(calls)) return OK;
    for (k = (size_t)i + 1; k < json_array_size(w->messages); k++) {
        const json_t *next = json_array_get(w->messages, k);
        if (!has_role(next, "tool")) break;
        TRY(write_tool_message(w, i, calls, next, !*written));
        *written = true;
    }
    return OK;
}

static const json_t *neighbour(const Writer *w, int i, int step) {
    for (i += step; i >= 0 && i < (int)json_array_size(w->messages); i += step) {
        const json_t *message = json_array_get(w->messages, (size_t)i);
        if (!has_role(message, "tool")) return message;
    }
    return NULL;
}

/* Writes message i; *last says what the generation prompt must know of it. */
typedef enum LastWritten { LAST_TURN, LAST_RESPONSE, LAST_CALL } LastWritten;

static Status write_message(Writer *w, int i, int first, LastWritten *last) {
    Text *text = &w->out->text;
    const json_t *message = json_array_get(w->messages, (size_t)i);
    const json_t *calls = json_object_get(message, "tool_calls");
    bool assistant = has_role(message, "assistant"), answered;
    const json_t *before = i > first ? neighbour(w, i, -1) : NULL, *after = neighbour(w, i, 1);
    bool continues = assistant && before && has_role(before, "assistant");
    Slice role = json_slice(json_object_get(message, "role"));
    if (!json_is_object(message) || !role.size) FAIL(ERR_FORMAT, "message %d has no role", i);
    if (!continues) {
        text_adds(text, "<|turn>");
        text_add(text, assistant ? "model" : role.bytes, assistant ? 5 : role.size);
        text_adds(text, "\n");
    }
    const json_t *thought = json_object_get(message, "reasoning");
    if (!json_truth(thought)) thought = json_object_get(message, "reasoning_content");
    bool thinks = json_truth(thought) &&
                  (i > w->last_user || (w->options->preserve_thinking && json_truth(calls)));
    size_t begin = text->size;
    if (assistant && w->options->empty_thought_from && i >= w->options->empty_thought_from &&
        !continues && !thinks) {
        text_adds(text, "<|channel>thought\n<channel|>");
        begin = text->size;
    }
    if (thinks) {
        text_adds(text, "<|channel>thought\n");
        add_content(w, json_slice(thought));
        text_adds(text, "\n<channel|>");
    }
    TRY(write_calls(w, calls));
    if (assistant) train(w, i, begin);
    TRY(write_responses(w, i, &answered));
    begin = text->size;
    write_content(w, json_object_get(message, "content"), assistant);
    bool silent = text->size == begin, called = json_truth(calls);
    if (called && !answered) {
        /* The mark on which the model stopped is trained where it directly follows the call. */
        if (assistant && !silent) train(w, i, begin);
        text_adds(text, "<|tool_response>");
        if (!silent) begin = text->size;
    } else if (!(assistant && after && has_role(after, "assistant")) &&
               !(answered && silent && !after))
        text_adds(text, w->options->trl_mask && assistant ? "<turn|>\n" : "<turn|>");
    if (assistant) train(w, i, begin);
    if (text->size >= 7 && !memcmp(text->bytes + text->size - 7, "<turn|>", 7))
        text_adds(text, "\n");
    *last = answered ? LAST_RESPONSE : called ? LAST_CALL : LAST_TURN;
    return OK;
}

static Status render(Rendered *out, const json_t *messages, const json_t *tools,
                     const ChatOptions *options) {
    Writer w = {.out = out, .messages = messages, .options = options, .last_user = -1};
    if (!json_is_array(messages)) FAIL(ERR_FORMAT, "messages is not a list");
    if (tools && !json_is_null(tools) && !json_is_array(tools))
        FAIL(ERR_FORMAT, "tools is not a list");
    int count = (int)json_array_size(messages), first = 0;
    if (!count)
        FAIL(ERR_FORMAT,
             "Cannot apply chat template to an empty conversation. Provide at least one message.");
    for (int i = 0; i < count; i++)
        if (has_role(json_array_get(messages, (size_t)i), "user")) w.last_user = i;
    const json_t *head = json_array_get(messages, 0);
    bool system = has_role(head, "system") || has_role(head, "developer");
    text_adds(&out->text, "<bos>");
    if (system || json_truth(tools) || options->enable_thinking) {
        size_t i;
        json_t *tool;
        json_array_foreach(tools, i, tool) if (!json_is_object(json_object_get(tool, "function")))
            FAIL(ERR_FORMAT, "tools[%zu] has no function", i);
        write_system(&w, system ? head : NULL, tools);
        first = system;
    }
    LastWritten last = LAST_TURN;
    for (int i = first; i < count; i++)
        if (!has_role(json_array_get(messages, (size_t)i), "tool"))
            TRY(write_message(&w, i, first, &last));
    if (!options->add_generation_prompt) return OK;
    if (last == LAST_RESPONSE && options->enable_thinking)
        text_adds(&out->text, "<|channel>thought\n");
    if (last == LAST_TURN) {
        text_adds(&out->text, "<|turn>model\n");
        if (options->format == CHAT_LARGE && !options->enable_thinking)
            text_adds(&out->text, "<|channel>thought\n<channel|>");
    }
    return OK;
}

Status chat_render(Rendered *out, const json_t *messages, const json_t *tools,
                   const ChatOptions *options) {
    *out = (Rendered){0};
    Status status = render(out, messages, tools, options);
    if (status != OK) rendered_free(out);
    return status;
}

void rendered_free(Rendered *rendered) {
    text_free(&rendered->text);
    free(rendered->trained);
    free(rendered->content);
    *rendered = (Rendered){0};
}

void chat_encode(const Tokenizer *t, const Rendered *rendered, bool literal, Tokens *ids,
                 uint8_t **mask) {
    tokenizer_encode(t, ids, rendered->text.bytes, rendered->text.size, rendered->content,
                     literal ? rendered->content_count : 0, true);
    *mask = must_calloc((size_t)ids->count + 1, 1);
    size_t begin = 0;
    for (int64_t i = 0, r = 0; i < ids->count; i++) {
        while (r < rendered->trained_count && rendered->trained[r].end <= begin) r++;
        (*mask)[i] = r < rendered->trained_count && rendered->trained[r].begin <= begin;
        begin = ids->ends[i];
    }
}
