/* store.c - checking and reading stores. */
#include "data/store_layout.h"
#include "formats/file.h"
#include "formats/sha256.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* Everything that changes what rows become, as text: equal texts make equal samples. */
char *store_settings(const DataConfig *c, int64_t seed) {
    Text text = {0};
    text_addf(&text,
              "max_length=%" PRId64
              " loss_on=%d turns=%d add_eos=%d cut_long=%d inline_thoughts=%d "
              "string_arguments=%d empty_thought=%d trl_mask=%d literal=%d skip_bad=%d "
              "chat_format=%s eval_share=%.17g "
              "seed=%" PRId64 " fields=",
              c->max_length, c->loss_on, c->turns, c->add_eos, c->cut_long, c->inline_thoughts,
              c->string_arguments, c->empty_thought, c->trl_mask, c->literal, c->skip_bad,
              c->chat_format, c->eval_share, c->eval_share > 0 ? seed : 0);
    for (int i = 0; i < c->field_names.count; i++)
        text_addf(&text, "%s:%s,", c->field_names.items[i], c->field_values.items[i]);
    if (c->image_tokens || c->video_tokens || c->video_frames)
        text_addf(&text, " media=%" PRId64 ",%" PRId64 ",%" PRId64, c->image_tokens,
                  c->video_tokens, c->video_frames);
    if (c->media_original) text_adds(&text, " media=original");
    return text.bytes;
}

const char *store_source_at(const DataConfig *c, int i) {
    return i < c->train.count ? c->train.items[i] : c->eval.items[i - c->train.count];
}

/* Within a set. */
#define NAMED(part) (snprintf(path, sizeof path, "%s/" part, name), path)

Status store_read_set(H5File *f, const char *name, SampleSet *set) {
    char path[64];
    int64_t tokens, masks, begins, sources;
    TRY(h5_count(f, NAMED("tokens"), &tokens));
    TRY(h5_count(f, NAMED("mask"), &masks));
    TRY(h5_count(f, NAMED("begins"), &begins));
    TRY(h5_count(f, NAMED("sources"), &sources));
    if (begins < 1 || masks != tokens || sources != 2 * (begins - 1))
        FAIL(ERR_FORMAT, "%s: the parts of '%s' do not fit each other", f->path, name);
    set->count = begins - 1;
    set->begins = must_calloc((size_t)begins, sizeof *set->begins);
    set->sources = must_calloc((size_t)sources + 1, sizeof *set->sources);
    set->trained = must_calloc((size_t)begins, sizeof *set->trained);
    TRY(h5_read(f, NAMED("begins"), H5T_NATIVE_INT64, 0, begins, set->begins));
    TRY(h5_read(f, NAMED("sources"), H5T_NATIVE_INT32, 0, sources, set->sources));
    for (int64_t i = 0; i < set->count; i++)
        if (set->begins[0] != 0 || set->begins[i + 1] < set->begins[i] ||
            set->begins[i + 1] > tokens)
            FAIL(ERR_FORMAT, "%s: '%s/begins' is not ascending within %" PRId64 " tokens", f->path,
                 name, tokens);
    uint8_t *mask = must_malloc((size_t)tokens + 1);
    Status status = h5_read(f, NAMED("mask"), H5T_NATIVE_UINT8, 0, tokens, mask);
    for (int64_t i = 0; status == OK && i < set->count; i++) {
        for (int64_t t = set->begins[i] + 1; t < set->begins[i + 1]; t++)
            set->trained[i] += mask[t] != 0;
        set->total_trained += set->trained[i];
    }
    free(mask);
    return status;
}

