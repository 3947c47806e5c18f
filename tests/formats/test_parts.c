/* test_parts.c - weights stored as codes and scales: what bitsandbytes and compressed-tensors write
 * is read as they read it, what is written is what training computed with. */
#include "formats/file.h"
#include "formats/gguf_save.h"
#include "formats/sha256.h"
#include "kernels/elementwise.h"
#include "model/merge.h"
#include "tests/fixture.h"
#include "tests/program.h"
#include "tests/small_model.h"

#include <stdlib.h>
#include <string.h>

#define MODULE "model.layers.0.mlp.up_proj"

/* The weights in parts among the tensors of a file. */
static Status collect(PartsList *list, const Safetensors *file, int *plain) {
    const StoredTensor **tensors = must_malloc((size_t)(file->count + 1) * sizeof *tensors);
    *plain = file->count;
    for (int i = 0; i < file->count; i++) tensors[i] = &file->tensors[i];
    Status status = parts_collect(list, tensors, plain);
    free(tensors);
    return status;
}

CASE(parts, modules_of_other_packages_read_as_they_read_them) {
    static const struct {
        const char *name;
        DType dtype;
    } modules[] = {{"module_nf4", NF4},   {"module_nf4_nested", NF4_NESTED},
                   {"module_int4", Q4_0}, {"module_int4_128", Q4_0},
                   {"module_int8", Q8_0}, {"module_int8_packed", Q8_0}};
    Fixture f = fixture_open_plain("quantize.h5");
    for (size_t i = 0; i < sizeof modules / sizeof *modules; i++) {
        char name[64];
        int64_t size, count;
        int plain;
        uint8_t *bytes = fixture_bytes(&f, modules[i].name, &size);
        snprintf(name, sizeof name, "%s_sha256", modules[i].name);
        uint8_t *expected = fixture_bytes(&f, name, &count);
        float *values = must_malloc(64 * 512 * sizeof *values);
        char sum[65];
        Safetensors file;
        PartsList list;
        EXPECT_OK(safetensors_parse(&file, bytes, (size_t)size, modules[i].name));
        EXPECT_OK(collect(&list, &file, &plain));
        const StoredTensor *t = list.whole;
        EXPECT(list.count == 1 && plain == 0 && !strcmp(t->name, MODULE ".weight") &&
                   t->dtype == modules[i].dtype && t->ndim == 2 && t->shape[0] == 64 &&
                   t->shape[1] == 512 && count == 64,
               "%s", modules[i].name);
        void *blocks = must_malloc(t->size);
        EXPECT_OK(parts_read(t, blocks));
        scale_copy(TENSOR(values, F32, 64, 512), SET, TENSOR(blocks, t->dtype, 64, 512), 1.0f);
        sha256_text(sum, values, 64 * 512 * sizeof *values);
        EXPECT(!memcmp(sum, expected, 64), "%s", modules[i].name);
        parts_free(&list);
        safetensors_close(&file);
    }
}

/* A file of zeros with these tensors: name, dtype and shape as JSON, size. */
typedef struct Entry {
    const char *name, *dtype;
    int64_t rows, cols;
    size_t size;
} Entry;

static Status collect_entries(const Entry *entries, int count) {
    SafetensorsWriter *w;
    Safetensors file;
    PartsList list;
    int plain;
    char *path = must_format("%s/entries.safetensors", test_folder());
    const uint8_t zeros[8192] = {0};
    EXPECT_OK(safetensors_create(&w, path));
    for (int i = 0; i < count; i++)
        safetensors_declare(w, entries[i].name, entries[i].dtype, 2,
                            (int64_t[]){entries[i].rows, entries[i].cols}, entries[i].size);
    EXPECT_OK(safetensors_begin(w));
    for (int i = 0; i < count; i++) EXPECT_OK(safetensors_write(w, zeros, entries[i].size));
    EXPECT_OK(safetensors_commit(w));
    EXPECT_OK(safetensors_open(&file, path));
    Status status = collect(&list, &file, &plain);
    if (status == OK) parts_free(&list);
    safetensors_close(&file);
    free(path);
    return status;
}

