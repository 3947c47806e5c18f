/* tokenizer.c - two hash tables (text to id, pair to merge) and a heap of merges. */
#include "data/tokenizer.h"
#include "data/json.h"
#include "formats/companion.h"
#include "formats/file.h"
#include "formats/sha256.h"

#include <stdlib.h>
#include <string.h>

#define SPACE_MARK "\xe2\x96\x81" /* U+2581 */

typedef struct Merge {
    int32_t left, right, rank, result; /* left -1: free */
} Merge;

struct Tokenizer {
    json_t *root; /* keeps the texts alive */
    Slice *text;  /* of each id; bytes NULL where there is none */
    int64_t size;
    int32_t *by_text; /* open addressing; -1 free */
    size_t text_slots;
    Merge *merges;
    size_t merge_slots;
    int32_t bytes[256];
    int32_t *added; /* ids, longest text first */
    int added_count;
    uint8_t *special;
    bool added_first[256]; /* bytes an added token can begin with */
    char hash[65];
};

static uint64_t hash_bytes(const char *bytes, size_t size) {
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < size; i++) h = (h ^ (uint8_t)bytes[i]) * 0x100000001b3u;
    return h ^ h >> 31;
}

static int32_t find_text(const Tokenizer *t, const char *bytes, size_t size) {
    for (size_t i = hash_bytes(bytes, size);; i++) {
        int32_t id = t->by_text[i & (t->text_slots - 1)];
        if (id < 0) return -1;
        if (t->text[id].size == size && !memcmp(t->text[id].bytes, bytes, size)) return id;
    }
}

static uint64_t hash_pair(int32_t left, int32_t right) {
    uint64_t h = ((uint64_t)(uint32_t)left << 32 | (uint32_t)right) * 0x9e3779b97f4a7c15u;
    return h ^ h >> 32;
}

static const Merge *find_merge(const Tokenizer *t, int32_t left, int32_t right) {
    for (uint64_t i = hash_pair(left, right);; i++) {
        const Merge *m = &t->merges[i & (t->merge_slots - 1)];
        if (m->left < 0) return NULL;
        if (m->left == left && m->right == right) return m;
    }
}

static size_t slots_for(size_t count) {
    size_t slots = 64;
    while (slots < 2 * count) slots *= 2;
    return slots;
}

static Status read_ids(Tokenizer *t, json_t *vocab, json_t *added, const char *name) {
    const char *text;
    json_t *value;
    size_t i;
    int64_t top = -1;
    json_object_foreach(vocab, text, value) {
        if (!json_is_integer(value) || json_integer_value(value) < 0 ||
            json_integer_value(value) >= 1 << 24)
            FAIL(ERR_FORMAT, "%s: the id of '%s' is no number below 2^24", name, text);
        if (json_integer_value(value) > top) top = json_integer_value(value);
    }
    json_array_foreach(added, i, value) {
        json_t *id = json_object_get(value, "id");
        if (!json_is_integer(id) || json_integer_value(id) < 0 ||
            json_integer_value(id) >= 1 << 24 ||
            !json_string_length(json_object_get(value, "content")))
            FAIL(ERR_FORMAT, "%s: added token %zu has no id or content", name, i);
        if (json_integer_value(id) > top) top = json_integer_value(id);
    }
    t->size = top + 1;
    t->text = must_calloc((size_t)t->size, sizeof *t->text);
    t->special = must_calloc((size_t)t->size, 1);
    t->text_slots = slots_for((size_t)t->size);
    t->by_text = must_malloc(t->text_slots * sizeof *t->by_text);
    memset(t->by_text, 0xff, t->text_slots * sizeof *t->by_text);
    return OK;
}

