/* test_configs.c - config.json of every kind, and run files that are refused with file and line. */
#include "configs/model_config.h"
#include "configs/run_config.h"
#include "formats/file.h"
#include "tests/test.h"

static Status try_run(const char *text) {
    RunConfig c;
    Status status = run_config_parse(&c, text, "run.yaml", NULL, 0);
    if (status == OK) run_config_free(&c);
    return status;
}

#define MINIMAL "model: m\noutput: o\ndata: {train: d.jsonl}\n"

CASE(run_config, wrong_files_name_file_line_and_key) {
    EXPECT_OK(try_run(MINIMAL));
    EXPECT_ERROR(try_run(MINIMAL "lora: {rnak: 3}\n"), "run.yaml:4: unknown key 'lora.rnak'");
    EXPECT_ERROR(try_run(MINIMAL "stepz: 3\n"), "run.yaml:4: unknown key 'stepz'");
    EXPECT_ERROR(try_run(MINIMAL "steps: many\n"),
                 "run.yaml:4: steps is many, expected a whole number");
    EXPECT_ERROR(try_run(MINIMAL "steps: \"3\"\n"), "expected a whole number");
    EXPECT_ERROR(try_run(MINIMAL "lora: {rank: 0}\n"), "rank is 0, expected at least 1");
    EXPECT_ERROR(try_run(MINIMAL "lora: {dropout: 1.5}\n"), "dropout is 1.5");
    EXPECT_ERROR(try_run(MINIMAL "schedule: {name: sometimes}\n"),
                 "expected one of constant, linear, cosine, wsd");
    EXPECT_ERROR(try_run(MINIMAL "method: sideways\n"),
                 "expected one of full, lora, qlora, qat, qat-lora");
    EXPECT_ERROR(try_run(MINIMAL "method: qat\nquant: {format: nf4}\n"), "no exported file has");
    EXPECT_ERROR(try_run(MINIMAL "method: qlora\nquant: {format: int4}\n"),
                 "one of nf4, q4_0, q8_0");
    EXPECT_ERROR(try_run(MINIMAL "method: qat-lora\nlora: {dropout: 0.1}\n"),
                 "does not go with qat-lora");
    EXPECT_ERROR(try_run(MINIMAL "method: qat\nquant: {activations: int4}\n"),
                 "neither int8 nor null");
    EXPECT_ERROR(try_run(MINIMAL "optimizer: {states: 4bit}\n"), "states");
    EXPECT_ERROR(try_run(MINIMAL "method: qat\nquant: {format: int4, embeddings: true}\n"),
                 "leave the tables in bf16");
    EXPECT_ERROR(try_run(MINIMAL "optimizer: {betas: [0.9]}\n"),
                 "betas is not a list of two numbers");
    EXPECT_ERROR(try_run(MINIMAL "seed: 1\nseed: 2\n"), "run.yaml:5: key 'seed' is given twice");
    EXPECT_ERROR(try_run("model: m\noutput: o\n"), "'data' is missing");
    EXPECT_ERROR(try_run("output: o\ndata: {train: d}\n"), "'model' is missing");
    EXPECT_ERROR(try_run("model: [\n"), "run.yaml:");
    EXPECT_ERROR(try_run(MINIMAL "data2: &a 1\nx: *a\n"), "alias");
    EXPECT_ERROR(try_run(""), "is empty");
    EXPECT_ERROR(try_run("- 1\n"), "not a map");
}

CASE(run_config, overrides_replace_keys_and_unknown_ones_are_the_command_lines_fault) {
    RunConfig c;
    char *good[] = {"lora.rank=64", "optimizer.lr=1e-3", "data.train=[a.jsonl, b.jsonl]",
                    "data.eval=0.1", "clip=null"};
    EXPECT_OK(run_config_parse(&c, MINIMAL, "run.yaml", good, 5));
    EXPECT(c.lora.rank == 64 && c.optimizer.lr == 1e-3 && c.data.train.count == 2 &&
           c.data.eval_share == 0.1 && c.clip == 0);
    run_config_free(&c);
    char *bad[] = {"lora.rnak=64"};
    EXPECT(run_config_parse(&c, MINIMAL, "run.yaml", bad, 1) == ERR_USAGE);
    EXPECT(strstr(status_message(), "lora.rnak"));
}

CASE(run_config, the_resolved_file_reads_back_as_the_same_run) {
    RunConfig c, again;
    EXPECT_OK(run_config_parse(&c, MINIMAL "lora: {rank: 3, rank_pattern: {\".*q_proj\": 5}}\n",
                               "r", NULL, 0));
    char *text = run_config_text(&c);
    EXPECT_OK(run_config_parse(&again, text, "resolved", NULL, 0));
    char *second = run_config_text(&again);
    EXPECT(!strcmp(text, second), "%s\n%s", text, second);
    EXPECT(again.lora.rank == 3 && again.lora.rank_pattern.count == 1 &&
           again.lora.rank_pattern.values[0] == 5);
    free(text), free(second);
    run_config_free(&c);
    run_config_free(&again);
}

