/* test_mmproj.c - the towers' GGUF holds every tower tensor once, in llama.cpp's order, adapters
 * merged in. */
#include "formats/file.h"
#include "formats/mmproj.h"
#include "infer/model.h"
#include "kernels/quantize.h"
#include "model/merge.h"
#include "tests/program.h"

#include <jansson.h>
#include <math.h>

static float *values_of(const Model *m, const char *name, int64_t *shape) {
    const Param *p = params_find(&m->g.params, name);
    EXPECT(p, "no %s", name);
    int64_t n = tensor_count(p->value), cols = p->value.ndim > 1 ? tensor_cols(p->value) : n;
    float *out = must_malloc((size_t)n * sizeof *out);
    memcpy(shape, p->value.shape, sizeof p->value.shape);
    merged_rows(&m->g, p, 0, n / cols, out);
    return out;
}

static const float *stored_of(const Gguf *g, const char *name, int ndim) {
    const StoredTensor *t = gguf_find_tensor(g, name);
    EXPECT(t && t->dtype == F32 && t->ndim == ndim, "%s", name);
    return (const float *)t->bytes;
}

static int count_towers(const Model *m) {
    int n = 0;
    for (int i = 0; i < m->g.params.count; i++)
        n += m->g.params.items[i]->tower && !m->g.params.items[i]->adapter;
    return n;
}

/* A new model's norms are all ones: none may stand for another here. */
static void tell_apart(const Param *p, int i) {
    if (!p->tower || p->adapter || p->value.ndim != 1) return;
    for (int64_t k = 0; k < p->value.shape[0]; k++)
        ((float *)p->value.data)[k] = ((float)i + (float)k / 4096) / 1024;
}

static void export_and_open(Model *m, Gguf *g, const char *dir, const char *adapter) {
    char *path = must_format("%s.mmproj.gguf", dir);
    EXPECT_OK(model_open(m, dir, adapter, "cpu", "f32", WEIGHTS_LOADED, WITH_MEDIA));
    for (int i = 0; i < m->g.params.count; i++) tell_apart(m->g.params.items[i], i);
    EXPECT_OK(mmproj_save(&m->g, "m", F32, path));
    EXPECT_OK(gguf_open(g, path));
    EXPECT(g->count == count_towers(m), "%d tensors for %d", g->count, count_towers(m));
    free(path);
}

static void expect_same(const float *a, const float *b, int64_t n, const char *name) {
    EXPECT(!memcmp(a, b, (size_t)n * sizeof *a), "%s", name);
}

