/* filter.h - from a response to the string that is compared: lm-evaluation-harness's filters. */
#ifndef FILTER_H
#define FILTER_H

#include "configs/node.h"
#include "data/json.h"

typedef enum FilterKind {
    FILTER_REGEX,  /* match number `take` of the pattern, its first group that is not empty */
    FILTER_CHOICE, /* the same; else a choice's text, else a letter after a colon: "(B)" */
    FILTER_STRIP,  /* white space off both ends */
    FILTER_LOWER,
    FILTER_UPPER,
    FILTER_FIRST,    /* of several responses the first `take` */
    FILTER_MAJORITY, /* the one most often given */
} FilterKind;

typedef struct Filter {
    FilterKind kind;
    char *pattern;
    int64_t take; /* -1: the last */
    bool ignore_case, ignore_punctuation;
} Filter;

#define FILTERS_MAX 6

/* A named chain. What it leaves is the first response then. */
typedef struct FilterChain {
    char *name;
    Filter filters[FILTERS_MAX];
    int count;
} FilterChain;

/* Reads a list of {regex: ...}, {choice: ...}, strip, lower, upper, {first: N}, majority. */
Status filter_chain_read(FilterChain *chain, const char *name, Node *list);
void filter_chain_free(FilterChain *chain);

/* What the chain makes of the responses (strings) to a document: a new string. */
Text filter_chain_apply(const FilterChain *chain, const json_t *doc, const json_t *responses);

/* How two strings are compared. */
typedef struct ExactMatch {
    bool ignore_case, ignore_punctuation;
    char *ignore[6]; /* patterns deleted from both, in order */
    int ignore_count;
} ExactMatch;

Status exact_match_read(ExactMatch *m, Node *map);
void exact_match_free(ExactMatch *m);
bool exact_match(const ExactMatch *m, Slice prediction, Slice gold);

#endif
