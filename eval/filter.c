/* filter.c - chains of filters, and exact match. */
#include "eval/filter.h"
#include "eval/metrics.h"
#include "eval/regex.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define INVALID     "[invalid]"
#define PUNCTUATION "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"

/* ---- reading ---- */

static Status read_filter(Filter *f, Node *node) {
    static const struct {
        const char *name;
        FilterKind kind;
    } words[] = {{"strip", FILTER_STRIP},
                 {"lower", FILTER_LOWER},
                 {"upper", FILTER_UPPER},
                 {"majority", FILTER_MAJORITY}};
    const char *word;
    *f = (Filter){0};
    if (node->kind == NODE_MAP) {
        Node *first = node_find(node, "first");
        const char *pattern = NULL;
        f->kind = node_find(node, "choice") ? FILTER_CHOICE : FILTER_REGEX;
        if (first) {
            f->kind = FILTER_FIRST;
            return node_to_int(first, "first", &f->take);
        }
        TRY(node_get_text(node, f->kind == FILTER_CHOICE ? "choice" : "regex", &pattern, true));
        TRY(node_get_int(node, "take", &f->take, false));
        TRY(node_get_bool(node, "ignore_case", &f->ignore_case, false));
        TRY(node_get_bool(node, "ignore_punctuation", &f->ignore_punctuation, false));
        Regex *r;
        TRY(regex_open(&r, pattern, 0));
        regex_close(r);
        f->pattern = must_strdup(pattern);
        return OK;
    }
    TRY(node_to_text(node, "a filter", &word));
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if (!strcmp(word, words[i].name)) {
            f->kind = words[i].kind;
            return OK;
        }
    FAIL(ERR_CONFIG,
         "%s:%d: filter '%s', expected strip, lower, upper, majority, {regex: ...}, {choice: ...} "
         "or {first: N}",
         node->file, node->line, word);
}

Status filter_chain_read(FilterChain *chain, const char *name, Node *list) {
    *chain = (FilterChain){.name = must_strdup(name)};
    if (list->kind != NODE_LIST || list->count > FILTERS_MAX)
        FAIL(ERR_CONFIG, "%s:%d: '%s' is no list of up to %d filters", list->file, list->line, name,
             FILTERS_MAX);
    for (int i = 0; i < list->count; i++, chain->count++)
        TRY(read_filter(&chain->filters[i], list->items[i]));
    return OK;
}

void filter_chain_free(FilterChain *chain) {
    for (int i = 0; i < chain->count; i++) free(chain->filters[i].pattern);
    free(chain->name);
    *chain = (FilterChain){0};
}

/* ---- applying ---- */

static void set(Text *t, Slice s) {
    Text held = {0};
    text_add(&held, s.bytes, s.size);
    text_free(t);
    *t = held;
}

static Slice slice_text(const Text *t) {
    return (Slice){t->bytes, t->size};
}

/* Match number `take` (-1: the last): its whole, or its first group that is not empty. */
static bool pick_match(const Regex *r, Slice text, int64_t take, Slice *out) {
    size_t from = 0;
    Match m, chosen = {0};
    int64_t n = 0;
    bool found = false;
    for (; regex_next(r, text, &from, &m); n++)
        if (take < 0 || n == take) chosen = m, found = true;
    if (!found) return false;
    *out = chosen.whole;
    for (int i = 0; i < chosen.count; i++)
        if (chosen.groups[i].size || chosen.count == 1) {
            *out = chosen.groups[i];
            return true;
        }
    return chosen.count == 0;
}

static void apply_regex(const Filter *f, Text *t) {
    Regex *r = regex_get(f->pattern, 0);
    Slice found;
    bool any = pick_match(r, slice_text(t), f->take, &found);
    set(t, any ? slice_strip(found) : slice_of(INVALID));
    regex_close(r);
}

/* Lower case and no punctuation (any of Unicode's), where asked. */
static Text plain(const Filter *f, Slice s) {
    Text lower = {0}, out = {0};
    if (f->ignore_case)
        text_add_lower(&lower, s);
    else
        text_add(&lower, s.bytes, s.size);
    Regex *r = regex_get("\\p{P}", 0);
    if (f->ignore_punctuation)
        regex_replace(&out, r, slice_text(&lower), "");
    else
        text_add(&out, lower.bytes, lower.size);
    regex_close(r);
    text_free(&lower);
    return out;
}

static int by_size(const void *a, const void *b) {
    const Slice *x = *(Slice *const *)a, *y = *(Slice *const *)b;
    if (x->size != y->size) return x->size > y->size ? -1 : 1;
    return x < y ? -1 : x > y; /* stable */
}

/* The choice whose text stands in the response: longer texts are tried first at each place. -1:
 * none. */
static int find_choice(const Filter *f, const json_t *choices, Slice response) {
    int n = (int)json_array_size(choices), found = -1;
    Text texts[n + 1], where = plain(f, response);
    Slice slices[n + 1], *order[n + 1];
    for (int i = 0; i < n; i++) {
        texts[i] = plain(f, slice_strip(json_slice(json_array_get(choices, (size_t)i))));
        slices[i] = slice_text(&texts[i]);
        order[i] = &slices[i];
    }
    qsort(order, (size_t)n, sizeof *order, by_size);
    for (size_t at = 0; at < where.size && (found < 0 || f->take < 0);) {
        size_t step = 1;
        for (int k = 0; k < n; k++) {
            Slice *s = order[k];
            if (!s->size || s->size > where.size - at ||
                memcmp(where.bytes + at, s->bytes, s->size))
                continue;
            found = (int)(s - slices);
            step = s->size;
            break;
        }
        at += step;
    }
    /* Equal texts stand for the last of them, as in a dictionary. */
    for (int i = found + 1; found >= 0 && i < n; i++)
        if (slices[i].size == slices[found].size &&
            !memcmp(slices[i].bytes, slices[found].bytes, slices[i].size))
            found = i;
    for (int i = 0; i < n; i++) text_free(&texts[i]);
    text_free(&where);
    return found;
}

