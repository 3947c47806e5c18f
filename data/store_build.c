/* store_build.c - building stores, alone or by several ranks. */
#include "data/store_layout.h"
#include "formats/file.h"
#include "formats/sha256.h"
#include "kernels/random.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

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
    Status status;   /* of writing media */
    int rank, ranks; /* whose rows are read: in turns of TURN */
} Builder;

/* Rows that a rank takes in its turn. */
#define TURN 64

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

/* The number of the medium of that key: as it is known, or `m` new, its bytes written. `bytes`
 * NULL: they are those of the item before. */
static int64_t bank_add(Builder *b, uint64_t key, StoredMedium m, const void *bytes) {
    Bank *bank = &b->bank;
    int64_t at = bank_place(bank, key);
    if (!bank->count) b->status = h5_group(&b->out, "media");
    if (bytes && b->status == OK)
        b->status = h5_append(&b->out, "media/bytes", H5T_NATIVE_UINT8, bytes, m.bytes);
    bank->bytes += bytes ? m.bytes : 0;
    bank->keys[bank->count] = key;
    bank->items[bank->count] = m;
    bank->table[at] = ++bank->count;
    return bank->count - 1;
}

/* The number of what has that key, or -1. */
static int64_t bank_find(Bank *bank, uint64_t key) {
    if (bank->count == bank->capacity) bank_grow(bank);
    return bank->table[bank_place(bank, key)] - 1;
}

/* The number of a medium's content, which is written when it is new. */
static int64_t bank_item(Builder *b, const MediaItem *item, const Original *original) {
    int64_t number = bank_find(&b->bank, item->key);
    if (number >= 0) return number;
    StoredMedium m = {.height = item->height,
                      .width = item->width,
                      .frames = item->frames,
                      .tokens = item->count,
                      .offset = b->bank.bytes};
    const void *bytes = bytes_of(&b->bank, &m, item, original);
    return bank_add(b, item->key, m, bytes);
}

static void add_slot(Growing *g, int64_t token, int64_t item) {
    if (g->slot_count == g->slot_capacity) {
        g->slot_capacity = g->slot_capacity ? 2 * g->slot_capacity : 256;
        g->slots = must_realloc(g->slots, (size_t)g->slot_capacity * 2 * sizeof *g->slots);
    }
    g->slots[2 * g->slot_count] = token;
    g->slots[2 * g->slot_count++ + 1] = item;
}

/* Adds tokens as a sample of row `line` of file `file`, and returns where they begin. */
static int64_t add_tokens(Growing *g, const int32_t *ids, const uint8_t *mask, int64_t n, int file,
                          int line) {
    int64_t at = g->count;
    while (g->count + n > g->capacity) {
        g->capacity = g->capacity ? 2 * g->capacity : 65536;
        g->tokens = must_realloc(g->tokens, (size_t)g->capacity * sizeof *g->tokens);
        g->mask = must_realloc(g->mask, (size_t)g->capacity);
    }
    if (g->samples == g->sample_capacity) {
        g->sample_capacity = g->sample_capacity ? 2 * g->sample_capacity : 1024;
        g->begins = must_realloc(g->begins, (size_t)(g->sample_capacity + 1) * sizeof *g->begins);
        g->sources = must_realloc(g->sources, (size_t)g->sample_capacity * 2 * sizeof *g->sources);
    }
    memcpy(g->tokens + at, ids, (size_t)n * sizeof *g->tokens);
    memcpy(g->mask + at, mask, (size_t)n);
    g->begins[g->samples] = at;
    g->sources[2 * g->samples] = file;
    g->sources[2 * g->samples + 1] = line;
    g->samples++;
    g->count += n;
    g->begins[g->samples] = g->count;
    for (int64_t i = 1; i < n; i++) g->trained += mask[i];
    return at;
}

