/* params.c - naming and placing parameters. */
#include "model/params.h"
#include "configs/model_config.h"
#include "kernels/elementwise.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void params_init(ParamList *params, DType dtype, const char *prefix) {
    *params = (ParamList){.dtype = dtype};
    snprintf(params->path, sizeof params->path, "%s", prefix);
}

void params_free(ParamList *params) {
    for (int i = 0; i < params->count; i++) free(params->items[i]);
    free(params->items);
    free(params->derived);
    arena_free(&params->values);
    arena_free(&params->trained);
    *params = (ParamList){0};
}

void params_enter(ParamList *params, const char *format, ...) {
    size_t length = strlen(params->path);
    va_list arguments;
    va_start(arguments, format);
    int added = vsnprintf(params->path + length, sizeof params->path - length, format, arguments);
    va_end(arguments);
    CHECK(added > 0 && length + (size_t)added + 2 < sizeof params->path, "name too long: %s",
          params->path);
    strcat(params->path, ".");
}

void params_leave(ParamList *params) {
    size_t length = strlen(params->path) - 1;
    while (length && params->path[length - 1] != '.') length--;
    /* "layers.3." was entered as one step: a bare number leaves with its list. */
    if (length && params->path[length] >= '0' && params->path[length] <= '9') {
        length--;
        while (length && params->path[length - 1] != '.') length--;
    }
    params->path[length] = 0;
}

Param *params_add(ParamList *params, const char *name, int ndim, const int64_t *shape) {
    if (params->count == params->capacity) {
        params->capacity = params->capacity ? 2 * params->capacity : 256;
        params->items =
            must_realloc(params->items, (size_t)params->capacity * sizeof *params->items);
    }
    Param *p = must_calloc(1, sizeof *p);
    int length = snprintf(p->name, sizeof p->name, "%s%s", params->path, name);
    CHECK(length < PARAM_NAME_MAX, "name too long: %s%s", params->path, name);
    const char *layer = strstr(p->name, "layers.");
    p->tower = params->tower;
    p->layer = layer && !p->tower ? atoi(layer + strlen("layers.")) : -1;
    p->value = tensor_make(NULL, params->dtype, ndim, shape);
    p->grad = p->value; /* its shape; placed only where it is trained */
    p->grad.dtype = F32;
    p->grad.device = NULL;
    p->decay = true;
    params->items[params->count++] = p;
    return p;
}

Param *params_add_adapter(ParamList *params, const char *module, const char *name, int ndim,
                          const int64_t *shape) {
    char path[PARAM_NAME_MAX];
    memcpy(path, params->path, sizeof path);
    CHECK(snprintf(params->path, sizeof params->path, "%s.", module) < (int)sizeof params->path,
          "name too long: %s.%s", module, name);
    Param *p = params_add(params, name, ndim, shape);
    memcpy(params->path, path, sizeof path);
    p->value.dtype = F32;
    p->adapter = p->trainable = true;
    return p;
}

void params_add_derived(ParamList *params, Tensor *t) {
    params->derived = must_realloc(params->derived,
                                   (size_t)(params->derived_count + 1) * sizeof *params->derived);
    params->derived[params->derived_count++] = t;
}

Param *params_find(const ParamList *params, const char *name) {
    for (int i = 0; i < params->count; i++)
        if (!strcmp(params->items[i]->name, name)) return params->items[i];
    return NULL;
}

static bool in_space(const Param *p) {
    return p->trainable && p->value.dtype == F32;
}

static size_t aligned(size_t bytes) {
    return (bytes + 63) / 64 * 64;
}

int64_t param_span(const Param *p) {
    return (tensor_count(p->value) + DYNAMIC_BLOCK - 1) / DYNAMIC_BLOCK * DYNAMIC_BLOCK;
}

bool param_takes_blocks(const Param *p) {
    return p->value.ndim > 1 && !p->tower && !strstr(p->name, ".router.");
}

/* Whether the optimizer updates a value of f32. */
static bool has_master(const ParamList *params, const Param *p) {
    return p->trainable && (in_space(p) || !params->no_masters);
}

