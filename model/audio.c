/* audio.c - two strided convolutions, each with a layer norm over channels and a ReLU; then blocks
 *   x1 = x + 1/2 norm(W2 silu(W1 norm(x)))
 *   x2 = x1 + norm(post(attention(norm(x1))))
 *   x3 = x2 + end(silu(norm(depthwise(glu(start(norm(x2)))))))
 *   x4 = x3 + 1/2 norm(W2' silu(W1' norm(x3)));  y = norm(x4), without a residual;
 * and a projection with a bias. A row attends to itself and the eleven before it, by relative
 * places; q is scaled by softplus(per_dim_scale) / (ln 2 sqrt(head_dim)), k by ln(1 + e) / ln 2.
 *
 * The clamps that the reference puts between the parts lie at 1e10 and change no f32 or bf16. */
#include "model/audio.h"
#include "kernels/activation.h"
#include "kernels/convolution.h"
#include "kernels/elementwise.h"
#include "kernels/local_attention.h"
#include "kernels/matmul.h"
#include "kernels/norm.h"

#include <math.h>
#include <stdlib.h>

/* ---- declaring and placing ---- */

static LinearKind kind_of(const AudioConfig *c) {
    return c->use_clipped_linears ? LINEAR_CLIPPED : LINEAR_WRAPPED;
}

static void feed_forward_declare(AudioFeedForward *f, ParamList *params, LinearList *list,
                                 const char *name, const AudioConfig *c) {
    int64_t D = c->hidden_size;
    params_enter(params, "%s", name);
    norm_declare(&f->pre_layer_norm, params, "pre_layer_norm", D, (float)c->rms_norm_eps);
    norm_declare(&f->post_layer_norm, params, "post_layer_norm", D, (float)c->rms_norm_eps);
    linear_declare_kind(&f->ffw_layer_1, params, list, kind_of(c), "ffw_layer_1", 4 * D, D);
    linear_declare_kind(&f->ffw_layer_2, params, list, kind_of(c), "ffw_layer_2", D, 4 * D);
    params_leave(params);
}

static void attention_declare(AudioAttention *a, ParamList *params, LinearList *list,
                              const AudioConfig *c) {
    int64_t D = c->hidden_size;
    params_enter(params, "self_attn");
    linear_declare_kind(&a->q_proj, params, list, kind_of(c), "q_proj", D, D);
    linear_declare_kind(&a->k_proj, params, list, kind_of(c), "k_proj", D, D);
    linear_declare_kind(&a->v_proj, params, list, kind_of(c), "v_proj", D, D);
    linear_declare_kind(&a->post, params, list, kind_of(c), "post", D, D);
    linear_declare(&a->relative_k_proj, params, list, "relative_k_proj", D, D);
    a->per_dim_scale = PARAMS_ADD(params, "per_dim_scale", D / c->num_attention_heads);
    a->per_dim_scale->decay = false;
    params_leave(params);
}

static void conv_declare(LightConv *v, ParamList *params, LinearList *list, const AudioConfig *c) {
    int64_t D = c->hidden_size;
    params_enter(params, "lconv1d");
    norm_declare(&v->pre_layer_norm, params, "pre_layer_norm", D, (float)c->rms_norm_eps);
    norm_declare(&v->conv_norm, params, "conv_norm", D, (float)c->rms_norm_eps);
    linear_declare_kind(&v->linear_start, params, list, kind_of(c), "linear_start", 2 * D, D);
    linear_declare_kind(&v->linear_end, params, list, kind_of(c), "linear_end", D, D);
    v->depthwise_conv1d = PARAMS_ADD(params, "depthwise_conv1d.weight", D, 1, c->conv_kernel_size);
    params_leave(params);
}

