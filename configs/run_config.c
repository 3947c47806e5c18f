/* run_config.c - reading, checking and writing run files. */
#include "configs/run_config.h"
#include "configs/media_config.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const methods[] = {"full", "lora", "qlora", "qat", "qat-lora", NULL};
static const char *const quants[] = {"nf4", "q4_0", "q8_0", "int8", "int4", NULL};
static const char *const losses[] = {"assistant", "completion", "all", NULL};
static const char *const turn_names[] = {"auto", "whole", "per-turn", NULL};
static const char *const recomputes[] = {"auto", "on", "off", "offload", NULL};
static const char *const schedules[] = {"constant", "linear", "cosine", "wsd", NULL};
static const char *const optimizers[] = {"adamw", "sgd", NULL};
static const char *const state_formats[] = {"f32", "8bit", NULL};
static const char *const master_formats[] = {"f32", "none", NULL};
static const char *const formats[] = {"auto", "large", "small", NULL};
static const char *const longs[] = {"drop", "cut", NULL};
static const char *const media_kept[] = {"features", "original", NULL};
static const char *const masks[] = {"lapidary", "trl", NULL};
static const char *const bad_steps[] = {"skip", "stop", NULL};
static const char *const dtypes[] = {"bf16", "f32", NULL};

/* map[key] as one of `names`; *out is its index. */
static Status get_choice(Node *map, const char *key, const char *const *names, int *out) {
    const char *text = NULL;
    TRY(node_get_text(map, key, &text, false));
    if (!text) return OK;
    char expected[256] = "";
    for (int i = 0; names[i]; i++) {
        if (!strcmp(names[i], text)) {
            *out = i;
            return OK;
        }
        snprintf(expected + strlen(expected), sizeof expected - strlen(expected), "%s%s",
                 i ? ", " : "", names[i]);
    }
    Node *node = node_find(map, key);
    FAIL(ERR_CONFIG, "%s:%d: %s is '%s', expected one of %s", node->file, node->line, key, text,
         expected);
}

static Status get_range(Node *map, const char *key, double low, double high, double *out) {
    TRY(node_get_double(map, key, out, false));
    Node *node = node_find(map, key);
    if (node && (*out < low || *out > high))
        FAIL(ERR_CONFIG, "%s:%d: %s is %g, expected %g to %g", node->file, node->line, key, *out,
             low, high);
    return OK;
}

static Status get_count(Node *map, const char *key, int64_t low, int64_t *out) {
    TRY(node_get_int(map, key, out, false));
    Node *node = node_find(map, key);
    if (node && !node_is_null(node) && *out < low)
        FAIL(ERR_CONFIG, "%s:%d: %s is %" PRId64 ", expected at least %" PRId64, node->file,
             node->line, key, *out, low);
    return OK;
}

/* One name or a list of names. */
static Status get_names(Node *map, const char *key, NameList *list) {
    Node *node = node_find(map, key);
    if (node_is_null(node)) {
        if (node) *list = (NameList){0};
        return OK;
    }
    int count = node->kind == NODE_LIST ? node->count : 1;
    *list = (NameList){must_calloc((size_t)count + 1, sizeof *list->items), count};
    for (int i = 0; i < count; i++) {
        Node *item = node->kind == NODE_LIST ? node->items[i] : node;
        TRY(node_to_text(item, key, &list->items[i]));
    }
    return OK;
}

static Status get_map(Node *map, const char *key, Node **out) {
    Node *node = node_find(map, key);
    *out = node_is_null(node) ? NULL : node;
    if (*out && node->kind != NODE_MAP)
        FAIL(ERR_CONFIG, "%s:%d: %s is not a map", node->file, node->line, key);
    return OK;
}

static Status get_numbers(Node *map, const char *key, NumberMap *out) {
    Node *node;
    TRY(get_map(map, key, &node));
    if (!node) return OK;
    out->count = node->count;
    out->keys = must_calloc((size_t)node->count + 1, sizeof *out->keys);
    out->values = must_calloc((size_t)node->count + 1, sizeof *out->values);
    for (int i = 0; i < node->count; i++) {
        out->keys[i] = node->keys[i];
        node->items[i]->used = true;
        TRY(node_to_double(node->items[i], node->keys[i], &out->values[i]));
        if (out->values[i] <= 0)
            FAIL(ERR_CONFIG, "%s:%d: %s of '%s' is %g, expected above 0", node->file,
                 node->items[i]->line, key, node->keys[i], out->values[i]);
    }
    return OK;
}

