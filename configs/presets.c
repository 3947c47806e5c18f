/* presets.c - the released shapes as data, and config.json written from them. */
#include "configs/model_config.h"

#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct Preset {
    const char *name, *model_type, *architecture;
    int layers, period; /* every period-th layer is a full one */
    int hidden, heads, kv_heads, global_kv_heads, head_dim, global_head_dim, mlp, window, shared;
    int per_layer_input, experts, top_k, expert_mlp, vocab, positions;
    bool k_eq_v, double_wide;
} Preset;

static const Preset presets[] = {
    {.name = "tiny",
     .model_type = "gemma4_text",
     .architecture = "Gemma4ForCausalLM",
     .layers = 6,
     .period = 3,
     .hidden = 128,
     .heads = 4,
     .kv_heads = 1,
     .head_dim = 32,
     .global_head_dim = 64,
     .mlp = 384,
     .window = 128,
     .shared = 3,
     .per_layer_input = 32,
     .vocab = 2048,
     .positions = 4096,
     .double_wide = true},
    {.name = "e2b",
     .model_type = "gemma4_text",
     .architecture = "Gemma4ForCausalLM",
     .layers = 35,
     .period = 5,
     .hidden = 1536,
     .heads = 8,
     .kv_heads = 1,
     .head_dim = 256,
     .global_head_dim = 512,
     .mlp = 6144,
     .window = 512,
     .shared = 20,
     .per_layer_input = 256,
     .vocab = 262144,
     .positions = 131072,
     .double_wide = true},
    {.name = "e4b",
     .model_type = "gemma4_text",
     .architecture = "Gemma4ForCausalLM",
     .layers = 42,
     .period = 6,
     .hidden = 2560,
     .heads = 8,
     .kv_heads = 2,
     .head_dim = 256,
     .global_head_dim = 512,
     .mlp = 10240,
     .window = 512,
     .shared = 18,
     .per_layer_input = 256,
     .vocab = 262144,
     .positions = 131072},
    {.name = "12b",
     .model_type = "gemma4_unified_text",
     .architecture = "Gemma4UnifiedForCausalLM",
     .layers = 48,
     .period = 6,
     .hidden = 3840,
     .heads = 16,
     .kv_heads = 8,
     .global_kv_heads = 1,
     .head_dim = 256,
     .global_head_dim = 512,
     .mlp = 15360,
     .window = 1024,
     .vocab = 262144,
     .positions = 262144,
     .k_eq_v = true},
    {.name = "26b-a4b",
     .model_type = "gemma4_text",
     .architecture = "Gemma4ForCausalLM",
     .layers = 30,
     .period = 6,
     .hidden = 2816,
     .heads = 16,
     .kv_heads = 8,
     .global_kv_heads = 2,
     .head_dim = 256,
     .global_head_dim = 512,
     .mlp = 2112,
     .window = 1024,
     .experts = 128,
     .top_k = 8,
     .expert_mlp = 704,
     .vocab = 262144,
     .positions = 262144,
     .k_eq_v = true},
    {.name = "31b",
     .model_type = "gemma4_text",
     .architecture = "Gemma4ForCausalLM",
     .layers = 60,
     .period = 6,
     .hidden = 5376,
     .heads = 32,
     .kv_heads = 16,
     .global_kv_heads = 4,
     .head_dim = 256,
     .global_head_dim = 512,
     .mlp = 21504,
     .window = 1024,
     .vocab = 262144,
     .positions = 262144,
     .k_eq_v = true},
};

/* Sharing layers for a model cut or grown to `layers`: the same share, but at least one owner of
 * each kind. */
static int64_t scaled_sharing(int64_t shared, int64_t old_layers, int64_t layers,
                              int64_t first_full) {
    int64_t result = (shared * layers + old_layers / 2) / old_layers;
    while (result > 0 && layers - result <= first_full) result--;
    return result;
}

static json_t *optional_int(int value) {
    return value ? json_integer(value) : json_null();
}

static const Preset *find_preset(const char *name) {
    for (size_t i = 0; i < sizeof presets / sizeof *presets; i++)
        if (!strcmp(presets[i].name, name)) return &presets[i];
    return NULL;
}

