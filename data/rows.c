/* rows.c - one row at a time. */
#include "data/rows.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

static const char *const marks[] = {"<|image>", "<image|>", "<|image|>", "<|video|>",
                                    "<|audio>", "<audio|>", "<|audio|>"};

Status row_reader_init(RowReader *r, const DataConfig *config, const Tokenizer *tokenizer,
                       const char *model_dir) {
    *r = (RowReader){.config = config,
                     .tokenizer = tokenizer,
                     .model_dir = model_dir,
                     .reading = {.keep_original = config->media_original,
                                 .image_tokens = config->image_tokens,
                                 .video_tokens = config->video_tokens,
                                 .video_frames = config->video_frames}};
    r->bos = tokenizer_find(tokenizer, "<bos>");
    r->eos = tokenizer_find(tokenizer, "<eos>");
    if (r->bos < 0 || r->eos < 0)
        FAIL(ERR_FORMAT, "%s: the tokenizer has no <bos> or <eos>", model_dir);
    for (size_t i = 0; i < sizeof marks / sizeof *marks; i++)
        r->marks[i] = tokenizer_find(tokenizer, marks[i]);
    return OK;
}

/* A key of the row under the file's own spelling. */
static json_t *field(const RowReader *r, const json_t *row, const char *name) {
    const DataConfig *c = r->config;
    for (int i = 0; i < c->field_names.count; i++)
        if (!strcmp(c->field_names.items[i], name)) name = c->field_values.items[i];
    json_t *value = json_object_get(row, name);
    return json_is_null(value) ? NULL : value;
}

static void encode(const RowReader *r, Slice text, Tokens *out) {
    Range all = {0, text.size};
    tokenizer_encode(r->tokenizer, out, text.bytes, text.size, &all, r->config->literal ? 1 : 0,
                     false);
}

void encode_document(const RowReader *r, Slice text, Tokens *out) {
    int64_t start = out->count;
    encode(r, text, out);
    if (out->count > start && out->ids[start] == r->bos) return;
    tokens_add(out, r->bos);
    memmove(out->ids + start + 1, out->ids + start,
            (size_t)(out->count - start - 1) * sizeof *out->ids);
    out->ids[start] = r->bos;
}

static bool has_trained(const uint8_t *mask, int64_t count) {
    for (int64_t i = 1; i < count; i++) /* nothing predicts the first token */
        if (mask[i]) return true;
    return false;
}

static void give_or_drop(RowReader *r, Sample sample, SampleFunction *give, void *context) {
    if (sample.count > r->config->max_length || !has_trained(sample.mask, sample.count))
        r->dropped++;
    else
        give(context, &sample);
}

/* A document, in pieces of max_length that each begin with <bos>. */
static void convert_text(RowReader *r, Slice text, SampleFunction *give, void *context) {
    Tokens ids = {0};
    encode_document(r, text, &ids);
    if (r->config->add_eos) tokens_add(&ids, r->eos);
    int64_t piece = r->config->max_length;
    int32_t *part = must_malloc((size_t)piece * sizeof *part);
    uint8_t *mask = must_malloc((size_t)piece);
    memset(mask, 1, (size_t)piece);
    mask[0] = 0;
    part[0] = r->bos;
    for (int64_t at = 1; at < ids.count;) {
        int64_t n = ids.count - at < piece - 1 ? ids.count - at : piece - 1;
        memcpy(part + 1, ids.ids + at, (size_t)n * sizeof *part);
        give_or_drop(r, (Sample){.ids = part, .mask = mask, .count = n + 1}, give, context);
        at += n;
    }
    if (ids.count < 2) r->dropped++;
    free(part);
    free(mask);
    tokens_free(&ids);
}

/* Prompt and completion tokenised each by itself and joined. */
static void convert_pair(RowReader *r, Slice prompt, Slice completion, SampleFunction *give,
                         void *context) {
    Tokens ids = {0};
    encode_document(r, prompt, &ids);
    int64_t start = ids.count;
    encode(r, completion, &ids);
    if (r->config->add_eos) tokens_add(&ids, r->eos);
    uint8_t *mask = must_calloc((size_t)ids.count + 1, 1);
    for (int64_t i = 1; i < ids.count; i++) mask[i] = i >= start || r->config->loss_on == LOSS_ALL;
    give_or_drop(r, (Sample){.ids = ids.ids, .mask = mask, .count = ids.count}, give, context);
    free(mask);
    tokens_free(&ids);
}

