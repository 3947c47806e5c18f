/* initial.c - drawing and writing parameters one block at a time, sharded at 5 GB. */
#include "formats/initial.h"
#include "formats/checkpoint.h"
#include "formats/file.h"
#include "kernels/elementwise.h"
#include "kernels/random.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#define SHARD_BYTES        ((size_t)5 * 1000 * 1000 * 1000)
#define BLOCK              (1 << 22)
#define STANDARD_DEVIATION 0.02f

static bool is_one(const Param *p) {
    return p->buffer || !p->decay; /* norms, router scales and layer_scalar */
}

static void draw(float *values, const Param *p, const ModelConfig *c, uint64_t key, int64_t first,
                 int64_t n) {
    int64_t cols = tensor_cols(p->value);
    bool table = strstr(p->name, "embed_tokens") != NULL;
#pragma omp parallel for schedule(static)
    for (int64_t at = 0; at < n; at += 4096) {
        int64_t count = n - at < 4096 ? n - at : 4096;
        if (!is_one(p)) random_normal(values + at, key, (uint64_t)(first + at), count);
        for (int64_t i = at; i < at + count; i++) {
            bool pad = table && (first + i) / cols == c->pad_token_id;
            values[i] = is_one(p) ? 1.0f : pad ? 0.0f : values[i] * STANDARD_DEVIATION;
        }
    }
}

static Status write_shard(const Gemma *g, int from, int to, uint64_t seed, DType dtype,
                          const char *path) {
    SafetensorsWriter *w = NULL;
    float *values = must_malloc(BLOCK * sizeof *values);
    uint16_t *halves = must_malloc(BLOCK * sizeof *halves);
    Status status = OK;
    TRY_DONE(safetensors_create(&w, path));
    for (int i = from; i < to; i++) {
        const Param *p = g->params.items[i];
        safetensors_declare(w, p->name, dtype_text(dtype), p->value.ndim, p->value.shape,
                            (size_t)tensor_count(p->value) * dtype_size(dtype));
    }
    TRY_DONE(safetensors_begin(w));
    for (int i = from; i < to; i++) {
        const Param *p = g->params.items[i];
        uint64_t key = random_key_name(seed, p->name);
        int64_t count = tensor_count(p->value);
        for (int64_t first = 0; first < count; first += BLOCK) {
            int64_t n = count - first < BLOCK ? count - first : BLOCK;
            draw(values, p, &g->config, key, first, n);
            if (dtype == BF16)
                scale_copy(TENSOR(halves, BF16, n), SET, TENSOR(values, F32, n), 1.0f);
            TRY_DONE(safetensors_write(w, dtype == BF16 ? (void *)halves : (void *)values,
                                       (size_t)n * dtype_size(dtype)));
        }
    }
    status = safetensors_commit(w);
    w = NULL;
done:
    safetensors_abandon(w);
    free(values);
    free(halves);
    return status;
}

static Status write_weights(const Gemma *g, uint64_t seed, DType dtype, const char *dir) {
    int begins[64], shards = 0, count = g->params.count;
    size_t used = 0, total = 0;
    Status status = OK;
    for (int i = 0; i < count; i++) {
        size_t size = (size_t)tensor_count(g->params.items[i]->value) * dtype_size(dtype);
        if (!i || used + size > SHARD_BYTES) begins[shards++] = i, used = 0;
        CHECK(shards < 63, "a model of more than 300 GB");
        used += size;
        total += size;
    }
    begins[shards] = count;
    json_t *map = json_object();
    for (int s = 0; s < shards && status == OK; s++) {
        char name[64];
        if (shards == 1)
            snprintf(name, sizeof name, "model.safetensors");
        else
            snprintf(name, sizeof name, "model-%05d-of-%05d.safetensors", s + 1, shards);
        char *path = path_join(dir, name);
        status = write_shard(g, begins[s], begins[s + 1], seed, dtype, path);
        free(path);
        for (int i = begins[s]; i < begins[s + 1]; i++)
            json_object_set_new(map, g->params.items[i]->name, json_string(name));
    }
    json_t *index =
        json_pack("{s:{s:I}, s:o}", "metadata", "total_size", (json_int_t)total, "weight_map", map);
    if (status == OK && shards > 1) {
        char *path = path_join(dir, "model.safetensors.index.json"),
             *text = json_dumps(index, JSON_INDENT(2));
        status = file_write(path, text, strlen(text));
        free(path);
        free(text);
    }
    json_decref(index);
    return status;
}

static Status copy_tokenizer(const char *from_dir, const char *to_dir) {
    static const char *const names[] = {"tokenizer.json", "tokenizer_config.json",
                                        "special_tokens_map.json", "chat_template.jinja",
                                        "generation_config.json"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char *from = path_join(from_dir, names[i]), *to = path_join(to_dir, names[i]);
        Status status = file_copy(from, to, i > 0);
        free(from);
        free(to);
        TRY(status);
    }
    return OK;
}

Status initial_checkpoint(const char *config_json, const char *tokenizer_dir, uint64_t seed,
                          DType dtype, const char *dir) {
    ModelConfig config;
    Gemma g = {0};
    char *temporary = NULL, *path = NULL;
    Status status = OK;
    TRY_DONE(model_config_parse(&config, config_json, strlen(config_json), "config.json"));
    gemma_declare(&g, &config, dtype, device_cpu());
    TRY_DONE(folder_begin(&temporary, dir));
    path = path_join(temporary, "config.json");
    TRY_DONE(file_write(path, config_json, strlen(config_json)));
    if (tokenizer_dir) TRY_DONE(copy_tokenizer(tokenizer_dir, temporary));
    TRY_DONE(write_weights(&g, seed, dtype, temporary));
    status = folder_commit(temporary, dir);
    temporary = NULL;
done:
    folder_abandon(temporary);
    free(path);
    gemma_free(&g);
    return status;
}
