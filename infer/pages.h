/* pages.h - which pages of the key and value cache are free, whose they are, and which are kept
 * because another prompt may begin alike.
 *
 * A page holds the keys of PAGE_KEYS tokens, in every layer of one attention kind. A sequence fills
 * pages of its own; a full one joins the tree of prefixes, where the path from the root spells the
 * tokens before it, so a prompt that begins alike walks down and starts after what it finds.
 * Sliding pages that no window reaches any more are given back one by one. Pages of the tree that
 * nobody uses stay until their place is needed, the longest unused first. */
#ifndef PAGES_H
#define PAGES_H

#include "configs/model_config.h"
#include "kernels/attention.h"

/* A page of tokens in the tree. */
typedef struct PageNode {
    int32_t tokens[PAGE_KEYS];
    int32_t count; /* of tokens; below PAGE_KEYS only where a sequence ended */
    int adapter;   /* keys differ from adapter to adapter */
    struct PageNode *parent, *child, *next; /* first child, and next child of the same parent */
    int32_t page[ATTENTION_KINDS];          /* -1: given away */
    int users[ATTENTION_KINDS];             /* sequences that hold the page */
    uint64_t used;                          /* when last, by the pool's clock */
    bool live;
} PageNode;

/* The pages of one sequence: page i holds its tokens i * PAGE_KEYS on. */
typedef struct PageList {
    int32_t *page[ATTENTION_KINDS]; /* (capacity) -1: given back, or not there yet */
    PageNode **node;                /* (capacity) where the page is in the tree; NULL: its own */
    int64_t count, capacity;
    int64_t begin; /* sliding pages before this one were given back */
} PageList;

typedef struct Pages {
    int64_t window;
    int64_t total[ATTENTION_KINDS], free_count[ATTENTION_KINDS];
    int32_t *free[ATTENTION_KINDS];
    PageNode *nodes; /* (total[FULL]) the node of a full page has the page's number */
    PageNode root;
    uint64_t clock;
    bool share;
} Pages;

void pages_init(Pages *p, const int64_t total[ATTENTION_KINDS], int64_t window, bool share);
void pages_free(Pages *p);

/* Room for a sequence of `most` tokens; holds nothing yet. */
void page_list_init(PageList *list, int64_t most);
void page_list_free(PageList *list);

/* A page to copy before a sequence goes on: its own first pages begin like another's. */
typedef struct PageCopy {
    int32_t from[ATTENTION_KINDS], to[ATTENTION_KINDS];
    bool wanted;
} PageCopy;

/* Takes what the tree has of ids[0 .. most - 1] into an empty list, and returns how many tokens
 * that is. The last page may be one of its own that *copy says how to fill. */
int64_t pages_match(Pages *p, PageList *list, const int32_t *ids, int64_t most, int adapter,
                    PageCopy *copy);

/* Makes room for `tokens` tokens in all, taking unused pages of the tree where none is free; false
 * when there are too few. Pages taken before that stay with the list. */
bool pages_extend(Pages *p, PageList *list, int64_t tokens);

/* What the sequence has computed up to `tokens` joins the tree: full pages, and with `ended` the
 * last one too. Sliding pages that no later token sees are given back. */
void pages_advance(Pages *p, PageList *list, const int32_t *ids, int64_t tokens, int adapter,
                   bool ended);

/* Everything the list holds is given back. */
void pages_release(Pages *p, PageList *list);

#endif
