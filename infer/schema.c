/* schema.c - the rules of a JSON schema. */
#include "infer/schema.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#define SCHEMA_MAX 64   /* levels of a schema */
#define ITEMS_MAX  4096 /* of a list whose length is bounded */

typedef struct Builder {
    Grammar *g;
    const json_t *root_schema; /* where $ref points into */
    json_t *refs;              /* {ref: rule} */
    const Tokenizer *tokenizer;
    bool gemma; /* the chat format's notation, else JSON */
    int32_t space, string, number, integer, value, object, array;
    int depth;
} Builder;

/* The set of the bytes of a text. */
static Element any_of(const char *set) {
    Element e = {.kind = ELEMENT_BYTES};
    for (; *set; set++) e.bytes[(uint8_t)*set >> 5] |= 1u << ((uint8_t)*set & 31);
    return e;
}

/* The bytes first..255 but those of a text. */
static Element from_but(int first, const char *but) {
    Element e = {.kind = ELEMENT_BYTES}, not = any_of(but);
    for (int c = first; c < 256; c++) e.bytes[c >> 5] |= 1u << (c & 31);
    for (int i = 0; i < 8; i++) e.bytes[i] &= ~not .bytes[i];
    return e;
}

/* Adds an alternative. In `form` a space is where JSON may have white space, %r a rule, %s a text,
 * %b one of the bytes of a text, %e an Element (a pointer), %m a mark; all else is itself. */
static void alternative(Builder *b, int32_t rule, const char *form, ...) {
    Element *list = NULL;
    int count = 0;
    va_list args;
    va_start(args, form);
    for (; *form; form++) {
        const char *text = (char[]){*form, 0};
        Element e = any_of(text);
        size_t room = 1;
        bool spelled = false;
        if (*form == ' ') {
            if (b->gemma) continue;
            e = (Element){.kind = ELEMENT_RULE, .value = b->space};
        } else if (*form == '%') {
            switch (*++form) {
            case 'r':
                e = (Element){.kind = ELEMENT_RULE, .value = va_arg(args, int32_t)};
                break;
            case 'b':
                e = any_of(va_arg(args, const char *));
                break;
            case 'e':
                e = *va_arg(args, const Element *);
                break;
            case 'm':
                e = (Element){.kind = ELEMENT_TOKEN,
                              .value = tokenizer_find(b->tokenizer, va_arg(args, const char *))};
                break;
            default:
                text = va_arg(args, const char *);
                room = strlen(text);
                spelled = true;
            }
        }
        list = must_realloc(list, ((size_t)count + room + 1) * sizeof *list);
        if (!spelled) list[count++] = e;
        for (; spelled && *text; text++) list[count++] = any_of((char[]){*text, 0});
    }
    va_end(args);
    grammar_alternative(b->g, rule, list, count);
    free(list);
}

static int32_t optional_rule(Builder *b, int32_t inner) {
    int32_t rule = grammar_rule(b->g);
    alternative(b, rule, "%r", inner);
    alternative(b, rule, "");
    return rule;
}

static int32_t repeat_rule(Builder *b, const Element *e) {
    int32_t rule = grammar_rule(b->g);
    alternative(b, rule, "%e%r", e, rule);
    alternative(b, rule, "");
    return rule;
}

/* ---- strings and numbers ---- */

/* What is within JSON's quotes: anything but controls, quotes and backslashes, and escapes. */
static int32_t characters_rule(Builder *b) {
    int32_t rule = grammar_rule(b->g);
    Element plain = from_but(0x20, "\"\\"), hex = any_of("0123456789abcdefABCDEF");
    alternative(b, rule, "%e%r", &plain, rule);
    alternative(b, rule, "\\%b%r", "\"\\/bfnrt", rule);
    alternative(b, rule, "\\u%e%e%e%e%r", &hex, &hex, &hex, &hex, rule);
    alternative(b, rule, "");
    return rule;
}