static Status read_lora(RunConfig *c, Node *root) {
    static const char *defaults[] = {"q_proj",    "k_proj",  "v_proj",   "o_proj",
                                     "gate_proj", "up_proj", "down_proj"};
    Node *lora;
    c->lora.rank = 16;
    c->lora.alpha = 32;
    c->lora.targets = (NameList){must_calloc(8, sizeof(char *)), 7};
    memcpy(c->lora.targets.items, defaults, sizeof defaults);
    TRY(get_map(root, "lora", &lora));
    if (!lora) return OK;
    TRY(get_count(lora, "rank", 1, &c->lora.rank));
    TRY(get_range(lora, "alpha", 1e-9, 1e9, &c->lora.alpha));
    TRY(get_range(lora, "dropout", 0, 0.999, &c->lora.dropout));
    if (node_find(lora, "targets")) free(c->lora.targets.items);
    TRY(get_names(lora, "targets", &c->lora.targets));
    TRY(get_names(lora, "train_also", &c->lora.train_also));
    TRY(get_numbers(lora, "rank_pattern", &c->lora.rank_pattern));
    TRY(get_numbers(lora, "alpha_pattern", &c->lora.alpha_pattern));
    TRY(node_get_bool(lora, "experts", &c->lora.experts, false));
    TRY(node_get_bool(lora, "rslora", &c->lora.rslora, false));
    TRY(node_get_bool(lora, "dora", &c->lora.dora, false));
    return node_get_text(lora, "init", &c->lora.init, false);
}

static Status read_fields(RunConfig *c, Node *data) {
    static const char *const known[] = {"messages",    "tools",         "prompt", "completion",
                                        "text",        "conversations", "system", "output",
                                        "instruction", "input",         NULL};
    Node *fields;
    TRY(get_map(data, "fields", &fields));
    if (!fields) return OK;
    size_t space = (size_t)fields->count + 1;
    c->data.field_names = (NameList){must_calloc(space, sizeof(char *)), fields->count};
    c->data.field_values = (NameList){must_calloc(space, sizeof(char *)), fields->count};
    for (int i = 0; i < fields->count; i++) {
        int k = 0;
        while (known[k] && strcmp(known[k], fields->keys[i])) k++;
        if (!known[k]) return OK; /* left unused: an unknown key */
        fields->items[i]->used = true;
        c->data.field_names.items[i] = fields->keys[i];
        TRY(node_to_text(fields->items[i], fields->keys[i], &c->data.field_values.items[i]));
    }
    return OK;
}

DataConfig data_config_default(void) {
    return (DataConfig){.max_length = 2048,
                        .shuffle = true,
                        .packing = true,
                        .add_eos = true,
                        .inline_thoughts = true,
                        .string_arguments = true,
                        .empty_thought = true,
                        .chat_format = "auto"};
}

/* Soft tokens of a picture or a frame at most; 0 where nothing is said. */
static Status read_budget(Node *data, const char *key, int64_t *tokens) {
    TRY(node_get_int(data, key, tokens, false));
    if (!media_is_budget(*tokens))
        FAIL(ERR_CONFIG, "%s:%d: data.%s is %" PRId64 ", expected 70, 140, 280, 560 or 1120",
             data->file, data->line, key, *tokens);
    return OK;
}