char *preset_config(const char *name, int64_t layers) {
    const Preset *p = find_preset(name);
    if (!p) return NULL;
    int64_t L = layers > 0 ? layers : p->layers;
    json_t *types = json_array();
    for (int64_t l = 0; l < L; l++)
        json_array_append_new(types, json_string((l + 1) % p->period == 0 || l == L - 1
                                                     ? "full_attention"
                                                     : "sliding_attention"));
    int64_t first_full = L < p->period ? L - 1 : p->period - 1;
    json_t *config = json_pack("{s:[s], s:s, s:s, s:b, s:i, s:i, s:[i,i], s:i}", "architectures",
                               p->architecture, "model_type", p->model_type, "dtype", "bfloat16",
                               "tie_word_embeddings", 1, "pad_token_id", 0, "bos_token_id", 2,
                               "eos_token_id", 1, 106, "vocab_size", p->vocab);
#define SET_KEY(key, value) json_object_set_new(config, key, value)
    SET_KEY("hidden_size", json_integer(p->hidden));
    SET_KEY("num_hidden_layers", json_integer(L));
    SET_KEY("layer_types", types);
    SET_KEY("num_attention_heads", json_integer(p->heads));
    SET_KEY("num_key_value_heads", json_integer(p->kv_heads));
    SET_KEY("num_global_key_value_heads", optional_int(p->global_kv_heads));
    SET_KEY("head_dim", json_integer(p->head_dim));
    SET_KEY("global_head_dim", json_integer(p->global_head_dim));
    SET_KEY("intermediate_size", json_integer(p->mlp));
    SET_KEY("use_double_wide_mlp", json_boolean(p->double_wide));
    SET_KEY("sliding_window", json_integer(p->window));
    SET_KEY("num_kv_shared_layers",
            json_integer(scaled_sharing(p->shared, p->layers, L, first_full)));
    SET_KEY("attention_k_eq_v", json_boolean(p->k_eq_v));
    SET_KEY("hidden_size_per_layer_input", json_integer(p->per_layer_input));
    SET_KEY("vocab_size_per_layer_input", json_integer(p->vocab));
    SET_KEY("enable_moe_block", json_boolean(p->experts));
    SET_KEY("num_experts", optional_int(p->experts));
    SET_KEY("top_k_experts", optional_int(p->top_k));
    SET_KEY("moe_intermediate_size", optional_int(p->expert_mlp));
    SET_KEY("max_position_embeddings", json_integer(p->positions));
    SET_KEY("hidden_activation", json_string("gelu_pytorch_tanh"));
    SET_KEY("final_logit_softcapping", json_real(30.0));
    SET_KEY("rms_norm_eps", json_real(1e-6));
    SET_KEY("use_bidirectional_attention", p->k_eq_v ? json_string("vision") : json_null());
    SET_KEY("rope_parameters",
            json_pack("{s:{s:f,s:f,s:s}, s:{s:f,s:s}}", "full_attention", "partial_rotary_factor",
                      0.25, "rope_theta", 1e6, "rope_type", "proportional", "sliding_attention",
                      "rope_theta", 1e4, "rope_type", "default"));
#undef SET_KEY
    char *text = json_dumps(config, JSON_INDENT(2) | JSON_REAL_PRECISION(15));
    json_decref(config);
    return text;
}

/* vision_config and audio_config of a preset; NULL: it has none. */
static json_t *vision_of(const Preset *p) {
    bool tiny = !strcmp(p->name, "tiny"), small = p->per_layer_input > 0;
    if (!strcmp(p->name, "12b"))
        return json_pack("{s:s, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:f}", "model_type",
                         "gemma4_unified_vision", "patch_size", 16, "pooling_kernel_size", 3,
                         "model_patch_size", 48, "mm_embed_dim", 3840, "output_proj_dims", 3840,
                         "mm_posemb_size", 1120, "num_soft_tokens", 280, "rms_norm_eps", 1e-6);
    int hidden = tiny ? 64 : small ? 768 : 1152, heads = tiny ? 4 : small ? 12 : 16;
    return json_pack(
        "{s:s, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:b, s:b, s:f, s:{s:f, s:s}}",
        "model_type", "gemma4_vision", "hidden_size", hidden, "num_hidden_layers",
        tiny    ? 2
        : small ? 16
                : 27,
        "num_attention_heads", heads, "num_key_value_heads", heads, "head_dim", hidden / heads,
        "global_head_dim", hidden / heads, "intermediate_size",
        tiny    ? 128
        : small ? 3072
                : 4304,
        "patch_size", 16, "pooling_kernel_size", 3, "position_embedding_size", 10240, "standardize",
        !small, "use_clipped_linears", small, "rms_norm_eps", 1e-6, "rope_parameters", "rope_theta",
        100.0, "rope_type", "default");
}

