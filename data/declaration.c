/* declaration.c - JSON schema to Gemma 4's own notation, with the released templates' gaps kept. */
#include "data/declaration.h"

#include <stdlib.h>
#include <string.h>

#define QUOTE "<|\"|>"

static void write_quoted(Text *out, Slice s) {
    text_adds(out, QUOTE);
    text_add(out, s.bytes, s.size);
    text_adds(out, QUOTE);
}

/* A mapping's entries in the order of their keys folded to lower case, stable. */
typedef struct Entry {
    const char *key;
    json_t *value;
    char *folded;
    size_t order;
} Entry;

static int by_key(const void *a, const void *b) {
    const Entry *x = a, *y = b;
    int order = strcmp(x->folded, y->folded);
    return order ? order : x->order < y->order ? -1 : 1;
}

static Entry *sorted_entries(const json_t *map, size_t *count) {
    const char *key;
    json_t *value;
    Entry *entries = must_calloc(json_object_size(map) + 1, sizeof *entries);
    *count = 0;
    json_object_foreach((json_t *)map, key, value) {
        Text folded = {0};
        text_add(&folded, "", 0);
        text_add_lower(&folded, slice_of(key));
        entries[*count] = (Entry){key, value, folded.bytes, *count};
        ++*count;
    }
    qsort(entries, *count, sizeof *entries, by_key);
    return entries;
}

static void free_entries(Entry *entries, size_t count) {
    for (size_t i = 0; i < count; i++) free(entries[i].folded);
    free(entries);
}

static void write_map(Text *out, const json_t *map, bool quoted_keys) {
    size_t count;
    Entry *entries = sorted_entries(map, &count);
    text_adds(out, "{");
    for (size_t i = 0; i < count; i++) {
        if (i) text_adds(out, ",");
        if (quoted_keys)
            write_quoted(out, slice_of(entries[i].key));
        else
            text_adds(out, entries[i].key);
        text_adds(out, ":");
        value_write(out, entries[i].value, quoted_keys);
    }
    text_adds(out, "}");
    free_entries(entries, count);
}

void value_write(Text *out, const json_t *value, bool quoted_keys) {
    if (json_big_integer(value)) {
        text_adds(out, json_big_integer(value));
    } else if (json_is_string(value)) {
        write_quoted(out, json_slice(value));
    } else if (json_is_number(value)) {
        text_add_number(out, value);
    } else if (json_is_object(value)) {
        write_map(out, value, quoted_keys);
    } else if (json_is_array(value)) {
        size_t i;
        json_t *item;
        text_adds(out, "[");
        json_array_foreach(value, i, item) {
            if (i) text_adds(out, ",");
            value_write(out, item, quoted_keys);
        }
        text_adds(out, "]");
    } else {
        text_adds(out, json_is_true(value) ? "true" : json_is_false(value) ? "false" : "null");
    }
}

void mapping_write(Text *out, const json_t *map) {
    if (json_is_object(map))
        write_map(out, map, false);
    else
        text_adds(out, "{}");
}

/* "type" in upper case; a list as Python prints a list of strings; nothing when there is none. */
static void add_type(Text *out, const json_t *type) {
    size_t i;
    json_t *item;
    if (json_is_string(type)) text_add_upper(out, json_slice(type));
    if (!json_is_array(type)) return;
    text_adds(out, "[");
    json_array_foreach(type, i, item) {
        text_adds(out, i ? ", '" : "'");
        text_add_upper(out, json_slice(item));
        text_adds(out, "'");
    }
    text_adds(out, "]");
}

static bool type_is(const json_t *schema, const char *type) {
    Text upper = {0};
    text_add(&upper, "", 0);
    add_type(&upper, json_object_get(schema, "type"));
    bool same = !strcmp(upper.bytes, type);
    text_free(&upper);
    return same;
}

static void write_names(Text *out, const json_t *names) {
    size_t i;
    json_t *name;
    text_adds(out, "required:[");
    json_array_foreach(names, i, name) {
        if (i) text_adds(out, ",");
        write_quoted(out, json_slice(name));
    }
    text_adds(out, "]");
}

static void write_properties(Text *out, const json_t *properties, bool own_keys);

static void separate(Text *out, bool *first) {
    if (!*first) text_adds(out, ",");
    *first = false;
}