static Status place_text(Tokenizer *t, int64_t id, Slice text, const char *name) {
    if (t->text[id].bytes) {
        if (t->text[id].size == text.size && !memcmp(t->text[id].bytes, text.bytes, text.size))
            return OK;
        FAIL(ERR_FORMAT, "%s: id %d belongs to two tokens", name, (int)id);
    }
    if (find_text(t, text.bytes, text.size) >= 0)
        FAIL(ERR_FORMAT, "%s: '%s' has two ids", name, text.bytes);
    t->text[id] = text;
    size_t i = hash_bytes(text.bytes, text.size);
    while (t->by_text[i & (t->text_slots - 1)] >= 0) i++;
    t->by_text[i & (t->text_slots - 1)] = (int32_t)id;
    return OK;
}

static int longest_first(const void *a, const void *b, void *tokenizer) {
    const Tokenizer *t = tokenizer;
    size_t x = t->text[*(const int32_t *)a].size, y = t->text[*(const int32_t *)b].size;
    return x < y ? 1 : x > y ? -1 : 0;
}

static Status read_added(Tokenizer *t, json_t *added, const char *name) {
    size_t i;
    json_t *token;
    t->added = must_calloc(json_array_size(added) + 1, sizeof *t->added);
    json_array_foreach(added, i, token) {
        int64_t id = json_integer_value(json_object_get(token, "id"));
        Slice content = json_slice(json_object_get(token, "content"));
        static const char *const flags[] = {"single_word", "lstrip", "rstrip", "normalized"};
        for (size_t f = 0; f < sizeof flags / sizeof *flags; f++)
            if (json_is_true(json_object_get(token, flags[f])))
                FAIL(ERR_FORMAT, "%s: added token '%s' sets %s, expected false", name,
                     content.bytes, flags[f]);
        TRY(place_text(t, id, content, name));
        t->special[id] = json_is_true(json_object_get(token, "special"));
        t->added[t->added_count++] = (int32_t)id;
        t->added_first[(uint8_t)content.bytes[0]] = true;
    }
    qsort_r(t->added, (size_t)t->added_count, sizeof *t->added, longest_first, t);
    return OK;
}

static Status read_merges(Tokenizer *t, json_t *merges, const char *name) {
    size_t rank;
    json_t *merge;
    t->merge_slots = slots_for(json_array_size(merges));
    t->merges = must_malloc(t->merge_slots * sizeof *t->merges);
    memset(t->merges, 0xff, t->merge_slots * sizeof *t->merges);
    Text joined = {0};
    Status status = OK;
    json_array_foreach(merges, rank, merge) {
        Slice left = json_slice(json_array_get(merge, 0)),
              right = json_slice(json_array_get(merge, 1));
        if (json_is_string(merge)) { /* the older spelling: "left right" */
            Slice both = json_slice(merge);
            size_t space = slice_find(both, " ", 1);
            if (space < both.size)
                left = (Slice){both.bytes, space},
                right = (Slice){both.bytes + space + 1, both.size - space - 1};
        }
        joined.size = 0;
        text_add(&joined, left.bytes, left.size);
        text_add(&joined, right.bytes, right.size);
        int32_t a = find_text(t, left.bytes, left.size), b = find_text(t, right.bytes, right.size);
        int32_t result = find_text(t, joined.bytes, joined.size);
        if (!left.size || !right.size || a < 0 || b < 0 || result < 0)
            FAIL_DONE(ERR_FORMAT, "%s: merge %zu does not join two tokens into a token", name,
                      rank);
        uint64_t i = hash_pair(a, b);
        while (t->merges[i & (t->merge_slots - 1)].left >= 0 &&
               !(t->merges[i & (t->merge_slots - 1)].left == a &&
                 t->merges[i & (t->merge_slots - 1)].right == b))
            i++;
        Merge *m = &t->merges[i & (t->merge_slots - 1)];
        if (m->left < 0) *m = (Merge){a, b, (int32_t)rank, result};
    }
done:
    text_free(&joined);
    return status;
}

static bool is_replacement(json_t *node, const char *pattern, const char *content) {
    return slice_is(json_slice(json_object_get(node, "type")), "Replace") &&
           slice_is(json_slice(json_object_get(json_object_get(node, "pattern"), "String")),
                    pattern) &&
           slice_is(json_slice(json_object_get(node, "content")), content);
}

