/* model.c - opening a model for reading. */
#include "infer/model.h"
#include "formats/learned_scales.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A mapped layer that was used lets go of its pages. */
static void release_layer(void *context, int layer) {
    Model *m = context;
    char part[32];
    snprintf(part, sizeof part, "layers.%d.", layer);
    size_t prefix = strlen(model_config_prefix(&m->checkpoint.config));
    for (int i = 0; i < m->g.params.count; i++)
        if (!strncmp(m->g.params.items[i]->name + prefix, part, strlen(part)))
            checkpoint_release(&m->checkpoint, m->g.params.items[i]);
}

Status model_open(Model *m, const char *dir, const char *adapter, const char *device_name,
                  const char *dtype, Residence residence) {
    *m = (Model){.dir = must_strdup(dir)};
    Device *device;
    Arena measure = arena_measure(), scratch = {0};
    Status status = OK;
    if (strcmp(dtype, "bf16") && strcmp(dtype, "f32"))
        FAIL_DONE(ERR_CONFIG, "dtype '%s', expected bf16 or f32", dtype);
    TRY_DONE(device_open(&device, device_name));
    TRY_DONE(checkpoint_open(&m->checkpoint, dir));
    TRY_DONE(tokenizer_load(&m->tokenizer, dir));
    if (tokenizer_size(m->tokenizer) > m->checkpoint.config.vocab_size)
        FAIL_DONE(ERR_FORMAT, "%s: the tokenizer has %" PRId64 " tokens, the model %" PRId64, dir,
                  tokenizer_size(m->tokenizer), m->checkpoint.config.vocab_size);
    gemma_declare(&m->g, &m->checkpoint.config, strcmp(dtype, "bf16") ? F32 : BF16, device);
    m->g.int8 = m->g.dtype == BF16 && residence == WEIGHTS_LOADED;
    if (residence == WEIGHTS_MAPPED) m->g.watch = (LayerWatch){release_layer, m};
    if (adapter) {
        TRY_DONE(peft_load_spec(&m->spec, adapter));
        TRY_DONE(adapter_attach(&m->g, &m->spec));
        m->has_adapter = true;
    }
    TRY_DONE(learned_scales_map(&m->g, &m->learned_scales, adapter ? adapter : dir));
    for (int i = 0; i < m->g.params.count; i++)
        m->g.params.items[i]->mapped |=
            residence == WEIGHTS_MAPPED && !m->g.params.items[i]->adapter;
    checkpoint_formats(&m->checkpoint, &m->g);
    TRY_DONE(params_place(&m->g.params, device, false));
    TRY_DONE(checkpoint_load(&m->checkpoint, &m->g));
    if (adapter) TRY_DONE(peft_load(&m->g, adapter));
    gemma_refresh(&m->g, &measure);
    TRY_DONE(arena_init(&scratch, device, measure.peak, "temporaries"));
    gemma_refresh(&m->g, &scratch);
done:
    arena_free(&scratch);
    if (status != OK) model_close(m);
    return status;
}

void model_close(Model *m) {
    gemma_free(&m->g);
    adapter_spec_free(&m->spec);
    tokenizer_free(m->tokenizer);
    checkpoint_close(&m->checkpoint);
    safetensors_close(&m->learned_scales);
    free(m->dir);
    *m = (Model){0};
}
