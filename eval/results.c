/* results.c - gathering and writing figures. */
#include "eval/results.h"
#include "eval/mersenne.h"
#include "formats/file.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

TaskResult *results_add(Results *r, const char *name) {
    r->tasks = must_realloc(r->tasks, (size_t)(r->count + 1) * sizeof *r->tasks);
    TaskResult *t = &r->tasks[r->count++];
    *t = (TaskResult){.name = must_strdup(name), .alias = must_strdup(name), .samples = 1};
    return t;
}

void results_free(Results *r) {
    for (int i = 0; i < r->count; i++) {
        TaskResult *t = &r->tasks[i];
        for (int k = 0; k < t->count; k++) {
            free(t->figures[k].metric);
            free(t->figures[k].filter);
            free(t->figures[k].values);
            free(t->figures[k].weights);
            free(t->figures[k].docs);
        }
        free(t->figures);
        free(t->name);
        free(t->alias);
        free(t->group);
    }
    free(r->tasks);
    json_decref(r->settings);
    *r = (Results){0};
}

void result_value(TaskResult *t, const char *metric, const char *filter, FigureKind kind,
                  int64_t doc, double value, double weight) {
    Figure *f = NULL;
    for (int i = 0; i < t->count && !f; i++)
        if (!strcmp(t->figures[i].metric, metric) && !strcmp(t->figures[i].filter, filter))
            f = &t->figures[i];
    if (!f) {
        t->figures = must_realloc(t->figures, (size_t)(t->count + 1) * sizeof *t->figures);
        f = &t->figures[t->count++];
        *f = (Figure){.metric = must_strdup(metric), .filter = must_strdup(filter), .kind = kind};
    }
    if (f->count == f->capacity) {
        f->capacity = f->capacity ? 2 * f->capacity : 64;
        size_t n = (size_t)f->capacity;
        f->values = must_realloc(f->values, n * sizeof *f->values);
        f->weights = must_realloc(f->weights, n * sizeof *f->weights);
        f->docs = must_realloc(f->docs, n * sizeof *f->docs);
    }
    f->docs[f->count] = doc;
    f->weights[f->count] = weight;
    f->values[f->count++] = value;
}

/* Documents as pairs for the bootstrap: values and weights side by side would need another draw, so
 * the statistic looks weights up by index. */
static double weighted_rate(const Figure *f, const int64_t *picked) {
    double sum = 0, weight = 0;
    for (int64_t i = 0; i < f->count; i++) {
        int64_t k = picked ? picked[i] : i;
        sum += f->values[k];
        weight += f->weights[k];
    }
    return f->kind == FIGURE_RATE   ? sum / weight
           : f->kind == FIGURE_BITS ? -sum / weight / log(2)
                                    : exp(-sum / weight);
}

static double rate_error(const Figure *f, int64_t iterations) {
    int64_t block = iterations < 1000 ? iterations : 1000, blocks = block ? iterations / block : 0;
    if (f->count < 2 || !blocks) return NAN;
    double *values = must_malloc((size_t)(block * blocks) * sizeof *values);
    int64_t *picked = must_malloc((size_t)f->count * sizeof *picked);
    for (int64_t i = 0; i < blocks; i++) {
        Mersenne m;
        mersenne_seed(&m, (uint64_t)i);
        for (int64_t k = 0; k < block; k++) {
            mersenne_choices(&m, picked, f->count, f->count);
            values[i * block + k] = weighted_rate(f, picked);
        }
    }
    Estimate e = estimate_mean(values, block * blocks);
    free(values);
    free(picked);
    return e.stderr_ * sqrt((double)(block * blocks));
}

/* Several samples of a document count as their mean. */
static Estimate mean_of_documents(const Figure *f) {
    double *means = must_calloc((size_t)f->count + 1, sizeof *means);
    int64_t n = 0, in_doc = 0;
    for (int64_t i = 0; i < f->count; i++) {
        if (i && f->docs[i] != f->docs[i - 1]) means[n++] /= (double)in_doc, in_doc = 0;
        means[n] += f->values[i];
        in_doc++;
    }
    if (f->count) means[n++] /= (double)in_doc;
    Estimate e = estimate_mean(means, n);
    free(means);
    return e;
}

Estimate figure_estimate(const Figure *f, int64_t iterations) {
    if (f->kind == FIGURE_FLAT) {
        Estimate e = estimate_mean(f->values, f->count);
        e.stderr_ = NAN;
        return e;
    }
    if (f->kind == FIGURE_MEAN) return mean_of_documents(f);
    return (Estimate){weighted_rate(f, NULL), rate_error(f, iterations), f->count};
}

