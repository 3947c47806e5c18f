/* dynamic.h - the 8-bit dynamic data type (Dettmers 2015): 256 levels in [-1, 1] or [0, 1] whose
 * spacing shrinks towards zero. NF4's nested scales and 8-bit optimizer states are stored in it. */
#ifndef DYNAMIC_H
#define DYNAMIC_H

#include <stdbool.h>
#include <stdint.h>

/* The 256 levels, ascending. */
const float *dynamic_levels(bool is_signed);

/* The nearest level of x, ties to the lower one. `levels` is one of the two tables. */
uint8_t dynamic_code(const float *levels, float x);

/* The same for x in [-1, 1] moved to the nearest of 65,536 even points first: how bitsandbytes' CPU
 * build finds the codes of nested scales. */
uint8_t dynamic_code_grid(const float *levels, float x);

#endif
