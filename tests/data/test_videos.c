/* test_videos.c - which frames are taken, when they are, and what is in them. */
#include "data/video.h"
#include "formats/file.h"
#include "formats/sha256.h"
#include "tests/test.h"

enum { SIDE = 16, FRAME = 6 + SIDE * SIDE * 3 / 2 };

/* An uncompressed clip of 25 frames a second whose frame f is grey by f. */
static char *grey_clip(int frames, size_t *size) {
    char *clip = must_malloc(64 + (size_t)frames * FRAME);
    size_t at = (size_t)sprintf(clip, "YUV4MPEG2 W%d H%d F25:1 C420\n", SIDE, SIDE);
    for (int f = 0; f < frames; f++, at += FRAME) {
        memcpy(clip + at, "FRAME\n", 6);
        memset(clip + at + 6, 16 + 4 * f, SIDE * SIDE);
        memset(clip + at + 6 + SIDE * SIDE, 128, SIDE * SIDE / 2);
    }
    *size = at;
    return clip;
}

static void expect_refused(const void *bytes, size_t size, const char *part) {
    Video v;
    EXPECT(video_decode(&v, bytes, size, 8, "FILE") != OK, "a video without %s", part);
    EXPECT(strstr(status_message(), part) && strstr(status_message(), "FILE: "), "'%s' lacks '%s'",
           status_message(), part);
    EXPECT(!v.count && !v.frames, "frames are left");
}

#ifdef HAVE_LIBAV

CASE(videos, frames_are_evenly_chosen_with_their_times) {
    size_t size;
    char *clip = grey_clip(40, &size);
    Video v;
    EXPECT_OK(video_decode(&v, (uint8_t *)clip, size, 7, "a clip"));
    EXPECT(v.count == 7, "%d frames", v.count);
    for (int i = 0; i < 7; i++) {
        int frame = i * 40 / 7;
        EXPECT_CLOSE(v.times[i], frame / 25.0, 1e-9);
        /* luma 16 + 4 f is grey 4 f * 255 / 219 */
        EXPECT_CLOSE(v.frames[i].pixels[0], 4 * frame * 255.0 / 219, 1.5);
    }
    video_free(&v);
    EXPECT_OK(video_decode(&v, (uint8_t *)clip, size, 100, "a clip"));
    EXPECT(v.count == 40, "%d frames of 40 when more are asked for", v.count);
    video_free(&v);
    free(clip);
}

/* Sums are of the frames that PyAV decodes, and of Pillow's resizing of them to 70 soft tokens. */
CASE(videos, real_clips_equal_the_references) {
    static const struct {
        const char *name, *sum, *resized;
        double last;
    } clips[] = {
        {"bottle-detection.mp4", "8c22688a023e79f2", "76b98bc9ec925e08", 1151 / 29.8333333},
        {"car-detection.mp4", "ce2b71daa63c35ca", "e12a7316cfe72753", 365 / 12.5}};
    for (size_t i = 0; i < 2; i++) {
        char *name = must_format("data/video/%s", clips[i].name), *path = shared_path(name), *bytes;
        size_t size, at = 0, to_at = 0;
        char sum[65];
        Video v;
        EXPECT_OK(file_read(&bytes, &size, path, 1 << 26));
        EXPECT_OK(video_decode(&v, (uint8_t *)bytes, size, 32, path));
        EXPECT(v.count == 32, "%d frames", v.count);
        EXPECT_CLOSE(v.times[31], clips[i].last, 1e-4);
        size_t frame = (size_t)(v.frames[0].height * v.frames[0].width) * 3, small = 288 * 528 * 3;
        uint8_t *all = must_malloc(32 * frame), *resized = must_malloc(32 * small);
        for (int f = 0; f < 32; f++, at += frame, to_at += small) {
            Picture to;
            memcpy(all + at, v.frames[f].pixels, frame);
            EXPECT_OK(picture_resize(&to, &v.frames[f], 288, 528));
            memcpy(resized + to_at, to.pixels, small);
            picture_free(&to);
        }
        sha256_text(sum, all, at);
        EXPECT(!strncmp(sum, clips[i].sum, 16), "%s: frames sum to %.16s", name, sum);
        sha256_text(sum, resized, to_at);
        EXPECT(!strncmp(sum, clips[i].resized, 16), "%s: resized frames sum to %.16s", name, sum);
        expect_refused(bytes, size / 2, i ? "ends after " : "FILE: ");
        video_free(&v);
        free(all), free(resized), free(bytes), free(path), free(name);
    }
}

CASE(videos, what_is_none_is_refused) {
    size_t size;
    char *clip = grey_clip(0, &size);
    expect_refused("", 0, "is empty");
    expect_refused("no video at all, only text", 26, "is no video");
    expect_refused(clip, size, "FILE: ");
    free(clip);
}

#else

CASE(videos, are_refused_by_a_build_that_reads_none) {
    size_t size;
    char *clip = grey_clip(3, &size);
    expect_refused(clip, size, "this build reads no videos");
    free(clip);
}

#endif
