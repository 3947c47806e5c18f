/* gguf_model.c - names and config between checkpoint and GGUF (spec: llama.cpp's converter). */
#include "formats/gguf_model.h"
#include "formats/companion.h"
#include "formats/file.h"
#include "formats/gguf_tokenizer.h"
#include "formats/mmproj.h"

#include <dirent.h>
#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PREFIX_KEY "lapidary.tensor_prefix"

/* ---- names ---- */

static const struct {
    const char *name, *gguf;
} whole_names[] = {{"embed_tokens.weight", "token_embd.weight"},
                   {"norm.weight", "output_norm.weight"},
                   {"embed_tokens_per_layer.weight", "per_layer_token_embd.weight"},
                   {"per_layer_model_projection.weight", "per_layer_model_proj.weight"},
                   {"per_layer_projection_norm.weight", "per_layer_proj_norm.weight"}};

static const struct {
    const char *name, *gguf;
} layer_names[] = {{"input_layernorm.weight", "attn_norm.weight"},
                   {"self_attn.q_proj.weight", "attn_q.weight"},
                   {"self_attn.k_proj.weight", "attn_k.weight"},
                   {"self_attn.v_proj.weight", "attn_v.weight"},
                   {"self_attn.o_proj.weight", "attn_output.weight"},
                   {"self_attn.q_norm.weight", "attn_q_norm.weight"},
                   {"self_attn.k_norm.weight", "attn_k_norm.weight"},
                   {"post_attention_layernorm.weight", "post_attention_norm.weight"},
                   {"pre_feedforward_layernorm.weight", "ffn_norm.weight"},
                   {"mlp.gate_proj.weight", "ffn_gate.weight"},
                   {"mlp.up_proj.weight", "ffn_up.weight"},
                   {"mlp.down_proj.weight", "ffn_down.weight"},
                   {"post_feedforward_layernorm.weight", "post_ffw_norm.weight"},
                   {"layer_scalar", "layer_output_scale.weight"},
                   {"per_layer_input_gate.weight", "inp_gate.weight"},
                   {"per_layer_projection.weight", "proj.weight"},
                   {"post_per_layer_input_norm.weight", "post_norm.weight"},
                   {"router.proj.weight", "ffn_gate_inp.weight"},
                   {"router.scale", "ffn_gate_inp.scale"},
                   {"router.per_expert_scale", "ffn_down_exps.scale"},
                   {"experts.gate_up_proj", "ffn_gate_up_exps.weight"},
                   {"experts.down_proj", "ffn_down_exps.weight"},
                   {"post_feedforward_layernorm_1.weight", "post_ffw_norm_1.weight"},
                   {"pre_feedforward_layernorm_2.weight", "pre_ffw_norm_2.weight"},
                   {"post_feedforward_layernorm_2.weight", "post_ffw_norm_2.weight"}};

/* The number after `prefix` and what follows its dot; NULL when it is none. */
static const char *after_layer(const char *name, const char *prefix, int *layer) {
    size_t n = strlen(prefix);
    char *end;
    if (strncmp(name, prefix, n) || name[n] < '0' || name[n] > '9') return NULL;
    long l = strtol(name + n, &end, 10);
    if (*end != '.' || l >= LAYERS_MAX) return NULL;
    *layer = (int)l;
    return end + 1;
}

bool gguf_name_of(char *out, size_t size, const char *name) {
    int layer;
    const char *rest = after_layer(name, "layers.", &layer);
    for (size_t i = 0; !rest && i < sizeof whole_names / sizeof *whole_names; i++)
        if (!strcmp(name, whole_names[i].name))
            return snprintf(out, size, "%s", whole_names[i].gguf);
    for (size_t i = 0; rest && i < sizeof layer_names / sizeof *layer_names; i++)
        if (!strcmp(rest, layer_names[i].name))
            return snprintf(out, size, "blk.%d.%s", layer, layer_names[i].gguf);
    return false;
}

