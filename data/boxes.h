/* boxes.h - object detection as Gemma answers it: a JSON list of {"box_2d": [y0, x0, y1, x1],
 * "label": ...} in thousandths of the picture's sides, often in a fenced block. */
#ifndef BOXES_H
#define BOXES_H

#include "data/json.h"
#include "data/picture.h"

/* The boxes of an answer, as {"box_2d", "label"} (label "" where there is none); with the sides of
 * the picture given also "pixels": [x0, y0, x1, y1], whole numbers within it. NULL where the text
 * holds no such list. *bad: entries left out since they are no box within 0..1000. Caller decrefs.
 */
json_t *boxes_parse(Slice text, int64_t height, int64_t width, int64_t *bad);

/* Frames of boxes with "pixels", each with its label, into the picture. */
void boxes_draw(Picture *p, const json_t *boxes);

#endif
