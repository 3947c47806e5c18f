/* task.c - reading task definitions. */
#include "eval/task.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* tasks.yaml is part of the program. */
__asm__(".section .rodata\n"
        ".global builtin_tasks\nbuiltin_tasks:\n.incbin \"eval/tasks.yaml\"\n"
        ".global builtin_tasks_end\nbuiltin_tasks_end:\n.byte 0\n"
        ".previous\n");
extern const char builtin_tasks[], builtin_tasks_end[];

static const char *const known_keys[] = {
    "like",        "rules",   "version", "reads",       "files",       "fewshot_files",
    "fields",      "by",      "output",  "form",        "description", "question",
    "answer",      "worked",  "opening", "tests",       "program",     "choices",
    "delimiter",   "shots",   "pick",    "until",       "max_tokens",  "samples",
    "temperature", "filters", "scorer",  "exact_match", "metrics",     "media"};

static const char *const scorers[] = {
    "none",   "exact_match", "hendrycks_math", "minerva_math", "aime",    "matharena", "three_step",
    "letter", "ifeval",      "python",         "bfcl",         "cleanup", "wer"};

/* A definition and those it is like. */
typedef struct Definition {
    Node *maps[8];
    int count;
} Definition;

static Node *find(const Definition *d, const char *key) {
    for (int i = 0; i < d->count; i++) {
        Node *node = node_find(d->maps[i], key);
        if (node) return node;
    }
    return NULL;
}

static Status get_text(char **out, const Definition *d, const char *key) {
    Node *node = find(d, key);
    const char *text;
    if (!node || node_is_null(node)) return OK;
    TRY(node_to_text(node, key, &text));
    *out = must_strdup(text);
    return OK;
}

static void add_text(Texts *list, const char *text) {
    list->items = must_realloc(list->items, (size_t)(list->count + 1) * sizeof *list->items);
    list->items[list->count++] = must_strdup(text);
}

static Status read_texts(Texts *list, Node *node, const char *key) {
    if (!node) return OK;
    if (node->kind != NODE_LIST)
        FAIL(ERR_CONFIG, "%s:%d: '%s' is no list", node->file, node->line, key);
    for (int i = 0; i < node->count; i++) {
        const char *text;
        TRY(node_to_text(node->items[i], key, &text));
        add_text(list, text);
    }
    return OK;
}

static void texts_free(Texts *list) {
    for (int i = 0; i < list->count; i++) free(list->items[i]);
    free(list->items);
    *list = (Texts){0};
}

static Status read_choice(int *out, const Definition *d, const char *key, const char *const *names,
                          int count) {
    Node *node = find(d, key);
    const char *text;
    if (!node) return OK;
    TRY(node_to_text(node, key, &text));
    for (int i = 0; i < count; i++)
        if (!strcmp(text, names[i])) {
            *out = i;
            return OK;
        }
    Text list = {0};
    for (int i = 0; i < count; i++) text_addf(&list, "%s%s", i ? ", " : "", names[i]);
    Status status = status_fail(ERR_CONFIG, "%s:%d: %s '%s', expected one of %s", node->file,
                                node->line, key, text, list.bytes);
    text_free(&list);
    return status;
}

static Status read_fields(Task *t, Node *map) {
    for (int i = 0; map && map->kind == NODE_MAP && i < map->count; i++) {
        if (t->field_count == 8)
            FAIL(ERR_CONFIG, "%s:%d: more than 8 fields", map->file, map->line);
        FieldNames *f = &t->fields[t->field_count++];
        f->name = must_strdup(map->keys[i]);
        TRY(read_texts(&f->names, map->items[i], map->keys[i]));
    }
    return OK;
}

static Status read_media(Task *t, Node *map) {
    static const char *const types[] = {"image", "audio", "video"};
    for (int i = 0; map && map->kind == NODE_MAP && i < map->count; i++) {
        const char *type = NULL, *field;
        for (int k = 0; k < MEDIA_KINDS; k++)
            if (!strcmp(map->keys[i], types[k])) type = types[k];
        if (!type)
            FAIL(ERR_CONFIG, "%s:%d: media '%s', expected image, audio or video", map->file,
                 map->items[i]->line, map->keys[i]);
        TRY(node_to_text(map->items[i], type, &field));
        t->media_types[t->media_count] = must_strdup(type);
        t->media_fields[t->media_count++] = must_strdup(field);
    }
    return OK;
}