/* Where items stand in samples. A slot belongs to the sample whose tokens it lies in. */
static Status read_slots(Store *s, const char *name, SampleSet *set) {
    char path[64];
    int64_t numbers = 0, at = 0;
    set->slot_begins = must_calloc((size_t)set->count + 1, sizeof *set->slot_begins);
    if (!s->media_count || !h5_has(&s->file, NAMED("slots"))) return OK;
    TRY(h5_count(&s->file, NAMED("slots"), &numbers));
    set->slot_count = numbers / 2;
    set->slots = must_malloc((size_t)numbers * sizeof *set->slots);
    TRY(h5_read(&s->file, NAMED("slots"), H5T_NATIVE_INT64, 0, numbers, set->slots));
    for (int64_t i = 0; i < set->count; i++) {
        set->slot_begins[i] = at;
        for (; at < set->slot_count && set->slots[2 * at] < set->begins[i + 1]; at++) {
            int64_t first = set->slots[2 * at], item = set->slots[2 * at + 1];
            bool fits = item >= 0 && item < s->media_count && first >= set->begins[i] &&
                        first + s->media[item].tokens <= set->begins[i + 1];
            if (!fits) FAIL(ERR_FORMAT, "%s: '%s/slots' do not lie in samples", s->file.path, name);
        }
        set->slot_begins[i + 1] = at;
    }
    if (at != set->slot_count)
        FAIL(ERR_FORMAT, "%s: '%s/slots' do not lie in samples", s->file.path, name);
    return OK;
}

static bool is_possible(const StoredMedium *m, int64_t bytes) {
    bool picture = m->height > 0 && m->width > 0 && m->height <= PICTURE_PIXELS_MAX / m->width;
    bool original = m->parts > 0 && m->part >= 0 && m->part < m->parts && m->parts < 1 << 20 &&
                    m->kind >= MEDIUM_IMAGE && m->kind <= MEDIUM_AUDIO &&
                    (m->kind == MEDIUM_AUDIO) == !picture;
    return m->tokens > 0 && m->tokens < 1 << 20 && m->offset >= 0 && m->bytes > 0 &&
           m->bytes <= bytes && m->offset <= bytes - m->bytes &&
           (picture || (!m->height && m->frames > 0)) &&
           (m->parts ? original
                     : m->bytes == 3 * m->height * m->width ||
                           (!picture && m->bytes % (4 * m->frames) == 0));
}

static Status read_media(Store *s) {
    const int64_t numbers = sizeof(StoredMedium) / sizeof(int64_t);
    int64_t count, bytes;
    if (!h5_has(&s->file, "media/items")) return OK;
    TRY(h5_count(&s->file, "media/items", &count));
    TRY(h5_count(&s->file, "media/bytes", &bytes));
    s->media = must_malloc((size_t)(count + 1) * sizeof(int64_t));
    s->media_count = count / numbers;
    TRY(h5_read(&s->file, "media/items", H5T_NATIVE_INT64, 0, count, s->media));
    for (int64_t i = 0; i < s->media_count; i++)
        if (!is_possible(&s->media[i], bytes))
            FAIL(ERR_FORMAT, "%s: item %" PRId64 " of media/items is impossible", s->file.path, i);
    return OK;
}

Status store_read_medium(Store *s, int64_t item, OriginalReader *r, const ModelConfig *c,
                         uint8_t **bytes) {
    const StoredMedium *m = &s->media[item];
    uint8_t *stored = malloc((size_t)m->bytes);
    *bytes = NULL;
    if (!stored) FAIL(ERR_IO, "%s: out of memory for a picture or a recording", s->file.path);
    Status status = h5_read(&s->file, "media/bytes", H5T_NATIVE_UINT8, m->offset, m->bytes, stored);
    if (status == OK && !m->parts) {
        *bytes = stored;
        return OK;
    }
    Original o = {stored, (size_t)m->bytes, m->part, m->parts, (MediumKind)m->kind};
    if (status == OK) {
        status =
            original_read(r, bytes, &o, (uint64_t)m->offset + 1, m->height, m->width, m->frames, c);
        if (status != OK) status = status_prefix(status, "%s: item %" PRId64, s->file.path, item);
    }
    free(stored);
    return status;
}

Status store_check_origin(Store *s, const Tokenizer *tokenizer) {
    char *text = NULL;
    Status status = OK;
    const char *path = s->file.path;
    TRY_DONE(h5_read_text(&s->file, "/", "tokenizer_sha256", &text));
    if (strcmp(text, tokenizer_hash(tokenizer)))
        FAIL_DONE(ERR_FORMAT,
                  "%s: is stale: made with another tokenizer (%.12s..., the model's is %.12s...)",
                  path, text, tokenizer_hash(tokenizer));
    for (int i = 0; i < s->source_count; i++) { /* the sources, where they are still there */
        char now[65], name[64];
        if (!file_exists(s->source_paths[i])) continue;
        free(text);
        text = NULL;
        snprintf(name, sizeof name, "source_%d_sha256", i);
        TRY_DONE(h5_read_text(&s->file, "/", name, &text));
        TRY_DONE(sha256_file(now, s->source_paths[i]));
        if (strcmp(now, text))
            FAIL_DONE(ERR_FORMAT, "%s: is stale: %s has changed since", path, s->source_paths[i]);
    }
done:
    free(text);
    return status;
}