CASE(mmproj, towers_are_written_in_llama_cpps_order) {
    char *dir = must_format("%s/m", test_folder());
    int64_t shape[4];
    Model m;
    Gguf g;
    EXPECT_RUN(0, "init tiny %s --media --tokenizer demo/tokenizer --dtype f32", dir);
    export_and_open(&m, &g, dir, NULL);
    float *x = values_of(&m, "model.vision_tower.patch_embedder.input_proj.weight", shape);
    const float *y = stored_of(&g, "v.patch_embd.weight", 4);
    for (int64_t d = 0; d < shape[0]; d++)
        for (int c = 0; c < 3; c++)
            for (int at = 0; at < 256; at++)
                EXPECT(y[d * 768 + c * 256 + at] == x[d * 768 + at * 3 + c], "patch %d", at);
    free(x);
    x = values_of(&m, "model.audio_tower.layers.1.self_attn.per_dim_scale", shape);
    y = stored_of(&g, "a.blk.1.per_dim_scale.weight", 1);
    for (int64_t i = 0; i < shape[0]; i++)
        EXPECT(fabs(y[i] - log(1 + exp((double)x[i]))) < 1e-6, "%g of %g", y[i], x[i]);
    free(x);
    static const char *const same[][2] = {
        {"model.audio_tower.layers.0.lconv1d.pre_layer_norm.weight", "a.blk.0.conv_norm.weight"},
        {"model.audio_tower.layers.0.lconv1d.conv_norm.weight", "a.blk.0.norm_conv.weight"},
        {"model.vision_tower.encoder.layers.1.self_attn.q_proj.linear.weight",
         "v.blk.1.attn_q.weight"},
        {"model.vision_tower.encoder.layers.1.self_attn.k_proj.linear.weight",
         "v.blk.1.attn_k.weight"},
        {"model.vision_tower.encoder.layers.1.self_attn.v_proj.linear.weight",
         "v.blk.1.attn_v.weight"},
        {"model.vision_tower.encoder.layers.1.self_attn.o_proj.linear.weight",
         "v.blk.1.attn_out.weight"},
        {"model.vision_tower.encoder.layers.1.mlp.gate_proj.linear.weight",
         "v.blk.1.ffn_gate.weight"},
        {"model.vision_tower.encoder.layers.1.mlp.up_proj.linear.weight", "v.blk.1.ffn_up.weight"},
        {"model.vision_tower.encoder.layers.1.mlp.down_proj.linear.weight",
         "v.blk.1.ffn_down.weight"},
        {"model.audio_tower.layers.1.self_attn.q_proj.linear.weight", "a.blk.1.attn_q.weight"},
        {"model.audio_tower.layers.1.self_attn.k_proj.linear.weight", "a.blk.1.attn_k.weight"},
        {"model.audio_tower.layers.1.self_attn.v_proj.linear.weight", "a.blk.1.attn_v.weight"},
        {"model.audio_tower.layers.1.self_attn.post.linear.weight", "a.blk.1.attn_out.weight"},
        {"model.audio_tower.layers.1.self_attn.relative_k_proj.weight",
         "a.blk.1.attn_k_rel.weight"},
        {"model.audio_tower.layers.1.feed_forward1.ffw_layer_1.linear.weight",
         "a.blk.1.ffn_up.weight"},
        {"model.audio_tower.layers.1.feed_forward1.ffw_layer_2.linear.weight",
         "a.blk.1.ffn_down.weight"},
        {"model.audio_tower.layers.1.feed_forward2.ffw_layer_1.linear.weight",
         "a.blk.1.ffn_up_1.weight"},
        {"model.audio_tower.layers.1.feed_forward2.ffw_layer_2.linear.weight",
         "a.blk.1.ffn_down_1.weight"},
        {"model.audio_tower.layers.1.lconv1d.linear_start.linear.weight",
         "a.blk.1.conv_pw1.weight"},
        {"model.audio_tower.layers.1.lconv1d.linear_end.linear.weight", "a.blk.1.conv_pw2.weight"},
        {"model.vision_tower.encoder.layers.1.input_layernorm.weight", "v.blk.1.ln1.weight"},
        {"model.vision_tower.encoder.layers.1.post_attention_layernorm.weight",
         "v.blk.1.attn_post_norm.weight"},
        {"model.vision_tower.encoder.layers.1.pre_feedforward_layernorm.weight",
         "v.blk.1.ln2.weight"},
        {"model.vision_tower.encoder.layers.1.post_feedforward_layernorm.weight",
         "v.blk.1.ffn_post_norm.weight"},
        {"model.vision_tower.encoder.layers.1.self_attn.q_norm.weight",
         "v.blk.1.attn_q_norm.weight"},
        {"model.vision_tower.encoder.layers.1.self_attn.k_norm.weight",
         "v.blk.1.attn_k_norm.weight"},
        {"model.audio_tower.layers.1.feed_forward1.pre_layer_norm.weight",
         "a.blk.1.ffn_norm.weight"},
        {"model.audio_tower.layers.1.feed_forward1.post_layer_norm.weight",
         "a.blk.1.ffn_post_norm.weight"},
        {"model.audio_tower.layers.1.feed_forward2.pre_layer_norm.weight",
         "a.blk.1.ffn_norm_1.weight"},
        {"model.audio_tower.layers.1.feed_forward2.post_layer_norm.weight",
         "a.blk.1.ffn_post_norm_1.weight"},
        {"model.audio_tower.layers.1.norm_pre_attn.weight", "a.blk.1.attn_pre_norm.weight"},
        {"model.audio_tower.layers.1.norm_post_attn.weight", "a.blk.1.attn_post_norm.weight"},
        {"model.audio_tower.layers.1.norm_out.weight", "a.blk.1.ln2.weight"},
        {"model.vision_tower.encoder.layers.1.self_attn.o_proj.input_max",
         "v.blk.1.attn_out.input_max"},
        {"model.embed_vision.embedding_projection.weight", "mm.input_projection.weight"},
        {"model.embed_audio.embedding_projection.weight", "mm.a.input_projection.weight"}};
    for (size_t i = 0; i < sizeof same / sizeof *same; i++) {
        const StoredTensor *t = gguf_find_tensor(&g, same[i][1]);
        EXPECT(t, "%s is missing", same[i][1]);
        x = values_of(&m, same[i][0], shape);
        expect_same((const float *)t->bytes, x, (int64_t)t->size / 4, same[i][1]);
        free(x);
    }
    EXPECT(gguf_find_tensor(&g, "a.blk.0.conv_dw.weight")->ndim == 2);
    gguf_close(&g);
    model_close(&m);
    free(dir);
}

