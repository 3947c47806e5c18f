/* test_pictures.c - pictures as Pillow decodes and resizes them, and files that are none. */
#include "data/picture.h"
#include "formats/file.h"
#include "formats/sha256.h"
#include "tests/test.h"

#include <zlib.h>

static const VisionConfig released = {.patch_size = 16, .pooling_kernel_size = 3};

CASE(pictures, sizes_equal_the_references) {
    static const int64_t budgets[] = {70, 140, 280, 560, 1120};
    static const struct {
        int64_t height, width, to[5][2];
    } table[] = {
        {224, 224, {{384, 384}, {528, 528}, {768, 768}, {1104, 1104}, {1584, 1584}}},
        {100, 100, {{384, 384}, {528, 528}, {768, 768}, {1104, 1104}, {1584, 1584}}},
        {896, 896, {{384, 384}, {528, 528}, {768, 768}, {1104, 1104}, {1584, 1584}}},
        {480, 640, {{336, 432}, {480, 624}, {672, 912}, {960, 1296}, {1344, 1824}}},
        {768, 1024, {{336, 432}, {480, 624}, {672, 912}, {960, 1296}, {1344, 1824}}},
        {3024, 4032, {{336, 432}, {480, 624}, {672, 912}, {960, 1296}, {1344, 1824}}},
        {1080, 1920, {{288, 528}, {384, 720}, {576, 1056}, {816, 1488}, {1200, 2112}}},
        {1920, 1080, {{528, 288}, {720, 384}, {1056, 576}, {1488, 816}, {2112, 1200}}},
        {37, 411, {{96, 1296}, {144, 1872}, {240, 2640}, {336, 3744}, {480, 5328}}},
        {256, 2048, {{96, 1104}, {192, 1584}, {240, 2256}, {384, 3168}, {528, 4512}}},
        {1, 4000, {{48, 3360}, {48, 6720}, {48, 13440}, {48, 26880}, {48, 53760}}},
        {2000, 16, {{3360, 48}, {6336, 48}, {8976, 48}, {12672, 96}, {17952, 96}}},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        for (int b = 0; b < 5; b++) {
            int64_t h, w;
            EXPECT(media_is_budget(budgets[b]), "%d", (int)budgets[b]);
            EXPECT_OK(picture_target(&h, &w, table[i].height, table[i].width, &released, budgets[b],
                                     "a picture"));
            EXPECT(h == table[i].to[b][0] && w == table[i].to[b][1], "%d x %d at %d: %d x %d",
                   (int)table[i].height, (int)table[i].width, (int)budgets[b], (int)h, (int)w);
        }
}

CASE(pictures, resampling_equals_pillows) {
    Picture in = {100, 100, must_malloc(100 * 100 * 3)}, out;
    static const int64_t sums[] = {20153079, 18038413, 30302208};
    for (int y = 0; y < 100; y++)
        for (int x = 0; x < 100; x++) {
            uint8_t *p = in.pixels + (y * 100 + x) * 3;
            p[0] = (uint8_t)(2 * x + y), p[1] = (uint8_t)(x * y), p[2] = (uint8_t)(255 - x);
        }
    EXPECT_OK(picture_resize(&out, &in, 384, 384));
    for (int c = 0; c < 3; c++) {
        int64_t sum = 0;
        for (int i = 0; i < 384 * 384; i++) sum += out.pixels[3 * i + c];
        EXPECT(sum == sums[c], "channel %d sums to %d", c, (int)sum);
    }
    const uint8_t *p = out.pixels + (200 * 384 + 300) * 3;
    EXPECT(p[0] == 208 && p[1] == 211 && p[2] == 177, "%d %d %d", p[0], p[1], p[2]);
    picture_free(&in), picture_free(&out);
}

static void expect_sum(const Picture *p, const char *expected, const char *what) {
    char sum[65];
    sha256_text(sum, p->pixels, (size_t)(p->height * p->width) * 3);
    EXPECT(!strncmp(sum, expected, strlen(expected)), "%s: pixels sum to %.16s, Pillow's to %s",
           what, sum, expected);
}

/* Sums are of the bytes that Pillow 12 makes of the same files, and of its bicubic resizing. */
CASE(pictures, real_files_equal_pillows) {
    static const struct {
        const char *name, *sum;
        struct {
            int64_t height, width;
            const char *sum;
        } sizes[2];
    } files[] = {
        {"charts/arc_pie.png",
         "9b5513dfa1c4dd07",
         {{336, 432, "44f2e7de3b0a3a38"}, {720, 864, "a0777c8f34a3e4c2"}}},
        {"charts/bar.png",
         "57dc86216c74a530",
         {{480, 288, "a436e464b09eff66"}, {960, 624, "fb6b3c60671567d6"}}},
        {"charts/bar_grouped.png",
         "531f2e5dffcdbd40",
         {{384, 384, "396846923bd058b5"}, {768, 768, "e7230eb287508dc5"}}},
        {"charts/boxplot_2D_vertical.png",
         "5d86e4e6f0553894",
         {{672, 192, "d87ddd5fe5eb2219"}, {1392, 432, "b8d1884ab641eea3"}}},
        {"charts/line_color.png",
         "83ad82b4c0bc2d1c",
         {{336, 432, "8ca1a9a16ca8e71b"}, {720, 864, "953115c170184952"}}},
        {"charts/line_slope.png",
         "eae412f0c467442b",
         {{432, 336, "a292dfaac03e82c1"}, {912, 672, "0059d8759699a824"}}},
        {"charts/point_2d.png",
         "bc07f8579c79dbb3",
         {{384, 384, "fa079989f73188b8"}, {768, 768, "ce386b3ebdc3b1af"}}},
        {"charts/stacked_bar_weather.png",
         "4e680283ae16ad1a",
         {{336, 384, "36a665d87676f134"}, {720, 816, "a34033ef2bdfa6ad"}}},
        {"images/astronaut.png",
         "a8c429c18afa7b0f",
         {{384, 384, "35b831e283249a1e"}, {768, 768, "91573593510dd0fd"}}},
        {"images/camera.png",
         "13e2b4aa92cb1649",
         {{384, 384, "a54567ef0c7fd700"}, {768, 768, "a15de52630d3da77"}}},
        {"images/chelsea.png",
         "416b729128bfb2c3",
         {{288, 480, "d06554866c6a8a06"}, {624, 960, "a982943b52e2a4c3"}}},
        {"images/golden_gate.png",
         "b1943b45ca89f8a4",
         {{384, 384, "09d550f87a6bdd20"}, {768, 768, "b1943b45ca89f8a4"}}},
        {"images/page.png",
         "ec733fa2c4086658",
         {{240, 528, "74b87324364a645a"}, {528, 1104, "01d54ea87b38342e"}}},
        {"images/retina.jpg",
         "3670e389d0dae9f7",
         {{384, 384, "f1ceeaa6e4315fa6"}, {768, 768, "3dfdc61b147eb88c"}}},
        {"images/rocket.jpg",
         "3d4435cc745752b7",
         {{288, 480, "b004f5a28451de2d"}, {624, 960, "ad78d43bf43fcb18"}}},
    };
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        char *path = must_format("data/%s", files[i].name), *where = shared_path(path);
        Picture p, to;
        char *bytes;
        size_t size;
        EXPECT_OK(file_read(&bytes, &size, where, 1 << 26));
        EXPECT_OK(picture_decode(&p, (uint8_t *)bytes, size, where));
        free(bytes);
        expect_sum(&p, files[i].sum, files[i].name);
        for (int k = 0; k < 2; k++) {
            int64_t h, w;
            EXPECT_OK(picture_target(&h, &w, p.height, p.width, &released, k ? 280 : 70, where));
            EXPECT(h == files[i].sizes[k].height && w == files[i].sizes[k].width, "%s: %d x %d",
                   files[i].name, (int)h, (int)w);
            EXPECT_OK(picture_resize(&to, &p, h, w));
            expect_sum(&to, files[i].sizes[k].sum, files[i].name);
            picture_free(&to);
        }
        picture_free(&p);
        free(path), free(where);
    }
}

