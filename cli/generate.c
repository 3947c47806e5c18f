/* generate.c - lapidary generate: one answer. */
#include "infer/generate.h"
#include "cli/command.h"
#include "data/rows.h"
#include "formats/file.h"
#include "infer/answer.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct Prompt {
    Tokens ids;
    Text text; /* of a chat: what the answer is parsed after */
} Prompt;

static Status make_prompt(Prompt *p, Model *m, const char *text, const char *format,
                          const char *tools_path, bool raw, bool think) {
    DataConfig data = data_config_default();
    RowReader reader;
    TRY(row_reader_init(&reader, &data, m->tokenizer, m->dir));
    if (!utf8_valid(text, slice_of(text).size)) FAIL(ERR_FORMAT, "the prompt is not UTF-8");
    if (raw) {
        encode_document(&reader, slice_of(text), &p->ids);
        return OK;
    }
    ChatOptions options = {.add_generation_prompt = true, .enable_thinking = think};
    TRY(chat_format_find(&options.format, m->dir, format));
    json_t *tools = NULL;
    if (tools_path) {
        char *bytes;
        size_t size;
        TRY(file_read(&bytes, &size, tools_path, (size_t)64 << 20));
        Status status = json_read(&tools, bytes, size, tools_path);
        free(bytes);
        TRY(status);
    }
    json_t *messages = json_pack("[{s:s, s:s}]", "role", "user", "content", text);
    Rendered rendered;
    Status status = chat_render(&rendered, messages, tools, &options);
    json_decref(messages);
    json_decref(tools);
    TRY(status);
    uint8_t *mask;
    chat_encode(m->tokenizer, &rendered, false, &p->ids, &mask);
    free(mask);
    text_add(&p->text, rendered.text.bytes, rendered.text.size);
    rendered_free(&rendered);
    return OK;
}

/* The text that is new since the last call. */
static void show_token(void *context, Sequence *s) {
    size_t *shown = context;
    fwrite(s->stream.text.bytes + *shown, 1, s->text_size - *shown, stdout);
    *shown = s->text_size;
    fflush(stdout);
}

static void print_json(const Tokens *ids, const Text *text, const Prompt *prompt, bool raw) {
    Text line = {0};
    text_adds(&line, "{\"ids\": ");
    text_add_ids(&line, ids);
    text_adds(&line, ", \"text\": ");
    text_add_json_string(&line, (Slice){text->bytes, text->size});
    if (!raw) {
        json_t *message = answer_parse((Slice){prompt->text.bytes, prompt->text.size},
                                       (Slice){text->bytes, text->size}, NULL);
        text_adds(&line, ", \"message\": ");
        text_add_json(&line, message);
        json_decref(message);
    }
    text_adds(&line, "}");
    printf("%s\n", line.bytes);
    text_free(&line);
}

Status command_generate(int argc, char **argv) {
    const char *kv = NULL, *draft = NULL;
    EngineCounts counts;
    const char *model = NULL, *adapter = NULL, *device = "auto", *dtype = "bf16", *format = "auto",
               *tools = NULL;
    bool raw = false, think = false, json = false;
    double temperature = NAN, top_p = NAN, min_p = NAN, penalty = NAN;
    int64_t top_k = -1, seed = -1, max_tokens = -1;
    OptionList media = {0};
    Option options[] = {
        {"--model", OPTION_TEXT, &model, "DIR  checkpoint folder"},
        {"--adapter", OPTION_TEXT, &adapter, "DIR  PEFT folder, applied without merging"},
        {"--raw", OPTION_FLAG, &raw, "the prompt is text after <bos>, no chat template"},
        {"--tools", OPTION_TEXT, &tools, "FILE  JSON list of functions the model may call"},
        {"--think", OPTION_FLAG, &think, "let the model think first"},
        {"--image", OPTION_LIST, &media, "FILE  (not in this version)"},
        {"--audio", OPTION_LIST, &media, "FILE  (not in this version)"},
        {"--video", OPTION_LIST, &media, "FILE  (not in this version)"},
        {"--temperature", OPTION_REAL, &temperature, "X  0 is greedy"},
        {"--top-k", OPTION_INT, &top_k, "N"},
        {"--top-p", OPTION_REAL, &top_p, "X"},
        {"--min-p", OPTION_REAL, &min_p, "X  least share of the best token's probability"},
        {"--repetition-penalty", OPTION_REAL, &penalty, "X  1 is none"},
        {"--seed", OPTION_INT, &seed, "N  (42)"},
        {"--draft", OPTION_TEXT, &draft, "DIR  an assistant that guesses ahead"},
        {"--kv", OPTION_TEXT, &kv, "bf16|q8_0|q4_0  keys and values (the model's dtype)"},
        {"--max-tokens", OPTION_INT, &max_tokens, "N  (1024)"},
        {"--json", OPTION_FLAG, &json, "one JSON line: ids, text, message"},
        {"--device", OPTION_TEXT, &device, "auto|cpu|cuda[:n]"},
        {"--dtype", OPTION_TEXT, &dtype, "bf16|f32  (bf16)"},
        {"--chat-format", OPTION_TEXT, &format, "auto|large|small"},
        {NULL, OPTION_FLAG, NULL, NULL}};
    Arguments a = {.usage = "generate --model DIR [--adapter DIR] [options] PROMPT",
                   .about = "Answers one prompt. Missing sampling options come from "
                            "generation_config.json, else greedy.",
                   .options = options,
                   .least = 1,
                   .most = 1};
    Model m;
    Sampling s;
    Prompt prompt = {0};
    Tokens ids = {0};
    Text text = {0};
    size_t shown = 0;
    TRY(arguments_parse(&a, argc, argv));
    if (a.helped) return OK;
    if (!model) FAIL(ERR_USAGE, "--model is missing: lapidary %s", a.usage);
    if (media.count)
        FAIL(ERR_USAGE,
             "images, audio and video need the towers, which this version does not have");
    TRY(model_open(&m, model, adapter, device, dtype, WEIGHTS_LOADED));
    Status status = OK;
    TRY_DONE(sampling_load(&s, m.dir, &m.g.config));
    if (!isnan(temperature)) s.temperature = temperature;
    if (!isnan(top_p)) s.top_p = top_p;
    if (!isnan(min_p)) s.min_p = min_p;
    if (!isnan(penalty)) s.repetition_penalty = penalty;
    if (top_k >= 0) s.top_k = top_k;
    if (seed >= 0) s.seed = (uint64_t)seed;
    if (max_tokens >= 0) s.max_tokens = max_tokens;
    TRY_DONE(make_prompt(&prompt, &m, a.positional[0], format, tools, raw, think));
    TRY_DONE(generate(&m, &prompt.ids, &s, kv, draft, &ids, &text, json ? NULL : show_token, &shown,
                      &counts));
    if (draft)
        fprintf(stderr, "%s%d of %d guesses were right\n", json ? "" : "\n", (int)counts.right,
                (int)counts.guessed);
    if (json)
        print_json(&ids, &text, &prompt, raw);
    else
        putchar('\n');
done:
    tokens_free(&ids);
    text_free(&text);
    tokens_free(&prompt.ids);
    text_free(&prompt.text);
    model_close(&m);
    return status;
}
