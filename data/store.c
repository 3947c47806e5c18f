/* store.c - building, checking and reading stores. */
#include "data/store.h"
#include "formats/file.h"
#include "formats/sha256.h"
#include "kernels/random.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define STORE_VERSION 2

/* A set being filled. */
typedef struct Growing {
    int32_t *tokens;
    uint8_t *mask;
    int64_t count, capacity;
    int64_t *begins;
    int32_t *sources;
    int64_t samples, sample_capacity, trained;
    int64_t *slots; /* (slot_count, 2) */
    int64_t slot_count, slot_capacity;
} Growing;

/* Media so far, found by their key. */
typedef struct Bank {
    StoredMedium *items;
    uint64_t *keys;
    int64_t count, capacity, bytes;
    int64_t *table; /* (size) item + 1 by key, 0: free; size a power of two, at most half full */
    int64_t size;
} Bank;

typedef struct Builder {
    Growing train, eval, *to;
    StoreCounts counts;
    int32_t file, line;
    Bank bank;
    H5File out;
    Status status; /* of writing media */
} Builder;

static int64_t bank_place(const Bank *b, uint64_t key) {
    int64_t at = (int64_t)(key & (uint64_t)(b->size - 1));
    while (b->table[at] && b->keys[b->table[at] - 1] != key) at = (at + 1) & (b->size - 1);
    return at;
}

static void bank_grow(Bank *b) {
    b->capacity = b->capacity ? 2 * b->capacity : 256;
    b->size = 2 * b->capacity;
    b->items = must_realloc(b->items, (size_t)b->capacity * sizeof *b->items);
    b->keys = must_realloc(b->keys, (size_t)b->capacity * sizeof *b->keys);
    free(b->table);
    b->table = must_calloc((size_t)b->size, sizeof *b->table);
    for (int64_t i = 0; i < b->count; i++) b->table[bank_place(b, b->keys[i])] = i + 1;
}

/* Where the bytes of an item go: as the model reads it, or its file, once for all of its frames. */
static const void *bytes_of(const Bank *bank, StoredMedium *m, const MediaItem *item,
                            const Original *original) {
    if (!original->bytes) {
        m->bytes = item->height ? 3 * item->height * item->width
                                : item->frames * item->feature_width * (int64_t)sizeof(float);
        return item->height ? (const void *)item->pixels : item->features;
    }
    m->bytes = (int64_t)original->size;
    m->part = original->part;
    m->parts = original->parts;
    m->kind = original->kind;
    if (!m->part) return original->bytes;
    m->offset = bank->items[bank->count - 1].offset; /* the frame before was as new as this one */
    return NULL;
}

/* The number of a medium's content, which is written when it is new. */
static int64_t bank_item(Builder *b, const MediaItem *item, const Original *original) {
    Bank *bank = &b->bank;
    if (bank->count == bank->capacity) bank_grow(bank);
    int64_t at = bank_place(bank, item->key);
    if (bank->table[at]) return bank->table[at] - 1;
    StoredMedium m = {.height = item->height,
                      .width = item->width,
                      .frames = item->frames,
                      .tokens = item->count,
                      .offset = bank->bytes};
    const void *bytes = bytes_of(bank, &m, item, original);
    if (!bank->count) b->status = h5_group(&b->out, "media");
    if (bytes && b->status == OK) b->status = h5_append(&b->out, "media/bytes", H5T_NATIVE_UINT8, bytes, m.bytes);
    bank->bytes += bytes ? m.bytes : 0;
    bank->keys[bank->count] = item->key;
    bank->items[bank->count] = m;
    bank->table[at] = ++bank->count;
    return bank->count - 1;
}

static void add_slot(Growing *g, int64_t token, int64_t item) {
    if (g->slot_count == g->slot_capacity) {
        g->slot_capacity = g->slot_capacity ? 2 * g->slot_capacity : 256;
        g->slots = must_realloc(g->slots, (size_t)g->slot_capacity * 2 * sizeof *g->slots);
    }
    g->slots[2 * g->slot_count] = token;
    g->slots[2 * g->slot_count++ + 1] = item;
}

