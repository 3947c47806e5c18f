/* export.c - lapidary export: merged checkpoints, GGUF files, adapters written anew. */
#include "cli/command.h"
#include "formats/file.h"
#include "formats/gguf_save.h"
#include "formats/mmproj.h"
#include "infer/verify.h"
#include "model/merge.h"

#include <stdio.h>
#include <string.h>

static void merged_source(void *context, const Param *p, int64_t first, int64_t count, float *out) {
    const Model *m = context;
    merged_rows(&m->g, p, first, count, out);
}

/* A stored matrix without an adapter goes through as it is. */
static Tensor stored_source(void *context, const Param *p) {
    const Model *m = context;
    const Linear *l = gemma_owner(&m->g, p);
    return p->trainable || (l && l->lora) ? tensor_absent() : p->value;
}

static void release_source(void *context, const Param *p) {
    const Model *m = context;
    checkpoint_release(&m->checkpoint, p);
}

/* What the model is called: the last part of its path. */
static const char *name_of(const Model *m) {
    const char *slash = strrchr(m->dir, '/');
    return slash && slash[1] ? slash + 1 : m->dir;
}

static Status export_gguf(Model *m, DType dtype, const char *out) {
    GgufModel model = {&m->checkpoint.config, m->dir, name_of(m), dtype};
    if (m->g.media.params)
        note("the adapter goes with towers or projections too: %s holds the text model alone, "
             "--to mmproj writes the rest",
             out);
    RowSource source = {merged_source, stored_source, release_source, m};
    return gguf_save(&model, &m->g, &source, out);
}

typedef enum Target { TO_SAFETENSORS, TO_PEFT, TO_LORA_GGUF, TO_MMPROJ, TO_GGUF } Target;

/* What --to says: `dtype` of a GGUF's matrices, or the scheme of a folder's. */
typedef struct Format {
    Target target;
    DType dtype;
    QuantScheme scheme;
} Format;

static Status read_format(Format *f, const char *to) {
    *f = (Format){.scheme = SCHEME_NONE};
    if (!strcmp(to, "safetensors")) {
        f->target = TO_SAFETENSORS;
    } else if (!strcmp(to, "peft")) {
        f->target = TO_PEFT;
    } else if (!strcmp(to, "lora-gguf")) {
        f->target = TO_LORA_GGUF;
    } else if (!strcmp(to, "w4a16")) {
        f->scheme = SCHEME_INT4;
    } else if (!strcmp(to, "int8")) {
        f->scheme = SCHEME_INT8;
    } else if (!strcmp(to, "mmproj")) {
        f->target = TO_MMPROJ;
    } else {
        f->target = TO_GGUF;
        if (gguf_format(&f->dtype, to) != OK)
            FAIL(ERR_USAGE,
                 "--to is '%s', expected safetensors, peft, bf16-gguf, q8_0-gguf, q4_0-gguf, "
                 "lora-gguf, mmproj, w4a16 or int8",
                 to);
    }
    return OK;
}

static Status write_export(Model *m, const Format *f, const char *out) {
    switch (f->target) {
    case TO_SAFETENSORS:
        return checkpoint_save(&m->checkpoint, &m->g, m->g.dtype, f->scheme, out);
    case TO_PEFT:
        return peft_save(&m->g, &m->spec, out);
    case TO_LORA_GGUF:
        return gguf_save_adapter(&m->g, &m->spec, out);
    case TO_MMPROJ:
        return mmproj_save(&m->g, name_of(m), m->g.dtype, out);
    case TO_GGUF:
        return export_gguf(m, f->dtype, out);
    }
    return OK;
}

Status command_export(int argc, char **argv) {
    const char *model = NULL, *adapter = NULL, *to = NULL, *device = "auto", *dtype = "bf16";
    bool verify = false;
    Option options[] = {
        {"--model", OPTION_TEXT, &model, "DIR  checkpoint folder or GGUF"},
        {"--adapter", OPTION_TEXT, &adapter, "DIR  PEFT folder"},
        {"--to", OPTION_TEXT, &to,
         "FORMAT  safetensors (merged checkpoint), peft, bf16-gguf, q8_0-gguf, "
         "q4_0-gguf, lora-gguf, mmproj (towers, for llama.cpp), w4a16, int8 "
         "(compressed-tensors)"},
        {"--verify", OPTION_FLAG, &verify,
         "prove the result: logits of the base with its adapter, the merged weights and "
         "the file; one that differs beyond its format's own error is removed"},
        {"--device", OPTION_TEXT, &device, "auto|cpu|cuda[:n]"},
        {"--dtype", OPTION_TEXT, &dtype, "bf16|f32  of merged safetensors and mmproj (bf16)"},
        {NULL, OPTION_FLAG, NULL, NULL}};
    Arguments a = {.usage = "export --model DIR [--adapter DIR] --to FORMAT OUT",
                   .about = "Merges an adapter into its base and converts, or writes the adapter "
                            "anew. Holds a few rows at a time, whatever the model's size.",
                   .options = options,
                   .least = 1,
                   .most = 1};
    Model m;
    Format f;
    TRY(arguments_parse(&a, argc, argv));
    if (a.helped) return OK;
    if (!model || !to) FAIL(ERR_USAGE, "--model or --to is missing: lapidary %s", a.usage);
    TRY(read_format(&f, to));
    if (f.scheme != SCHEME_NONE && strcmp(dtype, "bf16"))
        FAIL(ERR_USAGE, "--dtype is that of merged safetensors; --to %s is bf16 beside its codes",
             to);
    if ((f.target == TO_PEFT || f.target == TO_LORA_GGUF) && !adapter)
        FAIL(ERR_USAGE, "--to %s needs --adapter", to);
    if (verify && f.target != TO_SAFETENSORS && f.target != TO_GGUF)
        FAIL(ERR_USAGE, "--verify proves merged models, not what --to %s writes", to);
    const char *out = a.positional[0];
    if (file_exists(out)) FAIL(ERR_IO, "%s: is already there", out);
    /* What is not proven yet does not have the name that was asked for. */
    char *written = must_format("%s%s", out, verify ? ".unverified" : "");
    file_stop_on_signals();
    Status status = model_open(&m, model, adapter, device, dtype, WEIGHTS_MAPPED,
                               f.target == TO_MMPROJ ? WITH_MEDIA : WITHOUT_MEDIA);
    if (status == OK) status = write_export(&m, &f, written);
    model_close(&m);
    if (status == OK && verify) {
        Verification v;
        status = verify_export(&v, model, adapter, written, f.scheme);
        if (v.file.positions) verification_print(&v);
        if (status == OK)
            status = folder_commit(must_strdup(written), out);
        else
            tree_remove(written);
    }
    free(written);
    if (status == OK) printf("%s\n", out);
    return status;
}
