/* cost.c - sums over linears and layers. */
#include "model/cost.h"

/* Keys that a row sees on average. */
static double keys_seen(const ModelConfig *c, const BlockConfig *b, double tokens) {
    double keys = tokens / 2, window = (double)c->sliding_window;
    return b->kind == SLIDING && keys > window ? window : keys;
}

/* How many of a linear's groups a row goes through. */
static double used_groups(const Gemma *g, const Linear *l) {
    return l->groups > 1 ? (double)g->config.top_k_experts : 1.0;
}

static double attention_flops(const Gemma *g, const BlockConfig *b, double tokens) {
    return 4.0 * keys_seen(&g->config, b, tokens) * (double)(b->num_attention_heads * b->head_dim);
}

double gemma_forward_flops(const Gemma *g, double tokens) {
    const ModelConfig *c = &g->config;
    double flops = 2.0 * (double)(c->vocab_size * c->hidden_size);
    for (const Linear *l = g->linears.first; l; l = l->next)
        flops += 2.0 * used_groups(g, l) * (double)(l->in * l->out);
    for (int l = 0; l < c->num_hidden_layers; l++)
        flops += attention_flops(g, &g->blocks[l].config, tokens);
    return flops;
}

/* Elements that a row's norms, gates, sums and rotations read and write, forward. */
static double moved(const BlockConfig *b) {
    double D = (double)b->hidden_size, F = (double)b->intermediate_size,
           heads = (double)(b->num_attention_heads * b->head_dim), n = 14 * D + 5 * F + 6 * heads;
    if (b->num_experts)
        n += (double)b->top_k_experts * (4 * D + 5 * (double)b->moe_intermediate_size) + 6 * D;
    return n + 6 * (double)b->per_layer_input;
}

/* An adapter's narrow products read and write their linear's input and output so many times. */
#define ADAPTER_PASSES 10.0

RowCost gemma_row_cost(const Gemma *g, double tokens, double kept, bool again) {
    const ModelConfig *c = &g->config;
    double size = (double)dtype_size(g->dtype), forward = again ? 2 : 1;
    int shared = model_config_kv_layers(c);
    RowCost cost = {0};
    for (const Linear *l = g->linears.first; l; l = l->next) {
        if (l->weight->tower) continue;
        double rows = (l->weight->layer >= shared ? kept : 1) * used_groups(g, l),
               flops = 2.0 * rows * (double)(l->in * l->out),
               times = forward + 1 + (l->weight->trainable ? 1 : 0);
        *(l->groups > 1 ? &cost.grouped : &cost.products) += times * flops;
        if (l->lora) cost.bytes += ADAPTER_PASSES * rows * (double)(l->in + l->out) * size;
    }
    for (int l = 0; l < c->num_hidden_layers; l++) {
        const BlockConfig *b = &g->blocks[l].config;
        double rows = l >= shared ? kept : 1;
        cost.attention += rows * (forward + 2.5) * attention_flops(g, b, tokens);
        cost.bytes += rows * (forward + 2.5) * moved(b) * size;
    }
    double head = 2.0 * kept * (double)(c->vocab_size * c->hidden_size);
    cost.products += head * (g->embed_tokens->trainable ? 3 : 2);
    cost.bytes += kept * (double)c->vocab_size * (3 * 4 + 3 * size);
    return cost;
}
