/* adapt.h - which parameters a method trains: the only place that knows method names. */
#ifndef ADAPT_H
#define ADAPT_H

#include "configs/run_config.h"
#include "formats/adapter.h"

/* Marks what `config` trains, attaches adapters, chooses the dtype of a frozen base and the
 * rounding of weights, before params_place. `spec` is filled for methods with an adapter (from the
 * run file, or from lora.init) and must be freed. */
Status adapt(Gemma *g, const RunConfig *config, AdapterSpec *spec);

/* Fills adapters of a placed, loaded model: from lora.init, or fresh. */
Status adapt_init(Gemma *g, const RunConfig *config);

/* How much of the rounding applies at update `step` (from 0): 0 before its start, 1 when whole. */
float adapt_blend(const RunConfig *config, int64_t step);

#endif