static int32_t string_rule(Builder *b) {
    int32_t rule = grammar_rule(b->g);
    Element any = from_but(0, "");
    if (b->gemma)
        alternative(b, rule, "%m%r%m", "<|\"|>", repeat_rule(b, &any), "<|\"|>");
    else
        alternative(b, rule, "\"%r\"", characters_rule(b));
    return rule;
}

/* -?(0|[1-9][0-9]*) and, unless whole, (.[0-9]+)?([eE][+-]?[0-9]+)? */
static int32_t number_rule(Builder *b, bool whole) {
    static const char *const figures = "0123456789";
    Grammar *g = b->g;
    Element digit = any_of(figures);
    int32_t digits = repeat_rule(b, &digit), rule = grammar_rule(g), size = grammar_rule(g),
            part = grammar_rule(g), power = grammar_rule(g), sign = grammar_rule(g);
    alternative(b, size, "0");
    alternative(b, size, "%b%r", figures + 1, digits);
    alternative(b, part, ".%e%r", &digit, digits);
    alternative(b, sign, "%b", "+-");
    alternative(b, sign, "");
    alternative(b, power, "%b%r%e%r", "eE", sign, &digit, digits);
    part = optional_rule(b, part);
    power = optional_rule(b, power);
    alternative(b, rule, whole ? "%r" : "%r%r%r", size, part, power);
    alternative(b, rule, whole ? "-%r" : "-%r%r%r", size, part, power);
    return rule;
}

/* ---- lists and objects ---- */

/* [item, item...], of `least` to `most` of them; most < 0: any number. */
static int32_t list_rule(Builder *b, int32_t item, int64_t least, int64_t most) {
    int32_t rule = grammar_rule(b->g), more = grammar_rule(b->g);
    int64_t first = least ? least : 1;
    alternative(b, more, "");
    if (most < 0) alternative(b, more, ", %r%r", item, more);
    for (int64_t n = first; n < most; n++) {
        int32_t longer = grammar_rule(b->g);
        alternative(b, longer, "");
        alternative(b, longer, ", %r%r", item, more);
        more = longer;
    }
    for (int64_t n = 1; n < first; n++) {
        int32_t longer = grammar_rule(b->g);
        alternative(b, longer, ", %r%r", item, more);
        more = longer;
    }
    if (least == 0) alternative(b, rule, "[ ]");
    if (most) alternative(b, rule, "[ %r%r ]", item, more);
    return rule;
}

typedef struct Property {
    const char *key;
    int32_t rule;
    bool required;
} Property;

/* Properties i.. of an object; `first` when none was written yet. */
static int32_t properties_rule(Builder *b, const Property *p, int count, int i, bool first) {
    int32_t rule = grammar_rule(b->g);
    if (i == count) {
        alternative(b, rule, "");
        return rule;
    }
    int32_t rest = properties_rule(b, p, count, i + 1, false);
    Text key = {0};
    if (b->gemma)
        text_adds(&key, p[i].key);
    else
        text_add_json_string(&key, slice_of(p[i].key));
    alternative(b, rule, first ? "%s: %r%r" : ", %s: %r%r", key.bytes, p[i].rule, rest);
    if (!p[i].required)
        alternative(b, rule, "%r", first ? properties_rule(b, p, count, i + 1, true) : rest);
    text_free(&key);
    return rule;
}

/* An object of any keys, its values by a rule. */
static int32_t map_rule(Builder *b, int32_t value) {
    Grammar *g = b->g;
    int32_t key = b->string, pair = grammar_rule(g), more = grammar_rule(g), rule = grammar_rule(g);
    if (b->gemma) {
        Element letter = from_but('!', ":,{}[]<>\"|");
        key = grammar_rule(g);
        alternative(b, key, "%e%r", &letter, repeat_rule(b, &letter));
    }
    alternative(b, pair, "%r: %r", key, value);
    alternative(b, more, ", %r%r", pair, more);
    alternative(b, more, "");
    alternative(b, rule, "{ }");
    alternative(b, rule, "{ %r%r }", pair, more);
    return rule;
}

