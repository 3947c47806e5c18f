/* initial.c - drawing and writing parameters one block at a time, sharded at 5 GB. */
#include "formats/initial.h"
#include "formats/checkpoint.h"
#include "formats/companion.h"
#include "formats/file.h"
#include "formats/gguf_save.h"
#include "formats/shards.h"
#include "kernels/elementwise.h"
#include "kernels/quantize.h"
#include "kernels/random.h"

#include <stdlib.h>
#include <string.h>

#define BLOCK              (1 << 22)
#define STANDARD_DEVIATION 0.02f

/* Bounds of clipped linears: wide enough to clip little. */
#define BOUND 16.0f

static bool ends_with(const char *name, const char *end) {
    size_t n = strlen(name), m = strlen(end);
    return n >= m && !strcmp(name + n - m, end);
}

/* What is not drawn: norms, router scales, layer_scalar and the like are ones. */
static bool is_constant(const Param *p, float *value) {
    *value = ends_with(p->name, "_min")                                          ? -BOUND
             : ends_with(p->name, "_max")                                        ? BOUND
             : ends_with(p->name, "bias") || ends_with(p->name, "per_dim_scale") ? 0.0f
                                                                                 : 1.0f;
    return p->buffer || !p->decay;
}

static void draw(float *values, const Param *p, const ModelConfig *c, uint64_t key, int64_t first,
                 int64_t n) {
    int64_t cols = tensor_cols(p->value);
    bool table = strstr(p->name, "embed_tokens") != NULL;
    float constant;
    bool drawn = !is_constant(p, &constant);
#pragma omp parallel for schedule(static)
    for (int64_t at = 0; at < n; at += 4096) {
        int64_t count = n - at < 4096 ? n - at : 4096;
        if (drawn) random_normal(values + at, key, (uint64_t)(first + at), count);
        for (int64_t i = at; i < at + count; i++) {
            bool pad = table && (first + i) / cols == c->pad_token_id;
            values[i] = !drawn ? constant : pad ? 0.0f : values[i] * STANDARD_DEVIATION;
        }
    }
}

typedef struct Drawing {
    const ModelConfig *config;
    uint64_t seed;
    DType dtype;
    float *values;    /* (BLOCK) */
    uint16_t *halves; /* (BLOCK) */
} Drawing;

static Status write_drawn(SafetensorsWriter *w, const ShardItem *item, void *context) {
    const Drawing *d = context;
    const Param *p = item->what;
    uint64_t key = random_key_name(d->seed, p->name);
    int64_t count = tensor_count(p->value);
    for (int64_t first = 0; first < count; first += BLOCK) {
        int64_t n = count - first < BLOCK ? count - first : BLOCK;
        draw(d->values, p, d->config, key, first, n);
        if (d->dtype == BF16)
            scale_copy(TENSOR(d->halves, BF16, n), SET, TENSOR(d->values, F32, n), 1.0f);
        TRY(safetensors_write(w, d->dtype == BF16 ? (void *)d->halves : (void *)d->values,
                              (size_t)n * dtype_size(d->dtype)));
    }
    return OK;
}

static Status write_weights(const Gemma *g, uint64_t seed, DType dtype, const char *dir) {
    Drawing d = {&g->config, seed, dtype, must_malloc(BLOCK * sizeof(float)),
                 must_malloc(BLOCK * sizeof(uint16_t))};
    ShardItem *items = must_calloc((size_t)g->params.count, sizeof *items);
    for (int i = 0; i < g->params.count; i++) {
        const Param *p = g->params.items[i];
        items[i] = (ShardItem){p->name,
                               dtype_text(dtype),
                               p->value.ndim,
                               p->value.shape,
                               (size_t)tensor_count(p->value) * dtype_size(dtype),
                               p};
    }
    Status status = shards_write(dir, items, g->params.count, write_drawn, &d);
    free(items);
    free(d.values);
    free(d.halves);
    return status;
}

