/* medium.c - parts of messages to pictures and features; placeholders to slots. */
#include "data/medium.h"
#include "data/sound.h"
#include "formats/file.h"
#include "formats/sha256.h"

#include <ctype.h>
#include <inttypes.h>
#include <limits.h>
#include <nettle/base64.h>
#include <stdlib.h>
#include <string.h>

#define FILE_MAX     ((size_t)2 << 30)
#define VIDEO_TOKENS 70
#define VIDEO_FRAMES 32
#define TIME_TOKENS  10 /* of "12:34 ", at most, and the space before */

static const struct {
    const char *type;
    MediumKind kind;
} types[] = {{"image", MEDIUM_IMAGE},
             {"image_url", MEDIUM_IMAGE},
             {"video", MEDIUM_VIDEO},
             {"audio", MEDIUM_AUDIO},
             {"input_audio", MEDIUM_AUDIO}};

static bool kind_of(MediumKind *kind, const json_t *part) {
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (slice_is(json_slice(json_object_get(part, "type")), types[i].type)) {
            *kind = types[i].kind;
            return true;
        }
    return false;
}

/* ---- bytes ---- */

/* What a part says of where its bytes are: a path, a URL, or base64. */
typedef struct Source {
    const char *text;
    bool base64;
} Source;

static Status find_source(Source *s, const json_t *part) {
    static const char *const keys[] = {"path", "url", "image", "audio", "video", "image_url"};
    const json_t *audio = json_object_get(part, "input_audio");
    *s = (Source){json_string_value(json_object_get(part, "base64")), true};
    if (!s->text) s->text = json_string_value(json_object_get(audio, "data"));
    if (s->text) return OK;
    s->base64 = false;
    for (size_t i = 0; i < sizeof keys / sizeof *keys && !s->text; i++) {
        const json_t *value = json_object_get(part, keys[i]);
        s->text = json_string_value(json_is_object(value) ? json_object_get(value, "url") : value);
    }
    if (!s->text) FAIL(ERR_FORMAT, "names no file: expected path, url, base64 or a data URL");
    return OK;
}

static Status decode_base64(char **bytes, size_t *size, const char *text) {
    struct base64_decode_ctx context;
    size_t length = strlen(text);
    *bytes = malloc(BASE64_DECODE_LENGTH(length) + 1);
    *size = BASE64_DECODE_LENGTH(length);
    if (!*bytes) FAIL(ERR_IO, "out of memory for %zu bytes of base64", length);
    base64_decode_init(&context);
    if (base64_decode_update(&context, size, (uint8_t *)*bytes, length, text) &&
        base64_decode_final(&context))
        return OK;
    free(*bytes);
    *bytes = NULL;
    FAIL(ERR_FORMAT, "is no base64");
}

/* A file: URL's path, %XX undone; caller frees. */
static char *path_of_url(const char *url) {
    char *path = must_strdup(url + strlen("file:")), *to = path;
    const char *from = path;
    if (!strncmp(from, "//localhost/", 12))
        from += 11;
    else if (!strncmp(from, "///", 3))
        from += 2;
    while (*from) {
        unsigned code;
        if (*from == '%' && isxdigit((unsigned char)from[1]) && isxdigit((unsigned char)from[2]) &&
            sscanf(from + 1, "%2x", &code) == 1) {
            *to++ = (char)code;
            from += 3;
        } else {
            *to++ = *from++;
        }
    }
    *to = 0;
    return path;
}

static Status check_allowed(const char *path, const char *allowed) {
    char real[PATH_MAX], root[PATH_MAX];
    if (!allowed) return OK;
    bool inside = realpath(path, real) && realpath(allowed, root) &&
                  !strncmp(real, root, strlen(root)) &&
                  (real[strlen(root)] == '/' || !strcmp(root, "/"));
    if (!inside) FAIL(ERR_FORMAT, "%s: is not in the folder that media may come from", path);
    return OK;
}

