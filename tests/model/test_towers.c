/* test_towers.c - the vision and audio towers with weights by formula, against values that the
 * reference gave in f32 (shared/spec/multimodal.md, section 11). */
#include "kernels/elementwise.h"
#include "model/audio.h"
#include "model/vision.h"
#include "tests/fixture.h"
#include "tests/test.h"

#include <math.h>
#include <stdlib.h>

static int by_name(const void *a, const void *b) {
    return strcmp((*(Param *const *)a)->name, (*(Param *const *)b)->name);
}

/* Everything trainable, values by the rank of each name. */
static void give_values(ParamList *params, LinearList *list) {
    Param **sorted = must_malloc((size_t)params->count * sizeof *sorted);
    int count = 0;
    for (int i = 0; i < params->count; i++)
        if (!params->items[i]->buffer) {
            sorted[count++] = params->items[i];
            params->items[i]->trainable = true;
        }
    qsort(sorted, (size_t)count, sizeof *sorted, by_name);
    EXPECT_OK(params_place(params, device_cpu(), true));
    for (int t = 0; t < count; t++) {
        Tensor value = sorted[t]->value;
        for (int64_t i = 0; i < tensor_count(value); i++) {
            float v = fixture_formula((uint32_t)t, (uint32_t)i);
            ((float *)value.data)[i] = value.ndim >= 2                   ? 0.25f * v
                                       : strstr(sorted[t]->name, "norm") ? 1.0f + 0.2f * v
                                                                         : 0.3f * v;
        }
    }
    for (Linear *l = list->first; l; l = l->next) {
        for (int i = 0; i < 4 && l->bounds[0]; i++)
            *(float *)l->bounds[i]->value.data = i % 2 ? 1.125f : -1.25f;
        linear_loaded(l);
    }
    fill(params->space.grads, 0.0f);
    free(sorted);
}

static double sum_of(Tensor t) {
    double sum = 0;
    for (int64_t i = 0; i < tensor_count(t); i++) sum += fabs((double)((float *)t.data)[i]);
    return sum;
}

static void expect_close(const char *name, double value, double expected, double tolerance) {
    EXPECT(fabs(value - expected) <= tolerance, "%s is %.7g, expected %.7g", name, value, expected);
}

/* The sum of absolute values, and the first three. */
static void expect_gradient(const ParamList *params, const char *name, double sum, double a,
                            double b, double c) {
    const Param *p = params_find(params, name);
    const double first[] = {a, b, c};
    EXPECT(p, "there is no %s", name);
    expect_close(name, sum_of(p->grad), sum, 1e-3 * sum);
    for (int i = 0; i < 3; i++)
        expect_close(name, ((float *)p->grad.data)[i], first[i], 1e-3 * fmax(fabs(first[i]), 1.0));
}

static const VisionConfig small_vision = {.path = MEDIA_TOWER,
                                          .hidden_size = 32,
                                          .num_hidden_layers = 2,
                                          .num_attention_heads = 4,
                                          .head_dim = 8,
                                          .intermediate_size = 48,
                                          .patch_size = 16,
                                          .pooling_kernel_size = 3,
                                          .position_embedding_size = 64,
                                          .rope_theta = 100.0,
                                          .rms_norm_eps = 1e-6};

typedef struct Tower {
    ParamList params;
    LinearList list;
    Arena memory, scratch;
    Vision vision;
    Pass pass;
    float *pixels;
    int32_t places[18 * 2];
    Tensor out, dout;
} Tower;

/* 6 x 3 patches, in the order of two cells. */
static void picture(Tower *t) {
    t->pixels = must_malloc(18 * 768 * sizeof *t->pixels);
    for (int n = 0; n < 18; n++) {
        int x = n / 9 * 3 + n % 3, y = n % 9 / 3;
        t->places[2 * n] = x, t->places[2 * n + 1] = y;
        for (int i = 0; i < 768; i++)
            t->pixels[n * 768 + i] =
                (fixture_formula(2000, (uint32_t)((y * 6 + x) * 768 + i)) + 1) / 2;
    }
}

