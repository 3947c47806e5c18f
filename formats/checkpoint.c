/* checkpoint.c - stored names to parameters, and back. */
#include "formats/checkpoint.h"
#include "formats/companion.h"
#include "formats/file.h"
#include "formats/gguf_model.h"
#include "kernels/elementwise.h"
#include "kernels/quantize.h"

#include <inttypes.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#define CONFIG_MAX ((size_t)64 << 20)

static bool starts_with(const char *text, const char *prefix) {
    return !strncmp(text, prefix, strlen(prefix));
}

/* k_proj, v_proj, k_norm and v_norm of a layer that shares K and V. */
static bool is_dead(const ModelConfig *c, const char *name) {
    static const char *const parts[] = {"k_proj.weight", "v_proj.weight", "k_norm.weight",
                                        "v_norm.weight"};
    char pattern[128];
    const char *prefix = model_config_prefix(c);
    if (!starts_with(name, prefix)) return false;
    for (int l = model_config_kv_layers(c); l < c->num_hidden_layers; l++)
        for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
            snprintf(pattern, sizeof pattern, "layers.%d.self_attn.%s", l, parts[i]);
            if (!strcmp(name + strlen(prefix), pattern)) return true;
        }
    return false;
}

static bool is_tower(const char *name) {
    static const char *const prefixes[] = {"model.vision_tower.", "model.audio_tower.",
                                           "model.vision_embedder.", "model.embed_vision.",
                                           "model.embed_audio."};
    for (size_t i = 0; i < sizeof prefixes / sizeof *prefixes; i++)
        if (starts_with(name, prefixes[i])) return true;
    return false;
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const CheckpointTensor *)a)->stored->name,
                  ((const CheckpointTensor *)b)->stored->name);
}

static int by_stored_name(const void *a, const void *b) {
    return strcmp((*(StoredTensor *const *)a)->name, (*(StoredTensor *const *)b)->name);
}

static const CheckpointTensor *find_tensor(const Checkpoint *c, const char *name) {
    StoredTensor stored = {.name = (char *)name};
    CheckpointTensor key = {.stored = &stored};
    return bsearch(&key, c->tensors, (size_t)c->count, sizeof *c->tensors, by_name);
}

static Status add_file(Checkpoint *c, const char *name) {
    char *path = path_join(c->dir, name);
    c->files = must_realloc(c->files, (size_t)(c->file_count + 1) * sizeof *c->files);
    Status status = safetensors_open(&c->files[c->file_count], path);
    if (status == OK) c->file_count++;
    free(path);
    return status;
}

/* The files an index names, each opened once; every tensor must be where the index says. */
static Status open_index(Checkpoint *c, const char *path) {
    char *bytes = NULL;
    size_t size;
    json_t *root = NULL;
    Status status = OK;
    json_error_t error;
    TRY(file_read(&bytes, &size, path, CONFIG_MAX));
    root = json_loadb(bytes, size, 0, &error);
    json_t *map = json_object_get(root, "weight_map");
    if (!json_is_object(map)) FAIL_DONE(ERR_FORMAT, "%s: holds no weight_map", path);
    const char *name;
    json_t *file;
    json_object_foreach(map, name, file) {
        const char *shard = json_string_value(file);
        if (!shard || strchr(shard, '/'))
            FAIL_DONE(ERR_FORMAT, "%s: tensor '%s' names no file of the folder", path, name);
        int i = 0;
        while (i < c->file_count && strcmp(strrchr(c->files[i].path, '/') + 1, shard)) i++;
        if (i == c->file_count) TRY_DONE(add_file(c, shard));
        if (!safetensors_find(&c->files[i], name))
            FAIL_DONE(ERR_FORMAT, "%s: tensor '%s' is missing, the index promises it",
                      c->files[i].path, name);
    }
done:
    json_decref(root);
    free(bytes);
    return status;
}

