/* peft.c - the PEFT folder: adapter_config.json and adapter_model.safetensors.
 *
 * Keys are base_model.model.MODULE.lora_A.weight. Fused expert parameters are kept by peft as plain
 * linears over all experts, one wrapper around the other: A (E R, in) expert by expert, B (out, R
 * E) with the expert fastest; the inner wrapper's keys say base_layer. Which is which is told by
 * the shapes. */
#include "formats/adapter.h"
#include "formats/file.h"
#include "formats/learned_scales.h"
#include "formats/safetensors.h"

#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define KEY_PREFIX "base_model.model."
#define CONFIG_MAX ((size_t)16 << 20)

/* Settings that change what an adapter computes, and the value that means "not used". */
static bool is_neutral(const char *key, json_t *value) {
    static const char *const refused[] = {"layers_to_transform",
                                          "exclude_modules",
                                          "layer_replication",
                                          "use_qalora",
                                          "lora_bias",
                                          "fan_in_fan_out",
                                          "trainable_token_indices",
                                          "alora_invocation_tokens",
                                          "use_bdlora",
                                          "arrow_config",
                                          "kasa_config",
                                          "velora_config",
                                          "monteclora_config"};
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++)
        if (!strcmp(refused[i], key)) return !value || json_is_null(value) || json_is_false(value);
    return true;
}

static Status read_patterns(PatternValue **out, int *count, json_t *map, const char *path,
                            const char *key) {
    const char *pattern;
    json_t *value;
    if (map && !json_is_null(map) && !json_is_object(map))
        FAIL(ERR_FORMAT, "%s: %s is not a map", path, key);
    json_object_foreach(map, pattern, value) {
        if (!json_is_number(value) || json_number_value(value) <= 0)
            FAIL(ERR_FORMAT, "%s: %s of '%s' is not a positive number", path, key, pattern);
        *out = must_realloc(*out, (size_t)(*count + 1) * sizeof **out);
        (*out)[(*count)++] = (PatternValue){must_strdup(pattern), json_number_value(value)};
    }
    return OK;
}

static Status read_names(TextList *list, json_t *value, const char *path, const char *key) {
    size_t i;
    json_t *item;
    if (!value || json_is_null(value)) return OK;
    if (!json_is_array(value)) FAIL(ERR_FORMAT, "%s: %s is not a list", path, key);
    json_array_foreach(value, i, item) {
        if (!json_is_string(item))
            FAIL(ERR_FORMAT, "%s: %s holds something that is not a name", path, key);
        text_list_add(list, json_string_value(item));
    }
    return OK;
}

static Status read_spec(AdapterSpec *spec, json_t *root, const char *path) {
    const char *type = json_string_value(json_object_get(root, "peft_type")), *key;
    json_t *value;
    if (!type || strcmp(type, "LORA"))
        FAIL(ERR_FORMAT, "%s: peft_type is %s, expected LORA", path, type ? type : "absent");
    json_object_foreach(root, key, value) if (!is_neutral(key, value))
        FAIL(ERR_FORMAT, "%s: '%s' is set, which Lapidary does not apply", path, key);
    const char *bias = json_string_value(json_object_get(root, "bias"));
    if (bias && strcmp(bias, "none"))
        FAIL(ERR_FORMAT, "%s: bias is '%s', expected none", path, bias);
    json_t *rank = json_object_get(root, "r"), *alpha = json_object_get(root, "lora_alpha");
    if (!json_is_integer(rank) || json_integer_value(rank) < 1 || json_integer_value(rank) > 65536)
        FAIL(ERR_FORMAT, "%s: r is not a rank", path);
    if (!json_is_number(alpha)) FAIL(ERR_FORMAT, "%s: lora_alpha is not a number", path);
    spec->rank = json_integer_value(rank);
    spec->alpha = json_number_value(alpha);
    spec->dropout = json_number_value(json_object_get(root, "lora_dropout"));
    if (!(spec->dropout >= 0 && spec->dropout < 1))
        FAIL(ERR_FORMAT, "%s: lora_dropout is not in [0, 1)", path);
    spec->rslora = json_is_true(json_object_get(root, "use_rslora"));
    spec->dora = json_is_true(json_object_get(root, "use_dora"));
    json_t *targets = json_object_get(root, "target_modules");
    if (json_is_string(targets) && !strcmp(json_string_value(targets), "all-linear"))
        spec->target_pattern =
            must_strdup(".*(_proj|per_layer_input_gate|per_layer_projection|router\\.proj|"
                        "per_layer_model_projection)");
    else if (json_is_string(targets))
        spec->target_pattern = must_strdup(json_string_value(targets));
    else
        TRY(read_names(&spec->targets, targets, path, "target_modules"));
    TRY(read_names(&spec->parameters, json_object_get(root, "target_parameters"), path,
                   "target_parameters"));
    TRY(read_names(&spec->train_also, json_object_get(root, "modules_to_save"), path,
                   "modules_to_save"));
    TRY(read_patterns(&spec->rank_pattern, &spec->rank_patterns,
                      json_object_get(root, "rank_pattern"), path, "rank_pattern"));
    TRY(read_patterns(&spec->alpha_pattern, &spec->alpha_patterns,
                      json_object_get(root, "alpha_pattern"), path, "alpha_pattern"));
    const char *base = json_string_value(json_object_get(root, "base_model_name_or_path"));
    if (base) spec->base_model = must_strdup(base);
    return OK;
}

