/* picture_files.h - the decoders behind picture.h. */
#ifndef PICTURE_FILES_H
#define PICTURE_FILES_H

#include "data/picture.h"

/* Pixels as they are stored, and the EXIF orientation (1..8; 1 where there is none). What it took
 * before an error stays in p, for the caller to free. */
Status picture_file_decode(Picture *p, int *orientation, const uint8_t *bytes, size_t size,
                           const char *name);

#endif