static Status read_data(RunConfig *c, Node *root) {
    Node *data, *repair;
    int loss = LOSS_ASSISTANT, turns = TURNS_AUTO, is_cut = 0, mask = 0, format = 0, original = 0;
    c->data = data_config_default();
    TRY(get_map(root, "data", &data));
    if (!data) FAIL(ERR_CONFIG, "%s:%d: key 'data' is missing", root->file, root->line);
    TRY(get_names(data, "train", &c->data.train));
    if (!c->data.train.count)
        FAIL(ERR_CONFIG, "%s:%d: key 'data.train' is missing", data->file, data->line);
    Node *eval = node_find(data, "eval");
    char *end;
    if (eval && eval->kind == NODE_SCALAR && !eval->quoted && !node_is_null(eval) &&
        (strtod(eval->text, &end), !*end))
        TRY(get_range(data, "eval", 1e-9, 1 - 1e-9, &c->data.eval_share));
    else
        TRY(get_names(data, "eval", &c->data.eval));
    TRY(read_fields(c, data));
    TRY(get_count(data, "max_length", 2, &c->data.max_length));
    TRY(node_get_bool(data, "shuffle", &c->data.shuffle, false));
    TRY(node_get_bool(data, "packing", &c->data.packing, false));
    TRY(node_get_bool(data, "add_eos", &c->data.add_eos, false));
    TRY(node_get_bool(data, "literal", &c->data.literal, false));
    TRY(read_budget(data, "image_tokens", &c->data.image_tokens));
    TRY(read_budget(data, "video_tokens", &c->data.video_tokens));
    TRY(node_get_int(data, "video_frames", &c->data.video_frames, false));
    if (c->data.video_frames < 0 || c->data.video_frames > 100000)
        FAIL(ERR_CONFIG, "%s:%d: data.video_frames is %" PRId64 ", expected 1 to 100000",
             data->file, data->line, c->data.video_frames);
    TRY(node_get_bool(data, "skip_bad", &c->data.skip_bad, false));
    TRY(get_choice(data, "loss_on", losses, &loss));
    TRY(get_choice(data, "turns", turn_names, &turns));
    TRY(get_choice(data, "long", longs, &is_cut));
    TRY(get_choice(data, "media", media_kept, &original));
    c->data.media_original = original == 1;
    TRY(get_choice(data, "mask", masks, &mask));
    TRY(get_choice(data, "chat_format", formats, &format));
    c->data.loss_on = (LossOn)loss;
    c->data.turns = (Turns)turns;
    c->data.cut_long = is_cut;
    c->data.trl_mask = mask;
    c->data.chat_format = formats[format];
    TRY(get_map(data, "repair", &repair));
    if (!repair) return OK;
    TRY(node_get_bool(repair, "inline_thoughts", &c->data.inline_thoughts, false));
    TRY(node_get_bool(repair, "string_arguments", &c->data.string_arguments, false));
    return node_get_bool(repair, "empty_thought", &c->data.empty_thought, false);
}

static Status read_optimizer(RunConfig *c, Node *root) {
    Node *map, *betas;
    int name = 0;
    c->optimizer.lr = 2e-4;
    c->optimizer.beta1 = 0.9;
    c->optimizer.beta2 = 0.999;
    c->optimizer.eps = 1e-8;
    TRY(get_map(root, "optimizer", &map));
    if (!map) return OK;
    TRY(get_choice(map, "name", optimizers, &name));
    c->optimizer.sgd = name;
    TRY(get_range(map, "lr", 0, 1e6, &c->optimizer.lr));
    betas = node_find(map, "betas");
    if (!node_is_null(betas)) {
        if (betas->kind != NODE_LIST || betas->count != 2)
            FAIL(ERR_CONFIG, "%s:%d: betas is not a list of two numbers", betas->file, betas->line);
        TRY(node_to_double(betas->items[0], "betas", &c->optimizer.beta1));
        TRY(node_to_double(betas->items[1], "betas", &c->optimizer.beta2));
        for (int i = 0; i < 2; i++) {
            double beta = i ? c->optimizer.beta2 : c->optimizer.beta1;
            if (beta < 0 || beta >= 1)
                FAIL(ERR_CONFIG, "%s:%d: betas are not in [0, 1)", betas->file, betas->line);
        }
    }
    TRY(get_range(map, "eps", 1e-30, 1e6, &c->optimizer.eps));
    TRY(get_range(map, "weight_decay", 0, 1e3, &c->optimizer.weight_decay));
    TRY(get_range(map, "momentum", 0, 0.99999, &c->optimizer.momentum));
    int states = 0;
    TRY(get_choice(map, "states", state_formats, &states));
    c->optimizer.states_8bit = states;
    int masters = 0;
    TRY(get_choice(map, "masters", master_formats, &masters));
    c->optimizer.no_masters = masters;
    TRY(node_get_bool(map, "fused", &c->optimizer.fused, false));
    return OK;
}

