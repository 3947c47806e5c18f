/* small_media.c - a PPM and a WAV, byte by byte. */
#include "tests/small_media.h"
#include "data/text.h"
#include "formats/file.h"

#include <math.h>

const char *const small_names[] = {"a red ruby", "a green emerald", "a blue sapphire"};

char *small_path(const char *name) {
    return path_join(test_folder(), name);
}

void small_write(const char *name, const char *text) {
    char *path = small_path(name);
    EXPECT_OK(file_write(path, text, strlen(text)));
    free(path);
}

void small_picture(int which) {
    char *path = must_format("%s/stone%d.ppm", test_folder(), which), header[] = "P6 60 60 255\n";
    uint8_t pixels[60 * 60 * 3 + sizeof header];
    memcpy(pixels, header, sizeof header - 1);
    for (int i = 0; i < 60 * 60; i++)
        for (int c = 0; c < 3; c++) {
            int x = i % 60 - 30, y = i / 60 - 30;
            bool stone = x * x + y * y < 300;
            pixels[sizeof header - 1 + (size_t)(3 * i + c)] = (uint8_t)(c == which ? 230
                                                                        : stone    ? 20
                                                                                   : 200);
        }
    EXPECT_OK(file_write(path, pixels, sizeof pixels - 1));
    free(path);
}

static void put(uint8_t *to, uint32_t value, int bytes) {
    for (int i = 0; i < bytes; i++) to[i] = (uint8_t)(value >> 8 * i);
}

void small_tone(double hertz) {
    enum { SAMPLES = 8000 };
    uint8_t wav[44 + 2 * SAMPLES] = "RIFF....WAVEfmt ";
    put(wav + 4, sizeof wav - 8, 4);
    put(wav + 16, 16, 4), put(wav + 20, 1, 2), put(wav + 22, 1, 2);
    put(wav + 24, 16000, 4), put(wav + 28, 32000, 4), put(wav + 32, 2, 2), put(wav + 34, 16, 2);
    memcpy(wav + 36, "data", 4);
    put(wav + 40, 2 * SAMPLES, 4);
    for (int n = 0; n < SAMPLES; n++)
        put(wav + 44 + 2 * n, (uint32_t)(int)(9000 * sin(2 * M_PI * hertz * n / 16000)), 2);
    char *path = small_path("tone.wav");
    EXPECT_OK(file_write(path, wav, sizeof wav));
    free(path);
}

void small_media_rows(void) {
    Text rows = {0};
    for (int i = 0; i < SMALL_PICTURES; i++) {
        small_picture(i);
        text_addf(&rows,
                  "{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"image\", "
                  "\"path\": \"stone%d.ppm\"}, {\"type\": \"text\", \"text\": \"Which?\"}]}, "
                  "{\"role\": \"assistant\", \"content\": \"%s\"}]}\n",
                  i, small_names[i]);
    }
    small_tone(440);
    text_adds(&rows, "{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"audio\", "
                     "\"path\": \"tone.wav\"}]}, {\"role\": \"assistant\", \"content\": "
                     "\"a tone\"}]}\n");
    text_adds(&rows,
              "{\"messages\": [{\"role\": \"user\", \"content\": \"Look.\"}, {\"role\": "
              "\"assistant\", \"content\": \"\", \"tool_calls\": [{\"id\": \"c\", \"type\": "
              "\"function\", \"function\": {\"name\": \"look\", \"arguments\": {}}}]}, {\"role\": "
              "\"tool\", \"tool_call_id\": \"c\", \"content\": [{\"type\": \"text\", \"text\": "
              "\"Here.\"}, {\"type\": \"image\", \"path\": \"stone0.ppm\"}]}, {\"role\": "
              "\"assistant\", \"content\": \"It is red.\"}]}\n");
    small_write("rows.jsonl", rows.bytes);
    text_free(&rows);
}
