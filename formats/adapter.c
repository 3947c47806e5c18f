/* adapter.c - attaching adapters by name. */
#include "formats/adapter.h"
#include "formats/pattern.h"
#include "kernels/elementwise.h"
#include "kernels/random.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Rows of a weight whose norms are taken at a time: whole tiles. */
#define NORM_ROWS 256

void text_list_add(TextList *list, const char *text) {
    list->items = must_realloc(list->items, (size_t)(list->count + 1) * sizeof *list->items);
    list->items[list->count++] = must_strdup(text);
}

void text_list_free(TextList *list) {
    for (int i = 0; i < list->count; i++) free(list->items[i]);
    free(list->items);
    *list = (TextList){0};
}

void adapter_spec_free(AdapterSpec *spec) {
    text_list_free(&spec->targets);
    text_list_free(&spec->parameters);
    text_list_free(&spec->train_also);
    for (int i = 0; i < spec->rank_patterns; i++) free(spec->rank_pattern[i].pattern);
    for (int i = 0; i < spec->alpha_patterns; i++) free(spec->alpha_pattern[i].pattern);
    free(spec->rank_pattern);
    free(spec->alpha_pattern);
    free(spec->target_pattern);
    free(spec->base_model);
    *spec = (AdapterSpec){0};
}

/* name equals end, or ends in .end */
static bool ends_in(const char *name, const char *end) {
    size_t n = strlen(name), e = strlen(end);
    return n >= e && !strcmp(name + n - e, end) && (n == e || name[n - e - 1] == '.');
}

void adapter_module_name(char *out, size_t size, const ModelConfig *c, const char *name) {
    static const char *const moved[][2] = {
        {"vision_embedder.", "embed_vision."},
        {"embed_vision.embedding_projection",
         "embed_vision.multimodal_embedder.embedding_projection"}};
    int n = snprintf(out, size, "%s", name);
    for (int i = 0; i < 2 && c->vision.path == MEDIA_UNIFIED; i++) {
        const char *at = strstr(name, moved[i][0]);
        if (!at || (at != name && at[-1] != '.')) continue;
        n = snprintf(out, size, "%.*s%s%s", (int)(at - name), name, moved[i][1],
                     at + strlen(moved[i][0]));
        break;
    }
    CHECK(n < (int)size, "name too long: %s", name);
}

/* The same of the module's name in the checkpoint or in peft. */
static bool is_named(const Gemma *g, const char *name, const char *end) {
    char other[PARAM_NAME_MAX];
    adapter_module_name(other, sizeof other, &g->config, name);
    return ends_in(name, end) || ends_in(other, end);
}

/* The value of the first pattern that matches name as peft matches it: whole, or after a dot. */
static Status pattern_value(double *value, const PatternValue *patterns, int count, bool *used,
                            const char *name) {
    for (int i = 0; i < count; i++) {
        char *whole = must_format("(.*\\.)?(%s)", patterns[i].pattern);
        bool matches;
        Status status = pattern_matches(&matches, whole, name);
        free(whole);
        TRY(status);
        if (!matches) continue;
        *value = patterns[i].value;
        used[i] = true;
        return OK;
    }
    return OK;
}

static Status is_target(bool *target, const Gemma *g, const AdapterSpec *spec, const Linear *l,
                        bool *used) {
    *target = false;
    const TextList *names = l->groups > 1 ? &spec->parameters : &spec->targets;
    if (l->groups == 1 && spec->target_pattern) {
        char name[PARAM_NAME_MAX];
        adapter_module_name(name, sizeof name, &g->config, l->name);
        return pattern_matches(target, spec->target_pattern, name);
    }
    for (int i = 0; i < names->count; i++)
        if (is_named(g, l->name, names->items[i])) *target = used[i] = true;
    return OK;
}

static void attach(Gemma *g, Linear *l, const AdapterSpec *spec, int64_t rank, double alpha) {
    Lora *lora = must_calloc(1, sizeof *lora);
    lora->rank = rank;
    lora->scale = (float)(alpha / (spec->rslora ? sqrt((double)rank) : (double)rank));
    lora->dropout = (float)spec->dropout;
    lora->key = random_key_name(0, l->name);
    bool grouped = l->groups > 1;
    int64_t a[] = {l->groups, rank, l->in}, b[] = {l->groups, l->out, rank}, m[] = {l->out};
    lora->A =
        params_add_adapter(&g->params, l->name, "lora_A", grouped ? 3 : 2, grouped ? a : a + 1);
    lora->B =
        params_add_adapter(&g->params, l->name, "lora_B", grouped ? 3 : 2, grouped ? b : b + 1);
    if (spec->dora) {
        lora->magnitude = params_add_adapter(&g->params, l->name, "lora_magnitude_vector", 1, m);
        lora->factor = tensor_make(NULL, F32, 1, m);
        params_add_derived(&g->params, &lora->factor);
    }
    l->lora = lora;
}