static Status read_method(RunConfig *c, Node *root) {
    int index = METHOD_LORA;
    TRY(get_choice(root, "method", methods, &index));
    c->method = (Method)index;
    return OK;
}

/* An error naming a key that two settings cannot share. */
static Status refuse_pair(const Node *map, const char *key, const char *why) {
    Node *node = node_find((Node *)map, key);
    FAIL(ERR_CONFIG, "%s:%d: %s %s", node->file, node->line, key, why);
}

static Status read_quant(RunConfig *c, Node *root) {
    Node *quant, *lora;
    bool rounds = method_rounds(c->method);
    int format = rounds ? QUANT_Q4_0 : QUANT_NF4;
    c->quant.nested = c->quant.embeddings = true;
    TRY(get_map(root, "quant", &quant));
    TRY(get_map(root, "lora", &lora));
    if (c->method == METHOD_QAT_LORA && c->lora.dora)
        return refuse_pair(lora, "dora", "does not go with qat-lora: the merged weight is rounded");
    if (c->method == METHOD_QAT_LORA && c->lora.dropout > 0)
        return refuse_pair(lora, "dropout",
                           "does not go with qat-lora: the merged weight is rounded");
    if (!quant || (c->method != METHOD_QLORA && !rounds)) {
        c->quant.format = (QuantName)format;
        return OK;
    }
    const char *activations = NULL;
    TRY(get_choice(quant, "format", quants, &format));
    TRY(node_get_bool(quant, "double", &c->quant.nested, false));
    TRY(get_count(quant, "start_step", 0, &c->quant.start_step));
    TRY(get_count(quant, "warmup", 0, &c->quant.warmup));
    TRY(node_get_bool(quant, "learned_scale", &c->quant.learned_scale, false));
    TRY(node_get_text(quant, "activations", &activations, false));
    c->quant.embeddings = format != QUANT_INT8 && format != QUANT_INT4;
    bool rounded_tables = c->quant.embeddings;
    TRY(node_get_bool(quant, "embeddings", &c->quant.embeddings, false));
    c->quant.format = (QuantName)format;
    if (rounds && c->quant.embeddings && !rounded_tables)
        return refuse_pair(quant, "embeddings",
                           "is true: int8 and w4a16 exports leave the tables in bf16");
    if (rounds && format == QUANT_NF4)
        return refuse_pair(quant, "format",
                           "is nf4, which no exported file has; expected q4_0, q8_0, "
                           "int8 or int4");
    if (!rounds && format >= QUANT_INT8)
        return refuse_pair(quant, "format", "of a frozen base is one of nf4, q4_0, q8_0");
    if (rounds && c->quant.learned_scale && format != QUANT_Q4_0)
        return refuse_pair(quant, "learned_scale", "is true, which goes with format q4_0 only");
    if (activations && strcmp(activations, "int8"))
        return refuse_pair(quant, "activations", "is neither int8 nor null");
    c->quant.activations = activations != NULL;
    return OK;
}

static Status read_moe(RunConfig *c, Node *root) {
    Node *moe;
    bool full = !method_has_adapter(c->method);
    c->aux_loss = full ? 0 : 0.001;
    c->train_router = full;
    TRY(get_map(root, "moe", &moe));
    if (!moe) return OK;
    TRY(get_range(moe, "aux_loss", 0, 1e6, &c->aux_loss));
    return node_get_bool(moe, "train_router", &c->train_router, false);
}

/* Known keys of methods this run does not use: named once, not refused. */
static void mention_unused(RunConfig *c, Node *root) {
    Node *quant = node_find(root, "quant"), *lora = node_find(root, "lora");
    bool more = !node_is_null(lora) && (lora->count > 1 || !node_find(lora, "train_also"));
    if (!method_has_adapter(c->method) && more)
        note("method %s uses no key of 'lora' but train_also", methods[c->method]);
    if (node_is_null(quant)) return;
    if (c->method == METHOD_FULL || c->method == METHOD_LORA)
        note("method %s does not use the keys of 'quant'", methods[c->method]);
    static const char *const known[] = {"format",        "double",      "start_step", "warmup",
                                        "learned_scale", "activations", "embeddings"};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) node_find(quant, known[i]);
}