/* ---- chats ---- */

static bool role_is(const json_t *message, const char *role) {
    return slice_is(json_slice(json_object_get(message, "role")), role);
}

static bool has_thought(const json_t *message) {
    return json_truth(json_object_get(message, "reasoning")) ||
           json_truth(json_object_get(message, "reasoning_content"));
}

json_t *messages_repaired(const DataConfig *c, const json_t *messages) {
    json_t *copy = json_deep_copy(messages), *message, *call;
    size_t i, k;
    json_array_foreach(copy, i, message) {
        Slice content = json_slice(json_object_get(message, "content"));
        static const char open[] = "<|channel>thought\n", close[] = "<channel|>";
        Slice start = slice_strip(content);
        size_t end = slice_find(start, close, 0);
        if (c->inline_thoughts && role_is(message, "assistant") && !has_thought(message) &&
            slice_find(start, open, 0) == 0 && end < start.size) {
            Slice thought = slice_strip((Slice){start.bytes + strlen(open), end - strlen(open)});
            json_t *rest =
                json_stringn(start.bytes + end + strlen(close), start.size - end - strlen(close));
            json_object_set_new(message, "reasoning", json_stringn(thought.bytes, thought.size));
            json_object_set_new(message, "content", rest);
        }
        json_array_foreach(json_object_get(message, "tool_calls"), k, call) {
            json_t *function = json_object_get(call, "function"), *value = NULL;
            json_t *arguments = json_object_get(function, "arguments");
            if (!c->string_arguments || !json_is_string(arguments)) continue;
            Slice text = json_slice(arguments);
            if (json_read(&value, text.bytes, text.size, "arguments") == OK &&
                json_is_object(value))
                json_object_set(function, "arguments", value);
            json_decref(value);
        }
    }
    return copy;
}

static bool is_mark(const RowReader *r, int32_t id) {
    for (size_t i = 0; i < sizeof marks / sizeof *marks; i++)
        if (id == r->marks[i]) return true;
    return false;
}

/* Renders and gives messages[0 .. count) with the turns from `from` on trained. `list` has the
 * media of all messages. */
static Status give_chat(RowReader *r, const json_t *messages, const MediumList *list, size_t count,
                        const json_t *tools, ChatOptions options, bool cut, SampleFunction *give,
                        void *context, bool *fits) {
    json_t *part = json_array();
    for (size_t i = 0; i < count; i++) json_array_append(part, json_array_get(messages, i));
    Rendered rendered = {0};
    Tokens ids = {0};
    uint8_t *mask = NULL;
    MediaItem *items = NULL;
    int64_t item_count = 0;
    MediumList mine = {list->items, messages_media_count(part)};
    Status status = OK;
    TRY_DONE(chat_render(&rendered, part, tools, &options));
    if (mine.count) TRY_DONE(media_expand(&rendered, &mine));
    chat_encode(r->tokenizer, &rendered, r->config->literal, &ids, &mask);
    if (mine.count)
        TRY_DONE(media_items(&items, &item_count, &mine, r->reading.config, ids.ids, ids.count));
    for (int64_t i = 0; i < ids.count; i++) {
        if (r->config->loss_on == LOSS_ALL) mask[i] = i > 0;
        if (mine.count && is_mark(r, ids.ids[i])) mask[i] = 0;
    }
    *fits = ids.count <= r->config->max_length;
    if (give)
        give_or_drop(r, (Sample){ids.ids, mask, ids.count, cut, items, item_count, &mine}, give,
                     context);
done:
    json_decref(part);
    free(items);
    free(mask);
    tokens_free(&ids);
    rendered_free(&rendered);
    return status;
}

/* One past the last message of the model turn that holds message i: up to the next user message. */
static size_t turn_end(const json_t *messages, size_t i) {
    while (i < json_array_size(messages) && !role_is(json_array_get(messages, i), "user")) i++;
    return i;
}

static bool is_model_turn(const json_t *messages, size_t from, size_t to) {
    for (size_t i = from; i < to; i++)
        if (role_is(json_array_get(messages, i), "assistant")) return true;
    return false;
}

