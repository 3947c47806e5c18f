/* small_model.h - three small models whose rows are whole blocks, loaded and run over random ids.
 */
#ifndef SMALL_MODEL_H
#define SMALL_MODEL_H

#include "formats/adapter.h"
#include "formats/checkpoint.h"
#include "model/step.h"
#include "tests/test.h"

#define SMALL_ROWS 40 /* tokens of a run */
#define SMALL_MOST 64 /* there is memory for */

/* Shared K/V with per-layer inputs, K as V, experts. */
extern const char *const small_kinds[];
#define SMALL_KINDS 3

typedef struct Loaded {
    Checkpoint checkpoint;
    Gemma g;
    StepMemory memory;
    StepOptions options;
    AdapterSpec spec;
    float nll[SMALL_ROWS];
} Loaded;

/* What is set on a model that is declared and not placed yet. */
typedef void Setup(Loaded *m);

/* Where models are loaded; NULL: the CPU. */
extern Device *small_device;

/* A checkpoint folder of that kind, f32, in the test's folder. Caller frees the name. */
char *small_make(const char *kind);

/* Adapters, if setup attached any, get random values. */
void small_load(Loaded *m, const char *path, DType dtype, StackMode mode, Setup *setup);
void small_unload(Loaded *m);

/* Losses of SMALL_ROWS tokens, and gradients when the mode keeps what they need. */
void small_run(Loaded *m);

/* Setups: adapters on most linears; training through rounding, every matrix by Q4_0 (or by
 * small_scheme, which then leaves the tables alone); both. */
extern QuantScheme small_scheme;
extern bool small_learned; /* with learned factors of the scales, random here */
void small_adapt(Loaded *m);
void small_round(Loaded *m);
void small_round_adapted(Loaded *m);

/* Everything trained, and through rounding; weights in NF4 below adapters. */
void small_full(Loaded *m);
void small_round_full(Loaded *m);
void small_adapt_packed(Loaded *m);

/* A gradient (or value) on the host; the caller's to free. */
float *small_values(Tensor t);

#endif