static Status read_eval_tasks(RunConfig *c, Node *root) {
    Node *map;
    c->eval_tasks.shots = -1;
    c->eval_tasks.batch = 16;
    TRY(get_map(root, "eval_tasks", &map));
    if (!map) return OK;
    TRY(get_names(map, "names", &c->eval_tasks.names));
    TRY(node_get_text(map, "data", &c->eval_tasks.data, true));
    TRY(get_range(map, "limit", 0, 1e12, &c->eval_tasks.limit));
    TRY(node_get_int(map, "shots", &c->eval_tasks.shots, false));
    TRY(get_count(map, "samples", 1, &c->eval_tasks.samples));
    TRY(get_count(map, "max_tokens", 1, &c->eval_tasks.max_tokens));
    TRY(get_count(map, "batch", 1, &c->eval_tasks.batch));
    TRY(node_get_bool(map, "chat", &c->eval_tasks.chat, false));
    TRY(node_get_bool(map, "think", &c->eval_tasks.think, false));
    TRY(node_get_bool(map, "run_code", &c->eval_tasks.run_code, false));
    if (!c->eval_tasks.names.count)
        FAIL(ERR_CONFIG, "%s:%d: eval_tasks has no names", map->file, map->line);
    if (!c->eval_every) FAIL(ERR_CONFIG, "%s:%d: eval_tasks need eval_every", map->file, map->line);
    return OK;
}

static Status read_run(RunConfig *c, Node *root) {
    Node *map;
    int index = 0;
    if (root->kind != NODE_MAP) FAIL(ERR_CONFIG, "%s: is not a map of keys", root->file);
    c->device = "auto";
    c->seed = 42;
    TRY(node_get_text(root, "model", &c->model, true));
    TRY(node_get_text(root, "output", &c->output, true));
    TRY(node_get_text(root, "device", &c->device, false));
    TRY(get_choice(root, "dtype", dtypes, &index));
    c->dtype = dtypes[index];
    TRY(node_get_int(root, "seed", &c->seed, false));
    TRY(read_method(c, root));
    TRY(read_lora(c, root));
    TRY(read_quant(c, root));
    TRY(read_data(c, root));
    TRY(read_optimizer(c, root));

    index = SCHEDULE_COSINE;
    c->schedule.warmup = 0.03;
    TRY(get_map(root, "schedule", &map));
    if (map) {
        TRY(get_choice(map, "name", schedules, &index));
        TRY(get_range(map, "warmup", 0, 1e12, &c->schedule.warmup));
        TRY(get_range(map, "min_lr", 0, 1e6, &c->schedule.min_lr));
    }
    c->schedule.name = (ScheduleName)index;

    c->sequences = 1;
    c->accumulate = 16;
    TRY(get_map(root, "batch", &map));
    if (map) {
        TRY(get_count(map, "sequences", 1, &c->sequences));
        TRY(get_count(map, "accumulate", 1, &c->accumulate));
    }
    c->shard = 1;
    c->context = c->experts = 1;
    c->timeout = 600;
    TRY(get_map(root, "parallel", &map));
    if (map) {
        double shard = 1;
        TRY(get_range(map, "shard", 0, 3, &shard));
        if (shard != (int)shard)
            FAIL(ERR_CONFIG, "parallel.shard is %g, expected 0, 1, 2 or 3", shard);
        c->shard = (int64_t)shard;
        TRY(get_count(map, "context", 1, &c->context));
        TRY(get_count(map, "experts", 1, &c->experts));
        TRY(get_count(map, "within", 1, &c->within));
        TRY(get_range(map, "timeout", 0, 1e9, &c->timeout));
    }
    c->clip = 1.0;
    TRY(get_range(root, "clip", 0, 1e12, &c->clip));
    if (node_find(root, "clip") && node_is_null(node_find(root, "clip"))) c->clip = 0;
    TRY(get_count(root, "steps", 1, &c->steps));
    c->epochs = 3;
    TRY(get_range(root, "epochs", 1e-9, 1e9, &c->epochs));
    TRY(read_moe(c, root));
    index = RECOMPUTE_AUTO;
    TRY(get_choice(root, "recompute", recomputes, &index));
    c->recompute = (Recompute)index;

    c->save_every = 200;
    c->save_keep = 3;
    c->save_best = true;
    TRY(get_map(root, "save", &map));
    if (map) {
        TRY(get_count(map, "every", 1, &c->save_every));
        TRY(get_count(map, "keep", 1, &c->save_keep));
        TRY(node_get_bool(map, "best", &c->save_best, false));
    }
    c->eval_every = 200;
    TRY(get_count(root, "eval_every", 1, &c->eval_every));
    TRY(get_count(root, "early_stop", 1, &c->early_stop));
    TRY(read_eval_tasks(c, root));
    index = 0;
    TRY(get_choice(root, "on_bad_step", bad_steps, &index));
    c->stop_on_bad_step = index;
    if (c->optimizer.fused && (c->accumulate != 1 || c->clip != 0 || !c->stop_on_bad_step))
        FAIL(ERR_CONFIG,
             "%s: optimizer.fused updates each layer on the way back, when the other gradients are "
             "not known: it needs batch.accumulate: 1, clip: 0 and on_bad_step: stop",
             root->file);
    mention_unused(c, root);
    return node_check_used(root, "");
}