static bool turn_thinks(const json_t *messages, size_t from, size_t to) {
    for (size_t i = from; i < to; i++)
        if (has_thought(json_array_get(messages, i))) return true;
    return false;
}

/* Starts and ends of the model turns: what lies between user messages and holds an assistant
 * message. */
typedef struct Turn {
    size_t from, to;
} Turn;

static size_t list_turns(const json_t *messages, Turn *turns) {
    size_t count = 0, size = json_array_size(messages);
    for (size_t i = 0; i < size;) {
        size_t to = turn_end(messages, i);
        if (to > i && is_model_turn(messages, i, to)) turns[count++] = (Turn){i, to};
        i = to + 1;
    }
    return count;
}

static Status convert_chat(RowReader *r, const json_t *messages, const MediumList *media,
                           const json_t *tools, size_t first_trained, SampleFunction *give,
                           void *context) {
    const DataConfig *c = r->config;
    if (!r->has_format) {
        TRY(chat_format_find(&r->format, r->model_dir, c->chat_format));
        r->has_format = true;
    }
    if (!json_array_size(messages)) FAIL(ERR_FORMAT, "messages is empty");
    bool large = r->format == CHAT_LARGE,
         any_thought = turn_thinks(messages, 0, json_array_size(messages)), fits;
    bool per_turn =
        c->turns == TURNS_PER_TURN || (c->turns == TURNS_AUTO && (large || any_thought));
    Turn *turns = must_calloc(json_array_size(messages) + 1, sizeof *turns);
    size_t count = list_turns(messages, turns), begin = 0;
    Status status = OK;
    if (!count) r->dropped++;
    while (begin < count && turns[begin].to <= first_trained) begin++;
    if (c->loss_on == LOSS_COMPLETION && count) begin = count - 1;
    ChatOptions options = {.format = r->format, .trl_mask = c->trl_mask};
    if (per_turn) {
        for (size_t t = begin; t < count; t++) {
            bool thinks = turn_thinks(messages, turns[t].from, turns[t].to);
            options.enable_thinking = thinks;
            options.train_from =
                (int)(turns[t].from > first_trained ? turns[t].from : first_trained);
            options.empty_thought_from =
                large && !thinks && c->empty_thought ? options.train_from : 0;
            TRY_DONE(give_chat(r, messages, media, turns[t].to, tools, options, false, give,
                               context, &fits));
        }
        goto done;
    }
    size_t last = count; /* whole: as many turns as fit */
    while (last > begin) {
        Turn end = turns[last - 1];
        bool thinks = turn_thinks(messages, end.from, end.to);
        options.enable_thinking = thinks;
        options.train_from = (int)(begin ? turns[begin].from : first_trained);
        options.empty_thought_from = large && !thinks && c->empty_thought ? (int)end.from : 0;
        bool all = last == count;
        if (c->cut_long) {
            TRY_DONE(
                give_chat(r, messages, media, end.to, tools, options, !all, NULL, NULL, &fits));
            if (!fits && last - 1 > begin) {
                last--;
                continue;
            }
        }
        TRY_DONE(give_chat(r, messages, media, end.to, tools, options, !all, give, context, &fits));
        break;
    }
done:
    free(turns);
    return status;
}

/* ShareGPT: [{from, value}] */
static json_t *from_conversations(const json_t *conversations) {
    static const char *const roles[][2] = {{"human", "user"},      {"user", "user"},
                                           {"gpt", "assistant"},   {"assistant", "assistant"},
                                           {"model", "assistant"}, {"system", "system"},
                                           {"tool", "tool"}};
    json_t *messages = json_array(), *turn;
    size_t i;
    json_array_foreach(conversations, i, turn) {
        Slice from = json_slice(json_object_get(turn, "from"));
        json_t *value = json_object_get(turn, "value");
        const char *role = NULL;
        for (size_t k = 0; k < sizeof roles / sizeof *roles; k++)
            if (slice_is(from, roles[k][0])) role = roles[k][1];
        if (!role || !json_is_string(value)) {
            json_decref(messages);
            status_fail(ERR_FORMAT, "conversations[%zu] has no known 'from' or no 'value'", i);
            return NULL;
        }
        json_array_append_new(messages, json_pack("{s:s, s:O}", "role", role, "content", value));
    }
    return messages;
}

