/* media_config.c - vision_config and audio_config, checked. */
#include "configs/media_config.h"

#include <inttypes.h>
#include <string.h>

static Status get_size(Node *map, const char *key, int64_t *out, int64_t most) {
    TRY(node_get_int(map, key, out, false));
    if (*out < 1 || *out > most)
        FAIL(ERR_CONFIG, "%s:%d: %s is %" PRId64 ", expected 1 to %" PRId64, map->file, map->line,
             key, *out, most);
    return OK;
}

static Status read_vision_tower(VisionConfig *v, Node *map) {
    TRY(get_size(map, "hidden_size", &v->hidden_size, 32768));
    TRY(get_size(map, "num_hidden_layers", &v->num_hidden_layers, 256));
    TRY(get_size(map, "num_attention_heads", &v->num_attention_heads, 1024));
    v->head_dim = v->hidden_size / v->num_attention_heads;
    TRY(get_size(map, "head_dim", &v->head_dim, 512));
    TRY(get_size(map, "intermediate_size", &v->intermediate_size, 1 << 20));
    TRY(get_size(map, "position_embedding_size", &v->position_embedding_size, 1 << 20));
    TRY(node_get_bool(map, "standardize", &v->standardize, false));
    TRY(node_get_bool(map, "use_clipped_linears", &v->use_clipped_linears, false));
    Node *rope = node_find(map, "rope_parameters");
    if (!node_is_null(rope)) TRY(node_get_double(rope, "rope_theta", &v->rope_theta, false));
    int64_t key_heads = v->num_attention_heads;
    const char *activation = "gelu_pytorch_tanh";
    TRY(node_get_int(map, "num_key_value_heads", &key_heads, false));
    TRY(node_get_text(map, "hidden_activation", &activation, false));
    if (key_heads != v->num_attention_heads || v->head_dim % 4 ||
        v->head_dim * v->num_attention_heads != v->hidden_size)
        FAIL(ERR_CONFIG,
             "%s:%d: %" PRId64 " heads of %" PRId64 " and %" PRId64
             " key heads do not make a hidden_size of %" PRId64,
             map->file, map->line, v->num_attention_heads, v->head_dim, key_heads, v->hidden_size);
    if (strcmp(activation, "gelu_pytorch_tanh"))
        FAIL(ERR_CONFIG, "%s:%d: hidden_activation is %s, expected gelu_pytorch_tanh", map->file,
             map->line, activation);
    return OK;
}

static Status read_vision(VisionConfig *v, Node *map, Node *root) {
    const char *type = "gemma4_vision";
    TRY(node_get_text(map, "model_type", &type, false));
    bool unified = !strcmp(type, "gemma4_unified_vision");
    if (!unified && strcmp(type, "gemma4_vision"))
        FAIL(ERR_CONFIG,
             "%s:%d: model_type is '%s', expected gemma4_vision or "
             "gemma4_unified_vision",
             map->file, map->line, type);
    *v = (VisionConfig){.path = unified ? MEDIA_UNIFIED : MEDIA_TOWER,
                        .hidden_size = 768,
                        .num_hidden_layers = 16,
                        .num_attention_heads = 12,
                        .intermediate_size = 3072,
                        .patch_size = 16,
                        .pooling_kernel_size = 3,
                        .position_embedding_size = 10240,
                        .soft_tokens = 280,
                        .rope_theta = 100.0,
                        .rms_norm_eps = 1e-6,
                        .mm_embed_dim = 3840,
                        .mm_posemb_size = 1120};
    TRY(get_size(map, "patch_size", &v->patch_size, 256));
    TRY(get_size(map, "pooling_kernel_size", &v->pooling_kernel_size, 16));
    TRY(node_get_double(map, "rms_norm_eps", &v->rms_norm_eps, false));
    TRY(get_size(root, "vision_soft_tokens_per_image", &v->soft_tokens, 1120));
    if (unified) {
        TRY(get_size(map, "num_soft_tokens", &v->soft_tokens, 1120));
        TRY(get_size(map, "mm_embed_dim", &v->mm_embed_dim, 32768));
        TRY(get_size(map, "mm_posemb_size", &v->mm_posemb_size, 1 << 20));
        return OK;
    }
    return read_vision_tower(v, map);
}

