/* grammar.h - what an answer may be: rules over symbols, and the walk through them.
 *
 * Symbols are bytes and special tokens (a mark of the chat format is one token, never its
 * spelling). The walk keeps stacks of places in rules, all that fit what was said so far.
 * infer/schema makes the rules. */
#ifndef GRAMMAR_H
#define GRAMMAR_H

#include "data/tokenizer.h"

/* An element of a rule: a set of bytes, one special token, another rule, or the end. */
typedef enum ElementKind { ELEMENT_END, ELEMENT_BYTES, ELEMENT_TOKEN, ELEMENT_RULE } ElementKind;

typedef struct Element {
    ElementKind kind;
    int32_t value;     /* token or rule */
    uint32_t bytes[8]; /* a bit each */
} Element;

/* A rule is its alternatives; each is a run of elements up to an END. */
typedef struct GrammarRule {
    int32_t *starts; /* places of the alternatives' first elements */
    int count;
} GrammarRule;

typedef struct Grammar {
    Element *elements;
    int element_count, element_capacity;
    GrammarRule *rules;
    int rule_count;
    int32_t root;
} Grammar;

/* A new rule without alternatives: nothing fits it yet. */
int32_t grammar_rule(Grammar *g);
void grammar_alternative(Grammar *g, int32_t rule, const Element *elements, int count);

/* After the last alternative. ERR_CONFIG if a rule can begin with itself: no walk ends there. */
Status grammar_finish(Grammar *g, int32_t root);
void grammar_free(Grammar *g); /* accepts NULL */

/* Where in a grammar an answer is. */
typedef struct GrammarState {
    int32_t *places; /* stacks behind each other, each with its size in front */
    int size, capacity, stacks;
} GrammarState;

void grammar_begin(const Grammar *g, GrammarState *s);
void grammar_end(GrammarState *s);

/* Whether the answer may end here. */
bool grammar_complete(const GrammarState *s);

/* Whether the token may come next; with take *s is behind it then, else where it was. */
bool grammar_take(const Grammar *g, GrammarState *s, const Tokenizer *t, int32_t id);
bool grammar_allows(const Grammar *g, const GrammarState *s, const Tokenizer *t, int32_t id);

/* Sets the logits of every token that may not come to -inf; stop tokens stay where it may end. */
void grammar_mask(const Grammar *g, const GrammarState *s, const Tokenizer *t, const int32_t *stops,
                  int stop_count, float *logits, int64_t vocab);

#endif