static Status read_file(char **bytes, size_t *size, const char *name, const MediumOptions *o) {
    if (o->no_files) FAIL(ERR_FORMAT, "%.60s: files are not read here, expected a data URL", name);
    char *path = !strncmp(name, "file:", 5)    ? path_of_url(name)
                 : o->folder && name[0] != '/' ? path_join(o->folder, name)
                                               : must_strdup(name);
    Status status = check_allowed(path, o->allowed);
    if (status == OK) status = file_read(bytes, size, path, FILE_MAX);
    free(path);
    return status;
}

static Status read_source(char **bytes, size_t *size, const Source *s, const MediumOptions *o) {
    const char *comma = strchr(s->text, ',');
    *bytes = NULL;
    if (s->base64) return decode_base64(bytes, size, s->text);
    if (!strncmp(s->text, "data:", 5)) {
        if (!comma || comma - s->text < 7 || strncmp(comma - 7, ";base64", 7))
            FAIL(ERR_FORMAT, "a data URL without ;base64,");
        return decode_base64(bytes, size, comma + 1);
    }
    if (!strncmp(s->text, "http:", 5) || !strncmp(s->text, "https:", 6))
        FAIL(ERR_FORMAT, "%.60s: nothing is fetched, expected a file or a data URL", s->text);
    return read_file(bytes, size, s->text, o);
}

/* ---- what the model sees ---- */

static uint64_t key_of(const Medium *m) {
    uint64_t key = 0;
    for (int i = 0; i < m->frame_count || (!i && m->features); i++) {
        char sum[65];
        if (m->features)
            sha256_text(sum, m->features,
                        (size_t)(m->feature_rows * m->feature_width) * sizeof(float));
        else
            sha256_text(sum, m->frames[i].pixels,
                        (size_t)(m->frames[i].height * m->frames[i].width) * 3);
        sum[16] = 0;
        key = key * 0x9e3779b97f4a7c15u ^ strtoull(sum, NULL, 16);
    }
    return key;
}

/* Takes the decoded frames and makes them the model's size. */
static Status take_frames(Medium *m, const MediumOptions *o, const char *name) {
    const VisionConfig *c = &o->config->vision;
    bool video = m->kind == MEDIUM_VIDEO;
    int64_t budget = video ? (o->video_tokens ? o->video_tokens : VIDEO_TOKENS)
                           : (o->image_tokens ? o->image_tokens : c->soft_tokens);
    for (int i = 0; i < m->frame_count; i++) {
        int64_t height, width;
        Picture resized;
        TRY(picture_target(&height, &width, m->frames[i].height, m->frames[i].width, c, budget,
                           name));
        TRY(picture_resize(&resized, &m->frames[i], height, width));
        picture_free(&m->frames[i]);
        m->frames[i] = resized;
        m->tokens = media_picture_tokens(c, height, width);
        if (c->path == MEDIA_TOWER) {
            int64_t most = height > width ? height : width;
            if (most / c->patch_size > c->position_embedding_size)
                FAIL(ERR_FORMAT,
                     "%s: %" PRId64 " x %" PRId64 " pixels need more than %" PRId64 " positions",
                     name, width, height, c->position_embedding_size);
        }
    }
    return OK;
}

static Status take_sound(Medium *m, Sound *s, const MediumOptions *o, const char *name) {
    const AudioConfig *c = &o->config->audio;
    int64_t width = media_feature_width(c);
    m->feature_rows =
        c->path == MEDIA_TOWER ? mel_frames(s->count) : (s->count + width - 1) / width;
    if (!m->feature_rows)
        FAIL(ERR_FORMAT, "%s: %" PRId64 " samples of 16 kHz are too short to hear", name, s->count);
    m->features = malloc((size_t)(m->feature_rows * width) * sizeof *m->features);
    if (!m->features) FAIL(ERR_IO, "%s: out of memory for its features", name);
    if (c->path == MEDIA_TOWER)
        mel_features(m->features, s->samples, s->count);
    else
        sound_chunks(m->features, s->samples, s->count, width);
    m->feature_width = width;
    m->tokens = media_audio_tokens(c, m->feature_rows);
    return OK;
}

static void medium_free(Medium *m) {
    for (int i = 0; i < m->frame_count; i++) picture_free(&m->frames[i]);
    free(m->frames);
    free(m->times);
    free(m->features);
    free(m->original);
}

