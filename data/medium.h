/* medium.h - the pictures, videos and recordings of messages: found, read, and put into the
 * rendered text as slots. */
#ifndef MEDIUM_H
#define MEDIUM_H

#include "data/chat.h"
#include "data/picture.h"
#include "data/video.h"
#include "model/media.h"

typedef enum MediumKind { MEDIUM_IMAGE, MEDIUM_VIDEO, MEDIUM_AUDIO } MediumKind;

/* One part of a message, as the model will see it. */
typedef struct Medium {
    MediumKind kind;
    Picture *frames; /* (frame_count) resized; a picture has one */
    double *times;   /* (frame_count) seconds, of a video */
    int frame_count;
    float *features; /* (feature_rows, 128), or samples where the model takes them as they are */
    int64_t feature_rows, feature_width;
    int64_t tokens;    /* soft tokens of each frame, or of the recording */
    uint8_t *original; /* (original_size) the file, where it is kept; else NULL */
    size_t original_size;
    uint64_t key; /* of all that */
} Medium;

typedef struct MediumList {
    Medium *items;
    int count;
} MediumList;

/* How media are read. */
typedef struct MediumOptions {
    const ModelConfig *config;
    const char *folder;   /* that relative names start from; NULL: the working folder */
    const char *allowed;  /* files must lie in it; NULL: anywhere */
    bool keep_original;   /* the files' bytes stay beside what is made of them */
    bool no_files;        /* only what the messages hold themselves */
    int64_t image_tokens; /* budget of a picture; 0: the model's */
    int64_t video_tokens; /* of a frame; 0: 70 */
    int64_t video_frames; /* of a video at most; 0: 32 */
} MediumOptions;

/* Reads the media of messages in their order: parts of type image, image_url, audio, input_audio
 * and video, named by path, by data URL, or in base64. An error names message and part. */
Status media_collect(MediumList *list, const json_t *messages, const MediumOptions *options);
void media_list_free(MediumList *list);

/* How many such parts there are. */
int messages_media_count(const json_t *messages);

/* The most tokens that the media of messages can take in a prompt, marks and times included. */
int64_t messages_media_tokens(const json_t *messages, const MediumOptions *options);

/* Puts each medium's marks and slots in place of its placeholder: a frame's time before it, all in
 * order. ERR_FORMAT when there are more of a kind than the text has places for, or fewer. */
Status media_expand(Rendered *rendered, const MediumList *list);

/* Where the slots are among the ids: an item for each picture, frame and recording, ascending. They
 * borrow from the list; caller frees the array. */
Status media_items(MediaItem **items, int64_t *count, const MediumList *list, const ModelConfig *c,
                   const int32_t *ids, int64_t n);

/* The file that an item of media_items came from: frame `part` of the `parts` that were taken of a
 * video; 0 of 1 for the others. Borrowed from the list. */
typedef struct Original {
    const uint8_t *bytes;
    size_t size;
    int64_t part, parts;
    MediumKind kind;
} Original;
Original media_original(const MediumList *list, int64_t item);

/* Makes items of their originals again, one after the other; frames of one video, asked for in a
 * row, are decoded once. Zeroed at first. */
typedef struct OriginalReader {
    Video video;
    uint64_t of; /* which original the video is; 0: none */
} OriginalReader;

/* *bytes: pixels (height, width, 3), or rows of features where height is 0, new. `number` names the
 * original: its place in a store, say. ERR_FORMAT where it gives another size than it did. */
Status original_read(OriginalReader *r, uint8_t **bytes, const Original *o, uint64_t number,
                     int64_t height, int64_t width, int64_t frames, const ModelConfig *c);
void original_reader_free(OriginalReader *r);

#endif