void figure_interval(const Figure *f, Estimate e, double *low, double *high) {
    bool binary = f && f->kind == FIGURE_MEAN;
    for (int64_t i = 0; binary && i < f->count; i++)
        binary = (f->values[i] == 0 || f->values[i] == 1) && (!i || f->docs[i] != f->docs[i - 1]);
    *low = e.mean - 1.96 * e.stderr_;
    *high = e.mean + 1.96 * e.stderr_;
    if (binary && f->count) wilson_interval(e.mean, f->count, low, high);
    if (e.mean < 0) return;
    *low = *low < 0 ? 0 : *low; /* no share is less, and no rate */
    if (e.mean > 1 || (f && f->kind > FIGURE_FLAT)) return;
    *high = *high > 1 ? 1 : *high;
}

/* ---- JSON ---- */

static json_t *number_or_na(double x) {
    return isnan(x) ? json_string("N/A") : json_real(x);
}

static void set_figure(json_t *out, const char *metric, const char *filter, Estimate e) {
    char *key = must_format("%s,%s", metric, filter),
         *error = must_format("%s_stderr,%s", metric, filter);
    json_object_set_new(out, key, number_or_na(e.mean));
    json_object_set_new(out, error, number_or_na(e.stderr_));
    free(key);
    free(error);
}

static json_t *task_json(const TaskResult *t, int64_t iterations) {
    json_t *out = json_pack("{s:s, s:s, s:I}", "name", t->name, "alias", t->alias, "sample_len",
                            (json_int_t)t->effective);
    for (int i = 0; i < t->count; i++)
        set_figure(out, t->figures[i].metric, t->figures[i].filter,
                   figure_estimate(&t->figures[i], iterations));
    if (t->generates) {
        double n = t->responses ? (double)t->responses : 1;
        json_object_set_new(out, "samples_per_document", json_integer(t->samples));
        json_object_set_new(out, "unparsed_share", json_real((double)t->unparsed / n));
        json_object_set_new(out, "truncated_share", json_real((double)t->truncated / n));
        json_object_set_new(out, "unclosed_thought_share", json_real((double)t->unclosed / n));
    }
    return out;
}

/* The group of a name: its tasks weighted by size, metric by metric. */
static json_t *group_json(const Results *r, const char *group, int64_t iterations) {
    json_t *out = json_pack("{s:s, s:s}", "alias", group, "name", group), *counts = json_object();
    Estimate *parts = must_malloc((size_t)r->count * sizeof *parts);
    int64_t effective = 0;
    const TaskResult *first = NULL;
    for (int i = 0; i < r->count; i++)
        if (r->tasks[i].group && !strcmp(r->tasks[i].group, group)) {
            effective += r->tasks[i].effective;
            if (!first) first = &r->tasks[i];
        }
    json_object_set_new(out, "sample_len", json_integer(effective));
    for (int k = 0; first && k < first->count; k++) {
        const Figure *f = &first->figures[k];
        int n = 0;
        for (int i = 0; i < r->count; i++) {
            const TaskResult *t = &r->tasks[i];
            for (int j = 0; j < t->count && t->group && !strcmp(t->group, group); j++)
                if (!strcmp(t->figures[j].metric, f->metric) &&
                    !strcmp(t->figures[j].filter, f->filter))
                    parts[n++] = figure_estimate(&t->figures[j], iterations);
        }
        Estimate e = estimate_group(parts, n, true);
        set_figure(out, f->metric, f->filter, e);
        char *key = must_format("%s,%s", f->metric, f->filter);
        json_object_set_new(counts, key, json_integer(e.n));
        free(key);
    }
    json_object_set_new(out, "sample_count", counts);
    free(parts);
    return out;
}

