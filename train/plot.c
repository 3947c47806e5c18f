/* plot.c - panels of lines, written as plain SVG. */
#include "train/plot.h"
#include "data/text.h"
#include "formats/file.h"
#include "train/metrics.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define PANEL_W 520.0
#define PANEL_H 250.0
#define LEFT    64.0
#define RIGHT   16.0
#define TOP     34.0
#define BOTTOM  34.0

static const char *const colours[] = {"#2563eb", "#d97706", "#059669",
                                      "#7c3aed", "#dc2626", "#0891b2"};

/* A row of metrics.csv, and of experts.csv the busiest expert of any layer at that step. */
typedef struct Row {
    Metrics metrics;
    double busiest; /* NAN: no experts */
} Row;

typedef struct Run {
    const char *name;
    Row *rows;
    int64_t count;
} Run;

typedef double Reading(const Row *row);

static double read_loss(const Row *r) {
    return r->metrics.loss;
}
static double read_eval(const Row *r) {
    return r->metrics.eval_loss;
}
static double read_lr(const Row *r) {
    return r->metrics.lr;
}
static double read_norm(const Row *r) {
    return r->metrics.grad_norm;
}
static double read_speed(const Row *r) {
    return r->metrics.tokens_per_s;
}
static double read_aux(const Row *r) {
    return r->metrics.aux_loss;
}
static double read_busiest(const Row *r) {
    return r->busiest;
}

typedef struct Panel {
    const char *title;
    Reading *line, *points; /* points: a second, sparser series, or NULL */
    bool smooth;
} Panel;

static const Panel panels[] = {{"loss", read_loss, read_eval, true},
                               {"learning rate", read_lr, NULL, false},
                               {"gradient norm", read_norm, NULL, true},
                               {"tokens per second", read_speed, NULL, true},
                               {"balancing loss", read_aux, NULL, true},
                               {"busiest expert, times its fair share", read_busiest, NULL, true}};

static bool has_values(const Panel *p, const Run *runs, int count) {
    for (int r = 0; r < count; r++)
        for (int64_t i = 0; i < runs[r].count; i++)
            if (isfinite(p->line(&runs[r].rows[i]))) return true;
    return false;
}

/* A step of 1, 2 or 5 times a power of ten that cuts `span` into about five. */
static double tick_step(double span) {
    double raw = span / 5, power = pow(10, floor(log10(raw))), part = raw / power;
    return (part < 1.5 ? 1 : part < 3.5 ? 2 : part < 7.5 ? 5 : 10) * power;
}

typedef struct Frame {
    double x, y, from_x, to_x, from_y, to_y;
} Frame;

static double place_x(const Frame *f, double v) {
    return f->x + LEFT + (v - f->from_x) / (f->to_x - f->from_x) * (PANEL_W - LEFT - RIGHT);
}
static double place_y(const Frame *f, double v) {
    return f->y + PANEL_H - BOTTOM -
           (v - f->from_y) / (f->to_y - f->from_y) * (PANEL_H - TOP - BOTTOM);
}

static void find_range(Frame *f, const Panel *p, const Run *runs, int count) {
    f->from_x = 0;
    f->to_x = 1;
    f->from_y = INFINITY;
    f->to_y = -INFINITY;
    for (int r = 0; r < count; r++)
        for (int64_t i = 0; i < runs[r].count; i++) {
            const Row *m = &runs[r].rows[i];
            double values[] = {p->line(m), p->points ? p->points(m) : NAN};
            f->to_x = fmax(f->to_x, (double)m->metrics.step);
            for (int k = 0; k < 2; k++)
                if (isfinite(values[k]))
                    f->from_y = fmin(f->from_y, values[k]), f->to_y = fmax(f->to_y, values[k]);
        }
    if (f->from_y > 0 && f->from_y < 0.5 * f->to_y) f->from_y = 0;
    double margin = 0.06 * (f->to_y - f->from_y);
    if (!(margin > 0)) margin = fmax(1e-9, 0.05 * fabs(f->to_y));
    f->to_y += margin;
    if (f->from_y != 0) f->from_y -= margin;
}

static void draw_axes(Text *svg, const Frame *f, const Panel *p) {
    text_addf(svg, "<text class=\"title\" x=\"%.1f\" y=\"%.1f\">%s</text>\n", f->x + LEFT,
              f->y + 20, p->title);
    double step = tick_step(f->to_y - f->from_y);
    for (double v = ceil(f->from_y / step) * step; v <= f->to_y; v += step) {
        double y = place_y(f, v);
        text_addf(svg, "<line class=\"grid\" x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\"/>",
                  f->x + LEFT, y, f->x + PANEL_W - RIGHT, y);
        text_addf(svg,
                  "<text class=\"tick\" text-anchor=\"end\" x=\"%.1f\" y=\"%.1f\">%.6g</text>\n",
                  f->x + LEFT - 6, y + 4, fabs(v) < step * 1e-6 ? 0 : v);
    }
    step = fmax(1, tick_step(f->to_x - f->from_x));
    for (double v = ceil(f->from_x / step) * step; v <= f->to_x; v += step)
        text_addf(svg,
                  "<text class=\"tick\" text-anchor=\"middle\" x=\"%.1f\" y=\"%.1f\">%.6g</text>\n",
                  place_x(f, v), f->y + PANEL_H - BOTTOM + 18, v);
}

/* The mean of the finite readings within `reach` rows of row i, on both sides alike, so that it
 * does not lag behind the raw values. */
static double centred_mean(const Panel *p, const Run *run, int64_t i, int64_t reach) {
    double sum = 0;
    int64_t count = 0;
    if (reach > i) reach = i;
    if (reach > run->count - 1 - i) reach = run->count - 1 - i;
    for (int64_t k = i - reach; k <= i + reach; k++) {
        double v = p->line(&run->rows[k]);
        if (isfinite(v)) sum += v, count++;
    }
    return count ? sum / (double)count : NAN;
}

