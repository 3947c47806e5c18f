/* rescore.c - from saved responses to figures. */
#include "eval/rescore.h"
#include "eval/judge.h"
#include "eval/regex.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const FilterChain *find_chain(const Task *t, const char *name) {
    for (int i = 0; i < t->chain_count; i++)
        if (!strcmp(t->chains[i].name, name)) return &t->chains[i];
    return NULL;
}

Status rescore_row(json_t *row, bool run_code) {
    const char *name = json_string_value(json_object_get(row, "task")),
               *suite = json_string_value(json_object_get(row, "suite")),
               *filter = json_string_value(json_object_get(row, "filter"));
    const json_t *doc = json_object_get(row, "doc"), *response = json_object_get(row, "response");
    Task task = {0};
    Verdict v = {0};
    Status status = OK;
    if (!name) FAIL(ERR_FORMAT, "the row names no task");
    if (!json_is_object(doc)) FAIL(ERR_FORMAT, "the row has no doc");
    if (!json_is_string(response) && !json_is_array(response))
        FAIL(ERR_FORMAT, "the row's response is neither a string nor a list of them");
    TRY(task_for_row(&task, name, suite));
    const FilterChain *chain = filter ? find_chain(&task, filter) : &task.chains[0];
    if (!task.chain_count || !chain)
        FAIL_DONE(ERR_FORMAT, "task '%s' has no filter '%s'", name, filter ? filter : "");
    TRY_DONE(rule_score(&v, &task, chain, doc, response));
    if (run_code && task.scorer == SCORER_PYTHON &&
        (json_object_get(doc, "test") || json_object_get(doc, "test_list") ||
         json_object_get(doc, "test_cases")))
        TRY_DONE(judge_program(&v, &task, doc));
    if (v.more) json_object_update(row, v.more);
    json_object_set(row, "extracted", v.extracted);
    json_object_set(row, "score", v.score);
done:
    verdict_free(&v);
    task_free(&task);
    return status;
}

/* ---- sample files ---- */

typedef Status RowFunction(void *context, json_t *row);

static Status each_row(const char *path, int64_t most, RowFunction *take, void *context) {
    FILE *file = fopen(path, "rb");
    if (!file) FAIL(ERR_IO, "%s: %s", path, strerror(errno));
    char *line = NULL;
    size_t space = 0;
    Status status = OK;
    int64_t number = 0;
    for (ssize_t size;
         status == OK && number < most && (size = getline(&line, &space, file)) >= 0;) {
        Slice s = slice_strip((Slice){line, (size_t)size});
        number++;
        if (!s.size) continue;
        char *name = must_format("%s:%" PRId64, path, number);
        json_t *row = NULL;
        status = json_read(&row, s.bytes, s.size, name);
        if (status == OK) {
            status = take(context, row);
            if (status != OK) status = status_prefix(status, "%s", name);
        }
        json_decref(row);
        free(name);
    }
    free(line);
    fclose(file);
    return status;
}

static Status look(void *context, json_t *row) {
    *(bool *)context = json_object_get(row, "resps") != NULL;
    return OK;
}

Status rescore_is_samples(bool *samples, const char *path) {
    *samples = false;
    return each_row(path, 1, look, samples);
}

typedef struct Adding {
    Task task;
    TaskResult *result;
    char *filter; /* of the first row: documents come once under each */
} Adding;

/* Choices by their log-likelihoods; the figures that the row names. */
static Status add_choices(Adding *a, const json_t *row) {
    const json_t *resps = json_object_get(row, "resps"), *metrics = json_object_get(row, "metrics");
    const json_t *choices = json_object_get(json_object_get(row, "doc"), "choices");
    size_t n = json_array_size(resps);
    double lls[n + 1];
    Slice texts[n + 1];
    bool letters = !a->task.choices || strcmp(a->task.choices, "texts");
    for (size_t i = 0; i < n; i++) {
        const json_t *pair = json_array_get(json_array_get(resps, i), 0),
                     *ll = json_array_get(pair, 0);
        lls[i] = json_is_string(ll) ? strtod(json_string_value(ll), NULL) : json_number_value(ll);
        texts[i] =
            letters ? (Slice){&"ABCDEFGHIJ"[i % 10], 1} : json_slice(json_array_get(choices, i));
    }
    Choosing c = choose(lls, texts, (int64_t)n);
    const json_t *target = json_object_get(row, "target");
    int64_t gold = json_is_string(target) ? atoll(json_string_value(target))
                                          : json_integer_value(target),
            doc = json_integer_value(json_object_get(row, "doc_id"));
    for (size_t i = 0; i < json_array_size(metrics); i++) {
        const char *metric = json_string_value(json_array_get(metrics, i));
        int64_t chosen = !strcmp(metric, "acc_norm")    ? c.by_characters
                         : !strcmp(metric, "acc_bytes") ? c.by_bytes
                                                        : c.by_sum;
        if (!strncmp(metric, "acc", 3))
            result_value(a->result, metric, "none", FIGURE_MEAN, doc, chosen == gold, 1);
    }
    return OK;
}

