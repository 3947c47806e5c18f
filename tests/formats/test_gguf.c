/* test_gguf.c - a GGUF is the folder it was made from; what training through rounding computes is
 * what the exported file computes; bad files are refused by name. */
#include "data/tokenizer.h"
#include "formats/adapter.h"
#include "formats/companion.h"
#include "formats/file.h"
#include "formats/gguf_save.h"
#include "formats/initial.h"
#include "infer/engine.h"
#include "infer/verify.h"
#include "kernels/elementwise.h"
#include "kernels/random.h"
#include "model/merge.h"
#include "model/step.h"
#include "tests/fixture.h"
#include "tests/program.h"
#include "tests/small_model.h"

#include <math.h>
#include <signal.h>
#include <unistd.h>

static void model_rows(void *context, const Param *p, int64_t first, int64_t count, float *out) {
    merged_rows(&((Loaded *)context)->g, p, first, count, out);
}

static char *save(Loaded *m, const char *name, DType dtype) {
    char *path = must_format("%s/%s.gguf", test_folder(), name);
    GgufModel model = {&m->checkpoint.config, "demo/tokenizer", name, dtype};
    RowSource source = {.rows = model_rows, .context = m};
    EXPECT_OK(gguf_save(&model, &m->g, &source, path));
    return path;
}

CASE(gguf, a_file_holds_the_model_it_was_made_from) {
    for (int k = 0; k < SMALL_KINDS; k++) {
        Loaded folder, file;
        char *dir = small_make(small_kinds[k]), *path;
        small_load(&folder, dir, F32, STACK_SCORE, NULL);
        path = save(&folder, small_kinds[k], F32);
        small_load(&file, path, F32, STACK_SCORE, NULL);
        small_run(&folder);
        small_run(&file);
        EXPECT(!memcmp(folder.nll, file.nll, sizeof file.nll), "%s", small_kinds[k]);
        EXPECT(!memcmp(&folder.checkpoint.config.layer, &file.checkpoint.config.layer,
                       sizeof file.checkpoint.config.layer));
        small_unload(&folder);
        small_unload(&file);
    }
}

CASE(gguf, tokenizer_and_template_come_back_out_of_the_file) {
    Loaded folder;
    Tokenizer *one, *other;
    char *dir = small_make("dense"), *path;
    small_load(&folder, dir, F32, STACK_SCORE, NULL);
    path = save(&folder, "t", BF16);
    EXPECT_OK(tokenizer_load(&one, "demo/tokenizer"));
    EXPECT_OK(tokenizer_load(&other, path));
    static const char *const texts[] = {"The hardness of topaz is 8.", "<|turn>user\nHow?<turn|>\n",
                                        "caf\xc3\xa9 \xf0\x9f\x92\x8e  two"};
    for (int i = 0; i < 3; i++) {
        Tokens a = {0}, b = {0};
        tokenizer_encode(one, &a, texts[i], strlen(texts[i]), NULL, 0, false);
        tokenizer_encode(other, &b, texts[i], strlen(texts[i]), NULL, 0, false);
        EXPECT(a.count == b.count && !memcmp(a.ids, b.ids, (size_t)a.count * sizeof *a.ids), "%s",
               texts[i]);
    }
    EXPECT(tokenizer_size(one) == tokenizer_size(other));
    char *bytes;
    size_t size;
    EXPECT_OK(companion_find(&bytes, &size, path, "chat_template.jinja"));
    EXPECT(!bytes, "a template out of nowhere");
    small_unload(&folder);
}

CASE(gguf, what_qat_computes_is_what_the_exported_file_computes) {
    for (int k = 0; k < SMALL_KINDS; k++)
        for (int trial = 0; trial < 4; trial++) {
            Loaded trained, file;
            bool adapter = trial % 2;
            small_learned = trial / 2;
            char *dir = small_make(small_kinds[k]), *path;
            small_load(&trained, dir, F32, STACK_SCORE,
                       adapter ? small_round_adapted : small_round);
            small_run(&trained);
            path = save(&trained, small_kinds[k], Q4_0);
            small_load(&file, path, F32, STACK_SCORE, NULL);
            small_run(&file);
            EXPECT(!memcmp(trained.nll, file.nll, sizeof file.nll), "%s, trial %d: %.9g, not %.9g",
                   small_kinds[k], trial, file.nll[3], trained.nll[3]);
            small_unload(&trained);
            small_unload(&file);
            tree_remove(dir);
            tree_remove(path);
        }
}