/* Alpaca: instruction, optional input and system, output. */
static json_t *from_alpaca(const RowReader *r, const json_t *row) {
    Slice instruction = json_slice(field(r, row, "instruction")),
          input = json_slice(field(r, row, "input"));
    json_t *output = field(r, row, "output"), *system = field(r, row, "system"),
           *messages = json_array();
    Text text = {0};
    text_add(&text, instruction.bytes, instruction.size);
    if (input.size) text_adds(&text, "\n\n");
    text_add(&text, input.bytes, input.size);
    if (json_truth(system))
        json_array_append_new(messages,
                              json_pack("{s:s, s:O}", "role", "system", "content", system));
    json_array_append_new(messages, json_pack("{s:s, s:o}", "role", "user", "content",
                                              json_stringn(text.bytes, text.size)));
    json_array_append_new(messages,
                          json_pack("{s:s, s:O}", "role", "assistant", "content", output));
    text_free(&text);
    return messages;
}

/* Parts of an unknown type would be dropped by the template without a word. */
static Status check_parts(const json_t *messages) {
    static const char *const known[] = {"text",  "image",       "image_url",
                                        "audio", "input_audio", "video"};
    size_t i, k;
    json_t *message, *part;
    json_array_foreach(messages, i, message)
        json_array_foreach(json_object_get(message, "content"), k, part) {
        Slice type = json_slice(json_object_get(part, "type"));
        bool found = !type.size;
        for (size_t t = 0; t < sizeof known / sizeof *known; t++) found |= slice_is(type, known[t]);
        if (!found)
            FAIL(ERR_FORMAT,
                 "message %zu holds a part of type '%s', expected text, image, audio or video", i,
                 type.bytes);
    }
    return OK;
}

static Status convert_messages(RowReader *r, const json_t *messages, const json_t *tools,
                               size_t first_trained, SampleFunction *give, void *context) {
    MediumList media = {0};
    if (!json_is_array(messages)) FAIL(ERR_FORMAT, "messages is not a list");
    TRY(check_parts(messages));
    if (messages_media_count(messages) && !r->reading.config)
        FAIL(ERR_FORMAT, "the row holds media, and this model reads text alone");
    json_t *repaired = messages_repaired(r->config, messages);
    Status status = OK;
    if (messages_media_count(messages)) status = media_collect(&media, repaired, &r->reading);
    if (status == OK)
        status = convert_chat(r, repaired, &media, tools, first_trained, give, context);
    media_list_free(&media);
    json_decref(repaired);
    return status;
}

Status row_convert(RowReader *r, const json_t *row, SampleFunction *give, void *context) {
    if (!json_is_object(row)) FAIL(ERR_FORMAT, "the row is not an object");
    json_t *messages = field(r, row, "messages"), *tools = field(r, row, "tools"),
           *text = field(r, row, "text");
    json_t *prompt = field(r, row, "prompt"), *completion = field(r, row, "completion");
    json_t *conversations = field(r, row, "conversations"), *made = NULL;
    if (messages) return convert_messages(r, messages, tools, 0, give, context);
    if (conversations) {
        made = from_conversations(conversations);
    } else if (json_is_string(field(r, row, "instruction")) &&
               json_is_string(field(r, row, "output"))) {
        made = from_alpaca(r, row);
    } else if (json_is_array(prompt) && json_is_array(completion)) {
        json_t *joined = json_copy(prompt);
        json_array_extend(joined, completion);
        Status status = convert_messages(r, joined, tools, json_array_size(prompt), give, context);
        json_decref(joined);
        return status;
    } else if (json_is_string(prompt) && json_is_string(completion)) {
        convert_pair(r, json_slice(prompt), json_slice(completion), give, context);
        return OK;
    } else if (json_is_string(text)) {
        convert_text(r, json_slice(text), give, context);
        return OK;
    } else {
        FAIL(ERR_FORMAT, "the row has neither messages, prompt and completion, text, conversations "
                         "nor instruction "
                         "and output (data.fields maps other spellings)");
    }
    if (!made) return ERR_FORMAT;
    Status status = convert_messages(r, made, tools, 0, give, context);
    json_decref(made);
    return status;
}
