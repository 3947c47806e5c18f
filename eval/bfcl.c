/* bfcl.c - Python's types and equality over JSON, and the checker's steps in its order. */
#include "eval/bfcl.h"

#include <stdio.h>
#include <string.h>

typedef enum Type { NO_TYPE, STRING, INTEGER, FLOAT, BOOLEAN, LIST, DICT, NONE } Type;

static Type type_of(const json_t *value) {
    return json_is_string(value)    ? STRING
           : json_is_integer(value) ? INTEGER
           : json_is_real(value)    ? FLOAT
           : json_is_boolean(value) ? BOOLEAN
           : json_is_array(value)   ? LIST
           : json_is_object(value)  ? DICT
                                    : NONE;
}

/* The type that a declaration's word stands for. */
static Type declared(const char *word) {
    static const struct {
        const char *word;
        Type type;
    } types[] = {{"string", STRING}, {"integer", INTEGER}, {"float", FLOAT}, {"boolean", BOOLEAN},
                 {"array", LIST},    {"tuple", LIST},      {"dict", DICT},   {"any", STRING}};
    for (size_t i = 0; word && i < sizeof types / sizeof *types; i++)
        if (!strcmp(word, types[i].word)) return types[i].type;
    return NO_TYPE;
}

static double number_of(const json_t *value) {
    return json_is_boolean(value) ? json_is_true(value) : json_number_value(value);
}

/* Python's ==: numbers and truth values by value. */
static bool equal(const json_t *a, const json_t *b) {
    bool numbers =
        (json_is_number(a) || json_is_boolean(a)) && (json_is_number(b) || json_is_boolean(b));
    size_t i;
    json_t *item;
    const char *key;
    if (numbers) return number_of(a) == number_of(b);
    if (type_of(a) != type_of(b)) return false;
    if (json_is_array(a)) {
        if (json_array_size(a) != json_array_size(b)) return false;
        json_array_foreach(a, i, item) if (!equal(item, json_array_get(b, i))) return false;
        return true;
    }
    if (json_is_object(a)) {
        if (json_object_size(a) != json_object_size(b)) return false;
        json_object_foreach((json_t *)a, key, item) {
            const json_t *other = json_object_get(b, key);
            if (!other || !equal(item, other)) return false;
        }
        return true;
    }
    return json_equal(a, b);
}

/* Strings are compared without case and some punctuation; other values as they are. Caller decrefs.
 */
static json_t *standard(const json_t *value) {
    if (!json_is_string(value)) return json_incref((json_t *)value);
    Text lower = {0}, out = {0};
    text_add_lower(&lower, json_slice(value));
    text_add(&out, "", 0);
    for (size_t i = 0; i < lower.size; i++)
        if (!strchr(" ,./-_*^", lower.bytes[i]))
            text_add(&out, lower.bytes[i] == '\'' ? "\"" : lower.bytes + i, 1);
    json_t *string = json_stringn(out.bytes, out.size);
    text_free(&lower);
    text_free(&out);
    return string;
}

/* Whether a value equals one of a list, strings by their standard form. */
static bool among(const json_t *value, const json_t *accepted) {
    json_t *mine = standard(value), *item;
    size_t i;
    bool found = false;
    json_array_foreach(accepted, i, item) {
        json_t *other = standard(item);
        found |= equal(mine, other);
        json_decref(other);
    }
    json_decref(mine);
    return found;
}

static bool has_empty(const json_t *accepted) {
    size_t i;
    json_t *item;
    json_array_foreach(accepted, i,
                       item) if (json_is_string(item) && !json_string_length(item)) return true;
    return false;
}

/* ---- types ---- */

/* The type of the first accepted value that is not the mark of an optional one. */
static Type accepted_type(const json_t *accepted) {
    size_t i;
    json_t *item;
    json_array_foreach(accepted, i, item) if (!json_is_string(item) ||
                                              json_string_length(item)) return type_of(item);
    return NO_TYPE;
}

/* Whether a value's type will do: the declared one, or that of the accepted values (a variable's
 * name, say). *variable: it is not of the declared kind. */
static bool type_fits(const json_t *value, const json_t *accepted, Type expected, Type nested,
                      bool *variable) {
    Type given = accepted_type(accepted);
    size_t i, k;
    json_t *item, *inner;
    bool ignored;
    *variable = given != NO_TYPE && given != expected;
    if (type_of(value) == expected) {
        if (nested == NO_TYPE) return true;
        json_array_foreach(accepted, i, item) {
            bool fits = true;
            if (json_is_array(item))
                json_array_foreach(value, k, inner) fits =
                    fits && type_fits(inner, item, nested, NO_TYPE, &ignored);
            if (fits) return true;
        }
        return false;
    }
    if (given == NO_TYPE || type_of(value) != given) return false;
    *variable = true;
    return true;
}

/* ---- values ---- */

static bool dict_fits(const json_t *value, const json_t *accepted) {
    size_t i;
    json_t *answer, *item;
    const char *key;
    json_array_foreach(accepted, i, answer) {
        bool fits = true;
        if (!json_is_object(answer)) continue; /* the mark of an optional value */
        json_object_foreach((json_t *)value, key, item) {
            const json_t *values = json_object_get(answer, key);
            fits = fits && values && among(item, values);
        }
        json_object_foreach(answer, key, item) fits =
            fits && (json_object_get(value, key) || has_empty(item));
        if (fits) return true;
    }
    return false;
}

