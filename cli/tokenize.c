/* tokenize.c - lapidary tokenize: text to ids, ids to text, chats to ids and mask. */
#include "cli/command.h"

#include <stdlib.h>

typedef struct Context {
    Tokenizer *tokenizer;
    ChatFormat format;
} Context;

static Status encode_row(void *context, const json_t *row, Text *out) {
    const Context *c = context;
    json_t *text = row_get(row, "text");
    if (!json_is_string(text)) FAIL(ERR_FORMAT, "the row has no text");
    Slice s = json_slice(text);
    Tokens ids = {0};
    tokenizer_encode(c->tokenizer, &ids, s.bytes, s.size, NULL, 0, false);
    text_adds(out, "{\"ids\": ");
    text_add_ids(out, &ids);
    text_adds(out, ", \"text\": ");
    text_add_json_string(out, s);
    text_adds(out, "}");
    tokens_free(&ids);
    return OK;
}

static Status decode_row(void *context, const json_t *row, Text *out) {
    const Context *c = context;
    json_t *list = row_get(row, "ids"), *id;
    Tokens ids = {0};
    Text text = {0};
    size_t i;
    Status status = OK;
    if (!json_is_array(list)) FAIL(ERR_FORMAT, "the row has no ids");
    json_array_foreach(list, i, id) {
        json_int_t value = json_integer_value(id);
        if (!json_is_integer(id) || value < 0 || value >= tokenizer_size(c->tokenizer))
            FAIL_DONE(ERR_FORMAT, "ids[%zu] is no token of this tokenizer", i);
        tokens_add(&ids, (int32_t)value);
    }
    tokenizer_decode(c->tokenizer, &text, ids.ids, ids.count, false);
    text_adds(out, "{\"ids\": ");
    text_add_ids(out, &ids);
    text_adds(out, ", \"text\": ");
    text_add_json_string(out, (Slice){text.bytes, text.size});
    text_adds(out, "}");
done:
    tokens_free(&ids);
    text_free(&text);
    return status;
}

static Status chat_row(void *context, const json_t *row, Text *out) {
    const Context *c = context;
    ChatOptions options = row_chat_options(row, c->format);
    Rendered rendered;
    Tokens ids = {0};
    uint8_t *mask;
    TRY(chat_render(&rendered, row_get(row, "messages"), row_get(row, "tools"), &options));
    chat_encode(c->tokenizer, &rendered, false, &ids, &mask);
    text_adds(out, "{\"ids\": ");
    text_add_ids(out, &ids);
    text_adds(out, ", \"text\": ");
    text_add_json_string(out, (Slice){rendered.text.bytes, rendered.text.size});
    text_adds(out, ", \"trained\": [");
    for (int64_t i = 0; i < ids.count; i++) text_addf(out, "%s%d", i ? ", " : "", mask[i]);
    text_adds(out, "]}");
    free(mask);
    tokens_free(&ids);
    rendered_free(&rendered);
    return OK;
}

Status command_tokenize(int argc, char **argv) {
    const char *model = NULL, *data = NULL, *format = "auto";
    bool decode = false, chat = false;
    Option options[] = {
        {"--model", OPTION_TEXT, &model, "DIR  checkpoint folder; its tokenizer files suffice"},
        {"--data", OPTION_TEXT, &data, "FILE  JSONL rows; - is standard input"},
        {"--decode", OPTION_FLAG, &decode, "rows {\"ids\"} to text, special tokens kept"},
        {"--chat", OPTION_FLAG, &chat,
         "rows {\"messages\", \"tools\", ...} rendered, with the training mask"},
        {"--chat-format", OPTION_TEXT, &format, "auto|large|small  instead of the template file's"},
        {NULL, OPTION_FLAG, NULL, NULL}};
    Arguments a = {.usage = "tokenize --model DIR [--decode|--chat] [--data FILE | TEXT]",
                   .about = "Rows {\"text\"} to {\"ids\", \"text\"}, nothing added to the text; "
                            "one JSON line a row.",
                   .options = options,
                   .most = 1};
    Context c = {0};
    TRY(arguments_parse(&a, argc, argv));
    if (a.helped) return OK;
    if (!model) FAIL(ERR_USAGE, "--model is missing: lapidary %s", a.usage);
    if (decode && chat) FAIL(ERR_USAGE, "--decode and --chat exclude each other");
    if (chat) TRY(chat_format_find(&c.format, model, format));
    TRY(tokenizer_load(&c.tokenizer, model));
    Status status = rows_run(data, a.count ? a.positional[0] : NULL, false,
                             decode ? decode_row
                             : chat ? chat_row
                                    : encode_row,
                             &c);
    tokenizer_free(c.tokenizer);
    return status;
}
