/* gguf_tokenizer.c - tokens, their types, merges, and who is who among the special ones. */
#include "formats/gguf_tokenizer.h"
#include "formats/companion.h"

#include <inttypes.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

/* ggml's token types. */
enum { TOKEN_NORMAL = 1, TOKEN_CONTROL = 3, TOKEN_USER_DEFINED = 4, TOKEN_BYTE = 6 };

#define TOKENS_MAX (1 << 24)

/* Special tokens that llama.cpp's chat parser must see in the text. */
static bool is_visible(const char *token) {
    static const char *const visible[] = {"<|channel>",   "<channel|>",       "<|tool_call>",
                                          "<tool_call|>", "<|tool_response>", "<tool_response|>",
                                          "<|\"|>"};
    for (size_t i = 0; i < sizeof visible / sizeof *visible; i++)
        if (!strcmp(token, visible[i])) return true;
    return false;
}

static bool is_byte(const char *token) {
    return strlen(token) == 6 && !strncmp(token, "<0x", 3) && token[5] == '>';
}

/* ---- GGUF to tokenizer.json ---- */

static json_t *added_token(int64_t id, const char *bytes, size_t size) {
    return json_pack("{s:I, s:s%, s:b, s:b, s:b, s:b, s:b}", "id", (json_int_t)id, "content", bytes,
                     size, "single_word", 0, "lstrip", 0, "rstrip", 0, "normalized", 0, "special",
                     1);
}

static Status read_tokens(const Gguf *g, json_t *vocab, json_t *added) {
    const GgufValue *tokens = gguf_find(g, "tokenizer.ggml.tokens"),
                    *types = gguf_find(g, "tokenizer.ggml.token_type");
    if (!tokens || tokens->item != GGUF_STRING || !types || types->count != tokens->count ||
        tokens->count > TOKENS_MAX)
        FAIL(ERR_FORMAT, "%s: tokenizer.ggml.tokens and .token_type do not make a vocabulary",
             g->path);
    GgufStrings s = gguf_strings(tokens);
    const char *bytes;
    size_t size;
    for (uint64_t id = 0; gguf_next_string(&s, &bytes, &size); id++) {
        double type;
        TRY(gguf_number(g, types, id, &type));
        json_t *number = json_integer((json_int_t)id);
        if (memchr(bytes, 0, size) || json_object_getn(vocab, bytes, size) ||
            json_object_setn_new(vocab, bytes, size, number))
            FAIL(ERR_FORMAT, "%s: token %" PRIu64 " is no text, or there twice", g->path, id);
        if (type == TOKEN_CONTROL || type == TOKEN_USER_DEFINED)
            json_array_append_new(added, added_token((int64_t)id, bytes, size));
    }
    return OK;
}

static Status read_merges(const Gguf *g, json_t *merges) {
    const GgufValue *v = gguf_find(g, "tokenizer.ggml.merges");
    if (!v || v->item != GGUF_STRING)
        FAIL(ERR_FORMAT, "%s: the key 'tokenizer.ggml.merges' is missing", g->path);
    GgufStrings s = gguf_strings(v);
    const char *bytes;
    size_t size;
    while (gguf_next_string(&s, &bytes, &size)) {
        json_t *merge = json_stringn(bytes, size);
        if (!merge) FAIL(ERR_FORMAT, "%s: a merge is no UTF-8", g->path);
        json_array_append_new(merges, merge);
    }
    return OK;
}