/* ---- schemas ---- */

static Status schema_rule(Builder *b, const json_t *schema, int32_t *rule);

static void constant_alternative(Builder *b, int32_t rule, const json_t *value) {
    Text text = {0};
    if (b->gemma && json_is_string(value)) {
        alternative(b, rule, "%m%s%m", "<|\"|>", json_string_value(value), "<|\"|>");
    } else {
        text_add_json(&text, value);
        alternative(b, rule, "%s", text.bytes);
    }
    text_free(&text);
}

static int by_key(const void *a, const void *b) {
    return strcasecmp(((const Property *)a)->key, ((const Property *)b)->key);
}

static bool is_listed(const json_t *names, const char *key) {
    size_t i;
    json_t *name;
    json_array_foreach(names, i, name) {
        if (json_is_string(name) && !strcmp(json_string_value(name), key)) return true;
    }
    return false;
}

static Status object_rule(Builder *b, const json_t *schema, int32_t *rule) {
    json_t *properties = json_object_get(schema, "properties"),
           *required = json_object_get(schema, "required"),
           *others = json_object_get(schema, "additionalProperties"), *value;
    int count = 0;
    const char *key;
    size_t i;
    json_array_foreach(required, i, value) {
        if (!json_is_string(value) || !json_object_get(properties, json_string_value(value)))
            FAIL(ERR_CONFIG, "the schema requires '%s', which it does not describe",
                 json_is_string(value) ? json_string_value(value) : "");
    }
    if (!json_object_size(properties)) {
        int32_t each = b->value;
        if (json_is_object(others)) TRY(schema_rule(b, others, &each));
        *rule = json_is_false(others) ? grammar_rule(b->g) : map_rule(b, each);
        if (json_is_false(others)) alternative(b, *rule, "{ }");
        return OK;
    }
    Property *list = must_calloc(json_object_size(properties), sizeof *list);
    Status status = OK;
    json_object_foreach(properties, key, value) {
        list[count] = (Property){.key = key, .required = is_listed(required, key)};
        status = schema_rule(b, value, &list[count++].rule);
        if (status != OK) break;
    }
    if (status == OK) {
        if (b->gemma) qsort(list, (size_t)count, sizeof *list, by_key); /* as templates do */
        *rule = grammar_rule(b->g);
        alternative(b, *rule, "{ %r }", properties_rule(b, list, count, 0, true));
    }
    free(list);
    return status;
}

static Status array_rule(Builder *b, const json_t *schema, int32_t *rule) {
    const json_t *items = json_object_get(schema, "items"),
                 *least = json_object_get(schema, "minItems"),
                 *most = json_object_get(schema, "maxItems");
    int32_t item = b->value;
    if (json_is_object(items)) TRY(schema_rule(b, items, &item));
    int64_t low = json_integer_value(least), high = most ? json_integer_value(most) : -1;
    if (low < 0 || low > ITEMS_MAX || high > ITEMS_MAX || (most && high < low))
        FAIL(ERR_CONFIG, "the schema's minItems and maxItems are not 0 to %d, in order", ITEMS_MAX);
    *rule = list_rule(b, item, low, high);
    return OK;
}

static Status type_rule(Builder *b, const json_t *schema, const char *type, int32_t *rule) {
    if (!strcasecmp(type, "string")) {
        *rule = b->string;
    } else if (!strcasecmp(type, "integer")) {
        *rule = b->integer;
    } else if (!strcasecmp(type, "number")) {
        *rule = b->number;
    } else if (!strcasecmp(type, "boolean")) {
        *rule = grammar_rule(b->g);
        alternative(b, *rule, "true");
        alternative(b, *rule, "false");
    } else if (!strcasecmp(type, "null")) {
        *rule = grammar_rule(b->g);
        alternative(b, *rule, "null");
    } else if (!strcasecmp(type, "array")) {
        return array_rule(b, schema, rule);
    } else if (!strcasecmp(type, "object")) {
        return object_rule(b, schema, rule);
    } else {
        FAIL(ERR_CONFIG, "the schema's type '%s' is not understood", type);
    }
    return OK;
}