static void init_small_12b(const char *dir) {
    EXPECT_RUN(0, "init 12b %s --media --layers 6 --config", dir);
    char *config = must_format("%s/config.json", test_folder());
    json_t *root = json_loads(program_out, 0, NULL), *text = json_object_get(root, "text_config");
    json_object_set_new(text, "vocab_size", json_integer(2048));
    json_object_set_new(text, "hidden_size", json_integer(64));
    json_object_set_new(text, "intermediate_size", json_integer(64));
    json_object_set_new(json_object_get(root, "vision_config"), "mm_embed_dim", json_integer(96));
    EXPECT(!json_dump_file(root, config, 0));
    EXPECT_RUN(0, "init %s %s --tokenizer demo/tokenizer --dtype f32", config, dir);
    json_decref(root);
    free(config);
}

/* The 12B's embedder: what is squared, and axes of places. llama.cpp's audio wants 640 samples. */
CASE(mmproj, the_embedder_without_a_tower_is_written_too) {
    char *dir = must_format("%s/m", test_folder());
    int64_t shape[4];
    Model m;
    Gguf g;
    init_small_12b(dir);
    export_and_open(&m, &g, dir, NULL);
    float *x = values_of(&m, "model.vision_embedder.pos_embedding", shape);
    const float *y = stored_of(&g, "v.position_embd.weight", 3);
    for (int64_t p = 0; p < shape[0]; p++)
        for (int64_t axis = 0; axis < 2; axis++)
            expect_same(y + (axis * shape[0] + p) * 96, x + (2 * p + axis) * 96, 96, "a place");
    free(x);
    x = values_of(&m, "model.vision_embedder.patch_ln1.bias", shape);
    y = stored_of(&g, "v.patch_norm.1.bias", 1);
    for (int64_t i = 0; i < shape[0]; i++)
        EXPECT(y[i % 3 * (shape[0] / 3) + i / 3] == x[i], "entry %d", (int)i);
    free(x);
    x = values_of(&m, "model.vision_embedder.patch_dense.bias", shape);
    expect_same(stored_of(&g, "v.patch_embd.bias", 1), x, shape[0], "the dense bias");
    free(x);
    gguf_close(&g);
    model_close(&m);
    free(dir);
}

/* Every tensor of the towers of a model is that of another: but for what goes through softplus and
 * back, the same bits. */
static void expect_same_towers(const Model *a, const Model *b) {
    for (int i = 0; i < a->g.params.count; i++) {
        const Param *p = a->g.params.items[i];
        int64_t shape[4], n = tensor_count(p->value);
        if (!p->tower) continue;
        float *x = values_of(a, p->name, shape), *y = values_of(b, p->name, shape);
        bool soft = strstr(p->name, "per_dim_scale");
        for (int64_t k = 0; k < n; k++)
            EXPECT(soft ? fabsf(x[k] - y[k]) < 1e-6f : x[k] == y[k], "%s: %g, %g", p->name,
                   (double)x[k], (double)y[k]);
        free(x), free(y);
    }
}

/* The towers of `dir` out of a folder of GGUF files, beside a text model. */
static void expect_read_back(const char *dir) {
    Model m, n;
    Gguf g;
    char *folder = must_format("%s.gguf", dir), *from = must_format("%s.mmproj.gguf", dir),
         *to = must_format("%s/towers.gguf", folder), *config = path_join(folder, "config.json");
    export_and_open(&m, &g, dir, NULL);
    EXPECT_OK(folder_make(folder));
    EXPECT_RUN(0, "export --model %s --to q8_0-gguf %s/text.gguf", dir, folder);
    EXPECT(!rename(from, to));
    EXPECT_OK(
        file_write(config, "{}", 2)); /* some put one beside; the files speak for themselves */
    EXPECT_OK(model_open(&n, folder, NULL, "cpu", "f32", WEIGHTS_LOADED, WITH_MEDIA));
    expect_same_towers(&m, &n);
    const ModelConfig *a = &m.checkpoint.config, *b = &n.checkpoint.config;
    EXPECT(!strcmp(a->model_type, b->model_type) && a->image_token_id == b->image_token_id &&
               a->audio_token_id == b->audio_token_id && a->video_token_id == b->video_token_id &&
               a->use_bidirectional_attention == b->use_bidirectional_attention,
           "%s for %s", b->model_type, a->model_type);
    EXPECT(a->vision.pooling_kernel_size == b->vision.pooling_kernel_size &&
           a->vision.rms_norm_eps == b->vision.rms_norm_eps && a->audio.keys == b->audio.keys &&
           a->audio.logit_cap == b->audio.logit_cap);
    model_close(&n);
    gguf_close(&g);
    model_close(&m);
    free(folder), free(from), free(to), free(config);
}