Status initial_checkpoint(const char *config_json, const char *tokenizer_dir, uint64_t seed,
                          DType dtype, const char *dir) {
    ModelConfig config;
    Gemma g = {0};
    char *temporary = NULL, *path = NULL;
    Status status = OK;
    TRY_DONE(model_config_parse(&config, config_json, strlen(config_json), "config.json"));
    gemma_declare(&g, &config, dtype, device_cpu());
    gemma_declare_media(&g);
    TRY_DONE(folder_begin(&temporary, dir));
    path = path_join(temporary, "config.json");
    TRY_DONE(file_write(path, config_json, strlen(config_json)));
    if (tokenizer_dir) TRY_DONE(companions_copy(tokenizer_dir, temporary));
    TRY_DONE(write_weights(&g, seed, dtype, temporary));
    status = folder_commit(temporary, dir);
    temporary = NULL;
done:
    folder_abandon(temporary);
    free(path);
    gemma_free(&g);
    return status;
}

/* ---- in memory ---- */

/* Elements of a packed pattern, about. */
#define PATTERN (1 << 20)

/* A few rows packed by the host, one behind the other until the tensor is full. */
static Status fill_packed(Tensor t, uint64_t key) {
    int64_t cols = tensor_cols(t), rows = tensor_count(t) / cols, few = PATTERN / cols / 256 * 256;
    if (few < 256) few = 256;
    if (few > rows) few = rows;
    Arena memory;
    int64_t shape[] = {few, cols};
    Tensor packed = tensor_make(NULL, t.dtype, 2, shape);
    TRY(arena_init(&memory, device_cpu(), tensor_bytes(packed) + (size_t)(few * cols) * 4 + 128,
                   "a few rows of random weights"));
    Tensor values = ARENA_TENSOR(&memory, F32, few, cols);
    packed = arena_tensor(&memory, t.dtype, 2, shape);
    fill_normal(values, key, STANDARD_DEVIATION);
    quantize(packed, values);
    size_t size = tensor_bytes(packed), all = tensor_bytes(t);
    for (size_t at = 0; at < all; at += size)
        device_copy(t.device, (char *)t.data + at, device_cpu(), packed.data,
                    all - at < size ? all - at : size);
    arena_free(&memory);
    return OK;
}

Status initial_values(Gemma *g, uint64_t seed) {
    for (int i = 0; i < g->params.count; i++) {
        Param *p = g->params.items[i];
        uint64_t key = random_key_name(seed, p->name);
        float constant;
        if (p->adapter || !p->value.data) continue;
        if (dtype_is_packed(p->value.dtype))
            TRY(fill_packed(p->value, key));
        else if (is_constant(p, &constant))
            fill(p->value, constant);
        else
            fill_normal(p->value, key, STANDARD_DEVIATION);
    }
    params_adopt(&g->params);
    gemma_loaded(g);
    return OK;
}

/* ---- GGUF ---- */

static void drawn_rows(void *context, const Param *p, int64_t first, int64_t count, float *out) {
    const Drawing *d = context;
    int64_t cols = p->value.ndim > 1 ? tensor_cols(p->value) : tensor_count(p->value);
    draw(out, p, d->config, random_key_name(d->seed, p->name), first * cols, count * cols);
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < count * cols; i++) out[i] = bf16_to_f32(f32_to_bf16(out[i]));
}

Status initial_gguf(const char *config_json, const char *tokenizer_dir, uint64_t seed, DType dtype,
                    const char *path) {
    ModelConfig config;
    Gemma g = {0};
    TRY(model_config_parse(&config, config_json, strlen(config_json), "config.json"));
    gemma_declare(&g, &config, BF16, device_cpu());
    Drawing d = {.config = &config, .seed = seed};
    RowSource source = {.rows = drawn_rows, .context = &d};
    GgufModel m = {&config, tokenizer_dir, "random", dtype};
    Status status = gguf_save(&m, &g, &source, path);
    gemma_free(&g);
    return status;
}