/* What a $ref of the form #/a/b points to. */
static Status ref_rule(Builder *b, const char *ref, int32_t *rule) {
    const json_t *known = json_object_get(b->refs, ref), *at = b->root_schema;
    if (known) {
        *rule = (int32_t)json_integer_value(known);
        return OK;
    }
    if (*ref != '#') FAIL(ERR_CONFIG, "the schema's $ref '%s' points elsewhere", ref);
    for (const char *c = ref + 1; *c == '/' && at;) {
        size_t n = strcspn(c + 1, "/");
        char key[256];
        snprintf(key, sizeof key, "%.*s", (int)n, c + 1);
        at = json_object_get(at, key);
        c += n + 1;
    }
    if (!at) FAIL(ERR_CONFIG, "the schema's $ref '%s' points to nothing", ref);
    *rule = grammar_rule(b->g); /* known before it is made: it may refer to itself */
    json_object_set_new(b->refs, ref, json_integer(*rule));
    int32_t inner;
    TRY(schema_rule(b, at, &inner));
    alternative(b, *rule, "%r", inner);
    return OK;
}

/* One of several schemas. */
static Status choices_rule(Builder *b, const json_t *list, int32_t *rule) {
    size_t i;
    json_t *one;
    int32_t inner;
    *rule = grammar_rule(b->g);
    json_array_foreach(list, i, one) {
        TRY(schema_rule(b, one, &inner));
        alternative(b, *rule, "%r", inner);
    }
    return OK;
}

/* Arguments of calls are held to shapes alone; an answer's schema is held to whole, or refused. */
static Status check_known(const Builder *b, const json_t *schema) {
    static const char *const unknown[] = {"pattern",
                                          "minLength",
                                          "maxLength",
                                          "minimum",
                                          "maximum",
                                          "multipleOf",
                                          "exclusiveMinimum",
                                          "exclusiveMaximum",
                                          "allOf",
                                          "not",
                                          "if",
                                          "minProperties",
                                          "maxProperties",
                                          "propertyNames",
                                          "prefixItems",
                                          "uniqueItems",
                                          "patternProperties",
                                          "contains",
                                          "dependentSchemas",
                                          "dependentRequired"};
    for (size_t k = 0; !b->gemma && k < sizeof unknown / sizeof *unknown; k++)
        if (json_object_get(schema, unknown[k]))
            FAIL(ERR_CONFIG, "the schema's '%s' is not understood", unknown[k]);
    return OK;
}

static Status schema_inner(Builder *b, const json_t *schema, int32_t *rule) {
    const json_t *type = json_object_get(schema, "type"), *any = json_object_get(schema, "anyOf"),
                 *values = json_object_get(schema, "enum"),
                 *constant = json_object_get(schema, "const");
    const char *ref = json_string_value(json_object_get(schema, "$ref"));
    json_t *value;
    size_t i;
    if (!any) any = json_object_get(schema, "oneOf");
    if (ref) return ref_rule(b, ref, rule);
    TRY(check_known(b, schema));
    if (constant || json_array_size(values)) {
        *rule = grammar_rule(b->g);
        if (constant) constant_alternative(b, *rule, constant);
        json_array_foreach(values, i, value) constant_alternative(b, *rule, value);
        return OK;
    }
    if (json_array_size(any)) return choices_rule(b, any, rule);
    if (json_array_size(type)) {
        *rule = grammar_rule(b->g);
        json_array_foreach(type, i, value) {
            const char *name = json_string_value(value);
            int32_t inner;
            TRY(type_rule(b, schema, name ? name : "", &inner));
            alternative(b, *rule, "%r", inner);
        }
        return OK;
    }
    if (json_is_string(type)) return type_rule(b, schema, json_string_value(type), rule);
    if (json_object_get(schema, "properties")) return object_rule(b, schema, rule);
    *rule = b->value;
    return OK;
}

