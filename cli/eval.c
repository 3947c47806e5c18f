/* eval.c - lapidary eval: suites of questions, saved responses, and comparisons. */
#include "cli/command.h"
#include "eval/compare.h"
#include "eval/rescore.h"
#include "eval/run.h"
#include "formats/file.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static Status score_row(void *context, const json_t *row, Text *out) {
    json_t *scored = json_copy((json_t *)row);
    Status status = rescore_row(scored, *(bool *)context);
    if (status == OK) text_add_json(out, scored);
    json_decref(scored);
    return status;
}

/* Saved responses: rows one by one, or samples files with their figures. */
static Status rescore(const OptionList *files, const char *task, const char *group, const char *out,
                      bool run_code) {
    Results results = {0};
    bool samples = false;
    Status status = OK;
    if (strcmp(files->items[0], "-")) TRY(rescore_is_samples(&samples, files->items[0]));
    if (!samples) {
        for (int i = 0; i < files->count; i++)
            TRY(rows_run(files->items[i], NULL, false, score_row, &run_code));
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

/* Ranks that MPI has started ask the questions turn by turn. */
static Status run_tasks(EvalOptions *o, const char *model, const char *adapter, const char *device,
                        const char *dtype, const char *format) {
    Results results = {0};
    Model m;
    Comm comm;
    Device *own;
    char name[32];
    TRY(comm_open(&comm));
    if (comm_is_many(&comm)) {
        TRY(comm_open_device(&comm, &own, device));
        snprintf(name, sizeof name, own->kind == DEVICE_CUDA ? "cuda:%d" : "cpu", own->index);
        device = name;
        o->ranks = &comm;
    }
    EvalNeeds needs = eval_needs(o);
    TRY(model_open(&m, model, adapter, device, dtype, WEIGHTS_LOADED,
                   needs.media ? WITH_MEDIA : WITHOUT_MEDIA));
    Status status = OK;
    if (needs.chat) status = chat_format_find(&o->prompt.format, model, format);
    file_stop_on_signals();
    if (status == OK)
        status = eval_run(&results, &(Examinee){model, adapter, &m.g, m.tokenizer}, o);
    if (status == OK && !comm.rank) results_print(&results, stdout);
    results_free(&results);
    model_close(&m);
    if (status == OK || status == ERR_STOPPED)
        comm_close(&comm);
    else if (comm_is_many(&comm))
        status_prefix(status, "rank %d", comm.rank);
    return status;
}

static Status compare(const char *a, const char *b, const char *out) {
    json_t *list;
    TRY(runs_compare(&list, a, b));
    comparison_print(list, a, b, stdout);
    Status status = out ? json_write(list, out) : OK;
    json_decref(list);
    return status;
}

Status command_eval(int argc, char **argv) {
    const char *out = NULL, *task = NULL, *group = NULL, *model = NULL, *adapter = NULL,
               *device = "auto", *dtype = "bf16", *format = "auto";
    OptionList files = {0};
    EvalOptions o = eval_options_default();
    int64_t seed = -1;
    double limit = NAN;
    Option options[] = {
        {"--model", OPTION_TEXT, &model, "DIR  checkpoint folder or GGUF"},
        {"--adapter", OPTION_TEXT, &adapter, "DIR  PEFT folder, applied without merging"},
        {"--tasks", OPTION_TEXT, &o.tasks, "A,B  names, or YAML files of one's own"},
        {"--data", OPTION_TEXT, &o.data, "DIR  where the questions are; or one file"},
        {"--limit", OPTION_REAL, &limit, "N  questions of each task; below 1 a share (all)"},
        {"--shots", OPTION_INT, &o.prompt.shots, "N  few-shot examples (the task's number)"},
        {"--samples", OPTION_INT, &o.samples, "N  answers to each question (the task's number)"},
        {"--chat", OPTION_FLAG, &o.prompt.chat, "ask in chat form where the rules ask plainly"},
        {"--system", OPTION_TEXT, &o.prompt.system, "TEXT  an instruction before everything"},
        {"--think", OPTION_FLAG, &o.prompt.think, "let the model think; thoughts are not scored"},
        {"--think-most", OPTION_INT, &o.think_most, "N  tokens of a thought (no limit)"},
        {"--max-tokens", OPTION_INT, &o.max_tokens, "N  tokens of an answer (the task's)"},
        {"--temperature", OPTION_REAL, &o.temperature, "X  0 is greedy (the task's)"},
        {"--top-k", OPTION_INT, &o.top_k, "N"},
        {"--top-p", OPTION_REAL, &o.top_p, "X"},
        {"--min-p", OPTION_REAL, &o.min_p, "X"},
        {"--seed", OPTION_INT, &seed, "N  of sampling (42)"},
        {"--batch", OPTION_INT, &o.batch, "N  sequences at once (16)"},
        {"--kv", OPTION_TEXT, &o.kv, "bf16|q8_0|q4_0  keys and values (the model's dtype)"},
        MEDIA_BUDGETS(o.reading),
        {"--run-code", OPTION_FLAG, &o.run_code,
         "run programs that the model writes, in a sandbox"},
        {"--bootstrap", OPTION_INT, &o.bootstrap, "N  resamples for errors (100000)"},
        {"--device", OPTION_TEXT, &device, "auto|cpu|cuda[:n]"},
        {"--dtype", OPTION_TEXT, &dtype, "bf16|f32  (bf16)"},
        {"--chat-format", OPTION_TEXT, &format, "auto|large|small"},
        {"--rescore", OPTION_LIST, &files,
         "FILE  score saved responses: rows, or a harness's samples (may be repeated)"},
        {"--task", OPTION_TEXT, &task, "NAME  the rules of samples (their file's name)"},
        {"--group", OPTION_TEXT, &group, "NAME  what the samples files are together"},
        {"--out", OPTION_TEXT, &out, "DIR  where results.json goes"},
        {NULL, OPTION_FLAG, NULL, NULL}};
    Arguments a = {
        .usage = "eval --model DIR --tasks A,B --data DIR [--out DIR] | eval --rescore FILE | "
                 "eval compare A B",
        .about = "Asks a model the questions of some tasks and scores its answers, scores saved "
                 "ones, or\ncompares two runs question by question.",
        .options = options,
        .most = 3};
    TRY(arguments_parse(&a, argc, argv));
    if (a.helped) return OK;
    if (a.count && strcmp(a.positional[0], "compare"))
        FAIL(ERR_USAGE, "'%s' is no part of this: lapidary %s", a.positional[0], a.usage);
    if (a.count && a.count != 3) FAIL(ERR_USAGE, "two folders are compared: eval compare A B");
    if (a.count) return compare(a.positional[1], a.positional[2], out);
    if (files.count) return rescore(&files, task, group, out, o.run_code);
    if (!model) FAIL(ERR_USAGE, "--model is missing: lapidary %s", a.usage);
    if (!o.tasks) FAIL(ERR_USAGE, "--tasks is missing: lapidary %s", a.usage);
    if (!o.data) FAIL(ERR_USAGE, "--data is missing: lapidary %s", a.usage);
    TRY(media_budgets_check(&o.reading));
    if (limit <= 0) FAIL(ERR_USAGE, "--limit is %g, expected more than 0", limit);
    if (!isnan(limit)) o.limit = limit;
    if (seed >= 0) o.seed = (uint64_t)seed;
    o.out = out;
    return run_tasks(&o, model, adapter, device, dtype, format);
}
