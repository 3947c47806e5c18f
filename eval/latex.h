/* latex.h - the value of a mathematical expression as models write it.
 *
 * There is no symbolic algebra here: two expressions are equal when their values agree to 1e-9 at
 * eight points drawn for their variables. Tuples, intervals and sets are compared item by item. */
#ifndef LATEX_H
#define LATEX_H

#include "data/text.h"

/* The value at a point; variables have values drawn from their names and `point`. False when the
 * text is no expression, or has none there. */
bool latex_value(Slice s, int point, double *value);

/* Whether the expression has a value that depends on no variable. */
bool latex_number(Slice s, double *value);

bool latex_equal(Slice a, Slice b);

#endif