static Status classify(Checkpoint *c) {
    Gemma names; /* declared for its names and shapes only */
    gemma_declare(&names, &c->config, BF16, device_cpu());
    gemma_declare_media(&names);
    Status status = OK;
    for (int i = 0; i < c->count; i++) {
        CheckpointTensor *t = &c->tensors[i];
        const char *name = t->stored->name;
        if (i && !strcmp(name, c->tensors[i - 1].stored->name))
            FAIL_DONE(ERR_FORMAT, "%s: tensor '%s' is also in %s", t->stored->file, name,
                      c->tensors[i - 1].stored->file);
        const Param *p = params_find(&names.params, name);
        if (p)
            t->role = p->tower ? ROLE_TOWER : ROLE_PARAM;
        else if (is_dead(&c->config, name))
            t->role = ROLE_DEAD;
        else if (is_tower(name))
            t->role = ROLE_TOWER;
        else if (!strcmp(name, "lm_head.weight"))
            t->role = ROLE_TIED;
        else if (c->config.assistant && !strcmp(name, TOKEN_ORDERING))
            t->role = ROLE_ORDER;
        else if (c->is_gguf && !strcmp(name, GGUF_ROPE_FREQS))
            t->role = ROLE_DERIVED;
        else
            FAIL_DONE(ERR_FORMAT, "%s: tensor '%s' is unknown to this model (%s)", t->stored->file,
                      name, c->config.model_type);
    }
    for (int i = 0; i < names.params.count; i++) {
        const Param *p = names.params.items[i];
        const CheckpointTensor *t = find_tensor(c, p->name);
        if (!t && p->tower) continue; /* missed where it is wanted */
        if (!t) FAIL_DONE(ERR_FORMAT, "%s: tensor '%s' is missing", c->dir, p->name);
        bool same = t->stored->ndim == p->value.ndim;
        for (int d = 0; same && d < p->value.ndim; d++)
            same = t->stored->shape[d] == p->value.shape[d];
        Tensor found = p->value;
        found.ndim = t->stored->ndim < 4 ? t->stored->ndim : 4;
        for (int d = 0; d < found.ndim; d++) found.shape[d] = t->stored->shape[d];
        if (!same)
            FAIL_DONE(ERR_FORMAT, "%s: tensor '%s' is %s, expected %s", t->stored->file, p->name,
                      tensor_text(found), tensor_text(p->value));
        bool matrix = p->value.ndim > 1 && dtype_is_packed(t->stored->dtype);
        if (t->stored->dtype != F32 && t->stored->dtype != BF16 && t->stored->dtype != F16 &&
            !matrix)
            FAIL_DONE(ERR_FORMAT, "%s: tensor '%s' is %s, expected BF16, F16 or F32",
                      t->stored->file, p->name, t->stored->dtype_text);
    }
    const CheckpointTensor *head = find_tensor(c, "lm_head.weight");
    if (head) {
        const StoredTensor *embedding = find_tensor(c, names.embed_tokens->name)->stored;
        if (!head->stored->bytes || head->stored->size != embedding->size ||
            memcmp(head->stored->bytes, embedding->bytes, embedding->size))
            FAIL_DONE(ERR_FORMAT, "%s: lm_head.weight differs from the embedding it is tied to",
                      head->stored->file);
    }
done:
    gemma_free(&names);
    return status;
}

static Status open_folder(Checkpoint *c) {
    char *index = path_join(c->dir, "model.safetensors.index.json");
    Status status = file_exists(index) ? open_index(c, index) : add_file(c, "model.safetensors");
    free(index);
    TRY(status);
    int count = 0;
    for (int i = 0; i < c->file_count; i++) count += c->files[i].count;
    const StoredTensor **stored = must_malloc((size_t)(count + 1) * sizeof *stored);
    for (int i = 0, n = 0; i < c->file_count; i++)
        for (int j = 0; j < c->files[i].count; j++) stored[n++] = &c->files[i].tensors[j];
    qsort(stored, (size_t)count, sizeof *stored, by_stored_name);
    status = parts_collect(&c->parts, stored, &count);
    c->tensors = must_calloc((size_t)(count + c->parts.count) + 1, sizeof *c->tensors);
    for (int i = 0; i < count; i++) c->tensors[c->count++].stored = stored[i];
    for (int i = 0; i < c->parts.count; i++) c->tensors[c->count++].stored = &c->parts.whole[i];
    free(stored);
    return status;
}