Status peft_load_spec(AdapterSpec *spec, const char *dir) {
    *spec = (AdapterSpec){0};
    char *path = path_join(dir, "adapter_config.json"), *bytes = NULL;
    size_t size;
    json_t *root = NULL;
    json_error_t error;
    Status status = OK;
    TRY_DONE(file_read(&bytes, &size, path, CONFIG_MAX));
    root = json_loadb(bytes, size, 0, &error);
    if (!json_is_object(root))
        FAIL_DONE(ERR_FORMAT, "%s:%d: is no JSON object: %s", path, error.line, error.text);
    TRY_DONE(read_spec(spec, root, path));
done:
    json_decref(root);
    free(bytes);
    free(path);
    if (status != OK) adapter_spec_free(spec);
    return status;
}

/* How one adapter parameter is stored. */
typedef struct Entry {
    Param *param;
    char key[2 * PARAM_NAME_MAX];
    int ndim;
    int64_t shape[4];
    int64_t experts, rank; /* of a fused B, whose stored order differs; experts 1 otherwise */
} Entry;

/* The module part of a linear's name in peft: fused parameters are named by their module. */
static void module_key(char *out, size_t size, const Gemma *g, const Linear *l, bool inner) {
    char name[PARAM_NAME_MAX];
    adapter_module_name(name, sizeof name, &g->config, l->name);
    char *dot = strrchr(name, '.');
    if (l->groups > 1) *dot = 0;
    snprintf(out, size, KEY_PREFIX "%s%s", name, inner ? ".base_layer" : "");
}

/* Lists what the file holds for this model. peft wraps gate_up_proj first, so it is the inner one
 * where both are adapted. */
static int list_entries(const Gemma *g, Entry *entries) {
    int count = 0;
    for (const Linear *l = g->linears.first; l; l = l->next) {
        if (!l->lora) continue;
        const Linear *sibling = l->next;
        bool inner = l->groups > 1 && sibling && sibling->groups > 1 && sibling->lora &&
                     strstr(l->name, "gate_up_proj");
        char module[PARAM_NAME_MAX + 64];
        module_key(module, sizeof module, g, l, inner);
        Param *parts[] = {l->lora->A, l->lora->B, l->lora->magnitude};
        static const char *const suffixes[] = {"lora_A.weight", "lora_B.weight",
                                               "lora_magnitude_vector"};
        int64_t E = linear_all_groups(l), R = l->lora->rank;
        int64_t shapes[3][2] = {{E * R, l->in}, {l->out, E * R}, {l->out, 0}};
        for (int i = 0; i < 3; i++) {
            if (!parts[i]) continue;
            Entry *e = &entries[count++];
            *e = (Entry){
                .param = parts[i], .ndim = i < 2 ? 2 : 1, .experts = i == 1 ? E : 1, .rank = R};
            e->shape[0] = shapes[i][0];
            e->shape[1] = shapes[i][1];
            snprintf(e->key, sizeof e->key, "%s.%s", module, suffixes[i]);
        }
    }
    for (int i = 0; i < g->params.count; i++) { /* train_also */
        Param *p = g->params.items[i];
        if (p->adapter || !p->trainable) continue;
        Entry *e = &entries[count++];
        *e = (Entry){.param = p, .ndim = p->value.ndim, .experts = 1};
        memcpy(e->shape, p->value.shape, sizeof e->shape);
        char name[PARAM_NAME_MAX];
        adapter_module_name(name, sizeof name, &g->config, p->name);
        snprintf(e->key, sizeof e->key, KEY_PREFIX "%s", name);
    }
    return count;
}

/* Stored (out, R, E) and ours (E, out, R): the expert moves to the front. */
static void reorder(float *to, const float *from, const Entry *e, bool storing) {
    int64_t E = e->experts, R = e->rank, out = e->shape[0];
    for (int64_t x = 0; x < E; x++)
        for (int64_t o = 0; o < out; o++)
            for (int64_t r = 0; r < R; r++) {
                int64_t ours = (x * out + o) * R + r, theirs = (o * R + r) * E + x;
                if (storing)
                    to[theirs] = from[ours];
                else
                    to[ours] = from[theirs];
            }
}

