/* parse.c - lapidary parse: model output to messages. */
#include "cli/command.h"
#include "infer/answer.h"

static Status parse_row(void *context, const json_t *row, Text *out) {
    const bool *strict = context;
    json_t *text = row_get(row, "text"), *message;
    if (!json_is_string(text)) FAIL(ERR_FORMAT, "the row has no text");
    Slice prefix = json_slice(row_get(row, "prefix"));
    if (*strict)
        TRY(answer_parse_strict(&message, prefix, json_slice(text), row_get(row, "tools")));
    else
        message = answer_parse(prefix, json_slice(text), row_get(row, "tools"));
    text_add_json(out, message);
    json_decref(message);
    return OK;
}

Status command_parse(int argc, char **argv) {
    const char *data = NULL;
    bool strict = false;
    Option options[] = {{"--data", OPTION_TEXT, &data,
                         "FILE  JSONL rows {\"text\", \"prefix\", \"tools\"}; - is standard input"},
                        {"--strict", OPTION_FLAG, &strict,
                         "the released template's own rule, its refusals included"},
                        {NULL, OPTION_FLAG, NULL, NULL}};
    Arguments a = {.usage = "parse [--strict] [--data FILE | TEXT]",
                   .about =
                       "Reads model output into message objects: thinking, content, tool_calls.",
                   .options = options,
                   .most = 1};
    TRY(arguments_parse(&a, argc, argv));
    if (a.helped) return OK;
    return rows_run(data, a.count ? a.positional[0] : NULL, false, parse_row, &strict);
}
