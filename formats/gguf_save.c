/* gguf_save.c - rows in, blocks out. */
#include "formats/gguf_save.h"
#include "kernels/elementwise.h"
#include "kernels/quantize.h"
#include "model/merge.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Elements of rows held at a time, as f32 and in the file's dtype. */
#define BLOCK (1 << 21)

static const char *local_name(const Gemma *g, const Param *p) {
    return p->name + strlen(model_config_prefix(&g->config));
}

DType gguf_param_dtype(const Param *p, DType dtype) {
    if (!param_takes_blocks(p)) return F32;
    return tensor_cols(p->value) % dtype_block(dtype).count ? BF16 : dtype;
}

static Status write_rows(GgufWriter *w, const Gemma *g, const Param *p, DType dtype,
                         const RowSource *source, const char *path, float *values, void *packed) {
    int64_t cols = p->value.ndim > 1 ? tensor_cols(p->value) : tensor_count(p->value);
    int64_t rows = tensor_count(p->value) / cols, block = cols < BLOCK ? BLOCK / cols : 1;
    for (int64_t first = 0; first < rows; first += block) {
        int64_t n = rows - first < block ? rows - first : block;
        Tensor from = TENSOR(values, F32, n, cols), to = TENSOR(packed, dtype, n, cols);
        bool finite = true;
        source->rows(source->context, p, first, n, values);
        check_finite(&finite, from);
        if (!finite)
            FAIL(ERR_FORMAT,
                 "%s: tensor '%s' holds infinities, NaN or numbers no scale reaches; nothing is "
                 "written",
                 path, p->name);
        if (dtype == F32)
            to.data = values;
        else if (dtype == Q4_0)
            quantize_scheme(to, from, merged_factors(g, p, first, n), SCHEME_Q4_0);
        else if (dtype_is_packed(dtype))
            quantize(to, from);
        else
            scale_copy(to, SET, from, 1.0f);
        TRY(gguf_write(w, to.data, tensor_bytes(to)));
    }
    return OK;
}

static Status write_param(GgufWriter *w, const Gemma *g, const Param *p, DType dtype,
                          const RowSource *source, const char *path, float *values, void *packed) {
    Tensor as_is = source->packed ? source->packed(source->context, p) : tensor_absent();
    if (tensor_present(as_is) && as_is.dtype == dtype)
        TRY(gguf_write(w, as_is.data, tensor_bytes(as_is)));
    else
        TRY(write_rows(w, g, p, dtype, source, path, values, packed));
    if (source->done) source->done(source->context, p);
    return OK;
}

/* Towers have a file of their own (mmproj). */
static bool is_text(const Param *p) {
    return !p->adapter && !p->tower;
}

Status gguf_save(const GgufModel *m, const Gemma *g, const RowSource *source, const char *path) {
    GgufWriter *w = NULL;
    char name[PARAM_NAME_MAX];
    int64_t parameters = 0, widest = BLOCK,
            half = g->config.layer[g->config.num_hidden_layers - 1].head_dim / 2;
    float *freqs = must_malloc((size_t)half * sizeof *freqs), *values = NULL;
    void *packed = NULL;
    Status status = OK;
    TRY_DONE(gguf_create(&w, path));
    for (int i = 0; i < g->params.count; i++)
        if (is_text(g->params.items[i])) parameters += tensor_count(g->params.items[i]->value);
    TRY_DONE(gguf_put_model(w, m, parameters));
    gguf_rope_freqs(freqs, &g->config);
    gguf_declare(w, GGUF_ROPE_FREQS, F32, 1, &half);
    for (int i = 0; i < g->params.count; i++) {
        const Param *p = g->params.items[i];
        if (!is_text(p)) continue;
        CHECK(gguf_name_of(name, sizeof name, local_name(g, p)), "GGUF has no name for %s",
              p->name);
        gguf_declare(w, name, gguf_param_dtype(p, m->dtype), p->value.ndim, p->value.shape);
        if (tensor_cols(p->value) > widest) widest = tensor_cols(p->value);
    }
    values = malloc((size_t)widest * sizeof *values);
    packed = malloc((size_t)widest * 2);
    if (!values || !packed) FAIL_DONE(ERR_IO, "%s: out of memory for a row", path);
    TRY_DONE(gguf_begin(w));
    TRY_DONE(gguf_write(w, freqs, (size_t)half * sizeof *freqs));
    for (int i = 0; i < g->params.count; i++) {
        const Param *p = g->params.items[i];
        if (is_text(p))
            TRY_DONE(
                write_param(w, g, p, gguf_param_dtype(p, m->dtype), source, path, values, packed));
    }
    status = gguf_commit(w);
    w = NULL;
done:
    gguf_abandon(w);
    free(freqs);
    free(values);
    free(packed);
    return status;
}