static Status decode(Medium *m, const uint8_t *bytes, size_t size, const char *name,
                     const MediumOptions *o) {
    Sound sound = {0};
    if (m->kind == MEDIUM_AUDIO) {
        if (o->config->audio.path == MEDIA_NONE)
            FAIL(ERR_FORMAT, "%s: this model hears nothing: its config.json has no audio_config",
                 name);
        TRY(sound_decode(&sound, bytes, size, name));
        Status status = take_sound(m, &sound, o, name);
        sound_free(&sound);
        return status;
    }
    if (o->config->vision.path == MEDIA_NONE)
        FAIL(ERR_FORMAT, "%s: this model sees nothing: its config.json has no vision_config", name);
    if (m->kind == MEDIUM_VIDEO) {
        Video video;
        TRY(video_decode(&video, bytes, size, o->video_frames ? o->video_frames : VIDEO_FRAMES,
                         name));
        m->frames = video.frames;
        m->times = video.times;
        m->frame_count = video.count;
    } else {
        m->frames = must_calloc(1, sizeof *m->frames);
        m->frame_count = 1;
        TRY(picture_decode(m->frames, bytes, size, name));
    }
    return take_frames(m, o, name);
}

/* A short name for messages: the path, or what else it is. */
static const char *name_of(const Source *s, MediumKind kind) {
    static const char *const kinds[] = {"an image", "a video", "a recording"};
    return s->base64 || !strncmp(s->text, "data:", 5) ? kinds[kind] : s->text;
}

static Status load_part(Medium *m, const json_t *part, const MediumOptions *o) {
    Source source;
    char *bytes = NULL;
    size_t size = 0;
    TRY(find_source(&source, part));
    Status status = read_source(&bytes, &size, &source, o);
    if (status == OK) status = decode(m, (uint8_t *)bytes, size, name_of(&source, m->kind), o);
    if (status == OK && o->keep_original) {
        m->original = (uint8_t *)bytes;
        m->original_size = size;
        bytes = NULL;
    }
    free(bytes);
    if (status == OK) m->key = key_of(m);
    return status;
}

int messages_media_count(const json_t *messages) {
    int count = 0;
    size_t i, k;
    json_t *message, *part;
    json_array_foreach(messages, i, message) {
        const json_t *content = json_object_get(message, "content");
        MediumKind kind;
        json_array_foreach(content, k, part) count += kind_of(&kind, part);
    }
    return count;
}

/* Of one medium, marks and times included. */
static int64_t most_tokens(MediumKind kind, const MediumOptions *o) {
    const AudioConfig *a = &o->config->audio;
    int64_t frames = o->video_frames ? o->video_frames : VIDEO_FRAMES,
            frame = o->video_tokens ? o->video_tokens : VIDEO_TOKENS, width;
    switch (kind) {
    case MEDIUM_IMAGE:
        return 2 + (o->image_tokens ? o->image_tokens : o->config->vision.soft_tokens);
    case MEDIUM_VIDEO:
        return frames * (frame + 2 + TIME_TOKENS);
    default:
        if (a->path == MEDIA_TOWER) return 2 + media_audio_tokens(a, mel_frames(SOUND_MOST));
        width = media_feature_width(a);
        return 2 + (width ? (SOUND_MOST + width - 1) / width : 0);
    }
}

int64_t messages_media_tokens(const json_t *messages, const MediumOptions *options) {
    int64_t count = 0;
    size_t i, k;
    json_t *message, *part;
    json_array_foreach(messages, i, message) {
        MediumKind kind;
        json_array_foreach(json_object_get(message, "content"), k, part) if (kind_of(&kind, part))
            count += most_tokens(kind, options);
    }
    return count;
}

/* A call's answer is written before the content of its message: places would not be in order. */
static Status check_order(const json_t *message, size_t i) {
    json_t *one = json_pack("[O]", message);
    bool both = messages_media_count(one) > 0 && json_truth(json_object_get(message, "tool_calls"));
    json_decref(one);
    if (both)
        FAIL(ERR_FORMAT, "messages[%zu]: a message with tool_calls cannot hold media as well", i);
    return OK;
}

