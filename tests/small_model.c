/* small_model.c - making, loading and running them. */
#include "tests/small_model.h"
#include "formats/initial.h"
#include "kernels/elementwise.h"
#include "kernels/random.h"

#include <stdlib.h>

const char *const small_kinds[] = {"shared", "dense", "experts"};

Device *small_device;
QuantScheme small_scheme = SCHEME_Q4_0;
bool small_learned;

static char *config_of(const char *kind) {
    bool shared = *kind == 's', experts = *kind == 'e';
    return must_format(
        "{\"model_type\": \"gemma4_text\", \"architectures\": [\"Gemma4ForCausalLM\"],"
        "\"vocab_size\": 2048, \"vocab_size_per_layer_input\": 2048, \"hidden_size\": 128, "
        "\"num_hidden_layers\": %d,"
        "\"layer_types\": [\"sliding_attention\", \"full_attention\"%s], \"num_attention_heads\": "
        "4,"
        "\"num_key_value_heads\": 2, \"num_global_key_value_heads\": %s, \"head_dim\": 32, "
        "\"global_head_dim\": 64,"
        "\"intermediate_size\": 192, \"use_double_wide_mlp\": %s, \"sliding_window\": 16, "
        "\"num_kv_shared_layers\": %d,"
        "\"attention_k_eq_v\": %s, \"hidden_size_per_layer_input\": %d, \"enable_moe_block\": %s, "
        "\"num_experts\": %s,"
        "\"top_k_experts\": %s, \"moe_intermediate_size\": %s, \"max_position_embeddings\": 512,"
        "\"hidden_activation\": \"gelu_pytorch_tanh\", \"final_logit_softcapping\": 30.0, "
        "\"rms_norm_eps\": 1e-6,"
        "\"pad_token_id\": 0, \"bos_token_id\": 2, \"tie_word_embeddings\": true, "
        "\"rope_parameters\": {"
        "\"full_attention\": {\"partial_rotary_factor\": 0.25, \"rope_theta\": 1000000.0, "
        "\"rope_type\": \"proportional\"},"
        "\"sliding_attention\": {\"rope_theta\": 10000.0, \"rope_type\": \"default\"}}}",
        shared ? 4 : 2, shared ? ", \"sliding_attention\", \"full_attention\"" : "",
        shared ? "null" : "1", shared ? "true" : "false", shared ? 2 : 0, shared ? "false" : "true",
        shared ? 64 : 0, experts ? "true" : "false", experts ? "8" : "null", experts ? "2" : "null",
        experts ? "64" : "null");
}

char *small_make(const char *kind) {
    char *dir = must_format("%s/%s", test_folder(), kind), *json = config_of(kind);
    EXPECT_OK(initial_checkpoint(json, "demo/tokenizer", 5, F32, dir));
    free(json);
    return dir;
}

/* Normal values times a factor, and a constant more. */
static void draw(Tensor t, uint64_t key, float factor, float constant) {
    Tensor host;
    EXPECT_OK(tensor_stage(&host, t));
    random_normal(host.data, key, 0, tensor_count(t));
    for (int64_t i = 0; i < tensor_count(t); i++)
        ((float *)host.data)[i] = constant + factor * ((float *)host.data)[i];
    tensor_unstage(t, host, false);
}

void small_load(Loaded *m, const char *path, DType dtype, StackMode mode, Setup *setup) {
    *m = (Loaded){0};
    EXPECT_OK(checkpoint_open(&m->checkpoint, path));
    Device *device = small_device ? small_device : device_cpu();
    gemma_declare(&m->g, &m->checkpoint.config, dtype, device);
    if (setup) setup(m);
    checkpoint_formats(&m->checkpoint, &m->g);
    EXPECT_OK(params_place(&m->g.params, device, mode != STACK_SCORE));
    EXPECT_OK(checkpoint_load(&m->checkpoint, &m->g));
    for (Linear *l = m->g.linears.first; l; l = l->next) /* an adapter that does something */
        if (l->lora) {
            draw(l->lora->A->value, random_key_name(1, l->name), 0.1f, 0);
            draw(l->lora->B->value, random_key_name(2, l->name), 0.02f, 0);
        }
    for (Linear *l = m->g.linears.first; l; l = l->next)
        if (l->factors) draw(l->factors->value, random_key_name(3, l->name), 0.1f, 1.0f);
    m->options = (StepOptions){.mode = mode, .shortcut = true};
    EXPECT_OK(step_init(&m->memory, &m->g, SMALL_MOST, &m->options));
}

void small_unload(Loaded *m) {
    step_free(&m->memory);
    adapter_spec_free(&m->spec);
    gemma_free(&m->g);
    checkpoint_close(&m->checkpoint);
}

void small_run(Loaded *m) {
    int32_t ids[SMALL_ROWS], positions[SMALL_ROWS], starts[SMALL_ROWS] = {0}, targets[SMALL_ROWS];
    float weights[SMALL_ROWS];
    int64_t vocab = m->g.config.vocab_size < 2003 ? m->g.config.vocab_size : 2003;
    for (int i = 0; i < SMALL_ROWS; i++) {
        ids[i] = (int32_t)(3 + random_u64(4, (uint64_t)i) % (uint64_t)(vocab - 3));
        positions[i] = i;
        weights[i] = 1.0f / (SMALL_ROWS - 1);
    }
    for (int i = 0; i < SMALL_ROWS; i++) targets[i] = i + 1 < SMALL_ROWS ? ids[i + 1] : -1;
    Batch batch = {.N = SMALL_ROWS,
                   .ids = ids,
                   .positions = positions,
                   .starts = starts,
                   .targets = targets,
                   .weights = weights};
    ExpertLoad load = {0};
    m->options.load = m->g.config.num_experts ? &load : NULL;
    step_run(&m->g, &m->memory, &batch, &m->options, m->nll);
}

void small_round(Loaded *m) {
    m->g.fake = (FakeQuant){small_scheme, 1, false, small_scheme == SCHEME_Q4_0};
    for (Linear *l = m->g.linears.first; l; l = l->next)
        if (!strstr(l->name, ".router.")) {
            l->fake = &m->g.fake;
            if (small_learned) linear_learn_scales(l, &m->g.params);
        }
    m->g.per_layer_input.fake = &m->g.fake;
}

void small_adapt(Loaded *m) {
    static const char *const targets[] = {"q_proj", "k_proj", "o_proj", "up_proj", "down_proj"};
    m->spec = (AdapterSpec){.rank = 4, .alpha = 8};
    for (int i = 0; i < 5; i++) text_list_add(&m->spec.targets, targets[i]);
    if (m->g.config.num_experts) text_list_add(&m->spec.parameters, "experts.gate_up_proj");
    EXPECT_OK(adapter_attach(&m->g, &m->spec));
}

void small_round_adapted(Loaded *m) {
    small_adapt(m);
    small_round(m);
}

void small_full(Loaded *m) {
    for (int i = 0; i < m->g.params.count; i++)
        m->g.params.items[i]->trainable = !m->g.params.items[i]->buffer;
}

void small_round_full(Loaded *m) {
    small_full(m);
    small_round(m);
}

void small_adapt_packed(Loaded *m) {
    small_adapt(m);
    for (Linear *l = m->g.linears.first; l; l = l->next) {
        Tensor *t = &l->weight->value;
        if (param_takes_blocks(l->weight) &&
            dtype_fits(NF4_NESTED, tensor_rows(*t), tensor_cols(*t)))
            t->dtype = NF4_NESTED;
    }
}

float *small_values(Tensor t) {
    float *values = must_malloc(tensor_bytes(t));
    tensor_read(values, t);
    return values;
}
