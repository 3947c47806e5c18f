/* metrics.c - one row an update. */
#include "train/metrics.h"
#include "formats/file.h"
#include "train/tensorboard.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define HEADER                                                                                     \
    "step,epoch,loss,aux_loss,lr,grad_norm,skipped,tokens,trained_tokens,tokens_per_s,memory_"     \
    "bytes,eval_loss\n"

static void put_number(char *line, size_t size, double value, const char *format) {
    size_t used = strlen(line);
    if (isfinite(value)) snprintf(line + used, size - used, format, value);
    used = strlen(line);
    snprintf(line + used, size - used, ",");
}

static void format_row(char *line, size_t size, const Metrics *m) {
    snprintf(line, size, "%" PRId64 ",", m->step);
    put_number(line, size, m->epoch, "%.6g");
    put_number(line, size, m->loss, "%.9g");
    put_number(line, size, m->aux_loss, "%.9g");
    put_number(line, size, m->lr, "%.9g");
    put_number(line, size, m->grad_norm, "%.9g");
    size_t used = strlen(line);
    snprintf(line + used, size - used, "%d,%" PRId64 ",%" PRId64 ",", m->skipped, m->tokens,
             m->trained_tokens);
    put_number(line, size, m->tokens_per_s, "%.6g");
    put_number(line, size, m->memory_bytes, "%.0f");
    put_number(line, size, m->eval_loss, "%.9g");
    line[strlen(line) - 1] = '\n'; /* the last comma */
}

/* Rows of an earlier part of the run, up to last_step. */
static Status keep_rows(const char *path, int64_t last_step) {
    Metrics *rows = NULL;
    int64_t count = 0;
    if (last_step > 0) TRY(metrics_read(&rows, &count, path));
    FileWriter w;
    Status status = file_writer_open(&w, path);
    if (status != OK) {
        free(rows);
        return status;
    }
    status = file_writer_write(&w, HEADER, strlen(HEADER));
    for (int64_t i = 0; i < count && status == OK && rows[i].step <= last_step; i++) {
        char line[512];
        format_row(line, sizeof line, &rows[i]);
        status = file_writer_write(&w, line, strlen(line));
    }
    free(rows);
    if (status == OK) return file_writer_commit(&w);
    file_writer_abandon(&w);
    return status;
}

/* Rows of a late log up to last_step; a row cut short by a kill goes too. */
static Status late_keep(const LateLog *log, int64_t last_step) {
    char *bytes;
    size_t size;
    FileWriter w;
    if (!file_exists(log->path)) return OK;
    TRY(file_read(&bytes, &size, log->path, (size_t)4 << 30));
    Status status = file_writer_open(&w, log->path);
    if (status == OK) {
        fputs(log->header, w.stream);
        char *line = strchr(bytes, '\n');
        for (char *end; line && (end = strchr(line + 1, '\n')); line = end)
            if (atoll(line + 1) <= last_step) fwrite(line + 1, 1, (size_t)(end - line), w.stream);
        status = file_writer_commit(&w);
    }
    free(bytes);
    return status;
}

static Status late_add(LateLog *log, const char *row) {
    if (!log->file) {
        bool there = file_exists(log->path);
        log->file = fopen(log->path, "a");
        if (!log->file || (!there && fputs(log->header, log->file) < 0))
            FAIL(ERR_IO, "%s: cannot be written: %s", log->path, strerror(errno));
    }
    if (fputs(row, log->file) < 0 || fflush(log->file))
        FAIL(ERR_IO, "%s: cannot be written: %s", log->path, strerror(errno));
    return OK;
}

static void late_close(LateLog *log) {
    if (log->file) fclose(log->file);
    free(log->path);
}

static Status add_scalar(MetricsLog *log, int64_t step, const char *tag, double value) {
    return isfinite(value) ? event_write_scalar(log->events, step, tag, (float)value) : OK;
}

Status metrics_add_expert_share(MetricsLog *log, const ExpertShare *share) {
    char tag[64], row[160];
    snprintf(row, sizeof row, "%" PRId64 ",%" PRId64 ",%.6g,%.6g\n", share->step, share->layer,
             share->most, share->least);
    TRY(late_add(&log->experts, row));
    snprintf(tag, sizeof tag, "experts/layer_%02d_most", (int)share->layer);
    TRY(add_scalar(log, share->step, tag, share->most));
    snprintf(tag, sizeof tag, "experts/layer_%02d_least", (int)share->layer);
    return add_scalar(log, share->step, tag, share->least);
}

Status metrics_add_task(MetricsLog *log, const TaskFigure *figure) {
    char numbers[64] = "";
    put_number(numbers, sizeof numbers, figure->value, "%.9g");
    put_number(numbers, sizeof numbers, figure->stderr_, "%.6g");
    numbers[strlen(numbers) - 1] = 0;
    char *row = must_format("%" PRId64 ",%s,%s,%s\n", figure->step, figure->task, figure->metric,
                            numbers),
         *tag = must_format("tasks/%s/%s", figure->task, figure->metric);
    Status status = late_add(&log->tasks, row);
    if (status == OK) status = add_scalar(log, figure->step, tag, figure->value);
    free(row);
    free(tag);
    return status;
}