static void add_sample(void *context, const Sample *sample) {
    Builder *b = context;
    int64_t at = add_tokens(b->to, sample->ids, sample->mask, sample->count, b->file, b->line);
    for (int64_t i = 0; i < sample->media_count; i++) {
        Original original = media_original(sample->originals, i);
        add_slot(b->to, at + sample->media[i].first, bank_item(b, &sample->media[i], &original));
    }
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
    int64_t rows = 0, bad = 0, seen = 0;
    reader->reading.folder = folder;
    Status status = OK;
    b->line = 0;
    for (ssize_t size; (size = getline(&line, &space, file)) >= 0;) {
        b->line++;
        size_t start = b->line == 1 && size >= 3 && !memcmp(line, "\xef\xbb\xbf", 3)
                           ? 3
                           : 0; /* a byte order mark */
        Slice text = slice_strip((Slice){line + start, (size_t)size - start});
        if (!text.size || (seen++ / TURN % b->ranks != b->rank)) continue;
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

static Status write_media(Builder *b) {
    if (!b->bank.count) return OK;
    return h5_write(&b->out, "media/items", H5T_NATIVE_INT64, b->bank.count,
                    sizeof(StoredMedium) / sizeof(int64_t), true, b->bank.items);
}

static const char *const count_names[] = {"rows", "samples", "cut",    "dropped",
                                          "bad",  "tokens",  "trained"};
#define COUNTS 7

static Status write_counts(Builder *b) {
    const double *counts = &b->counts.rows;
    for (int i = 0; i < COUNTS; i++) TRY(h5_write_number(&b->out, "/", count_names[i], counts[i]));
    return OK;
}

/* All but the media's bytes, which are there. */
static Status write_store(Builder *b, const RowReader *reader, const DataConfig *config,
                          int64_t seed) {
    H5File *f = &b->out;
    Status status = OK;
    char *settings = store_settings(config, seed);
    TRY_DONE(h5_write_number(f, "/", "lapidary_store", STORE_VERSION));
    TRY_DONE(h5_write_text(f, "/", "tokenizer_sha256", tokenizer_hash(reader->tokenizer)));
    TRY_DONE(h5_write_text(f, "/", "template",
                           reader->has_format ? chat_format_name(reader->format) : "none"));
    TRY_DONE(h5_write_text(f, "/", "settings", settings));
    TRY_DONE(write_counts(b));
    int sources = config->train.count + config->eval.count;
    TRY_DONE(h5_write_number(f, "/", "source_count", sources));
    for (int i = 0; i < sources; i++) {
        char hash[65], name[64];
        TRY_DONE(sha256_file(hash, store_source_at(config, i)));
        snprintf(name, sizeof name, "source_%d_path", i);
        TRY_DONE(h5_write_text(f, "/", name, store_source_at(config, i)));
        snprintf(name, sizeof name, "source_%d_sha256", i);
        TRY_DONE(h5_write_text(f, "/", name, hash));
    }
    TRY_DONE(write_set(f, "train", &b->train));
    TRY_DONE(write_set(f, "eval", &b->eval));
    TRY_DONE(write_media(b));
    status = h5_commit(f);
done:
    free(settings);
    return status;
}

/* ---- by several ranks ---- */

/* A rank's rows, without what says where they came from, but with the keys of media. */
static Status write_part(Builder *b) {
    TRY(write_counts(b));
    TRY(write_set(&b->out, "train", &b->train));
    TRY(write_set(&b->out, "eval", &b->eval));
    TRY(write_media(b));
    if (b->bank.count)
        TRY(h5_write(&b->out, "media/keys", H5T_NATIVE_UINT64, b->bank.count, 0, true,
                     b->bank.keys));
    return h5_commit(&b->out);
}

/* The samples of a part, and how far they have been taken. */
typedef struct PartSet {
    SampleSet set;
    int64_t next, next_slot;
} PartSet;

typedef struct Part {
    H5File file;
    PartSet sets[2]; /* train, eval */
    StoredMedium *media;
    uint64_t *keys;
    int64_t *numbers; /* of its media in the whole; -1: not there yet */
    int64_t media_count;
} Part;

static Status open_part(Part *p, const char *path, StoreCounts *counts) {
    static const char *const names[] = {"train", "eval"};
    double *sums = &counts->rows;
    char name[16];
    TRY(h5_open(&p->file, path));
    for (int i = 0; i < COUNTS; i++) {
        double value;
        TRY(h5_read_number(&p->file, "/", count_names[i], &value));
        sums[i] += value;
    }
    for (int i = 0; i < 2; i++) {
        SampleSet *set = &p->sets[i].set;
        TRY(store_read_set(&p->file, names[i], set));
        snprintf(name, sizeof name, "%s/slots", names[i]);
        if (!h5_has(&p->file, name)) continue;
        TRY(h5_count(&p->file, name, &set->slot_count));
        set->slots = must_calloc((size_t)set->slot_count + 1, sizeof *set->slots);
        TRY(h5_read(&p->file, name, H5T_NATIVE_INT64, 0, set->slot_count, set->slots));
        set->slot_count /= 2;
    }
    if (!h5_has(&p->file, "media/keys")) return OK;
    TRY(h5_count(&p->file, "media/keys", &p->media_count));
    size_t n = (size_t)p->media_count;
    p->media = must_calloc(n, sizeof *p->media);
    p->keys = must_calloc(n, sizeof *p->keys);
    p->numbers = must_malloc(n * sizeof *p->numbers);
    memset(p->numbers, -1, n * sizeof *p->numbers);
    TRY(h5_read(&p->file, "media/keys", H5T_NATIVE_UINT64, 0, p->media_count, p->keys));
    return h5_read(&p->file, "media/items", H5T_NATIVE_INT64, 0,
                   p->media_count * (int64_t)(sizeof *p->media / sizeof(int64_t)), p->media);
}

static void close_part(Part *p) {
    h5_close(&p->file);
    store_free_set(&p->sets[0].set);
    store_free_set(&p->sets[1].set);
    free(p->media);
    free(p->keys);
    free(p->numbers);
}

/* A part's medium in the whole. */
static Status take_medium(Builder *b, Part *p, int64_t item, int64_t *number) {
    StoredMedium m = p->media[item];
    uint8_t *bytes = NULL;
    Status status = OK;
    *number = p->numbers[item];
    if (*number < 0) *number = bank_find(&b->bank, p->keys[item]);
    if (*number < 0) {
        if (m.part) { /* a later frame: the file came with the first */
            m.offset = b->bank.items[b->bank.count - 1].offset;
        } else {
            bytes = must_malloc((size_t)m.bytes + 1);
            status = h5_read(&p->file, "media/bytes", H5T_NATIVE_UINT8, m.offset, m.bytes, bytes);
            m.offset = b->bank.bytes;
        }
        if (status == OK) *number = bank_add(b, p->keys[item], m, bytes);
        free(bytes);
        TRY(status);
        TRY(b->status);
    }
    p->numbers[item] = *number;
    return OK;
}

/* The next sample of a set of a part. */
static Status take_sample(Builder *b, Part *p, int which, int32_t *ids, uint8_t *mask) {
    PartSet *from = &p->sets[which];
    const SampleSet *set = &from->set;
    int64_t first = set->begins[from->next], end = set->begins[from->next + 1], number;
    const int32_t *source = set->sources + 2 * from->next++;
    Growing *to = which ? &b->eval : &b->train;
    TRY(h5_read(&p->file, which ? "eval/tokens" : "train/tokens", H5T_NATIVE_INT32, first,
                end - first, ids));
    TRY(h5_read(&p->file, which ? "eval/mask" : "train/mask", H5T_NATIVE_UINT8, first, end - first,
                mask));
    int64_t at = add_tokens(to, ids, mask, end - first, source[0], source[1]);
    for (; from->next_slot < set->slot_count && set->slots[2 * from->next_slot] < end;
         from->next_slot++) {
        const int64_t *slot = set->slots + 2 * from->next_slot;
        TRY(take_medium(b, p, slot[1], &number));
        add_slot(to, at + slot[0] - first, number);
    }
    return OK;
}

/* Which part's set has the sample of the earliest row; false when all are taken. */
static bool earliest(const Part *parts, int count, int *part, int *which) {
    const int32_t *best = NULL;
    for (int i = 0; i < 2 * count; i++) {
        const PartSet *set = &parts[i / 2].sets[i % 2];
        const int32_t *source = set->set.sources + 2 * set->next;
        if (set->next == set->set.count) continue;
        if (best && (source[0] > best[0] || (source[0] == best[0] && source[1] >= best[1])))
            continue;
        best = source;
        *part = i / 2;
        *which = i % 2;
    }
    return best != NULL;
}

/* All parts into one, in the order of their rows. */
static Status join_parts(Builder *b, const char *path, int count, int64_t longest) {
    Part *parts = must_calloc((size_t)count, sizeof *parts);
    int32_t *ids = must_malloc(((size_t)longest + 1) * sizeof *ids);
    uint8_t *mask = must_malloc((size_t)longest + 1);
    int part = 0, which = 0;
    Status status = OK;
    for (int i = 0; i < count; i++) {
        char *name = must_format("%s.part-%d", path, i);
        status = open_part(&parts[i], name, &b->counts);
        free(name);
        if (status != OK) goto done;
    }
    while (earliest(parts, count, &part, &which))
        TRY_DONE(take_sample(b, &parts[part], which, ids, mask));
done:
    for (int i = 0; i < count; i++) {
        char *name = must_format("%s.part-%d", path, i);
        close_part(&parts[i]);
        tree_remove(name);
        free(name);
    }
    free(parts), free(ids), free(mask);
    return status;
}

static void builder_free(Builder *b) {
    h5_close(&b->out);
    free(b->bank.items);
    free(b->bank.keys);
    free(b->bank.table);
    growing_free(&b->train);
    growing_free(&b->eval);
}

/* This rank's rows of all files. */
static Status read_rows(Builder *b, RowReader *reader, const DataConfig *config, int64_t seed,
                        StoreProgress *progress) {
    for (int i = 0; i < config->train.count + config->eval.count; i++) {
        b->file = i;
        TRY(read_file(b, reader, config, store_source_at(config, i), i >= config->train.count, seed,
                      progress));
    }
    b->counts.samples = (double)(b->train.samples + b->eval.samples);
    b->counts.dropped = (double)reader->dropped;
    b->counts.tokens = (double)(b->train.count + b->eval.count);
    b->counts.trained = (double)(b->train.trained + b->eval.trained);
    return OK;
}

static Status build_part(const char *path, RowReader *reader, const DataConfig *config,
                         int64_t seed, const Comm *comm, StoreProgress *progress) {
    Builder b = {.rank = comm->rank, .ranks = comm->size};
    char *name = must_format("%s.part-%d", path, comm->rank);
    Status status = OK;
    TRY_DONE(h5_create(&b.out, name));
    TRY_DONE(read_rows(&b, reader, config, seed, progress));
    status = write_part(&b);
done:
    builder_free(&b);
    free(name);
    return status;
}

Status store_build(const char *path, RowReader *reader, const DataConfig *config, int64_t seed,
                   const Comm *comm, StoreProgress *progress) {
    Builder b = {.ranks = 1};
    bool many = !comm_is_alone(comm);
    Status status = OK;
    if (many) {
        TRY(build_part(path, reader, config, seed, comm, progress));
        comm_barrier(comm);
    }
    if (many && comm->rank) {
        comm_barrier(comm); /* until the first rank has joined them */
        return OK;
    }
    TRY_DONE(h5_create(&b.out, path));
    TRY_DONE(many ? join_parts(&b, path, comm->size, config->max_length)
                  : read_rows(&b, reader, config, seed, progress));
    if (!b.train.samples)
        FAIL_DONE(
            ERR_FORMAT,
            "%s: no row gave a training sample (%.0f rows, %.0f dropped as longer than %" PRId64
            " tokens or without a trained token, %.0f bad)",
            config->train.items[0], b.counts.rows, b.counts.dropped, config->max_length,
            b.counts.bad);
    TRY_DONE(write_store(&b, reader, config, seed));
    if (many) comm_barrier(comm);
done:
    builder_free(&b);
    return status;
}
