/* adapter.h - which linears carry an adapter of which rank, and the PEFT folder it is kept in. */
#ifndef ADAPTER_H
#define ADAPTER_H

#include "model/gemma.h"

typedef struct TextList {
    char **items;
    int count;
} TextList;

void text_list_add(TextList *list, const char *text);
void text_list_free(TextList *list);

/* A pattern of rank_pattern or alpha_pattern and its value. */
typedef struct PatternValue {
    char *pattern;
    double value;
} PatternValue;

typedef struct AdapterSpec {
    int64_t rank;
    double alpha, dropout;
    bool rslora, dora;
    TextList targets;     /* names a module's name must equal or end in, after a dot */
    char *target_pattern; /* or one expression that matches the whole name; NULL: targets */
    TextList parameters;  /* fused parameters: experts.gate_up_proj, experts.down_proj */
    TextList train_also;  /* modules trained whole beside the adapter: peft's modules_to_save */
    PatternValue *rank_pattern, *alpha_pattern;
    int rank_patterns, alpha_patterns;
    char *base_model; /* base_model_name_or_path, or NULL */
} AdapterSpec;

void adapter_spec_free(AdapterSpec *spec);

/* Hangs a Lora on every linear the spec names and marks what train_also names as trainable, before
 * params_place. A target or pattern that matches nothing is an error. */
Status adapter_attach(Gemma *g, const AdapterSpec *spec);

/* Marks the parameters that names mean, a module or one of their own, as trainable. */
Status adapter_train_also(Gemma *g, const TextList *names);

/* The name that peft knows a module or parameter by: the checkpoint's but for the 12B, whose media
 * modules lie elsewhere in the reference's model. */
void adapter_module_name(char *out, size_t size, const ModelConfig *c, const char *name);

/* Fills a placed adapter: A as peft draws it (uniform within 1/sqrt(in)), B zero, magnitudes the
 * norms of the base's rows. */
Status adapter_init(Gemma *g, uint64_t seed);

/* Reads adapter_config.json; settings Lapidary does not apply (bias, layers_to_transform, ...) are
 * errors. */
Status peft_load_spec(AdapterSpec *spec, const char *dir);

/* Reads adapter_model.safetensors into a placed model that adapter_attach prepared with the
 * folder's spec. A tensor missing, left over or of another shape is an error naming it. */
Status peft_load(Gemma *g, const char *dir);

/* Writes the adapter as a PEFT folder, f32, with a target_modules that matches exactly what is
 * adapted. */
Status peft_save(const Gemma *g, const AdapterSpec *spec, const char *dir);

#endif
