/* learned_scales.h - the factors of rounding scales that a QAT run learned, beside its weights.
 *
 * They are a safetensors file, LEARNED_SCALES, in the model's or the adapter's folder: f32, a
 * factor for each block, under the names of the linears. Its name has no ending that other programs
 * load by. An export to q4_0 needs them to give the codes that training used; nothing else does. */
#ifndef LEARNED_SCALES_H
#define LEARNED_SCALES_H

#include "formats/safetensors.h"
#include "model/gemma.h"

#define LEARNED_SCALES "learned_scales"

/* Writes them into a folder, when the model has any. */
Status learned_scales_save(const Gemma *g, const char *dir);

/* Reads a folder's into a model that trains its own. Those of a model that does not are left, with
 * a note; a model that does may start without. */
Status learned_scales_load(Gemma *g, const char *dir);

/* Gives a model that is declared and not placed the ones of a folder, if it has any, as they lie in
 * `file`, which stays open as long. */
Status learned_scales_map(Gemma *g, Safetensors *file, const char *dir);

#endif