static void train_all(Loaded *m) {
    for (int i = 0; i < m->g.params.count; i++)
        m->g.params.items[i]->trainable = !m->g.params.items[i]->buffer;
}

static void train_rounded(Loaded *m) {
    train_all(m);
    small_round(m);
}

static void expect_grad(const Param *p, const float *expected, double tolerance) {
    double error = relative_error(p->grad.data, expected, tensor_count(p->grad));
    EXPECT(error < tolerance, "gradient of %s is off by %.2e", p->name, error);
}

static Tensor value_of(const Param *factors) {
    return factors ? factors->value : tensor_absent();
}

/* What the gradient of learned factors has to be, to add to. */
static Tensor zero_like(const Param *factors) {
    if (!factors) return tensor_absent();
    Tensor t = factors->value;
    t.data = must_calloc((size_t)tensor_count(t), sizeof(float));
    return t;
}

CASE(gguf, a_qat_gradient_is_that_of_the_rounded_model_where_codes_are_in_range) {
    for (int trial = 0; trial < 2 * SMALL_KINDS; trial++) {
        Loaded through, plain;
        int k = trial / 2;
        small_learned = trial % 2;
        char *dir = small_make(small_kinds[k]);
        small_load(&through, dir, F32, STACK_KEEP, train_rounded);
        small_load(&plain, dir, F32, STACK_KEEP, train_all);
        for (int i = 0; i < plain.g.params.count; i++) { /* the rounded model, as plain weights */
            Param *p = plain.g.params.items[i];
            const Linear *l = gemma_owner(&through.g, through.g.params.items[i]);
            if (p->value.ndim > 1 && !strstr(p->name, ".router."))
                fake_quantize(p->value, p->value, value_of(l ? l->factors : NULL), SCHEME_Q4_0, 1);
        }
        small_run(&through);
        gemma_finish_gradients(&through.g);
        small_run(&plain);
        EXPECT(!memcmp(through.nll, plain.nll, sizeof plain.nll), "%s: other losses",
               small_kinds[k]);
        for (int i = 0; i < plain.g.params.count; i++) {
            Param *p = plain.g.params.items[i], *q = through.g.params.items[i];
            if (p->buffer) continue;
            const Linear *l = gemma_owner(&through.g, q);
            const Param *factors = l ? l->factors : NULL;
            Tensor dfactors = zero_like(factors);
            if (p->value.ndim > 1 && !strstr(p->name, ".router."))
                fake_quantize_backward(p->grad, dfactors, q->value, value_of(factors), SCHEME_Q4_0,
                                       1);
            expect_grad(q, p->grad.data, 1e-5);
            if (factors) expect_grad(factors, dfactors.data, 1e-4);
            free(dfactors.data);
        }
        small_unload(&through);
        small_unload(&plain);
        tree_remove(dir);
    }
}