/* Values of gradients: of what is in no layer (or of everything), and the most that a layer has. */
static void gradient_space(const ParamList *params, int64_t *apart, int64_t *layer) {
    int64_t sums[LAYERS_MAX] = {0};
    *apart = *layer = 0;
    for (int i = 0; i < params->count; i++) {
        const Param *p = params->items[i];
        if (!p->trainable) continue;
        int64_t *sum = params->one_layer && p->layer >= 0 ? &sums[p->layer] : apart;
        *sum += param_span(p);
        if (sum != apart && *sum > *layer) *layer = *sum;
    }
}

ParamBytes params_bytes(const ParamList *params) {
    ParamBytes bytes = {0};
    int64_t apart, layer;
    for (int i = 0; i < params->count; i++) {
        const Param *p = params->items[i];
        if (!in_space(p) && !(p->mapped && !p->trainable))
            bytes.values += aligned(tensor_bytes(p->value));
        if (has_master(params, p)) bytes.masters += (size_t)param_span(p) * 4;
        if (p->trainable) bytes.trained += param_span(p);
    }
    for (int i = 0; i < params->derived_count; i++)
        bytes.values += aligned(tensor_bytes(*params->derived[i]));
    gradient_space(params, &apart, &layer);
    bytes.gradients = (size_t)(apart + layer) * 4;
    return bytes;
}

/* A tensor of the shape of p, from element `first` of a flat f32 one on. */
static Tensor part_of(Tensor flat, int64_t first, const Param *p) {
    Tensor t = p->value;
    t.dtype = F32;
    t.device = flat.device;
    t.data = (float *)flat.data + first;
    return t;
}

Status params_place(ParamList *params, Device *device, bool gradients) {
    ParamBytes bytes = params_bytes(params);
    int64_t masters = (int64_t)(bytes.masters / 4), n = (int64_t)(bytes.gradients / 4);
    TRY(arena_init(&params->values, device, bytes.values, "the weights"));
    TRY(arena_init(&params->trained, device, bytes.masters + (gradients ? bytes.gradients : 0),
                   "the trained parameters"));
    if (masters) params->space = ARENA_TENSOR(&params->trained, F32, masters);
    if (gradients) params->grads = ARENA_TENSOR(&params->trained, F32, n);
    int64_t offset = 0, place = 0, apart, layer, taken[LAYERS_MAX + 1] = {0};
    gradient_space(params, &apart, &layer);
    if (gradients && params->one_layer)
        params->layer_grads = tensor_slice(params->grads, apart, layer);
    for (int i = 0; i < params->count; i++) {
        Param *p = params->items[i];
        if (p->trainable) {
            bool shares = params->one_layer && p->layer >= 0;
            int64_t *mine = &taken[shares ? p->layer + 1 : 0];
            if (gradients) p->grad = part_of(params->grads, *mine + (shares ? apart : 0), p);
            *mine += param_span(p);
            p->offset = offset;
            offset += param_span(p);
        }
        if (has_master(params, p)) {
            p->master = part_of(params->space, place, p);
            place += param_span(p);
        }
        if (in_space(p))
            p->value = p->master;
        else if (!(p->mapped && !p->trainable))
            p->value = arena_like(&params->values, p->value);
        if (p->trainable && !has_master(params, p)) p->master = p->value;
    }
    for (int i = 0; i < params->derived_count; i++)
        *params->derived[i] = arena_like(&params->values, *params->derived[i]);
    return OK;
}

void param_publish(Param *p) {
    if (p->trainable && p->master.data != p->value.data) scale_copy(p->value, SET, p->master, 1.0f);
}

void params_publish(ParamList *params) {
    for (int i = 0; i < params->count; i++) param_publish(params->items[i]);
}

void params_adopt(ParamList *params) {
    for (int i = 0; i < params->count; i++) {
        Param *p = params->items[i];
        if (p->trainable && p->master.data != p->value.data)
            scale_copy(p->master, SET, p->value, 1.0f);
    }
}