static void add_sample(void *context, const Sample *sample) {
    Builder *b = context;
    Growing *g = b->to;
    while (g->count + sample->count > g->capacity) {
        g->capacity = g->capacity ? 2 * g->capacity : 65536;
        g->tokens = must_realloc(g->tokens, (size_t)g->capacity * sizeof *g->tokens);
        g->mask = must_realloc(g->mask, (size_t)g->capacity);
    }
    if (g->samples == g->sample_capacity) {
        g->sample_capacity = g->sample_capacity ? 2 * g->sample_capacity : 1024;
        g->begins = must_realloc(g->begins, (size_t)(g->sample_capacity + 1) * sizeof *g->begins);
        g->sources = must_realloc(g->sources, (size_t)g->sample_capacity * 2 * sizeof *g->sources);
    }
    memcpy(g->tokens + g->count, sample->ids, (size_t)sample->count * sizeof *g->tokens);
    memcpy(g->mask + g->count, sample->mask, (size_t)sample->count);
    g->begins[g->samples] = g->count;
    for (int64_t i = 0; i < sample->media_count; i++) {
        Original original = media_original(sample->originals, i);
        add_slot(g, g->count + sample->media[i].first, bank_item(b, &sample->media[i], &original));
    }
    g->sources[2 * g->samples] = b->file;
    g->sources[2 * g->samples + 1] = b->line;
    g->samples++;
    g->count += sample->count;
    g->begins[g->samples] = g->count;
    for (int64_t i = 1; i < sample->count; i++) g->trained += sample->mask[i];
    b->counts.cut += sample->cut;
}

static void growing_free(Growing *g) {
    free(g->tokens);
    free(g->mask);
    free(g->begins);
    free(g->sources);
    free(g->slots);
}

static Status convert_line(Builder *b, RowReader *reader, const char *line, size_t size,
                           Growing *to) {
    json_t *row = NULL;
    b->to = to;
    Status status = utf8_valid(line, size) ? json_read(&row, line, size, "row")
                                           : status_fail(ERR_FORMAT, "is not UTF-8");
    if (status == OK) status = row_convert(reader, row, add_sample, b);
    json_decref(row);
    return status == OK ? b->status : status;
}

/* A mapped file would be quicker to start, but a file that shrinks under us would crash: read by
 * lines. */
static Status read_file(Builder *b, RowReader *reader, const DataConfig *config, const char *path,
                        bool eval, int64_t seed, StoreProgress *progress) {
    FILE *file = fopen(path, "rb");
    if (!file) FAIL(ERR_IO, "%s: cannot be opened", path);
    fseeko(file, 0, SEEK_END);
    double total = (double)ftello(file);
    rewind(file);
    char *line = NULL, *folder = path_folder(path);
    size_t space = 0;
    int64_t rows = 0, bad = 0;
    reader->reading.folder = folder;
    Status status = OK;
    b->line = 0;
    for (ssize_t size; (size = getline(&line, &space, file)) >= 0;) {
        b->line++;
        size_t start = b->line == 1 && size >= 3 && !memcmp(line, "\xef\xbb\xbf", 3)
                           ? 3
                           : 0; /* a byte order mark */
        Slice text = slice_strip((Slice){line + start, (size_t)size - start});
        if (!text.size) continue;
        rows++;
        bool held_out =
            eval || (config->eval_share > 0 &&
                     random_uniform_double(random_key((uint64_t)seed, (uint64_t)b->file),
                                           (uint64_t)b->line) < config->eval_share);
        status = convert_line(b, reader, text.bytes, text.size, held_out ? &b->eval : &b->train);
        if (status == ERR_CONFIG || b->status != OK) break; /* not the row's fault */
        if (status != OK && !config->skip_bad) {
            status_prefix(status, "%s:%d", path, b->line);
            break;
        }
        if (status != OK && bad++ < 5) note("skipped %s:%d: %s", path, b->line, status_message());
        status = OK;
        if (progress && rows % 256 == 0)
            progress(path, rows, total > 0 ? (double)ftello(file) / total : 1);
    }
    if (status == OK && ferror(file)) status = status_fail(ERR_IO, "%s: cannot be read", path);
    if (status == OK && progress) progress(path, rows, 1);
    b->counts.rows += (double)rows;
    b->counts.bad += (double)bad;
    reader->reading.folder = NULL;
    free(folder);
    free(line);
    fclose(file);
    return status;
}

