/* mmproj.c - names by a table, a few tensors in another order. */
#include "formats/mmproj.h"
#include "formats/gguf_model.h"
#include "kernels/elementwise.h"
#include "model/audio.h"
#include "model/merge.h"

#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What llama.cpp computes with whatever the file says. */
#define ROPE_THETA    100.0
#define AUDIO_KEYS    12
#define RESIDUAL      0.5
#define LOGIT_CAP     50.0
#define UNIFIED_CHUNK 640 /* samples of a soft token */

/* How a tensor's numbers lie in the file: matrices of LINEAR in the dtype asked for, all else f32.
 */
typedef enum Layout {
    LINEAR,
    PLAIN,
    PIXELS,   /* columns (row, column, channel) of a patch become (channel, row, column) */
    SQUARES,  /* the same, and the patch's axes are axes of the tensor: (D, 3, side, side) */
    SWAPPED,  /* (positions, 2, D) becomes (2, positions, D) */
    SQUEEZED, /* (D, 1, taps) becomes (D, taps) */
    SOFTPLUS  /* ln(1 + e^x), which llama.cpp multiplies by as it is */
} Layout;

typedef struct Rule {
    const char *name; /* of a module or parameter below "model."; # is a layer's number */
    const char *gguf;
    Layout layout;
} Rule;

#define VISION "vision_tower.encoder.layers.#."
#define AUDIO  "audio_tower.layers.#."
static const Rule rules[] = {
    {"vision_tower.patch_embedder.input_proj", "v.patch_embd", SQUARES},
    {"vision_tower.patch_embedder.position_embedding_table", "v.position_embd.weight", PLAIN},
    {"vision_tower.std_bias", "v.std_bias", PLAIN},
    {"vision_tower.std_scale", "v.std_scale", PLAIN},
    {VISION "input_layernorm", "v.blk.#.ln1", PLAIN},
    {VISION "self_attn.q_proj", "v.blk.#.attn_q", LINEAR},
    {VISION "self_attn.k_proj", "v.blk.#.attn_k", LINEAR},
    {VISION "self_attn.v_proj", "v.blk.#.attn_v", LINEAR},
    {VISION "self_attn.o_proj", "v.blk.#.attn_out", LINEAR},
    {VISION "self_attn.q_norm", "v.blk.#.attn_q_norm", PLAIN},
    {VISION "self_attn.k_norm", "v.blk.#.attn_k_norm", PLAIN},
    {VISION "post_attention_layernorm", "v.blk.#.attn_post_norm", PLAIN},
    {VISION "pre_feedforward_layernorm", "v.blk.#.ln2", PLAIN},
    {VISION "mlp.gate_proj", "v.blk.#.ffn_gate", LINEAR},
    {VISION "mlp.up_proj", "v.blk.#.ffn_up", LINEAR},
    {VISION "mlp.down_proj", "v.blk.#.ffn_down", LINEAR},
    {VISION "post_feedforward_layernorm", "v.blk.#.ffn_post_norm", PLAIN},
    {"embed_vision.embedding_projection", "mm.input_projection", LINEAR},

    {"vision_embedder.patch_ln1", "v.patch_norm.1", PIXELS},
    {"vision_embedder.patch_dense.weight", "v.patch_embd.weight", PIXELS},
    {"vision_embedder.patch_dense.bias", "v.patch_embd.bias", PLAIN},
    {"vision_embedder.patch_ln2", "v.patch_norm.2", PLAIN},
    {"vision_embedder.pos_norm", "v.patch_norm.3", PLAIN},
    {"vision_embedder.pos_embedding", "v.position_embd.weight", SWAPPED},

    {"audio_tower.subsample_conv_projection.layer0.conv", "a.conv1d.0", PLAIN},
    {"audio_tower.subsample_conv_projection.layer0.norm", "a.conv1d.0.norm", PLAIN},
    {"audio_tower.subsample_conv_projection.layer1.conv", "a.conv1d.1", PLAIN},
    {"audio_tower.subsample_conv_projection.layer1.norm", "a.conv1d.1.norm", PLAIN},
    {"audio_tower.subsample_conv_projection.input_proj_linear", "a.input_projection", LINEAR},
    {AUDIO "feed_forward1.pre_layer_norm", "a.blk.#.ffn_norm", PLAIN},
    {AUDIO "feed_forward1.ffw_layer_1", "a.blk.#.ffn_up", LINEAR},
    {AUDIO "feed_forward1.ffw_layer_2", "a.blk.#.ffn_down", LINEAR},
    {AUDIO "feed_forward1.post_layer_norm", "a.blk.#.ffn_post_norm", PLAIN},
    {AUDIO "feed_forward2.pre_layer_norm", "a.blk.#.ffn_norm_1", PLAIN},
    {AUDIO "feed_forward2.ffw_layer_1", "a.blk.#.ffn_up_1", LINEAR},
    {AUDIO "feed_forward2.ffw_layer_2", "a.blk.#.ffn_down_1", LINEAR},
    {AUDIO "feed_forward2.post_layer_norm", "a.blk.#.ffn_post_norm_1", PLAIN},
    {AUDIO "norm_pre_attn", "a.blk.#.attn_pre_norm", PLAIN},
    {AUDIO "self_attn.q_proj", "a.blk.#.attn_q", LINEAR},
    {AUDIO "self_attn.k_proj", "a.blk.#.attn_k", LINEAR},
    {AUDIO "self_attn.v_proj", "a.blk.#.attn_v", LINEAR},
    {AUDIO "self_attn.post", "a.blk.#.attn_out", LINEAR},
    {AUDIO "self_attn.relative_k_proj", "a.blk.#.attn_k_rel", LINEAR},
    {AUDIO "self_attn.per_dim_scale", "a.blk.#.per_dim_scale.weight", SOFTPLUS},
    {AUDIO "norm_post_attn", "a.blk.#.attn_post_norm", PLAIN},
    /* These two norms have each other's name in the format. */
    {AUDIO "lconv1d.pre_layer_norm", "a.blk.#.conv_norm", PLAIN},
    {AUDIO "lconv1d.conv_norm", "a.blk.#.norm_conv", PLAIN},
    {AUDIO "lconv1d.linear_start", "a.blk.#.conv_pw1", LINEAR},
    {AUDIO "lconv1d.depthwise_conv1d", "a.blk.#.conv_dw", SQUEEZED},
    {AUDIO "lconv1d.linear_end", "a.blk.#.conv_pw2", LINEAR},
    {AUDIO "norm_out", "a.blk.#.ln2", PLAIN},
    {"audio_tower.output_proj", "a.pre_encode.out", LINEAR},
    {"embed_audio.embedding_projection", "mm.a.input_projection", LINEAR}};

