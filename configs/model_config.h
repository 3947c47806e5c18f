/* model_config.h - what config.json says, under its own names, and what that means for one layer.
 */
#ifndef MODEL_CONFIG_H
#define MODEL_CONFIG_H

#include "configs/media_config.h"

#include <stdint.h>

#define LAYERS_MAX  256
#define EXPERTS_MAX 1024

typedef enum AttentionKind { SLIDING, FULL, ATTENTION_KINDS } AttentionKind;

/* Whether the soft tokens of a picture see those behind them. */
typedef enum Bidirectional {
    BIDIRECTIONAL_NONE,
    BIDIRECTIONAL_SLIDING, /* in sliding layers, and no farther back than the window */
    BIDIRECTIONAL_ALL, /* in all layers, and all of their picture whatever the window: unified */
} Bidirectional;

typedef struct RopeConfig {
    double rope_theta, partial_rotary_factor, factor;
    bool proportional;
} RopeConfig;

typedef struct ModelConfig {
    char model_type[64];   /* of the whole: gemma4, gemma4_text, gemma4_unified, ... */
    char architecture[64]; /* architectures[0] */
    bool multimodal;       /* nested text_config: tensors are prefixed model.language_model. */
    int64_t hidden_size, num_hidden_layers, num_attention_heads, vocab_size,
        max_position_embeddings;
    int64_t intermediate_size, sliding_window, num_kv_shared_layers;
    int64_t hidden_size_per_layer_input, vocab_size_per_layer_input;
    int64_t num_experts, top_k_experts, moe_intermediate_size; /* num_experts 0: no experts */
    int64_t pad_token_id, bos_token_id, image_token_id, audio_token_id,
        video_token_id; /* -1: none */
    int64_t eos_token_id[8];
    int eos_count;
    bool attention_k_eq_v, use_double_wide_mlp;
    Bidirectional use_bidirectional_attention;
    bool assistant; /* a drafter: every layer reads K and V of the model it drafts for */
    int64_t backbone_hidden_size;                       /* that model's hidden_size */
    int64_t num_centroids, centroid_intermediate_top_k; /* 0: its head looks at every token */
    double rms_norm_eps, final_logit_softcapping;       /* softcapping 0: none */
    RopeConfig rope[ATTENTION_KINDS];
    struct {
        AttentionKind kind;
        int64_t head_dim, num_key_value_heads;
    } layer[LAYERS_MAX];
    VisionConfig vision;
    AudioConfig audio;
} ModelConfig;

/* How a module's linears are declared: as they are, one level deeper (q_proj.linear), and so with
 * bounds that clamp input and output. */
typedef enum LinearKind { LINEAR_PLAIN, LINEAR_WRAPPED, LINEAR_CLIPPED } LinearKind;

/* Everything one layer asks about itself. Past this struct no code asks which model it is. */
typedef struct BlockConfig {
    int layer;
    AttentionKind kind;
    int64_t hidden_size, num_attention_heads, num_key_value_heads, head_dim, intermediate_size;
    int64_t per_layer_input; /* width, 0: none */
    int64_t num_experts, top_k_experts, moe_intermediate_size;
    int64_t expert_ranks, expert_rows; /* ranks that have the experts between them, 0: each has all;
                                        * and the most rows that one of them has in a pass */
    bool owns_kv;                      /* computes K and V, else reads those of kv_layer */
    bool v_from_k;                     /* V is the raw output of k_proj */
    int kv_layer;                      /* the layer whose K and V are used; itself when owns_kv */
    bool kv_is_shared;                 /* others read this layer's K and V */
    LinearKind linears;
    bool unscaled; /* has no layer_scalar */
    float eps;
} BlockConfig;

/* Reads the text of a config.json; `name` is for messages. Unknown model types and impossible
 * values are errors; keys that describe other parts (towers, generation) are left alone. */
Status model_config_parse(ModelConfig *config, const char *json, size_t size, const char *name);

BlockConfig block_config(const ModelConfig *config, int layer);

/* The same of the vision tower, whose layers are blocks as well. */
BlockConfig vision_block_config(const VisionConfig *config, int layer);

/* The last layer that owns K and V, plus one: beyond it a token without loss may stop. */
int model_config_kv_layers(const ModelConfig *config);

/* "model.language_model." or "model." */
const char *model_config_prefix(const ModelConfig *config);

/* The config.json of a preset (tiny, e2b, e4b, 12b, 26b-a4b, 31b), text-only; NULL when unknown.
 * Caller frees. `layers` above 0 overrides the layer count, keeping the pattern and the share of
 * K/V owners. */
char *preset_config(const char *name, int64_t layers);

/* The same with the towers that the released model of that name has; `tiny` has small ones. */
char *preset_config_with_media(const char *name, int64_t layers);

/* config.json with another layer count; ERR_CONFIG when the result makes no model. Caller frees. */
Status model_config_with_layers(char **json, const char *old, size_t size, const char *name,
                                int64_t layers);

#endif