/* Puts value at key.path, making maps on the way. */
static Status apply_override(Node *root, const char *override) {
    const char *equals = strchr(override, '=');
    if (!equals || equals == override)
        FAIL(ERR_USAGE, "override '%s', expected key.path=value", override);
    char *path = must_strdup(override), *key = path;
    path[equals - override] = 0;
    Node *value, *map = root;
    char *name = must_format("%s (command line)", path);
    const char *text = equals + 1;
    Status status =
        *text ? node_parse(&value, text, strlen(text), name) : node_parse(&value, "null", 4, name);
    free(name);
    if (status != OK) {
        free(path);
        return ERR_USAGE;
    }
    for (char *dot; (dot = strchr(key, '.')); key = dot + 1) {
        *dot = 0;
        Node *inner = node_find(map, key);
        if (!inner || inner->kind != NODE_MAP) {
            TRY(node_parse(&inner, "{}", 2, ""));
            inner->line = 0;
            node_set(map, key, inner);
        }
        map = inner;
    }
    value->line = 0;
    node_set(map, key, value);
    free(path);
    return OK;
}

static void clear_used(Node *node) {
    node->used = false;
    for (int i = 0; i < node->count; i++) clear_used(node->items[i]);
}

static Status finish(RunConfig *c, char **overrides, int count) {
    Status status = OK;
    if (count && c->tree->kind != NODE_MAP)
        FAIL_DONE(ERR_CONFIG, "%s: is not a map of keys", c->tree->file);
    for (int i = 0; i < count; i++) TRY_DONE(apply_override(c->tree, overrides[i]));
    clear_used(c->tree);
    TRY_DONE(read_run(c, c->tree));
done:
    if (status != OK) run_config_free(c);
    return status;
}

Status run_config_load(RunConfig *c, const char *path, char **overrides, int count) {
    *c = (RunConfig){0};
    TRY(node_load(&c->tree, path));
    return finish(c, overrides, count);
}

Status run_config_parse(RunConfig *c, const char *text, const char *name, char **overrides,
                        int count) {
    *c = (RunConfig){0};
    TRY(node_parse(&c->tree, text, strlen(text), name));
    return finish(c, overrides, count);
}

void run_config_free(RunConfig *c) {
    free(c->lora.targets.items);
    free(c->lora.train_also.items);
    free(c->lora.rank_pattern.keys);
    free(c->lora.rank_pattern.values);
    free(c->lora.alpha_pattern.keys);
    free(c->lora.alpha_pattern.values);
    free(c->data.train.items);
    free(c->data.eval.items);
    free(c->eval_tasks.names.items);
    free(c->data.field_names.items);
    free(c->data.field_values.items);
    node_free(c->tree);
    *c = (RunConfig){0};
}

/* ---- writing ---- */