/* Whether `name` is the pattern, with a number where that has #; what follows it in *rest. */
static bool matches(const char *name, const char *pattern, int *layer, const char **rest) {
    while (*pattern) {
        if (*pattern == '#') {
            if (!isdigit((unsigned char)*name)) return false;
            *layer = (int)strtol(name, (char **)&name, 10);
            pattern++;
        } else if (*name++ != *pattern++) {
            return false;
        }
    }
    *rest = name;
    return !*name || *name == '.';
}

static void write_name(char *out, size_t size, const char *gguf, int layer, const char *rest) {
    const char *mark = strchr(gguf, '#');
    int n = mark
                ? snprintf(out, size, "%.*s%d%s%s", (int)(mark - gguf), gguf, layer, mark + 1, rest)
                : snprintf(out, size, "%s%s", gguf, rest);
    CHECK(n < (int)size, "name too long: %s", gguf);
}

/* The rule of a parameter, and its name in the file; a linear's own level is left out there. */
static const Rule *rule_of(char *out, size_t size, const Param *p) {
    const char *name = p->name + strlen("model."), *rest = NULL;
    int layer = 0;
    for (size_t i = 0; i < sizeof rules / sizeof *rules; i++) {
        if (!matches(name, rules[i].name, &layer, &rest)) continue;
        if (!strncmp(rest, ".linear.", 8)) rest += strlen(".linear");
        write_name(out, size, rules[i].gguf, layer, rest);
        return &rules[i];
    }
    CHECK(false, "mmproj has no name for %s", p->name);
    return NULL;
}

/* One parameter as the file has it. */
typedef struct Entry {
    const Param *p;
    Layout layout;
    DType dtype;
    int ndim;
    int64_t shape[4];
    char name[PARAM_NAME_MAX];
} Entry;

