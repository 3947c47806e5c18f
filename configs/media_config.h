/* media_config.h - what config.json says of pictures and sound, under its own names. */
#ifndef MEDIA_CONFIG_H
#define MEDIA_CONFIG_H

#include "configs/node.h"

/* Where a model takes pictures: by a tower, by an embedder of merged patches (unified), or not. */
typedef enum MediaPath { MEDIA_NONE, MEDIA_TOWER, MEDIA_UNIFIED } MediaPath;

typedef struct VisionConfig {
    MediaPath path;
    int64_t hidden_size, num_hidden_layers, num_attention_heads, head_dim, intermediate_size;
    int64_t patch_size, pooling_kernel_size, position_embedding_size;
    int64_t soft_tokens; /* of a picture at most: 70, 140, 280, 560 or 1120 */
    bool standardize, use_clipped_linears;
    double rope_theta, rms_norm_eps;
    int64_t mm_embed_dim, mm_posemb_size; /* unified only */
} VisionConfig;

typedef struct AudioConfig {
    MediaPath path;
    int64_t hidden_size, num_hidden_layers, num_attention_heads, output_proj_dims;
    int64_t channels[2]; /* of the two convolutions */
    int64_t conv_kernel_size;
    int64_t keys; /* that a row sees, itself included */
    bool use_clipped_linears;
    double logit_cap, residual_weight, rms_norm_eps;
    int64_t audio_embed_dim; /* unified only: samples of a soft token */
} AudioConfig;

/* Mel bins of a frame that the audio tower reads. */
#define MEL_BINS 128

/* Whether a picture or a frame may have so many soft tokens: 70, 140, 280, 560, 1120, or 0 for what
 * the model says. */
bool media_is_budget(int64_t soft_tokens);

/* Reads vision_config and audio_config of a model's config.json; absent or null: MEDIA_NONE. */
Status media_config_read(VisionConfig *vision, AudioConfig *audio, Node *root, const char *name);

#endif