bool gguf_name_from(char *out, size_t size, const char *name, const char *prefix) {
    int layer;
    const char *rest = after_layer(name, "blk.", &layer);
    for (size_t i = 0; !rest && i < sizeof whole_names / sizeof *whole_names; i++)
        if (!strcmp(name, whole_names[i].gguf))
            return snprintf(out, size, "%s%s", prefix, whole_names[i].name);
    for (size_t i = 0; rest && i < sizeof layer_names / sizeof *layer_names; i++)
        if (!strcmp(rest, layer_names[i].gguf))
            return snprintf(out, size, "%slayers.%d.%s", prefix, layer, layer_names[i].name);
    if (!strcmp(name, "output.weight")) return snprintf(out, size, "lm_head.weight");
    return false;
}

static int64_t full_head_dim(const ModelConfig *c) {
    return c->layer[c->num_hidden_layers - 1].head_dim; /* the last layer is always full */
}

void gguf_rope_freqs(float *out, const ModelConfig *c) {
    int64_t half = full_head_dim(c) / 2;
    int64_t rotated = (int64_t)(c->rope[FULL].partial_rotary_factor * (double)half);
    for (int64_t i = 0; i < half; i++) out[i] = i < rotated ? 1.0f : 1e30f;
}

const char *gguf_prefix(const Gguf *g) {
    size_t size;
    const char *text = gguf_text(g, PREFIX_KEY, &size);
    return text && size == 6 && !memcmp(text, "model.", 6) ? "model." : "model.language_model.";
}

/* ---- files ---- */

/* The path of the next GGUF in a folder; NULL after the last. Caller frees. */
static char *next_gguf(DIR *dir, const char *folder) {
    for (struct dirent *entry; (entry = readdir(dir));) {
        size_t n = strlen(entry->d_name);
        if (n > 5 && !strcmp(entry->d_name + n - 5, ".gguf"))
            return path_join(folder, entry->d_name);
    }
    return NULL;
}

bool gguf_is_model(const char *path) {
    DIR *dir = opendir(path);
    if (!dir) return gguf_is_file(path);
    char *file = next_gguf(dir, path), *one = path_join(path, "model.safetensors"),
         *index = path_join(path, "model.safetensors.index.json");
    bool is = file && !file_exists(one) && !file_exists(index);
    closedir(dir);
    free(file), free(one), free(index);
    return is;
}

static bool has_architecture(const Gguf *g, const char *name) {
    size_t size;
    const char *text = gguf_text(g, "general.architecture", &size);
    return text && size == strlen(name) && !memcmp(text, name, size);
}

Status gguf_open_model(Gguf *text, Gguf *towers, const char *path) {
    *text = *towers = (Gguf){0};
    Status status = OK;
    DIR *dir = opendir(path);
    if (!dir) return gguf_open(text, path);
    for (char *file; status == OK && (file = next_gguf(dir, path)); free(file)) {
        Gguf g;
        status = gguf_open(&g, file);
        if (status != OK) continue;
        Gguf *to = has_architecture(&g, "clip") ? towers : text;
        if (to->path)
            status = status_fail(ERR_FORMAT, "%s: %s and %s are both %s, expected one", path,
                                 strrchr(to->path, '/') + 1, strrchr(g.path, '/') + 1,
                                 to == text ? "text models" : "towers");
        if (status == OK)
            *to = g;
        else
            gguf_close(&g);
    }
    closedir(dir);
    if (status == OK && !text->path)
        status = status_fail(ERR_FORMAT, "%s: holds towers and no text model", path);
    if (status != OK) gguf_close(text), gguf_close(towers);
    return status;
}

/* ---- metadata to config.json ---- */

static Status get_optional(const Gguf *g, const char *key, int64_t *out) {
    return gguf_find(g, key) ? gguf_get_int(g, key, 0, INT32_MAX, out) : OK;
}

