/* small_media.h - pictures and a tone drawn by code, in the case's folder. */
#ifndef SMALL_MEDIA_H
#define SMALL_MEDIA_H

#include "tests/test.h"

#define SMALL_PICTURES 3

/* What picture i shows: "a red ruby", ... */
extern const char *const small_names[SMALL_PICTURES];

/* folder/name; caller frees. */
char *small_path(const char *name);
void small_write(const char *name, const char *text);

/* stoneI.ppm: a square of one colour with a darker stone in it. */
void small_picture(int which);

/* tone.wav: half a second of one tone, 16 bits, 16 kHz. */
void small_tone(double hertz);

/* rows.jsonl, with what its rows name: pictures, a tone, and a picture that a tool shows. */
void small_media_rows(void);

#endif