static Status check_settings(Store *s, const DataConfig *config, int64_t seed) {
    char *text = NULL, *settings = store_settings(config, seed);
    Status status = h5_read_text(&s->file, "/", "settings", &text);
    if (status == OK && strcmp(text, settings))
        status = status_fail(ERR_FORMAT, "%s: is stale: made with other data settings (%s; now %s)",
                             s->file.path, text, settings);
    free(text);
    free(settings);
    return status;
}

Status store_open(Store *s, const char *path, RowReader *reader, const DataConfig *config,
                  int64_t seed) {
    static const char *const names[] = {"rows", "samples", "cut",    "dropped",
                                        "bad",  "tokens",  "trained"};
    *s = (Store){0};
    Status status = OK;
    double version = 0, sources = 0;
    TRY_DONE(h5_open(&s->file, path));
    if (h5_read_number(&s->file, "/", "lapidary_store", &version) != OK || version != STORE_VERSION)
        FAIL_DONE(ERR_FORMAT, "%s: is no dataset of this version of Lapidary", path);
    for (int i = 0; i < 7; i++)
        TRY_DONE(h5_read_number(&s->file, "/", names[i], &s->counts.rows + i));
    TRY_DONE(h5_read_number(&s->file, "/", "source_count", &sources));
    if (!(sources >= 0 && sources < 1e6))
        FAIL_DONE(ERR_FORMAT, "%s: names %g sources", path, sources);
    s->source_paths = must_calloc((size_t)sources + 1, sizeof *s->source_paths);
    for (; s->source_count < (int)sources; s->source_count++) {
        char name[64];
        snprintf(name, sizeof name, "source_%d_path", s->source_count);
        TRY_DONE(h5_read_text(&s->file, "/", name, &s->source_paths[s->source_count]));
    }
    TRY_DONE(store_read_set(&s->file, "train", &s->train));
    TRY_DONE(store_read_set(&s->file, "eval", &s->eval));
    TRY_DONE(read_media(s));
    TRY_DONE(read_slots(s, "train", &s->train));
    TRY_DONE(read_slots(s, "eval", &s->eval));
    if (reader) {
        TRY_DONE(check_settings(s, config, seed));
        TRY_DONE(store_check_origin(s, reader->tokenizer));
    }
done:
    if (status != OK) store_close(s);
    return status;
}

const char *store_source(const Store *s, bool eval, int64_t sample, int *line) {
    const int32_t *source = (eval ? &s->eval : &s->train)->sources + 2 * sample;
    *line = source[1];
    return source[0] >= 0 && source[0] < s->source_count ? s->source_paths[source[0]] : "?";
}

void store_free_set(SampleSet *set) {
    free(set->begins);
    free(set->trained);
    free(set->sources);
    free(set->slots);
    free(set->slot_begins);
}

void store_close(Store *s) {
    store_free_set(&s->train);
    store_free_set(&s->eval);
    free(s->media);
    for (int i = 0; i < s->source_count; i++) free(s->source_paths[i]);
    free(s->source_paths);
    h5_close(&s->file);
    *s = (Store){0};
}

Status store_read(Store *s, bool eval, int64_t sample, int32_t *ids, uint8_t *mask) {
    const SampleSet *set = eval ? &s->eval : &s->train;
    int64_t first = set->begins[sample], count = sample_length(set, sample);
    TRY(h5_read(&s->file, eval ? "eval/tokens" : "train/tokens", H5T_NATIVE_INT32, first, count,
                ids));
    return h5_read(&s->file, eval ? "eval/mask" : "train/mask", H5T_NATIVE_UINT8, first, count,
                   mask);
}