static void subsample_declare(Audio *a, ParamList *params, LinearList *list) {
    const AudioConfig *c = &a->config;
    params_enter(params, "subsample_conv_projection");
    for (int i = 0; i < 2; i++) {
        params_enter(params, "layer%d", i);
        a->subsample[i].conv =
            PARAMS_ADD(params, "conv.weight", c->channels[i], i ? c->channels[0] : 1, 3, 3);
        a->subsample[i].norm = PARAMS_ADD(params, "norm.weight", c->channels[i]);
        a->subsample[i].norm->decay = false;
        params_leave(params);
    }
    linear_declare(&a->input_proj_linear, params, list, "input_proj_linear", c->hidden_size,
                   MEL_BINS / 4 * c->channels[1]);
    params_leave(params);
}

void audio_declare(Audio *a, ParamList *params, LinearList *list, const AudioConfig *c) {
    int64_t D = c->hidden_size;
    float eps = (float)c->rms_norm_eps;
    *a = (Audio){.config = *c};
    params_enter(params, "audio_tower");
    subsample_declare(a, params, list);
    a->blocks = must_calloc((size_t)c->num_hidden_layers, sizeof *a->blocks);
    for (int l = 0; l < c->num_hidden_layers; l++) {
        AudioBlock *b = &a->blocks[l];
        params_enter(params, "layers.%d", l);
        feed_forward_declare(&b->feed_forward1, params, list, "feed_forward1", c);
        feed_forward_declare(&b->feed_forward2, params, list, "feed_forward2", c);
        attention_declare(&b->self_attn, params, list, c);
        conv_declare(&b->lconv1d, params, list, c);
        norm_declare(&b->norm_pre_attn, params, "norm_pre_attn", D, eps);
        norm_declare(&b->norm_post_attn, params, "norm_post_attn", D, eps);
        norm_declare(&b->norm_out, params, "norm_out", D, eps);
        params_leave(params);
    }
    linear_declare(&a->output_proj, params, list, "output_proj", c->output_proj_dims, D);
    a->output_proj.bias = PARAMS_ADD(params, "output_proj.bias", c->output_proj_dims);
    a->output_proj.bias->decay = false;
    params_leave(params);
}

void audio_free(Audio *a) {
    free(a->blocks);
    *a = (Audio){0};
}

void audio_open(AudioSaved *s, const Audio *a, StackMode mode) {
    size_t L = (size_t)a->config.num_hidden_layers;
    *s = (AudioSaved){.mode = mode};
    s->saved = must_calloc(L, sizeof *s->saved);
    s->residual = must_calloc(L + 1, sizeof *s->residual);
}

void audio_close(AudioSaved *s) {
    free(s->saved);
    free(s->residual);
    *s = (AudioSaved){0};
}

static void place_feed_forward(FeedForwardSaved *s, Arena *arena, DType dtype, int64_t T,
                               int64_t D) {
    s->rstd = ARENA_TENSOR(arena, F32, T);
    s->inner = ARENA_TENSOR(arena, dtype, T, 4 * D);
    s->out = ARENA_TENSOR(arena, dtype, T, D);
    s->out_rstd = ARENA_TENSOR(arena, F32, T);
}

static void place_block(AudioBlockSaved *s, Arena *arena, const AudioConfig *c, DType dtype,
                        int64_t T) {
    int64_t D = c->hidden_size;
    Tensor *const rows[] = {&s->x1, &s->x2,       &s->x3,     &s->x4,    &s->q,        &s->k,
                            &s->v,  &s->attended, &s->posted, &s->gated, &s->convolved};
    Tensor *const factors[] = {&s->attn_rstd, &s->posted_rstd, &s->conv_in_rstd, &s->conv_rstd,
                               &s->out_rstd};
    place_feed_forward(&s->ff1, arena, dtype, T, D);
    place_feed_forward(&s->ff2, arena, dtype, T, D);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        *rows[i] = ARENA_TENSOR(arena, dtype, T, D);
    for (size_t i = 0; i < sizeof factors / sizeof *factors; i++)
        *factors[i] = ARENA_TENSOR(arena, F32, T);
    s->started = ARENA_TENSOR(arena, dtype, T, 2 * D);
    s->kept = ARENA_TENSOR(arena, F32, 2, T, c->num_attention_heads, c->keys);
}