static json_t *audio_of(const Preset *p) {
    bool tiny = !strcmp(p->name, "tiny");
    if (!strcmp(p->name, "12b"))
        return json_pack("{s:s, s:i, s:i, s:i, s:i, s:f}", "model_type", "gemma4_unified_audio",
                         "audio_embed_dim", 640, "hidden_size", 640, "output_proj_dims", 640,
                         "audio_samples_per_token", 640, "rms_norm_eps", 1e-6);
    if (!p->per_layer_input) return json_null();
    return json_pack("{s:s, s:i, s:i, s:i, s:[i, i], s:i, s:i, s:i, s:i, s:i, s:b, s:f, s:f, s:s, "
                     "s:f}",
                     "model_type", "gemma4_audio", "hidden_size", tiny ? 64 : 1024,
                     "num_hidden_layers", tiny ? 2 : 12, "num_attention_heads", tiny ? 4 : 8,
                     "subsampling_conv_channels", 128, tiny ? 8 : 32, "conv_kernel_size", 5,
                     "output_proj_dims", tiny ? 96 : 1536, "attention_chunk_size", 12,
                     "attention_context_left", 13, "attention_context_right", 0,
                     "use_clipped_linears", 1, "attention_logit_cap", 50.0, "residual_weight", 0.5,
                     "hidden_act", "silu", "rms_norm_eps", 1e-6);
}

char *preset_config_with_media(const char *name, int64_t layers) {
    const Preset *p = find_preset(name);
    char *alone = preset_config(name, layers), *text;
    if (!p) return NULL;
    bool unified = !strcmp(p->name, "12b");
    json_t *inner = json_loads(alone, 0, NULL);
    json_t *root = json_pack(
        "{s:[s], s:s, s:s, s:b, s:[i,i], s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i}", "architectures",
        unified ? "Gemma4UnifiedForConditionalGeneration" : "Gemma4ForConditionalGeneration",
        "model_type", unified ? "gemma4_unified" : "gemma4", "dtype", "bfloat16",
        "tie_word_embeddings", 1, "eos_token_id", 1, 106, "image_token_id", 258880,
        "audio_token_id", 258881, "video_token_id", 258884, "boi_token_id", 255999, "eoi_token_id",
        258882, "boa_token_id", 256000, "eoa_token_id", 258883, "vision_soft_tokens_per_image",
        280);
    json_object_del(inner, "architectures");
    json_object_set_new(root, "text_config", inner);
    json_object_set_new(root, "vision_config", vision_of(p));
    json_object_set_new(root, "audio_config", audio_of(p));
    text = json_dumps(root, JSON_INDENT(2) | JSON_REAL_PRECISION(15));
    json_decref(root);
    free(alone);
    return text;
}

Status model_config_with_layers(char **json, const char *old, size_t size, const char *name,
                                int64_t layers) {
    ModelConfig before;
    TRY(model_config_parse(&before, old, size, name));
    json_error_t error;
    json_t *root = json_loadb(old, size, 0, &error);
    if (!root) FAIL(ERR_FORMAT, "%s:%d: %s", name, error.line, error.text);
    json_t *text = json_object_get(root, "text_config");
    if (!text) text = root;
    json_t *types = json_array(), *overrides = json_object_get(text, "per_layer_config");
    int64_t first_full = layers - 1;
    for (int64_t l = 0; l < layers; l++) {
        bool full = before.layer[l % before.num_hidden_layers].kind == FULL || l == layers - 1;
        if (full && l < first_full) first_full = l;
        json_array_append_new(types, json_string(full ? "full_attention" : "sliding_attention"));
    }
    if (json_is_object(
            overrides)) { /* back to the spelling by kind: the last layer is always full */
        int64_t last = before.num_hidden_layers - 1;
        json_object_set_new(text, "global_head_dim", json_integer(before.layer[last].head_dim));
        json_object_set_new(text, "num_global_key_value_heads",
                            json_integer(before.layer[last].num_key_value_heads));
        json_object_del(text, "per_layer_config");
    }
    json_object_set_new(text, "layer_types", types);
    json_object_set_new(text, "num_hidden_layers", json_integer(layers));
    json_object_set_new(text, "num_kv_shared_layers",
                        json_integer(scaled_sharing(before.num_kv_shared_layers,
                                                    before.num_hidden_layers, layers, first_full)));
    *json = json_dumps(root, JSON_INDENT(2) | JSON_REAL_PRECISION(15));
    json_decref(root);
    return OK;
}