/* An entry for each layer, or one for all. */
static Status get_layers(const Gguf *g, const char *key, int64_t L, int64_t *out) {
    const GgufValue *v = gguf_find(g, key);
    if (!v) FAIL(ERR_FORMAT, "%s: the key '%s' is missing", g->path, key);
    if (v->type == GGUF_ARRAY && v->count != (uint64_t)L)
        FAIL(ERR_FORMAT, "%s: '%s' has %" PRIu64 " entries for %" PRId64 " layers", g->path, key,
             v->count, L);
    for (int64_t l = 0; l < L; l++) {
        double value;
        TRY(gguf_number(g, v, v->type == GGUF_ARRAY ? (uint64_t)l : 0, &value));
        if (!(value >= 0 && value <= INT32_MAX) || value != floor(value))
            FAIL(ERR_FORMAT, "%s: '%s' is %g at layer %" PRId64, g->path, key, value, l);
        out[l] = (int64_t)value;
    }
    return OK;
}

static void set_int(json_t *o, const char *key, int64_t value) {
    json_object_set_new(o, key, json_integer(value));
}

/* The share of pairs that rotate, from the divisors. */
static double rotary_factor(const Gguf *g) {
    const StoredTensor *t = gguf_find_tensor(g, GGUF_ROPE_FREQS);
    if (!t || t->dtype != F32 || t->ndim != 1) return 0.25;
    int64_t rotated = 0;
    for (int64_t i = 0; i < t->shape[0]; i++) {
        float value;
        memcpy(&value, t->bytes + 4 * i, 4);
        rotated += value < 1e20f;
    }
    return (double)rotated / (double)t->shape[0];
}

/* The id of a token by its text; -1 where the vocabulary has none. */
static int64_t token_id(const Gguf *g, const char *text) {
    const GgufValue *tokens = gguf_find(g, "tokenizer.ggml.tokens");
    if (!tokens) return -1;
    GgufStrings s = gguf_strings(tokens);
    const char *bytes;
    size_t size, n = strlen(text);
    for (int64_t i = 0; gguf_next_string(&s, &bytes, &size); i++)
        if (size == n && !memcmp(bytes, text, n)) return i;
    return -1;
}

/* Ids that end an answer: the file's end token, and the end of a turn where the vocabulary has it
 * (llama.cpp finds it by its text too). */
static json_t *end_tokens(const Gguf *g) {
    json_t *list = json_array();
    double id;
    if (gguf_find(g, "tokenizer.ggml.eos_token_id") &&
        gguf_get_number(g, "tokenizer.ggml.eos_token_id", &id) == OK)
        json_array_append_new(list, json_integer((json_int_t)id));
    int64_t turn = token_id(g, "<turn|>");
    if (turn >= 0) json_array_append_new(list, json_integer(turn));
    return list;
}

/* What config.json says of media: the towers, and which tokens stand where they speak. */
static Status fill_media(const Gguf *g, const Gguf *towers, json_t *root) {
    static const char *const tokens[][2] = {{"image_token_id", "<|image|>"},
                                            {"audio_token_id", "<|audio|>"},
                                            {"video_token_id", "<|video|>"}};
    for (size_t i = 0; i < sizeof tokens / sizeof *tokens; i++) {
        int64_t id = token_id(g, tokens[i][1]);
        if (id >= 0) set_int(root, tokens[i][0], id);
    }
    return mmproj_config(towers, root);
}