static void expect_refused(const void *bytes, size_t size, const char *part) {
    Picture p;
    EXPECT(picture_decode(&p, bytes, size, "FILE") != OK, "a picture without %s", part);
    EXPECT(strstr(status_message(), part) && strstr(status_message(), "FILE"), "'%s' lacks '%s'",
           status_message(), part);
    EXPECT(!p.pixels, "pixels are left");
}

#define REFUSED(text, part) expect_refused(text, sizeof(text) - 1, part)

CASE(pictures, what_is_none_is_refused) {
    REFUSED("", "is empty");
    REFUSED("GIF89a", "is no picture, expected JPEG, PNG, WebP or PPM");
    REFUSED("P6 2 2 255\nabc", "ends before its last row");
    REFUSED("P6 0 5 255\n", "a picture of 0 x 5 pixels");
    REFUSED("P6 20000 20000 255\n", "expected 89478485 at most");
    REFUSED("P6 x", "three numbers");
    REFUSED("\xff\xd8\xff\xe0", "FILE: ");
    REFUSED("\x89PNG\r\n\x1a\n and so on", "FILE: ");
    REFUSED("RIFF\1\1\1\1WEBPVP8 ", "FILE: ");
}

static size_t put_chunk(uint8_t *to, const char *kind, const uint8_t *bytes, uint32_t size) {
    uint32_t sum = (uint32_t)crc32(crc32(0, (const uint8_t *)kind, 4), bytes, size);
    for (int i = 0; i < 4; i++) to[i] = (uint8_t)(size >> 8 * (3 - i));
    memcpy(to + 4, kind, 4);
    if (size) memcpy(to + 8, bytes, size);
    for (int i = 0; i < 4; i++) to[8 + size + (uint32_t)i] = (uint8_t)(sum >> 8 * (3 - i));
    return 12 + size;
}