/* Scores of a verdict, as figures. */
static void add_verdict(TaskResult *r, const Task *t, const char *filter, int64_t doc,
                        const Verdict *v) {
    if (json_is_object(v->score)) {
        const char *metric;
        json_t *value;
        json_object_foreach(v->score, metric, value) {
            size_t i;
            json_t *one;
            if (json_is_array(value))
                json_array_foreach(value, i, one)
                    result_value(r, metric, filter, FIGURE_FLAT, doc, json_is_true(one), 1);
            else
                result_value(r, metric, filter, FIGURE_MEAN, doc, json_is_true(value), 1);
        }
    } else if (rule_is_rate(t)) {
        result_value(r, rule_metric(t), filter, FIGURE_RATE, doc,
                     json_number_value(json_object_get(v->more, "errors")),
                     json_number_value(json_object_get(v->more, "words")));
    } else if (json_is_number(v->score)) {
        result_value(r, rule_metric(t), filter, FIGURE_MEAN, doc, json_number_value(v->score), 1);
    }
    json_t *verified = json_object_get(v->more, "math_verify");
    if (verified)
        result_value(r, "math_verify", filter, FIGURE_MEAN, doc, json_number_value(verified), 1);
}

static Status add_sample(void *context, json_t *row) {
    Adding *a = context;
    const json_t *resps = json_object_get(row, "resps");
    const char *filter = json_string_value(json_object_get(row, "filter"));
    int64_t doc = json_integer_value(json_object_get(row, "doc_id"));
    if (!json_is_array(resps) || !filter) FAIL(ERR_FORMAT, "no sample of a harness");
    if (!a->filter) a->filter = must_strdup(filter);
    a->result->effective += !strcmp(filter, a->filter);
    if (json_is_array(json_array_get(json_array_get(resps, 0), 0))) return add_choices(a, row);
    const FilterChain *chain = find_chain(&a->task, filter);
    if (!chain) FAIL(ERR_FORMAT, "task '%s' has no filter '%s'", a->task.name, filter);
    Verdict v;
    TRY(rule_score(&v, &a->task, chain, json_object_get(row, "doc"), json_array_get(resps, 0)));
    add_verdict(a->result, &a->task, filter, doc, &v);
    verdict_free(&v);
    return OK;
}

/* samples_NAME.jsonl, samples_NAME_2026-11-21T10-00-00.123.jsonl */
static char *name_of(const char *path) {
    const char *slash = strrchr(path, '/');
    Slice s = slice_of(slash ? slash + 1 : path);
    Text out = {0}, plain = {0};
    Regex *time = regex_get("(_\\d{4}-\\d\\d-\\d\\dT[\\d-]+(\\.\\d+)?)?\\.jsonl\\z", 0),
          *head = regex_get("\\Asamples_", 0);
    regex_replace(&plain, time, s, "");
    regex_replace(&out, head, (Slice){plain.bytes, plain.size}, "");
    regex_close(time);
    regex_close(head);
    text_free(&plain);
    return out.bytes;
}

Status rescore_samples(Results *r, const char *path, const char *task, const char *group) {
    Adding a = {0};
    char *name = name_of(path);
    Status status = task ? task_find(&a.task, task) : task_for_samples(&a.task, name);
    if (status == OK) {
        a.result = results_add(r, name);
        a.result->version = a.task.version;
        a.result->shots = a.task.shots;
        if (group) a.result->group = must_strdup(group);
        status = each_row(path, INT64_MAX, add_sample, &a);
        a.result->original = a.result->effective;
        task_free(&a.task);
    }
    free(a.filter);
    free(name);
    return status;
}
