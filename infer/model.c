/* model.c - opening a model for reading. */
#include "infer/model.h"
#include "formats/file.h"
#include "formats/learned_scales.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Of what towers make, kept for the next prompt with the same picture. */
#define TOWER_BYTES ((size_t)256 << 20)

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

/* Every linear's Lora of one adapter, taken off and hung on again. */
static void take_off(Gemma *g, Lora **loras) {
    int64_t i = 0;
    for (Linear *l = g->linears.first; l; l = l->next, i++) {
        loras[i] = l->lora;
        l->lora = NULL;
    }
}

static void hang_on(Gemma *g, Lora **loras) {
    int64_t i = 0;
    for (Linear *l = g->linears.first; l; l = l->next) l->lora = loras[i++];
}

static int64_t count_linears(const Gemma *g) {
    int64_t n = 0;
    for (const Linear *l = g->linears.first; l; l = l->next) n++;
    return n;
}

/* Soft tokens are made before it is asked which adapter a request goes through. */
static Status check_towers(const Gemma *g, const char *adapter) {
    for (const Linear *l = g->linears.first; l; l = l->next)
        if (l->lora && l->weight->tower)
            FAIL(
                ERR_CONFIG,
                "%s: adapts '%s', which requests cannot choose: merge it (export --to safetensors)",
                adapter, l->name);
    return OK;
}

/* Adapters are attached one at a time, each to a bare model, and in the end hang behind each other.
 */
static Status attach_all(Model *m, const char *const *adapters, int count, Lora **loras) {
    int64_t n = count_linears(&m->g);
    for (int a = 0; a < count; a++) {
        AdapterSpec spec = {0};
        Status status = peft_load_spec(&spec, adapters[a]);
        if (status == OK && count > 1 && spec.train_also.count)
            status = status_fail(ERR_CONFIG,
                                 "%s: modules_to_save replace weights of the model, which several "
                                 "adapters cannot share",
                                 adapters[a]);
        if (status == OK) status = adapter_attach(&m->g, &spec);
        if (status == OK && m->adapters) status = check_towers(&m->g, adapters[a]);
        take_off(&m->g, loras + a * n);
        if (a == 0)
            m->spec = spec;
        else
            adapter_spec_free(&spec);
        m->has_adapter = true;
        TRY(status);
    }
    return OK;
}

static Status load_all(Model *m, const char *const *adapters, int count, Lora **loras) {
    int64_t n = count_linears(&m->g);
    Status status = OK;
    for (int a = 0; a < count && status == OK; a++) {
        hang_on(&m->g, loras + a * n);
        status = peft_load(&m->g, adapters[a]);
        take_off(&m->g, loras + a * n);
    }
    return status;
}

/* Hangs them all on, numbered from `first`: 0 is for one that every row goes through. */
static void chain(Model *m, int count, int first, Lora **loras) {
    int64_t n = count_linears(&m->g), i = 0;
    for (Linear *l = m->g.linears.first; l; l = l->next, i++)
        for (int a = count - 1; a >= 0; a--) {
            Lora *lora = loras[a * n + i];
            if (!lora) continue;
            lora->number = first + a;
            lora->next = l->lora;
            l->lora = lora;
        }
}

/* Whether an adapter holds weights of towers or projections. */
static Status touches_towers(bool *does, const char *adapter) {
    static const char *const parts[] = {"vision_tower.", "audio_tower.", "vision_embedder.",
                                        "embed_vision.", "embed_audio."};
    char *path = path_join(adapter, "adapter_model.safetensors");
    Safetensors file = {0};
    Status status = file_exists(path) ? safetensors_open(&file, path) : OK;
    for (int i = 0; i < file.count; i++)
        for (size_t k = 0; k < sizeof parts / sizeof *parts; k++)
            *does |= strstr(file.tensors[i].name, parts[k]) != NULL;
    safetensors_close(&file);
    free(path);
    return status;
}