Status media_collect(MediumList *list, const json_t *messages, const MediumOptions *options) {
    size_t i, k;
    json_t *message, *part;
    *list = (MediumList){0};
    json_array_foreach(messages, i, message) {
        Status status = check_order(message, i);
        json_array_foreach(json_object_get(message, "content"), k, part) {
            Medium m = {0};
            if (status != OK || !kind_of(&m.kind, part)) continue;
            status = load_part(&m, part, options);
            if (status != OK) status = status_prefix(status, "messages[%zu].content[%zu]", i, k);
            list->items = must_realloc(list->items, (size_t)(list->count + 1) * sizeof m);
            list->items[list->count++] = m;
        }
        if (status != OK) {
            media_list_free(list);
            return status;
        }
    }
    return OK;
}

void media_list_free(MediumList *list) {
    for (int i = 0; i < list->count; i++) medium_free(&list->items[i]);
    free(list->items);
    *list = (MediumList){0};
}

/* ---- in the text ---- */

static const char *const places[] = {"<|image|>", "<|video|>", "<|audio|>"};

static void add_run(Text *out, const char *begin, const char *slot, int64_t n, const char *end) {
    text_adds(out, begin);
    for (int64_t i = 0; i < n; i++) text_adds(out, slot);
    text_adds(out, end);
}

static void write_medium(Text *out, const Medium *m) {
    if (m->kind == MEDIUM_AUDIO) {
        add_run(out, "<|audio>", "<|audio|>", m->tokens, "<audio|>");
        return;
    }
    for (int i = 0; i < m->frame_count; i++) {
        if (m->kind == MEDIUM_VIDEO) {
            int64_t seconds = (int64_t)m->times[i];
            text_addf(out, "%s%02" PRId64 ":%02" PRId64 " ", i ? " " : "", seconds / 60,
                      seconds % 60);
        }
        add_run(out, "<|image>", places[m->kind], m->tokens, "<image|>");
    }
}

static bool is_content(const Rendered *r, size_t at) {
    for (int i = 0; i < r->content_count; i++)
        if (at >= r->content[i].begin && at < r->content[i].end) return true;
    return false;
}

static void shift(Range *ranges, int count, size_t from, size_t more) {
    for (int i = 0; i < count; i++) {
        if (ranges[i].begin >= from) ranges[i].begin += more;
        if (ranges[i].end >= from) ranges[i].end += more;
    }
}

/* The first placeholder at or after `from` that the template wrote; its kind in *kind. */
static size_t find_place(const Rendered *r, size_t from, MediumKind *kind) {
    size_t best = r->text.size;
    Slice text = {r->text.bytes, r->text.size};
    for (int k = MEDIUM_IMAGE; k <= MEDIUM_AUDIO; k++) {
        size_t at = from;
        while ((at = slice_find(text, places[k], at)) < best && is_content(r, at)) at++;
        if (at < best) best = at, *kind = (MediumKind)k;
    }
    return best;
}

Status media_expand(Rendered *r, const MediumList *list) {
    size_t from = 0;
    for (int i = 0;; i++) {
        MediumKind kind = MEDIUM_IMAGE;
        size_t at = find_place(r, from, &kind), old = strlen(places[0]);
        if (at == r->text.size && i == list->count) return OK;
        if (at == r->text.size || i == list->count || list->items[i].kind != kind)
            FAIL(ERR_FORMAT, "the messages hold %d media, the text has another number of places",
                 list->count);
        Text out = {0};
        text_add(&out, r->text.bytes, at);
        write_medium(&out, &list->items[i]);
        size_t end = out.size;
        text_add(&out, r->text.bytes + at + old, r->text.size - at - old);
        shift(r->trained, r->trained_count, at + old, end - at - old);
        shift(r->content, r->content_count, at + old, end - at - old);
        text_free(&r->text);
        r->text = out;
        from = end;
    }
}

/* ---- among the ids ---- */

static MediaItem item_of(const Medium *m, int frame) {
    MediaItem item = {.count = m->tokens, .key = m->key + (uint64_t)frame};
    if (m->kind == MEDIUM_AUDIO) {
        item.frames = m->feature_rows;
        item.features = m->features;
        item.feature_width = m->feature_width;
    } else {
        item.height = m->frames[frame].height;
        item.width = m->frames[frame].width;
        item.pixels = m->frames[frame].pixels;
    }
    return item;
}