CASE(gguf, a_qat_lora_gradient_is_that_of_the_merged_rounded_weight_passed_to_its_factors) {
    for (int trial = 0; trial < 2 * SMALL_KINDS; trial++) {
        Loaded through, plain;
        int k = trial / 2;
        small_learned = trial % 2;
        char *dir = small_make(small_kinds[k]);
        small_load(&through, dir, F32, STACK_RECOMPUTE, small_round_adapted);
        small_load(&plain, dir, F32, STACK_KEEP, train_all);
        for (int i = 0; i < plain.g.params.count; i++) {
            Param *p = plain.g.params.items[i];
            int64_t cols = tensor_cols(p->value);
            if (p->value.ndim < 2 || strstr(p->name, ".router.")) continue;
            const Param *q = params_find(&through.g.params, p->name);
            const Linear *l = gemma_owner(&through.g, q);
            merged_rows(&through.g, q, 0, tensor_count(p->value) / cols, p->value.data);
            fake_quantize(p->value, p->value, value_of(l ? l->factors : NULL), SCHEME_Q4_0, 1);
        }
        small_run(&through);
        small_run(&plain);
        EXPECT(!memcmp(through.nll, plain.nll, sizeof plain.nll), "%s: other losses",
               small_kinds[k]);
        int checked = 0;
        for (Linear *l = through.g.linears.first; l; l = l->next) {
            if (!l->lora) continue;
            Tensor dW = params_find(&plain.g.params, l->weight->name)->grad;
            float *merged = must_malloc(tensor_bytes(dW));
            merged_rows(&through.g, l->weight, 0, l->groups * l->out, merged);
            Tensor dfactors = zero_like(l->factors);
            fake_quantize_backward(dW, dfactors, TENSOR(merged, F32, l->groups * l->out, l->in),
                                   value_of(l->factors), SCHEME_Q4_0, 1);
            if (l->factors) expect_grad(l->factors, dfactors.data, 1e-4);
            free(dfactors.data);
            const float *A = l->lora->A->value.data, *g = dW.data;
            float *dB = must_calloc((size_t)tensor_count(l->lora->B->value), 4);
            for (int64_t e = 0; e < l->groups; e++)
                for (int64_t o = 0; o < l->out; o++)
                    for (int64_t r = 0; r < 4; r++) {
                        double sum = 0;
                        for (int64_t i = 0; i < l->in; i++)
                            sum += (double)g[(e * l->out + o) * l->in + i] *
                                   A[(e * 4 + r) * l->in + i];
                        dB[(e * l->out + o) * 4 + r] = (float)(2.0 * sum);
                    }
            expect_grad(l->lora->B, dB, 1e-4);
            free(dB);
            free(merged);
            checked++;
        }
        EXPECT(checked > 5);
        small_unload(&through);
        small_unload(&plain);
        tree_remove(dir);
    }
}

static DType base_dtype;

static void pack_base(Loaded *m) {
    small_adapt(m);
    for (Linear *l = m->g.linears.first; l; l = l->next)
        if (!strstr(l->name, ".router.")) l->weight->value.dtype = base_dtype;
}

CASE(gguf, qlora_gradients_are_those_of_the_dequantised_base) {
    static const DType dtypes[] = {NF4_NESTED, NF4, Q4_0_TILED, Q8_0_TILED};
    for (int k = 0; k < SMALL_KINDS; k++)
        for (size_t d = 0; d < sizeof dtypes / sizeof *dtypes; d++) {
            Loaded packed, plain;
            char *dir = small_make(small_kinds[k]);
            base_dtype = dtypes[d];
            small_load(&packed, dir, F32, STACK_RECOMPUTE, pack_base);
            small_load(&plain, dir, F32, STACK_KEEP, small_adapt);
            for (Linear *l = plain.g.linears.first; l; l = l->next) {
                Tensor from = params_find(&packed.g.params, l->weight->name)->value;
                scale_copy(l->weight->value, SET, from, 1);
                EXPECT(strstr(l->name, ".router.") || from.dtype == base_dtype, "%s is %s", l->name,
                       tensor_text(from));
            }
            small_run(&packed);
            small_run(&plain);
            for (Linear *l = packed.g.linears.first; l; l = l->next) {
                if (!l->lora) continue;
                expect_grad(l->lora->A, params_find(&plain.g.params, l->lora->A->name)->grad.data,
                            1e-3);
                expect_grad(l->lora->B, params_find(&plain.g.params, l->lora->B->name)->grad.data,
                            1e-3);
            }
            small_unload(&packed);
            small_unload(&plain);
            tree_remove(dir);
        }
}

