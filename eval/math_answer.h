/* math_answer.h - finding and normalising the answer of a mathematics problem, by the rules of the
 * MATH data set (Hendrycks et al. 2021), of Minerva (Lewkowycz et al. 2022) and of MathArena. */
#ifndef MATH_ANSWER_H
#define MATH_ANSWER_H

#include "data/text.h"

/* What stands in the last \boxed{...} (or, without one, \fbox{...}, which keeps its mark), braces
 * balanced; false when there is none. */
bool last_boxed(Slice text, Slice *content);

/* Between the first and the last $; all of the text when it has fewer than two. */
Slice between_dollars(Slice text);

/* MATH's normal form. A text it cannot treat stays as it is, and *odd is set. */
Text math_normal(Slice answer, bool *odd);
bool math_equal(Slice a, Slice b);

/* What follows Minerva's closing phrase, or [invalidanswer]; and its normal form. */
Slice minerva_answer(Slice text);
Text minerva_normal(Slice answer);
bool minerva_equal(Slice a, Slice b);

/* Whether the response's answer, wherever it stands, equals the gold solution's: what math-verify
 * decides with symbolic algebra, here by value. */
bool math_verified(Slice solution, Slice response);

/* MathArena's reading of an integer answer: the last box's value, else the last integer of the text
 * (*warning 3). False: nothing found. */
bool matharena_answer(Slice text, double *value, int *warning);

#endif