static Entry entry_of(const Param *p, DType dtype) {
    Entry e = {.p = p, .ndim = p->value.ndim};
    e.layout = rule_of(e.name, sizeof e.name, p)->layout;
    e.dtype = e.layout == LINEAR && p->value.ndim > 1 ? dtype : F32;
    memcpy(e.shape, p->value.shape, sizeof e.shape);
    if (!e.ndim) e.shape[e.ndim++] = 1; /* a bound */
    if (e.layout == SQUARES) {
        int64_t side = (int64_t)lround(sqrt((double)tensor_cols(p->value) / 3.0));
        e.ndim = 4;
        e.shape[1] = 3;
        e.shape[2] = e.shape[3] = side;
    }
    if (e.layout == SWAPPED) e.shape[0] = p->value.shape[1], e.shape[1] = p->value.shape[0];
    if (e.layout == SQUEEZED) e.shape[1] = e.shape[2], e.ndim = 2;
    return e;
}

static void turn_pixels(float *to, const float *from, int64_t rows, int64_t cols) {
    int64_t area = cols / 3;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < area; i++)
            for (int64_t c = 0; c < 3; c++)
                to[r * cols + c * area + i] = from[r * cols + 3 * i + c];
}

/* `from` in the file's order: in `to`, or where it is. */
static float *lay(float *to, float *from, const Entry *e) {
    Tensor t = e->p->value;
    int64_t n = tensor_count(t), cols = t.ndim > 1 ? tensor_cols(t) : n;
    switch (e->layout) {
    case PIXELS:
    case SQUARES:
        turn_pixels(to, from, n / cols, cols);
        return to;
    case SWAPPED:
        for (int64_t p = 0; p < t.shape[0]; p++)
            for (int64_t axis = 0; axis < 2; axis++)
                memcpy(to + (axis * t.shape[0] + p) * cols, from + (2 * p + axis) * cols,
                       (size_t)cols * sizeof *to);
        return to;
    case SOFTPLUS:
        for (int64_t i = 0; i < n; i++)
            to[i] = from[i] > 20 ? from[i] : (float)log1p(exp((double)from[i]));
        return to;
    case LINEAR:
    case PLAIN:
    case SQUEEZED:
        break;
    }
    return from;
}

static Status write_entry(GgufWriter *w, const Gemma *g, const Entry *e, const char *path) {
    int64_t n = tensor_count(e->p->value),
            cols = e->p->value.ndim > 1 ? tensor_cols(e->p->value) : n;
    float *values = malloc(3 * (size_t)n * sizeof *values);
    bool finite = true;
    if (!values) FAIL(ERR_IO, "%s: out of memory for tensor '%s'", path, e->p->name);
    merged_rows(g, e->p, 0, n / cols, values);
    Tensor from = TENSOR(lay(values + n, values, e), F32, n),
           to = TENSOR(values + 2 * n, e->dtype, n);
    check_finite(&finite, from);
    if (e->dtype == F32)
        to = from;
    else
        scale_copy(to, SET, from, 1.0f);
    Status status = finite ? gguf_write(w, to.data, tensor_bytes(to))
                           : status_fail(ERR_FORMAT,
                                         "%s: tensor '%s' holds infinities or NaN; nothing is "
                                         "written",
                                         path, e->p->name);
    free(values);
    return status;
}

/* ---- metadata ---- */

static void put_size(GgufWriter *w, const char *kind, const char *key, int64_t value) {
    char name[64];
    snprintf(name, sizeof name, "clip.%s.%s", kind, key);
    gguf_put_u32(w, name, (uint32_t)value);
}

static void put_sizes(GgufWriter *w, const char *kind, const char *projector, int64_t text,
                      int64_t width, int64_t inner, int64_t layers, int64_t heads, double eps) {
    char name[64];
    snprintf(name, sizeof name, "clip.%s.projector_type", kind);
    gguf_put_text(w, name, projector);
    put_size(w, kind, "projection_dim", text);
    put_size(w, kind, "embedding_length", width);
    put_size(w, kind, "feed_forward_length", inner);
    put_size(w, kind, "block_count", layers);
    put_size(w, kind, "attention.head_count", heads);
    snprintf(name, sizeof name, "clip.%s.attention.layer_norm_epsilon", kind);
    gguf_put_f32(w, name, (float)eps);
}

