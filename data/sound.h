/* sound.h - recordings: decoded, mixed to one channel of 16 kHz, and their mel features. */
#ifndef SOUND_H
#define SOUND_H

#include "kernels/status.h"

#include <stdint.h>

#define SOUND_RATE 16000
#define SOUND_MOST (30 * SOUND_RATE) /* samples that are used; what comes later is left out */

typedef struct Sound {
    float *samples; /* (count) in [-1, 1], SOUND_RATE */
    int64_t count;
} Sound;

/* Decodes WAV, FLAC, Ogg or MP3, whatever the name says: the mean of the channels, resampled, cut
 * to SOUND_MOST. `name` is for messages. */
Status sound_decode(Sound *s, const uint8_t *bytes, size_t size, const char *name);
void sound_free(Sound *s);

/* Frames of `count` samples: one each 10 ms. 160 samples or fewer have none. */
int64_t mel_frames(int64_t count);

/* out (mel_frames(count), 128): ln(mel magnitudes + 0.001) of frames of 20 ms. */
void mel_features(float *out, const float *samples, int64_t count);

/* out (ceil(count / width), width): samples as they are, zeros behind the last. */
void sound_chunks(float *out, const float *samples, int64_t count, int64_t width);

#endif
