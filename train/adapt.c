/* adapt.c - every method as settings of the model. */
#include "train/adapt.h"
#include "formats/learned_scales.h"
#include "kernels/elementwise.h"
#include "model/moe.h"

#include <string.h>

static void adapt_full(Gemma *g, const RunConfig *config) {
    for (int i = 0; i < g->params.count; i++) {
        Param *p = g->params.items[i];
        p->trainable =
            !p->buffer && !p->tower && (config->train_router || !strstr(p->name, ".router."));
    }
}

static Status conflicts(const RunConfig *config, const char *key) {
    FAIL(ERR_CONFIG, "lora.%s: differs from the adapter in lora.init (%s), which decides it", key,
         config->lora.init);
}

/* lora.init decides; a different value written in the run file is an error. */
static Status check_init(const RunConfig *config, const AdapterSpec *spec) {
    Node *lora = node_find(config->tree, "lora");
    if (node_find(lora, "rank") && config->lora.rank != spec->rank)
        return conflicts(config, "rank");
    if (node_find(lora, "alpha") && config->lora.alpha != spec->alpha)
        return conflicts(config, "alpha");
    if (node_find(lora, "rslora") && config->lora.rslora != spec->rslora)
        return conflicts(config, "rslora");
    if (node_find(lora, "dora") && config->lora.dora != spec->dora)
        return conflicts(config, "dora");
    if (node_find(lora, "experts") && config->lora.experts != (spec->parameters.count > 0))
        return conflicts(config, "experts");
    if (config->lora.rank_pattern.count) return conflicts(config, "rank_pattern");
    if (config->lora.alpha_pattern.count) return conflicts(config, "alpha_pattern");
    bool same = !spec->target_pattern && spec->targets.count == config->lora.targets.count;
    for (int i = 0; same && i < spec->targets.count; i++) {
        bool found = false;
        for (int k = 0; k < config->lora.targets.count; k++)
            found |= !strcmp(spec->targets.items[i], config->lora.targets.items[k]);
        same = found;
    }
    return node_find(lora, "targets") && !same ? conflicts(config, "targets") : OK;
}

static PatternValue *patterns_of(const NumberMap *map) {
    PatternValue *patterns = must_calloc((size_t)map->count + 1, sizeof *patterns);
    for (int i = 0; i < map->count; i++)
        patterns[i] = (PatternValue){must_strdup(map->keys[i]), map->values[i]};
    return patterns;
}

static void spec_of_run(AdapterSpec *spec, const RunConfig *config) {
    spec->rank = config->lora.rank;
    spec->alpha = config->lora.alpha;
    spec->dropout = config->lora.dropout;
    spec->rslora = config->lora.rslora;
    spec->dora = config->lora.dora;
    for (int i = 0; i < config->lora.targets.count; i++)
        text_list_add(&spec->targets, config->lora.targets.items[i]);
    if (config->lora.experts) {
        text_list_add(&spec->parameters, "experts.gate_up_proj");
        text_list_add(&spec->parameters, "experts.down_proj");
    }
    for (int i = 0; i < config->lora.train_also.count; i++)
        text_list_add(&spec->train_also, config->lora.train_also.items[i]);
    spec->rank_pattern = patterns_of(&config->lora.rank_pattern);
    spec->rank_patterns = config->lora.rank_pattern.count;
    spec->alpha_pattern = patterns_of(&config->lora.alpha_pattern);
    spec->alpha_patterns = config->lora.alpha_pattern.count;
}

/* A frozen base in few bits. */
static void adapt_base(Gemma *g, const RunConfig *config) {
    static const DType dtypes[] = {[QUANT_NF4] = NF4, [QUANT_Q4_0] = Q4_0, [QUANT_Q8_0] = Q8_0};
    DType dtype = dtypes[config->quant.format];
    if (dtype == NF4 && config->quant.nested) dtype = NF4_NESTED;
    for (Linear *l = g->linears.first; l; l = l->next) {
        DType tiled = dtype_tiled(dtype);
        if (l->weight->trainable || !param_takes_blocks(l->weight)) continue;
        if (dtype_fits(tiled, l->groups * l->out, l->in))
            l->weight->value.dtype = tiled;
        else if (dtype_fits(dtype, l->groups * l->out, l->in))
            l->weight->value.dtype = dtype;
    }
}

