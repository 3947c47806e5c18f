/* export.c - lapidary export: merged checkpoints and rewritten adapters. */
#include "cli/command.h"
#include "formats/file.h"
#include "infer/model.h"

#include <stdio.h>
#include <string.h>

Status command_export(int argc, char **argv) {
    const char *model = NULL, *adapter = NULL, *to = NULL, *device = "auto", *dtype = "bf16";
    bool verify = false;
    Option options[] = {
        {"--model", OPTION_TEXT, &model, "DIR  checkpoint folder"},
        {"--adapter", OPTION_TEXT, &adapter, "DIR  PEFT folder"},
        {"--to", OPTION_TEXT, &to, "FORMAT  safetensors (merged checkpoint) or peft"},
        {"--verify", OPTION_FLAG, &verify, "(not in this version)"},
        {"--device", OPTION_TEXT, &device, "auto|cpu|cuda[:n]"},
        {"--dtype", OPTION_TEXT, &dtype, "bf16|f32  of the merged weights (bf16)"},
        {NULL, OPTION_FLAG, NULL, NULL}};
    Arguments a = {.usage = "export --model DIR [--adapter DIR] --to FORMAT OUT",
                   .about = "Merges an adapter into its base, or writes it again as a PEFT folder.",
                   .options = options,
                   .least = 1,
                   .most = 1};
    static const char *const later[] = {"bf16-gguf", "q8_0-gguf", "q4_0-gguf", "lora-gguf",
                                        "mmproj",    "w4a16",     "int8"};
    Model m;
    TRY(arguments_parse(&a, argc, argv));
    if (a.helped) return OK;
    if (!model || !to) FAIL(ERR_USAGE, "--model or --to is missing: lapidary %s", a.usage);
    for (size_t i = 0; i < sizeof later / sizeof *later; i++)
        if (!strcmp(later[i], to))
            FAIL(ERR_USAGE, "--to %s needs quantised formats, which this version does not have",
                 to);
    bool merged = !strcmp(to, "safetensors");
    if (!merged && strcmp(to, "peft"))
        FAIL(ERR_USAGE, "--to is '%s', expected safetensors or peft", to);
    if (!merged && !adapter) FAIL(ERR_USAGE, "--to peft needs --adapter");
    if (verify) FAIL(ERR_USAGE, "--verify is not in this version");
    if (file_exists(a.positional[0])) FAIL(ERR_IO, "%s: is already there", a.positional[0]);
    TRY(model_open(&m, model, adapter, device, dtype));
    Status status = merged ? checkpoint_save(&m.checkpoint, &m.g, m.g.dtype, a.positional[0])
                           : peft_save(&m.g, &m.spec, a.positional[0]);
    model_close(&m);
    if (status == OK) printf("%s\n", a.positional[0]);
    return status;
}
