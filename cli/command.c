/* command.c - command lines and JSON rows. */
#include "cli/command.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void print_help(const Arguments *a) {
    printf("usage: lapidary %s\n\n%s\n", a->usage, a->about);
    if (a->options->name) printf("\noptions:\n");
    for (const Option *o = a->options; o->name; o++) printf("  %-18s %s\n", o->name, o->help);
}

static Status set_option(const Option *o, const char *value) {
    char *end;
    errno = 0;
    if (o->kind == OPTION_TEXT) {
        *(const char **)o->target = value;
    } else if (o->kind == OPTION_LIST) {
        OptionList *list = o->target;
        if (list->count == 64) FAIL(ERR_USAGE, "%s is given more than 64 times", o->name);
        list->items[list->count++] = value;
    } else if (o->kind == OPTION_PART) {
        json_t **parts = o->target;
        if (!utf8_valid(value, strlen(value))) FAIL(ERR_USAGE, "%s is not UTF-8", o->name);
        if (!*parts) *parts = json_array();
        json_array_append_new(*parts, json_pack("{s:s, s:s}", "type", o->name + 2, "path", value));
    } else if (o->kind == OPTION_INT) {
        *(int64_t *)o->target = strtoll(value, &end, 10);
        if (*end || end == value || errno)
            FAIL(ERR_USAGE, "%s is '%s', expected a whole number", o->name, value);
    } else {
        *(double *)o->target = strtod(value, &end);
        if (*end || end == value || errno)
            FAIL(ERR_USAGE, "%s is '%s', expected a number", o->name, value);
    }
    return OK;
}

Status arguments_parse(Arguments *a, int argc, char **argv) {
    static char *kept[4096];
    bool only_positional = false;
    a->positional = kept;
    for (int i = 1; i < argc; i++) {
        if (!only_positional && !strcmp(argv[i], "--")) {
            only_positional = true;
            continue;
        }
        if (only_positional || argv[i][0] != '-' || !argv[i][1]) {
            if (a->count < 4096) kept[a->count++] = argv[i];
            continue;
        }
        if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) {
            print_help(a);
            a->helped = true;
            return OK;
        }
        const Option *o = a->options;
        const char *equals = strchr(argv[i], '=');
        size_t length = equals ? (size_t)(equals - argv[i]) : strlen(argv[i]);
        while (o->name && (strlen(o->name) != length || strncmp(o->name, argv[i], length))) o++;
        if (!o->name) FAIL(ERR_USAGE, "unknown option %s (lapidary %s)", argv[i], a->usage);
        if (o->kind == OPTION_FLAG) {
            if (equals) FAIL(ERR_USAGE, "%s takes no value", o->name);
            *(bool *)o->target = true;
        } else {
            if (!equals && i + 1 == argc) FAIL(ERR_USAGE, "%s needs a value", o->name);
            TRY(set_option(o, equals ? equals + 1 : argv[++i]));
        }
    }
    if (a->count < a->least) FAIL(ERR_USAGE, "something is missing: lapidary %s", a->usage);
    if (a->most >= 0 && a->count > a->most)
        FAIL(ERR_USAGE, "'%s' is too much: lapidary %s", kept[a->most], a->usage);
    return OK;
}

Status run_arguments_load(RunConfig *config, const Arguments *a, const RunOptions *options) {
    const char *const keys[] = {"device", "dtype", "data.chat_format"};
    const char *const values[] = {options->device, options->dtype, options->chat_format};
    char **overrides = must_calloc((size_t)a->count + 3, sizeof *overrides), *made[3] = {0};
    int count = 0;
    for (int i = 1; i < a->count; i++) overrides[count++] = a->positional[i];
    for (int i = 0; i < 3; i++)
        if (values[i]) overrides[count++] = made[i] = must_format("%s=%s", keys[i], values[i]);
    Status status = run_config_load(config, a->positional[0], overrides, count);
    for (int i = 0; i < 3; i++) free(made[i]);
    free(overrides);
    return status;
}

Status media_budgets_check(const MediumOptions *r) {
    if (r->video_frames < 0) FAIL(ERR_USAGE, "--video-frames is below 0");
    if (!media_is_budget(r->image_tokens) || !media_is_budget(r->video_tokens))
        FAIL(ERR_USAGE, "--image-tokens and --video-tokens: expected 70, 140, 280, 560 or 1120");
    return OK;
}