static Status open_model(Model *m, const char *dir, const char *const *adapters, int count,
                         bool by_request, const char *device_name, const char *dtype,
                         Residence residence, ModelMedia media) {
    *m = (Model){.dir = must_strdup(dir), .adapters = by_request ? count : 0};
    Device *device;
    Arena measure = arena_measure(), scratch = {0};
    Lora **loras = NULL;
    Status status = OK;
    if (strcmp(dtype, "bf16") && strcmp(dtype, "f32"))
        FAIL_DONE(ERR_CONFIG, "dtype '%s', expected bf16 or f32", dtype);
    if (residence == WEIGHTS_MAPPED && !strncmp(device_name, "cuda", 4))
        FAIL_DONE(ERR_USAGE,
                  "--device %s: weights that stay in their file are worked on by the CPU",
                  device_name);
    TRY_DONE(device_open(&device, residence == WEIGHTS_MAPPED ? "cpu" : device_name));
    TRY_DONE(checkpoint_open(&m->checkpoint, dir));
    if (m->checkpoint.config.assistant)
        FAIL_DONE(ERR_CONFIG,
                  "%s: a drafter answers nothing by itself: give it as --draft beside "
                  "its model",
                  dir);
    TRY_DONE(tokenizer_load(&m->tokenizer, dir));
    if (tokenizer_size(m->tokenizer) > m->checkpoint.config.vocab_size)
        FAIL_DONE(ERR_FORMAT, "%s: the tokenizer has %" PRId64 " tokens, the model %" PRId64, dir,
                  tokenizer_size(m->tokenizer), m->checkpoint.config.vocab_size);
    gemma_declare(&m->g, &m->checkpoint.config, strcmp(dtype, "bf16") ? F32 : BF16, device);
    bool towers = media == WITH_MEDIA;
    for (int i = 0; i < count; i++) TRY_DONE(touches_towers(&towers, adapters[i]));
    if (towers && checkpoint_has_towers(&m->checkpoint)) {
        gemma_declare_media(&m->g);
        m->g.media.cache->most = TOWER_BYTES;
    }
    m->g.int8 = m->g.dtype == BF16 && residence == WEIGHTS_LOADED;
    if (residence == WEIGHTS_MAPPED) m->g.watch = (LayerWatch){release_layer, m};
    loras = must_calloc((size_t)(count * count_linears(&m->g)) + 1, sizeof(Lora *));
    status = attach_all(m, adapters, count, loras);
    if (status == OK)
        status = learned_scales_map(&m->g, &m->learned_scales, count == 1 ? adapters[0] : dir);
    for (int i = 0; i < m->g.params.count; i++)
        m->g.params.items[i]->mapped |=
            residence == WEIGHTS_MAPPED && !m->g.params.items[i]->adapter;
    if (status == OK) {
        checkpoint_formats(&m->checkpoint, &m->g);
        status = params_place(&m->g.params, device, false);
    }
    if (status == OK) status = checkpoint_load(&m->checkpoint, &m->g);
    if (status == OK) status = load_all(m, adapters, count, loras);
    chain(m, count, by_request, loras);
    TRY_DONE(status);
    gemma_refresh(&m->g, &measure);
    TRY_DONE(arena_init(&scratch, device, measure.peak, "temporaries"));
    gemma_refresh(&m->g, &scratch);
done:
    free(loras);
    arena_free(&scratch);
    if (status != OK) model_close(m);
    return status;
}

Status model_open(Model *m, const char *dir, const char *adapter, const char *device,
                  const char *dtype, Residence residence, ModelMedia media) {
    return open_model(m, dir, &adapter, adapter != NULL, false, device, dtype, residence, media);
}

Status model_open_several(Model *m, const char *dir, const char *const *adapters, int count,
                          const char *device, const char *dtype, ModelMedia media) {
    return open_model(m, dir, adapters, count, true, device, dtype, WEIGHTS_LOADED, media);
}

Status model_check_media(const Gemma *g) {
    const ModelConfig *c = &g->config;
    if (g->media.params) return OK;
    if (c->vision.path || c->audio.path)
        FAIL(ERR_FORMAT, "this model reads text alone: its checkpoint holds no towers (or, while "
                         "it trains, its data no media)");
    FAIL(ERR_FORMAT, "this model reads text alone: its config.json has neither vision_config nor "
                     "audio_config");
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