static void vision_run(Tower *t, bool clipped, StackMode mode) {
    VisionConfig c = small_vision;
    c.use_clipped_linears = clipped;
    c.standardize = !clipped;
    params_init(&t->params, F32, "");
    vision_declare(&t->vision, &t->params, &t->list, &c);
    give_values(&t->params, &t->list);
    for (int i = 0; i < 32 && !clipped; i++) {
        ((float *)t->vision.std_bias->value.data)[i] = fixture_formula(900, (uint32_t)i);
        ((float *)t->vision.std_scale->value.data)[i] =
            0.5f + 0.25f * fixture_formula(901, (uint32_t)i);
    }
    picture(t);
    EXPECT_OK(arena_init(&t->memory, device_cpu(), 4 << 20, "the picture"));
    EXPECT_OK(arena_init(&t->scratch, device_cpu(), 4 << 20, "temporaries"));
    t->pass = (Pass){.scratch = &t->scratch, .training = true};
    t->out = ARENA_TENSOR(&t->memory, F32, 2, 32);
    t->dout = ARENA_TENSOR(&t->memory, F32, 2, 32);
    for (int i = 0; i < 64; i++) ((float *)t->dout.data)[i] = fixture_formula(2001, (uint32_t)i);
    VisionSaved s;
    vision_open(&s, &t->vision, mode);
    vision_place(&s, &t->vision, &t->memory, F32, 18);
    vision_forward(&t->vision, &s, t->out, t->pixels, t->places, &t->pass);
    if (mode != STACK_SCORE) vision_backward(&t->vision, &s, t->dout, &t->pass);
    vision_close(&s);
}

static void vision_stop(Tower *t) {
    arena_free(&t->memory);
    arena_free(&t->scratch);
    params_free(&t->params);
    vision_free(&t->vision);
    free(t->pixels);
}

static double product(Tensor a, Tensor b) {
    double sum = 0;
    for (int64_t i = 0; i < tensor_count(a); i++)
        sum += (double)((float *)a.data)[i] * ((float *)b.data)[i];
    return sum;
}

#define EXPECT_ROW(out, row, ...)                                                                  \
    do {                                                                                           \
        static const double row_values[] = {__VA_ARGS__};                                          \
        for (size_t k = 0; k < sizeof row_values / sizeof *row_values; k++)                        \
            expect_close(#out, ((float *)(out).data)[(row)*tensor_cols(out) + (int64_t)k],         \
                         row_values[k], 2e-4);                                                     \
    } while (0)

CASE(towers, vision_with_clipped_linears_equals_the_reference) {
    Tower t = {0};
    vision_run(&t, true, STACK_KEEP);
    EXPECT_ROW(t.out, 0, -1.72505, -8.34383, 7.45669, -17.3509, -2.70177, 4.50472);
    EXPECT_ROW(t.out, 1, 11.6852, -3.14725, 9.83564, -11.0537, 1.0109, -5.02596);
    expect_close("sum", sum_of(t.out), 429.6621, 4e-3);
    expect_close("L", product(t.out, t.dout), -35.21676, 4e-4);
#define GRADIENT(name, ...) expect_gradient(&t.params, "vision_tower." name, __VA_ARGS__)
    GRADIENT("encoder.layers.0.self_attn.k_norm.weight", 78.4121, -5.87955, -19.5548, 15.2647);
    GRADIENT("encoder.layers.0.self_attn.q_proj.linear.weight", 5405.1, -6.396, 5.77869, 4.55535);
    GRADIENT("encoder.layers.0.self_attn.v_proj.linear.weight", 5239.49, .908605, 2.54099,
             -3.65642);
    GRADIENT("encoder.layers.1.mlp.gate_proj.linear.weight", 2106.29, -3.48128, 2.39165, .655289);
    GRADIENT("encoder.layers.1.post_feedforward_layernorm.weight", 42.2419, .0791949, -.755343,
             4.03674);
    GRADIENT("patch_embedder.input_proj.weight", 64823.3, 2.79278, -3.42104, 1.53897);
    GRADIENT("patch_embedder.position_embedding_table", 740.384, .612581, 1.31511, -.688936);
    vision_stop(&t);
}