/* One run's line: raw values faint under their mean when smoothed, at most about 2,000 points. */
static void draw_line(Text *svg, const Frame *f, const Panel *p, const Run *run,
                      const char *colour) {
    bool smooth = p->smooth && run->count > 20;
    int64_t stride = run->count / 2000 + 1, reach = run->count / 50 < 50 ? run->count / 50 : 50;
    for (int pass = smooth ? 0 : 1; pass < 2; pass++) {
        text_addf(
            svg,
            "<polyline fill=\"none\" stroke=\"%s\" stroke-width=\"%s\" opacity=\"%s\" points=\"",
            colour, pass ? "1.8" : "1", pass ? "1" : "0.25");
        for (int64_t i = 0; i < run->count; i++) {
            if (i % stride && i + 1 != run->count) continue;
            double v = smooth && pass ? centred_mean(p, run, i, reach) : p->line(&run->rows[i]);
            if (isfinite(v))
                text_addf(svg, "%.1f,%.1f ", place_x(f, (double)run->rows[i].metrics.step),
                          place_y(f, v));
        }
        text_adds(svg, "\"/>\n");
    }
    if (!p->points) return;
    for (int64_t i = 0; i < run->count; i++) {
        double v = p->points(&run->rows[i]);
        if (isfinite(v))
            text_addf(svg,
                      "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"4\" fill=\"white\" stroke=\"%s\" "
                      "stroke-width=\"2\"/>\n",
                      place_x(f, (double)run->rows[i].metrics.step), place_y(f, v), colour);
    }
}

static void add_escaped(Text *svg, const char *text) {
    for (; *text; text++)
        if (*text == '<' || *text == '>' || *text == '&')
            text_addf(svg, "&#%d;", *text);
        else
            text_add(svg, text, 1);
}

static void draw(Text *svg, const Run *runs, int count) {
    int shown = 0;
    for (size_t i = 0; i < sizeof panels / sizeof *panels; i++)
        shown += has_values(&panels[i], runs, count);
    double width = 2 * PANEL_W, height = 30 + 20 * count + PANEL_H * ((shown + 1) / 2);
    text_addf(
        svg,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %.0f %.0f\" width=\"%.0f\" "
        "height=\"%.0f\">\n"
        "<style>text{font-family:system-ui,sans-serif;fill:#1f2937}.title{font-size:15px;font-"
        "weight:600}"
        ".tick{font-size:11px;fill:#6b7280}.grid{stroke:#e5e7eb}.name{font-size:12px}</style>\n"
        "<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n",
        width, height, width, height);
    for (int r = 0; r < count; r++) {
        const char *colour = colours[(size_t)r % (sizeof colours / sizeof *colours)];
        double y = 22 + 20 * r;
        text_addf(svg, "<rect x=\"%.0f\" y=\"%.0f\" width=\"18\" height=\"4\" fill=\"%s\"/>", LEFT,
                  y - 6, colour);
        text_addf(svg, "<text class=\"name\" x=\"%.0f\" y=\"%.0f\">", LEFT + 26, y);
        add_escaped(svg, runs[r].name);
        const Metrics *last = runs[r].count ? &runs[r].rows[runs[r].count - 1].metrics : NULL;
        if (last)
            text_addf(svg, " \xe2\x80\x94 %" PRId64 " steps, last loss %.4f", last->step,
                      last->loss);
        text_adds(svg, ", circles: eval</text>\n");
    }
    int at = 0;
    for (size_t i = 0; i < sizeof panels / sizeof *panels; i++) {
        if (!has_values(&panels[i], runs, count)) continue;
        Frame f = {.x = at % 2 * PANEL_W, .y = 20 + 20 * count + at / 2 * PANEL_H};
        find_range(&f, &panels[i], runs, count);
        draw_axes(svg, &f, &panels[i]);
        for (int r = 0; r < count; r++)
            draw_line(svg, &f, &panels[i], &runs[r],
                      colours[(size_t)r % (sizeof colours / sizeof *colours)]);
        at++;
    }
    text_adds(svg, "</svg>\n");
}

static Status load_run(Run *run, const char *folder) {
    char *csv = path_join(folder, "metrics.csv"), *experts = path_join(folder, "experts.csv");
    Metrics *metrics = NULL;
    ExpertShare *shares = NULL;
    int64_t share_count;
    Status status = OK;
    run->name = folder;
    TRY_DONE(metrics_read(&metrics, &run->count, csv));
    TRY_DONE(expert_shares_read(&shares, &share_count, experts));
    run->rows = must_calloc((size_t)run->count + 1, sizeof *run->rows);
    for (int64_t i = 0, k = 0; i < run->count; i++) {
        run->rows[i] = (Row){metrics[i], NAN};
        for (; k < share_count && shares[k].step <= metrics[i].step; k++)
            if (shares[k].step == metrics[i].step)
                run->rows[i].busiest = fmax(run->rows[i].busiest, shares[k].most);
    }
done:
    free(metrics);
    free(shares);
    free(csv);
    free(experts);
    return status;
}

Status plot_runs(const char *path, const char *const *names, int count) {
    Run *runs = must_calloc((size_t)count + 1, sizeof *runs);
    Text svg = {0};
    Status status = OK;
    for (int r = 0; r < count; r++) TRY_DONE(load_run(&runs[r], names[r]));
    draw(&svg, runs, count);
    TRY_DONE(file_write(path, svg.bytes, svg.size));
done:
    for (int r = 0; r < count; r++) free(runs[r].rows);
    free(runs);
    text_free(&svg);
    return status;
}