/* Training through rounding: the same matrices that an export rounds. */
static void adapt_rounding(Gemma *g, const RunConfig *config) {
    static const QuantScheme schemes[] = {[QUANT_Q4_0] = SCHEME_Q4_0,
                                          [QUANT_Q8_0] = SCHEME_Q8_0,
                                          [QUANT_INT8] = SCHEME_INT8,
                                          [QUANT_INT4] = SCHEME_INT4};
    g->fake = (FakeQuant){.scheme = schemes[config->quant.format],
                          .activations = config->quant.activations,
                          .embeddings = config->quant.embeddings};
    for (Linear *l = g->linears.first; l; l = l->next)
        if (param_takes_blocks(l->weight) && fake_quant_fits(&g->fake, l->in)) l->fake = &g->fake;
    g->per_layer_input.fake = &g->fake;
}

/* Factors for the scales of what is trained, if they shall be learned: of weights, or of their sums
 * with adapters. */
static void adapt_scales(Gemma *g, const RunConfig *config) {
    if (!method_rounds(config->method) || !config->quant.learned_scale) return;
    for (Linear *l = g->linears.first; l; l = l->next)
        if (l->fake && (l->weight->trainable || l->lora)) linear_learn_scales(l, &g->params);
}

float adapt_blend(const RunConfig *config, int64_t step) {
    int64_t since = step - config->quant.start_step;
    if (!method_rounds(config->method) || since < 0) return 0;
    return since + 1 >= config->quant.warmup ? 1.0f
                                             : (float)(since + 1) / (float)config->quant.warmup;
}

Status adapt(Gemma *g, const RunConfig *config, AdapterSpec *spec) {
    *spec = (AdapterSpec){0};
    if (method_rounds(config->method)) adapt_rounding(g, config);
    Status status = OK;
    if (!method_has_adapter(config->method)) {
        adapt_full(g, config);
        for (int i = 0; i < config->lora.train_also.count; i++)
            text_list_add(&spec->train_also, config->lora.train_also.items[i]);
        TRY_DONE(adapter_train_also(g, &spec->train_also));
        adapt_scales(g, config);
        return OK;
    }
    if (config->lora.init) {
        TRY_DONE(peft_load_spec(spec, config->lora.init));
        TRY_DONE(check_init(config, spec));
    } else {
        spec_of_run(spec, config);
        if (config->train_router && g->config.num_experts)
            text_list_add(&spec->train_also, "router");
    }
    if (!spec->base_model) spec->base_model = must_strdup(config->model);
    TRY_DONE(adapter_attach(g, spec));
    for (Linear *l = g->linears.first; l; l = l->next) /* dropout masks differ from seed to seed */
        if (l->lora) l->lora->key ^= (uint64_t)config->seed * 0x9e3779b97f4a7c15u;
    if (config->method == METHOD_QLORA) adapt_base(g, config);
    adapt_scales(g, config);
done:
    if (status != OK) adapter_spec_free(spec);
    return status;
}

Status adapt_init(Gemma *g, const RunConfig *config) {
    bool adapter = method_has_adapter(config->method);
    if (adapter) TRY(adapter_init(g, (uint64_t)config->seed));
    for (Linear *l = g->linears.first; l; l = l->next)
        if (l->factors) fill(l->factors->value, 1.0f);
    if (adapter && config->lora.init) {
        TRY(peft_load(g, config->lora.init));
        return learned_scales_load(g, config->lora.init);
    }
    return adapter ? OK : learned_scales_load(g, config->model);
}
