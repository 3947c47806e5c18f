/* soft.h - the soft tokens of a prompt's media, made before its sequence runs. */
#ifndef SOFT_H
#define SOFT_H

#include "model/gemma.h"

typedef struct SoftMedia {
    Arena memory;
    MediaItem *items; /* (count), `soft` filled */
    int64_t count;
    size_t peak; /* bytes that the towers' temporaries took */
} SoftMedia;

/* Runs the towers over the items (which it takes, NULL for none), one after the other. */
Status soft_media_make(SoftMedia *s, Gemma *g, MediaItem *items, int64_t count);
void soft_media_free(SoftMedia *s);

#endif