CASE(mmproj, towers_are_read_beside_a_text_model) {
    const char *f = test_folder();
    char *dir = must_format("%s/m", f);
    EXPECT_RUN(0, "init tiny %s --media --tokenizer demo/tokenizer --dtype f32", dir);
    expect_read_back(dir);
    /* A checkpoint folder again, and what is in it. */
    EXPECT_RUN(0, "export --model %s.gguf --to safetensors %s/back", dir, f);
    EXPECT_RUN(0, "export --model %s/back --to mmproj --dtype f32 %s/again.gguf", f, f);
    EXPECT_RUN(0, "inspect %s.gguf", dir);
    EXPECT(strstr(program_out, "model.vision_tower.encoder.layers.1.mlp.up_proj.linear.weight"));
    free(dir);
    dir = must_format("%s/12b", f);
    init_small_12b(dir);
    expect_read_back(dir);
    free(dir);
}

static void copy_value(GgufWriter *w, const Gguf *g, const GgufValue *v) {
    double number = 0;
    size_t size;
    const char *text = gguf_text(g, v->key, &size);
    if (text) {
        gguf_put_bytes(w, v->key, text, size);
        return;
    }
    EXPECT(v->type == GGUF_ARRAY || gguf_number(g, v, 0, &number) == OK, "%s", v->key);
    if (v->type == GGUF_U32) gguf_put_u32(w, v->key, (uint32_t)number);
    if (v->type == GGUF_F32) gguf_put_f32(w, v->key, (float)number);
    if (v->type == GGUF_BOOL) gguf_put_bool(w, v->key, number != 0);
}

/* What a tensor of the file becomes: matrices of blocks' products in 8 bits. */
static Tensor in_8_bits(const StoredTensor *t) {
    Tensor from = TENSOR((void *)t->bytes, F32, (int64_t)t->size / 4), to = from;
    bool product = strstr(t->name, ".blk.") && t->ndim == 2 && t->shape[1] % 32 == 0 &&
                   !strstr(t->name, "conv_dw");
    if (!product) return from;
    from = TENSOR((void *)t->bytes, F32, t->shape[0], t->shape[1]);
    to = from;
    to.dtype = Q8_0;
    to.data = must_malloc(tensor_bytes(to));
    quantize(to, from);
    return to;
}