json_t *media_message(const MediaOptions *media, const char *text) {
    json_t *content = json_string(text);
    if (media->parts) {
        json_t *parts = json_copy(media->parts);
        json_array_append_new(parts, json_pack("{s:s, s:o}", "type", "text", "text", content));
        content = parts;
    }
    return json_pack("{s:s, s:o}", "role", "user", "content", content);
}

void text_add_ids(Text *out, const Tokens *ids) {
    text_adds(out, "[");
    for (int64_t i = 0; i < ids->count; i++) text_addf(out, "%s%d", i ? ", " : "", ids->ids[i]);
    text_adds(out, "]");
}

ChatOptions row_chat_options(const json_t *row, ChatFormat format) {
    return (ChatOptions){.format = format,
                         .add_generation_prompt = json_truth(row_get(row, "add_generation_prompt")),
                         .enable_thinking = json_truth(row_get(row, "enable_thinking")),
                         .preserve_thinking = json_truth(row_get(row, "preserve_thinking"))};
}

json_t *row_get(const json_t *row, const char *key) {
    json_t *value = json_object_get(row, key);
    return json_is_null(value) ? NULL : value;
}

static Status run_row(const char *name, const char *bytes, size_t size, bool strict,
                      RowHandler *handle, void *context) {
    json_t *row = NULL;
    Text out = {0};
    Status status = utf8_valid(bytes, size) ? json_read(&row, bytes, size, name)
                                            : status_fail(ERR_FORMAT, "%s: is not UTF-8", name);
    if (status == OK && !json_is_object(row))
        status = status_fail(ERR_FORMAT, "%s: the row is not an object", name);
    if (status == OK) {
        status = handle(context, row, &out);
        if (status != OK && status != ERR_CONFIG) status_prefix(status, "%s", name);
    }
    json_decref(row);
    if (status == ERR_FORMAT && !strict) { /* the row's fault: told in its place */
        out.size = 0;
        text_adds(&out, "{\"error\": ");
        text_add_json_string(&out, slice_of(status_message()));
        text_adds(&out, "}");
        status = OK;
    }
    if (status == OK) {
        text_adds(&out, "\n");
        if (fwrite(out.bytes, 1, out.size, stdout) != out.size)
            status = status_fail(ERR_IO, "standard output cannot be written");
    }
    text_free(&out);
    return status;
}

Status rows_run(const char *path, const char *text, bool strict, RowHandler *handle,
                void *context) {
    if (!path && !text) FAIL(ERR_USAGE, "no rows: give --data FILE or a TEXT");
    if (!path) {
        Text row = {0};
        if (!utf8_valid(text, strlen(text))) FAIL(ERR_FORMAT, "the text is not UTF-8");
        text_adds(&row, "{\"text\": ");
        text_add_json_string(&row, slice_of(text));
        text_adds(&row, "}");
        Status status = run_row("the text", row.bytes, row.size, strict, handle, context);
        text_free(&row);
        return status;
    }
    FILE *file = strcmp(path, "-") ? fopen(path, "rb") : stdin;
    if (!file) FAIL(ERR_IO, "%s: %s", path, strerror(errno));
    char *line = NULL;
    size_t space = 0;
    Status status = OK;
    int number = 0;
    for (ssize_t size; status == OK && (size = getline(&line, &space, file)) >= 0;) {
        Slice s = slice_strip((Slice){line, (size_t)size});
        number++;
        if (!s.size) continue;
        char *name = must_format("%s:%d", path, number);
        status = run_row(name, s.bytes, s.size, strict, handle, context);
        free(name);
    }
    if (status == OK && ferror(file)) status = status_fail(ERR_IO, "%s: cannot be read", path);
    free(line);
    if (file != stdin) fclose(file);
    if (status == OK && fflush(stdout))
        status = status_fail(ERR_IO, "standard output cannot be written");
    return status;
}

Status gguf_format(DType *dtype, const char *name) {
    static const struct {
        const char *name;
        DType dtype;
    } formats[] = {{"bf16-gguf", BF16}, {"q8_0-gguf", Q8_0}, {"q4_0-gguf", Q4_0}};
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++)
        if (!strcmp(formats[i].name, name)) {
            *dtype = formats[i].dtype;
            return OK;
        }
    FAIL(ERR_USAGE, "format '%s', expected bf16-gguf, q8_0-gguf or q4_0-gguf", name);
}
