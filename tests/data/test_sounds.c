/* test_sounds.c - mel features as the reference's, and files that are no sound. */
#include "configs/media_config.h"
#include "data/sound.h"
#include "formats/file.h"
#include "tests/test.h"

#include <math.h>

static void expect_near(const char *what, double value, double expected, double tolerance) {
    EXPECT(fabs(value - expected) <= tolerance, "%s is %.7g, expected %.7g", what, value, expected);
}

CASE(sounds, frames_are_counted_as_in_the_reference) {
    static const int64_t table[][2] = {{0, 0},       {160, 0},     {161, 1},      {320, 1},
                                       {321, 2},     {480, 2},     {481, 3},      {641, 4},
                                       {800, 4},     {1600, 9},    {8000, 49},    {16000, 99},
                                       {16001, 100}, {48000, 299}, {480000, 2999}};
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        EXPECT(mel_frames(table[i][0]) == table[i][1], "%d samples: %d", (int)table[i][0],
               (int)mel_frames(table[i][0]));
}

CASE(sounds, features_equal_the_references) {
    static const int bins[] = {0, 10, 20, 42, 43, 44, 45, 46, 63, 100, 127};
    static const double first[] = {-6.90776, -0.90895, -0.35802, 2.50943, 2.84524, 3.01294,
                                   3.00698,  2.81772,  0.00426,  -1.2533, -1.32641},
                        later[] = {-6.90776, -6.54285, -6.04509, 1.93372,  3.12739, 3.63048,
                                   3.60519,  3.00765,  -5.65149, -6.84334, -6.89088};
    float *x = must_malloc(16000 * sizeof *x), *out = must_malloc(99 * MEL_BINS * sizeof *out);
    for (int n = 0; n < 16000; n++) x[n] = (float)(0.5 * sin(2 * M_PI * 1000 * n / 16000));
    mel_features(out, x, 16000);
    for (int i = 0; i < 11; i++) {
        expect_near("frame 0", out[bins[i]], first[i], 1e-4);
        expect_near("frame 50", out[50 * MEL_BINS + bins[i]], later[i], 1e-4);
    }
    for (int n = 0; n < 4000; n++)
        x[n] =
            (float)(0.3 * sin(2 * M_PI * 440 * n / 16000) + 0.1 * cos(2 * M_PI * 3000 * n / 16000));
    mel_features(out, x, 4000);
    static const double sums[][2] = {
        {0, -79.0209}, {1, -602.0563}, {10, -605.3965}, {23, -603.0627}};
    for (int i = 0; i < 4; i++) {
        double sum = 0;
        for (int j = 0; j < MEL_BINS; j++) sum += out[(int)sums[i][0] * MEL_BINS + j];
        expect_near("sum of a frame", sum, sums[i][1], 2e-3);
    }
    memset(x, 0, 1600 * sizeof *x);
    x[0] = 1;
    mel_features(out, x, 1600);
    expect_near("impulse", out[1], -.26526, 1e-4);
    expect_near("impulse", out[127], 1.66982, 1e-4);
    expect_near("after it", out[MEL_BINS + 64], -6.90776, 1e-4);
    free(x), free(out);
}

/* Samples, frames and means of what the reference makes of the same files; resampling is another
 * build of the same library. */
CASE(sounds, real_files_equal_the_references) {
    static const struct {
        const char *name;
        int64_t samples, frames;
        double mean, size, middle;
    } files[] = {
        {"LJ050-0131.wav", 122530, 765, -3.042918, 3.168919, -1.509388},
        {"jfk.wav", 176000, 1099, -2.231308, 2.495044, -1.106699},
        {"spk1_snt1.wav", 45920, 286, -3.630099, 3.655433, -2.777511},
        {"spk1_snt2.wav", 50400, 314, -3.924335, 3.946880, -3.463684},
        {"spk2_snt1.wav", 32160, 200, -2.474799, 2.636584, -2.923260},
        {"tour_en.wav", 48960, 305, -4.725697, 4.744864, -2.963042},
    };
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        char *name = must_format("data/audio/%s", files[i].name), *path = shared_path(name);
        double sum = 0, size = 0, middle = 0;
        Sound s;
        char *bytes;
        size_t size_read;
        EXPECT_OK(file_read(&bytes, &size_read, path, 1 << 26));
        EXPECT_OK(sound_decode(&s, (uint8_t *)bytes, size_read, path));
        free(bytes);
        int64_t frames = mel_frames(s.count), values = frames * MEL_BINS;
        EXPECT(s.count == files[i].samples && frames == files[i].frames, "%s: %d samples", name,
               (int)s.count);
        float *out = must_malloc((size_t)values * sizeof *out);
        mel_features(out, s.samples, s.count);
        for (int64_t k = 0; k < values; k++) sum += out[k], size += fabs((double)out[k]);
        for (int j = 0; j < MEL_BINS; j++) middle += out[frames / 2 * MEL_BINS + j];
        expect_near(name, sum / (double)values, files[i].mean, 1e-4);
        expect_near(name, size / (double)values, files[i].size, 1e-4);
        expect_near(name, middle / MEL_BINS, files[i].middle, 1e-4);
        free(out), free(name), free(path);
        sound_free(&s);
    }
}

CASE(sounds, chunks_are_padded_with_silence) {
    float x[] = {1, 2, 3, 4, 5}, out[6];
    sound_chunks(out, x, 5, 3);
    EXPECT(out[4] == 5 && out[5] == 0, "%g %g", out[4], out[5]);
}

CASE(sounds, what_is_none_is_refused) {
    Sound s;
    EXPECT(sound_decode(&s, (const uint8_t *)"", 0, "FILE") != OK, "an empty file");
    EXPECT(strstr(status_message(), "FILE: is empty"), "%s", status_message());
    EXPECT(sound_decode(&s, (const uint8_t *)"RIFF....WAVEfmt ", 16, "FILE") != OK, "half a WAV");
    EXPECT(strstr(status_message(), "FILE: ") && !s.samples, "%s", status_message());
    EXPECT(sound_decode(&s, (const uint8_t *)"no sound at all", 15, "FILE") != OK, "text");
}