Status expert_shares_read(ExpertShare **shares, int64_t *count, const char *path) {
    char *bytes;
    size_t size;
    *shares = NULL;
    *count = 0;
    if (!file_exists(path)) return OK;
    TRY(file_read(&bytes, &size, path, (size_t)4 << 30));
    int64_t space = 0;
    for (char *line = strchr(bytes, '\n'); line; line = strchr(line + 1, '\n')) {
        ExpertShare e;
        if (sscanf(line + 1, "%" SCNd64 ",%" SCNd64 ",%lf,%lf", &e.step, &e.layer, &e.most,
                   &e.least) != 4)
            break;
        if (*count == space)
            *shares = must_realloc(*shares, (size_t)(space = space ? 2 * space : 256) * sizeof e);
        (*shares)[(*count)++] = e;
    }
    free(bytes);
    return OK;
}

Status metrics_open(MetricsLog *log, const char *output, int64_t last_step) {
    char host[64] = "host", name[160];
    *log = (MetricsLog){
        .csv_path = path_join(output, "metrics.csv"),
        .experts = {"step,layer,most,least\n", path_join(output, "experts.csv"), NULL},
        .tasks = {"step,task,metric,filter,value,stderr\n", path_join(output, "tasks.csv"), NULL}};
    Status status = OK;
    gethostname(host, sizeof host - 1);
    snprintf(name, sizeof name, "events.out.tfevents.%lld.%s.%d", (long long)time(NULL), host,
             (int)getpid());
    char *events = path_join(output, name);
    TRY_DONE(keep_rows(log->csv_path, last_step));
    TRY_DONE(late_keep(&log->experts, last_step));
    TRY_DONE(late_keep(&log->tasks, last_step));
    log->csv = fopen(log->csv_path, "a");
    log->events = fopen(events, "ab");
    if (!log->csv || !log->events)
        FAIL_DONE(ERR_IO, "%s: cannot be written: %s", output, strerror(errno));
    TRY_DONE(event_write_version(log->events));
done:
    free(events);
    if (status != OK) metrics_close(log);
    return status;
}

Status metrics_add(MetricsLog *log, const Metrics *m) {
    char line[512];
    format_row(line, sizeof line, m);
    if (fputs(line, log->csv) < 0 || fflush(log->csv))
        FAIL(ERR_IO, "%s: cannot be written: %s", log->csv_path, strerror(errno));
    TRY(add_scalar(log, m->step, "train/loss", m->loss));
    TRY(add_scalar(log, m->step, "train/aux_loss", m->aux_loss));
    TRY(add_scalar(log, m->step, "train/lr", m->lr));
    TRY(add_scalar(log, m->step, "train/grad_norm", m->grad_norm));
    TRY(add_scalar(log, m->step, "speed/tokens_per_s", m->tokens_per_s));
    return add_scalar(log, m->step, "eval/loss", m->eval_loss);
}

void metrics_close(MetricsLog *log) {
    if (log->csv) fclose(log->csv);
    if (log->events) fclose(log->events);
    late_close(&log->experts);
    late_close(&log->tasks);
    free(log->csv_path);
    *log = (MetricsLog){0};
}

static double field_number(const char *text) {
    return *text ? strtod(text, NULL) : NAN;
}

Status metrics_read(Metrics **rows, int64_t *count, const char *path) {
    char *bytes;
    size_t size;
    TRY(file_read(&bytes, &size, path, (size_t)4 << 30));
    Metrics *list = NULL;
    int64_t n = 0, space = 0;
    Status status = OK;
    if (strncmp(bytes, HEADER, strlen(HEADER)))
        FAIL_DONE(ERR_FORMAT, "%s: is no metrics.csv of Lapidary", path);
    for (char *line = bytes + strlen(HEADER), *end; (end = strchr(line, '\n')); line = end + 1) {
        char *fields[12], *at = line;
        int k = 0;
        *end = 0;
        while (k < 12 && (fields[k] = strsep(&at, ","))) k++;
        if (k != 12) break; /* a row cut short by a kill: what follows is gone too */
        if (n == space)
            list = must_realloc(list, (size_t)(space = space ? 2 * space : 256) * sizeof *list);
        list[n++] = (Metrics){.step = atoll(fields[0]),
                              .epoch = field_number(fields[1]),
                              .loss = field_number(fields[2]),
                              .aux_loss = field_number(fields[3]),
                              .lr = field_number(fields[4]),
                              .grad_norm = field_number(fields[5]),
                              .skipped = atoi(fields[6]),
                              .tokens = atoll(fields[7]),
                              .trained_tokens = atoll(fields[8]),
                              .tokens_per_s = field_number(fields[9]),
                              .memory_bytes = field_number(fields[10]),
                              .eval_loss = field_number(fields[11])};
    }
done:
    free(bytes);
    if (status != OK) {
        free(list);
        return status;
    }
    *rows = list;
    *count = n;
    return OK;
}
