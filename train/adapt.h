/* adapt.h - which parameters a method trains: the only place that knows method names. */
#ifndef ADAPT_H
#define ADAPT_H

#include "configs/run_config.h"
#include "formats/adapter.h"

/* Marks what `config` trains and attaches adapters, before params_place. `spec` is filled for
 * METHOD_LORA (from the run file, or from lora.init) and must be freed. */
Status adapt(Gemma *g, const RunConfig *config, AdapterSpec *spec);

/* Fills adapters of a placed, loaded model: from lora.init, or fresh. */
Status adapt_init(Gemma *g, const RunConfig *config);

#endif
