/* test_boxes.c - boxes out of answers, and into pictures. */
#include "data/boxes.h"
#include "data/text.h"
#include "formats/file.h"
#include "tests/program.h"

static json_t *parse(const char *text, int64_t *bad) {
    return boxes_parse(slice_of(text), 200, 400, bad);
}

static void expect_boxes(const char *text, int64_t bad, const char *expected) {
    int64_t found_bad;
    json_t *found = parse(text, &found_bad);
    Text shown = {0};
    EXPECT(found, "no boxes in %s", text);
    text_add_json(&shown, found);
    EXPECT(!strcmp(shown.bytes, expected) && bad == found_bad, "%s (%d bad) of %s", shown.bytes,
           (int)found_bad, text);
    text_free(&shown);
    json_decref(found);
}

CASE(boxes, are_read_out_of_whatever_surrounds_them) {
    int64_t bad;
#define RUBY                                                                                       \
    "{\"box_2d\": [100, 200, 500, 1000], \"label\": \"ruby\", \"pixels\": [80, 20, 399, 100]}"
    expect_boxes("[{\"box_2d\": [100, 200, 500, 1000], \"label\": \"ruby\"}]", 0, "[" RUBY "]");
    expect_boxes("Two [things]: ```json\n[{\"box_2d\":[100,200,500,1000],\"label\":\"ruby\"},"
                 "{\"box_2d\": [0.0, 0, 10.5, 20], \"label\": \"a ] b\"}]\n``` done",
                 0,
                 "[" RUBY ", {\"box_2d\": [0.0, 0, 10.5, 20], \"label\": \"a ] b\", \"pixels\": "
                 "[0, 0, 8, 2]}]");
    expect_boxes("{\"box_2d\": [100, 200, 500, 1000], \"label\": \"ruby\"}", 0, "[" RUBY "]");
    expect_boxes("[{\"box_2d\": [1, 2, 3]}, {\"box_2d\": [5, 5, 4, 9]}, {\"box_2d\": [0, 0, 1001, "
                 "1]}, {\"box_2d\": [0, 0, \"1\", 1]}, 7]",
                 5, "[]");
    EXPECT(!parse("no boxes [1, 2] {\"a\": 1} [", &bad) && !bad);
}

CASE(boxes, are_drawn_onto_the_picture) {
    const char *f = test_folder();
    char *ppm = must_format("%s/grey.ppm", f), *png = must_format("%s/out.png", f), *bytes;
    uint8_t pixels[15 + 400 * 200 * 3] = "P6 400 200 255\n";
    size_t size;
    Picture p;
    memset(pixels + 15, 90, sizeof pixels - 15);
    EXPECT_OK(file_write(ppm, pixels, sizeof pixels));
    EXPECT_EXIT(0, "\"boxes\": [",
                "parse --image %s --draw %s '[{\"box_2d\": [100, 200, 500, 900], "
                "\"label\": \"ruby\"}]'",
                ppm, png);
    EXPECT_OK(file_read(&bytes, &size, png, 1 << 20));
    EXPECT_OK(picture_decode(&p, (uint8_t *)bytes, size, png));
    EXPECT(p.height == 200 && p.width == 400);
    const uint8_t *edge = p.pixels + 3 * (100 * 400 + 200),
                  *inside = p.pixels + 3 * (60 * 400 + 200);
    EXPECT(edge[0] != 90 && inside[0] == 90, "%d on the frame, %d inside", edge[0], inside[0]);
    picture_free(&p);
    EXPECT_EXIT(1, "holds no list", "parse --image %s --draw %s 'nothing'", ppm, png);
    EXPECT_EXIT(2, "--draw takes one answer", "parse --draw %s '[]'", png);
    EXPECT_EXIT(0, "\"bad_boxes\": 1", "parse --boxes '[{\"box_2d\": [1]}]'");
    free(ppm), free(png), free(bytes);
}