CASE(gguf, eight_bit_activations_stay_near_the_exact_product) {
    for (int k = 0; k < SMALL_KINDS; k++) {
        Loaded exact, fast;
        char *dir = small_make(small_kinds[k]);
        small_load(&exact, dir, F32, STACK_SCORE, NULL);
        char *path = save(&exact, small_kinds[k], Q8_0);
        small_unload(&exact);
        small_load(&exact, path, F32, STACK_SCORE, NULL);
        small_load(&fast, path, BF16, STACK_SCORE, NULL);
        fast.g.int8 = true;
        small_run(&exact);
        small_run(&fast);
        double error = relative_error(fast.nll, exact.nll, SMALL_ROWS);
        EXPECT(error > 0 && error < 0.02, "%s: %g", small_kinds[k], error);
        small_unload(&exact);
        small_unload(&fast);
        tree_remove(dir);
        tree_remove(path);
    }
}

CASE(gguf, init_straight_to_a_file_equals_init_and_export) {
    const char *f = test_folder();
    EXPECT_RUN(0, "init tiny %s/m --tokenizer demo/tokenizer --layers 6", f);
    EXPECT_RUN(0, "export --model %s/m --to q4_0-gguf %s/a.gguf", f, f);
    EXPECT_RUN(0, "init tiny %s/b.gguf --tokenizer demo/tokenizer --layers 6 --to q4_0-gguf", f);
    EXPECT_RUN(0, "export --model %s/b.gguf --to q4_0-gguf %s/c.gguf", f, f);
    char a[300], b[300], c[300];
    Gguf x, y, z;
    snprintf(a, sizeof a, "%s/a.gguf", f);
    snprintf(b, sizeof b, "%s/b.gguf", f);
    snprintf(c, sizeof c, "%s/c.gguf", f);
    EXPECT_OK(gguf_open(&x, a));
    EXPECT_OK(gguf_open(&y, b));
    EXPECT_OK(gguf_open(&z, c));
    EXPECT(x.count == y.count && x.count == z.count && x.count > 50);
    for (int i = 0; i < x.count; i++) {
        EXPECT(!strcmp(x.tensors[i].name, y.tensors[i].name) &&
               x.tensors[i].size == y.tensors[i].size);
        EXPECT(!memcmp(x.tensors[i].bytes, y.tensors[i].bytes, x.tensors[i].size), "%s",
               x.tensors[i].name);
        EXPECT(!memcmp(x.tensors[i].bytes, z.tensors[i].bytes, x.tensors[i].size),
               "%s goes through changed", z.tensors[i].name);
    }
    gguf_close(&x);
    gguf_close(&y);
    gguf_close(&z);
}

/* ---- bad files ---- */

static uint8_t *small_file(size_t *size) {
    GgufWriter *w;
    char path[300];
    snprintf(path, sizeof path, "%s/small.gguf", test_folder());
    int64_t shape[] = {2, 64};
    uint8_t data[2 * 36] = {0};
    EXPECT_OK(gguf_create(&w, path));
    gguf_put_text(w, "general.architecture", "gemma4");
    gguf_put_array(w, "list", GGUF_STRING, 2);
    gguf_add_text(w, "one", 3);
    gguf_add_text(w, "two", 3);
    gguf_declare(w, "token_embd.weight", Q4_0, 2, shape);
    EXPECT_OK(gguf_begin(w));
    EXPECT_OK(gguf_write(w, data, sizeof data));
    EXPECT_OK(gguf_commit(w));
    char *bytes;
    EXPECT_OK(file_read(&bytes, size, path, 1 << 20));
    return (uint8_t *)bytes;
}