static Status fill_layers(const Gguf *g, json_t *text, int64_t L) {
    static const char *const kinds[] = {"sliding_attention", "full_attention"};
    int64_t sliding[LAYERS_MAX], kv[LAYERS_MAX], width[LAYERS_MAX], shared = 0;
    TRY(get_layers(g, "gemma4.attention.sliding_window_pattern", L, sliding));
    TRY(get_layers(g, "gemma4.attention.head_count_kv", L, kv));
    TRY(get_layers(g, "gemma4.feed_forward_length", L, width));
    TRY(get_optional(g, "gemma4.attention.shared_kv_layers", &shared));
    json_t *types = json_array();
    int64_t sliding_kv = kv[0], full_kv = kv[L - 1];
    bool from_k = false;
    for (int64_t l = 0; l < L; l++) {
        char name[64];
        json_array_append_new(types, json_string(kinds[!sliding[l]]));
        if (sliding[l]) sliding_kv = kv[l];
        snprintf(name, sizeof name, "blk.%" PRId64 ".attn_v.weight", l);
        if (!sliding[l] && l < L - shared && !gguf_find_tensor(g, name)) from_k = true;
    }
    json_object_set_new(text, "layer_types", types);
    set_int(text, "num_key_value_heads", sliding_kv);
    set_int(text, "num_global_key_value_heads", full_kv);
    json_object_set_new(text, "attention_k_eq_v", json_boolean(from_k));
    set_int(text, "num_kv_shared_layers", shared);
    set_int(text, "intermediate_size", width[0]);
    json_object_set_new(text, "use_double_wide_mlp",
                        json_boolean(shared && width[L - 1] == 2 * width[0]));
    return OK;
}

static Status fill_config(const Gguf *g, json_t *text) {
    static const struct {
        const char *key, *name;
        int64_t low, high;
    } numbers[] = {{"gemma4.embedding_length", "hidden_size", 1, 1 << 20},
                   {"gemma4.block_count", "num_hidden_layers", 1, LAYERS_MAX},
                   {"gemma4.attention.head_count", "num_attention_heads", 1, 1 << 16},
                   {"gemma4.context_length", "max_position_embeddings", 1, 1 << 30},
                   {"gemma4.attention.sliding_window", "sliding_window", 1, 1 << 30},
                   {"gemma4.attention.key_length_swa", "head_dim", 2, 1 << 16},
                   {"gemma4.attention.key_length", "global_head_dim", 2, 1 << 16}};
    int64_t L = 0, value = 0, pad = 0, bos = 2;
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        TRY(gguf_get_int(g, numbers[i].key, numbers[i].low, numbers[i].high, &value));
        set_int(text, numbers[i].name, value);
        if (!strcmp(numbers[i].name, "num_hidden_layers")) L = value;
    }
    TRY(fill_layers(g, text, L));
    const StoredTensor *embedding = gguf_find_tensor(g, "token_embd.weight");
    if (!embedding || embedding->ndim != 2)
        FAIL(ERR_FORMAT, "%s: tensor 'token_embd.weight' is missing", g->path);
    set_int(text, "vocab_size", embedding->shape[0]);
    set_int(text, "vocab_size_per_layer_input", embedding->shape[0]);
    value = 0;
    TRY(get_optional(g, "gemma4.embedding_length_per_layer_input", &value));
    set_int(text, "hidden_size_per_layer_input", value);
    /* Released models without per-layer inputs see the tokens of an image both ways. */
    json_object_set_new(text, "use_bidirectional_attention",
                        value ? json_null() : json_string("vision"));
    if (gguf_find(g, "gemma4.expert_count")) {
        int64_t experts = 0, used = 0, width = 0;
        TRY(gguf_get_int(g, "gemma4.expert_count", 1, EXPERTS_MAX, &experts));
        TRY(gguf_get_int(g, "gemma4.expert_used_count", 1, EXPERTS_MAX, &used));
        TRY(gguf_get_int(g, "gemma4.expert_feed_forward_length", 1, 1 << 20, &width));
        json_object_set_new(text, "enable_moe_block", json_true());
        set_int(text, "num_experts", experts);
        set_int(text, "top_k_experts", used);
        set_int(text, "moe_intermediate_size", width);
    }
    double eps, theta, theta_swa, softcap = 0;
    TRY(gguf_get_float(g, "gemma4.attention.layer_norm_rms_epsilon", &eps));
    TRY(gguf_get_number(g, "gemma4.rope.freq_base", &theta));
    TRY(gguf_get_number(g, "gemma4.rope.freq_base_swa", &theta_swa));
    if (gguf_find(g, "gemma4.final_logit_softcapping"))
        TRY(gguf_get_number(g, "gemma4.final_logit_softcapping", &softcap));
    if (!isfinite(theta) || !isfinite(theta_swa) || !isfinite(softcap))
        FAIL(ERR_FORMAT, "%s: a rope base or softcap is no finite number", g->path);
    json_object_set_new(text, "rms_norm_eps", json_real(eps));
    json_object_set_new(text, "final_logit_softcapping",
                        softcap ? json_real(softcap) : json_null());
    json_object_set_new(text, "rope_parameters",
                        json_pack("{s:{s:s, s:f, s:f}, s:{s:s, s:f}}", "full_attention",
                                  "rope_type", "proportional", "rope_theta", theta,
                                  "partial_rotary_factor", rotary_factor(g), "sliding_attention",
                                  "rope_type", "default", "rope_theta", theta_swa));
    json_object_set_new(text, "hidden_activation", json_string("gelu_pytorch_tanh"));
    json_object_set_new(text, "tie_word_embeddings", json_true());
    TRY(get_optional(g, "tokenizer.ggml.padding_token_id", &pad));
    TRY(get_optional(g, "tokenizer.ggml.bos_token_id", &bos));
    set_int(text, "pad_token_id", pad);
    set_int(text, "bos_token_id", bos);
    return OK;
}

