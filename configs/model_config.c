/* model_config.c - reading config.json and resolving it for each layer. */
#include "configs/model_config.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static Status read_layer_types(ModelConfig *c, Node *text) {
    int64_t L = c->num_hidden_layers;
    Node *types = node_find(text, "layer_types");
    if (node_is_null(types)) {
        for (int64_t l = 0; l < L; l++) c->layer[l].kind = (l + 1) % 6 ? SLIDING : FULL;
    } else {
        if (types->kind != NODE_LIST || types->count != L)
            FAIL(ERR_CONFIG, "%s:%d: layer_types is not a list of %" PRId64 " entries", types->file,
                 types->line, L);
        for (int64_t l = 0; l < L; l++) {
            const char *name;
            TRY(node_to_text(types->items[l], "layer_types", &name));
            if (!strcmp(name, "sliding_attention"))
                c->layer[l].kind = SLIDING;
            else if (!strcmp(name, "full_attention"))
                c->layer[l].kind = FULL;
            else
                FAIL(ERR_CONFIG,
                     "%s:%d: layer type '%s', expected sliding_attention or full_attention",
                     types->file, types->items[l]->line, name);
        }
    }
    c->layer[L - 1].kind = FULL; /* as the reference forces it */
    return OK;
}

/* head_dim and num_key_value_heads of each layer, from either spelling. */
static Status read_heads(ModelConfig *c, Node *text) {
    int64_t head_dim = 256, kv_heads = 4, global_head_dim = 512, global_kv_heads = 0;
    TRY(node_get_int(text, "head_dim", &head_dim, false));
    TRY(node_get_int(text, "num_key_value_heads", &kv_heads, true));
    TRY(node_get_int(text, "global_head_dim", &global_head_dim, false));
    TRY(node_get_int(text, "num_global_key_value_heads", &global_kv_heads, false));
    Node *overrides = node_find(text, "per_layer_config");
    bool spelled = !node_is_null(overrides);
    for (int64_t l = 0; l < c->num_hidden_layers; l++) {
        bool full = c->layer[l].kind == FULL && !spelled;
        c->layer[l].head_dim = full ? global_head_dim : head_dim;
        c->layer[l].num_key_value_heads =
            full && c->attention_k_eq_v && global_kv_heads ? global_kv_heads : kv_heads;
    }
    if (!spelled) return OK;
    if (overrides->kind != NODE_MAP)
        FAIL(ERR_CONFIG, "%s:%d: per_layer_config is not a map", overrides->file, overrides->line);
    for (int i = 0; i < overrides->count; i++) {
        char *end;
        long l = strtol(overrides->keys[i], &end, 10);
        Node *layer = overrides->items[i];
        if (*end || end == overrides->keys[i] || l < 0 || l >= c->num_hidden_layers)
            FAIL(ERR_CONFIG, "%s:%d: per_layer_config names layer '%s' of %" PRId64, layer->file,
                 layer->line, overrides->keys[i], c->num_hidden_layers);
        TRY(node_get_int(layer, "head_dim", &c->layer[l].head_dim, false));
        TRY(node_get_int(layer, "num_key_value_heads", &c->layer[l].num_key_value_heads, false));
    }
    return OK;
}

static Status read_rope(ModelConfig *c, Node *text) {
    static const char *const names[] = {"sliding_attention", "full_attention"};
    c->rope[SLIDING] =
        (RopeConfig){.rope_theta = 10000.0, .partial_rotary_factor = 1.0, .factor = 1.0};
    c->rope[FULL] = (RopeConfig){
        .rope_theta = 1e6, .partial_rotary_factor = 0.25, .factor = 1.0, .proportional = true};
    Node *parameters = node_find(text, "rope_parameters");
    if (node_is_null(parameters)) return OK;
    for (int kind = SLIDING; kind < ATTENTION_KINDS; kind++) {
        Node *rope = node_find(parameters, names[kind]);
        if (node_is_null(rope)) continue;
        const char *type = "default";
        c->rope[kind].partial_rotary_factor = 1.0;
        TRY(node_get_text(rope, "rope_type", &type, false));
        TRY(node_get_double(rope, "rope_theta", &c->rope[kind].rope_theta, true));
        TRY(node_get_double(rope, "partial_rotary_factor", &c->rope[kind].partial_rotary_factor,
                            false));
        TRY(node_get_double(rope, "factor", &c->rope[kind].factor, false));
        c->rope[kind].proportional = !strcmp(type, "proportional");
        if (!c->rope[kind].proportional && strcmp(type, "default"))
            FAIL(ERR_CONFIG, "%s:%d: rope_type '%s', expected default or proportional", rope->file,
                 rope->line, type);
        if (c->rope[kind].partial_rotary_factor <= 0 || c->rope[kind].partial_rotary_factor > 1 ||
            c->rope[kind].rope_theta <= 0 || c->rope[kind].factor <= 0)
            FAIL(ERR_CONFIG, "%s:%d: impossible rope parameters", rope->file, rope->line);
    }
    return OK;
}

