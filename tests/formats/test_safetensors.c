/* test_safetensors.c - files that lie are refused by name; what is carried through stays as it was.
 */
#include "formats/adapter.h"
#include "formats/checkpoint.h"
#include "formats/file.h"
#include "tests/fixture.h"

/* A file in memory: header text, then `data` bytes of zeros. */
static Status parse(const char *header, size_t data) {
    static uint8_t bytes[4096];
    size_t n = strlen(header);
    memset(bytes, 0, sizeof bytes);
    bytes[0] = (uint8_t)n;
    bytes[1] = (uint8_t)(n >> 8);
    memcpy(bytes + 8, header, n);
    Safetensors s;
    Status status = safetensors_parse(&s, bytes, 8 + n + data, "lie.safetensors");
    if (status == OK) safetensors_close(&s);
    return status;
}

CASE(safetensors, a_header_that_lies_is_refused) {
    EXPECT_OK(parse("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8));
    EXPECT_ERROR(parse("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 4),
                 "lies at bytes");
    EXPECT_ERROR(parse("{\"a\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,8]}}", 8),
                 "its shape and dtype make 12");
    EXPECT_ERROR(parse("{\"a\":{\"dtype\":\"F32\",\"shape\":[-2],\"data_offsets\":[0,8]}}", 8),
                 "impossible shape");
    EXPECT_ERROR(parse("{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296,4294967296],"
                       "\"data_offsets\":[0,8]}}",
                       8),
                 "impossible shape");
    EXPECT_ERROR(parse("{\"a\":{\"dtype\":\"Q9\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8),
                 "unknown dtype");
    EXPECT_ERROR(parse("{\"a\":{\"dtype\":\"F32\",\"shape\":[2]}}", 8), "lacks dtype");
    EXPECT_ERROR(parse("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},"
                       "\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}",
                       8),
                 "overlap");
    EXPECT_ERROR(parse("[1]", 0), "not an object");
    EXPECT_ERROR(parse("{\"a\":", 0), "no JSON");
    uint8_t huge[16] = {255, 255, 255, 255, 255, 255, 255, 127};
    Safetensors s;
    EXPECT_ERROR(safetensors_parse(&s, huge, sizeof huge, "x"), "exceeds the file");
    EXPECT_ERROR(safetensors_parse(&s, huge, 5, "x"), "too short");
}

/* Rewrites a checkpoint's file with some tensors left out, renamed or added. */
static void rewrite(const char *dir, const char *drop, const char *add, int64_t add_rows,
                    const char *dtype) {
    char path[400];
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    Safetensors s;
    SafetensorsWriter *w;
    float data[64] = {1, 2, 3};
    int64_t shape[] = {add_rows, 2};
    size_t extra = (size_t)add_rows * 2 * (strcmp(dtype, "F32") ? 2 : 4);
    EXPECT_OK(safetensors_open(&s, path));
    EXPECT_OK(safetensors_create(&w, path));
    for (int i = 0; i < s.count; i++)
        if (!drop || strcmp(drop, s.tensors[i].name))
            safetensors_declare(w, s.tensors[i].name, s.tensors[i].dtype_text, s.tensors[i].ndim,
                                s.tensors[i].shape, s.tensors[i].size);
    if (add) safetensors_declare(w, add, dtype, 2, shape, extra);
    EXPECT_OK(safetensors_begin(w));
    for (int i = 0; i < s.count; i++)
        if (!drop || strcmp(drop, s.tensors[i].name))
            EXPECT_OK(safetensors_write(w, s.tensors[i].bytes, s.tensors[i].size));
    if (add) EXPECT_OK(safetensors_write(w, data, extra));
    EXPECT_OK(safetensors_commit(w));
    safetensors_close(&s);
}

static Status try_open(const char *dir) {
    Checkpoint c;
    Status status = checkpoint_open(&c, dir);
    if (status == OK) checkpoint_close(&c);
    return status;
}

CASE(safetensors, unknown_missing_and_misshapen_tensors_are_named) {
    Fixture f = fixture_open("model_12b.h5");
    rewrite(f.dir, NULL, "model.layers.0.mystery.weight", 1, "F32");
    EXPECT_ERROR(try_open(f.dir), "model.layers.0.mystery.weight' is unknown");
    f = fixture_open("model_12b.h5");
    rewrite(f.dir, "model.layers.1.mlp.up_proj.weight", NULL, 0, "F32");
    EXPECT_ERROR(try_open(f.dir), "model.layers.1.mlp.up_proj.weight' is missing");
    rewrite(f.dir, NULL, "model.layers.1.mlp.up_proj.weight", 3, "F32");
    EXPECT_ERROR(try_open(f.dir), "expected (40, 32)");
    char path[400];
    snprintf(path, sizeof path, "%s/model.safetensors", f.dir);
    char *bytes;
    size_t size;
    f = fixture_open("model_12b.h5");
    EXPECT_OK(file_read(&bytes, &size, path, (size_t)1 << 30));
    EXPECT_OK(file_write(path, bytes, size / 2));
    EXPECT_ERROR(try_open(f.dir), "lies at bytes");
    free(bytes);
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", f.dir);
    const char *index =
        "{\"weight_map\": {\"model.norm.weight\": \"model-00002-of-00002.safetensors\"}}";
    EXPECT_OK(file_write(path, index, strlen(index)));
    EXPECT_ERROR(try_open(f.dir), "model-00002-of-00002.safetensors");
}

CASE(safetensors, towers_and_dead_tensors_are_carried_through_and_none_invented) {
    Fixture f = fixture_open("model_e2b.h5");
    char out[400];
    rewrite(f.dir, NULL, "model.vision_tower.patch.weight", 4, "BF16");
    rewrite(f.dir, NULL, "model.layers.5.self_attn.k_proj.weight", 3,
            "F32"); /* layer 5 shares K and V */
    snprintf(out, sizeof out, "%s/out", test_folder());
    Checkpoint c, again;
    Gemma g;
    EXPECT_OK(checkpoint_open(&c, f.dir));
    gemma_declare(&g, &c.config, BF16, device_cpu());
    EXPECT_OK(params_place(&g.params, device_cpu(), false));
    EXPECT_OK(checkpoint_load(&c, &g));
    EXPECT_OK(checkpoint_save(&c, &g, BF16, SCHEME_NONE, out));
    EXPECT_OK(checkpoint_open(&again, out));
    EXPECT(again.count == c.count, "%d tensors, %d before", again.count, c.count);
    int carried = 0;
    for (int i = 0; i < c.count; i++) {
        if (c.tensors[i].role == ROLE_PARAM) continue;
        carried++;
        EXPECT(again.tensors[i].role == c.tensors[i].role &&
               again.tensors[i].stored->size == c.tensors[i].stored->size &&
               !memcmp(again.tensors[i].stored->bytes, c.tensors[i].stored->bytes,
                       c.tensors[i].stored->size));
    }
    EXPECT(carried == 2);
    checkpoint_close(&again);
    gemma_free(&g);
    checkpoint_close(&c);
}

CASE(adapter, one_for_another_model_is_refused_by_name) {
    Fixture e2b = fixture_open("model_e2b.h5");
    char dir[400];
    snprintf(dir, sizeof dir, "%s/adapter", test_folder());
    EXPECT_OK(folder_make(dir));
    fixture_write(&e2b, "lora/adapter_model.safetensors", dir, "adapter_model.safetensors");
    fixture_write(&e2b, "lora/adapter_config.json", dir, "adapter_config.json");
    Fixture other = fixture_open("model_31b.h5");
    Checkpoint c;
    Gemma g;
    AdapterSpec spec;
    EXPECT_OK(checkpoint_open(&c, other.dir));
    gemma_declare(&g, &c.config, F32, device_cpu());
    EXPECT_OK(peft_load_spec(&spec, dir));
    EXPECT_OK(adapter_attach(&g, &spec));
    EXPECT_OK(params_place(&g.params, device_cpu(), false));
    EXPECT_ERROR(peft_load(&g, dir),
                 "adapter_model.safetensors: tensor 'base_model.model.model.layers.");
    adapter_spec_free(&spec);
    gemma_free(&g);
    AdapterSpec wrong = {.rank = 2, .alpha = 2};
    text_list_add(&wrong.targets, "q_proj");
    text_list_add(&wrong.targets, "no_such_proj");
    gemma_declare(&g, &c.config, F32, device_cpu());
    EXPECT_ERROR(adapter_attach(&g, &wrong), "'no_such_proj' matches nothing");
    adapter_spec_free(&wrong);
    gemma_free(&g);
    checkpoint_close(&c);
}
