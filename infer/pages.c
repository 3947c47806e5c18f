/* pages.c - taking, sharing and giving back pages. */
#include "infer/pages.h"

#include <stdlib.h>
#include <string.h>

/* Tokens that must agree before copying a page is worth it. */
#define LEAST_COPY 4

void pages_init(Pages *p, const int64_t total[ATTENTION_KINDS], int64_t window, bool share) {
    *p = (Pages){.window = window, .share = share};
    for (int kind = 0; kind < ATTENTION_KINDS; kind++) {
        p->total[kind] = p->free_count[kind] = total[kind];
        p->free[kind] = must_malloc((size_t)total[kind] * sizeof(int32_t));
        for (int64_t i = 0; i < total[kind]; i++) p->free[kind][i] = (int32_t)(total[kind] - 1 - i);
    }
    p->nodes = must_calloc((size_t)total[FULL], sizeof *p->nodes);
    p->root.count = PAGE_KEYS;
}

void pages_free(Pages *p) {
    for (int kind = 0; kind < ATTENTION_KINDS; kind++) free(p->free[kind]);
    free(p->nodes);
    *p = (Pages){0};
}

void page_list_init(PageList *list, int64_t most) {
    *list = (PageList){.capacity = (most + PAGE_KEYS - 1) / PAGE_KEYS};
    size_t n = (size_t)list->capacity;
    for (int kind = 0; kind < ATTENTION_KINDS; kind++)
        list->page[kind] = must_malloc(n * sizeof(int32_t));
    list->node = must_calloc(n, sizeof *list->node);
}

void page_list_free(PageList *list) {
    for (int kind = 0; kind < ATTENTION_KINDS; kind++) free(list->page[kind]);
    free(list->node);
    *list = (PageList){0};
}

/* ---- the tree ---- */

static void give(Pages *p, int kind, int32_t page) {
    if (page >= 0) p->free[kind][p->free_count[kind]++] = page;
}

static void unlink_node(PageNode *node) {
    PageNode **at = &node->parent->child;
    while (*at != node) at = &(*at)->next;
    *at = node->next;
    node->live = false;
}

/* Frees one page of a kind: of the node that was unused for the longest time. A full page goes with
 * its node, so only where nothing follows; a sliding one leaves the node. */
static bool evict(Pages *p, int kind) {
    PageNode *oldest = NULL;
    for (int64_t i = 0; i < p->total[FULL]; i++) {
        PageNode *node = &p->nodes[i];
        if (!node->live || node->users[kind] || node->page[kind] < 0) continue;
        if (kind == FULL && (node->child || node->users[SLIDING])) continue;
        if (!oldest || node->used < oldest->used) oldest = node;
    }
    if (!oldest) return false;
    give(p, kind, oldest->page[kind]);
    oldest->page[kind] = -1;
    if (kind == FULL) {
        give(p, SLIDING, oldest->page[SLIDING]);
        unlink_node(oldest);
    }
    return true;
}

static int32_t take(Pages *p, int kind) {
    if (!p->free_count[kind] && !evict(p, kind)) return -1;
    return p->free[kind][--p->free_count[kind]];
}

static int64_t common(const PageNode *node, const int32_t *ids, int64_t most) {
    int64_t n = 0;
    while (n < node->count && n < most && node->tokens[n] == ids[n]) n++;
    return n;
}

/* The child that agrees with most of ids, and with how many. */
static PageNode *best_child(const PageNode *parent, const int32_t *ids, int64_t most, int adapter,
                            int64_t *agree) {
    PageNode *best = NULL;
    *agree = 0;
    for (PageNode *child = parent->child; child; child = child->next) {
        if (child->adapter != adapter) continue;
        int64_t n = common(child, ids, most);
        if (n > *agree) best = child, *agree = n;
    }
    return best;
}

/* Which page the first key lies in that the token at `position` sees. */
static int64_t window_page(const Pages *p, int64_t position) {
    int64_t first = position - p->window + 1;
    return first > 0 ? first / PAGE_KEYS : 0;
}

static void hold(Pages *p, PageList *list, int64_t i, PageNode *node, bool sliding) {
    list->node[i] = node;
    list->page[FULL][i] = node->page[FULL];
    list->page[SLIDING][i] = sliding ? node->page[SLIDING] : -1;
    node->users[FULL]++;
    node->users[SLIDING] += sliding;
    node->used = p->clock;
}