typedef struct Out {
    char *text;
    size_t size;
} Out;

static void __attribute__((format(printf, 2, 3))) put(Out *o, const char *format, ...) {
    char line[4096];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    CHECK(length >= 0 && length < (int)sizeof line, "a key of the run file is too long");
    o->text = must_realloc(o->text, o->size + (size_t)length + 1);
    memcpy(o->text + o->size, line, (size_t)length + 1);
    o->size += (size_t)length;
}

static void put_quoted(Out *o, const char *text) {
    if (!text) {
        put(o, "null");
        return;
    }
    put(o, "\"");
    for (; *text; text++) put(o, strchr("\"\\", *text) ? "\\%c" : "%c", *text);
    put(o, "\"");
}

static void put_names(Out *o, const NameList *list) {
    put(o, "[");
    for (int i = 0; i < list->count; i++) {
        if (i) put(o, ", ");
        put_quoted(o, list->items[i]);
    }
    put(o, "]");
}

static void put_numbers(Out *o, const NumberMap *map) {
    put(o, "{");
    for (int i = 0; i < map->count; i++) {
        if (i) put(o, ", ");
        put_quoted(o, map->keys[i]);
        put(o, ": %.17g", map->values[i]);
    }
    put(o, "}");
}

static void put_count_or_null(Out *o, const char *key, int64_t value) {
    if (value)
        put(o, "%s: %" PRId64 "\n", key, value);
    else
        put(o, "%s: null\n", key);
}

static const char *yes(bool value) {
    return value ? "true" : "false";
}

static void put_lora(Out *o, const RunConfig *c) {
    put(o,
        "lora:\n  rank: %" PRId64 "\n  alpha: %.17g\n  dropout: %.17g\n  targets: ", c->lora.rank,
        c->lora.alpha, c->lora.dropout);
    put_names(o, &c->lora.targets);
    put(o, "\n  experts: %s\n  rslora: %s\n  dora: %s\n  rank_pattern: ", yes(c->lora.experts),
        yes(c->lora.rslora), yes(c->lora.dora));
    put_numbers(o, &c->lora.rank_pattern);
    put(o, "\n  alpha_pattern: ");
    put_numbers(o, &c->lora.alpha_pattern);
    put(o, "\n  train_also: ");
    put_names(o, &c->lora.train_also);
    put(o, "\n  init: ");
    put_quoted(o, c->lora.init);
    put(o, "\n");
}

static void put_eval_tasks(Out *o, const RunConfig *c) {
    put(o, "eval_tasks:\n  names: ");
    put_names(o, &c->eval_tasks.names);
    put(o, "\n  data: ");
    put_quoted(o, c->eval_tasks.data);
    put(o, "\n  limit: %.17g\n  shots: %" PRId64 "\n  ", c->eval_tasks.limit, c->eval_tasks.shots);
    put_count_or_null(o, "samples", c->eval_tasks.samples);
    put(o, "  ");
    put_count_or_null(o, "max_tokens", c->eval_tasks.max_tokens);
    put(o, "  batch: %" PRId64 "\n  chat: %s\n  think: %s\n  run_code: %s\n", c->eval_tasks.batch,
        yes(c->eval_tasks.chat), yes(c->eval_tasks.think), yes(c->eval_tasks.run_code));
}

