/* bfcl.h - whether calls are the ones that the Berkeley function-calling leaderboard accepts: the
 * rules of its checker of syntax trees, for Python. */
#ifndef BFCL_H
#define BFCL_H

#include "data/json.h"

/* Whether `calls`, a list of {name: arguments}, are what `ground_truth`, a list of {name:
 * {parameter: [accepted values]}}, asks for; NULL ground truth: that there are none. In any order;
 * `functions` are the declarations. */
bool bfcl_accepts(const json_t *calls, const json_t *ground_truth, const json_t *functions);

/* A declaration as chat templates take them: the leaderboard's types under JSON schema's names.
 * Caller decrefs. */
json_t *bfcl_tool(const json_t *function);

#endif