CASE(towers, standardised_vision_equals_the_reference) {
    Tower t = {0};
    vision_run(&t, false, STACK_RECOMPUTE);
    EXPECT_ROW(t.out, 0, .672771, -2.49224, 5.58727, -7.70062, -2.35026, 1.02606);
    EXPECT_ROW(t.out, 1, 4.43797, -1.89353, 6.14119, -4.66231, -.627076, -.956981);
    expect_close("sum", sum_of(t.out), 192.9547, 2e-3);
    expect_close("L", product(t.out, t.dout), -2.291890, 1e-4);
    GRADIENT("encoder.layers.0.self_attn.k_norm.weight", 23.4647, -4.4047, -.450971, 8.99845);
    GRADIENT("encoder.layers.0.self_attn.q_proj.linear.weight", 2138.68, -3.97294, -2.19302,
             2.52706);
    GRADIENT("encoder.layers.0.self_attn.v_proj.linear.weight", 2021.21, -.733341, 2.06068,
             .416275);
    GRADIENT("encoder.layers.1.mlp.gate_proj.linear.weight", 1130.97, -1.80793, 2.97812, -1.3323);
    GRADIENT("encoder.layers.1.post_feedforward_layernorm.weight", 21.7257, -.00105379, -.598632,
             2.3688);
    GRADIENT("patch_embedder.input_proj.weight", 25920.9, 1.52048, -.687497, -1.36247);
    GRADIENT("patch_embedder.position_embedding_table", 321.713, .727068, 1.26988, -.756984);
    vision_stop(&t);
}

CASE(towers, vision_is_the_same_whatever_is_kept) {
    Tower kept = {0}, again = {0}, only = {0};
    vision_run(&kept, true, STACK_KEEP);
    vision_run(&again, true, STACK_RECOMPUTE);
    vision_run(&only, true, STACK_SCORE);
    EXPECT(!memcmp(kept.out.data, again.out.data, tensor_bytes(kept.out)), "recomputed differs");
    EXPECT(!memcmp(kept.out.data, only.out.data, tensor_bytes(kept.out)), "forward alone differs");
    EXPECT(!memcmp(kept.params.space.grads.data, again.params.space.grads.data,
                   tensor_bytes(kept.params.space.grads)),
           "gradients differ");
    vision_stop(&kept), vision_stop(&again), vision_stop(&only);
}

/* ---- audio ---- */

typedef struct AudioTower {
    ParamList params;
    LinearList list;
    Arena memory, scratch;
    Audio audio;
    AudioSaved saved;
    Tensor out;
} AudioTower;

static void audio_start(AudioTower *t, int64_t M, StackMode mode) {
    static const AudioConfig c = {.path = MEDIA_TOWER,
                                  .hidden_size = 32,
                                  .num_hidden_layers = 2,
                                  .num_attention_heads = 4,
                                  .output_proj_dims = 24,
                                  .channels = {128, 8},
                                  .conv_kernel_size = 5,
                                  .keys = 12,
                                  .use_clipped_linears = true,
                                  .logit_cap = 50.0,
                                  .residual_weight = 0.5,
                                  .rms_norm_eps = 1e-6};
    params_init(&t->params, F32, "");
    audio_declare(&t->audio, &t->params, &t->list, &c);
    give_values(&t->params, &t->list);
    EXPECT_OK(arena_init(&t->memory, device_cpu(), 16 << 20, "the recording"));
    EXPECT_OK(arena_init(&t->scratch, device_cpu(), 32 << 20, "temporaries"));
    Pass pass = {.scratch = &t->scratch, .training = true};
    float *features = must_malloc((size_t)M * MEL_BINS * sizeof *features);
    for (int64_t i = 0; i < M * MEL_BINS; i++) features[i] = 3 * fixture_formula(1000, (uint32_t)i);
    t->out = ARENA_TENSOR(&t->memory, F32, audio_soft_tokens(M), 24);
    Tensor dout = arena_like(&t->memory, t->out);
    for (int64_t i = 0; i < tensor_count(dout); i++)
        ((float *)dout.data)[i] = fixture_formula(1001, (uint32_t)i);
    audio_open(&t->saved, &t->audio, mode);
    audio_place(&t->saved, &t->audio, &t->memory, F32, M);
    audio_forward(&t->audio, &t->saved, t->out, features, &pass);
    if (mode != STACK_SCORE) {
        if (M == 101) expect_close("L", product(t->out, dout), -2.414728, 1e-4);
        audio_backward(&t->audio, &t->saved, dout, &pass);
    }
    free(features);
}

static void audio_stop(AudioTower *t) {
    audio_close(&t->saved);
    arena_free(&t->memory);
    arena_free(&t->scratch);
    params_free(&t->params);
    audio_free(&t->audio);
}

