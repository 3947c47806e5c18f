/* grammar.c - rules, and the walk. */
#include "infer/grammar.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define DEPTH_MAX  400 /* of a stack: what would be nested deeper may not come */
#define STACKS_MAX 4096

int32_t grammar_rule(Grammar *g) {
    g->rules = must_realloc(g->rules, (size_t)(g->rule_count + 1) * sizeof *g->rules);
    g->rules[g->rule_count] = (GrammarRule){0};
    return g->rule_count++;
}

static void add_element(Grammar *g, Element e) {
    if (g->element_count == g->element_capacity) {
        g->element_capacity = g->element_capacity ? 2 * g->element_capacity : 256;
        g->elements = must_realloc(g->elements, (size_t)g->element_capacity * sizeof *g->elements);
    }
    g->elements[g->element_count++] = e;
}

void grammar_alternative(Grammar *g, int32_t rule, const Element *elements, int count) {
    GrammarRule *r = &g->rules[rule];
    r->starts = must_realloc(r->starts, (size_t)(r->count + 1) * sizeof *r->starts);
    r->starts[r->count++] = g->element_count;
    for (int i = 0; i < count; i++) add_element(g, elements[i]);
    add_element(g, (Element){.kind = ELEMENT_END});
}

/* Which rules fit an empty text: from those with an empty alternative up. */
static void find_empty(const Grammar *g, bool *empty) {
    for (bool more = true; more;) {
        more = false;
        for (int r = 0; r < g->rule_count; r++)
            for (int i = 0; i < g->rules[r].count && !empty[r]; i++) {
                const Element *e = &g->elements[g->rules[r].starts[i]];
                while (e->kind == ELEMENT_RULE && empty[e->value]) e++;
                if (e->kind == ELEMENT_END) more = empty[r] = true;
            }
    }
}

/* Whether a rule can begin with itself. state: 1 on the way, 2 seen. */
static bool begins_with_itself(const Grammar *g, const bool *empty, uint8_t *state, int32_t rule) {
    if (state[rule]) return state[rule] == 1;
    state[rule] = 1;
    for (int i = 0; i < g->rules[rule].count; i++)
        for (const Element *e = &g->elements[g->rules[rule].starts[i]]; e->kind == ELEMENT_RULE;
             e++) {
            if (begins_with_itself(g, empty, state, e->value)) return true;
            if (!empty[e->value]) break;
        }
    state[rule] = 2;
    return false;
}

Status grammar_finish(Grammar *g, int32_t root) {
    bool *empty = must_calloc((size_t)g->rule_count, sizeof *empty), bad = false;
    uint8_t *state = must_calloc((size_t)g->rule_count, sizeof *state);
    g->root = root;
    find_empty(g, empty);
    for (int r = 0; r < g->rule_count; r++) bad |= begins_with_itself(g, empty, state, r);
    free(empty);
    free(state);
    if (bad) FAIL(ERR_CONFIG, "the schema refers to itself with nothing between");
    return OK;
}

void grammar_free(Grammar *g) {
    if (!g) return;
    for (int i = 0; i < g->rule_count; i++) free(g->rules[i].starts);
    free(g->rules);
    free(g->elements);
    free(g);
}

/* ---- the walk ---- */

/* Adds a stack (places, the top last) with its rules opened until a symbol is on top. */
static void add_stack(const Grammar *g, GrammarState *s, int32_t *stack, int depth) {
    while (depth && g->elements[stack[depth - 1]].kind == ELEMENT_END)
        depth--; /* cannot stand there */
    if (depth && g->elements[stack[depth - 1]].kind == ELEMENT_RULE) {
        int32_t at = stack[depth - 1];
        const GrammarRule *r = &g->rules[g->elements[at].value];
        bool last = g->elements[at + 1].kind == ELEMENT_END;
        int below = last ? depth - 1 : depth;
        if (below + 1 >= DEPTH_MAX) return;
        int32_t held = at;
        if (!last) stack[depth - 1] = at + 1;
        for (int i = 0; i < r->count; i++) {
            int32_t copy[DEPTH_MAX];
            memcpy(copy, stack, (size_t)below * sizeof *copy);
            copy[below] = r->starts[i];
            add_stack(g, s, copy, below + (g->elements[r->starts[i]].kind != ELEMENT_END));
        }
        stack[depth - 1] = held;
        return;
    }
    if (s->stacks >= STACKS_MAX) return;
    for (int at = 0; at < s->size; at += s->places[at] + 1)
        if (s->places[at] == depth &&
            !memcmp(s->places + at + 1, stack, (size_t)depth * sizeof *stack))
            return;
    if (s->size + depth + 1 > s->capacity) {
        s->capacity = 2 * (s->size + depth + 1);
        s->places = must_realloc(s->places, (size_t)s->capacity * sizeof *s->places);
    }
    s->places[s->size] = depth;
    memcpy(s->places + s->size + 1, stack, (size_t)depth * sizeof *stack);
    s->size += depth + 1;
    s->stacks++;
}