int64_t pages_match(Pages *p, PageList *list, const int32_t *ids, int64_t most, int adapter,
                    PageCopy *copy) {
    PageNode *path[list->capacity + 1], *at = &p->root;
    int64_t found = 0, agree = 0;
    copy->wanted = false;
    if (!p->share) return 0;
    p->clock++;
    while ((found + 1) * PAGE_KEYS <= most) {
        PageNode *child = best_child(at, ids + found * PAGE_KEYS, PAGE_KEYS, adapter, &agree);
        if (agree < PAGE_KEYS) break;
        path[found++] = at = child;
    }
    for (; found; found--) { /* the window of what comes next must be there */
        int64_t i = window_page(p, found * PAGE_KEYS);
        while (i < found && path[i]->page[SLIDING] >= 0) i++;
        if (i == found) break;
    }
    for (int64_t i = 0; i < found; i++)
        hold(p, list, i, path[i], i >= window_page(p, found * PAGE_KEYS));
    list->count = found;
    list->begin = window_page(p, found * PAGE_KEYS);
    at = found ? path[found - 1] : &p->root;
    PageNode *near =
        best_child(at, ids + found * PAGE_KEYS, most - found * PAGE_KEYS, adapter, &agree);
    if (agree < LEAST_COPY || near->page[SLIDING] < 0) return found * PAGE_KEYS;
    near->users[FULL]++, near->users[SLIDING]++; /* not to be evicted for its own copy */
    if (pages_extend(p, list, found * PAGE_KEYS + agree)) {
        copy->wanted = true;
        for (int kind = 0; kind < ATTENTION_KINDS; kind++) {
            copy->from[kind] = near->page[kind];
            copy->to[kind] = list->page[kind][found];
        }
    }
    near->users[FULL]--, near->users[SLIDING]--;
    near->used = p->clock;
    return found * PAGE_KEYS + (copy->wanted ? agree : 0);
}

bool pages_extend(Pages *p, PageList *list, int64_t tokens) {
    int64_t need = (tokens + PAGE_KEYS - 1) / PAGE_KEYS;
    CHECK(need <= list->capacity, "a sequence outgrows its %d pages", (int)list->capacity);
    for (; list->count < need; list->count++) {
        int64_t i = list->count;
        int32_t full = take(p, FULL), sliding = full < 0 ? -1 : take(p, SLIDING);
        if (sliding < 0) {
            give(p, FULL, full);
            return false;
        }
        list->page[FULL][i] = full;
        list->page[SLIDING][i] = sliding;
        list->node[i] = NULL;
    }
    return true;
}

/* Page i of the list, `count` tokens, joins the tree below the page before it. Another sequence may
 * have brought the same page: then this one goes, unless it fills a gap there. */
static void join(Pages *p, PageList *list, int64_t i, const int32_t *ids, int64_t count,
                 int adapter) {
    PageNode *parent = i ? list->node[i - 1] : &p->root;
    int64_t agree;
    if (!parent) return;
    PageNode *node = best_child(parent, ids, count, adapter, &agree);
    if (!node || agree < count) {
        node = &p->nodes[list->page[FULL][i]];
        *node = (PageNode){.count = (int32_t)count,
                           .adapter = adapter,
                           .parent = parent,
                           .next = parent->child,
                           .live = true,
                           .page = {-1, -1}};
        memcpy(node->tokens, ids, (size_t)count * sizeof *ids);
        parent->child = node;
    } else if (node->count > count) {
        return; /* a longer page begins like this unfinished one: nothing to add */
    }
    for (int kind = 0; kind < ATTENTION_KINDS; kind++) {
        if (node->page[kind] < 0)
            node->page[kind] = list->page[kind][i];
        else
            give(p, kind, list->page[kind][i]);
    }
    hold(p, list, i, node, true);
}

void pages_advance(Pages *p, PageList *list, const int32_t *ids, int64_t tokens, int adapter,
                   bool ended) {
    p->clock++;
    for (int64_t i = list->begin; p->share && i < list->count; i++) {
        int64_t count = tokens - i * PAGE_KEYS;
        if (count > PAGE_KEYS) count = PAGE_KEYS;
        if (list->node[i] || count < (ended ? LEAST_COPY : PAGE_KEYS)) continue;
        join(p, list, i, ids + i * PAGE_KEYS, count, adapter);
    }
    for (; list->begin < window_page(p, tokens); list->begin++) {
        PageNode *node = list->node[list->begin];
        if (node)
            node->users[SLIDING]--;
        else
            give(p, SLIDING, list->page[SLIDING][list->begin]);
        list->page[SLIDING][list->begin] = -1;
    }
}

void pages_release(Pages *p, PageList *list) {
    for (int64_t i = 0; i < list->count; i++) {
        PageNode *node = list->node[i];
        if (node) {
            node->users[FULL]--;
            node->users[SLIDING] -= list->page[SLIDING][i] >= 0;
        } else {
            give(p, FULL, list->page[FULL][i]);
            give(p, SLIDING, list->page[SLIDING][i]);
        }
    }
    list->count = list->begin = 0;
}
