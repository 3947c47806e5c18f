/* node.c - the tree over libyaml's events. */
#include "configs/node.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <yaml.h>

#define DEPTH_MAX 64

static Node *node_new(NodeKind kind, const char *file, int line) {
    Node *node = must_calloc(1, sizeof *node);
    node->kind = kind;
    node->file = file;
    node->line = line;
    return node;
}

static void tree_free(Node *node) {
    if (!node) return;
    for (int i = 0; i < node->count; i++) {
        tree_free(node->items[i]);
        if (node->keys) free(node->keys[i]);
    }
    free(node->items);
    free(node->keys);
    free(node->text);
    free(node);
}

void node_free(Node *node) {
    if (!node) return;
    char *file = (char *)node->file;
    tree_free(node);
    free(file);
}

static void node_append(Node *parent, char *key, Node *item) {
    parent->items =
        must_realloc(parent->items, (size_t)(parent->count + 1) * sizeof *parent->items);
    if (parent->kind == NODE_MAP) {
        parent->keys =
            must_realloc(parent->keys, (size_t)(parent->count + 1) * sizeof *parent->keys);
        parent->keys[parent->count] = key;
    }
    parent->items[parent->count++] = item;
}

static int key_index(const Node *map, const char *key) {
    for (int i = 0; i < map->count; i++)
        if (!strcmp(map->keys[i], key)) return i;
    return -1;
}

typedef struct Reader {
    yaml_parser_t parser;
    const char *file;
} Reader;

static Status next_event(Reader *r, yaml_event_t *event) {
    if (yaml_parser_parse(&r->parser, event)) return OK;
    FAIL(ERR_CONFIG, "%s:%zu: %s%s%s", r->file, r->parser.problem_mark.line + 1,
         r->parser.context ? r->parser.context : "", r->parser.context ? ", " : "",
         r->parser.problem ? r->parser.problem : "unreadable");
}

static Status read_value(Reader *r, yaml_event_t *event, int depth, Node **out);

static Status read_children(Reader *r, Node *node, yaml_event_type_t end, int depth) {
    for (;;) {
        yaml_event_t event;
        TRY(next_event(r, &event));
        if (event.type == end) {
            yaml_event_delete(&event);
            return OK;
        }
        char *key = NULL;
        if (node->kind == NODE_MAP) {
            int line = (int)event.start_mark.line + 1;
            if (event.type != YAML_SCALAR_EVENT) {
                yaml_event_delete(&event);
                FAIL(ERR_CONFIG, "%s:%d: a key is not a plain word", r->file, line);
            }
            key = must_strdup((const char *)event.data.scalar.value);
            yaml_event_delete(&event);
            if (key_index(node, key) >= 0) {
                status_fail(ERR_CONFIG, "%s:%d: key '%s' is given twice", r->file, line, key);
                free(key);
                return ERR_CONFIG;
            }
            Status status = next_event(r, &event);
            if (status != OK) {
                free(key);
                return status;
            }
        }
        Node *item;
        Status status = read_value(r, &event, depth + 1, &item);
        if (status != OK) {
            free(key);
            return status;
        }
        node_append(node, key, item);
    }
}

/* Takes ownership of the event. */
static Status read_value(Reader *r, yaml_event_t *event, int depth, Node **out) {
    int line = (int)event->start_mark.line + 1;
    yaml_event_type_t type = event->type;
    Node *node = NULL;
    Status status = OK;
    if (type == YAML_SCALAR_EVENT) {
        node = node_new(NODE_SCALAR, r->file, line);
        if (strlen((const char *)event->data.scalar.value) != event->data.scalar.length)
            status = status_fail(ERR_CONFIG, "%s:%d: a value holds a zero byte", r->file, line);
        node->text = must_strdup((const char *)event->data.scalar.value);
        node->quoted = event->data.scalar.style != YAML_PLAIN_SCALAR_STYLE;
    } else if (depth > DEPTH_MAX) {
        status = status_fail(ERR_CONFIG, "%s:%d: nested deeper than %d levels", r->file, line,
                             DEPTH_MAX);
    } else if (type == YAML_SEQUENCE_START_EVENT || type == YAML_MAPPING_START_EVENT) {
        node = node_new(type == YAML_MAPPING_START_EVENT ? NODE_MAP : NODE_LIST, r->file, line);
    } else {
        status =
            status_fail(ERR_CONFIG, "%s:%d: an alias, which this file may not use", r->file, line);
    }
    yaml_event_delete(event);
    if (status == OK && node->kind != NODE_SCALAR)
        status = read_children(
            r, node, node->kind == NODE_MAP ? YAML_MAPPING_END_EVENT : YAML_SEQUENCE_END_EVENT,
            depth);
    if (status != OK) {
        tree_free(node);
        return status;
    }
    *out = node;
    return OK;
}

Status node_parse(Node **root, const char *bytes, size_t size, const char *name) {
    Reader r = {.file = must_strdup(name)};
    Node *node = NULL;
    Status status = OK;
    yaml_event_t event;
    bool started = yaml_parser_initialize(&r.parser);
    if (!started) FAIL_DONE(ERR_IO, "%s: out of memory", name);
    yaml_parser_set_input_string(&r.parser, (const unsigned char *)bytes, size);
    for (;;) { /* the stream and document marks, then the one value */
        TRY_DONE(next_event(&r, &event));
        if (event.type == YAML_STREAM_END_EVENT) {
            yaml_event_delete(&event);
            break;
        }
        if (event.type == YAML_STREAM_START_EVENT || event.type == YAML_DOCUMENT_END_EVENT ||
            (event.type == YAML_DOCUMENT_START_EVENT && !node)) {
            yaml_event_delete(&event);
            continue;
        }
        if (node) {
            yaml_event_delete(&event);
            FAIL_DONE(ERR_CONFIG, "%s: holds more than one document", name);
        }
        TRY_DONE(read_value(&r, &event, 0, &node));
    }
    if (!node) FAIL_DONE(ERR_CONFIG, "%s: is empty", name);
done:
    if (started) yaml_parser_delete(&r.parser);
    if (status != OK) {
        tree_free(node);
        free((char *)r.file);
        return status;
    }
    *root = node;
    return OK;
}