void grammar_begin(const Grammar *g, GrammarState *s) {
    s->size = s->stacks = 0;
    const GrammarRule *r = &g->rules[g->root];
    for (int i = 0; i < r->count; i++) {
        int32_t stack[DEPTH_MAX] = {r->starts[i]};
        add_stack(g, s, stack, g->elements[r->starts[i]].kind != ELEMENT_END);
    }
}

void grammar_end(GrammarState *s) {
    free(s->places);
    *s = (GrammarState){0};
}

bool grammar_complete(const GrammarState *s) {
    for (int at = 0; at < s->size; at += s->places[at] + 1)
        if (!s->places[at]) return true;
    return false;
}

static bool matches(const Element *e, int byte, int32_t token) {
    return byte >= 0 ? e->kind == ELEMENT_BYTES && (e->bytes[byte >> 5] >> (byte & 31) & 1)
                     : e->kind == ELEMENT_TOKEN && e->value == token;
}

static void swap_states(GrammarState *a, GrammarState *b) {
    GrammarState held = *a;
    *a = *b;
    *b = held;
}

/* One symbol further: a byte, or with byte -1 a special token. */
static void advance(const Grammar *g, GrammarState *to, const GrammarState *from, int byte,
                    int32_t token) {
    to->size = to->stacks = 0;
    for (int at = 0; at < from->size; at += from->places[at] + 1) {
        int depth = from->places[at];
        const int32_t *stack = from->places + at + 1;
        if (!depth || !matches(&g->elements[stack[depth - 1]], byte, token)) continue;
        int32_t copy[DEPTH_MAX];
        memcpy(copy, stack, (size_t)depth * sizeof *copy);
        bool last = g->elements[stack[depth - 1] + 1].kind == ELEMENT_END;
        copy[depth - 1]++;
        add_stack(g, to, copy, last ? depth - 1 : depth);
    }
}

static bool walk_token(const Grammar *g, GrammarState *s, GrammarState *spare, const Tokenizer *t,
                       int32_t id) {
    Text text = {0};
    bool special = tokenizer_is_special(t, id);
    if (special) {
        advance(g, spare, s, -1, id);
        swap_states(s, spare);
        return s->stacks > 0;
    }
    if (tokenizer_is_byte(t, id)) {
        int value = tokenizer_byte(t, id);
        text_add(&text, (char[]){(char)value}, 1);
    } else {
        tokenizer_decode(t, &text, &id, 1, false);
    }
    bool good = text.size > 0;
    for (size_t i = 0; i < text.size && good; i++) {
        advance(g, spare, s, (uint8_t)text.bytes[i], 0);
        swap_states(s, spare);
        good = s->stacks > 0;
    }
    text_free(&text);
    return good;
}

static void copy_state(GrammarState *to, const GrammarState *from) {
    if (to->capacity < from->size) {
        to->capacity = from->size;
        to->places = must_realloc(to->places, (size_t)to->capacity * sizeof *to->places);
    }
    if (from->size) memcpy(to->places, from->places, (size_t)from->size * sizeof *to->places);
    to->size = from->size;
    to->stacks = from->stacks;
}

/* Whether a token may come, and in `next` (empty before) what is after it. */
static bool try_token(const Grammar *g, GrammarState *next, const GrammarState *s,
                      const Tokenizer *t, int32_t id) {
    GrammarState spare = {0};
    copy_state(next, s);
    bool good = walk_token(g, next, &spare, t, id);
    grammar_end(&spare);
    return good;
}

bool grammar_take(const Grammar *g, GrammarState *s, const Tokenizer *t, int32_t id) {
    GrammarState next = {0};
    bool good = try_token(g, &next, s, t, id);
    if (good) swap_states(s, &next);
    grammar_end(&next);
    return good;
}

bool grammar_allows(const Grammar *g, const GrammarState *s, const Tokenizer *t, int32_t id) {
    GrammarState next = {0};
    bool good = try_token(g, &next, s, t, id);
    grammar_end(&next);
    return good;
}

void grammar_mask(const Grammar *g, const GrammarState *s, const Tokenizer *t, const int32_t *stops,
                  int stop_count, float *logits, int64_t vocab) {
    uint32_t first[8] = {0};
    bool complete = grammar_complete(s);
    for (int at = 0; at < s->size; at += s->places[at] + 1) {
        const Element *e = s->places[at] ? &g->elements[s->places[at + s->places[at]]] : NULL;
        for (int i = 0; e && e->kind == ELEMENT_BYTES && i < 8; i++) first[i] |= e->bytes[i];
    }
#pragma omp parallel
    {
        GrammarState next = {0}, spare = {0};
#pragma omp for schedule(dynamic, 1024)
        for (int64_t id = 0; id < vocab; id++) {
            bool stop = false;
            if (logits[id] == -INFINITY) continue;
            for (int k = 0; k < stop_count; k++) stop |= stops[k] == id;
            if (stop && complete) continue;
            int begins = tokenizer_first_byte(t, (int32_t)id);
            if (begins >= 0 && !(first[begins >> 5] >> (begins & 31) & 1)) {
                logits[id] = -INFINITY;
                continue;
            }
            copy_state(&next, s);
            if (!walk_token(g, &next, &spare, t, (int32_t)id)) logits[id] = -INFINITY;
        }
        grammar_end(&next);
        grammar_end(&spare);
    }
}
