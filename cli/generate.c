/* generate.c - lapidary generate: one answer. */
#include "infer/generate.h"
#include "cli/command.h"
#include "data/rows.h"
#include "formats/file.h"
#include "infer/answer.h"
#include "infer/dialog.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What the command line says of the prompt. */
typedef struct Asked {
    const char *text, *format, *tools;
    bool raw, think;
    MediaOptions media;
} Asked;

static Status make_prompt(DialogPrompt *p, Model *m, const Asked *asked) {
    if (!utf8_valid(asked->text, slice_of(asked->text).size))
        FAIL(ERR_FORMAT, "the prompt is not UTF-8");
    if (asked->raw) {
        DataConfig data = data_config_default();
        RowReader reader;
        TRY(row_reader_init(&reader, &data, m->tokenizer, m->dir));
        encode_document(&reader, slice_of(asked->text), &p->ids);
        return OK;
    }
    ChatOptions options = {.add_generation_prompt = true, .enable_thinking = asked->think};
    TRY(chat_format_find(&options.format, m->dir, asked->format));
    json_t *tools = NULL;
    if (asked->tools) {
        char *bytes;
        size_t size;
        TRY(file_read(&bytes, &size, asked->tools, (size_t)64 << 20));
        Status status = json_read(&tools, bytes, size, asked->tools);
        free(bytes);
        TRY(status);
    }
    json_t *messages = json_pack("[o]", media_message(&asked->media, asked->text));
    Status status =
        dialog_prompt(p, &m->g, m->tokenizer, messages, tools, &options, &asked->media.reading);
    json_decref(messages);
    json_decref(tools);
    return status;
}

/* The text that is new since the last call. */
static void show_token(void *context, Sequence *s) {
    size_t *shown = context;
    fwrite(s->stream.text.bytes + *shown, 1, s->text_size - *shown, stdout);
    *shown = s->text_size;
    fflush(stdout);
}

static void print_json(const Tokens *ids, const Text *text, const DialogPrompt *prompt, bool raw) {
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
    const char *model = NULL, *adapter = NULL, *device = "auto", *dtype = "bf16";
    bool json = false;
    double temperature = NAN, top_p = NAN, min_p = NAN, penalty = NAN;
    int64_t top_k = -1, seed = -1, max_tokens = -1;
    Asked asked = {.format = "auto"};
    Option options[] = {
        {"--model", OPTION_TEXT, &model, "DIR  checkpoint folder"},
        {"--adapter", OPTION_TEXT, &adapter, "DIR  PEFT folder, applied without merging"},
        {"--raw", OPTION_FLAG, &asked.raw, "the prompt is text after <bos>, no chat template"},
        {"--tools", OPTION_TEXT, &asked.tools, "FILE  JSON list of functions the model may call"},
        {"--think", OPTION_FLAG, &asked.think, "let the model think first"},
        MEDIA_FILES(asked.media),
        MEDIA_BUDGETS(asked.media.reading),
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
        {"--chat-format", OPTION_TEXT, &asked.format, "auto|large|small"},
        {NULL, OPTION_FLAG, NULL, NULL}};
    Arguments a = {.usage = "generate --model DIR [--adapter DIR] [options] PROMPT",
                   .about = "Answers one prompt. Missing sampling options come from "
                            "generation_config.json, else greedy.",
                   .options = options,
                   .least = 1,
                   .most = 1};
    Model m;
    Sampling s;
    DialogPrompt prompt = {0};
    Tokens ids = {0};
    Text text = {0};
    size_t shown = 0;
    TRY(arguments_parse(&a, argc, argv));
    if (a.helped) return OK;
    if (!model) FAIL(ERR_USAGE, "--model is missing: lapidary %s", a.usage);
    bool media = asked.media.parts != NULL;
    asked.text = a.positional[0];
    if (media && asked.raw) FAIL(ERR_USAGE, "--raw takes text alone: media need the chat template");
    TRY(media_budgets_check(&asked.media.reading));
    TRY(model_open(&m, model, adapter, device, dtype, WEIGHTS_LOADED,
                   media ? WITH_MEDIA : WITHOUT_MEDIA));
    Status status = OK;
    TRY_DONE(sampling_load(&s, m.dir, &m.g.config));
    if (!isnan(temperature)) s.temperature = temperature;
    if (!isnan(top_p)) s.top_p = top_p;
    if (!isnan(min_p)) s.min_p = min_p;
    if (!isnan(penalty)) s.repetition_penalty = penalty;
    if (top_k >= 0) s.top_k = top_k;
    if (seed >= 0) s.seed = (uint64_t)seed;
    if (max_tokens >= 0) s.max_tokens = max_tokens;
    TRY_DONE(make_prompt(&prompt, &m, &asked));
    TRY_DONE(dialog_soften(&prompt.soft, &m.g, &prompt.media, &prompt.ids));
    TRY_DONE(generate(&m, &prompt.ids, &prompt.soft, &s, kv, draft, &ids, &text,
                      json ? NULL : show_token, &shown, &counts));
    if (draft)
        fprintf(stderr, "%s%d of %d guesses were right\n", json ? "" : "\n", (int)counts.right,
                (int)counts.guessed);
    if (json)
        print_json(&ids, &text, &prompt, asked.raw);
    else
        putchar('\n');
done:
    tokens_free(&ids);
    text_free(&text);
    dialog_prompt_free(&prompt);
    json_decref(asked.media.parts);
    model_close(&m);
    return status;
}
