/* train.c - lapidary train. */
#include "cli/command.h"
#include "data/chat.h"
#include "eval/run.h"
#include "formats/file.h"
#include "train/trainer.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Figures of a suite or group, {"metric,filter": value, "metric_stderr,filter": its error, ...}. */
static Status log_figures(const char *task, const json_t *figures, int64_t step, MetricsLog *log) {
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)figures, key, value) {
        const char *comma = strchr(key, ',');
        if (!comma || strstr(key, "_stderr,") || !json_is_number(value)) continue;
        char *error_key = must_format("%.*s_stderr%s", (int)(comma - key), key, comma);
        const json_t *error = json_object_get(figures, error_key);
        TaskFigure f = {step, task, key, json_number_value(value),
                        json_is_number(error) ? json_number_value(error) : NAN};
        free(error_key);
        fprintf(stderr, "step %" PRId64 ": %s %s %.4f", step, task, key, f.value);
        fprintf(stderr, isnan(f.stderr_) ? "\n" : " +- %.4f\n", f.stderr_);
        TRY(metrics_add_task(log, &f));
    }
    return OK;
}

/* The run file's eval_tasks, answered by the model as it is; all of it stays in tasks/step-N. */
static Status ask_tasks(Session *s, int64_t step, bool (*stopping)(void), MetricsLog *log) {
    const RunConfig *c = &s->config;
    EvalOptions o = eval_options_default();
    Results results = {0};
    Text names = {0};
    json_t *json = NULL, *figures;
    const char *task;
    char *out = must_format("%s/tasks/step-%" PRId64, c->output, step);
    Status status = OK;
    for (int i = 0; i < c->eval_tasks.names.count; i++)
        text_addf(&names, "%s%s", i ? "," : "", c->eval_tasks.names.items[i]);
    o.tasks = names.bytes;
    o.data = c->eval_tasks.data;
    o.out = out;
    o.limit = c->eval_tasks.limit;
    o.samples = c->eval_tasks.samples;
    o.max_tokens = c->eval_tasks.max_tokens;
    o.batch = c->eval_tasks.batch;
    o.prompt.shots = c->eval_tasks.shots;
    o.prompt.chat = c->eval_tasks.chat;
    o.prompt.think = c->eval_tasks.think;
    o.run_code = c->eval_tasks.run_code;
    o.quiet = true;
    o.stopping = stopping;
    tree_remove(out); /* of a run that was killed here and resumed */
    if (eval_needs(&o).chat)
        TRY_DONE(chat_format_find(&o.prompt.format, c->model, c->data.chat_format));
    TRY_DONE(eval_run(&results, &(Examinee){c->model, NULL, &s->g, s->tokenizer}, &o));
    json = results_json(&results, 0);
    json_object_foreach(json_object_get(json, "results"), task, figures) {
        TRY_DONE(log_figures(task, figures, step, log));
    }
done:
    json_decref(json);
    results_free(&results);
    text_free(&names);
    free(out);
    return status;
}

Status command_train(int argc, char **argv) {
    bool resume = false;
    RunOptions run = {0};
    Option options[] = {{"--resume", OPTION_FLAG, &resume,
                         "continue the run in its output folder from the newest save"},
                        RUN_OPTIONS(run),
                        {NULL, OPTION_FLAG, NULL, NULL}};
    Arguments a = {.usage = "train RUN.yaml [key.path=value ...] [--resume]",
                   .about = "Fine-tunes as the run file says; key.path=value replaces a key of it.",
                   .options = options,
                   .least = 1,
                   .most = -1};
    RunConfig config;
    TRY(arguments_parse(&a, argc, argv));
    if (a.helped) return OK;
    TRY(run_arguments_load(&config, &a, &run));
    return train_run(&config, resume, ask_tasks);
}