void audio_place(AudioSaved *s, const Audio *a, Arena *arena, DType dtype, int64_t M) {
    const AudioConfig *c = &a->config;
    int L = (int)c->num_hidden_layers;
    int64_t rows = M, bins = MEL_BINS;
    s->M = M;
    s->T = audio_soft_tokens(M);
    s->frames = ARENA_TENSOR(arena, dtype, M, MEL_BINS, 1);
    s->places = ARENA_TENSOR(arena, dtype, c->keys, c->hidden_size);
    for (int i = 0; i < 2; i++) {
        rows = (rows + 1) / 2;
        bins = (bins + 1) / 2;
        s->subsample[i].sum = ARENA_TENSOR(arena, dtype, rows, bins, c->channels[i]);
        s->subsample[i].out = ARENA_TENSOR(arena, dtype, rows, bins, c->channels[i]);
        s->subsample[i].mean = ARENA_TENSOR(arena, F32, rows * bins);
        s->subsample[i].rstd = ARENA_TENSOR(arena, F32, rows * bins);
    }
    for (int l = 0; l <= L; l++)
        s->residual[l] = s->mode == STACK_SCORE && l >= 2
                             ? s->residual[l - 2]
                             : ARENA_TENSOR(arena, dtype, s->T, c->hidden_size);
    size_t start = arena->used;
    for (int l = 0; l < L; l++) { /* where nothing is kept all blocks have one place */
        if (s->mode != STACK_KEEP) arena->used = start;
        place_block(&s->saved[l], arena, c, dtype, s->T);
    }
}

/* ---- the parts of a block ---- */

static void feed_forward(const AudioFeedForward *f, FeedForwardSaved *s, Tensor y, Tensor x,
                         float weight, Pass *p) {
    size_t mark = arena_mark(p->scratch);
    Tensor h = arena_like(p->scratch, x), inner = arena_like(p->scratch, s->inner);
    norm_forward(&f->pre_layer_norm, h, s->rstd, x, tensor_absent());
    linear_forward(&f->ffw_layer_1, s->inner, h, p);
    activation_forward(inner, s->inner, SILU);
    linear_forward(&f->ffw_layer_2, s->out, inner, p);
    norm_forward(&f->post_layer_norm, h, s->out_rstd, s->out, tensor_absent());
    scale_copy(y, SET, x, 1.0f);
    scale_copy(y, ADD, h, weight);
    arena_release(p->scratch, mark);
}

/* d, which holds dy, becomes dx. */
static void feed_forward_backward(const AudioFeedForward *f, const FeedForwardSaved *s, Tensor d,
                                  Tensor x, float weight, Pass *p) {
    size_t mark = arena_mark(p->scratch);
    Tensor h = arena_like(p->scratch, x), dh = arena_like(p->scratch, x),
           inner = arena_like(p->scratch, s->inner), dinner = arena_like(p->scratch, s->inner);
    scale_copy(dh, SET, d, weight);
    norm_backward(&f->post_layer_norm, dh, SET, dh, s->out, s->out_rstd);
    activation_forward(inner, s->inner, SILU);
    linear_backward(&f->ffw_layer_2, dinner, SET, dh, inner, p);
    activation_backward(dinner, SET, dinner, s->inner, SILU);
    norm_apply(&f->pre_layer_norm, h, s->rstd, x);
    linear_backward(&f->ffw_layer_1, dh, SET, dinner, h, p);
    norm_backward(&f->pre_layer_norm, d, ADD, dh, x, s->rstd);
    arena_release(p->scratch, mark);
}

/* What attention reads: q and k scaled, v and the projected places, in f32 by heads. */
typedef struct AudioHeads {
    Tensor q, k, v;  /* (T, H, C) */
    Tensor relative; /* (keys, H, C) */
    Tensor scale;    /* (C): of q */
} AudioHeads;