static Status config_json(const Gguf *g, const Gguf *towers, char **bytes) {
    size_t size;
    const char *arch = gguf_text(g, "general.architecture", &size);
    if (!has_architecture(g, "gemma4"))
        FAIL(ERR_FORMAT, "%s: general.architecture is '%.*s', expected gemma4%s", g->path,
             arch ? (int)size : 4, arch ? arch : "none",
             has_architecture(g, "clip") ? ": towers go into a folder with their text model" : "");
    bool nested = towers || strcmp(gguf_prefix(g), "model.");
    json_t *text = json_object();
    Status status = fill_config(g, text);
    if (status == OK) {
        json_object_set_new(text, "model_type", json_string("gemma4_text"));
        json_t *root = text;
        if (nested) root = json_pack("{s:s, s:O}", "model_type", "gemma4", "text_config", text);
        json_object_set_new(
            root, "architectures",
            json_pack("[s]", nested ? "Gemma4ForConditionalGeneration" : "Gemma4ForCausalLM"));
        json_object_set_new(root, "dtype", json_string("bfloat16"));
        json_object_set_new(root, "eos_token_id", end_tokens(g));
        if (towers) status = fill_media(g, towers, root);
        if (status == OK) *bytes = json_dumps(root, JSON_INDENT(2) | JSON_REAL_PRECISION(15));
        if (nested) json_decref(root);
    }
    json_decref(text);
    return status;
}

static void copy_number(const Gguf *g, const char *key, json_t *to, const char *name, bool whole) {
    double value;
    if (!gguf_find(g, key) || gguf_get_float(g, key, &value) != OK) return;
    json_object_set_new(to, name, whole ? json_integer((json_int_t)value) : json_real(value));
}

static char *generation_json(const Gguf *g) {
    json_t *root = json_pack("{s:o}", "eos_token_id", end_tokens(g));
    const GgufValue *suppressed = gguf_find(g, "tokenizer.ggml.suppress_tokens");
    copy_number(g, "general.sampling.temp", root, "temperature", false);
    copy_number(g, "general.sampling.top_k", root, "top_k", true);
    copy_number(g, "general.sampling.top_p", root, "top_p", false);
    if (json_object_get(root, "temperature")) json_object_set_new(root, "do_sample", json_true());
    if (suppressed && suppressed->item != GGUF_STRING) {
        json_t *list = json_array();
        for (uint64_t i = 0; i < suppressed->count && i < 4096; i++) {
            double id;
            if (gguf_number(g, suppressed, i, &id) == OK)
                json_array_append_new(list, json_integer((json_int_t)id));
        }
        json_object_set_new(root, "suppress_tokens", list);
    }
    char *text = json_dumps(root, JSON_INDENT(2));
    json_decref(root);
    return text;
}