/* Everything that changes what rows become, as text: equal texts make equal samples. */
static char *settings_text(const DataConfig *c, int64_t seed) {
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

static Status write_set(H5File *f, const char *name, const Growing *g) {
    char path[64];
#define NAMED(part) (snprintf(path, sizeof path, "%s/" part, name), path)
    int64_t zero = 0;
    TRY(h5_group(f, name));
    TRY(h5_write(f, NAMED("tokens"), H5T_NATIVE_INT32, g->count, 0, true, g->tokens));
    TRY(h5_write(f, NAMED("mask"), H5T_NATIVE_UINT8, g->count, 0, true, g->mask));
    TRY(h5_write(f, NAMED("begins"), H5T_NATIVE_INT64, g->samples + 1, 0, true,
                 g->samples ? g->begins : &zero));
    TRY(h5_write(f, NAMED("sources"), H5T_NATIVE_INT32, g->samples, 2, true, g->sources));
    if (!g->slot_count) return OK;
    return h5_write(f, NAMED("slots"), H5T_NATIVE_INT64, g->slot_count, 2, true, g->slots);
}

static const char *source_at(const DataConfig *c, int i) {
    return i < c->train.count ? c->train.items[i] : c->eval.items[i - c->train.count];
}

/* All but the media's bytes, which are there. */
static Status write_store(Builder *b, const RowReader *reader, const DataConfig *config,
                          int64_t seed) {
    static const char *const names[] = {"rows", "samples", "cut",    "dropped",
                                        "bad",  "tokens",  "trained"};
    const double *counts = &b->counts.rows;
    H5File *f = &b->out;
    Status status = OK;
    char *settings = settings_text(config, seed);
    TRY_DONE(h5_write_number(f, "/", "lapidary_store", STORE_VERSION));
    TRY_DONE(h5_write_text(f, "/", "tokenizer_sha256", tokenizer_hash(reader->tokenizer)));
    TRY_DONE(h5_write_text(f, "/", "template",
                           reader->has_format ? chat_format_name(reader->format) : "none"));
    TRY_DONE(h5_write_text(f, "/", "settings", settings));
    for (int i = 0; i < 7; i++) TRY_DONE(h5_write_number(f, "/", names[i], counts[i]));
    int sources = config->train.count + config->eval.count;
    TRY_DONE(h5_write_number(f, "/", "source_count", sources));
    for (int i = 0; i < sources; i++) {
        char hash[65], name[64];
        TRY_DONE(sha256_file(hash, source_at(config, i)));
        snprintf(name, sizeof name, "source_%d_path", i);
        TRY_DONE(h5_write_text(f, "/", name, source_at(config, i)));
        snprintf(name, sizeof name, "source_%d_sha256", i);
        TRY_DONE(h5_write_text(f, "/", name, hash));
    }
    TRY_DONE(write_set(f, "train", &b->train));
    TRY_DONE(write_set(f, "eval", &b->eval));
    if (b->bank.count)
        TRY_DONE(h5_write(f, "media/items", H5T_NATIVE_INT64, b->bank.count,
                          sizeof(StoredMedium) / sizeof(int64_t), true, b->bank.items));
    status = h5_commit(f);
done:
    free(settings);
    return status;
}

Status store_build(const char *path, RowReader *reader, const DataConfig *config, int64_t seed,
                   StoreProgress *progress) {
    Builder b = {0};
    Status status = OK;
    TRY_DONE(h5_create(&b.out, path));
    for (int i = 0; i < config->train.count + config->eval.count; i++) {
        b.file = i;
        TRY_DONE(read_file(&b, reader, config, source_at(config, i), i >= config->train.count, seed,
                           progress));
    }
    b.counts.samples = (double)(b.train.samples + b.eval.samples);
    b.counts.dropped = (double)reader->dropped;
    b.counts.tokens = (double)(b.train.count + b.eval.count);
    b.counts.trained = (double)(b.train.trained + b.eval.trained);
    if (!b.train.samples)
        FAIL_DONE(
            ERR_FORMAT,
            "%s: no row gave a training sample (%.0f rows, %.0f dropped as longer than %" PRId64
            " tokens or without a trained token, %.0f bad)",
            config->train.items[0], b.counts.rows, b.counts.dropped, config->max_length,
            b.counts.bad);
    TRY_DONE(write_store(&b, reader, config, seed));
done:
    h5_close(&b.out);
    free(b.bank.items);
    free(b.bank.keys);
    free(b.bank.table);
    growing_free(&b.train);
    growing_free(&b.eval);
    return status;
}

static Status read_set(H5File *f, const char *name, SampleSet *set) {
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
    char *text = NULL, *settings = settings_text(config, seed);
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
    TRY_DONE(read_set(&s->file, "train", &s->train));
    TRY_DONE(read_set(&s->file, "eval", &s->eval));
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

void store_close(Store *s) {
    SampleSet *sets[] = {&s->train, &s->eval};
    for (int i = 0; i < 2; i++) {
        free(sets[i]->begins);
        free(sets[i]->trained);
        free(sets[i]->sources);
        free(sets[i]->slots);
        free(sets[i]->slot_begins);
    }
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
