/* picture.h - pictures: decoded, turned upright, resized as the reference resizes them. */
#ifndef PICTURE_H
#define PICTURE_H

#include "configs/media_config.h"

/* More than this is taken for a decompression bomb (Pillow's own limit). */
#define PICTURE_PIXELS_MAX 89478485

typedef struct Picture {
    int64_t height, width;
    uint8_t *pixels; /* (height, width, 3) red, green, blue */
} Picture;

/* Decodes JPEG, PNG, WebP (the first frame) or PPM, whatever the name says; EXIF orientation is
 * applied, alpha dropped, grey repeated, 16 bits cut to 8. `name` is for messages. */
Status picture_decode(Picture *p, const uint8_t *bytes, size_t size, const char *name);
void picture_free(Picture *p);

/* Writes it as a PNG; ERR_CONFIG where the build has no libpng. */
Status picture_write(const Picture *p, const char *path);

/* The size a picture is resized to so that it takes at most `soft_tokens`: sides that cells divide,
 * about the same shape, the budget filled. ERR_FORMAT when there is none. */
Status picture_target(int64_t *to_height, int64_t *to_width, int64_t height, int64_t width,
                      const VisionConfig *c, int64_t soft_tokens, const char *name);

/* Pillow's bicubic, bit for bit: one axis after the other, each rounded to 8 bits. out is new. */
Status picture_resize(Picture *out, const Picture *in, int64_t height, int64_t width);

#endif