Status gguf_tokenizer_json(const Gguf *g, char **out) {
    size_t size;
    const char *model = gguf_text(g, "tokenizer.ggml.model", &size);
    if (!model || size != 6 || memcmp(model, "gemma4", 6))
        FAIL(ERR_FORMAT, "%s: tokenizer.ggml.model is '%.*s', expected gemma4", g->path,
             model ? (int)size : 4, model ? model : "none");
    json_t *vocab = json_object(), *merges = json_array(), *added = json_array();
    json_t *root = json_pack(
        "{s:s, s:o, s:{s:s, s:{s:s}, s:s}, s:{s:s, s:n, s:s, s:n, s:n, s:b, s:b, s:b, s:o, s:o}}",
        "version", "1.0", "added_tokens", added, "normalizer", "type", "Replace", "pattern",
        "String", " ", "content", "\xe2\x96\x81", "model", "type", "BPE", "dropout", "unk_token",
        "<unk>", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", 1, "byte_fallback",
        1, "ignore_merges", 0, "vocab", vocab, "merges", merges);
    Status status = read_tokens(g, vocab, added);
    if (status == OK) status = read_merges(g, merges);
    if (status == OK) *out = json_dumps(root, JSON_COMPACT);
    json_decref(root);
    return status;
}

/* ---- tokenizer.json to GGUF ---- */

typedef struct Vocabulary {
    const char **text; /* of each id; NULL: none */
    uint8_t *type;
    int64_t size;
} Vocabulary;

static Status list_tokens(Vocabulary *v, json_t *vocab, json_t *added, const char *source) {
    const char *text;
    json_t *value;
    size_t i;
    int64_t top = -1;
    json_object_foreach(vocab, text, value) {
        if (json_integer_value(value) > top) top = json_integer_value(value);
    }
    json_array_foreach(added, i, value) {
        int64_t id = json_integer_value(json_object_get(value, "id"));
        if (id > top) top = id;
    }
    if (top < 0 || top >= TOKENS_MAX)
        FAIL(ERR_FORMAT, "%s: tokenizer.json holds no vocabulary", source);
    v->size = top + 1;
    v->text = must_calloc((size_t)v->size, sizeof *v->text);
    v->type = must_calloc((size_t)v->size, 1);
    json_object_foreach(vocab, text, value) {
        int64_t id = json_integer_value(value);
        if (id < 0) FAIL(ERR_FORMAT, "%s: the id of '%s' is negative", source, text);
        v->text[id] = text;
        v->type[id] = is_byte(text) ? TOKEN_BYTE : TOKEN_NORMAL;
    }
    json_array_foreach(added, i, value) {
        int64_t id = json_integer_value(json_object_get(value, "id"));
        const char *content = json_string_value(json_object_get(value, "content"));
        if (id < 0 || !content) FAIL(ERR_FORMAT, "%s: added token %zu has no content", source, i);
        bool control = json_is_true(json_object_get(value, "special")) && !is_visible(content);
        v->text[id] = content;
        v->type[id] = control ? TOKEN_CONTROL : TOKEN_USER_DEFINED;
    }
    for (int64_t id = 0; id < v->size; id++)
        if (!v->text[id]) FAIL(ERR_FORMAT, "%s: the vocabulary has no token %" PRId64, source, id);
    return OK;
}

static void put_merges(GgufWriter *w, json_t *merges) {
    size_t i;
    json_t *merge;
    gguf_put_array(w, "tokenizer.ggml.merges", GGUF_STRING, json_array_size(merges));
    json_array_foreach(merges, i, merge) {
        if (json_is_string(merge)) {
            gguf_add_text(w, json_string_value(merge), json_string_length(merge));
            continue;
        }
        char *joined = must_format("%s %s", json_string_value(json_array_get(merge, 0)),
                                   json_string_value(json_array_get(merge, 1)));
        gguf_add_text(w, joined, strlen(joined));
        free(joined);
    }
}

/* The text of a special token: tokenizer_config.json's, as it is or inside an object, else the
 * family's. */
static const char *special_text(json_t *config, const char *key, const char *otherwise) {
    json_t *value = json_object_get(config, key);
    if (json_is_object(value)) value = json_object_get(value, "content");
    return json_is_string(value) ? json_string_value(value) : otherwise;
}