static Status check_structure(json_t *root, const char *name) {
    json_t *model = json_object_get(root, "model");
    if (!slice_is(json_slice(json_object_get(model, "type")), "BPE") ||
        !json_is_true(json_object_get(model, "byte_fallback")))
        FAIL(ERR_FORMAT, "%s: the model is not a BPE with byte fallback", name);
    if (!is_replacement(json_object_get(root, "normalizer"), " ", SPACE_MARK))
        FAIL(ERR_FORMAT, "%s: the normalizer does not just replace spaces by U+2581", name);
    static const char *const neutral[] = {"continuing_subword_prefix", "end_of_word_suffix",
                                          "dropout"};
    for (size_t i = 0; i < sizeof neutral / sizeof *neutral; i++)
        if (json_truth(json_object_get(model, neutral[i])))
            FAIL(ERR_FORMAT, "%s: the model sets %s", name, neutral[i]);
    if (!json_is_object(json_object_get(model, "vocab")) ||
        !json_is_array(json_object_get(model, "merges")))
        FAIL(ERR_FORMAT, "%s: vocab or merges are missing", name);
    return OK;
}

static Status read_all(Tokenizer *t, const char *name) {
    TRY(check_structure(t->root, name));
    json_t *model = json_object_get(t->root, "model"), *vocab = json_object_get(model, "vocab");
    json_t *added = json_object_get(t->root, "added_tokens");
    const char *text;
    json_t *id;
    TRY(read_ids(t, vocab, added, name));
    json_object_foreach(vocab, text, id)
        TRY(place_text(t, json_integer_value(id), slice_of(text), name));
    TRY(read_added(t, added, name));
    TRY(read_merges(t, json_object_get(model, "merges"), name));
    for (int b = 0; b < 256; b++) {
        char token[8];
        snprintf(token, sizeof token, "<0x%02X>", b);
        t->bytes[b] = find_text(t, token, 6);
        if (t->bytes[b] < 0) FAIL(ERR_FORMAT, "%s: the byte token %s is missing", name, token);
    }
    return OK;
}

Status tokenizer_parse(Tokenizer **out, const char *json, size_t size, const char *name) {
    Tokenizer *t = must_calloc(1, sizeof *t);
    json_error_t error;
    t->root = json_loadb(json, size, 0, &error);
    Status status =
        t->root ? read_all(t, name)
                : status_fail(ERR_FORMAT, "%s:%d: no JSON: %s", name, error.line, error.text);
    if (status != OK) {
        tokenizer_free(t);
        return status;
    }
    sha256_text(t->hash, json, size);
    *out = t;
    return OK;
}

Status tokenizer_load(Tokenizer **t, const char *dir) {
    char *path = companion_path(dir, "tokenizer.json"), *bytes = NULL;
    size_t size;
    Status status = companion_read(&bytes, &size, dir, "tokenizer.json");
    if (status == OK) status = tokenizer_parse(t, bytes, size, path);
    free(bytes);
    free(path);
    return status;
}

void tokenizer_free(Tokenizer *t) {
    if (!t) return;
    json_decref(t->root);
    free(t->text);
    free(t->special);
    free(t->by_text);
    free(t->merges);
    free(t->added);
    free(t);
}

int64_t tokenizer_size(const Tokenizer *t) {
    return t->size;
}
const char *tokenizer_hash(const Tokenizer *t) {
    return t->hash;
}
int32_t tokenizer_find(const Tokenizer *t, const char *text) {
    return find_text(t, text, strlen(text));
}
bool tokenizer_is_special(const Tokenizer *t, int32_t id) {
    return id >= 0 && id < t->size && t->special[id];
}

void tokens_add(Tokens *tokens, int32_t id) {
    if (tokens->count == tokens->capacity) {
        tokens->capacity = tokens->capacity ? 2 * tokens->capacity : 64;
        tokens->ids = must_realloc(tokens->ids, (size_t)tokens->capacity * sizeof *tokens->ids);
        if (tokens->ends)
            tokens->ends =
                must_realloc(tokens->ends, (size_t)tokens->capacity * sizeof *tokens->ends);
    }
    tokens->ids[tokens->count++] = id;
}