static Status read_eos(ModelConfig *c, Node *map) {
    Node *eos = node_find(map, "eos_token_id");
    if (node_is_null(eos)) return OK;
    int count = eos->kind == NODE_LIST ? eos->count : 1;
    if (count > 8) FAIL(ERR_CONFIG, "%s:%d: more than 8 eos_token_id", eos->file, eos->line);
    c->eos_count = count;
    for (int i = 0; i < count; i++)
        TRY(node_to_int(eos->kind == NODE_LIST ? eos->items[i] : eos, "eos_token_id",
                        &c->eos_token_id[i]));
    return OK;
}

static Status check_supported(Node *text, const char *name) {
    const char *activation = "gelu_pytorch_tanh";
    bool bias = false, tied = true;
    double dropout = 0;
    TRY(node_get_text(text, "hidden_activation", &activation, false));
    TRY(node_get_bool(text, "attention_bias", &bias, false));
    TRY(node_get_bool(text, "tie_word_embeddings", &tied, false));
    TRY(node_get_double(text, "attention_dropout", &dropout, false));
    if (strcmp(activation, "gelu_pytorch_tanh"))
        FAIL(ERR_CONFIG, "%s: hidden_activation is %s, expected gelu_pytorch_tanh", name,
             activation);
    if (bias) FAIL(ERR_CONFIG, "%s: attention_bias is true, expected false", name);
    if (!tied) FAIL(ERR_CONFIG, "%s: tie_word_embeddings is false, expected true", name);
    if (dropout != 0) FAIL(ERR_CONFIG, "%s: attention_dropout is %g, expected 0", name, dropout);
    return OK;
}

static Status check_range(const char *name, const char *key, int64_t value, int64_t low,
                          int64_t high) {
    if (value < low || value > high)
        FAIL(ERR_CONFIG, "%s: %s is %" PRId64 ", expected %" PRId64 " to %" PRId64, name, key,
             value, low, high);
    return OK;
}

static Status check_sizes(const ModelConfig *c, const char *name) {
    TRY(check_range(name, "hidden_size", c->hidden_size, 1, 32768));
    TRY(check_range(name, "num_attention_heads", c->num_attention_heads, 1, 1024));
    TRY(check_range(name, "vocab_size", c->vocab_size, 1, 1 << 24));
    TRY(check_range(name, "intermediate_size", c->intermediate_size, 1, 1 << 20));
    TRY(check_range(name, "sliding_window", c->sliding_window, 1, 1 << 30));
    TRY(check_range(name, "num_kv_shared_layers", c->num_kv_shared_layers, 0,
                    c->num_hidden_layers - !c->assistant));
    TRY(check_range(name, "hidden_size_per_layer_input", c->hidden_size_per_layer_input, 0, 32768));
    TRY(check_range(name, "vocab_size_per_layer_input", c->vocab_size_per_layer_input, 1, 1 << 24));
    TRY(check_range(name, "num_experts", c->num_experts, 0, EXPERTS_MAX));
    if (c->hidden_size_per_layer_input && c->vocab_size_per_layer_input < c->vocab_size)
        FAIL(ERR_CONFIG, "%s: vocab_size_per_layer_input is smaller than vocab_size", name);
    if (c->num_experts) {
        TRY(check_range(name, "top_k_experts", c->top_k_experts, 1,
                        c->num_experts < 64 ? c->num_experts : 64));
        TRY(check_range(name, "moe_intermediate_size", c->moe_intermediate_size, 1, 1 << 20));
    }
    for (int64_t l = 0; l < c->num_hidden_layers; l++) {
        TRY(check_range(name, "head_dim", c->layer[l].head_dim, 2, 512));
        TRY(check_range(name, "num_key_value_heads", c->layer[l].num_key_value_heads, 1,
                        c->num_attention_heads));
        if (c->layer[l].head_dim % 2 || c->num_attention_heads % c->layer[l].num_key_value_heads)
            FAIL(ERR_CONFIG,
                 "%s: layer %" PRId64 ": head_dim %" PRId64 " or %" PRId64
                 " key heads do not divide",
                 name, l, c->layer[l].head_dim, c->layer[l].num_key_value_heads);
        if (!c->assistant && l >= c->num_hidden_layers - c->num_kv_shared_layers &&
            block_config(c, (int)l).kv_layer < 0)
            FAIL(ERR_CONFIG,
                 "%s: layer %" PRId64 " shares K and V but no earlier layer of its type owns any",
                 name, l);
    }
    return OK;
}

