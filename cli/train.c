/* train.c - lapidary train. */
#include "cli/command.h"
#include "train/trainer.h"

Status command_train(int argc, char **argv) {
    bool resume = false;
    const char *device = NULL, *dtype = NULL, *format = NULL;
    Option options[] = {
        {"--resume", OPTION_FLAG, &resume,
         "continue the run in its output folder from the newest save"},
        {"--device", OPTION_TEXT, &device, "auto|cpu|cuda[:n]  instead of the run file's"},
        {"--dtype", OPTION_TEXT, &dtype, "bf16|f32  instead of the run file's"},
        {"--chat-format", OPTION_TEXT, &format, "auto|large|small  instead of the run file's"},
        {NULL, OPTION_FLAG, NULL, NULL}};
    Arguments a = {.usage = "train RUN.yaml [key.path=value ...] [--resume]",
                   .about = "Fine-tunes as the run file says; key.path=value replaces a key of it.",
                   .options = options,
                   .least = 1,
                   .most = -1};
    TRY(arguments_parse(&a, argc, argv));
    if (a.helped) return OK;
    char *overrides[4096];
    int count = 0;
    for (int i = 1; i < a.count && count < 4000; i++) overrides[count++] = a.positional[i];
    if (device) overrides[count++] = must_format("device=%s", device);
    if (dtype) overrides[count++] = must_format("dtype=%s", dtype);
    if (format) overrides[count++] = must_format("data.chat_format=%s", format);
    RunConfig config;
    TRY(run_config_load(&config, a.positional[0], overrides, count));
    return train_run(&config, resume);
}
