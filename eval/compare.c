/* compare.c - pairing samples, and what their differences say. */
#include "eval/compare.h"
#include "eval/metrics.h"
#include "eval/table.h"

#include <glob.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* {task: {filter: {metric: {question: value}}}} of a run. */
static json_t *into(json_t *map, const char *key) {
    json_t *inner = json_object_get(map, key);
    if (!inner) json_object_set_new(map, key, inner = json_object());
    return inner;
}

static Status load_run(json_t **out, const char *dir) {
    char *pattern = must_format("%s/samples_*.jsonl", dir);
    glob_t found;
    Status status = OK;
    json_t *run = json_object(), *rows = NULL, *row, *name;
    size_t i, k;
    if (glob(pattern, 0, NULL, &found))
        status = status_fail(ERR_IO, "%s: no samples of a run", dir);
    for (size_t f = 0; status == OK && f < found.gl_pathc; f++) {
        const char *file = strrchr(found.gl_pathv[f], '/') + strlen("/samples_");
        char *task = must_format("%.*s", (int)strlen(file) - 6, file);
        status = table_load(&rows, found.gl_pathv[f]);
        json_array_foreach(rows, i, row) {
            const char *filter = json_string_value(json_object_get(row, "filter")),
                       *hash = json_string_value(json_object_get(row, "doc_hash"));
            char *question =
                must_format("%s %" PRId64, hash ? hash : "",
                            (int64_t)json_integer_value(json_object_get(row, "doc_id")));
            json_array_foreach(json_object_get(row, "metrics"), k, name) {
                const char *metric = json_string_value(name);
                json_t *value = json_object_get(row, metric);
                if (json_is_boolean(value))
                    value = json_real(json_is_true(value));
                else if (json_is_number(value))
                    json_incref(value);
                else
                    continue;
                json_object_set_new(into(into(into(run, task), filter ? filter : ""), metric),
                                    question, value);
            }
            free(question);
        }
        json_decref(rows);
        rows = NULL;
        free(task);
    }
    globfree(&found);
    free(pattern);
    if (status == OK)
        *out = run;
    else
        json_decref(run);
    return status;
}

/* Two-sided sign test: the chance of a split at least this uneven when both are alike. */
static double sign_test(int64_t better, int64_t worse) {
    int64_t n = better + worse, few = better < worse ? better : worse;
    double sum = 0;
    for (int64_t k = 0; k <= few; k++)
        sum += exp(lgamma((double)n + 1) - lgamma((double)k + 1) - lgamma((double)(n - k) + 1) -
                   (double)n * log(2));
    return n == 0 || 2 * sum > 1 ? 1 : 2 * sum;
}

static json_t *compare_values(const json_t *a, const json_t *b) {
    const char *question;
    json_t *value;
    int64_t n = 0, better = 0, worse = 0;
    double *differences = must_malloc((json_object_size(a) + 1) * sizeof *differences), sum_a = 0,
           sum_b = 0, most = 1;
    json_object_foreach((json_t *)a, question, value) {
        const json_t *other = json_object_get(b, question);
        if (!other) continue;
        double x = json_number_value(value), y = json_number_value(other);
        sum_a += x, sum_b += y;
        if (x < 0 || y < 0 || x > 1 || y > 1) most = INFINITY; /* no share of anything */
        differences[n++] = y - x;
        better += y > x;
        worse += y < x;
    }
    Estimate e = estimate_mean(differences, n);
    free(differences);
    if (!n) return NULL;
    double error = isnan(e.stderr_) ? 0 : e.stderr_;
    int64_t alone = (int64_t)json_object_size(a) + (int64_t)json_object_size(b) - 2 * n;
    return json_pack("{s:I, s:I, s:f, s:f, s:f, s:f, s:f, s:f, s:I, s:I, s:f}", "n", (json_int_t)n,
                     "unpaired", (json_int_t)alone, "a", sum_a / (double)n, "b", sum_b / (double)n,
                     "difference", e.mean, "stderr", error, "low",
                     fmax(-most, e.mean - 1.96 * error), "high", fmin(most, e.mean + 1.96 * error),
                     "better", (json_int_t)better, "worse", (json_int_t)worse, "p",
                     sign_test(better, worse));
}

Status runs_compare(json_t **out, const char *a, const char *b) {
    json_t *first = NULL, *second = NULL, *list = json_array(), *filters, *metrics, *values;
    const char *task, *filter, *metric;
    Status status = OK;
    TRY_DONE(load_run(&first, a));
    TRY_DONE(load_run(&second, b));
    json_object_foreach(first, task, filters) json_object_foreach(filters, filter, metrics)
        json_object_foreach(metrics, metric, values) {
        const json_t *other =
            json_object_get(json_object_get(json_object_get(second, task), filter), metric);
        json_t *row = other ? compare_values(values, other) : NULL;
        if (!row) continue;
        json_object_set_new(row, "task", json_string(task));
        json_object_set_new(row, "filter", json_string(filter));
        json_object_set_new(row, "metric", json_string(metric));
        json_array_append_new(list, row);
    }
    if (!json_array_size(list)) FAIL_DONE(ERR_FORMAT, "%s and %s have no question in common", a, b);
done:
    json_decref(first);
    json_decref(second);
    if (status == OK)
        *out = list;
    else
        json_decref(list);
    return status;
}

static double number(const json_t *row, const char *key) {
    return json_number_value(json_object_get(row, key));
}

void comparison_print(const json_t *comparison, const char *a, const char *b, FILE *out) {
    size_t i;
    json_t *row;
    fprintf(out, "A  %s\nB  %s\n\n%-30s %-24s %6s %9s %9s %10s  %-20s %7s %6s  %s\n", a, b, "task",
            "metric", "n", "A", "B", "B - A", "95 % interval", "better", "worse", "p");
    json_array_foreach(comparison, i, row) {
        char metric[64], interval[64], p[16];
        snprintf(metric, sizeof metric, "%s,%s", json_string_value(json_object_get(row, "metric")),
                 json_string_value(json_object_get(row, "filter")));
        snprintf(interval, sizeof interval, "%+.4f to %+.4f", number(row, "low"),
                 number(row, "high"));
        snprintf(p, sizeof p, number(row, "p") < 1e-3 ? "<0.001" : "%.3f", number(row, "p"));
        fprintf(out, "%-30s %-24s %6.0f %9.4f %9.4f %+10.4f  %-20s %7.0f %6.0f  %s",
                json_string_value(json_object_get(row, "task")), metric, number(row, "n"),
                number(row, "a"), number(row, "b"), number(row, "difference"), interval,
                number(row, "better"), number(row, "worse"), p);
        if (number(row, "unpaired") > 0)
            fprintf(out, "  (%.0f questions in one run alone)", number(row, "unpaired"));
        fputc('\n', out);
    }
}