static Status open_gguf(Checkpoint *c) {
    const char *prefix = model_config_prefix(&c->config);
    TRY(gguf_open_model(&c->gguf, &c->towers.file, c->dir));
    if (c->towers.file.path) TRY(mmproj_read(&c->towers, &c->config));
    c->renamed = must_calloc((size_t)c->gguf.count + 1, sizeof *c->renamed);
    c->tensors = must_calloc((size_t)(c->gguf.count + c->towers.count) + 1, sizeof *c->tensors);
    for (int i = 0; i < c->gguf.count; i++) {
        char name[PARAM_NAME_MAX];
        c->renamed[i] = c->gguf.tensors[i];
        if (gguf_name_from(name, sizeof name, c->gguf.tensors[i].name, prefix))
            c->renamed[i].name = must_strdup(name);
        else /* its own name says what it is, or that it is unknown */
            c->renamed[i].name = must_strdup(c->gguf.tensors[i].name);
        c->tensors[c->count++].stored = &c->renamed[i];
    }
    for (int i = 0; i < c->towers.count; i++) c->tensors[c->count++].stored = &c->towers.tensors[i];
    return OK;
}

Status checkpoint_open(Checkpoint *c, const char *dir) {
    *c = (Checkpoint){.dir = must_strdup(dir), .is_gguf = gguf_is_model(dir)};
    Status status = OK;
    char *config = companion_path(dir, "config.json"), *bytes = NULL;
    size_t size;
    TRY_DONE(companion_read(&bytes, &size, dir, "config.json"));
    TRY_DONE(model_config_parse(&c->config, bytes, size, config));
    TRY_DONE(c->is_gguf ? open_gguf(c) : open_folder(c));
    qsort(c->tensors, (size_t)c->count, sizeof *c->tensors, by_name);
    TRY_DONE(classify(c));
done:
    free(config);
    free(bytes);
    if (status != OK) checkpoint_close(c);
    return status;
}

Status checkpoint_describe(Checkpoint *c, const char *dir) {
    char *config = path_join(dir, "config.json"),
         *index = path_join(dir, "model.safetensors.index.json"),
         *one = path_join(dir, "model.safetensors"), *bytes = NULL;
    size_t size;
    Status status = OK;
    if (gguf_is_model(dir) || file_exists(index) || file_exists(one)) {
        status = checkpoint_open(c, dir);
        goto done;
    }
    *c = (Checkpoint){.dir = must_strdup(dir)};
    TRY_DONE(file_read(&bytes, &size, config, CONFIG_MAX));
    TRY_DONE(model_config_parse(&c->config, bytes, size, config));
done:
    free(config), free(index), free(one), free(bytes);
    return status;
}

void checkpoint_close(Checkpoint *c) {
    for (int i = 0; i < c->file_count; i++) safetensors_close(&c->files[i]);
    for (int i = 0; c->renamed && i < c->gguf.count; i++) free(c->renamed[i].name);
    gguf_close(&c->gguf);
    mmproj_close(&c->towers);
    parts_free(&c->parts);
    free(c->renamed);
    free(c->files);
    free(c->tensors);
    free(c->dir);
    *c = (Checkpoint){0};
}

void checkpoint_formats(const Checkpoint *c, Gemma *g) {
    for (int i = 0; i < g->params.count; i++) {
        Param *p = g->params.items[i];
        if (p->adapter || p->trainable) continue;
        const CheckpointTensor *found = find_tensor(c, p->name);
        if (!found) continue; /* checkpoint_load says so */
        const StoredTensor *t = found->stored;
        int64_t cols = tensor_cols(p->value), rows = tensor_count(p->value) / cols;
        if (p->value.ndim == 1 && t->dtype == F32) p->value.dtype = F32;
        size_t element = dtype_is_packed(t->dtype) ? 2 : dtype_size(t->dtype);
        DType tiled = p->mapped ? t->dtype : dtype_tiled(t->dtype);
        if (!t->bytes || (uintptr_t)t->bytes % element) p->mapped = false;
        if (dtype_is_packed(t->dtype))
            p->value.dtype = dtype_fits(tiled, rows, cols) ? tiled : t->dtype;
    }
}