static void apply_choice(const Filter *f, Text *t, const json_t *doc) {
    const json_t *choices = json_object_get(doc, "choices");
    Regex *r = regex_get(f->pattern, 0);
    Slice found = {0};
    if (pick_match(r, slice_text(t), f->take, &found) && slice_strip(found).size) {
        set(t, slice_strip(found));
        regex_close(r);
        return;
    }
    regex_close(r);
    int choice = find_choice(f, choices, slice_text(t));
    if (choice < 0 && json_array_size(choices)) {
        char pattern[64];
        snprintf(pattern, sizeof pattern, ":[\\s]*([A-%c])",
                 (char)('A' + json_array_size(choices) - 1));
        r = regex_get(pattern, 0);
        if (pick_match(r, slice_text(t), f->take, &found)) choice = *found.bytes - 'A';
        regex_close(r);
    }
    char letter[] = {'(', (char)('A' + choice), ')', 0};
    set(t, slice_of(choice < 0 ? INVALID : letter));
}

static void apply_case(Text *t, bool upper) {
    Text out = {0};
    text_add(&out, "", 0);
    if (upper)
        text_add_upper(&out, slice_text(t));
    else
        text_add_lower(&out, slice_text(t));
    text_free(t);
    *t = out;
}

static void vote(Text *texts, int64_t *count) {
    Slice *answers = must_calloc((size_t)*count + 1, sizeof *answers);
    for (int64_t i = 0; i < *count; i++) answers[i] = slice_text(&texts[i]);
    int64_t winner = majority_vote(answers, *count);
    Text held = texts[0];
    texts[0] = texts[winner];
    texts[winner] = held;
    free(answers);
    for (; *count > 1; --*count) text_free(&texts[*count - 1]);
}

Text filter_chain_apply(const FilterChain *chain, const json_t *doc, const json_t *responses) {
    int64_t count = json_is_array(responses) ? (int64_t)json_array_size(responses) : 1;
    Text *texts = must_calloc((size_t)count + 1, sizeof *texts);
    for (int64_t i = 0; i < count; i++)
        set(&texts[i], json_slice(json_is_array(responses) ? json_array_get(responses, (size_t)i)
                                                           : responses));
    for (int k = 0; k < chain->count; k++) {
        const Filter *f = &chain->filters[k];
        if (f->kind == FILTER_MAJORITY && count) vote(texts, &count);
        for (; f->kind == FILTER_FIRST && count > f->take; count--) text_free(&texts[count - 1]);
        for (int64_t i = 0; i < count; i++) switch (f->kind) {
            case FILTER_REGEX:
                apply_regex(f, &texts[i]);
                break;
            case FILTER_CHOICE:
                apply_choice(f, &texts[i], doc);
                break;
            case FILTER_STRIP:
                set(&texts[i], slice_strip(slice_text(&texts[i])));
                break;
            case FILTER_LOWER:
            case FILTER_UPPER:
                apply_case(&texts[i], f->kind == FILTER_UPPER);
                break;
            default:
                break;
            }
    }
    Text out = texts[0];
    for (int64_t i = 1; i < count; i++) text_free(&texts[i]);
    free(texts);
    if (!out.bytes) text_add(&out, "", 0);
    return out;
}

/* ---- exact match ---- */

Status exact_match_read(ExactMatch *m, Node *map) {
    *m = (ExactMatch){0};
    if (!map || map->kind != NODE_MAP) return OK;
    TRY(node_get_bool(map, "ignore_case", &m->ignore_case, false));
    TRY(node_get_bool(map, "ignore_punctuation", &m->ignore_punctuation, false));
    Node *list = node_find(map, "ignore");
    for (int i = 0; list && i < list->count; i++) {
        const char *pattern;
        Regex *r;
        if (m->ignore_count == 6) FAIL(ERR_CONFIG, "%s:%d: too many", list->file, list->line);
        TRY(node_to_text(list->items[i], "ignore", &pattern));
        TRY(regex_open(&r, pattern, 0));
        regex_close(r);
        m->ignore[m->ignore_count++] = must_strdup(pattern);
    }
    return OK;
}

void exact_match_free(ExactMatch *m) {
    for (int i = 0; i < m->ignore_count; i++) free(m->ignore[i]);
    *m = (ExactMatch){0};
}

static Text compared(const ExactMatch *m, Slice s) {
    Text t = {0};
    set(&t, s);
    for (int i = 0; i < m->ignore_count; i++) {
        Text out = {0};
        Regex *r = regex_get(m->ignore[i], 0);
        regex_replace(&out, r, slice_text(&t), "");
        regex_close(r);
        text_free(&t);
        t = out;
    }
    if (m->ignore_case) apply_case(&t, false);
    if (m->ignore_punctuation) {
        size_t kept = 0;
        for (size_t i = 0; i < t.size; i++)
            if (!strchr(PUNCTUATION, t.bytes[i])) t.bytes[kept++] = t.bytes[i];
        t.size = kept;
    }
    return t;
}

bool exact_match(const ExactMatch *m, Slice prediction, Slice gold) {
    Text a = compared(m, prediction), b = compared(m, gold);
    bool same = a.size == b.size && !memcmp(a.bytes, b.bytes, a.size);
    text_free(&a);
    text_free(&b);
    return same;
}