/* Of q, before softplus. */
static float query_factor(int64_t C) {
    return (float)(1.0 / (sqrt((double)C) * log(2.0)));
}

static float key_factor(void) {
    return (float)(log1p(exp(1.0)) / log(2.0));
}

static AudioHeads heads_of(const AudioAttention *a, const AudioConfig *c, const AudioBlockSaved *s,
                           Tensor places, Pass *p) {
    int64_t T = tensor_rows(s->q), H = c->num_attention_heads, C = c->hidden_size / H;
    AudioHeads h = {ARENA_TENSOR(p->scratch, F32, T, H, C), ARENA_TENSOR(p->scratch, F32, T, H, C),
                    ARENA_TENSOR(p->scratch, F32, T, H, C),
                    ARENA_TENSOR(p->scratch, F32, c->keys, H, C), ARENA_TENSOR(p->scratch, F32, C)};
    size_t mark = arena_mark(p->scratch);
    Tensor projected = arena_like(p->scratch, places);
    linear_forward(&a->relative_k_proj, projected, places, p);
    scale_copy(h.relative, SET, projected, 1.0f);
    activation_forward(h.scale, a->per_dim_scale->value, SOFTPLUS);
    scale_copy(h.scale, SET, h.scale, query_factor(C));
    scale_copy(h.q, SET, s->q, 1.0f);
    scale_columns(h.q, SET, h.q, h.scale, 1.0f);
    scale_copy(h.k, SET, s->k, key_factor());
    scale_copy(h.v, SET, s->v, 1.0f);
    arena_release(p->scratch, mark);
    return h;
}

static void attend(const AudioBlock *b, const AudioConfig *c, AudioBlockSaved *s, Tensor y,
                   Tensor x, Tensor places, Pass *p) {
    const AudioAttention *a = &b->self_attn;
    size_t mark = arena_mark(p->scratch);
    Tensor h = arena_like(p->scratch, x);
    norm_forward(&b->norm_pre_attn, h, s->attn_rstd, x, tensor_absent());
    linear_forward(&a->q_proj, s->q, h, p);
    linear_forward(&a->k_proj, s->k, h, p);
    linear_forward(&a->v_proj, s->v, h, p);
    AudioHeads heads = heads_of(a, c, s, places, p);
    Tensor out = arena_like(p->scratch, heads.q);
    local_attention_forward(out, s->kept, heads.q, heads.k, heads.v, heads.relative,
                            (float)c->logit_cap);
    scale_copy(s->attended, SET, out, 1.0f);
    linear_forward(&a->post, s->posted, s->attended, p);
    norm_forward(&b->norm_post_attn, y, s->posted_rstd, s->posted, x);
    arena_release(p->scratch, mark);
}

static void scale_backward(const AudioAttention *a, Tensor dq, Tensor q, int64_t C, Pass *p) {
    if (!a->per_dim_scale->trainable) return;
    size_t mark = arena_mark(p->scratch);
    Tensor d = ARENA_TENSOR(p->scratch, F32, C), value = arena_like(p->scratch, d);
    int64_t rows = tensor_count(q) / C;
    fill(d, 0.0f);
    dot_columns(d, RESHAPE(dq, rows, C), RESHAPE(q, rows, C));
    scale_copy(d, SET, d, query_factor(C));
    scale_copy(value, SET, a->per_dim_scale->value, 1.0f);
    activation_backward(a->per_dim_scale->grad, ADD, d, value, SOFTPLUS);
    arena_release(p->scratch, mark);
}

/* The gradient of one projection, f32 by heads, goes to dh through its linear. */
static void project_backward(const Linear *l, Tensor dh, Write write, Tensor d, float factor,
                             Tensor h, Pass *p) {
    size_t mark = arena_mark(p->scratch);
    Tensor rows = arena_like(p->scratch, h);
    scale_copy(rows, SET, d, factor);
    linear_backward(l, dh, write, rows, h, p);
    arena_release(p->scratch, mark);
}