CASE(mmproj, towers_in_8_bits_are_read) {
    const char *f = test_folder();
    char *dir = must_format("%s/m", f), *folder = must_format("%s/g", f),
         *to = must_format("%s/towers.gguf", folder);
    Model m, n;
    Gguf g;
    GgufWriter *w;
    EXPECT_RUN(0, "init tiny %s --media --tokenizer demo/tokenizer --dtype f32", dir);
    EXPECT_OK(folder_make(folder));
    EXPECT_RUN(0, "export --model %s --to bf16-gguf %s/text.gguf", dir, folder);
    export_and_open(&m, &g, dir, NULL);
    EXPECT_OK(gguf_create(&w, to));
    for (int i = 0; i < g.value_count; i++) copy_value(w, &g, &g.values[i]);
    Tensor *tensors = must_malloc((size_t)g.count * sizeof *tensors);
    for (int i = 0; i < g.count; i++) {
        const StoredTensor *t = &g.tensors[i];
        tensors[i] = in_8_bits(t);
        gguf_declare(w, t->name, tensors[i].dtype, t->ndim, t->shape);
    }
    EXPECT_OK(gguf_begin(w));
    for (int i = 0; i < g.count; i++) {
        EXPECT_OK(gguf_write(w, tensors[i].data, tensor_bytes(tensors[i])));
        if (tensors[i].dtype == Q8_0) free(tensors[i].data);
    }
    EXPECT_OK(gguf_commit(w));
    EXPECT_OK(model_open(&n, folder, NULL, "cpu", "f32", WEIGHTS_LOADED, WITH_MEDIA));
    int packed = 0;
    for (int i = 0; i < m.g.params.count; i++) {
        const Param *p = m.g.params.items[i];
        if (!p->tower || p->value.ndim != 2) continue;
        int64_t shape[4], count = tensor_count(p->value);
        float *x = values_of(&m, p->name, shape), *y = values_of(&n, p->name, shape), most = 0;
        packed += dtype_is_packed(params_find(&n.g.params, p->name)->value.dtype);
        for (int64_t k = 0; k < count; k++) most = fmaxf(most, fabsf(x[k]));
        for (int64_t k = 0; k < count; k++)
            EXPECT(fabsf(x[k] - y[k]) <= most / 200, "%s: %g, %g", p->name, (double)x[k],
                   (double)y[k]);
        free(x), free(y);
    }
    EXPECT(packed > 20, "%d packed", packed);
    model_close(&n);
    gguf_close(&g);
    model_close(&m);
    free(tensors), free(dir), free(folder), free(to);
}

CASE(mmproj, files_that_do_not_belong_together_are_refused) {
    const char *f = test_folder();
    EXPECT_RUN(0, "init tiny %s/m --media --tokenizer demo/tokenizer", f);
    char *folder = must_format("%s/g", f);
    EXPECT_OK(folder_make(folder));
    EXPECT_RUN(0, "export --model %s/m --to mmproj %s/g/towers.gguf", f, f);
    EXPECT_EXIT(1, "towers go into a folder with their text model",
                "generate --model %s/g/towers.gguf hi", f);
    EXPECT_EXIT(1, "holds towers and no text model", "generate --model %s/g hi", f);
    EXPECT_RUN(0, "export --model %s/m --to bf16-gguf %s/g/a.gguf", f, f);
    EXPECT_RUN(0, "export --model %s/m --to q8_0-gguf %s/g/b.gguf", f, f);
    EXPECT_EXIT(1, "are both text models, expected one", "generate --model %s/g hi", f);
    char *path = must_format("%s/g/b.gguf", f), *config = must_format("%s/config.json", f);
    EXPECT(!remove(path));
    EXPECT_RUN(0, "init tiny %s --media --layers 6 --config", f);
    json_t *root = json_loads(program_out, 0, NULL);
    json_object_set_new(json_object_get(root, "text_config"), "hidden_size", json_integer(64));
    EXPECT(!json_dump_file(root, config, 0));
    EXPECT_RUN(0, "init %s %s/other --tokenizer demo/tokenizer", config, f);
    char *towers = must_format("%s/towers.gguf", folder);
    EXPECT(!remove(towers));
    EXPECT_RUN(0, "export --model %s/other --to mmproj %s/g/towers.gguf", f, f);
    EXPECT_EXIT(1, "has another shape than model.embed_vision.embedding_projection.weight",
                "generate --model %s/g hi", f);
    json_decref(root);
    free(path), free(config), free(folder), free(towers);
}

CASE(mmproj, what_llama_cpp_cannot_compute_is_refused) {
    const char *f = test_folder();
    size_t size;
    char *config, *path = must_format("%s/m/config.json", f);
    EXPECT_RUN(0, "init tiny %s/m --media --tokenizer demo/tokenizer", f);
    EXPECT_RUN(0, "init tiny %s/text --tokenizer demo/tokenizer", f);
    EXPECT_EXIT(1, "has no towers", "export --model %s/text --to mmproj %s/x.gguf", f, f);
    EXPECT_EXIT(2, "--verify proves merged models", "export --model %s/m --to mmproj %s/x --verify",
                f, f);
    EXPECT_OK(file_read(&config, &size, path, 1 << 20));
    memcpy(strstr(config, "\"residual_weight\": 0.5") + strlen("\"residual_weight\": "), "0.7", 3);
    EXPECT_OK(file_write(path, config, size));
    EXPECT_EXIT(1, "computes with 0.5 for audio_config.residual_weight",
                "export --model %s/m --to mmproj %s/x.gguf", f, f);
    free(config), free(path);
}
