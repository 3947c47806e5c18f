/* gemma.c - declaring the model. */
#include "model/gemma.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* These lie beside the model, not in it. */
static void declare_assistant(Gemma *g) {
    const ModelConfig *c = &g->config;
    char path[PARAM_NAME_MAX];
    memcpy(path, g->params.path, sizeof path);
    g->params.path[0] = 0;
    linear_declare(&g->pre_projection, &g->params, &g->linears, "pre_projection", c->hidden_size,
                   2 * c->backbone_hidden_size);
    linear_declare(&g->post_projection, &g->params, &g->linears, "post_projection",
                   c->backbone_hidden_size, c->hidden_size);
    if (c->num_centroids)
        linear_declare(&g->centroids, &g->params, &g->linears, "masked_embedding.centroids",
                       c->num_centroids, c->hidden_size);
    memcpy(g->params.path, path, sizeof path);
}

void gemma_declare(Gemma *g, const ModelConfig *config, DType dtype, Device *device) {
    *g = (Gemma){.config = *config, .dtype = dtype, .device = device};
    const ModelConfig *c = &g->config;
    params_init(&g->params, dtype, model_config_prefix(c));
    params_enter(&g->params, "embed_tokens");
    g->embed_tokens = PARAMS_ADD(&g->params, "weight", c->vocab_size, c->hidden_size);
    params_leave(&g->params);
    if (c->hidden_size_per_layer_input)
        per_layer_input_declare(&g->per_layer_input, &g->params, &g->linears, c);
    g->blocks = must_calloc((size_t)c->num_hidden_layers, sizeof *g->blocks);
    for (int l = 0; l < c->num_hidden_layers; l++) {
        BlockConfig block = block_config(c, l);
        block_declare(&g->blocks[l], &g->params, &g->linears, &block);
    }
    norm_declare(&g->norm, &g->params, "norm", c->hidden_size, (float)c->rms_norm_eps);
    if (c->assistant) declare_assistant(g);
}

void gemma_declare_media(Gemma *g) {
    media_declare(&g->media, &g->params, &g->linears, &g->config);
}

Status gemma_share_experts(Gemma *g, const Comm *ranks) {
    int64_t E = g->config.num_experts, n = E / ranks->size;
    if (E % ranks->size || n < 2)
        FAIL(ERR_CONFIG,
             "parallel.experts is %d, expected a divisor of the model's %lld experts that leaves "
             "two "
             "or more to each rank",
             ranks->size, (long long)E);
    g->experts = ranks;
    for (Linear *l = g->linears.first; l; l = l->next)
        if (l->groups > 1) linear_take_groups(l, ranks->rank * n, n);
    for (int l = 0; l < g->config.num_hidden_layers; l++)
        g->blocks[l].config.expert_ranks = ranks->size;
    return OK;
}

void gemma_free(Gemma *g) {
    for (Linear *l = g->linears.first; l; l = l->next) {
        for (Lora *lora = l->lora, *next; lora; lora = next) {
            next = lora->next;
            free(lora);
        }
    }
    for (int i = 0; i < g->params.count; i++) {
        const Param *p = g->params.items[i];
        if (p->mapped && p->value.data) device_unpin(g->device, p->value.data);
    }
    params_free(&g->params);
    media_free(&g->media);
    free(g->blocks);
    *g = (Gemma){0};
}

void gemma_loaded(Gemma *g) {
    for (Linear *l = g->linears.first; l; l = l->next) linear_loaded(l);
    for (int l = 0; l < g->config.num_hidden_layers; l++) {
        g->blocks[l].scalar = tensor_first(g->blocks[l].layer_scalar->value);
    }
}

float gemma_embedding_scale(const Gemma *g) {
    float scale = (float)sqrt((double)g->config.hidden_size);
    return g->dtype == BF16 ? bf16_to_f32(f32_to_bf16(scale)) : scale;
}

Linear *gemma_find_linear(const Gemma *g, const char *name) {
    for (Linear *l = g->linears.first; l; l = l->next)
        if (!strcmp(l->name, name)) return l;
    return NULL;
}

Linear *gemma_owner(const Gemma *g, const Param *weight) {
    for (Linear *l = g->linears.first; l; l = l->next)
        if (l->weight == weight) return l;
    return NULL;
}

void gemma_refresh(Gemma *g, Arena *scratch) {
    for (Linear *l = g->linears.first; l; l = l->next) {
        bool reads = l->lora && l->lora->magnitude && scratch->base;
        if (reads) space_need(&g->params.space, l->weight->layer, -1);
        linear_refresh(l, scratch);
    }
}

bool gemma_trains_embedding(const Gemma *g) {
    return g->embed_tokens->trainable || (g->media.params && media_trains(&g->media)) ||
           (g->per_layer_input.L && per_layer_input_trains(&g->per_layer_input));
}

bool gemma_rounds_embedding(const Gemma *g) {
    return fake_quant_on(&g->fake) && g->fake.embeddings &&
           fake_quant_fits(&g->fake, g->config.hidden_size);
}

/* `factors`: learned, of the scales of `p`; NULL: none. */
static void finish_param(const Gemma *g, Param *p, const Param *factors) {
    if (p->trainable && fake_quant_fits(&g->fake, tensor_cols(p->value)))
        fake_quantize_backward(p->grad, factors ? factors->grad : tensor_absent(), p->value,
                               factors ? factors->value : tensor_absent(), g->fake.scheme,
                               g->fake.blend);
}

void gemma_finish_layer(Gemma *g, int layer) {
    if (!fake_quant_on(&g->fake)) return;
    for (Linear *l = g->linears.first; l; l = l->next)
        if (l->fake && l->weight->layer == layer) finish_param(g, l->weight, l->factors);
    if (layer >= 0 || !g->fake.embeddings) return;
    finish_param(g, g->embed_tokens, NULL);
    if (g->per_layer_input.L) finish_param(g, g->per_layer_input.embed_tokens_per_layer, NULL);
}

void gemma_finish_gradients(Gemma *g) {
    for (int l = -1; l < g->config.num_hidden_layers; l++) gemma_finish_layer(g, l);
}