static void add_token(Tokens *tokens, int32_t id, bool ends, size_t end) {
    if (ends && !tokens->ends)
        tokens->ends =
            must_malloc((size_t)(tokens->capacity ? tokens->capacity : 64) * sizeof *tokens->ends);
    tokens_add(tokens, id);
    if (ends) tokens->ends[tokens->count - 1] = (uint32_t)end;
}

void tokens_free(Tokens *tokens) {
    free(tokens->ids);
    free(tokens->ends);
    *tokens = (Tokens){0};
}

/* A symbol of the word being merged; id -1: merged away. */
typedef struct Symbol {
    int32_t id, previous, next;
    uint32_t end;
} Symbol;

typedef struct Candidate {
    int32_t rank, place, left, right;
} Candidate;

typedef struct Heap {
    Candidate *items;
    size_t count, capacity;
} Heap;

static bool before(const Candidate *a, const Candidate *b) {
    return a->rank < b->rank || (a->rank == b->rank && a->place < b->place);
}

static void heap_push(Heap *h, Candidate c) {
    if (h->count == h->capacity) {
        h->capacity = h->capacity ? 2 * h->capacity : 256;
        h->items = must_realloc(h->items, h->capacity * sizeof *h->items);
    }
    size_t i = h->count++;
    for (; i && before(&c, &h->items[(i - 1) / 2]); i = (i - 1) / 2)
        h->items[i] = h->items[(i - 1) / 2];
    h->items[i] = c;
}

static Candidate heap_pop(Heap *h) {
    Candidate top = h->items[0], last = h->items[--h->count];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < h->count; i = child) {
        if (child + 1 < h->count && before(&h->items[child + 1], &h->items[child])) child++;
        if (!before(&h->items[child], &last)) break;
        h->items[i] = h->items[child];
    }
    h->items[i] = last;
    return top;
}

static void consider(const Tokenizer *t, Heap *heap, const Symbol *symbols, int32_t left) {
    int32_t right = left < 0 ? -1 : symbols[left].next;
    if (right < 0) return;
    const Merge *m = find_merge(t, symbols[left].id, symbols[right].id);
    if (m) heap_push(heap, (Candidate){m->rank, left, symbols[left].id, symbols[right].id});
}

/* The word text[begin .. end), with no added token in it. */
static void encode_word(const Tokenizer *t, Tokens *out, const char *text, size_t begin, size_t end,
                        bool ends) {
    Symbol *symbols = must_malloc((end - begin) * sizeof *symbols);
    int32_t count = 0;
    for (size_t i = begin; i < end;) {
        uint32_t point;
        int step = utf8_next(text + i, end - i, &point);
        if (!step) step = 1; /* the caller promised UTF-8; a stray byte is still a byte token */
        int32_t id =
            text[i] == ' ' ? find_text(t, SPACE_MARK, 3) : find_text(t, text + i, (size_t)step);
        for (int b = 0; b < (id < 0 ? step : 1); b++, count++)
            symbols[count] =
                (Symbol){id < 0 ? t->bytes[(uint8_t)text[i + (size_t)b]] : id, count - 1, count + 1,
                         (uint32_t)(i + (size_t)(id < 0 ? b + 1 : step))};
        i += (size_t)step;
    }
    if (count) symbols[count - 1].next = -1;
    for (int32_t i = 0; i < count; i++)
        symbols[i].previous = i - 1, symbols[i].next = i + 1 < count ? i + 1 : -1;
    Heap heap = {0};
    for (int32_t i = 0; i + 1 < count; i++) consider(t, &heap, symbols, i);
    while (heap.count) {
        Candidate c = heap_pop(&heap);
        Symbol *left = &symbols[c.place];
        if (left->id != c.left || left->next < 0 || symbols[left->next].id != c.right)
            continue; /* stale */
        Symbol *right = &symbols[left->next];
        left->id = find_merge(t, c.left, c.right)->result;
        left->end = right->end;
        left->next = right->next;
        right->id = -1;
        if (left->next >= 0) symbols[left->next].previous = c.place;
        consider(t, &heap, symbols, c.place);
        consider(t, &heap, symbols, left->previous);
    }
    for (int32_t i = 0; count && i >= 0; i = symbols[i].next)
        add_token(out, symbols[i].id, ends, symbols[i].end);
    free(heap.items);
    free(symbols);
}

