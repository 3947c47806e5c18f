/* init.c - lapidary init: a checkpoint with random weights, written as it is drawn. */
#include "cli/command.h"
#include "configs/model_config.h"
#include "data/tokenizer.h"
#include "formats/file.h"
#include "formats/initial.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Sets the ids the tokenizer gives the special tokens, and for `tiny` its vocabulary. */
static void fit_tokenizer(char **json, const Tokenizer *t, bool vocabulary) {
    static const char *const keys[] = {"pad_token_id", "bos_token_id"}, *const tokens[] = {"<pad>",
                                                                                           "<bos>"};
    static const char *const ends[] = {"<eos>", "<turn|>"};
    static const char *const marks[][2] = {
        {"image_token_id", "<|image|>"}, {"audio_token_id", "<|audio|>"},
        {"video_token_id", "<|video|>"}, {"boi_token_id", "<|image>"},
        {"eoi_token_id", "<image|>"},    {"boa_token_id", "<|audio>"},
        {"eoa_token_id", "<audio|>"}};
    json_t *root = json_loads(*json, 0, NULL), *text = json_object_get(root, "text_config"),
           *eos = json_array();
    if (!text) text = root;
    for (int i = 0; i < 2; i++) {
        if (tokenizer_find(t, tokens[i]) >= 0)
            json_object_set_new(text, keys[i], json_integer(tokenizer_find(t, tokens[i])));
        if (tokenizer_find(t, ends[i]) >= 0)
            json_array_append_new(eos, json_integer(tokenizer_find(t, ends[i])));
    }
    json_object_set_new(root, "eos_token_id", eos);
    for (size_t i = 0; text != root && i < sizeof marks / sizeof *marks; i++)
        if (tokenizer_find(t, marks[i][1]) >= 0)
            json_object_set_new(root, marks[i][0], json_integer(tokenizer_find(t, marks[i][1])));
    if (vocabulary) {
        json_object_set_new(text, "vocab_size", json_integer(tokenizer_size(t)));
        json_object_set_new(text, "vocab_size_per_layer_input", json_integer(tokenizer_size(t)));
    }
    free(*json);
    *json = json_dumps(root, JSON_INDENT(2) | JSON_REAL_PRECISION(15));
    json_decref(root);
}

/* The preset's or file's config.json, with another layer count where asked. */
static Status make_config(char **json, const char *name, int64_t layers, bool media) {
    char *bytes = NULL;
    size_t size;
    *json = media ? preset_config_with_media(name, layers) : preset_config(name, layers);
    if (!*json && media) FAIL(ERR_USAGE, "--media goes with a preset; a config.json says itself");
    if (!*json) {
        if (!strchr(name, '/') && !strchr(name, '.'))
            FAIL(ERR_USAGE,
                 "'%s' is no preset (tiny, e2b, e4b, 12b, 26b-a4b, 31b) and no config.json", name);
        TRY(file_read(&bytes, &size, name, (size_t)64 << 20));
        ModelConfig check;
        Status status = model_config_parse(&check, bytes, size, name);
        if (status == OK && layers)
            status = model_config_with_layers(json, bytes, size, name, layers);
        if (status == OK && !layers) *json = must_strdup(bytes);
        free(bytes);
        TRY(status);
    }
    return OK;
}

Status command_init(int argc, char **argv) {
    const char *tokenizer = NULL, *dtype = "bf16", *to = "safetensors";
    int64_t layers = 0, seed = 42;
    bool config = false, media = false;
    Option options[] = {
        {"--tokenizer", OPTION_TEXT, &tokenizer,
         "DIR  copy tokenizer and template files from here; sets the vocabulary of `tiny`"},
        {"--layers", OPTION_INT, &layers, "N  another number of layers"},
        {"--seed", OPTION_INT, &seed, "N  of the random weights (42)"},
        {"--dtype", OPTION_TEXT, &dtype, "bf16|f32  of a safetensors file (bf16)"},
        {"--to", OPTION_TEXT, &to,
         "FORMAT  safetensors (a folder), bf16-gguf, q8_0-gguf or q4_0-gguf"},
        {"--media", OPTION_FLAG, &media, "with the towers that read pictures and sound"},
        {"--config", OPTION_FLAG, &config, "only print the config.json; needs no OUT"},
        {NULL, OPTION_FLAG, NULL, NULL}};
    Arguments a = {
        .usage =
            "init PRESET|config.json OUT [--tokenizer DIR] [--layers N] [--seed N] [--to FORMAT]",
        .about =
            "Writes a checkpoint folder, or a GGUF file, with random weights. Presets: tiny, e2b, "
            "e4b, 12b, 26b-a4b, 31b.",
        .options = options,
        .least = 1,
        .most = 2};
    TRY(arguments_parse(&a, argc, argv));
    if (a.helped) return OK;
    if (layers < 0 || layers > LAYERS_MAX)
        FAIL(ERR_USAGE, "--layers is %" PRId64 ", expected 1 to %d", layers, LAYERS_MAX);
    if (strcmp(dtype, "bf16") && strcmp(dtype, "f32"))
        FAIL(ERR_USAGE, "--dtype is '%s', expected bf16 or f32", dtype);
    DType gguf = DTYPE_COUNT;
    if (strcmp(to, "safetensors")) {
        TRY(gguf_format(&gguf, to));
        if (!tokenizer) FAIL(ERR_USAGE, "--to %s needs --tokenizer: a GGUF holds one", to);
    }
    if (!config && a.count < 2) FAIL(ERR_USAGE, "init PRESET|config.json OUT: OUT is missing");
    if (!config && file_exists(a.positional[1]))
        FAIL(ERR_IO, "%s: is already there", a.positional[1]);
    char *json = NULL;
    Tokenizer *t = NULL;
    file_stop_on_signals();
    if (tokenizer) TRY(tokenizer_load(&t, tokenizer));
    Status status = make_config(&json, a.positional[0], layers, media);
    if (status == OK && t) fit_tokenizer(&json, t, !strcmp(a.positional[0], "tiny"));
    tokenizer_free(t);
    if (status == OK && config)
        puts(json);
    else if (status == OK && gguf != DTYPE_COUNT)
        status = initial_gguf(json, tokenizer, (uint64_t)seed, gguf, a.positional[1]);
    else if (status == OK)
        status = initial_checkpoint(json, tokenizer, (uint64_t)seed,
                                    strcmp(dtype, "bf16") ? F32 : BF16, a.positional[1]);
    free(json);
    return status;
}
