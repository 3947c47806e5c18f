/* media.h - pictures and recordings to soft tokens in the text model's embedding space.
 *
 * An item is one picture, video frame or recording; its soft tokens take the rows of its slots.
 * Towers run an item at a time, and once more in the backward pass, so that what they need is that
 * of the largest item. */
#ifndef MEDIA_H
#define MEDIA_H

#include "model/audio.h"
#include "model/tower_cache.h"
#include "model/unified.h"
#include "model/vision.h"

typedef struct MediaItem {
    int64_t first, count;  /* rows of its slots in the batch; count: its soft tokens */
    uint64_t key;          /* of its content */
    Tensor soft;           /* (count, D) made before, in the model's dtype; absent: made here */
    int64_t height, width; /* of a picture, multiples of a cell's side; 0: not one */
    const uint8_t *pixels; /* (height, width, 3) */
    int64_t frames;        /* of a recording, 0: not one */
    int64_t feature_width; /* numbers of a frame */
    const float *features; /* (frames, 128) mel features; unified: (frames, audio_embed_dim) */
} MediaItem;

typedef struct Media {
    const ParamList *params;
    bool sees, hears; /* declared */
    Vision vision;    /* by the model's path: this */
    Unified unified;  /* or this */
    Audio audio;
    Linear embed_vision, embed_audio; /* embedding_projection */
    float vision_eps, audio_eps;
    TowerCache *cache; /* of items whose key is not 0; `most` is 0 until somebody allows it */
} Media;

/* Declares what config has of both, below "model.". */
void media_declare(Media *m, ParamList *params, LinearList *list, const ModelConfig *c);
void media_free(Media *m);

/* Soft tokens of a picture of that size, and of a recording of so many frames. */
int64_t media_picture_tokens(const VisionConfig *c, int64_t height, int64_t width);
int64_t media_audio_tokens(const AudioConfig *c, int64_t frames);

/* Numbers of a frame of a recording: mel bins, or samples where there is no tower. */
int64_t media_feature_width(const AudioConfig *c);

/* ends (N): the last row of the picture that a row is a slot of and whose rows see each other, else
 * -1. False, and nothing written, where no rows do. */
bool media_span_ends(int32_t *ends, int64_t N, const ModelConfig *c, const MediaItem *items,
                     int64_t count);

/* soft (count, D) of an item; towers that nothing trains are asked once, where the cache has room.
 * An item without pixels or features only measures. */
void media_forward(const Media *m, Tensor soft, const MediaItem *item, Pass *p);

/* Whether anything here is trained; whether anything but projections is. */
bool media_trains(const Media *m);
bool media_trains_towers(const Media *m);

/* Numbers of a soft token before its projection. */
int64_t media_tower_width(const Media *m, bool picture);

/* Gradients from dsoft (count, D); mode KEEP or RECOMPUTE. */
void media_backward(const Media *m, Tensor dsoft, const MediaItem *item, StackMode mode, Pass *p);

#endif
