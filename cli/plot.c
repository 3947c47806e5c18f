/* plot.c - lapidary plot. */
#include "train/plot.h"
#include "cli/command.h"

#include <stdio.h>

Status command_plot(int argc, char **argv) {
    const char *out = "report.svg";
    Option options[] = {{"--out", OPTION_TEXT, &out, "FILE.svg  (report.svg)"},
                        {NULL, OPTION_FLAG, NULL, NULL}};
    Arguments a = {
        .usage = "plot RUN... [--out FILE.svg]",
        .about = "Loss, learning rate, gradient norm and throughput of one run folder or several.",
        .options = options,
        .least = 1,
        .most = 64};
    TRY(arguments_parse(&a, argc, argv));
    if (a.helped) return OK;
    TRY(plot_runs(out, (const char *const *)a.positional, a.count));
    printf("%s\n", out);
    return OK;
}