static Status read_entry(const Entry *e, const Safetensors *file) {
    const StoredTensor *t = safetensors_find(file, e->key);
    if (!t) FAIL(ERR_FORMAT, "%s: tensor '%s' is missing", file->path, e->key);
    bool same = t->ndim == e->ndim;
    for (int d = 0; same && d < e->ndim; d++) same = t->shape[d] == e->shape[d];
    if (!same)
        FAIL(ERR_FORMAT,
             "%s: tensor '%s' has another shape than this model's (%" PRId64 ", %" PRId64 ")",
             file->path, e->key, e->shape[0], e->shape[1]);
    Tensor value = e->param->value;
    if (e->param->trainable) value = e->param->master;
    if (e->experts == 1 && !e->param->groups) return stored_tensor_read(t, value);
    Tensor host, all = value; /* groups of all ranks */
    if (e->param->groups) all.shape[0] = e->param->groups;
    all.device = device_cpu();
    all.data = must_malloc(tensor_bytes(all));
    float *ours = must_malloc(tensor_bytes(all));
    Status status = stored_tensor_read(t, all);
    if (status == OK) status = tensor_stage(&host, value);
    if (status == OK) {
        if (e->experts > 1)
            reorder(ours, all.data, e, false);
        else
            memcpy(ours, all.data, tensor_bytes(all));
        int64_t before = e->param->group * (tensor_count(value) / value.shape[0]);
        memcpy(host.data, ours + before, tensor_bytes(value));
        tensor_unstage(value, host, false);
    }
    free(ours);
    free(all.data);
    return status;
}

Status peft_load(Gemma *g, const char *dir) {
    Safetensors file = {0};
    char *path = path_join(dir, "adapter_model.safetensors");
    Entry *entries = must_calloc((size_t)g->params.count, sizeof *entries);
    Status status = safetensors_open(&file, path);
    if (status != OK) goto done;
    int count = list_entries(g, entries);
    for (int i = 0; i < count; i++) TRY_DONE(read_entry(&entries[i], &file));
    for (int i = 0; i < file.count; i++) {
        int j = 0;
        while (j < count && strcmp(entries[j].key, file.tensors[i].name)) j++;
        if (j == count)
            FAIL_DONE(ERR_FORMAT, "%s: tensor '%s' belongs to nothing in this model", path,
                      file.tensors[i].name);
    }
    params_publish(&g->params);
done:
    safetensors_close(&file);
    free(entries);
    free(path);
    return status;
}

/* Where a linear is: its name in peft up to a layer's number, and from there on; or all of it. */
typedef struct Place {
    char before[PARAM_NAME_MAX], after[PARAM_NAME_MAX];
    int layer; /* -1: in none */
} Place;

static Place place_of(const Gemma *g, const Linear *l) {
    Place p = {.layer = -1};
    adapter_module_name(p.before, sizeof p.before, &g->config, l->name);
    char *number = strstr(p.before, ".layers."), *end;
    if (!number) return p;
    number += strlen(".layers.");
    p.layer = (int)strtol(number, &end, 10);
    snprintf(p.after, sizeof p.after, "%s", end);
    *number = 0;
    return p;
}

/* Writes a name as an expression that matches it. */
static void put_escaped(FILE *to, const char *name) {
    for (; *name; name++) fprintf(to, *name == '.' ? "\\%c" : "%c", *name);
}

/* An expression that matches exactly the adapted dense linears: for each place inside a layer the
 * layers it is adapted in, and by name what is in none. */
static char *exact_pattern(const Gemma *g) {
    int count = 0;
    char *pattern = NULL;
    size_t size;
    for (const Linear *l = g->linears.first; l; l = l->next) count += l->lora && l->groups == 1;
    Place *places = must_calloc((size_t)count + 1, sizeof *places);
    count = 0;
    for (const Linear *l = g->linears.first; l; l = l->next)
        if (l->lora && l->groups == 1) places[count++] = place_of(g, l);
    FILE *to = open_memstream(&pattern, &size);
    CHECK(to, "no memory for a pattern");
    for (int i = 0, written = 0; i < count; i++) {
        const Place *p = &places[i];
        if (!p->before[0]) continue; /* it went along with one like it */
        fputs(written++ ? "|" : "(", to);
        put_escaped(to, p->before);
        for (int k = i; p->layer >= 0 && k < count; k++) {
            if (strcmp(places[k].before, p->before) || strcmp(places[k].after, p->after)) continue;
            fprintf(to, "%s%d", k == i ? "(" : "|", places[k].layer);
            if (k != i) places[k].before[0] = 0;
        }
        if (p->layer >= 0) fputs(")", to);
        put_escaped(to, p->after);
    }
    fputs(count ? ")" : "()", to);
    fclose(to);
    free(places);
    return pattern;
}

