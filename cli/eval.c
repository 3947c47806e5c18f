/* eval.c - lapidary eval: suites of questions, saved responses, and comparisons. */
#include "cli/command.h"
#include "eval/rescore.h"
#include "formats/file.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static Status score_row(void *context, const json_t *row, Text *out) {
    (void)context;
    json_t *scored = json_copy((json_t *)row);
    Status status = rescore_row(scored);
    if (status == OK) text_add_json(out, scored);
    json_decref(scored);
    return status;
}

/* Saved responses: rows one by one, or samples files with their figures. */
static Status rescore(const OptionList *files, const char *task, const char *group,
                      const char *out) {
    Results results = {0};
    bool samples = false;
    Status status = OK;
    if (strcmp(files->items[0], "-")) TRY(rescore_is_samples(&samples, files->items[0]));
    if (!samples) {
        for (int i = 0; i < files->count; i++)
            TRY(rows_run(files->items[i], NULL, false, score_row, NULL));
        return OK;
    }
    for (int i = 0; i < files->count; i++)
        TRY_DONE(rescore_samples(&results, files->items[i], task, group));
    results_print(&results, stdout);
    if (out) {
        char *path = must_format("%s/results.json", out);
        json_t *json = results_json(&results, 100000);
        status = folder_make(out);
        if (status == OK) status = json_write(json, path);
        json_decref(json);
        free(path);
    }
done:
    results_free(&results);
    return status;
}

Status command_eval(int argc, char **argv) {
    const char *out = NULL, *task = NULL, *group = NULL;
    OptionList files = {0};
    Option options[] = {
        {"--rescore", OPTION_LIST, &files,
         "FILE  score saved responses: rows, or a harness's samples (may be repeated)"},
        {"--task", OPTION_TEXT, &task, "NAME  the rules of samples (their file's name)"},
        {"--group", OPTION_TEXT, &group, "NAME  what the samples files are together"},
        {"--out", OPTION_TEXT, &out, "DIR  where results.json goes"},
        {NULL, OPTION_FLAG, NULL, NULL}};
    Arguments a = {
        .usage = "eval --rescore FILE", .about = "Scores saved responses.", .options = options};
    TRY(arguments_parse(&a, argc, argv));
    if (a.helped) return OK;
    if (files.count) return rescore(&files, task, group, out);
    FAIL(ERR_USAGE, "nothing to do: lapidary %s", a.usage);
}