CASE(parts, what_no_block_holds_is_refused_by_name) {
    static const Entry codes = {"a.weight", "I8", 4, 64, 256},
                       scales = {"a.weight_scale", "F32", 4, 1, 16},
                       packed = {"a.weight_packed", "I32", 4, 8, 128},
                       shape = {"a.weight_shape", "I64", 1, 2, 16};
    const struct {
        const char *message;
        Entry entries[4];
        int count;
    } cases[] = {
        {NULL, {codes, scales}, 2},
        {"asymmetric codes", {codes, scales, {"a.weight_zero_point", "I8", 4, 1, 4}}, 3},
        {"order of activations", {codes, scales, {"a.weight_g_idx", "I32", 1, 64, 256}}, 3},
        {"bitsandbytes' 8-bit rows", {codes, {"a.weight.SCB", "F32", 4, 1, 16}}, 2},
        {"'a.weight_shape' is missing beside 'a.weight_packed'", {packed, scales}, 2},
        {"codes of its weight_shape", {packed, scales, shape}, 3},
        {"no groups of its rows", {codes, {"a.weight_scale", "F32", 3, 1, 12}}, 2},
        {"no groups of its rows", {codes, {"a.weight_scale", "I32", 4, 1, 16}}, 2},
        {"no whole blocks of 32", {codes, {"a.weight_scale", "F32", 4, 4, 64}}, 2},
        {"no whole blocks of 32", {{"a.weight", "I8", 4, 40, 160}, scales}, 2},
        {"does not fit the other experts",
         {{"x.experts.1.up_proj.weight", "I8", 4, 64, 256},
          {"x.experts.1.up_proj.weight_scale", "F32", 4, 1, 16}},
         2},
        {"is no JSON",
         {{"a.weight", "U8", 128, 1, 128},
          {"a.weight.absmax", "F32", 4, 1, 16},
          {"a.weight.quant_state.bitsandbytes__nf4", "U8", 1, 8, 8}},
         3},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (cases[i].message)
            EXPECT_ERROR(collect_entries(cases[i].entries, cases[i].count), cases[i].message);
        else
            EXPECT_OK(collect_entries(cases[i].entries, cases[i].count));
    }
}

static char *save_codes(Loaded *m, const char *name) {
    char *path = must_format("%s/%s-codes", test_folder(), name);
    EXPECT_OK(checkpoint_save(&m->checkpoint, &m->g, F32, small_scheme, path));
    return path;
}

CASE(parts, what_qat_computes_is_what_the_exported_folder_computes) {
    static const QuantScheme schemes[] = {SCHEME_INT4, SCHEME_INT8};
    for (int k = 0; k < SMALL_KINDS; k++)
        for (int trial = 0; trial < 4; trial++) {
            Loaded trained, file;
            small_scheme = schemes[trial / 2];
            char *dir = small_make(small_kinds[k]), *path;
            small_load(&trained, dir, F32, STACK_SCORE,
                       trial % 2 ? small_round_adapted : small_round);
            small_run(&trained);
            path = save_codes(&trained, small_kinds[k]);
            small_load(&file, path, F32, STACK_SCORE, NULL);
            small_run(&file);
            EXPECT(!memcmp(trained.nll, file.nll, sizeof file.nll), "%s, trial %d: %.9g, not %.9g",
                   small_kinds[k], trial, file.nll[3], trained.nll[3]);
            int packed = 0;
            for (Linear *l = file.g.linears.first; l; l = l->next)
                packed += dtype_is_packed(l->weight->value.dtype);
            EXPECT(packed > 12, "%s: %d linears in codes", small_kinds[k], packed);
            small_unload(&trained);
            small_unload(&file);
            tree_remove(dir);
            tree_remove(path);
        }
}

CASE(parts, codes_go_through_an_export_unchanged) {
    const char *f = test_folder();
    static const char *const formats[] = {"w4a16", "int8"};
    for (int i = 0; i < 2; i++) {
        char *dir = small_make("experts");
        char *a = must_format("%s/a%d", f, i), *b = must_format("%s/b%d", f, i);
        char *to = must_format("%s/model.safetensors", a);
        char *again = must_format("%s/model.safetensors", b);
        char one[65], other[65];
        EXPECT_RUN(0, "export --model %s --to %s %s --verify", dir, formats[i], a);
        EXPECT_RUN(0, "export --model %s --to %s %s --verify", a, formats[i], b);
        EXPECT_OK(sha256_file(one, to));
        EXPECT_OK(sha256_file(other, again));
        EXPECT(!strcmp(one, other), "%s: other bytes the second time", formats[i]);
        EXPECT_RUN(0, "export --model %s --to q4_0-gguf %s/%d.gguf --verify", a, f, i);
        EXPECT_RUN(0, "export --model %s --to safetensors %s/dense%d", a, f, i);
        EXPECT_EXIT(0, "BF16", "inspect %s/dense%d", f, i);
        EXPECT(!strstr(program_out, i ? "q8_0" : "q4_0"), "%s", program_out);
        tree_remove(dir);
    }
    EXPECT_RUN(0, "init tiny %s/q.gguf --tokenizer demo/tokenizer --layers 6 --to q8_0-gguf", f);
    EXPECT_EXIT(1, "whose scales this format cannot hold",
                "export --model %s/q.gguf --to int8 %s/q", f, f);
    EXPECT_EXIT(2, "bf16 beside its codes", "export --model %s/q.gguf --to int8 --dtype f32 %s/q",
                f, f);
}