/* The longest added token at text[i], or -1. */
static int32_t added_at(const Tokenizer *t, const char *text, size_t size, size_t i) {
    if (!t->added_first[(uint8_t)text[i]]) return -1;
    for (int a = 0; a < t->added_count; a++) {
        Slice token = t->text[t->added[a]];
        if (token.size <= size - i && !memcmp(token.bytes, text + i, token.size))
            return t->added[a];
    }
    return -1;
}

void tokenizer_encode(const Tokenizer *t, Tokens *out, const char *text, size_t size,
                      const Range *literal, int literals, bool ends) {
    size_t word = 0;
    int range = 0;
    for (size_t i = 0; i < size;) {
        while (range < literals && literal[range].end <= i) range++;
        bool inside = range < literals && literal[range].begin <= i;
        int32_t id = inside ? -1 : added_at(t, text, size, i);
        if (id < 0) {
            i++;
            continue;
        }
        if (i > word) encode_word(t, out, text, word, i, ends);
        word = i += t->text[id].size;
        add_token(out, id, ends, i);
    }
    if (size > word) encode_word(t, out, text, word, size, ends);
}

/* The byte a <0xNN> token stands for, or -1. */
static int byte_of(const Tokenizer *t, int32_t id) {
    Slice s = t->text[id];
    if (s.size != 6 || memcmp(s.bytes, "<0x", 3) || s.bytes[5] != '>') return -1;
    int value = (int)strtol((char[]){s.bytes[3], s.bytes[4], 0}, NULL, 16);
    return t->bytes[value] == id ? value : -1;
}

bool tokenizer_is_byte(const Tokenizer *t, int32_t id) {
    return id >= 0 && id < t->size && t->text[id].bytes && !t->special[id] && byte_of(t, id) >= 0;
}

int tokenizer_byte(const Tokenizer *t, int32_t id) {
    return tokenizer_is_byte(t, id) ? byte_of(t, id) : -1;
}

int tokenizer_first_byte(const Tokenizer *t, int32_t id) {
    if (id < 0 || id >= t->size || t->special[id] || !t->text[id].size) return -1;
    if (byte_of(t, id) >= 0) return byte_of(t, id);
    bool space = t->text[id].size >= 3 && !memcmp(t->text[id].bytes, SPACE_MARK, 3);
    return space ? ' ' : (uint8_t)t->text[id].bytes[0];
}

static void end_run(Text *out, Text *run) {
    if (run->size && utf8_valid(run->bytes, run->size))
        text_add(out, run->bytes, run->size);
    else
        for (size_t i = 0; i < run->size; i++) text_adds(out, "\xef\xbf\xbd");
    run->size = 0;
}

void tokenizer_decode(const Tokenizer *t, Text *out, const int32_t *ids, int64_t count,
                      bool skip_special) {
    Text run = {0};
    text_add(out, "", 0);
    for (int64_t i = 0; i < count; i++) {
        int32_t id = ids[i];
        if (id < 0 || id >= t->size || !t->text[id].bytes) continue;
        if (skip_special && t->special[id]) continue;
        int byte = t->special[id] ? -1 : byte_of(t, id);
        if (byte >= 0) {
            text_add(&run, (char[]){(char)byte}, 1);
            continue;
        }
        end_run(out, &run);
        Slice s = t->text[id];
        if (t->special[id]) {
            text_add(out, s.bytes, s.size);
            continue;
        }
        for (size_t from = 0; from < s.size;) {
            size_t mark = slice_find(s, SPACE_MARK, from);
            text_add(out, s.bytes + from, mark - from);
            if (mark < s.size) text_adds(out, " ");
            from = mark + 3;
        }
    }
    end_run(out, &run);
    text_free(&run);
}