static void attend_backward(const AudioBlock *b, const AudioConfig *c, const AudioBlockSaved *s,
                            Tensor d, Tensor x, Tensor places, Pass *p) {
    const AudioAttention *a = &b->self_attn;
    int64_t C = c->hidden_size / c->num_attention_heads;
    size_t mark = arena_mark(p->scratch);
    Tensor h = arena_like(p->scratch, x), dh = arena_like(p->scratch, x),
           dout = arena_like(p->scratch, x);
    norm_backward(&b->norm_post_attn, dh, SET, d, s->posted, s->posted_rstd);
    linear_backward(&a->post, dout, SET, dh, s->attended, p);
    AudioHeads heads = heads_of(a, c, s, places, p);
    Tensor g = arena_like(p->scratch, heads.q), dq = arena_like(p->scratch, heads.q),
           dk = arena_like(p->scratch, heads.q), dv = arena_like(p->scratch, heads.q),
           drelative = arena_like(p->scratch, heads.relative),
           scores =
               ARENA_TENSOR(p->scratch, F32, s->kept.shape[1], s->kept.shape[2], s->kept.shape[3]);
    scale_copy(g, SET, dout, 1.0f);
    local_attention_backward(dq, dk, dv, drelative, scores, g, s->kept, heads.q, heads.k, heads.v,
                             heads.relative);
    project_backward(&a->relative_k_proj, tensor_absent(), SET, drelative, 1.0f, places, p);
    scale_backward(a, dq, s->q, C, p);
    scale_columns(dq, SET, dq, heads.scale, 1.0f);
    norm_apply(&b->norm_pre_attn, h, s->attn_rstd, x);
    project_backward(&a->q_proj, dh, SET, dq, 1.0f, h, p);
    project_backward(&a->k_proj, dh, ADD, dk, key_factor(), h, p);
    project_backward(&a->v_proj, dh, ADD, dv, 1.0f, h, p);
    norm_backward(&b->norm_pre_attn, d, ADD, dh, x, s->attn_rstd);
    arena_release(p->scratch, mark);
}

/* The depthwise weight as (D, taps). */
static Tensor taps_of(Tensor weight) {
    return RESHAPE(weight, weight.shape[0], weight.shape[2]);
}

static void convolve(const LightConv *v, AudioBlockSaved *s, Tensor y, Tensor x, Pass *p) {
    size_t mark = arena_mark(p->scratch);
    Tensor h = arena_like(p->scratch, x), out = arena_like(p->scratch, x);
    norm_forward(&v->pre_layer_norm, h, s->conv_in_rstd, x, tensor_absent());
    linear_forward(&v->linear_start, s->started, h, p);
    glu_forward(s->gated, s->started);
    depthwise_forward(s->convolved, s->gated, taps_of(v->depthwise_conv1d->value));
    norm_forward(&v->conv_norm, h, s->conv_rstd, s->convolved, tensor_absent());
    activation_forward(h, h, SILU);
    linear_forward(&v->linear_end, out, h, p);
    add_scaled(y, out, x, 1.0f);
    arena_release(p->scratch, mark);
}

static void convolve_backward(const LightConv *v, const AudioBlockSaved *s, Tensor d, Tensor x,
                              Pass *p) {
    size_t mark = arena_mark(p->scratch);
    Tensor h = arena_like(p->scratch, x), normal = arena_like(p->scratch, x),
           dh = arena_like(p->scratch, x), dgated = arena_like(p->scratch, x),
           dstarted = arena_like(p->scratch, s->started);
    Tensor dtaps =
        v->depthwise_conv1d->trainable ? taps_of(v->depthwise_conv1d->grad) : tensor_absent();
    norm_apply(&v->conv_norm, normal, s->conv_rstd, s->convolved);
    activation_forward(h, normal, SILU);
    linear_backward(&v->linear_end, dh, SET, d, h, p);
    activation_backward(dh, SET, dh, normal, SILU);
    norm_backward(&v->conv_norm, dh, SET, dh, s->convolved, s->conv_rstd);
    depthwise_backward(dgated, dtaps, dh, s->gated, taps_of(v->depthwise_conv1d->value));
    glu_backward(dstarted, dgated, s->started);
    norm_apply(&v->pre_layer_norm, h, s->conv_in_rstd, x);
    linear_backward(&v->linear_start, dh, SET, dstarted, h, p);
    norm_backward(&v->pre_layer_norm, d, ADD, dh, x, s->conv_in_rstd);
    arena_release(p->scratch, mark);
}