Status gguf_companion(const Gguf *g, const Gguf *towers, const char *name, char **bytes,
                      size_t *size) {
    *bytes = NULL;
    if (!strcmp(name, "config.json")) {
        TRY(config_json(g, towers, bytes));
    } else if (!strcmp(name, "generation_config.json")) {
        *bytes = generation_json(g);
    } else if (!strcmp(name, "tokenizer.json")) {
        TRY(gguf_tokenizer_json(g, bytes));
    } else if (!strcmp(name, "chat_template.jinja")) {
        const char *text = gguf_text(g, "tokenizer.chat_template", size);
        if (!text) return OK;
        *bytes = must_malloc(*size + 1);
        memcpy(*bytes, text, *size);
        (*bytes)[*size] = 0;
        return OK;
    }
    if (*bytes) *size = strlen(*bytes);
    return OK;
}

/* ---- config to metadata ---- */

static void put_layers(GgufWriter *w, const ModelConfig *c) {
    int64_t L = c->num_hidden_layers;
    bool same = true, wide = c->use_double_wide_mlp;
    for (int64_t l = 1; l < L; l++)
        same &= c->layer[l].num_key_value_heads == c->layer[0].num_key_value_heads;
    if (wide)
        gguf_put_array(w, "gemma4.feed_forward_length", GGUF_I32, (uint64_t)L);
    else
        gguf_put_u32(w, "gemma4.feed_forward_length", (uint32_t)c->intermediate_size);
    for (int64_t l = 0; wide && l < L; l++)
        gguf_add_i32(w, (int32_t)block_config(c, (int)l).intermediate_size);
    gguf_put_u32(w, "gemma4.attention.head_count", (uint32_t)c->num_attention_heads);
    if (same)
        gguf_put_u32(w, "gemma4.attention.head_count_kv",
                     (uint32_t)c->layer[0].num_key_value_heads);
    else
        gguf_put_array(w, "gemma4.attention.head_count_kv", GGUF_I32, (uint64_t)L);
    for (int64_t l = 0; !same && l < L; l++)
        gguf_add_i32(w, (int32_t)c->layer[l].num_key_value_heads);
    gguf_put_array(w, "gemma4.attention.sliding_window_pattern", GGUF_BOOL, (uint64_t)L);
    for (int64_t l = 0; l < L; l++) gguf_add_bool(w, c->layer[l].kind == SLIDING);
}