/* A PNG of two pixels, red and green, that says how it is to be turned. */
static size_t png_of_two(uint8_t *png, int orientation) {
    static const uint8_t header[] = {0, 0, 0, 2, 0, 0, 0, 1, 8, 2, 0, 0, 0},
                         row[] = {0, 255, 0, 0, 0, 255, 0};
    uint8_t exif[] = {
        'I', 'I', 42, 0, 8, 0, 0, 0, 1, 0, 0x12, 1, 3, 0, 1, 0, 0, 0, (uint8_t)orientation,
        0,   0,   0,  0, 0, 0, 0};
    uint8_t packed[64];
    uLongf bytes = sizeof packed;
    size_t at = 8;
    memcpy(png, "\x89PNG\r\n\x1a\n", 8);
    EXPECT(compress(packed, &bytes, row, sizeof row) == Z_OK, "zlib");
    at += put_chunk(png + at, "IHDR", header, sizeof header);
    at += put_chunk(png + at, "eXIf", exif, sizeof exif);
    at += put_chunk(png + at, "IDAT", packed, (uint32_t)bytes);
    return at + put_chunk(png + at, "IEND", header, 0);
}

CASE(pictures, orientations_turn_them_upright) {
    static const uint8_t upright[8][2] = {{0, 1}, {1, 0}, {1, 0}, {0, 1},
                                          {0, 1}, {0, 1}, {1, 0}, {1, 0}};
    for (int orientation = 1; orientation <= 8; orientation++) {
        uint8_t png[256];
        size_t size = png_of_two(png, orientation);
        Picture p;
        EXPECT_OK(picture_decode(&p, png, size, "two pixels"));
        bool tall = orientation >= 5;
        EXPECT(p.height == (tall ? 2 : 1) && p.width == (tall ? 1 : 2), "%d x %d", (int)p.width,
               (int)p.height);
        for (int i = 0; i < 2; i++)
            EXPECT(p.pixels[3 * i + upright[orientation - 1][i]] == 255, "orientation %d",
                   orientation);
        picture_free(&p);
    }
}