CASE(gguf, every_truncation_and_every_lie_is_an_error) {
    size_t size;
    uint8_t *bytes = small_file(&size);
    Gguf g;
    EXPECT_OK(gguf_parse(&g, bytes, size, "small.gguf"));
    gguf_close(&g);
    for (size_t n = 0; n + 24 < size; n++) { /* the last bytes are padding */
        uint8_t *cut = must_malloc(n + 1);
        memcpy(cut, bytes, n);
        EXPECT(gguf_parse(&g, cut, n, "small.gguf") != OK, "%d of %d bytes pass", (int)n,
               (int)size);
        EXPECT(strstr(status_message(), "small.gguf"), "%s", status_message());
        free(cut);
    }
    static const struct {
        size_t at;
        uint8_t value;
        const char *message;
    } lies[] = {{0, 'X', "is no GGUF file"},
                {4, 9, "version 9"},
                {15, 0x7f, "promises"},
                {23, 0x7f, "promises"}};
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        uint8_t keep = bytes[lies[i].at];
        bytes[lies[i].at] = lies[i].value;
        EXPECT_ERROR(gguf_parse(&g, bytes, size, "small.gguf"), lies[i].message);
        bytes[lies[i].at] = keep;
    }
    for (size_t i = 24; i < size;
         i++) { /* one byte of anything: an error or a file, never a fault */
        uint8_t keep = bytes[i];
        for (int value = 0; value < 256; value += 51) {
            bytes[i] = (uint8_t)value;
            if (gguf_parse(&g, bytes, size, "small.gguf") == OK) gguf_close(&g);
        }
        bytes[i] = keep;
    }
}

CASE(gguf, a_file_of_something_else_is_refused_by_name) {
    const char *f = test_folder();
    size_t size;
    free(small_file(&size));
    EXPECT_RUN(0, "init tiny %s/m --tokenizer demo/tokenizer --layers 2", f);
    EXPECT_EXIT(1, "gemma4.embedding_length", "score --model %s/small.gguf hello", f);
    EXPECT_EXIT(2, "--to is 'q5-gguf', expected", "export --model %s/m --to q5-gguf %s/x", f, f);
    EXPECT_EXIT(2, "--to lora-gguf needs --adapter", "export --model %s/m --to lora-gguf %s/x", f,
                f);
    EXPECT_EXIT(2, "needs --tokenizer", "init tiny %s/y.gguf --to q4_0-gguf", f);
}

/* Changes 18 bytes of a tensor's data in the file. */
static void edit_tensor(const char *path, const char *name, const void *block) {
    Gguf g;
    EXPECT_OK(gguf_open(&g, path));
    const StoredTensor *t = gguf_find_tensor(&g, name);
    EXPECT(t && t->dtype == Q4_0);
    long at = (long)(t->bytes - g.map);
    gguf_close(&g);
    FILE *file = fopen(path, "r+b");
    EXPECT(!fseek(file, at, SEEK_SET) && fwrite(block, 18, 1, file) == 1 && !fclose(file));
}

CASE(gguf, an_export_is_proven_or_refused) {
    static const char *const tensors[] = {"token_embd.weight", "blk.1.attn_q.weight"};
    for (int k = 0; k < SMALL_KINDS; k++) {
        Loaded m;
        Verification v;
        char *dir = small_make(small_kinds[k]),
             *f = must_format("%s/%s", test_folder(), small_kinds[k]);
        small_load(&m, dir, F32, STACK_SCORE, small_adapt);
        int tensors_of_adapter = 0;
        for (int i = 0; i < m.g.params.count; i++)
            tensors_of_adapter += m.g.params.items[i]->adapter;
        char applied[64];
        snprintf(applied, sizeof applied, "applied %d of %d adapter tensors", tensors_of_adapter,
                 tensors_of_adapter);
        char *adapter = must_format("%s-adapter", f);
        EXPECT_OK(peft_save(&m.g, &m.spec, adapter));
        EXPECT_EXIT(0, applied, "export --model %s --adapter %s --to q4_0-gguf %s.gguf --verify",
                    dir, adapter, f);
        small_unload(&m);
        uint8_t block[18] = {0x11, 0x28};
        memset(block + 2, 0x79, 16);
        for (int i = 0; i < 2; i++) { /* another block, of the table or of a linear */
            char *path = must_format("%s.gguf", f), *bytes;
            size_t size;
            EXPECT_OK(file_read(&bytes, &size, path, (size_t)1 << 30));
            edit_tensor(path, tensors[i], block);
            EXPECT_ERROR(verify_export(&v, dir, adapter, path, SCHEME_NONE),
                         "is not the model's, merged and rounded");
            EXPECT_OK(file_write(path, bytes, size));
            free(bytes);
            free(path);
        }
        /* Blocks another program chose, which rounding again would change, go through as they are.
         */
        for (int i = 0; i < 2; i++) {
            char *path = must_format("%s.gguf", f);
            edit_tensor(path, tensors[i], block);
            free(path);
        }
        EXPECT_RUN(0, "export --model %s.gguf --to q4_0-gguf %s-again.gguf --verify", f, f);
        EXPECT_EXIT(0, "derived", "inspect %s-again.gguf", f);
        tree_remove(dir);
        tree_remove(adapter);
    }
}

