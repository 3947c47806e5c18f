/* shards.c - cutting a list of tensors into files. */
#include "formats/shards.h"
#include "formats/file.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#define SHARD_BYTES ((size_t)5 * 1000 * 1000 * 1000)

static Status write_shard(const char *path, const ShardItem *items, int count, ShardWrite *write,
                          void *context) {
    SafetensorsWriter *w = NULL;
    Status status = OK;
    TRY(safetensors_create(&w, path));
    for (int i = 0; i < count; i++)
        safetensors_declare(w, items[i].name, items[i].dtype_text, items[i].ndim, items[i].shape,
                            items[i].size);
    TRY_DONE(safetensors_begin(w));
    for (int i = 0; i < count; i++) TRY_DONE(write(w, &items[i], context));
    return safetensors_commit(w);
done:
    safetensors_abandon(w);
    return status;
}

static Status write_index(const char *dir, json_t *map, size_t total) {
    json_t *index =
        json_pack("{s:{s:I}, s:O}", "metadata", "total_size", (json_int_t)total, "weight_map", map);
    char *path = path_join(dir, "model.safetensors.index.json"),
         *text = json_dumps(index, JSON_INDENT(2));
    Status status = file_write(path, text, strlen(text));
    json_decref(index);
    free(path);
    free(text);
    return status;
}

Status shards_write(const char *dir, const ShardItem *items, int count, ShardWrite *write,
                    void *context) {
    int *begins = must_malloc((size_t)(count + 1) * sizeof *begins), shards = 0;
    size_t used = 0, total = 0;
    json_t *map = json_object();
    Status status = OK;
    for (int i = 0; i < count; i++) {
        if (!i || used + items[i].size > SHARD_BYTES) begins[shards++] = i, used = 0;
        used += items[i].size;
        total += items[i].size;
    }
    begins[shards] = count;
    for (int s = 0; s < shards && status == OK; s++) {
        char name[64] = "model.safetensors";
        if (shards > 1)
            snprintf(name, sizeof name, "model-%05d-of-%05d.safetensors", s + 1, shards);
        char *path = path_join(dir, name);
        status = write_shard(path, items + begins[s], begins[s + 1] - begins[s], write, context);
        free(path);
        for (int i = begins[s]; i < begins[s + 1]; i++)
            json_object_set_new(map, items[i].name, json_string(name));
    }
    if (status == OK && shards > 1) status = write_index(dir, map, total);
    json_decref(map);
    free(begins);
    return status;
}
