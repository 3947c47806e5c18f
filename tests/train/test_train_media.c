/* test_train_media.c - runs over pictures and sounds drawn here: learned, packed, resumed, and what
 * a tool shows. */
#include "data/text.h"
#include "formats/file.h"
#include "formats/safetensors.h"
#include "formats/sha256.h"
#include "tests/program.h"
#include "tests/small_media.h"
#include "train/metrics.h"

#include <math.h>

/* A model with small towers, and rows. */
static void prepare(void) {
    EXPECT_RUN(0, "init tiny %s/model --media --tokenizer demo/tokenizer --dtype f32 --layers 2",
               test_folder());
    small_media_rows();
}

static void write_run(const char *name, const char *more) {
    char *text = must_format(
        "model: %s/model\noutput: %s/%s\ndtype: f32\nmethod: lora\nlora: {rank: 8, train_also: "
        "[embedding_projection]}\noptimizer: {lr: 4.0e-3, eps: 1.0e-3}\nsave: {every: 20, keep: "
        "2}\n%s",
        test_folder(), test_folder(), name, more);
    char *file = must_format("%s.yaml", name);
    small_write(file, text);
    free(text), free(file);
}

#define DATA                                                                                       \
    "data: {train: %s/rows.jsonl, max_length: 512, chat_format: small, image_tokens: 70%s}\n"

static Metrics first_step(const char *run) {
    char *path = must_format("%s/%s/metrics.csv", test_folder(), run);
    Metrics *rows, first;
    int64_t count;
    EXPECT_OK(metrics_read(&rows, &count, path));
    EXPECT(count > 0, "%s has no step", run);
    first = rows[0];
    free(rows), free(path);
    return first;
}

CASE(train, packed_media_train_as_separate_ones) {
    const char *f = test_folder();
    prepare();
    char *packed = must_format(DATA "batch: {sequences: 1, accumulate: 1}\nsteps: 1\n", f, ""),
         *apart = must_format(DATA "batch: {sequences: 1, accumulate: 5}\nsteps: 1\n", f,
                              ", packing: false");
    write_run("packed", packed);
    write_run("apart", apart);
    EXPECT_RUN(0, "train %s/packed.yaml --device cpu", f);
    EXPECT_RUN(0, "train %s/apart.yaml --device cpu", f);
    Metrics a = first_step("packed"), b = first_step("apart");
    EXPECT(a.trained_tokens == b.trained_tokens, "%d and %d tokens", (int)a.trained_tokens,
           (int)b.trained_tokens);
    EXPECT(fabs(a.loss - b.loss) < 1e-5 && fabs(a.grad_norm - b.grad_norm) < 1e-4 * b.grad_norm,
           "loss %.7f and %.7f, gradient %.6f and %.6f", a.loss, b.loss, a.grad_norm, b.grad_norm);
    EXPECT_EXIT(0, "\"media\": 4", "inspect %s/packed/data.h5 --json", f); /* of five in rows */
    free(packed), free(apart);
}

CASE(train, originals_in_the_store_train_as_ready_features) {
    const char *f = test_folder();
    prepare();
    char *ready = must_format(DATA "steps: 3\n", f, ""),
         *original = must_format(DATA "steps: 3\n", f, ", media: original");
    write_run("ready", ready);
    write_run("original", original);
    EXPECT_RUN(0, "train %s/ready.yaml --device cpu", f);
    EXPECT_RUN(0, "train %s/original.yaml --device cpu", f);
    char *one = must_format("%s/ready/metrics.csv", f),
         *other = must_format("%s/original/metrics.csv", f);
    Metrics *a, *b;
    int64_t n, m;
    EXPECT_OK(metrics_read(&a, &n, one));
    EXPECT_OK(metrics_read(&b, &m, other));
    EXPECT(n == 3 && m == 3);
    for (int i = 0; i < 3; i++)
        EXPECT(a[i].loss == b[i].loss && a[i].grad_norm == b[i].grad_norm, "step %d", i);
    EXPECT_EXIT(0, "\"media_kept\": \"original\"", "inspect %s/original/data.h5 --json", f);
    free(a), free(b), free(one), free(other), free(ready), free(original);
}