Status adapter_train_also(Gemma *g, const TextList *names) {
    for (int i = 0; i < names->count; i++) {
        bool found = false;
        for (int j = 0; j < g->params.count; j++) { /* a module of that name, or a parameter */
            Param *p = g->params.items[j];
            char module[PARAM_NAME_MAX];
            snprintf(module, sizeof module, "%s", p->name);
            bool match = is_named(g, module, names->items[i]);
            for (char *dot; !match && (dot = strrchr(module, '.'));) {
                *dot = 0;
                match = is_named(g, module, names->items[i]);
            }
            if (!match || p->adapter || p->buffer) continue;
            const Linear *l = gemma_owner(g, p);
            if (l && l->lora)
                FAIL(ERR_CONFIG, "lora.train_also: '%s' also carries an adapter", p->name);
            p->trainable = found = true;
        }
        if (!found)
            FAIL(ERR_CONFIG, "lora.train_also: '%s' names nothing in this model", names->items[i]);
    }
    return OK;
}

static Status check_used(const bool *used, int count, const char *what, char **names,
                         size_t stride) {
    for (int i = 0; i < count; i++)
        if (!used[i])
            FAIL(ERR_CONFIG, "%s '%s' matches nothing in this model", what,
                 *(char **)((char *)names + (size_t)i * stride));
    return OK;
}

Status adapter_attach(Gemma *g, const AdapterSpec *spec) {
    Status status = OK;
    int attached = 0;
    size_t flags = (size_t)(spec->targets.count + spec->parameters.count + spec->rank_patterns +
                            spec->alpha_patterns);
    bool *used = must_calloc(flags + 1, sizeof *used), *parameters = used + spec->targets.count;
    bool *ranks = parameters + spec->parameters.count, *alphas = ranks + spec->rank_patterns;
    for (Linear *l = g->linears.first; l; l = l->next) {
        bool target;
        double rank = (double)spec->rank, alpha = spec->alpha;
        TRY_DONE(is_target(&target, g, spec, l, l->groups > 1 ? parameters : used));
        if (!target) continue;
        TRY_DONE(pattern_value(&rank, spec->rank_pattern, spec->rank_patterns, ranks, l->name));
        TRY_DONE(pattern_value(&alpha, spec->alpha_pattern, spec->alpha_patterns, alphas, l->name));
        if (l->groups > 1 && (spec->dora || spec->dropout > 0))
            FAIL_DONE(ERR_CONFIG, "lora: '%s' is fused; experts take neither dora nor dropout",
                      l->name);
        attach(g, l, spec, (int64_t)rank, alpha);
        attached++;
    }
    if (spec->target_pattern && !attached)
        FAIL_DONE(ERR_CONFIG, "target_modules '%s' matches no module of this model",
                  spec->target_pattern);
    TRY_DONE(
        check_used(used, spec->targets.count, "lora target", spec->targets.items, sizeof(char *)));
    TRY_DONE(check_used(parameters, spec->parameters.count, "lora target parameter",
                        spec->parameters.items, sizeof(char *)));
    TRY_DONE(check_used(ranks, spec->rank_patterns, "rank_pattern", (char **)spec->rank_pattern,
                        sizeof(PatternValue)));
    TRY_DONE(check_used(alphas, spec->alpha_patterns, "alpha_pattern", (char **)spec->alpha_pattern,
                        sizeof(PatternValue)));
    TRY_DONE(adapter_train_also(g, &spec->train_also));
done:
    free(used);
    return status;
}

/* DoRA's magnitudes start as the norms of the weight's rows, a few rows at a time. */
static void init_magnitude(const Linear *l, Arena *rows) {
    for (int64_t o = 0; o < l->out; o += NORM_ROWS) {
        int64_t n = l->out - o < NORM_ROWS ? l->out - o : NORM_ROWS;
        size_t mark = arena_mark(rows);
        Tensor part = ARENA_TENSOR(rows, F32, n, l->in);
        scale_copy(part, SET, tensor_slice(l->weight->value, o, n), 1.0f);
        row_norms(tensor_slice(l->lora->magnitude->value, o, n), part);
        arena_release(rows, mark);
    }
}

Status adapter_init(Gemma *g, uint64_t seed) {
    for (Linear *l = g->linears.first; l; l = l->next) {
        if (!l->lora) continue;
        Tensor A = l->lora->A->value, host;
        uint64_t key = random_key_name(seed, l->lora->A->name);
        float bound = 1.0f / sqrtf((float)l->in);
        int64_t before = l->lora->A->group * l->lora->rank * l->in; /* what other ranks have */
        TRY(tensor_stage(&host, A));
        for (int64_t i = 0; i < tensor_count(A); i++)
            ((float *)host.data)[i] =
                (2.0f * random_uniform(key, (uint64_t)(before + i)) - 1.0f) * bound;
        tensor_unstage(A, host, false);
        fill(l->lora->B->value, 0.0f);
        if (!l->lora->magnitude) continue;
        space_need(&g->params.space, l->weight->layer, -1);
        Arena rows;
        TRY(arena_init(&rows, g->device, (size_t)(NORM_ROWS * l->in) * sizeof(float),
                       "a few rows"));
        init_magnitude(l, &rows);
        arena_free(&rows);
    }
    return OK;
}