static void put_special(GgufWriter *w, const Vocabulary *v, json_t *config) {
    static const struct {
        const char *key, *token, *gguf;
    } specials[] = {{"bos_token", "<bos>", "tokenizer.ggml.bos_token_id"},
                    {"eos_token", "<eos>", "tokenizer.ggml.eos_token_id"},
                    {"unk_token", "<unk>", "tokenizer.ggml.unknown_token_id"},
                    {"pad_token", "<pad>", "tokenizer.ggml.padding_token_id"},
                    {"mask_token", "<mask>", "tokenizer.ggml.mask_token_id"}};
    for (size_t i = 0; i < sizeof specials / sizeof *specials; i++) {
        const char *text = special_text(config, specials[i].key, specials[i].token);
        for (int64_t id = 0; id < v->size; id++)
            if (!strcmp(v->text[id], text)) {
                gguf_put_u32(w, specials[i].gguf, (uint32_t)id);
                break;
            }
    }
}

static void put_suppressed(GgufWriter *w, const char *source) {
    char *bytes = NULL;
    size_t size, i;
    json_t *item;
    if (companion_find(&bytes, &size, source, "generation_config.json") != OK || !bytes) return;
    json_t *root = json_loadb(bytes, size, 0, NULL),
           *list = json_object_get(root, "suppress_tokens");
    if (json_array_size(list)) {
        gguf_put_array(w, "tokenizer.ggml.suppress_tokens", GGUF_I32, json_array_size(list));
        json_array_foreach(list, i, item) gguf_add_i32(w, (int32_t)json_integer_value(item));
    }
    json_decref(root);
    free(bytes);
}

static Status put_template(GgufWriter *w, const char *source, json_t *config) {
    char *bytes = NULL;
    size_t size;
    const char *inside = json_string_value(json_object_get(config, "chat_template"));
    TRY(companion_find(&bytes, &size, source, "chat_template.jinja"));
    if (bytes) {
        gguf_put_bytes(w, "tokenizer.chat_template", bytes, size);
        free(bytes);
    } else if (inside) {
        gguf_put_text(w, "tokenizer.chat_template", inside);
    }
    return OK;
}

Status gguf_put_tokenizer(GgufWriter *w, const char *source) {
    char *bytes = NULL, *settings = NULL;
    size_t size;
    json_t *root = NULL, *config = NULL;
    Vocabulary v = {0};
    Status status = OK;
    TRY(companion_read(&bytes, &size, source, "tokenizer.json"));
    root = json_loadb(bytes, size, 0, NULL);
    json_t *model = json_object_get(root, "model");
    TRY_DONE(list_tokens(&v, json_object_get(model, "vocab"), json_object_get(root, "added_tokens"),
                         source));
    TRY_DONE(companion_find(&settings, &size, source, "tokenizer_config.json"));
    if (settings) config = json_loadb(settings, size, 0, NULL);
    gguf_put_text(w, "tokenizer.ggml.model", "gemma4");
    gguf_put_array(w, "tokenizer.ggml.tokens", GGUF_STRING, (uint64_t)v.size);
    for (int64_t id = 0; id < v.size; id++) gguf_add_text(w, v.text[id], strlen(v.text[id]));
    gguf_put_array(w, "tokenizer.ggml.scores", GGUF_F32, (uint64_t)v.size);
    for (int64_t id = 0; id < v.size; id++) gguf_add_f32(w, -1000.0f);
    gguf_put_array(w, "tokenizer.ggml.token_type", GGUF_I32, (uint64_t)v.size);
    for (int64_t id = 0; id < v.size; id++) gguf_add_i32(w, v.type[id]);
    put_merges(w, json_object_get(model, "merges"));
    put_special(w, &v, config);
    put_suppressed(w, source);
    TRY_DONE(put_template(w, source, config));
    gguf_put_bool(w, "tokenizer.ggml.add_space_prefix", false);
    gguf_put_bool(w, "tokenizer.ggml.add_bos_token", true);
done:
    free(v.text);
    free(v.type);
    json_decref(root);
    json_decref(config);
    free(bytes);
    free(settings);
    return status;
}