CASE(train, pictures_and_tones_are_learned_and_a_stopped_run_goes_on) {
    const char *f = test_folder();
    char one[65], other[65];
    prepare();
    char *data = must_format(DATA "batch: {sequences: 1, accumulate: 1}\nsteps: 60\nschedule: "
                                  "{name: constant, warmup: 0}\n",
                             f, "");
    write_run("whole", data);
    EXPECT_RUN(0, "train %s/whole.yaml --device cpu", f);
    for (int i = 0; i < SMALL_PICTURES; i++)
        EXPECT_EXIT(0, small_names[i],
                    "generate --model %s/model --adapter %s/whole/adapter --chat-format small "
                    "--dtype f32 --device cpu --image %s/stone%d.ppm --image-tokens 70 "
                    "--temperature 0 --max-tokens 12 Which?",
                    f, f, f, i);
    EXPECT_EXIT(0, "--to mmproj writes the rest",
                "export --model %s/model --adapter %s/whole/adapter --to q8_0-gguf %s/x.gguf", f, f,
                f);
    EXPECT_RUN(0, "train %s/whole.yaml --device cpu output=%s/cut steps=40", f, f);
    EXPECT_RUN(0, "train %s/whole.yaml --device cpu output=%s/cut --resume steps=60", f, f);
    char *x = must_format("%s/whole/adapter/adapter_model.safetensors", f),
         *y = must_format("%s/cut/adapter/adapter_model.safetensors", f);
    EXPECT_OK(sha256_file(one, x));
    EXPECT_OK(sha256_file(other, y));
    EXPECT(!strcmp(one, other), "the run that stopped ended elsewhere");
    free(x), free(y), free(data);
}

/* Whether a tensor has the same bytes in two checkpoints. */
static bool same_tensor(const char *one, const char *other, const char *name) {
    Safetensors a, b;
    char *x = must_format("%s/model.safetensors", one),
         *y = must_format("%s/model.safetensors", other);
    EXPECT_OK(safetensors_open(&a, x));
    EXPECT_OK(safetensors_open(&b, y));
    const StoredTensor *s = safetensors_find(&a, name), *t = safetensors_find(&b, name);
    EXPECT(s && t && s->size == t->size, "%s", name);
    bool same = !memcmp(s->bytes, t->bytes, s->size);
    safetensors_close(&a);
    safetensors_close(&b);
    free(x), free(y);
    return same;
}

CASE(train, a_full_run_trains_the_towers_that_are_named) {
    const char *f = test_folder();
    prepare();
    char *run = must_format("model: %s/model\noutput: %s/full\ndtype: f32\nmethod: full\nlora: "
                            "{train_also: [vision_tower, embed_vision]}\n" DATA "steps: 2\n",
                            f, f, f, "");
    small_write("full.yaml", run);
    EXPECT_RUN(0, "train %s/full.yaml --device cpu", f);
    char *before = must_format("%s/model", f), *after = must_format("%s/full/model", f);
#define TOWER "model.vision_tower.encoder.layers.0.self_attn."
    EXPECT(!same_tensor(before, after, TOWER "q_proj.linear.weight"), "the tower was not trained");
    EXPECT(same_tensor(before, after, TOWER "q_proj.input_max"), "a bound was trained");
    EXPECT(!same_tensor(before, after, "model.embed_vision.embedding_projection.weight"));
    EXPECT(same_tensor(before, after, "model.embed_audio.embedding_projection.weight"));
    EXPECT(!same_tensor(before, after, "model.language_model.layers.0.mlp.up_proj.weight"));
    EXPECT_EXIT(1, "names nothing in this model",
                "train %s/full.yaml --device cpu output=%s/x 'lora.train_also=[vision_towr]'", f,
                f);
    free(run), free(before), free(after);
}

/* Alone it works; chosen by request it would be left out of soft tokens without a word. */
CASE(train, an_adapter_of_a_tower_is_applied_alone_and_not_by_request) {
    const char *f = test_folder();
    prepare();
    char *run = must_format("model: %s/model\noutput: %s/t\ndtype: f32\nmethod: lora\nlora: {rank: "
                            "4, targets: [q_proj.linear]}\n" DATA "steps: 2\n",
                            f, f, f, "");
    small_write("t.yaml", run);
    EXPECT_RUN(0, "train %s/t.yaml --device cpu", f);
    EXPECT_RUN(0,
               "generate --model %s/model --adapter %s/t/adapter --dtype f32 --device cpu "
               "--chat-format small --image %s/stone0.ppm --max-tokens 2 Which?",
               f, f, f);
    EXPECT_EXIT(1, "which requests cannot choose",
                "serve --model %s/model --adapter t=%s/t/adapter --port 0 --chat-format small", f,
                f);
    free(run);
}

