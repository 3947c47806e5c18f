/* model.h - a model ready to run: checkpoint, tokenizer, and an adapter applied without merging. */
#ifndef INFER_MODEL_H
#define INFER_MODEL_H

#include "data/tokenizer.h"
#include "formats/adapter.h"
#include "formats/checkpoint.h"
#include "model/step.h"

typedef struct Model {
    char *dir;
    Checkpoint checkpoint;
    Tokenizer *tokenizer;
    AdapterSpec spec; /* of the adapter; where there are several they are only run */
    bool has_adapter;
    int adapters;               /* how many requests choose from */
    Safetensors learned_scales; /* of the adapter, or of the model */
    Gemma g;
} Model;

/* How weights come into memory: read (and packed ones put in the order products want), or left in
 * the mapped file, for walks that touch every row once. */
typedef enum Residence { WEIGHTS_LOADED, WEIGHTS_MAPPED } Residence;

/* Whether the checkpoint's towers come along, where it has any. */
typedef enum ModelMedia { WITHOUT_MEDIA, WITH_MEDIA } ModelMedia;

/* Everything goes through the adapter, which may be NULL; device and dtype as in a run file. */
Status model_open(Model *m, const char *dir, const char *adapter, const char *device,
                  const char *dtype, Residence residence, ModelMedia media);

/* The same with several adapters, which requests choose from by number: 0 is the base model, i + 1
 * adapters[i]. */
Status model_open_several(Model *m, const char *dir, const char *const *adapters, int count,
                          const char *device, const char *dtype, ModelMedia media);

/* ERR_FORMAT where the model came without towers: what is missing. */
Status model_check_media(const Gemma *g);
void model_close(Model *m);

#endif