static void block_run(const AudioBlock *b, const AudioConfig *c, AudioBlockSaved *s, Tensor y,
                      Tensor x, Tensor places, Pass *p) {
    float weight = (float)c->residual_weight;
    feed_forward(&b->feed_forward1, &s->ff1, s->x1, x, weight, p);
    attend(b, c, s, s->x2, s->x1, places, p);
    convolve(&b->lconv1d, s, s->x3, s->x2, p);
    feed_forward(&b->feed_forward2, &s->ff2, s->x4, s->x3, weight, p);
    norm_forward(&b->norm_out, y, s->out_rstd, s->x4, tensor_absent());
}

/* d, which holds dy, becomes dx. */
static void block_run_backward(const AudioBlock *b, const AudioConfig *c, const AudioBlockSaved *s,
                               Tensor d, Tensor x, Tensor places, Pass *p) {
    float weight = (float)c->residual_weight;
    norm_backward(&b->norm_out, d, SET, d, s->x4, s->out_rstd);
    feed_forward_backward(&b->feed_forward2, &s->ff2, d, s->x3, weight, p);
    convolve_backward(&b->lconv1d, s, d, s->x2, p);
    attend_backward(b, c, s, d, s->x1, places, p);
    feed_forward_backward(&b->feed_forward1, &s->ff1, d, x, weight, p);
}

/* ---- the convolutions before the blocks ---- */

static Tensor flat(Tensor t) {
    return RESHAPE(t, tensor_rows(t), tensor_cols(t));
}

static Tensor kernel_of(Tensor weight) {
    return RESHAPE(weight, weight.shape[0], 9 * weight.shape[1]);
}

static Tensor unfolded(Tensor x, Arena *scratch) {
    Tensor y =
        ARENA_TENSOR(scratch, x.dtype, (x.shape[0] + 1) / 2, (x.shape[1] + 1) / 2, 9 * x.shape[2]);
    unfold_forward(y, x);
    return y;
}

static Tensor stage_input(const AudioSaved *s, int i) {
    return i ? s->subsample[i - 1].out : s->frames;
}

/* Channels last, so a row of the second stage is all bins of a time, channel fastest. */
static Tensor subsampled(const AudioSaved *s) {
    Tensor out = s->subsample[1].out;
    return RESHAPE(out, out.shape[0], out.shape[1] * out.shape[2]);
}

static void subsample(const Audio *a, AudioSaved *s, Pass *p) {
    for (int i = 0; i < 2; i++) {
        size_t mark = arena_mark(p->scratch);
        Tensor sum = s->subsample[i].sum, out = s->subsample[i].out;
        matmul(NT, flat(sum), SET, flat(unfolded(stage_input(s, i), p->scratch)),
               kernel_of(a->subsample[i].conv->value), 1.0f);
        layernorm_forward(out, s->subsample[i].mean, s->subsample[i].rstd, sum,
                          a->subsample[i].norm->value, tensor_absent(),
                          (float)a->config.rms_norm_eps);
        activation_forward(out, out, RELU);
        arena_release(p->scratch, mark);
    }
    linear_forward(&a->input_proj_linear, s->residual[0], subsampled(s), p);
}