CASE(model_config, presets_resolve_every_layer) {
    static const struct {
        const char *name;
        int layers, shared, kv_s, kv_g, last_mlp, first_mlp;
    } rows[] = {{"e2b", 35, 20, 13, 14, 12288, 6144},
                {"e4b", 42, 18, 22, 23, 10240, 10240},
                {"12b", 48, 0, 0, 0, 15360, 15360},
                {"26b-a4b", 30, 0, 0, 0, 2112, 2112},
                {"31b", 60, 0, 0, 0, 21504, 21504}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        ModelConfig c;
        char *json = preset_config(rows[i].name, 0);
        EXPECT_OK(model_config_parse(&c, json, strlen(json), rows[i].name));
        free(json);
        EXPECT(c.num_hidden_layers == rows[i].layers && c.num_kv_shared_layers == rows[i].shared,
               "%s", rows[i].name);
        BlockConfig last = block_config(&c, rows[i].layers - 1), first = block_config(&c, 0);
        BlockConfig before = block_config(&c, rows[i].layers - 2);
        EXPECT(last.kind == FULL && last.head_dim == 512 && before.kind == SLIDING &&
               before.head_dim == 256);
        EXPECT(last.intermediate_size == rows[i].last_mlp &&
               first.intermediate_size == rows[i].first_mlp);
        if (rows[i].shared) {
            EXPECT(last.kv_layer == rows[i].kv_g && before.kv_layer == rows[i].kv_s &&
                       !last.owns_kv,
                   "%s", rows[i].name);
            EXPECT(block_config(&c, rows[i].kv_s).kv_is_shared &&
                   block_config(&c, rows[i].kv_g).kv_is_shared);
        } else {
            EXPECT(last.owns_kv && last.v_from_k && !before.v_from_k, "%s", rows[i].name);
        }
    }
}

CASE(model_config, the_released_files_are_read) {
    static const char *const names[] = {"e2b", "e4b", "12b-unified", "26b-a4b", "31b"};
    static const char *const presets[] = {"e2b", "e4b", "12b", "26b-a4b", "31b"};
    for (int i = 0; i < 5; i++) {
        char part[64];
        ModelConfig released, preset;
        snprintf(part, sizeof part, "spec/released-configs/%s.json", names[i]);
        char *path = shared_path(part), *json = preset_config(presets[i], 0);
        char *text;
        size_t size;
        EXPECT_OK(file_read(&text, &size, path, 1 << 20));
        EXPECT_OK(model_config_parse(&released, text, size, path));
        free(text);
        EXPECT_OK(model_config_parse(&preset, json, strlen(json), presets[i]));
        EXPECT(released.multimodal && released.num_hidden_layers == preset.num_hidden_layers);
        for (int l = 0; l < released.num_hidden_layers; l++) {
            BlockConfig a = block_config(&released, l), b = block_config(&preset, l);
            EXPECT(!memcmp(&a, &b, sizeof a), "%s: layer %d differs from the preset", names[i], l);
        }
        free(json), free(path);
    }
}

CASE(model_config, both_spellings_of_head_sizes_mean_the_same) {
    const char *spelled =
        "{\"model_type\":\"gemma4_text\",\"hidden_size\":8,\"num_hidden_layers\":2,\"num_attention_"
        "heads\":4,"
        "\"num_key_value_heads\":4,\"head_dim\":8,\"vocab_size\":9,\"intermediate_size\":8,"
        "\"hidden_size_per_layer_input\":0,"
        "\"layer_types\":[\"sliding_attention\",\"full_attention\"],"
        "\"per_layer_config\":{\"01\":{\"head_dim\":16,\"num_key_value_heads\":2}}}";
    ModelConfig c;
    EXPECT_OK(model_config_parse(&c, spelled, strlen(spelled), "c"));
    EXPECT(c.layer[0].head_dim == 8 && c.layer[1].head_dim == 16 &&
           c.layer[1].num_key_value_heads == 2);
}

CASE(model_config, other_models_and_impossible_values_are_refused) {
    ModelConfig c;
    const char *other = "{\"model_type\": \"diffusion_gemma\"}";
    EXPECT_ERROR(model_config_parse(&c, other, strlen(other), "config.json"),
                 "model_type is 'diffusion_gemma'");
    const char *heads = "{\"model_type\":\"gemma4_text\",\"hidden_size\":8,\"num_hidden_layers\":1,"
                        "\"num_attention_heads\":3,"
                        "\"num_key_value_heads\":2,\"vocab_size\":9,\"intermediate_size\":8}";
    EXPECT_ERROR(model_config_parse(&c, heads, strlen(heads), "config.json"), "do not divide");
    const char *layers = "{\"model_type\":\"gemma4_text\",\"num_hidden_layers\":100000}";
    EXPECT_ERROR(model_config_parse(&c, layers, strlen(layers), "config.json"),
                 "num_hidden_layers is 100000");
}
