/* mmproj.c - names by a table, a few tensors in another order; written, and read back. */
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

static void turn_pixels(float *to, const float *from, int64_t rows, int64_t cols, bool back) {
    int64_t area = cols / 3;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < area; i++)
            for (int64_t c = 0; c < 3; c++) {
                int64_t ours = r * cols + 3 * i + c, theirs = r * cols + c * area + i;
                to[back ? ours : theirs] = from[back ? theirs : ours];
            }
}

/* `from` in the file's order, or `back` in the checkpoint's: in `to`, or where it is. */
static float *lay(float *to, float *from, const Entry *e, bool back) {
    Tensor t = e->p->value;
    int64_t n = tensor_count(t), cols = t.ndim > 1 ? tensor_cols(t) : n;
    switch (e->layout) {
    case PIXELS:
    case SQUARES:
        turn_pixels(to, from, n / cols, cols, back);
        return to;
    case SWAPPED:
        for (int64_t p = 0; p < t.shape[0]; p++)
            for (int64_t axis = 0; axis < 2; axis++) {
                int64_t ours = (2 * p + axis) * cols, theirs = (axis * t.shape[0] + p) * cols;
                memcpy(to + (back ? ours : theirs), from + (back ? theirs : ours),
                       (size_t)cols * sizeof *to);
            }
        return to;
    case SOFTPLUS:
        for (int64_t i = 0; i < n; i++) {
            double x = from[i];
            to[i] = x > 20 ? from[i] : (float)(back ? log(expm1(x)) : log1p(exp(x)));
        }
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
    Tensor from = TENSOR(lay(values + n, values, e, false), F32, n),
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

/* ---- reading ---- */

static Status size_of(const Gguf *g, const char *tensor, int axis, int64_t *out) {
    const StoredTensor *t = gguf_find_tensor(g, tensor);
    if (!t || t->ndim <= axis)
        FAIL(ERR_FORMAT, "%s: tensor '%s' is missing, or has no axis %d", g->path, tensor, axis);
    *out = t->shape[axis];
    return OK;
}

/* A key of clip.vision or clip.audio, as a number of config.json under another name. */
static Status take(const Gguf *g, const char *kind, const char *key, json_t *to, const char *name) {
    char full[64];
    int64_t value = 0;
    snprintf(full, sizeof full, "clip.%s.%s", kind, key);
    TRY(gguf_get_int(g, full, 0, INT32_MAX, &value));
    json_object_set_new(to, name, json_integer(value));
    return OK;
}

static Status take_eps(const Gguf *g, const char *kind, json_t *to) {
    char full[64];
    double eps;
    snprintf(full, sizeof full, "clip.%s.attention.layer_norm_epsilon", kind);
    TRY(gguf_get_float(g, full, &eps));
    json_object_set_new(to, "rms_norm_eps", json_real(eps));
    return OK;
}

/* Whether linears of these blocks ("v.", "a.") have bounds. */
static bool are_clipped(const Gguf *g, const char *blocks) {
    for (int i = 0; i < g->count; i++) {
        const char *name = g->tensors[i].name, *end = strrchr(name, '.');
        if (!strncmp(name, blocks, 2) && end && !strcmp(end, ".input_max")) return true;
    }
    return false;
}

/* Whether the file's projector of a kind is the one without a tower; an unknown one is an error. */
static Status is_unified(const Gguf *g, const char *kind, bool *out) {
    char key[64];
    size_t size = 0;
    snprintf(key, sizeof key, "clip.%s.projector_type", kind);
    const char *text = gguf_text(g, key, &size);
    if (!text) text = gguf_text(g, "clip.projector_type", &size);
    *out = text && size == 8 && !memcmp(text, "gemma4u", 7) && text[7] == *kind;
    if (!*out && (!text || size != 7 || memcmp(text, "gemma4", 6) || text[6] != *kind))
        FAIL(ERR_FORMAT, "%s: %s is '%.*s', expected gemma4%c or gemma4u%c", g->path, key,
             text ? (int)size : 4, text ? text : "none", *kind, *kind);
    return OK;
}

static Status take_tower(const Gguf *g, const char *kind, json_t *to) {
    TRY(take(g, kind, "embedding_length", to, "hidden_size"));
    TRY(take(g, kind, "block_count", to, "num_hidden_layers"));
    TRY(take(g, kind, "attention.head_count", to, "num_attention_heads"));
    json_object_set_new(to, "use_clipped_linears",
                        json_boolean(are_clipped(g, *kind == 'v' ? "v." : "a.")));
    return OK;
}

static Status vision_config(const Gguf *g, json_t *to, bool unified) {
    int64_t places = 0;
    json_object_set_new(to, "model_type",
                        json_string(unified ? "gemma4_unified_vision" : "gemma4_vision"));
    TRY(take(g, "vision", "patch_size", to, "patch_size"));
    if (gguf_find(g, "clip.vision.projector.scale_factor"))
        TRY(take(g, "vision", "projector.scale_factor", to, "pooling_kernel_size"));
    TRY(take_eps(g, "vision", to));
    TRY(size_of(g, "v.position_embd.weight", 1, &places));
    json_object_set_new(to, unified ? "mm_posemb_size" : "position_embedding_size",
                        json_integer(places));
    if (unified) return take(g, "vision", "embedding_length", to, "mm_embed_dim");
    TRY(take_tower(g, "vision", to));
    TRY(take(g, "vision", "feed_forward_length", to, "intermediate_size"));
    json_object_set_new(to, "standardize", json_boolean(gguf_find_tensor(g, "v.std_bias")));
    return OK;
}

static Status audio_config(const Gguf *g, json_t *to, bool unified) {
    int64_t width = 0, taps = 0, channels[2] = {0};
    json_object_set_new(to, "model_type",
                        json_string(unified ? "gemma4_unified_audio" : "gemma4_audio"));
    TRY(take_eps(g, "audio", to));
    TRY(size_of(g, "mm.a.input_projection.weight", 1, &width));
    json_object_set_new(to, unified ? "audio_embed_dim" : "output_proj_dims", json_integer(width));
    if (unified) return OK;
    TRY(take_tower(g, "audio", to));
    TRY(size_of(g, "a.conv1d.0.weight", 0, &channels[0]));
    TRY(size_of(g, "a.conv1d.1.weight", 0, &channels[1]));
    TRY(size_of(g, "a.blk.0.conv_dw.weight", 1, &taps));
    json_object_set_new(to, "subsampling_conv_channels",
                        json_pack("[I, I]", (json_int_t)channels[0], (json_int_t)channels[1]));
    json_object_set_new(to, "conv_kernel_size", json_integer(taps));
    return OK;
}

Status mmproj_config(const Gguf *g, json_t *root) {
    static const struct {
        const char *kind, *has, *name;
        Status (*fill)(const Gguf *, json_t *, bool);
    } kinds[] = {{"vision", "clip.has_vision_encoder", "vision_config", vision_config},
                 {"audio", "clip.has_audio_encoder", "audio_config", audio_config}};
    bool any = false;
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        bool unified = false;
        int64_t has = 0;
        if (gguf_find(g, kinds[i].has)) TRY(gguf_get_int(g, kinds[i].has, 0, 1, &has));
        if (!has) continue;
        TRY(is_unified(g, kinds[i].kind, &unified));
        json_t *config = json_object();
        json_object_set_new(root, kinds[i].name, config);
        TRY(kinds[i].fill(g, config, unified));
        any = true;
        if (!unified) continue;
        json_object_set_new(root, "model_type", json_string("gemma4_unified"));
        json_object_set_new(root, "architectures",
                            json_pack("[s]", "Gemma4UnifiedForConditionalGeneration"));
        json_object_set_new(json_object_get(root, "text_config"), "model_type",
                            json_string("gemma4_unified_text"));
    }
    if (!any) FAIL(ERR_FORMAT, "%s: holds no tower for pictures or sound", g->path);
    return OK;
}

/* The tensor of the file in the checkpoint's order, in memory of its own. */
static Status turn(StoredTensor *to, const StoredTensor *from, const Entry *e) {
    int64_t n = tensor_count(e->p->value);
    if (from->dtype != F32 && from->dtype != BF16 && from->dtype != F16)
        FAIL(ERR_FORMAT, "%s: tensor '%s' is %s, expected F32, BF16 or F16", from->file, from->name,
             from->dtype_text);
    float *values = must_malloc(2 * (size_t)n * sizeof *values);
    *to = *from;
    to->turned = true;
    to->bytes = (uint8_t *)values;
    to->size = (size_t)n * sizeof *values;
    to->dtype = F32;
    strcpy(to->dtype_text, dtype_text(F32));
    TRY(stored_tensor_read(from, TENSOR(values + n, F32, n)));
    lay(values, values + n, e, true);
    return OK;
}

static Status read_entry(StoredTensor *to, const Gguf *g, const Param *p, bool *used) {
    Entry e = entry_of(p, BF16);
    const StoredTensor *t = gguf_find_tensor(g, e.name);
    if (!t) FAIL(ERR_FORMAT, "%s: tensor '%s' is missing", g->path, e.name);
    used[t - g->tensors] = true;
    bool same = t->ndim == e.ndim;
    for (int d = 0; same && d < e.ndim; d++) same = t->shape[d] == e.shape[d];
    if (!same)
        FAIL(ERR_FORMAT, "%s: tensor '%s' has another shape than %s, which it stands for", g->path,
             e.name, p->name);
    *to = *t;
    Status status =
        e.layout == LINEAR || e.layout == PLAIN || e.layout == SQUEEZED ? OK : turn(to, t, &e);
    to->name = must_strdup(p->name);
    to->ndim = p->value.ndim;
    memcpy(to->shape, p->value.shape, sizeof p->value.shape);
    return status;
}

Status mmproj_read(Mmproj *m, const ModelConfig *config) {
    Gemma names; /* declared for its names and shapes only */
    const Gguf *g = &m->file;
    Status status = OK;
    gemma_declare(&names, config, BF16, device_cpu());
    gemma_declare_media(&names);
    bool *used = must_calloc((size_t)g->count + 1, sizeof *used);
    m->tensors = must_calloc((size_t)names.params.count + 1, sizeof *m->tensors);
    for (int i = 0; i < names.params.count && status == OK; i++)
        if (names.params.items[i]->tower)
            status = read_entry(&m->tensors[m->count++], g, names.params.items[i], used);
    for (int i = 0; i < g->count && status == OK; i++)
        if (!used[i])
            status = status_fail(ERR_FORMAT, "%s: tensor '%s' is unknown to these towers", g->path,
                                 g->tensors[i].name);
    free(used);
    gemma_free(&names);
    return status;
}

void mmproj_close(Mmproj *m) {
    for (int i = 0; i < m->count; i++) {
        free(m->tensors[i].name);
        if (m->tensors[i].turned) free((void *)m->tensors[i].bytes);
    }
    free(m->tensors);
    gguf_close(&m->file);
    *m = (Mmproj){0};
}
