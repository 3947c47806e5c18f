/* ifeval.h - whether a response follows instructions that can be checked (Zhou et al. 2023). */
#ifndef IFEVAL_H
#define IFEVAL_H

#include "data/json.h"

/* Whether the instruction of that id (keywords:existence, ...) with its arguments is followed.
 * ERR_FORMAT for an id that is unknown. */
Status ifeval_follows(bool *follows, const char *id, const json_t *arguments, const json_t *doc,
                      Slice response);

/* {prompt_level_strict_acc, inst_level_strict_acc, prompt_level_loose_acc, inst_level_loose_acc} of
 * a document (instruction_id_list, kwargs, prompt); the loose ones over eight variants of the
 * response. */
Status ifeval_score(json_t **score, const json_t *doc, Slice response);

/* Which language a text is in, as a two-letter code; by its script, and among Latin ones by their
 * commonest words. "" when nothing tells. */
const char *language_of(Slice text);

#endif
