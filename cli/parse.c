/* parse.c - lapidary parse: model output to messages; boxes of object detection. */
#include "cli/command.h"
#include "data/boxes.h"
#include "formats/file.h"
#include "infer/answer.h"

#include <stdlib.h>

typedef struct Context {
    bool strict, boxes;
    const char *image, *draw;
    Picture picture; /* of --image */
} Context;

/* The boxes of an answer's content beside it, and drawn where that is asked for. */
static Status add_boxes(const Context *c, json_t *message) {
    int64_t bad;
    json_t *boxes = boxes_parse(json_slice(json_object_get(message, "content")), c->picture.height,
                                c->picture.width, &bad);
    if (boxes) json_object_set(message, "boxes", boxes);
    if (bad) json_object_set_new(message, "bad_boxes", json_integer(bad));
    Status status = OK;
    if (c->draw && !boxes)
        status = status_fail(ERR_CONFIG,
                             "%s: the answer holds no list of {\"box_2d\": [y0, x0, "
                             "y1, x1], \"label\": ...} to draw",
                             c->draw);
    if (c->draw && boxes) {
        Picture drawn = c->picture;
        boxes_draw(&drawn, boxes);
        status = picture_write(&drawn, c->draw);
    }
    json_decref(boxes);
    return status;
}

static Status parse_row(void *context, const json_t *row, Text *out) {
    const Context *c = context;
    json_t *text = row_get(row, "text"), *message;
    if (!json_is_string(text)) FAIL(ERR_FORMAT, "the row has no text");
    Slice prefix = json_slice(row_get(row, "prefix"));
    if (c->strict)
        TRY(answer_parse_strict(&message, prefix, json_slice(text), row_get(row, "tools")));
    else
        message = answer_parse(prefix, json_slice(text), row_get(row, "tools"));
    Status status = c->boxes ? add_boxes(c, message) : OK;
    if (status == OK) text_add_json(out, message);
    json_decref(message);
    return status;
}

static Status load_picture(Context *c) {
    char *bytes;
    size_t size;
    TRY(file_read(&bytes, &size, c->image, (size_t)2 << 30));
    Status status = picture_decode(&c->picture, (uint8_t *)bytes, size, c->image);
    free(bytes);
    return status;
}

Status command_parse(int argc, char **argv) {
    const char *data = NULL;
    Context c = {0};
    Option options[] = {
        {"--data", OPTION_TEXT, &data,
         "FILE  JSONL rows {\"text\", \"prefix\", \"tools\"}; - is standard input"},
        {"--strict", OPTION_FLAG, &c.strict,
         "the released template's own rule, its refusals included"},
        {"--boxes", OPTION_FLAG, &c.boxes,
         "also the boxes of detected objects, in thousandths of the sides"},
        {"--image", OPTION_TEXT, &c.image,
         "FILE  the picture they are of: boxes get their pixels too"},
        {"--draw", OPTION_TEXT, &c.draw, "OUT.png  the picture with the boxes of one answer"},
        {NULL, OPTION_FLAG, NULL, NULL}};
    Arguments a = {.usage = "parse [--strict] [--boxes] [--data FILE | TEXT]",
                   .about =
                       "Reads model output into message objects: thinking, content, tool_calls.",
                   .options = options,
                   .most = 1};
    TRY(arguments_parse(&a, argc, argv));
    if (a.helped) return OK;
    if (c.draw && (!c.image || data || !a.count))
        FAIL(ERR_USAGE, "--draw takes one answer as TEXT, and the picture with --image");
    c.boxes |= c.image != NULL;
    if (c.image) TRY(load_picture(&c));
    Status status = rows_run(data, a.count ? a.positional[0] : NULL, c.draw != NULL, parse_row, &c);
    picture_free(&c.picture);
    return status;
}
