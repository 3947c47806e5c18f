/* prepare.c - lapidary prepare: rows to an HDF5 dataset. */
#include "cli/command.h"
#include "data/store.h"
#include "formats/companion.h"
#include "formats/file.h"
#include "train/progress.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

/* What pictures and sound become depends on the model; a folder of a tokenizer alone reads none. */
static Status read_model_config(ModelConfig *config, bool *found, const char *model) {
    char *bytes, *path = companion_path(model, "config.json");
    size_t size;
    Status status = companion_find(&bytes, &size, model, "config.json");
    *found = status == OK && bytes;
    if (*found) status = model_config_parse(config, bytes, size, path);
    free(bytes);
    free(path);
    return status;
}

/* All ranks make the dataset together; the first says what became of it. */
static Status prepare(const DataConfig *data, const char *model, int64_t seed, const char *out) {
    Comm comm;
    Tokenizer *tokenizer;
    RowReader reader;
    Store store;
    ModelConfig config;
    bool found;
    TRY(comm_open(&comm));
    TRY(read_model_config(&config, &found, model));
    TRY(tokenizer_load(&tokenizer, model));
    Status status = row_reader_init(&reader, data, tokenizer, model);
    if (found) reader.reading.config = &config;
    if (status == OK)
        status = store_build(out, &reader, data, seed, &comm, comm.rank ? NULL : progress_rows);
    if (status == OK && comm.rank) {
        tokenizer_free(tokenizer);
        comm_close(&comm);
        return OK;
    }
    if (status == OK) status = store_open(&store, out, &reader, data, seed);
    if (status == OK) {
        const StoreCounts *n = &store.counts;
        progress_line("%s", "");
        printf("%s: %.0f rows, %.0f samples, %.0f cut, %.0f dropped, %.0f bad rows, %.0f tokens, "
               "%.1f %% trained\n",
               out, n->rows, n->samples, n->cut, n->dropped, n->bad, n->tokens,
               n->tokens > 0 ? 100 * n->trained / n->tokens : 0);
        store_close(&store);
    }
    tokenizer_free(tokenizer);
    if (status == OK) comm_close(&comm);
    return status;
}

Status command_prepare(int argc, char **argv) {
    const char *model = NULL, *file = NULL, *out = NULL;
    RunOptions run = {0};
    int64_t max_length = 2048;
    Option options[] = {
        {"--model", OPTION_TEXT, &model, "DIR  whose tokenizer and template are used"},
        {"--data", OPTION_TEXT, &file, "FILE  JSONL rows"},
        {"--out", OPTION_TEXT, &out, "FILE.h5  (with a run file: OUTPUT/data.h5)"},
        {"--max-length", OPTION_INT, &max_length,
         "N  tokens of a sample (2048; with a run file: its own)"},
        RUN_OPTIONS(run),
        {NULL, OPTION_FLAG, NULL, NULL}};
    Arguments a = {
        .usage =
            "prepare RUN.yaml [key.path=value ...] | prepare --model DIR --data FILE --out FILE.h5",
        .about =
            "Tokenises, masks and stores a dataset; training does it itself when handed JSONL.",
        .options = options,
        .most = -1};
    TRY(arguments_parse(&a, argc, argv));
    if (a.helped) return OK;
    if (a.count) {
        RunConfig config;
        TRY(run_arguments_load(&config, &a, &run));
        char *path = out ? must_strdup(out) : path_join(config.output, "data.h5");
        Status status = out ? OK : folder_make(config.output);
        if (status == OK) status = prepare(&config.data, config.model, config.seed, path);
        free(path);
        run_config_free(&config);
        return status;
    }
    if (!model || !file || !out) FAIL(ERR_USAGE, "something is missing: lapidary %s", a.usage);
    if (max_length < 2)
        FAIL(ERR_USAGE, "--max-length is %" PRId64 ", expected at least 2", max_length);
    DataConfig data = data_config_default();
    data.train = (NameList){&file, 1};
    data.max_length = max_length;
    if (run.chat_format) data.chat_format = run.chat_format;
    return prepare(&data, model, 42, out);
}