/* The tokenizer is the same, the pictures' cells and the sound's features are not. */
CASE(train, media_made_for_another_model_are_refused) {
    const char *f = test_folder();
    size_t size;
    char *config, *changed, *path = small_path("model/config.json");
    prepare();
    char *data = must_format(DATA "steps: 1\n", f, "");
    write_run("first", data);
    EXPECT_RUN(0, "prepare %s/first.yaml --out %s/rows.h5", f, f);
    EXPECT_OK(file_read(&config, &size, path, 1 << 20));
    char *at = strstr(config, "\"pooling_kernel_size\": 3");
    EXPECT(at, "%s", config);
    at[strlen("\"pooling_kernel_size\": ")] = '2';
    EXPECT_OK(file_write(path, config, size));
    changed = must_format("data: {train: %s/rows.h5, max_length: 512}\nsteps: 1\n", f);
    write_run("second", changed);
    EXPECT_EXIT(1, "was made for another model", "train %s/second.yaml --device cpu", f);
    free(data), free(changed), free(config), free(path);
}

CASE(train, bad_media_name_their_row) {
    const char *f = test_folder();
    prepare();
    small_write(
        "rows.jsonl",
        "{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"image\", \"path\": "
        "\"none.png\"}]}, {\"role\": \"assistant\", \"content\": \"x\"}]}\n");
    char *data = must_format(DATA "steps: 1\n", f, "");
    write_run("bad", data);
    EXPECT_EXIT(1, "rows.jsonl:1: messages[0].content[0]: ", "train %s/bad.yaml --device cpu", f);
    EXPECT_EXIT(1, "none.png: No such file", "train %s/bad.yaml --device cpu output=%s/b2", f, f);
    EXPECT_EXIT(1, "expected 70, 140, 280, 560 or 1120",
                "train %s/bad.yaml --device cpu output=%s/b3 data.image_tokens=71", f, f);
    free(data);
}

/* The demo's rows with every chart another's picture, and absolute names. */
static void shuffle_charts(void) {
    Text out = {0};
    char *rows, *at, *root = realpath("demo/media", NULL);
    size_t size;
    EXPECT_OK(file_read(&rows, &size, "demo/media/charts.jsonl", 1 << 20));
    for (char *from = rows; *from;) {
        at = strstr(from, "\"path\": \"chart");
        text_add(&out, from, at ? (size_t)(at - from) : strlen(from));
        if (!at) break;
        int number = atoi(at + strlen("\"path\": \"chart"));
        text_addf(&out, "\"path\": \"%s/chart%d.png", root, (37 * number + 11) % 96);
        from = strstr(at, ".png") + 4;
    }
    small_write("shuffled.jsonl", out.bytes);
    text_free(&out);
    free(rows), free(root);
}

/* How many of 16 charts that training never showed are read rightly. */
static int charts_read(const char *run) {
    const char *f = test_folder();
    EXPECT_RUN(0,
               "eval --model %s/model --adapter %s/%s/adapter --tasks demo/exam/charts_exam.yaml "
               "--data demo/media/charts_exam.jsonl --dtype f32 --device cpu --chat-format small "
               "--temperature 0 --image-tokens 70",
               f, f, run);
    char *value = strstr(program_out, " none ");
    EXPECT(value, "%s", program_out);
    return (int)lround(16 * atof(value + 6));
}

/* Such a model's logits are small whatever it learns. */
#define RANDOM_MODEL "optimizer.lr=4.0e-3 optimizer.eps=1.0e-3"

CASE(train, charts_of_functions_are_read_unless_they_are_shuffled) {
    const char *f = test_folder();
    shuffle_charts();
    EXPECT_RUN(0, "init tiny %s/model --media --tokenizer demo/tokenizer --dtype f32", f);
    EXPECT_RUN(0, "train demo/charts.yaml --device cpu model=%s/model output=%s/run " RANDOM_MODEL,
               f, f);
    EXPECT_RUN(0,
               "train demo/charts.yaml --device cpu model=%s/model output=%s/other "
               "data.train=%s/shuffled.jsonl " RANDOM_MODEL,
               f, f, f);
    int read = charts_read("run"), shuffled = charts_read("other");
    EXPECT(read >= 13 && shuffled <= 10, "%d of 16 read, %d when shuffled", read, shuffled);
}