/* ---- adapters ---- */

static Status check_adapter(const Gemma *g, const AdapterSpec *spec) {
    if (spec->dora)
        FAIL(ERR_CONFIG, "a GGUF adapter has no place for dora; export the merged model instead");
    if (spec->train_also.count)
        FAIL(ERR_CONFIG,
             "a GGUF adapter has no place for '%s', trained whole; export the merged "
             "model instead",
             spec->train_also.items[0]);
    for (const Linear *l = g->linears.first; l; l = l->next)
        if (l->lora && (l->weight->tower || strstr(l->name, "per_layer_model_projection")))
            FAIL(ERR_CONFIG,
                 "llama.cpp applies no adapter to '%s'; export the merged model instead", l->name);
    return OK;
}

/* The linear's tensor name with .lora_a or .lora_b behind it. */
static void adapter_name(char *out, size_t size, const Gemma *g, const Linear *l,
                         const char *part) {
    char base[PARAM_NAME_MAX];
    CHECK(gguf_name_of(base, sizeof base, local_name(g, l->weight)), "GGUF has no name for %s",
          l->name);
    CHECK(snprintf(out, size, "%s.%s", base, part) < (int)size, "name too long: %s", base);
}

Status gguf_save_adapter(const Gemma *g, const AdapterSpec *spec, const char *path) {
    GgufWriter *w = NULL;
    Status status = OK;
    char name[PARAM_NAME_MAX + 16];
    float *scaled = NULL;
    TRY(check_adapter(g, spec));
    TRY(gguf_create(&w, path));
    gguf_put_text(w, "general.architecture", "gemma4");
    gguf_put_text(w, "general.type", "adapter");
    gguf_put_text(w, "adapter.type", "lora");
    gguf_put_f32(w, "adapter.lora.alpha", (float)spec->alpha);
    gguf_put_u32(w, "general.quantization_version", 2);
    for (const Linear *l = g->linears.first; l; l = l->next) {
        if (!l->lora) continue;
        adapter_name(name, sizeof name, g, l, "lora_a");
        gguf_declare(w, name, F32, l->lora->A->value.ndim, l->lora->A->value.shape);
        adapter_name(name, sizeof name, g, l, "lora_b");
        gguf_declare(w, name, F32, l->lora->B->value.ndim, l->lora->B->value.shape);
    }
    TRY_DONE(gguf_begin(w));
    for (const Linear *l = g->linears.first; l; l = l->next) {
        if (!l->lora) continue;
        Tensor A = l->lora->A->value, B = l->lora->B->value;
        /* llama.cpp scales by alpha / rank of the tensor; what a pattern or rslora adds goes into
         * B. */
        float factor = l->lora->scale * (float)l->lora->rank / (float)spec->alpha;
        scaled = must_realloc(scaled, tensor_bytes(B));
        scale_copy(TENSOR(scaled, F32, tensor_count(B)), SET, B, factor);
        TRY_DONE(gguf_write(w, A.data, tensor_bytes(A)));
        TRY_DONE(gguf_write(w, scaled, tensor_bytes(B)));
    }
    status = gguf_commit(w);
    w = NULL;
done:
    gguf_abandon(w);
    free(scaled);
    return status;
}