static bool dicts_fit(const json_t *value, const json_t *accepted) {
    size_t i, k;
    json_t *answer, *item;
    json_array_foreach(accepted, i, answer) {
        bool fits = json_array_size(value) == json_array_size(answer);
        if (!json_is_array(answer)) continue;
        json_array_foreach(value, k, item) {
            if (!fits) break;
            json_t *one = json_pack("[O]", json_array_get(answer, k));
            fits = json_is_object(item) && dict_fits(item, one);
            json_decref(one);
        }
        if (fits) return true;
    }
    return false;
}

/* Lists item by item; an optional value's mark counts as a list of its characters, that is none. */
static bool list_fits(const json_t *value, const json_t *accepted) {
    size_t i, k;
    json_t *answer, *item;
    json_array_foreach(accepted, i, answer) {
        bool empty = json_is_string(answer) && !json_string_length(answer);
        bool fits = json_array_size(value) == (empty ? 0 : json_array_size(answer)) &&
                    (empty || json_is_array(answer));
        json_array_foreach(value, k, item) {
            if (!fits) break;
            json_t *one = json_pack("[O]", json_array_get(answer, k));
            fits = among(item, one);
            json_decref(one);
        }
        if (fits) return true;
    }
    return false;
}

static bool plain_among(const json_t *value, const json_t *accepted) {
    size_t i;
    json_t *item;
    json_array_foreach(accepted, i, item) if (equal(value, item)) return true;
    return false;
}

static bool value_fits(const json_t *value, const json_t *details, const json_t *accepted) {
    const char *word = json_string_value(json_object_get(details, "type"));
    Type expected = declared(word), nested = NO_TYPE;
    bool variable;
    if (expected == LIST)
        nested =
            declared(json_string_value(json_object_get(json_object_get(details, "items"), "type")));
    json_t *number = NULL;
    if (expected == FLOAT && json_is_integer(value)) /* whole numbers pass for others */
        value = number = json_real((double)json_integer_value(value));
    bool fits = type_fits(value, accepted, expected, nested, &variable);
    if (fits) {
        if (variable)
            fits = plain_among(value, accepted);
        else if (expected == DICT)
            fits = dict_fits(value, accepted);
        else if (expected == LIST && nested == DICT)
            fits = dicts_fit(value, accepted);
        else if (expected == STRING)
            fits = among(value, accepted);
        else if (expected == LIST)
            fits = list_fits(value, accepted);
        else
            fits = plain_among(value, accepted);
    }
    json_decref(number);
    return fits;
}

/* ---- calls ---- */

static const json_t *find_function(const json_t *functions, const char *name) {
    size_t i;
    json_t *function;
    json_array_foreach(functions, i, function) {
        const char *mine = json_string_value(json_object_get(function, "name"));
        if (mine && !strcmp(mine, name)) return function;
    }
    return NULL;
}

/* A name as it is, or with its dots written as underscores. */
static const json_t *arguments_of(const json_t *call, const char *name) {
    char other[256];
    const json_t *arguments = json_object_get(call, name);
    snprintf(other, sizeof other, "%s", name);
    for (char *c = other; *c; c++)
        if (*c == '.') *c = '_';
    return arguments ? arguments : json_object_get(call, other);
}

static bool call_fits(const json_t *call, const json_t *truth, const json_t *functions) {
    const char *name = json_object_iter_key(json_object_iter((json_t *)truth)), *key;
    const json_t *accepted = json_object_get(truth, name),
                 *function = name ? find_function(functions, name) : NULL,
                 *parameters = json_object_get(function, "parameters"),
                 *details = json_object_get(parameters, "properties"),
                 *arguments = name ? arguments_of(call, name) : NULL;
    size_t i;
    json_t *value;
    if (!function || !json_is_object(arguments)) return false;
    json_array_foreach(
        json_object_get(parameters, "required"), i,
        value) if (!json_object_get(arguments, json_string_value(value))) return false;
    json_object_foreach((json_t *)arguments, key, value) {
        const json_t *detail = json_object_get(details, key),
                     *values = json_object_get(accepted, key);
        if (!detail || !values || !value_fits(value, detail, values)) return false;
    }
    json_object_foreach((json_t *)accepted, key, value) if (!json_object_get(arguments, key) &&
                                                            !has_empty(value)) return false;
    return true;
}

bool bfcl_accepts(const json_t *calls, const json_t *ground_truth, const json_t *functions) {
    size_t n = json_array_size(calls);
    bool used[n + 1];
    if (!ground_truth) return n == 0;
    if (n != json_array_size(ground_truth)) return false;
    memset(used, 0, sizeof used);
    for (size_t i = 0; i < n; i++) {
        size_t k = 0;
        while (k < n && (used[k] || !call_fits(json_array_get(calls, k),
                                               json_array_get(ground_truth, i), functions)))
            k++;
        if (k == n) return false;
        used[k] = true;
    }
    return true;
}

/* ---- declarations ---- */

static void rename_types(json_t *schema) {
    static const char *const names[][2] = {
        {"dict", "object"}, {"float", "number"}, {"tuple", "array"}, {"any", "string"}};
    const char *type = json_string_value(json_object_get(schema, "type")), *key;
    json_t *value;
    for (size_t i = 0; type && i < 4; i++)
        if (!strcmp(type, names[i][0])) {
            json_object_set_new(schema, "type", json_string(names[i][1]));
            break;
        }
    json_object_foreach(json_object_get(schema, "properties"), key, value) rename_types(value);
    if (json_object_get(schema, "items")) rename_types(json_object_get(schema, "items"));
}

json_t *bfcl_tool(const json_t *function) {
    json_t *copy = json_deep_copy(function);
    rename_types(json_object_get(copy, "parameters"));
    return json_pack("{s:s, s:o}", "type", "function", "function", copy);
}