CASE(towers, audio_equals_the_reference) {
    AudioTower t = {0};
    audio_start(&t, 101, STACK_KEEP);
    EXPECT_ROW(t.saved.residual[0], 0, -1.0384, 1.2733, .748595, -1.39997);
    EXPECT_ROW(t.saved.residual[0], 25, .605624, 1.42394, 2.03551, -.610552);
    expect_close("after the convolutions", sum_of(t.saved.residual[0]), 1045.263, 1e-2);
    EXPECT_ROW(t.saved.saved[0].x1, 13, 1.07523, .831829, .050879, -.546663);
    EXPECT_ROW(t.saved.saved[0].posted, 13, .197394, .162711, .0817014, .622703);
    EXPECT_ROW(t.saved.saved[0].x3, 13, 1.97786, 1.16918, .403067, 1.70518);
    EXPECT_ROW(t.saved.residual[1], 13, 1.87072, 1.01936, -.0492542, 1.08286);
    EXPECT_ROW(t.out, 0, .846257, -.787357, -.900006, -.541663);
    EXPECT_ROW(t.out, 11, .684938, -1.13732, -1.15646, .0807935);
    EXPECT_ROW(t.out, 12, .7078, -1.86256, -.89056, .215537);
    EXPECT_ROW(t.out, 25, .858434, -1.22063, -1.03528, -.67995);
    expect_close("sum", sum_of(t.out), 392.1441, 4e-3);
#define AUDIO_GRADIENT(name, ...) expect_gradient(&t.params, "audio_tower." name, __VA_ARGS__)
    AUDIO_GRADIENT("layers.0.feed_forward1.ffw_layer_1.linear.weight", 1648.73, .243029, .309165,
                   .00381353);
    AUDIO_GRADIENT("layers.0.norm_out.weight", 38.7987, -.675727, 1.02903, .0348676);
    AUDIO_GRADIENT("layers.0.self_attn.per_dim_scale", 3.26276, -.659437, .683716, -.484534);
    AUDIO_GRADIENT("layers.0.self_attn.q_proj.linear.weight", 315.63, .406668, .0281457, -.269631);
    AUDIO_GRADIENT("layers.0.self_attn.relative_k_proj.weight", 29.2876, .0413821, -.272703,
                   -.258731);
    AUDIO_GRADIENT("layers.0.self_attn.v_proj.linear.weight", 1803.92, 2.44572, -1.95847, -3.30424);
    AUDIO_GRADIENT("layers.1.lconv1d.depthwise_conv1d.weight", 161.288, -5.01298, -2.86881,
                   -.520059);
    AUDIO_GRADIENT("output_proj.bias", 52.4219, -1.67915, 3.12589, .935841);
    AUDIO_GRADIENT("subsample_conv_projection.layer0.conv.weight", 2365.69, .338275, 1.47561,
                   -.87885);
    AUDIO_GRADIENT("subsample_conv_projection.layer1.norm.weight", 43.508, -.946461, 5.55361,
                   5.5624);
    audio_stop(&t);
}

/* As the reference's padded clip, whose last valid row this is. */
CASE(towers, audio_of_a_shorter_clip_equals_the_reference) {
    AudioTower t = {0};
    audio_start(&t, 70, STACK_SCORE);
    EXPECT_ROW(t.out, 0, .846257, -.787357, -.900006, -.541663);
    EXPECT_ROW(t.out, 17, .436071, -1.32944, -.252246, .63643);
    expect_close("sum", sum_of(t.out), 276.4843, 3e-3);
    audio_stop(&t);
}

CASE(towers, audio_is_the_same_whatever_is_kept) {
    AudioTower kept = {0}, again = {0}, only = {0};
    audio_start(&kept, 45, STACK_KEEP);
    audio_start(&again, 45, STACK_RECOMPUTE);
    audio_start(&only, 45, STACK_SCORE);
    EXPECT(!memcmp(kept.out.data, again.out.data, tensor_bytes(kept.out)), "recomputed differs");
    EXPECT(!memcmp(kept.out.data, only.out.data, tensor_bytes(kept.out)), "forward alone differs");
    EXPECT(!memcmp(kept.params.space.grads.data, again.params.space.grads.data,
                   tensor_bytes(kept.params.space.grads)),
           "gradients differ");
    audio_stop(&kept), audio_stop(&again), audio_stop(&only);
}