static json_t *names_json(const TextList *list) {
    if (!list->count) return json_null();
    json_t *array = json_array();
    for (int i = 0; i < list->count; i++) json_array_append_new(array, json_string(list->items[i]));
    return array;
}

/* train_also as peft finds it: its modules are named otherwise where the checkpoint's are. */
static json_t *saved_modules(const Gemma *g, const AdapterSpec *spec) {
    json_t *list = names_json(&spec->train_also);
    for (size_t i = 0; i < json_array_size(list); i++) {
        char name[PARAM_NAME_MAX];
        adapter_module_name(name, sizeof name, &g->config, spec->train_also.items[i]);
        json_array_set_new(list, i, json_string(name));
    }
    return list;
}

static json_t *number_json(double value) {
    return value == floor(value) ? json_integer((json_int_t)value) : json_real(value);
}

static json_t *patterns_json(const PatternValue *patterns, int count) {
    json_t *map = json_object();
    for (int i = 0; i < count; i++)
        json_object_set_new(map, patterns[i].pattern, number_json(patterns[i].value));
    return map;
}

static Status write_config(const Gemma *g, const AdapterSpec *spec, const char *dir) {
    char *pattern = exact_pattern(g), *path = path_join(dir, "adapter_config.json");
    bool dense = !strstr(pattern, "()");
    json_t *root = json_pack(
        "{s:s, s:s, s:s?, s:b, s:b, s:I, s:o, s:f, s:s, s:b, s:b, s:b}", "peft_type", "LORA",
        "task_type", "CAUSAL_LM", "base_model_name_or_path", spec->base_model, "inference_mode", 1,
        "fan_in_fan_out", 0, "r", (json_int_t)spec->rank, "lora_alpha", number_json(spec->alpha),
        "lora_dropout", spec->dropout, "bias", "none", "use_rslora", spec->rslora, "use_dora",
        spec->dora, "init_lora_weights", 1);
    json_object_set_new(root, "target_modules", dense ? json_string(pattern) : json_array());
    json_object_set_new(root, "target_parameters", names_json(&spec->parameters));
    json_object_set_new(root, "modules_to_save", saved_modules(g, spec));
    json_object_set_new(root, "rank_pattern",
                        patterns_json(spec->rank_pattern, spec->rank_patterns));
    json_object_set_new(root, "alpha_pattern",
                        patterns_json(spec->alpha_pattern, spec->alpha_patterns));
    char *text = json_dumps(root, JSON_INDENT(2) | JSON_REAL_PRECISION(15));
    Status status = file_write(path, text, strlen(text));
    json_decref(root);
    free(text);
    free(path);
    free(pattern);
    return status;
}

static Status write_tensors(const Gemma *g, const char *dir) {
    SafetensorsWriter *w = NULL;
    Status status = OK;
    char *path = path_join(dir, "adapter_model.safetensors");
    Entry *entries = must_calloc((size_t)g->params.count, sizeof *entries);
    int count = list_entries(g, entries);
    TRY_DONE(safetensors_create(&w, path));
    for (int i = 0; i < count; i++)
        safetensors_declare(w, entries[i].key, "F32", entries[i].ndim, entries[i].shape,
                            (size_t)tensor_count(entries[i].param->value) * 4);
    TRY_DONE(safetensors_begin(w));
    for (int i = 0; i < count; i++) {
        const Entry *e = &entries[i];
        size_t size = (size_t)tensor_count(e->param->value) * 4;
        float *read = must_malloc(size), *copy = NULL;
        const float *values = tensor_host(e->param->master, read);
        if (e->experts > 1) {
            copy = must_malloc(size);
            reorder(copy, values, e, true);
        }
        status = safetensors_write(w, copy ? copy : values, size);
        free(read);
        free(copy);
        if (status != OK) goto done;
    }
    status = safetensors_commit(w);
    w = NULL;
done:
    safetensors_abandon(w);
    free(entries);
    free(path);
    return status;
}

Status peft_save(const Gemma *g, const AdapterSpec *spec, const char *dir) {
    char *temporary = NULL;
    Status status = OK;
    TRY(folder_begin(&temporary, dir));
    TRY_DONE(write_config(g, spec, temporary));
    TRY_DONE(write_tensors(g, temporary));
    TRY_DONE(learned_scales_save(g, temporary));
    status = folder_commit(temporary, dir);
    temporary = NULL;
done:
    folder_abandon(temporary);
    return status;
}