static void put_data(Out *o, const RunConfig *c) {
    put(o, "data:\n  train: ");
    put_names(o, &c->data.train);
    put(o, "\n  eval: ");
    if (c->data.eval_share > 0)
        put(o, "%.17g", c->data.eval_share);
    else if (c->data.eval.count)
        put_names(o, &c->data.eval);
    else
        put(o, "null");
    put(o, "\n  fields: {");
    for (int i = 0; i < c->data.field_names.count; i++) {
        put(o, "%s%s: ", i ? ", " : "", c->data.field_names.items[i]);
        put_quoted(o, c->data.field_values.items[i]);
    }
    put(o,
        "}\n  max_length: %" PRId64
        "\n  shuffle: %s\n  packing: %s\n  loss_on: %s\n  chat_format: %s\n  turns: %s\n"
        "  add_eos: %s\n  long: %s\n"
        "  repair: {inline_thoughts: %s, string_arguments: %s, empty_thought: %s}\n  mask: %s\n  "
        "literal: %s\n"
        "  skip_bad: %s\n",
        c->data.max_length, yes(c->data.shuffle), yes(c->data.packing), losses[c->data.loss_on],
        c->data.chat_format, turn_names[c->data.turns], yes(c->data.add_eos),
        longs[c->data.cut_long], yes(c->data.inline_thoughts), yes(c->data.string_arguments),
        yes(c->data.empty_thought), masks[c->data.trl_mask], yes(c->data.literal),
        yes(c->data.skip_bad));
    /* 0 is what the model has, and as good as nothing */
    if (c->data.media_original) put(o, "  media: original\n");
    if (c->data.image_tokens) put(o, "  image_tokens: %" PRId64 "\n", c->data.image_tokens);
    if (c->data.video_tokens) put(o, "  video_tokens: %" PRId64 "\n", c->data.video_tokens);
    if (c->data.video_frames) put(o, "  video_frames: %" PRId64 "\n", c->data.video_frames);
}

char *run_config_text(const RunConfig *c) {
    Out o = {0};
    put(&o, "model: ");
    put_quoted(&o, c->model);
    put(&o, "\noutput: ");
    put_quoted(&o, c->output);
    put(&o, "\ndevice: \"%s\"\ndtype: %s\nseed: %" PRId64 "\nmethod: %s\n", c->device, c->dtype,
        c->seed, methods[c->method]);
    if (method_has_adapter(c->method)) put_lora(&o, c);
    if (c->method == METHOD_QLORA)
        put(&o, "quant: {format: %s, double: %s}\n", quants[c->quant.format], yes(c->quant.nested));
    if (method_rounds(c->method))
        put(&o,
            "quant: {format: %s, start_step: %" PRId64 ", warmup: %" PRId64
            ", learned_scale: %s, activations: %s, embeddings: %s}\n",
            quants[c->quant.format], c->quant.start_step, c->quant.warmup,
            yes(c->quant.learned_scale), c->quant.activations ? "int8" : "null",
            yes(c->quant.embeddings));
    put_data(&o, c);
    put(&o,
        "optimizer: {name: %s, lr: %.17g, betas: [%.17g, %.17g], eps: %.17g, weight_decay: %.17g, "
        "momentum: %.17g, "
        "states: %s, masters: %s, fused: %s}\n",
        optimizers[c->optimizer.sgd], c->optimizer.lr, c->optimizer.beta1, c->optimizer.beta2,
        c->optimizer.eps, c->optimizer.weight_decay, c->optimizer.momentum,
        state_formats[c->optimizer.states_8bit], master_formats[c->optimizer.no_masters],
        yes(c->optimizer.fused));
    put(&o, "schedule: {name: %s, warmup: %.17g, min_lr: %.17g}\n", schedules[c->schedule.name],
        c->schedule.warmup, c->schedule.min_lr);
    put(&o, "batch: {sequences: %" PRId64 ", accumulate: %" PRId64 "}\n", c->sequences,
        c->accumulate);
    put(&o, "parallel: {shard: %" PRId64 ", context: %" PRId64 ", experts: %" PRId64 ", within: ",
        c->shard, c->context, c->experts);
    put(&o, c->within ? "%" PRId64 : "null", c->within);
    put(&o, ", timeout: %.17g}\nclip: %.17g\n", c->timeout, c->clip);
    put_count_or_null(&o, "steps", c->steps);
    put(&o, "epochs: %.17g\nmoe: {aux_loss: %.17g, train_router: %s}\nrecompute: \"%s\"\n",
        c->epochs, c->aux_loss, yes(c->train_router), recomputes[c->recompute]);
    put(&o, "save: {every: %" PRId64 ", keep: %" PRId64 ", best: %s}\n", c->save_every,
        c->save_keep, yes(c->save_best));
    put_count_or_null(&o, "eval_every", c->eval_every);
    put_count_or_null(&o, "early_stop", c->early_stop);
    if (c->eval_tasks.names.count) put_eval_tasks(&o, c);
    put(&o, "on_bad_step: %s\n", bad_steps[c->stop_on_bad_step]);
    return o.text;
}