static Status read_chains(Task *t, Node *map) {
    for (int i = 0; map && map->kind == NODE_MAP && i < map->count; i++) {
        if (t->chain_count == CHAINS_MAX)
            FAIL(ERR_CONFIG, "%s:%d: more than %d filters", map->file, map->line, CHAINS_MAX);
        TRY(filter_chain_read(&t->chains[t->chain_count++], map->keys[i], map->items[i]));
    }
    return OK;
}

static Status read_task(Task *t, const Definition *d) {
    static const char *const outputs[] = {"text", "choices", "rolling"};
    static const char *const forms[] = {"text", "chat", "messages"}, *const picks[] = {"first",
                                                                                       "drawn"};
    int output = 0, form = 0, pick = 0, scorer = 0;
    Node *node;
    t->max_tokens = 256;
    t->samples = 1;
    t->temperature = NAN;
    TRY(get_text(&t->rules, d, "rules"));
    TRY(get_text(&t->reads, d, "reads"));
    TRY(get_text(&t->by, d, "by"));
    TRY(get_text(&t->description, d, "description"));
    TRY(get_text(&t->question, d, "question"));
    TRY(get_text(&t->answer, d, "answer"));
    TRY(get_text(&t->worked, d, "worked"));
    TRY(get_text(&t->opening, d, "opening"));
    TRY(get_text(&t->tests, d, "tests"));
    TRY(get_text(&t->program, d, "program"));
    TRY(get_text(&t->choices, d, "choices"));
    TRY(get_text(&t->delimiter, d, "delimiter"));
    TRY(read_choice(&output, d, "output", outputs, 3));
    TRY(read_choice(&form, d, "form", forms, 3));
    TRY(read_choice(&pick, d, "pick", picks, 2));
    TRY(read_choice(&scorer, d, "scorer", scorers, sizeof scorers / sizeof *scorers));
    if ((node = find(d, "version"))) TRY(node_to_double(node, "version", &t->version));
    if ((node = find(d, "shots"))) TRY(node_to_int(node, "shots", &t->shots));
    if ((node = find(d, "max_tokens"))) TRY(node_to_int(node, "max_tokens", &t->max_tokens));
    if ((node = find(d, "samples"))) TRY(node_to_int(node, "samples", &t->samples));
    if ((node = find(d, "temperature"))) TRY(node_to_double(node, "temperature", &t->temperature));
    TRY(read_texts(&t->files, find(d, "files"), "files"));
    TRY(read_texts(&t->fewshot_files, find(d, "fewshot_files"), "fewshot_files"));
    TRY(read_texts(&t->until, find(d, "until"), "until"));
    TRY(read_texts(&t->metrics, find(d, "metrics"), "metrics"));
    TRY(read_fields(t, find(d, "fields")));
    TRY(read_media(t, find(d, "media")));
    TRY(read_chains(t, find(d, "filters")));
    TRY(exact_match_read(&t->exact, find(d, "exact_match")));
    t->has_until = find(d, "until") != NULL;
    t->output = (TaskOutput)output;
    t->chat = form >= 1;
    t->messages = form == 2;
    t->drawn = pick == 1;
    t->scorer = (Scorer)scorer;
    if (!t->rules) t->rules = must_strdup("own");
    if (!t->reads) t->reads = must_strdup("rows");
    if (!t->delimiter) t->delimiter = must_strdup(" ");
    return OK;
}

static Status check_keys(const Node *map) {
    if (map->kind != NODE_MAP)
        FAIL(ERR_CONFIG, "%s:%d: a task is a map of keys", map->file, map->line);
    for (int i = 0; i < map->count; i++) {
        bool known = false;
        for (size_t k = 0; k < sizeof known_keys / sizeof *known_keys; k++)
            known |= !strcmp(map->keys[i], known_keys[k]);
        if (!known)
            FAIL(ERR_CONFIG, "%s:%d: unknown key '%s' of a task", map->file, map->items[i]->line,
                 map->keys[i]);
    }
    return OK;
}

/* `map` and what it is like, among the built-in ones. */
static Status collect(Definition *d, Node *map, Node *builtin) {
    for (d->count = 0; map;) {
        const char *like = NULL;
        TRY(check_keys(map));
        if (d->count == 8) FAIL(ERR_CONFIG, "%s:%d: 'like' goes round", map->file, map->line);
        d->maps[d->count++] = map;
        TRY(node_get_text(map, "like", &like, false));
        map = like ? node_find(builtin, like) : NULL;
        if (like && !map) FAIL(ERR_CONFIG, "no task '%s' to be like", like);
    }
    return OK;
}