Status node_load(Node **root, const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) FAIL(ERR_IO, "%s: %s", path, strerror(errno));
    char *bytes = NULL;
    size_t size = 0, space = 0, got;
    do {
        if (size == space) bytes = must_realloc(bytes, space = space ? 2 * space : 65536);
        got = fread(bytes + size, 1, space - size, file);
        size += got;
    } while (got && size < (256u << 20));
    bool failed = ferror(file);
    fclose(file);
    Status status = failed ? status_fail(ERR_IO, "%s: cannot be read", path)
                           : node_parse(root, bytes, size, path);
    free(bytes);
    return status;
}

Node *node_find(Node *map, const char *key) {
    if (!map || map->kind != NODE_MAP) return NULL;
    int i = key_index(map, key);
    if (i < 0) return NULL;
    map->items[i]->used = true;
    return map->items[i];
}

static void rename_file(Node *node, const char *file) {
    node->file = file;
    for (int i = 0; i < node->count; i++) rename_file(node->items[i], file);
}

void node_set(Node *map, const char *key, Node *value) {
    free((char *)value->file);
    rename_file(value, map->file);
    int i = key_index(map, key);
    if (i < 0) {
        node_append(map, must_strdup(key), value);
    } else {
        tree_free(map->items[i]);
        map->items[i] = value;
    }
}

bool node_is_null(const Node *node) {
    if (!node || node->kind != NODE_SCALAR || node->quoted) return !node;
    return !*node->text || !strcmp(node->text, "null") || !strcmp(node->text, "~") ||
           !strcmp(node->text, "Null");
}

static const char *shown(const Node *node) {
    return node->kind == NODE_SCALAR ? node->text : node->kind == NODE_LIST ? "a list" : "a map";
}

static Status wrong(const Node *node, const char *what, const char *expected) {
    return status_fail(ERR_CONFIG, "%s:%d: %s is %s, expected %s", node->file, node->line, what,
                       shown(node), expected);
}

Status node_to_int(const Node *node, const char *what, int64_t *out) {
    if (node->kind != NODE_SCALAR || node->quoted || !*node->text)
        return wrong(node, what, "a whole number");
    char *end;
    errno = 0;
    long long value = strtoll(node->text, &end, 10);
    if (*end && !errno) { /* 1e6 is a whole number too */
        double real = strtod(node->text, &end);
        if (*end || real != floor(real) || fabs(real) > 9e15)
            return wrong(node, what, "a whole number");
        value = (long long)real;
    }
    if (errno) return wrong(node, what, "a whole number that fits 64 bits");
    *out = value;
    return OK;
}

Status node_to_double(const Node *node, const char *what, double *out) {
    if (node->kind != NODE_SCALAR || node->quoted || !*node->text)
        return wrong(node, what, "a number");
    char *end;
    double value = strtod(node->text, &end);
    if (*end || !isfinite(value)) return wrong(node, what, "a finite number");
    *out = value;
    return OK;
}

Status node_to_bool(const Node *node, const char *what, bool *out) {
    if (node->kind != NODE_SCALAR || node->quoted) return wrong(node, what, "true or false");
    if (!strcmp(node->text, "true") || !strcmp(node->text, "True"))
        *out = true;
    else if (!strcmp(node->text, "false") || !strcmp(node->text, "False"))
        *out = false;
    else
        return wrong(node, what, "true or false");
    return OK;
}

Status node_to_text(const Node *node, const char *what, const char **out) {
    if (node->kind != NODE_SCALAR) return wrong(node, what, "a text");
    *out = node->text;
    return OK;
}

static Status find_value(Node *map, const char *key, bool required, Node **out) {
    Node *node = node_find(map, key);
    *out = node_is_null(node) ? NULL : node;
    if (!*out && required)
        FAIL(ERR_CONFIG, "%s:%d: key '%s' is missing", map->file, map->line, key);
    return OK;
}

#define NODE_GETTER(name, type)                                                                    \
    Status node_get_##name(Node *map, const char *key, type *out, bool required) {                 \
        Node *node;                                                                                \
        TRY(find_value(map, key, required, &node));                                                \
        return node ? node_to_##name(node, key, out) : OK;                                         \
    }
NODE_GETTER(int, int64_t)
NODE_GETTER(double, double)
NODE_GETTER(bool, bool)
NODE_GETTER(text, const char *)

Status node_check_used(const Node *map, const char *path) {
    if (map->kind != NODE_MAP) return OK;
    for (int i = 0; i < map->count; i++) {
        char name[512];
        snprintf(name, sizeof name, "%s%s%s", path, *path ? "." : "", map->keys[i]);
        if (!map->items[i]->used && !map->items[i]->line)
            FAIL(ERR_USAGE, "unknown key '%s' in an override", name);
        if (!map->items[i]->used)
            FAIL(ERR_CONFIG, "%s:%d: unknown key '%s'", map->file, map->items[i]->line, name);
        TRY(node_check_used(map->items[i], name));
    }
    return OK;
}