static Status schema_rule(Builder *b, const json_t *schema, int32_t *rule) {
    if (++b->depth > SCHEMA_MAX) FAIL(ERR_CONFIG, "the schema is nested too deeply");
    Status status = OK;
    *rule = b->value;
    if (json_is_object(schema)) status = schema_inner(b, schema, rule);
    b->depth--;
    return status;
}

/* ---- grammars ---- */

/* The rules that all others stand on, in one notation. */
static void begin_notation(Builder *b, bool gemma) {
    static const char *const words[] = {"true", "false", "null"};
    b->gemma = gemma;
    b->string = string_rule(b);
    b->number = number_rule(b, false);
    b->integer = number_rule(b, true);
    b->value = grammar_rule(b->g);
    b->object = map_rule(b, b->value);
    b->array = list_rule(b, b->value, 0, -1);
    int32_t kinds[] = {b->string, b->number, b->object, b->array};
    for (int i = 0; i < 4; i++) alternative(b, b->value, "%r", kinds[i]);
    for (int i = 0; i < 3; i++) alternative(b, b->value, words[i]);
}

static void begin_build(Builder *b) {
    b->g = must_calloc(1, sizeof *b->g);
    b->refs = json_object();
    b->space = grammar_rule(b->g);
    alternative(b, b->space, "%b", " \n");
    alternative(b, b->space, "");
}

static Status end_build(Builder *b, Grammar **g, Status status, int32_t root) {
    json_decref(b->refs);
    if (status == OK) status = grammar_finish(b->g, root);
    if (status == OK)
        *g = b->g;
    else
        grammar_free(b->g);
    return status;
}

/* One call behind its mark, or all of an answer of calls. */
static Status calls_rule(Builder *b, const json_t *tools, const char *name, bool whole,
                         int32_t *rule) {
    size_t i;
    json_t *tool;
    int count = 0;
    begin_notation(b, true);
    int32_t call = grammar_rule(b->g), more = grammar_rule(b->g);
    json_array_foreach(tools, i, tool) {
        const json_t *function = json_object_get(tool, "function"),
                     *parameters = json_object_get(function, "parameters");
        const char *mine = json_string_value(json_object_get(function, "name"));
        int32_t arguments = b->object;
        if (!mine || (name && strcmp(mine, name))) continue;
        b->root_schema = parameters;
        json_object_clear(b->refs);
        if (json_object_size(parameters)) TRY(object_rule(b, parameters, &arguments));
        alternative(b, call, "call:%s%r%m", mine, arguments, "<tool_call|>");
        count++;
    }
    if (!count) FAIL(ERR_USAGE, "there is no function '%s'", name ? name : "");
    *rule = call;
    if (!whole) return OK;
    *rule = grammar_rule(b->g);
    alternative(b, more, "%m%r%r", "<|tool_call>", call, more);
    alternative(b, more, "");
    alternative(b, *rule, "%m%r%r", "<|tool_call>", call, more);
    return OK;
}

Status grammar_json(Grammar **g, const json_t *schema, const Tokenizer *t, const json_t *tools) {
    Builder b = {.root_schema = schema, .tokenizer = t};
    begin_build(&b);
    begin_notation(&b, false);
    int32_t root = grammar_rule(b.g), json = b.object, calls;
    Status status = schema ? schema_rule(&b, schema, &json) : OK;
    alternative(&b, root, "%r", json);
    if (status == OK && tools) {
        status = calls_rule(&b, tools, NULL, true, &calls);
        if (status == OK) alternative(&b, root, "%r", calls);
    }
    return end_build(&b, g, status, root);
}

Status grammar_calls(Grammar **g, const Tokenizer *t, const json_t *tools, const char *name,
                     bool whole) {
    Builder b = {.tokenizer = t};
    int32_t root = 0;
    begin_build(&b);
    Status status = calls_rule(&b, tools, name, whole, &root);
    return end_build(&b, g, status, root);
}