json_t *results_json(const Results *r, int64_t iterations) {
    json_t *out = json_object(), *results = json_object(), *groups = json_object(),
           *subtasks = json_object(), *versions = json_object(), *shots = json_object(),
           *higher = json_object(), *samples = json_object();
    for (int i = 0; i < r->count; i++) {
        const TaskResult *t = &r->tasks[i];
        json_object_set_new(results, t->name, task_json(t, iterations));
        json_object_set_new(versions, t->name, json_real(t->version));
        json_object_set_new(shots, t->name, json_integer(t->shots));
        json_object_set_new(samples, t->name,
                            json_pack("{s:I, s:I}", "original", (json_int_t)t->original,
                                      "effective", (json_int_t)t->effective));
        json_t *better = json_object();
        for (int k = 0; k < t->count; k++)
            json_object_set_new(better, t->figures[k].metric,
                                json_boolean(t->figures[k].kind < FIGURE_PERPLEXITY));
        json_object_set_new(higher, t->name, better);
        if (!t->group) continue;
        if (!json_object_get(subtasks, t->group))
            json_object_set_new(subtasks, t->group, json_array());
        json_array_append_new(json_object_get(subtasks, t->group), json_string(t->name));
    }
    const char *group;
    json_t *list;
    json_object_foreach(subtasks, group, list) {
        json_t *figures = group_json(r, group, iterations);
        json_object_set(results, group, figures);
        json_object_set_new(groups, group, figures);
    }
    json_object_set_new(out, "results", results);
    if (json_object_size(groups)) {
        json_object_set_new(out, "groups", groups);
        json_object_set_new(out, "group_subtasks", subtasks);
    } else {
        json_decref(groups);
        json_decref(subtasks);
    }
    json_object_set_new(out, "versions", versions);
    json_object_set_new(out, "n-shot", shots);
    json_object_set_new(out, "higher_is_better", higher);
    json_object_set_new(out, "n-samples", samples);
    if (r->settings) json_object_update(out, r->settings);
    return out;
}

Status json_write(const json_t *value, const char *path) {
    char *text = json_dumps(value, JSON_INDENT(2) | JSON_REAL_PRECISION(17));
    Status status = file_write(path, text, strlen(text));
    free(text);
    return status;
}

/* ---- the table ---- */

static void print_row(FILE *out, const char *name, int64_t n, int64_t shots, const char *metric,
                      const char *filter, const Figure *f, Estimate e) {
    char error[64] = "", interval[64] = "";
    if (!isnan(e.stderr_)) {
        bool large = fabs(e.mean) >= 1e4;
        double low, high;
        figure_interval(f, e, &low, &high);
        snprintf(error, sizeof error, large ? "%.3g" : "%.4f", e.stderr_);
        snprintf(interval, sizeof interval, large ? "%.4g to %.4g" : "%.4f to %.4f", low, high);
    }
    fprintf(out,
            fabs(e.mean) < 1e4 ? "%-34s %6" PRId64 " %5" PRId64 "  %-22s %-18s %9.4f  %7s  %s\n"
                               : "%-34s %6" PRId64 " %5" PRId64 "  %-22s %-18s %9.4g  %7s  %s\n",
            name, n, shots, metric, filter, e.mean, error, interval);
}

void results_print(const Results *r, FILE *out) {
    fprintf(out, "%-34s %6s %5s  %-22s %-18s %9s  %7s  %s\n", "task", "n", "shots", "metric",
            "filter", "value", "stderr", "95 % interval");
    for (int i = 0; i < r->count; i++) {
        const TaskResult *t = &r->tasks[i];
        for (int k = 0; k < t->count; k++)
            print_row(out, k ? "" : t->name, t->effective, t->shots, t->figures[k].metric,
                      t->figures[k].filter, &t->figures[k], figure_estimate(&t->figures[k], 1000));
        if (t->generates && t->responses)
            fprintf(out,
                    "%-34s %6s %5s  unparsed %.1f %%, truncated %.1f %%, thought not closed "
                    "%.1f %%\n",
                    "", "", "", 100.0 * (double)t->unparsed / (double)t->responses,
                    100.0 * (double)t->truncated / (double)t->responses,
                    100.0 * (double)t->unclosed / (double)t->responses);
        const TaskResult *next = i + 1 < r->count ? t + 1 : NULL;
        if (!t->group || (next && next->group && !strcmp(next->group, t->group))) continue;
        json_t *group = group_json(r, t->group, 1000);
        for (int k = 0; k < t->count; k++) {
            char *key = must_format("%s,%s", t->figures[k].metric, t->figures[k].filter),
                 *error = must_format("%s_stderr,%s", t->figures[k].metric, t->figures[k].filter);
            json_t *e = json_object_get(group, error);
            print_row(out, k ? "" : t->group,
                      json_integer_value(json_object_get(group, "sample_len")), t->shots,
                      t->figures[k].metric, t->figures[k].filter, NULL,
                      (Estimate){json_number_value(json_object_get(group, key)),
                                 json_is_number(e) ? json_number_value(e) : NAN, 0});
            free(key);
            free(error);
        }
        json_decref(group);
    }
}
