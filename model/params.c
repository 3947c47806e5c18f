/* params.c - naming and placing parameters. */
#include "model/params.h"
#include "configs/model_config.h"

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
    space_free(&params->space);
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

int64_t param_span(const Param *p) {
    return (tensor_count(p->value) + DYNAMIC_BLOCK - 1) / DYNAMIC_BLOCK * DYNAMIC_BLOCK;
}

bool param_takes_blocks(const Param *p) {
    return p->value.ndim > 1 && !p->tower && !strstr(p->name, ".router.");
}
