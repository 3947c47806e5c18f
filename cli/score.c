/* score.c - lapidary score: the negative log-likelihood of each token. */
#include "cli/command.h"
#include "data/rows.h"
#include "formats/file.h"
#include "infer/dialog.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct Context {
    Model model;
    DataConfig data;
    RowReader reader;
    const char *format;
    StepMemory memory;
    int64_t capacity;
    FILE *logits; /* where --logits go; NULL: nowhere */
    int64_t scored;
    MediaOptions media; /* parts: of the one text that is given, which answers them */
} Context;

/* A chat as `tokenize --chat` renders it, its media in their slots. */
static Status encode_chat(Context *c, const json_t *messages, const json_t *tools,
                          const ChatOptions *options, Tokens *ids, SoftMedia *media) {
    Rendered rendered = {0};
    MediumList list = {0};
    uint8_t *mask = NULL;
    Status status = OK;
    TRY_DONE(chat_render(&rendered, messages, tools, options));
    TRY_DONE(dialog_read_media(&list, &rendered, &c->model.g, messages, &c->media.reading));
    chat_encode(c->model.tokenizer, &rendered, false, ids, &mask);
    TRY_DONE(dialog_soften(media, &c->model.g, &list, ids));
done:
    free(mask);
    media_list_free(&list);
    rendered_free(&rendered);
    return status;
}

/* Ids of a row, and from which on they are scored. */
static Status encode_row(Context *c, const json_t *row, Tokens *ids, int64_t *first,
                         SoftMedia *media) {
    json_t *text = row_get(row, "text"), *prompt = row_get(row, "prompt"),
           *completion = row_get(row, "completion");
    json_t *messages = row_get(row, "messages");
    *first = 1;
    if (messages) {
        if (!c->reader.has_format) {
            TRY(chat_format_find(&c->reader.format, c->model.dir, c->format));
            c->reader.has_format = true;
        }
        ChatOptions options = row_chat_options(row, c->reader.format);
        TRY(encode_chat(c, messages, row_get(row, "tools"), &options, ids, media));
    } else if (json_is_string(prompt) && json_is_string(completion)) {
        encode_document(&c->reader, json_slice(prompt), ids);
        *first = ids->count;
        Slice s = json_slice(completion);
        tokenizer_encode(c->model.tokenizer, ids, s.bytes, s.size, NULL, 0, false);
    } else if (json_is_string(text)) {
        encode_document(&c->reader, json_slice(text), ids);
    } else {
        FAIL(ERR_FORMAT, "the row has neither text, prompt and completion, nor messages");
    }
    if (ids->count > c->model.g.config.max_position_embeddings)
        FAIL(ERR_FORMAT, "the row has %" PRId64 " tokens, the model takes %" PRId64, ids->count,
             c->model.g.config.max_position_embeddings);
    return OK;
}

/* The first `scored` kept rows have a target. */
static void write_logits(void *context, int64_t first, Tensor logits) {
    Context *c = context;
    int64_t n = c->scored - first < logits.shape[0] ? c->scored - first : logits.shape[0];
    if (n > 0) fwrite(logits.data, sizeof(float), (size_t)(n * logits.shape[1]), c->logits);
}

/* Whether token n of a row is scored: from `first` on, but no slot of the row's media. */
static bool is_scored(const ModelConfig *c, const Tokens *ids, int64_t n, int64_t first,
                      const SoftMedia *media) {
    int32_t id = ids->ids[n];
    bool slot = id == c->image_token_id || id == c->video_token_id || id == c->audio_token_id;
    return n >= first && !(media->count && slot);
}

static Status score_ids(Context *c, const Tokens *ids, int64_t first, const SoftMedia *media,
                        float *nll) {
    StepOptions options = {.mode = STACK_SCORE, .shortcut = !c->logits};
    int64_t N = ids->count;
    if (c->logits) options.logits = write_logits, options.logits_context = c, c->scored = N - 1;
    if (N > c->capacity) {
        step_free(&c->memory);
        c->capacity = N > 512 ? N : 512;
        TRY(step_init(&c->memory, &c->model.g, c->capacity, &options));
    }
    int32_t *positions = must_malloc((size_t)N * 4 * sizeof *positions), *starts = positions + N,
            *targets = starts + N, *ends = targets + N;
    for (int64_t n = 0; n < N; n++) {
        positions[n] = (int32_t)n;
        starts[n] = 0;
        bool scored = n + 1 < N && is_scored(&c->model.g.config, ids, n + 1, first, media);
        targets[n] = scored ? ids->ids[n + 1] : -1;
    }
    Batch batch = {.N = N,
                   .ids = ids->ids,
                   .positions = positions,
                   .starts = starts,
                   .targets = targets,
                   .media = media->items,
                   .media_count = media->count};
    if (media_span_ends(ends, N, &c->model.g.config, media->items, media->count))
        batch.span_ends = ends;
    step_run(&c->model.g, &c->memory, &batch, &options, nll);
    free(positions);
    return OK;
}