static void put_vision(GgufWriter *w, const ModelConfig *c) {
    const VisionConfig *v = &c->vision;
    if (v->path == MEDIA_TOWER)
        put_sizes(w, "vision", "gemma4v", c->hidden_size, v->hidden_size, v->intermediate_size,
                  v->num_hidden_layers, v->num_attention_heads, v->rms_norm_eps);
    else
        put_sizes(w, "vision", "gemma4uv", c->hidden_size, v->mm_embed_dim, 0, 0, 0,
                  v->rms_norm_eps);
    put_size(w, "vision", "image_size", 224); /* read, and not used */
    put_size(w, "vision", "patch_size", v->patch_size);
    put_size(w, "vision", "projector.scale_factor", v->pooling_kernel_size);
    gguf_put_array(w, "clip.vision.image_mean", GGUF_F32, 3);
    for (int i = 0; i < 3; i++) gguf_add_f32(w, 0.0f);
    gguf_put_array(w, "clip.vision.image_std", GGUF_F32, 3);
    for (int i = 0; i < 3; i++) gguf_add_f32(w, 1.0f);
}

static void put_audio(GgufWriter *w, const ModelConfig *c) {
    const AudioConfig *a = &c->audio;
    if (a->path == MEDIA_TOWER)
        put_sizes(w, "audio", "gemma4a", c->hidden_size, a->hidden_size, 4 * a->hidden_size,
                  a->num_hidden_layers, a->num_attention_heads, a->rms_norm_eps);
    else
        put_sizes(w, "audio", "gemma4ua", c->hidden_size, a->audio_embed_dim, 0, 0, 0,
                  a->rms_norm_eps);
    put_size(w, "audio", "num_mel_bins", MEL_BINS);
}

static Status check_constants(const ModelConfig *c, const char *path) {
    const VisionConfig *v = &c->vision;
    const AudioConfig *a = &c->audio;
    const struct {
        bool there;
        const char *name;
        double value, expected;
    } constants[] = {
        {v->path == MEDIA_TOWER, "vision_config.rope_theta", v->rope_theta, ROPE_THETA},
        {a->path == MEDIA_TOWER, "the keys a row of audio_config sees", (double)a->keys,
         AUDIO_KEYS},
        {a->path == MEDIA_TOWER, "audio_config.residual_weight", a->residual_weight, RESIDUAL},
        {a->path == MEDIA_TOWER, "audio_config.attention_logit_cap", a->logit_cap, LOGIT_CAP},
        {a->path == MEDIA_UNIFIED, "audio_config.audio_embed_dim", (double)a->audio_embed_dim,
         UNIFIED_CHUNK}};
    for (size_t i = 0; i < sizeof constants / sizeof *constants; i++)
        if (constants[i].there && constants[i].value != constants[i].expected)
            FAIL(ERR_CONFIG, "%s: llama.cpp computes with %g for %s, this model has %g", path,
                 constants[i].expected, constants[i].name, constants[i].value);
    return OK;
}

Status mmproj_save(const Gemma *g, const char *name, DType dtype, const char *path) {
    GgufWriter *w = NULL;
    Status status = OK;
    const ModelConfig *c = &g->config;
    if (!g->media.params) FAIL(ERR_CONFIG, "%s: this model has no towers: nothing to write", path);
    TRY(check_constants(c, path));
    TRY(gguf_create(&w, path));
    gguf_put_text(w, "general.architecture", "clip");
    gguf_put_text(w, "general.type", "mmproj");
    gguf_put_text(w, "general.name", name);
    gguf_put_u32(w, "general.file_type", gguf_file_type(dtype));
    gguf_put_bool(w, "clip.has_vision_encoder", g->media.sees);
    gguf_put_bool(w, "clip.has_audio_encoder", g->media.hears);
    gguf_put_bool(w, "clip.use_gelu", true); /* the tanh one; else llama.cpp takes another */
    if (g->media.sees) put_vision(w, c);
    if (g->media.hears) put_audio(w, c);
    for (int i = 0; i < g->params.count; i++) {
        if (!g->params.items[i]->tower || g->params.items[i]->adapter) continue;
        Entry e = entry_of(g->params.items[i], dtype);
        gguf_declare(w, e.name, e.dtype, e.ndim, e.shape);
    }
    TRY_DONE(gguf_begin(w));
    for (int i = 0; i < g->params.count; i++) {
        if (!g->params.items[i]->tower || g->params.items[i]->adapter) continue;
        Entry e = entry_of(g->params.items[i], dtype);
        TRY_DONE(write_entry(w, g, &e, path));
    }
    status = gguf_commit(w);
    w = NULL;
done:
    gguf_abandon(w);
    return status;
}
