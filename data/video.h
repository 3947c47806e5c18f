/* video.h - frames of a video, evenly chosen, with their times. */
#ifndef VIDEO_H
#define VIDEO_H

#include "data/picture.h"

typedef struct Video {
    Picture *frames; /* (count) */
    double *times;   /* (count) seconds: the frame's number over the frames a second */
    int count;
} Video;

/* Frames floor(j total / n), j < n, n the smaller of `most` and all there are; a video that does
 * not say how many a second has 24. `name` is for messages. */
Status video_decode(Video *v, const uint8_t *bytes, size_t size, int64_t most, const char *name);
void video_free(Video *v);

#endif