/* What a drafter's config says beside its layers. */
static Status read_assistant(ModelConfig *c, Node *root, const char *name) {
    bool ordered = false;
    c->num_kv_shared_layers = c->num_hidden_layers;
    c->hidden_size_per_layer_input = 0;
    c->vocab_size_per_layer_input = c->vocab_size;
    c->num_centroids = 2048;
    c->centroid_intermediate_top_k = 32;
    c->backbone_hidden_size = 1536;
    TRY(node_get_int(root, "backbone_hidden_size", &c->backbone_hidden_size, false));
    TRY(node_get_bool(root, "use_ordered_embeddings", &ordered, false));
    TRY(node_get_int(root, "num_centroids", &c->num_centroids, false));
    TRY(node_get_int(root, "centroid_intermediate_top_k", &c->centroid_intermediate_top_k, false));
    TRY(check_range(name, "backbone_hidden_size", c->backbone_hidden_size, 1, 32768));
    TRY(check_range(name, "num_centroids", c->num_centroids, 1, c->vocab_size));
    TRY(check_range(name, "centroid_intermediate_top_k", c->centroid_intermediate_top_k, 1,
                    c->num_centroids));
    if (!ordered) c->num_centroids = 0;
    if (ordered && c->vocab_size % c->num_centroids)
        FAIL(ERR_CONFIG, "%s: %" PRId64 " centroids do not divide %" PRId64 " tokens", name,
             c->num_centroids, c->vocab_size);
    return OK;
}

static Status read_config(ModelConfig *c, Node *root, const char *name) {
    *c = (ModelConfig){.pad_token_id = 0,
                       .bos_token_id = 2,
                       .image_token_id = -1,
                       .audio_token_id = -1,
                       .video_token_id = -1};
    const char *type;
    if (root->kind != NODE_MAP) FAIL(ERR_CONFIG, "%s: is not a map", name);
    TRY(node_get_text(root, "model_type", &type, true));
    c->assistant = !strcmp(type, "gemma4_assistant") || !strcmp(type, "gemma4_unified_assistant");
    bool known = c->assistant || !strcmp(type, "gemma4") || !strcmp(type, "gemma4_unified") ||
                 !strcmp(type, "gemma4_text") || !strcmp(type, "gemma4_unified_text");
    if (!known)
        FAIL(ERR_CONFIG,
             "%s: model_type is '%s', expected gemma4, gemma4_unified, gemma4_text or "
             "gemma4_unified_text",
             name, type);
    snprintf(c->model_type, sizeof c->model_type, "%s", type);
    Node *architectures = node_find(root, "architectures");
    if (architectures && architectures->kind == NODE_LIST && architectures->count &&
        architectures->items[0]->kind == NODE_SCALAR)
        snprintf(c->architecture, sizeof c->architecture, "%s", architectures->items[0]->text);
    c->multimodal = !strcmp(type, "gemma4") || !strcmp(type, "gemma4_unified");
    Node *text = c->multimodal || c->assistant ? node_find(root, "text_config") : root;
    if (node_is_null(text) || text->kind != NODE_MAP)
        FAIL(ERR_CONFIG, "%s: text_config is missing", name);

    TRY(check_supported(text, name));
    TRY(node_get_int(text, "num_hidden_layers", &c->num_hidden_layers, true));
    TRY(check_range(name, "num_hidden_layers", c->num_hidden_layers, 1, LAYERS_MAX));
    TRY(node_get_int(text, "hidden_size", &c->hidden_size, true));
    TRY(node_get_int(text, "num_attention_heads", &c->num_attention_heads, true));
    TRY(node_get_int(text, "vocab_size", &c->vocab_size, true));
    TRY(node_get_int(text, "intermediate_size", &c->intermediate_size, true));
    c->max_position_embeddings = 131072;
    TRY(node_get_int(text, "max_position_embeddings", &c->max_position_embeddings, false));
    c->sliding_window = 512;
    TRY(node_get_int(text, "sliding_window", &c->sliding_window, false));
    TRY(node_get_int(text, "num_kv_shared_layers", &c->num_kv_shared_layers, false));
    c->hidden_size_per_layer_input =
        strstr(type, "unified") ? 0 : 256; /* the reference's class defaults */
    TRY(node_get_int(text, "hidden_size_per_layer_input", &c->hidden_size_per_layer_input, false));
    if (strstr(type, "unified")) c->hidden_size_per_layer_input = 0;
    c->vocab_size_per_layer_input = c->vocab_size;
    TRY(node_get_int(text, "vocab_size_per_layer_input", &c->vocab_size_per_layer_input, false));
    TRY(node_get_bool(text, "attention_k_eq_v", &c->attention_k_eq_v, false));
    TRY(node_get_bool(text, "use_double_wide_mlp", &c->use_double_wide_mlp, false));
    bool experts = false;
    TRY(node_get_bool(text, "enable_moe_block", &experts, false));
    if (experts) {
        TRY(node_get_int(text, "num_experts", &c->num_experts, true));
        TRY(node_get_int(text, "top_k_experts", &c->top_k_experts, true));
        TRY(node_get_int(text, "moe_intermediate_size", &c->moe_intermediate_size, true));
    }
    c->rms_norm_eps = 1e-6;
    TRY(node_get_double(text, "rms_norm_eps", &c->rms_norm_eps, false));
    TRY(node_get_double(text, "final_logit_softcapping", &c->final_logit_softcapping, false));
    const char *bidirectional = NULL;
    TRY(node_get_text(text, "use_bidirectional_attention", &bidirectional, false));
    if (bidirectional && strcmp(bidirectional, "vision"))
        FAIL(ERR_CONFIG, "%s: use_bidirectional_attention is '%s', expected null or vision", name,
             bidirectional);
    c->use_bidirectional_attention = !bidirectional            ? BIDIRECTIONAL_NONE
                                     : strstr(type, "unified") ? BIDIRECTIONAL_ALL
                                                               : BIDIRECTIONAL_SLIDING;

    TRY(node_get_int(text, "pad_token_id", &c->pad_token_id, false));
    TRY(node_get_int(text, "bos_token_id", &c->bos_token_id, false));
    TRY(read_eos(c, text));
    if (c->multimodal) TRY(read_eos(c, root));
    TRY(node_get_int(root, "image_token_id", &c->image_token_id, false));
    TRY(node_get_int(root, "audio_token_id", &c->audio_token_id, false));
    TRY(node_get_int(root, "video_token_id", &c->video_token_id, false));
    TRY(media_config_read(&c->vision, &c->audio, root, name));
    if (c->assistant) TRY(read_assistant(c, root, name));
    TRY(read_layer_types(c, text));
    TRY(read_heads(c, text));
    TRY(read_rope(c, text));
    return check_sizes(c, name);
}

