/* train.c - lapidary train. */
#include "cli/command.h"
#include "train/trainer.h"

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
    return train_run(&config, resume);
}