static Status load_builtin(Node **root) {
    return node_parse(root, builtin_tasks, (size_t)(builtin_tasks_end - builtin_tasks),
                      "eval/tasks.yaml");
}

static Status from_map(Task *t, const char *name, Node *map, Node *builtin) {
    Definition d;
    *t = (Task){.name = must_strdup(name)};
    Status status = collect(&d, map, builtin);
    if (status == OK) status = read_task(t, &d);
    if (status != OK) task_free(t);
    return status;
}

static Status unknown(const Node *builtin, const char *name) {
    Text list = {0};
    for (int i = 0; i < builtin->count; i++)
        text_addf(&list, "%s%s", i ? ", " : "", builtin->keys[i]);
    Status status = status_fail(
        ERR_USAGE, "no task '%s'; there are %s, and YAML files of one's own", name, list.bytes);
    text_free(&list);
    return status;
}

static char *base_name(const char *path) {
    const char *slash = strrchr(path, '/');
    char *name = must_strdup(slash ? slash + 1 : path), *dot = strrchr(name, '.');
    if (dot) *dot = 0;
    return name;
}

Status task_find(Task *t, const char *name) {
    size_t n = strlen(name);
    bool own = n > 5 && (!strcmp(name + n - 5, ".yaml") || !strcmp(name + n - 4, ".yml"));
    Node *builtin = NULL, *root = NULL, *map;
    char *stem = NULL;
    Status status = OK;
    *t = (Task){0};
    TRY_DONE(load_builtin(&builtin));
    if (own) {
        TRY_DONE(node_load(&root, name));
        stem = base_name(name);
        TRY_DONE(from_map(t, stem, root, builtin));
        goto done;
    }
    map = node_find(builtin, name);
    if (!map) {
        status = unknown(builtin, name);
        goto done;
    }
    TRY_DONE(from_map(t, name, map, builtin));
done:
    free(stem);
    node_free(root);
    node_free(builtin);
    return status;
}

Status task_for_row(Task *t, const char *name, const char *suite) {
    Status status = task_find(t, name);
    if (status != OK) return status;
    if (!suite || !strcmp(suite, t->rules)) return OK;
    /* Another rule set of the same task. */
    char *family = must_strdup(suite), *space = strchr(family, ' ');
    if (space) *space = 0;
    char *other = must_format("%s@%s", name, family);
    Task found;
    status = task_find(&found, other);
    if (status == OK && strcmp(found.rules, suite)) {
        task_free(&found);
        status = ERR_USAGE;
    }
    if (status == OK) {
        task_free(t);
        *t = found;
    } else {
        status = status_fail(ERR_CONFIG, "task '%s' has no rules '%s', it follows '%s'", name,
                             suite, t->rules);
        task_free(t);
    }
    free(other);
    free(family);
    return status;
}

Status task_for_samples(Task *t, const char *name) {
    Node *builtin = NULL;
    Status status = OK;
    size_t longest = 0;
    const char *best = NULL;
    TRY(load_builtin(&builtin));
    for (int i = 0; i < builtin->count; i++) { /* a harness's samples follow its own rules */
        const char *key = builtin->keys[i], *at = strchr(key, '@');
        size_t n = at ? (size_t)(at - key) : strlen(key);
        if (strncmp(name, key, n) || n < longest || (at && strcmp(at, "@lm-eval"))) continue;
        if (n == longest && !at) continue;
        best = key;
        longest = n;
    }
    status = best ? task_find(t, best) : unknown(builtin, name);
    node_free(builtin);
    return status;
}

void task_free(Task *t) {
    char **texts[] = {&t->name,     &t->rules,   &t->reads,    &t->by,      &t->description,
                      &t->question, &t->answer,  &t->worked,   &t->opening, &t->tests,
                      &t->program,  &t->choices, &t->delimiter};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) free(*texts[i]);
    Texts *lists[] = {&t->files, &t->fewshot_files, &t->until, &t->metrics};
    for (size_t i = 0; i < sizeof lists / sizeof *lists; i++) texts_free(lists[i]);
    for (int i = 0; i < t->field_count; i++) {
        free(t->fields[i].name);
        texts_free(&t->fields[i].names);
    }
    for (int i = 0; i < t->media_count; i++) {
        free(t->media_types[i]);
        free(t->media_fields[i]);
    }
    for (int i = 0; i < t->chain_count; i++) filter_chain_free(&t->chains[i]);
    exact_match_free(&t->exact);
    *t = (Task){0};
}
