/* node.h - YAML (and so JSON) as a typed tree that remembers file and line.
 *
 * Reading is strict: a duplicate key, an alias, a tag, a second document or bytes that are not
 * UTF-8 are errors. Every getter names file, line and key in its error. */
#ifndef NODE_H
#define NODE_H

#include "kernels/status.h"

#include <stdint.h>

typedef enum NodeKind { NODE_SCALAR, NODE_LIST, NODE_MAP } NodeKind;

typedef struct Node {
    NodeKind kind;
    const char *file; /* as named by the user; shared by the whole tree */
    int line;         /* 1-based; 0 for an override from the command line */
    char *text;       /* of a scalar */
    bool quoted;      /* a quoted scalar is a string whatever it looks like */
    int count;
    char **keys;         /* of a map */
    struct Node **items; /* of a list or map */
    bool used;           /* somebody asked for it: what nobody asks for is an unknown key */
} Node;

Status node_load(Node **root, const char *path);
Status node_parse(Node **root, const char *bytes, size_t size, const char *name);
void node_free(Node *node);

/* The value under a key, NULL when absent. Marks it used. */
Node *node_find(Node *map, const char *key);

/* Sets key (replacing what was there) to a parsed value; takes ownership of `value`. */
void node_set(Node *map, const char *key, Node *value);

bool node_is_null(const Node *node);

/* Typed readers of map[key]. When the key is absent or null they leave *out and return OK, unless
 * `required`; a value of another type is an error. */
Status node_get_int(Node *map, const char *key, int64_t *out, bool required);
Status node_get_double(Node *map, const char *key, double *out, bool required);
Status node_get_bool(Node *map, const char *key, bool *out, bool required);
Status node_get_text(Node *map, const char *key, const char **out, bool required);

/* A scalar by itself. */
Status node_to_int(const Node *node, const char *what, int64_t *out);
Status node_to_double(const Node *node, const char *what, double *out);
Status node_to_bool(const Node *node, const char *what, bool *out);
Status node_to_text(const Node *node, const char *what, const char **out);

/* An error naming the first key, at any depth, that nobody asked for. */
Status node_check_used(const Node *map, const char *path);

#endif