/* A dense tensor into a packed parameter: what cannot be scaled is refused. */
static Status quantize_stored(const StoredTensor *t, Tensor to) {
    Tensor from = to;
    bool finite = true;
    from.dtype = t->dtype;
    from.data = (void *)t->bytes;
    check_finite(&finite, from);
    if (!finite)
        FAIL(ERR_FORMAT, "%s: tensor '%s' holds infinities, NaN or numbers no scale reaches",
             t->file, t->name);
    quantize(to, from);
    return OK;
}

/* The values of a stored tensor in a packed dtype, made on the CPU. */
static Status fill_packed(const StoredTensor *t, Tensor to) {
    if (!dtype_is_packed(t->dtype)) return quantize_stored(t, to);
    Tensor from = to;
    from.dtype = t->dtype;
    from.data = (void *)t->bytes;
    repack(to, from);
    return OK;
}

/* The values of a stored tensor, in the parameter's dtype. */
static Status fill_param(const StoredTensor *t, Param *p) {
    Tensor host;
    if (!dtype_is_packed(p->value.dtype)) return stored_tensor_read(t, p->value);
    TRY(tensor_stage(&host, p->value));
    Status status = fill_packed(t, host);
    tensor_unstage(p->value, host, status != OK);
    return status;
}

/* The groups of experts of it that p has here. */
static StoredTensor stored_groups(const StoredTensor *t, const Param *p) {
    StoredTensor some = *t;
    if (!p->groups) return some;
    size_t group = t->size / (size_t)p->groups;
    some.bytes = t->bytes + (size_t)p->group * group;
    some.size = (size_t)p->value.shape[0] * group;
    some.shape[0] = p->value.shape[0];
    return some;
}

/* The same of a weight in parts, made whole first. */
static Status fill_from_parts(const StoredTensor *t, Param *p) {
    StoredTensor whole = *t;
    void *blocks = malloc(t->size);
    if (!blocks) FAIL(ERR_IO, "%s: out of memory for tensor '%s'", t->file, p->name);
    Status status = parts_read(t, blocks);
    whole.bytes = blocks;
    StoredTensor here = stored_groups(&whole, p);
    if (status == OK) status = fill_param(&here, p);
    free(blocks);
    return status;
}

static Status load_param(const StoredTensor *t, Param *p, Device *device) {
    if (p->mapped && !p->trainable) {
        p->value.dtype = t->dtype;
        p->value.data = (void *)t->bytes;
        device_pin(device, t->bytes, t->size);
        return OK;
    }
    if (t->parts) return fill_from_parts(t, p);
    StoredTensor here = stored_groups(t, p);
    TRY(fill_param(&here, p));
    stored_tensor_release(&here);
    return OK;
}

Status checkpoint_load(const Checkpoint *c, Gemma *g) {
    for (int i = 0; i < g->params.count; i++) {
        Param *p = g->params.items[i];
        if (p->adapter) continue;
        const CheckpointTensor *t = find_tensor(c, p->name);
        if (!t)
            FAIL(ERR_FORMAT,
                 "%s: tensor '%s' is missing; this checkpoint reads no pictures or sound", c->dir,
                 p->name);
        TRY(load_param(t->stored, p, g->device));
        param_adopt(&g->params, p);
    }
    gemma_loaded(g);
    return OK;
}

bool checkpoint_has_towers(const Checkpoint *c) {
    for (int i = 0; i < c->count; i++)
        if (c->tensors[i].role == ROLE_TOWER) return true;
    return false;
}

void checkpoint_release(const Checkpoint *c, const Param *p) {
    const CheckpointTensor *t = find_tensor(c, p->name);
    if (t && p->mapped) stored_tensor_release(t->stored);
}
