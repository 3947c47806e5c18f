/* learned_scales.c - factors out and in. */
#include "formats/learned_scales.h"
#include "formats/file.h"

#include <stdlib.h>
#include <string.h>

Status learned_scales_save(const Gemma *g, const char *dir) {
    SafetensorsWriter *w = NULL;
    char *path = path_join(dir, LEARNED_SCALES);
    Status status = OK;
    for (const Linear *l = g->linears.first; l; l = l->next) {
        if (!l->factors) continue;
        Tensor t = l->factors->value;
        if (!w) TRY_DONE(safetensors_create(&w, path));
        safetensors_declare(w, l->factors->name, dtype_text(F32), t.ndim, t.shape, tensor_bytes(t));
    }
    if (!w) goto done;
    TRY_DONE(safetensors_begin(w));
    for (const Linear *l = g->linears.first; l; l = l->next)
        if (l->factors) {
            size_t size = tensor_bytes(l->factors->value);
            void *read = must_malloc(size);
            status = safetensors_write(w, tensor_host(l->factors->value, read), size);
            free(read);
            if (status != OK) goto done;
        }
    status = safetensors_commit(w);
    w = NULL;
done:
    safetensors_abandon(w);
    free(path);
    return status;
}

/* The folder's file, or one without tensors. */
static Status open_file(Safetensors *file, const char *dir) {
    char *path = path_join(dir, LEARNED_SCALES);
    Status status = OK;
    *file = (Safetensors){0};
    if (file_exists(path)) status = safetensors_open(file, path);
    free(path);
    return status;
}

static Status check(const StoredTensor *t, const Param *factors) {
    bool same = t->dtype == F32 && t->ndim == factors->value.ndim;
    for (int d = 0; same && d < t->ndim; d++) same = t->shape[d] == factors->value.shape[d];
    if (!same)
        FAIL(ERR_FORMAT, "%s: tensor '%s' is not %s, as this model's blocks are", t->file, t->name,
             tensor_text(factors->value));
    return OK;
}

Status learned_scales_load(Gemma *g, const char *dir) {
    Safetensors file;
    int read = 0, wanted = 0;
    Status status = open_file(&file, dir);
    for (Linear *l = g->linears.first; l && status == OK; l = l->next) {
        if (!l->factors) continue;
        wanted++;
        const StoredTensor *t = file.count ? safetensors_find(&file, l->factors->name) : NULL;
        if (!t) continue;
        read++;
        TRY_DONE(check(t, l->factors));
        TRY_DONE(stored_tensor_read(t, l->factors->value));
    }
    if (file.count && !wanted)
        note("%s: its learned scales are left behind; quant.learned_scale: true would go on with "
             "them",
             file.path);
    else if (read < file.count)
        FAIL_DONE(ERR_FORMAT, "%s: %d of its %d tensors belong to no linear this run rounds",
                  file.path, file.count - read, file.count);
done:
    safetensors_close(&file);
    return status;
}

Status learned_scales_map(Gemma *g, Safetensors *file, const char *dir) {
    int found = 0;
    TRY(open_file(file, dir));
    for (Linear *l = g->linears.first; l && file->count; l = l->next) {
        char *name = must_format("%s.scale_factors", l->name);
        const StoredTensor *t = safetensors_find(file, name);
        free(name);
        if (!t) continue;
        found++;
        linear_learn_scales(l, &g->params);
        TRY(check(t, l->factors));
        if ((uintptr_t)t->bytes % sizeof(float))
            FAIL(ERR_FORMAT, "%s: tensor '%s' lies at an odd place", file->path, t->name);
        l->factors->trainable = false;
        l->factors->mapped = true;
        l->factors->value.data = (void *)t->bytes;
    }
    if (found < file->count)
        FAIL(ERR_FORMAT, "%s: %d of its %d tensors belong to no linear of this model", file->path,
             file->count - found, file->count);
    return OK;
}