/* What was given as text, as the answer to media. */
static json_t *answer_row(const Context *c, const json_t *row) {
    return json_pack("{s:[{s:s, s:O}, {s:s, s:O}]}", "messages", "role", "user", "content",
                     c->media.parts, "role", "assistant", "content", json_object_get(row, "text"));
}

static Status score_row(void *context, const json_t *given, Text *out) {
    Context *c = context;
    json_t *row = c->media.parts ? answer_row(c, given) : json_incref((json_t *)given);
    Tokens ids = {0};
    SoftMedia media = {0};
    float *nll = NULL;
    int64_t first;
    Status status = OK;
    TRY_DONE(encode_row(c, row, &ids, &first, &media));
    nll = must_calloc((size_t)ids.count + 1, sizeof *nll);
    TRY_DONE(score_ids(c, &ids, first, &media, nll));
    double total = 0;
    int64_t counted = 0;
    for (int64_t n = 0; n + 1 < ids.count; n++)
        if (is_scored(&c->model.g.config, &ids, n + 1, first, &media)) total += nll[n], counted++;
    text_addf(out, "{\"tokens\": %" PRId64 ", \"nll\": ", counted);
    text_add_real(out, total);
    text_adds(out, ", \"token_nll\": [");
    for (int64_t n = 0; n + 1 < ids.count; n++)
        if (!is_scored(&c->model.g.config, &ids, n + 1, first, &media))
            text_adds(out, n ? ", null" : "null");
        else
            text_addf(out, "%s%.9g", n ? ", " : "", (double)nll[n]);
    text_adds(out, "]}");
done:
    json_decref(row);
    free(nll);
    soft_media_free(&media);
    tokens_free(&ids);
    return status;
}

Status command_score(int argc, char **argv) {
    const char *model = NULL, *adapter = NULL, *data = NULL, *device = "auto", *dtype = "bf16",
               *logits = NULL;
    Context c = {.format = "auto"};
    char *folder = NULL;
    Option options[] = {
        {"--model", OPTION_TEXT, &model, "DIR  checkpoint folder"},
        {"--adapter", OPTION_TEXT, &adapter, "DIR  PEFT folder, applied without merging"},
        {"--data", OPTION_TEXT, &data, "FILE  JSONL rows; - is standard input"},
        {"--device", OPTION_TEXT, &device, "auto|cpu|cuda[:n]"},
        {"--dtype", OPTION_TEXT, &dtype, "bf16|f32  (bf16)"},
        {"--chat-format", OPTION_TEXT, &c.format, "auto|large|small"},
        MEDIA_FILES(c.media),
        MEDIA_BUDGETS(c.media.reading),
        {"--logits", OPTION_TEXT, &logits,
         "FILE  the logits too: (vocabulary) little-endian f32 after each token but a row's last"},
        {NULL, OPTION_FLAG, NULL, NULL}};
    Arguments a = {.usage = "score --model DIR [--adapter DIR] [--data FILE | TEXT]",
                   .about =
                       "Rows {\"text\"}, {\"prompt\", \"completion\"} or {\"messages\", ...} to\n"
                       "{\"tokens\", \"nll\", \"token_nll\"}: natural logarithms, null where "
                       "nothing is scored. A TEXT with --image and the like\nis scored as the "
                       "answer to them.",
                   .options = options,
                   .most = 1};
    TRY(arguments_parse(&a, argc, argv));
    if (a.helped) return OK;
    if (!model) FAIL(ERR_USAGE, "--model is missing: lapidary %s", a.usage);
    TRY(media_budgets_check(&c.media.reading));
    if (c.media.parts && (data || !a.count))
        FAIL(ERR_USAGE, "--image, --audio and --video go with a TEXT; rows name their own media");
    TRY(model_open(&c.model, model, adapter, device, dtype, WEIGHTS_LOADED, WITH_MEDIA));
    c.media.reading.config = &c.model.g.config;
    if (data) c.media.reading.folder = folder = path_folder(data);
    c.data = data_config_default();
    Status status = row_reader_init(&c.reader, &c.data, c.model.tokenizer, model);
    if (status == OK && logits && !(c.logits = fopen(logits, "wb")))
        status = status_fail(ERR_IO, "%s: %s", logits, strerror(errno));
    if (status == OK)
        status = rows_run(data, a.count ? a.positional[0] : NULL, true, score_row, &c);
    if (c.logits && (ferror(c.logits) | fclose(c.logits)) && status == OK)
        status = status_fail(ERR_IO, "%s: cannot be written", logits);
    free(folder);
    json_decref(c.media.parts);
    step_free(&c.memory);
    model_close(&c.model);
    return status;
}