Status media_items(MediaItem **items, int64_t *count, const MediumList *list, const ModelConfig *c,
                   const int32_t *ids, int64_t n) {
    const int64_t slots[] = {c->image_token_id, c->video_token_id, c->audio_token_id};
    int64_t total = 0, at = 0;
    for (int i = 0; i < list->count; i++)
        total += list->items[i].frame_count ? list->items[i].frame_count : 1;
    *items = must_calloc((size_t)total + 1, sizeof **items);
    *count = 0;
    for (int i = 0; i < list->count; i++) {
        const Medium *m = &list->items[i];
        for (int frame = 0; frame < m->frame_count || (!frame && m->features); frame++) {
            MediaItem *item = &(*items)[(*count)++];
            *item = item_of(m, frame);
            while (at < n && ids[at] != slots[m->kind]) at++;
            item->first = at;
            while (at < n && ids[at] == slots[m->kind] && at - item->first < item->count) at++;
            if (at - item->first == item->count) continue;
            free(*items);
            *items = NULL;
            FAIL(ERR_FORMAT, "medium %d has %" PRId64 " slots, the ids have %" PRId64, i,
                 item->count, at - item->first);
        }
    }
    return OK;
}

/* ---- originals ---- */

Original media_original(const MediumList *list, int64_t item) {
    for (int i = 0; i < list->count; i++) {
        const Medium *m = &list->items[i];
        int64_t parts = m->frame_count ? m->frame_count : 1;
        if (item < parts) return (Original){m->original, m->original_size, item, parts, m->kind};
        item -= parts;
    }
    CHECK(false, "an item that no medium has");
    return (Original){0};
}

static const char original_name[] = "a stored original";

static Status picture_again(OriginalReader *r, Picture *p, const Original *o, uint64_t number) {
    if (o->kind != MEDIUM_VIDEO) return picture_decode(p, o->bytes, o->size, original_name);
    if (r->of != number) {
        original_reader_free(r);
        TRY(video_decode(&r->video, o->bytes, o->size, o->parts, original_name));
        r->of = number;
    }
    if (o->part >= r->video.count)
        FAIL(ERR_FORMAT, "%s: a video of %d frames, expected %" PRId64, original_name,
             r->video.count, o->parts);
    const Picture *frame = &r->video.frames[o->part];
    size_t size = (size_t)(frame->height * frame->width) * 3;
    *p = (Picture){frame->height, frame->width, malloc(size)};
    if (!p->pixels) FAIL(ERR_IO, "%s: out of memory for a frame", original_name);
    memcpy(p->pixels, frame->pixels, size);
    return OK;
}

static Status sound_again(uint8_t **bytes, const Original *o, int64_t frames,
                          const ModelConfig *c) {
    Sound sound;
    Medium m = {.kind = MEDIUM_AUDIO};
    MediumOptions options = {.config = c};
    TRY(sound_decode(&sound, o->bytes, o->size, original_name));
    Status status = take_sound(&m, &sound, &options, original_name);
    sound_free(&sound);
    if (status == OK && m.feature_rows != frames)
        status = status_fail(ERR_FORMAT, "%s: a recording of %" PRId64 " frames, expected %" PRId64,
                             original_name, m.feature_rows, frames);
    if (status != OK) free(m.features), m.features = NULL;
    *bytes = (uint8_t *)m.features;
    return status;
}

Status original_read(OriginalReader *r, uint8_t **bytes, const Original *o, uint64_t number,
                     int64_t height, int64_t width, int64_t frames, const ModelConfig *c) {
    Picture p = {0}, resized = {0};
    *bytes = NULL;
    if (!height) return sound_again(bytes, o, frames, c);
    Status status = picture_again(r, &p, o, number);
    if (status == OK) status = picture_resize(&resized, &p, height, width);
    picture_free(&p);
    *bytes = resized.pixels;
    return status;
}

void original_reader_free(OriginalReader *r) {
    video_free(&r->video);
    *r = (OriginalReader){0};
}