static Status read_channels(AudioConfig *a, Node *map) {
    Node *list = node_find(map, "subsampling_conv_channels");
    if (node_is_null(list)) return OK;
    if (list->kind != NODE_LIST || list->count != 2)
        FAIL(ERR_CONFIG, "%s:%d: subsampling_conv_channels: expected two numbers", list->file,
             list->line);
    for (int i = 0; i < 2; i++) {
        TRY(node_to_int(list->items[i], "subsampling_conv_channels", &a->channels[i]));
        if (a->channels[i] < 1 || a->channels[i] > 4096)
            FAIL(ERR_CONFIG, "%s:%d: %" PRId64 " channels, expected 1 to 4096", list->file,
                 list->line, a->channels[i]);
    }
    return OK;
}

static Status read_audio(AudioConfig *a, Node *map) {
    const char *type = "gemma4_audio", *activation = "silu";
    int64_t left = 13, right = 0, chunk = 12;
    TRY(node_get_text(map, "model_type", &type, false));
    bool unified = !strcmp(type, "gemma4_unified_audio");
    if (!unified && strcmp(type, "gemma4_audio"))
        FAIL(ERR_CONFIG, "%s:%d: model_type is '%s', expected gemma4_audio or gemma4_unified_audio",
             map->file, map->line, type);
    *a = (AudioConfig){.path = unified ? MEDIA_UNIFIED : MEDIA_TOWER,
                       .hidden_size = 1024,
                       .num_hidden_layers = 12,
                       .num_attention_heads = 8,
                       .output_proj_dims = 1536,
                       .channels = {128, 32},
                       .conv_kernel_size = 5,
                       .use_clipped_linears = true,
                       .logit_cap = 50.0,
                       .residual_weight = 0.5,
                       .rms_norm_eps = 1e-6,
                       .audio_embed_dim = 640};
    TRY(node_get_double(map, "rms_norm_eps", &a->rms_norm_eps, false));
    if (unified) return get_size(map, "audio_embed_dim", &a->audio_embed_dim, 32768);
    TRY(get_size(map, "hidden_size", &a->hidden_size, 32768));
    TRY(get_size(map, "num_hidden_layers", &a->num_hidden_layers, 256));
    TRY(get_size(map, "num_attention_heads", &a->num_attention_heads, 1024));
    TRY(get_size(map, "output_proj_dims", &a->output_proj_dims, 32768));
    TRY(get_size(map, "conv_kernel_size", &a->conv_kernel_size, 16));
    TRY(get_size(map, "attention_chunk_size", &chunk, 1024));
    TRY(get_size(map, "attention_context_left", &left, 33));
    TRY(node_get_int(map, "attention_context_right", &right, false));
    TRY(node_get_bool(map, "use_clipped_linears", &a->use_clipped_linears, false));
    TRY(node_get_double(map, "attention_logit_cap", &a->logit_cap, false));
    TRY(node_get_double(map, "residual_weight", &a->residual_weight, false));
    TRY(node_get_text(map, "hidden_act", &activation, false));
    TRY(read_channels(a, map));
    a->keys = left - 1; /* the window test of the reference leaves out the farthest */
    if (right || a->keys < 1 || a->hidden_size % (2 * a->num_attention_heads) ||
        strcmp(activation, "silu") || a->logit_cap <= 0)
        FAIL(ERR_CONFIG,
             "%s:%d: expected attention_context_right 0, attention_context_left above 1, a "
             "hidden_size that %" PRId64 " heads divide, hidden_act silu and a logit cap",
             map->file, map->line, a->num_attention_heads);
    return OK;
}

Status media_config_read(VisionConfig *vision, AudioConfig *audio, Node *root, const char *name) {
    Node *v = node_find(root, "vision_config"), *a = node_find(root, "audio_config");
    *vision = (VisionConfig){0};
    *audio = (AudioConfig){0};
    if (!node_is_null(v) && v->kind != NODE_MAP)
        FAIL(ERR_CONFIG, "%s:%d: vision_config is not a map", name, v->line);
    if (!node_is_null(a) && a->kind != NODE_MAP)
        FAIL(ERR_CONFIG, "%s:%d: audio_config is not a map", name, a->line);
    if (!node_is_null(v)) TRY(read_vision(vision, v, root));
    if (!node_is_null(a)) TRY(read_audio(audio, a));
    return OK;
}

bool media_is_budget(int64_t n) {
    return n == 0 || n == 70 || n == 140 || n == 280 || n == 560 || n == 1120;
}
