/* report.c - HTML with drawings in SVG. */
#include "eval/report.h"
#include "formats/file.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#define BAR_WIDTH 220.0

static void add_escaped(Text *t, const char *s) {
    for (; *s; s++) {
        const char *as = *s == '&' ? "&amp;" : *s == '<' ? "&lt;" : *s == '>' ? "&gt;" : NULL;
        if (as)
            text_adds(t, as);
        else
            text_add(t, s, 1);
    }
}

/* A share between 0 and 1 with its interval. */
static void add_bar(Text *t, const Figure *f, Estimate e) {
    double low, high;
    figure_interval(f, e, &low, &high);
    text_addf(t,
              "<svg width='%.0f' height='18' role='img' aria-label='%.1f %%'><rect y='4' "
              "width='%.0f' height='10' class='rail'/><rect y='4' width='%.1f' height='10' "
              "class='bar'/>",
              BAR_WIDTH, 100 * e.mean, BAR_WIDTH, e.mean * BAR_WIDTH);
    if (!isnan(e.stderr_)) {
        low *= BAR_WIDTH;
        high *= BAR_WIDTH;
        text_addf(t, "<path d='M%.1f 9H%.1fM%.1f 5v8M%.1f 5v8' class='whisker'/>", low, high, low,
                  high);
    }
    text_adds(t, "</svg>");
}

static void add_figure(Text *t, const char *task, int64_t n, int64_t shots, const char *metric,
                       const char *filter, const Figure *f, Estimate e, bool group) {
    text_addf(t, "<tr%s><td>", group ? " class='group'" : "");
    add_escaped(t, task);
    text_addf(t, "<td class='n'>%" PRId64 "<td class='n'>%" PRId64 "<td>", n, shots);
    add_escaped(t, metric);
    text_adds(t, "<td>");
    add_escaped(t, filter);
    text_addf(t,
              fabs(e.mean) < 1e4 ? "<td class='n'>%.4f<td class='n'>"
                                 : "<td class='n'>%.4g<td class='n'>",
              e.mean);
    if (!isnan(e.stderr_)) text_addf(t, "%.4f", e.stderr_);
    text_adds(t, "<td>");
    if (e.mean >= 0 && e.mean <= 1) add_bar(t, f, e);
    text_adds(t, "\n");
}

static void add_shares(Text *t, const TaskResult *r) {
    double n = r->responses ? 100.0 / (double)r->responses : 0;
    if (!r->generates) return;
    text_addf(t,
              "<tr class='note'><td colspan='8'>%" PRId64 " answers a question; %.1f %% of answers "
              "unparsed, %.1f %% cut at the token limit, %.1f %% with a thought that never ended\n",
              r->samples, (double)r->unparsed * n, (double)r->truncated * n,
              (double)r->unclosed * n);
}

static Estimate group_estimate(const json_t *group, const Figure *f) {
    char key[256];
    Estimate e = {0};
    snprintf(key, sizeof key, "%s,%s", f->metric, f->filter);
    e.mean = json_number_value(json_object_get(group, key));
    snprintf(key, sizeof key, "%s_stderr,%s", f->metric, f->filter);
    const json_t *error = json_object_get(group, key);
    e.stderr_ = json_is_number(error) ? json_number_value(error) : NAN;
    return e;
}

static void add_settings(Text *t, const json_t *value) {
    const char *key;
    json_t *one;
    text_adds(t, "<table class='settings'>\n");
    json_object_foreach((json_t *)value, key, one) {
        Text text = {0};
        if (json_is_string(one))
            text_adds(&text, json_string_value(one));
        else
            text_add_json(&text, one);
        text_adds(t, "<tr><th>");
        add_escaped(t, key);
        text_adds(t, "<td>");
        add_escaped(t, text.bytes ? text.bytes : "");
        text_adds(t, "\n");
        text_free(&text);
    }
    text_adds(t, "</table>\n");
}

Status report_write(const Results *r, const json_t *json, const char *path) {
    const json_t *groups = json_object_get(json, "groups");
    Text t = {0};
    text_adds(&t,
              "<!doctype html><html lang='en'><meta charset='utf-8'><title>Lapidary: "
              "evaluation</title>\n<style>\n:root { color-scheme: light dark }\n"
              "body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 72em; "
              "padding: 0 1em }\n"
              "table { border-collapse: collapse; width: 100% }\n"
              "th, td { text-align: left; padding: .25em .6em; border-bottom: 1px solid #8883; "
              "vertical-align: middle }\n"
              ".n { text-align: right; font-variant-numeric: tabular-nums }\n"
              ".group td { font-weight: 600; border-bottom: 2px solid #8886 }\n"
              ".note td { color: #888; font-size: .88em }\n"
              ".rail { fill: #8882 } .bar { fill: #4a90d9 } .whisker { stroke: currentColor; "
              "fill: none }\n"
              ".settings th { width: 16em; font-weight: 400; color: #888 }\n"
              ".settings td { overflow-wrap: anywhere }\n</style>\n<h1>Evaluation</h1>\n<p>");
    const char *model = json_string_value(json_object_get(json, "model_name"));
    add_escaped(&t, model ? model : "");
    text_adds(&t, "</p>\n<table><thead><tr><th>task<th class='n'>questions<th "
                  "class='n'>shots<th>metric<th>filter<th class='n'>value<th "
                  "class='n'>stderr<th>95 % interval</thead>\n");
    for (int i = 0; i < r->count; i++) {
        const TaskResult *task = &r->tasks[i], *next = i + 1 < r->count ? task + 1 : NULL;
        for (int k = 0; k < task->count; k++)
            add_figure(&t, k ? "" : task->name, task->effective, task->shots,
                       task->figures[k].metric, task->figures[k].filter, &task->figures[k],
                       figure_estimate(&task->figures[k], 1000), false);
        add_shares(&t, task);
        if (!task->group || (next && next->group && !strcmp(next->group, task->group))) continue;
        const json_t *group = json_object_get(groups, task->group);
        for (int k = 0; k < task->count; k++)
            add_figure(&t, k ? "" : task->group,
                       json_integer_value(json_object_get(group, "sample_len")), task->shots,
                       task->figures[k].metric, task->figures[k].filter, NULL,
                       group_estimate(group, &task->figures[k]), true);
    }
    text_adds(&t, "</table>\n<h2>Settings</h2>\n");
    add_settings(&t, json_object_get(json, "config"));
    text_adds(&t, "</html>\n");
    Status status = file_write(path, t.bytes, t.size);
    text_free(&t);
    return status;
}
