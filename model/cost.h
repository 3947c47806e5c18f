/* cost.h - what a pass takes, counted from shapes: multiplications, and bytes that are only moved.
 */
#ifndef COST_H
#define COST_H

#include "model/gemma.h"

/* Multiplications and additions a token takes forward in a sequence of `tokens`: twice the weights
 * it meets, of the experts those chosen, and attention over the keys that it sees on average. */
double gemma_forward_flops(const Gemma *g, double tokens);

/* What one row takes in a step: floating-point operations by kind, and bytes moved by kernels that
 * do little else. */
typedef struct RowCost {
    double products, grouped, attention, bytes;
} RowCost;

/* A row's step in rows of `tokens`, of which the share `kept` has a loss. Forward, back to inputs,
 * and to the weights that are trained; `again`: layers are made once more on the way back. Rows
 * without a loss stop after the last layer that owns keys and values. */
RowCost gemma_row_cost(const Gemma *g, double tokens, double kept, bool again);

#endif