static void write_items(Text *out, const json_t *items) {
    size_t count;
    bool first = true;
    Entry *entries = sorted_entries(items, &count);
    text_adds(out, "items:{");
    for (size_t i = 0; i < count; i++) {
        const char *key = entries[i].key;
        const json_t *value = entries[i].value;
        if (json_is_null(value)) continue;
        separate(out, &first);
        if (!strcmp(key, "properties")) {
            text_adds(out, "properties:{");
            if (json_is_object(value)) write_properties(out, value, false);
            text_adds(out, "}");
        } else if (!strcmp(key, "required")) {
            write_names(out, value);
        } else if (!strcmp(key, "type")) {
            text_adds(out, "type:");
            json_t *upper = json_is_array(value) ? json_array() : NULL;
            size_t count_types = upper ? json_array_size(value) : 1;
            for (size_t k = 0; k < count_types; k++) {
                Text name = {0};
                text_add(&name, "", 0);
                text_add_upper(&name, json_slice(upper ? json_array_get(value, k) : value));
                if (upper)
                    json_array_append_new(upper, json_stringn(name.bytes, name.size));
                else
                    write_quoted(out, (Slice){name.bytes, name.size});
                text_free(&name);
            }
            if (upper) value_write(out, upper, true);
            json_decref(upper);
        } else {
            text_addf(out, "%s:", key);
            value_write(out, value, true);
        }
    }
    text_adds(out, "}");
    free_entries(entries, count);
}

static void write_property(Text *out, const char *name, const json_t *schema) {
    bool first = true;
    const json_t *description = json_object_get(schema, "description"),
                 *items = json_object_get(schema, "items");
    const json_t *properties = json_object_get(schema, "properties"),
                 *required = json_object_get(schema, "required");
    text_addf(out, "%s:{", name);
    if (json_truth(description)) {
        separate(out, &first);
        text_adds(out, "description:");
        write_quoted(out, json_slice(description));
    }
    if (type_is(schema, "STRING") && json_truth(json_object_get(schema, "enum"))) {
        separate(out, &first);
        text_adds(out, "enum:");
        value_write(out, json_object_get(schema, "enum"), true);
    } else if (type_is(schema, "ARRAY") && json_is_object(items) && json_object_size(items)) {
        separate(out, &first);
        write_items(out, items);
    }
    if (json_truth(json_object_get(schema, "nullable"))) {
        separate(out, &first);
        text_adds(out, "nullable:true");
    }
    if (type_is(schema, "OBJECT")) {
        separate(out, &first);
        text_adds(out, "properties:{");
        if (json_is_object(properties))
            write_properties(out, properties, false);
        else
            write_properties(out, schema, true);
        text_adds(out, "}");
        if (json_truth(required)) {
            separate(out, &first);
            write_names(out, required);
        }
    }
    separate(out, &first);
    text_adds(out, "type:" QUOTE);
    add_type(out, json_object_get(schema, "type"));
    text_adds(out, QUOTE "}");
}

/* own_keys: `properties` is itself a schema whose remaining keys are written as if they were
 * properties. */
static void write_properties(Text *out, const json_t *properties, bool own_keys) {
    static const char *const standard[] = {"description", "type", "properties", "required",
                                           "nullable"};
    size_t count;
    bool first = true;
    Entry *entries = sorted_entries(properties, &count);
    for (size_t i = 0; i < count; i++) {
        bool skip = false;
        for (size_t k = 0; own_keys && k < sizeof standard / sizeof *standard; k++)
            skip |= !strcmp(entries[i].key, standard[k]);
        if (skip) continue;
        separate(out, &first);
        write_property(out, entries[i].key, entries[i].value);
    }
    free_entries(entries, count);
}

void declaration_write(Text *out, const json_t *tool) {
    const json_t *function = json_object_get(tool, "function"),
                 *description = json_object_get(function, "description");
    const json_t *parameters = json_object_get(function, "parameters"),
                 *response = json_object_get(function, "response");
    Slice name = json_slice(json_object_get(function, "name"));
    text_adds(out, "declaration:");
    text_add(out, name.bytes, name.size);
    text_adds(out, "{description:");
    write_quoted(out, json_is_null(description) ? slice_of("None") : json_slice(description));
    if (json_truth(parameters)) {
        const json_t *properties = json_object_get(parameters, "properties");
        const json_t *required = json_object_get(parameters, "required"),
                     *type = json_object_get(parameters, "type");
        text_adds(out, ",parameters:{");
        if (json_truth(properties)) {
            text_adds(out, "properties:{");
            write_properties(out, properties, false);
            text_adds(out, "},");
        }
        if (json_truth(required)) {
            write_names(out, required);
            text_adds(out, ",");
        }
        if (json_truth(type)) { /* without a type the closing brace is missing, as released */
            text_adds(out, "type:" QUOTE);
            add_type(out, type);
            text_adds(out, QUOTE "}");
        }
    }
    if (response) {
        text_adds(out, ",response:{");
        if (json_truth(json_object_get(response, "description"))) {
            text_adds(out, "description:");
            write_quoted(out, json_slice(json_object_get(response, "description")));
            text_adds(out, ",");
        }
        if (type_is(response, "OBJECT")) text_adds(out, "type:" QUOTE "OBJECT" QUOTE "}");
    }
    text_adds(out, "}");
}
