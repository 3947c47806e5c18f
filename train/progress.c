/* progress.c - bar, rate, estimate. */
#include "train/progress.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define PLAIN_SECONDS 5.0
#define BAR_WIDTH     24

double progress_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

void progress_init(Progress *p) {
    *p = (Progress){
        .terminal = isatty(2), .started = progress_now(), .first_step = -1, .smooth_loss = NAN};
}

static void duration(char *out, size_t size, double seconds) {
    int s = (int)seconds;
    if (s >= 3600)
        snprintf(out, size, "%dh%02dm", s / 3600, s / 60 % 60);
    else
        snprintf(out, size, "%dm%02ds", s / 60, s % 60);
}

void progress_show(Progress *p, const Metrics *m, int64_t steps) {
    double now = progress_now();
    if (p->first_step < 0) {
        p->first_step = m->step - 1;
        p->started = now - (m->tokens_per_s > 0 ? (double)m->tokens / m->tokens_per_s : 0);
    }
    if (isfinite(m->loss))
        p->smooth_loss = isnan(p->smooth_loss) ? m->loss : 0.9 * p->smooth_loss + 0.1 * m->loss;
    bool last = m->step == steps, first = m->step == p->first_step + 1;
    if (!p->terminal && !last && !first && isnan(m->eval_loss) &&
        now - p->last_shown < PLAIN_SECONDS)
        return;
    p->last_shown = now;
    char eta[32], eval[48] = "";
    duration(eta, sizeof eta,
             (now - p->started) / (double)(m->step - p->first_step) * (double)(steps - m->step));
    if (isfinite(m->eval_loss)) snprintf(eval, sizeof eval, "  eval %.4f", m->eval_loss);
    if (p->terminal) {
        int filled = (int)(BAR_WIDTH * m->step / (steps ? steps : 1));
        char bar[4 * BAR_WIDTH + 1] = "";
        for (int i = 0; i < BAR_WIDTH; i++)
            strcat(bar, i < filled ? "\xe2\x94\x81" : "\xe2\x94\x80");
        fprintf(
            stderr, "\r\033[K%s %" PRId64 "/%" PRId64 "  loss %.4f%s  %.0f tok/s  %.1f GB  %s left",
            bar, m->step, steps, p->smooth_loss, eval, m->tokens_per_s, m->memory_bytes / 1e9, eta);
        p->shown = true;
        if (*eval) progress_clear(p);
    } else {
        fprintf(stderr,
                "step %" PRId64 "/%" PRId64
                "  loss %.4f%s  lr %.3g  grad %.3f  %.0f tok/s  %.1f GB  %s left\n",
                m->step, steps, m->loss, eval, m->lr, m->grad_norm, m->tokens_per_s,
                m->memory_bytes / 1e9, eta);
    }
    fflush(stderr);
}

void progress_clear(Progress *p) {
    if (p->shown) fputc('\n', stderr);
    p->shown = false;
}

void progress_line(const char *format, ...) {
    if (!isatty(2)) return;
    va_list arguments;
    va_start(arguments, format);
    fputs("\r\033[K", stderr);
    vfprintf(stderr, format, arguments);
    fflush(stderr);
    va_end(arguments);
}

void progress_rows(const char *path, int64_t rows, double share) {
    progress_line("preparing %s: %" PRId64 " rows, %.0f %%", path, rows, 100 * share);
}
