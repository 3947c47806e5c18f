/* audio.h - the audio tower: mel frames of one recording to soft tokens, a quarter as many. */
#ifndef AUDIO_H
#define AUDIO_H

#include "model/linear.h"
#include "model/norm.h"

typedef struct AudioFeedForward {
    Norm pre_layer_norm, post_layer_norm;
    Linear ffw_layer_1, ffw_layer_2;
} AudioFeedForward;

typedef struct AudioAttention {
    Linear q_proj, k_proj, v_proj, post, relative_k_proj;
    Param *per_dim_scale; /* (head_dim), before softplus */
} AudioAttention;

typedef struct LightConv {
    Norm pre_layer_norm, conv_norm;
    Linear linear_start, linear_end;
    Param *depthwise_conv1d; /* (D, 1, taps) */
} LightConv;

typedef struct AudioBlock {
    AudioFeedForward feed_forward1, feed_forward2;
    AudioAttention self_attn;
    LightConv lconv1d;
    Norm norm_pre_attn, norm_post_attn, norm_out;
} AudioBlock;

typedef struct Audio {
    AudioConfig config;
    struct {
        Param *conv; /* (out, in, 3, 3) */
        Param *norm; /* (out) */
    } subsample[2];
    Linear input_proj_linear;
    AudioBlock *blocks;
    Linear output_proj; /* with a bias */
} Audio;

typedef struct FeedForwardSaved {
    Tensor rstd, inner, out, out_rstd; /* (T), (T, 4 D), (T, D), (T) */
} FeedForwardSaved;

typedef struct AudioBlockSaved {
    FeedForwardSaved ff1, ff2;
    Tensor x1, x2, x3, x4;                    /* (T, D) after each of the four parts */
    Tensor q, k, v;                           /* (T, D) projected */
    Tensor kept;                              /* (2, T, heads, keys) f32 */
    Tensor attended, posted;                  /* (T, D) of the heads, after `post` */
    Tensor attn_rstd, posted_rstd;            /* (T) */
    Tensor started, gated, convolved;         /* (T, 2 D), (T, D), (T, D) */
    Tensor conv_in_rstd, conv_rstd, out_rstd; /* (T) */
} AudioBlockSaved;

/* One recording on its way. */
typedef struct AudioSaved {
    StackMode mode;
    int64_t M, T;  /* frames, soft tokens */
    Tensor frames; /* (M, 128, 1) */
    Tensor places; /* (keys, D): sines and cosines of distances */
    struct {
        Tensor sum, out, mean, rstd; /* (rows, bins, channels) twice; (rows * bins) twice */
    } subsample[2];
    AudioBlockSaved *saved;
    Tensor *residual; /* (T, D): input of each block, and the last one's output */
} AudioSaved;

/* Soft tokens of M frames. */
static inline int64_t audio_soft_tokens(int64_t M) {
    return (M + 3) / 4;
}

/* Declares audio_tower.* below the path that is entered. */
void audio_declare(Audio *a, ParamList *params, LinearList *list, const AudioConfig *c);
void audio_free(Audio *a);

void audio_open(AudioSaved *s, const Audio *a, StackMode mode);
void audio_close(AudioSaved *s);
void audio_place(AudioSaved *s, const Audio *a, Arena *arena, DType dtype, int64_t M);

/* out (T, output_proj_dims) from the mel features (M, 128) f32 in host memory. */
void audio_forward(const Audio *a, AudioSaved *s, Tensor out, const float *features, Pass *p);

/* Gradients of the tower's weights from dout; mode KEEP or RECOMPUTE. */
void audio_backward(const Audio *a, AudioSaved *s, Tensor dout, Pass *p);

#endif