static void subsample_backward(const Audio *a, AudioSaved *s, Tensor d, Pass *p) {
    size_t mark = arena_mark(p->scratch);
    Tensor dout = arena_like(p->scratch, subsampled(s));
    linear_backward(&a->input_proj_linear, dout, SET, d, subsampled(s), p);
    for (int i = 1; i >= 0; i--) {
        const Param *conv = a->subsample[i].conv, *norm = a->subsample[i].norm;
        Tensor sum = s->subsample[i].sum, columns = unfolded(stage_input(s, i), p->scratch);
        Tensor dsum = RESHAPE(dout, sum.shape[0], sum.shape[1], sum.shape[2]);
        activation_backward(dsum, SET, dsum, s->subsample[i].out, RELU);
        layernorm_backward(dsum, norm->trainable ? norm->grad : tensor_absent(), tensor_absent(),
                           dsum, sum, s->subsample[i].mean, s->subsample[i].rstd, norm->value);
        if (conv->trainable)
            matmul(TN, kernel_of(conv->grad), ADD, flat(dsum), flat(columns), 1.0f);
        if (!i) break;
        dout = arena_like(p->scratch, stage_input(s, i));
        matmul(NN, flat(columns), SET, flat(dsum), kernel_of(conv->value), 1.0f);
        unfold_backward(dout, columns);
    }
    arena_release(p->scratch, mark);
}

/* ---- the tower ---- */

/* Row r: sin(r u_i), then cos(r u_i), u_i = 10000^(-i / (D/2 - 1)). */
static void send_places(const AudioConfig *c, Tensor places, Arena *scratch) {
    int64_t D = c->hidden_size, half = D / 2;
    size_t mark = arena_mark(scratch);
    Tensor values = ARENA_TENSOR(scratch, F32, c->keys, D);
    float *host = must_malloc((size_t)(c->keys * D) * sizeof *host);
    double step = log(10000.0) / (double)(half > 1 ? half - 1 : 1);
    for (int64_t r = 0; r < c->keys; r++)
        for (int64_t i = 0; i < half; i++) {
            float angle = (float)r * (float)exp(-(double)i * step);
            host[r * D + i] = sinf(angle);
            host[r * D + half + i] = cosf(angle);
        }
    tensor_write(values, host);
    scale_copy(places, SET, values, 1.0f);
    free(host);
    arena_release(scratch, mark);
}

void audio_forward(const Audio *a, AudioSaved *s, Tensor out, const float *features, Pass *p) {
    const AudioConfig *c = &a->config;
    int L = (int)c->num_hidden_layers;
    size_t mark = arena_mark(p->scratch);
    Tensor values = ARENA_TENSOR(p->scratch, F32, s->M, MEL_BINS);
    send_places(c, s->places, p->scratch);
    tensor_write(values, features);
    scale_copy(s->frames, SET, values, 1.0f);
    subsample(a, s, p);
    for (int l = 0; l < L; l++)
        block_run(&a->blocks[l], c, &s->saved[l], s->residual[l + 1], s->residual[l], s->places, p);
    linear_forward(&a->output_proj, out, s->residual[L], p);
    arena_release(p->scratch, mark);
}

void audio_backward(const Audio *a, AudioSaved *s, Tensor dout, Pass *p) {
    const AudioConfig *c = &a->config;
    int L = (int)c->num_hidden_layers;
    size_t mark = arena_mark(p->scratch);
    Tensor d = arena_like(p->scratch, s->residual[L]);
    linear_backward(&a->output_proj, d, SET, dout, s->residual[L], p);
    for (int l = L - 1; l >= 0; l--) {
        if (stack_mode_recomputes(s->mode)) {
            size_t inner = arena_mark(p->scratch);
            block_run(&a->blocks[l], c, &s->saved[l], arena_like(p->scratch, d), s->residual[l],
                      s->places, p);
            arena_release(p->scratch, inner);
        }
        block_run_backward(&a->blocks[l], c, &s->saved[l], d, s->residual[l], s->places, p);
    }
    subsample_backward(a, s, d, p);
    arena_release(p->scratch, mark);
}