CASE(gguf, a_stopped_export_leaves_nothing_behind) {
    Loaded m;
    char *dir = small_make("dense"), *out = must_format("%s/exports", test_folder()),
         *file = must_format("%s/x.gguf", out), *folder = must_format("%s/x", out);
    small_load(&m, dir, F32, STACK_SCORE, NULL);
    EXPECT_OK(folder_make(out));
    GgufModel model = {&m.checkpoint.config, "demo/tokenizer", "x", Q4_0};
    RowSource source = {.rows = model_rows, .context = &m};
    file_stop_on_signals();
    raise(SIGTERM);
    EXPECT(gguf_save(&model, &m.g, &source, file) == ERR_STOPPED);
    EXPECT(checkpoint_save(&m.checkpoint, &m.g, BF16, SCHEME_NONE, folder) == ERR_STOPPED);
    EXPECT(!rmdir(out), "something is left in %s", out); /* succeeds on empty folders only */
}

/* Log-probabilities of every token after the ids, read in chunks. */
static void read_last(float *out, Gemma *g, const int32_t *ids, int64_t chunk, DType kv) {
    int64_t V = g->config.vocab_size;
    int32_t *all = must_malloc((size_t)V * sizeof *all);
    for (int64_t v = 0; v < V; v++) all[v] = (int32_t)v;
    EngineOptions options = {.sequences = 1, .tokens = SMALL_ROWS, .chunk = chunk, .kv = kv};
    Request request = {.ids = ids,
                       .count = SMALL_ROWS,
                       .candidates = all,
                       .candidate_count = (int)V,
                       .sampling = {.top_p = 1, .repetition_penalty = 1}};
    Engine e;
    Sequence *s;
    EXPECT_OK(engine_init(&e, g, NULL, &options));
    EXPECT_OK(engine_submit(&e, &s, &request));
    while (engine_step(&e)) continue;
    memcpy(out, s->candidate_logprobs, (size_t)V * sizeof *out);
    engine_drop(&e, s);
    engine_free(&e);
    free(all);
}

CASE(gguf, packed_keys_and_values_stay_near_the_exact_ones) {
    static const DType dtypes[] = {F32, Q8_0, Q4_0};
    static const double limits[] = {1e-5, 0.1, 1.0};
    double last = 0;
    for (int k = 0; k < SMALL_KINDS; k++) {
        Loaded m;
        char *dir = small_make(small_kinds[k]);
        small_load(&m, dir, F32, STACK_SCORE, NULL);
        int64_t V = m.g.config.vocab_size;
        float *exact = must_malloc((size_t)V * 4), *logits = must_malloc((size_t)V * 4);
        int32_t ids[SMALL_ROWS];
        for (int i = 0; i < SMALL_ROWS; i++) ids[i] = 3 + i * 37 % 2000;
        for (int d = 0; d < 3; d++) {
            read_last(exact, &m.g, ids, SMALL_ROWS, F32); /* all at once, exactly */
            read_last(logits, &m.g, ids, 7, dtypes[d]);
            double error = relative_error(logits, exact, V);
            /* Scores have no scale, so rounded keys show; four bits fewer show several times as
             * much. */
            EXPECT(error < limits[d], "%s, %s: %g", small_kinds[k], dtype_name(dtypes[d]), error);
            EXPECT(d == 0 || error > 4 * last, "%s, %s: %g after %g", small_kinds[k],
                   dtype_name(dtypes[d]), error, last);
            last = error;
        }
        small_unload(&m);
        tree_remove(dir);
    }
}