static void put_config(GgufWriter *w, const ModelConfig *c) {
    uint32_t full = (uint32_t)full_head_dim(c), sliding = full;
    for (int64_t l = 0; l < c->num_hidden_layers; l++)
        if (c->layer[l].kind == SLIDING) sliding = (uint32_t)c->layer[l].head_dim;
    gguf_put_u32(w, "gemma4.block_count", (uint32_t)c->num_hidden_layers);
    gguf_put_u32(w, "gemma4.context_length", (uint32_t)c->max_position_embeddings);
    gguf_put_u32(w, "gemma4.embedding_length", (uint32_t)c->hidden_size);
    put_layers(w, c);
    gguf_put_f32(w, "gemma4.rope.freq_base", (float)c->rope[FULL].rope_theta);
    gguf_put_f32(w, "gemma4.rope.freq_base_swa", (float)c->rope[SLIDING].rope_theta);
    gguf_put_f32(w, "gemma4.attention.layer_norm_rms_epsilon", (float)c->rms_norm_eps);
    if (c->num_experts) {
        gguf_put_u32(w, "gemma4.expert_count", (uint32_t)c->num_experts);
        gguf_put_u32(w, "gemma4.expert_used_count", (uint32_t)c->top_k_experts);
        gguf_put_u32(w, "gemma4.expert_feed_forward_length", (uint32_t)c->moe_intermediate_size);
    }
    gguf_put_u32(w, "gemma4.attention.key_length", full);
    gguf_put_u32(w, "gemma4.attention.value_length", full);
    gguf_put_u32(w, "gemma4.attention.key_length_swa", sliding);
    gguf_put_u32(w, "gemma4.attention.value_length_swa", sliding);
    gguf_put_u32(w, "gemma4.rope.dimension_count", full);
    gguf_put_u32(w, "gemma4.rope.dimension_count_swa", sliding);
    if (c->final_logit_softcapping > 0)
        gguf_put_f32(w, "gemma4.final_logit_softcapping", (float)c->final_logit_softcapping);
    gguf_put_u32(w, "gemma4.attention.sliding_window", (uint32_t)c->sliding_window);
    gguf_put_u32(w, "gemma4.attention.shared_kv_layers", (uint32_t)c->num_kv_shared_layers);
    gguf_put_u32(w, "gemma4.embedding_length_per_layer_input",
                 (uint32_t)c->hidden_size_per_layer_input);
}

static Status put_sampling(GgufWriter *w, const char *source) {
    char *bytes = NULL;
    size_t size;
    TRY(companion_find(&bytes, &size, source, "generation_config.json"));
    if (!bytes) return OK;
    json_t *root = json_loadb(bytes, size, 0, NULL), *k = json_object_get(root, "top_k"),
           *p = json_object_get(root, "top_p"), *t = json_object_get(root, "temperature");
    if (json_is_integer(k))
        gguf_put_i32(w, "general.sampling.top_k", (int32_t)json_integer_value(k));
    if (json_is_number(p)) gguf_put_f32(w, "general.sampling.top_p", (float)json_number_value(p));
    if (json_is_number(t)) gguf_put_f32(w, "general.sampling.temp", (float)json_number_value(t));
    json_decref(root);
    free(bytes);
    return OK;
}

uint32_t gguf_file_type(DType dtype) {
    return dtype == F32 ? 0 : dtype == Q4_0 ? 2 : dtype == Q8_0 ? 7 : 32;
}

/* llama.cpp knows the sources of shared K and V by their place: the two layers before the first
 * that shares, sliding then full. */
static void mention_sharing(const ModelConfig *c) {
    int64_t first = c->num_hidden_layers - c->num_kv_shared_layers;
    for (int64_t l = first; l < c->num_hidden_layers; l++) {
        int64_t source = block_config(c, (int)l).kv_layer;
        if (source == first - (c->layer[l].kind == SLIDING ? 2 : 1)) continue;
        note("layer %d shares K and V of layer %d: llama.cpp expects other layers and will not run "
             "this file",
             (int)l, (int)source);
        return;
    }
}

Status gguf_put_model(GgufWriter *w, const GgufModel *m, int64_t parameters) {
    mention_sharing(m->config);
    char label[32];
    double size = (double)parameters;
    snprintf(label, sizeof label, size < 1e9 ? "%.0fM" : "%.2gB",
             size < 1e9 ? size / 1e6 : size / 1e9);
    gguf_put_text(w, "general.architecture", "gemma4");
    gguf_put_text(w, "general.type", "model");
    TRY(put_sampling(w, m->source));
    gguf_put_text(w, "general.name", m->name);
    gguf_put_text(w, "general.size_label", label);
    put_config(w, m->config);
    gguf_put_u32(w, "general.file_type", gguf_file_type(m->dtype));
    gguf_put_u32(w, "general.quantization_version", 2);
    gguf_put_text(w, PREFIX_KEY, model_config_prefix(m->config));
    return gguf_put_tokenizer(w, m->source);
}