Status model_config_parse(ModelConfig *config, const char *json, size_t size, const char *name) {
    Node *root = NULL;
    TRY(node_parse(&root, json, size, name));
    Status status = read_config(config, root, name);
    node_free(root);
    return status;
}

int model_config_kv_layers(const ModelConfig *c) {
    return (int)(c->num_hidden_layers - c->num_kv_shared_layers);
}

const char *model_config_prefix(const ModelConfig *c) {
    return c->multimodal ? "model.language_model." : "model.";
}

BlockConfig block_config(const ModelConfig *c, int l) {
    int owners = model_config_kv_layers(c);
    BlockConfig b = {.layer = l,
                     .kind = c->layer[l].kind,
                     .hidden_size = c->hidden_size,
                     .num_attention_heads = c->num_attention_heads,
                     .num_key_value_heads = c->layer[l].num_key_value_heads,
                     .head_dim = c->layer[l].head_dim,
                     .intermediate_size = c->intermediate_size,
                     .per_layer_input = c->hidden_size_per_layer_input,
                     .num_experts = c->num_experts,
                     .top_k_experts = c->top_k_experts,
                     .moe_intermediate_size = c->moe_intermediate_size,
                     .owns_kv = l < owners,
                     .kv_layer = l,
                     .eps = (float)c->rms_norm_eps};
    b.v_from_k = c->attention_k_eq_v && b.kind == FULL;
    if (l >= owners) {
        if (c->use_double_wide_mlp) b.intermediate_size *= 2;
        b.kv_layer = owners - 1; /* the last owner of the same kind */
        while (b.kv_layer >= 0 && c->layer[b.kv_layer].kind != b.kind) b.kv_layer--;
    }
    for (int later = owners; b.owns_kv && later < c->num_hidden_layers; later++) {
        int owner = owners - 1;
        while (owner >= 0 && c->layer[owner].kind != c->layer[later].kind) owner--;
        if (owner == l) b.kv_is_shared = true;
    }
    return b;
}

BlockConfig vision_block_config(const VisionConfig *c, int l) {
    return (BlockConfig){.layer = l,
                         .kind = FULL,
                         .hidden_size = c->hidden_size,
                         .num_attention_heads = c->num_attention_heads,
                         .num_key_value_heads = c->num_attention_heads,
                         .head_dim = c->head_dim,
                         .intermediate_size = c->intermediate_size,
                         .owns_kv = true,
                         .kv_layer = l,
                         .linears = c->use_clipped_linears ? LINEAR_CLIPPED : LINEAR_WRAPPED,
                         .unscaled = true,
                         .eps = (float)c->rms_norm_eps};
}
