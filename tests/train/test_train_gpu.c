/* test_train_gpu.c - whole runs with --device cuda: on the GPU of a CUDA build, else on the
 * emulator. */
#include "formats/file.h"
#include "formats/sha256.h"
#include "tests/program.h"
#include "train/metrics.h"

#include <math.h>
#include <unistd.h>

/* The program that has a device `cuda`, from here on. */
static void take_gpu_program(void) {
    const char *path = getenv("LAPIDARY_GPU_PROGRAM");
    if (!path || access(path, X_OK)) SKIP("no program with a GPU or its emulator");
    setenv("LAPIDARY_PROGRAM", path, 1);
}

static bool is_emulated(void) {
    return strstr(program_path(), "simt") != NULL;
}

static void prepare(const char *more) {
    char *path = path_join(test_folder(), "run.yaml");
    EXPECT_RUN(0, "init tiny %s/model --tokenizer demo/tokenizer --dtype f32 --layers 2",
               test_folder());
    char *text =
        must_format("model: %s/model\noutput: %s/cpu\ndtype: f32\nmethod: lora\nlora: {rank: 4}\n"
                    "data: {train: demo/gems.jsonl, max_length: 32, chat_format: small}\n"
                    "batch: {sequences: 1, accumulate: 1}\nsteps: 6\nsave: {every: 2, keep: 9}\n"
                    "optimizer: {eps: 1.0e-2}\n%s",
                    test_folder(), test_folder(), more);
    EXPECT_OK(file_write(path, text, strlen(text)));
    free(path), free(text);
}

static void expect_near_curves(const char *a, const char *b, double tolerance) {
    Metrics *x, *y;
    int64_t m, n;
    char *p = path_join(test_folder(), a), *q = path_join(test_folder(), b);
    EXPECT_OK(metrics_read(&x, &m, p));
    EXPECT_OK(metrics_read(&y, &n, q));
    EXPECT(m == n && m > 0, "%d and %d rows", (int)m, (int)n);
    for (int64_t i = 0; i < m; i++)
        EXPECT(fabs(x[i].loss - y[i].loss) <= tolerance * fabs(x[i].loss),
               "step %d: loss %.7f and %.7f", (int)i + 1, x[i].loss, y[i].loss);
    free(x), free(y), free(p), free(q);
}

static void expect_same_adapters(const char *a, const char *b) {
    char *x = must_format("%s/%s/adapter/adapter_model.safetensors", test_folder(), a),
         *y = must_format("%s/%s/adapter/adapter_model.safetensors", test_folder(), b), one[65],
         other[65];
    EXPECT_OK(sha256_file(one, x));
    EXPECT_OK(sha256_file(other, y));
    EXPECT(!strcmp(one, other), "%s and %s differ", x, y);
    free(x), free(y);
}

/* Fifty steps on a GPU; the emulator takes a while for six. */
CASE(gpu, training_follows_the_cpu_and_repeats_bit_by_bit) {
    static const struct {
        const char *dtype;
        double tolerance;
    } kinds[] = {{"f32", 1e-4}, {"bf16", 1e-2}};
    const char *f = test_folder();
    prepare("");
    char *cpu = must_format("%s", program_path());
    take_gpu_program();
    int steps = is_emulated() ? 6 : 50;
    for (int i = 0; i < 2; i++) {
        char *set = must_format("steps=%d dtype=%s", steps, kinds[i].dtype);
        setenv("LAPIDARY_PROGRAM", cpu, 1);
        EXPECT_RUN(0, "train %s/run.yaml %s output=%s/cpu%d", f, set, f, i);
        take_gpu_program();
        EXPECT_RUN(0, "train %s/run.yaml --device cuda %s output=%s/one%d", f, set, f, i);
        setenv("LAPIDARY_SIMT_ORDER", "reversed", 1);
        EXPECT_RUN(0, "train %s/run.yaml --device cuda %s output=%s/two%d", f, set, f, i);
        unsetenv("LAPIDARY_SIMT_ORDER");
        free(set);
    }
    expect_near_curves("cpu0/metrics.csv", "one0/metrics.csv", kinds[0].tolerance);
    expect_near_curves("cpu1/metrics.csv", "one1/metrics.csv", kinds[1].tolerance);
    expect_same_adapters("one0", "two0");
    expect_same_adapters("one1", "two1");
    free(cpu);
}

CASE(gpu, a_lost_gpu_ends_the_run_and_it_goes_on_where_it_was_saved) {
    const char *f = test_folder();
    prepare("");
    take_gpu_program();
    if (!is_emulated()) SKIP("a real GPU is not lost on demand");
    EXPECT_RUN(0, "train %s/run.yaml --device cuda output=%s/whole", f, f);
    char *saved = must_format("%s/cut/checkpoints", f), *cut = must_format("%s/cut", f);
    int lost = 0; /* in the last steps, and while the last weights are written */
    for (int calls = 1400;; calls += 40) {
        char *most = must_format("%d", calls);
        setenv("LAPIDARY_SIMT_FAIL", "lost", 1);
        setenv("LAPIDARY_SIMT_CALLS", most, 1);
        int status = program_run("train %s/run.yaml --device cuda output=%s/cut", f, f);
        unsetenv("LAPIDARY_SIMT_FAIL");
        free(most);
        if (!status) break;
        EXPECT(status == 1, "exit status %d: %s", status, program_err);
        lost++;
        EXPECT(strstr(program_err, "the GPU stopped working") && strstr(program_err, "--resume"),
               "%s", program_err);
        EXPECT(file_exists(saved), "nothing was saved before: %s", program_err);
        EXPECT_RUN(0, "train %s/run.yaml --device cuda output=%s/cut --resume", f, f);
        expect_same_adapters("whole", "cut");
        tree_remove(cut);
    }
    EXPECT(lost > 3, "lost %d times", lost);
    free(cut);
    free(saved);
}

CASE(gpu, what_is_in_the_way_is_said) {
    static const char *const failures[][2] = {
        {"driver", "the driver is for CUDA 11.4, this program needs 13.0 or newer"},
        {"none", "there is no NVIDIA GPU"},
        {"old", "has compute capability 7.0, this program needs 8.0"},
        {"memory", "out of memory"},
        {"image", "no code for this GPU's architecture"},
        {"lost", "the GPU stopped working"},
    };
    const char *f = test_folder();
    EXPECT_RUN(0, "init tiny %s/model --tokenizer demo/tokenizer --layers 2", f);
    take_gpu_program();
    EXPECT_EXIT(1, "there are", "generate --model %s/model --raw --max-tokens 1 --device cuda:7 a",
                f);
    if (!is_emulated()) return;
    for (size_t i = 0; i < sizeof failures / sizeof *failures; i++) {
        setenv("LAPIDARY_SIMT_FAIL", failures[i][0], 1);
        EXPECT_EXIT(1, failures[i][1],
                    "generate --model %s/model --raw --max-tokens 1 --device cuda a", f);
        if (i > 2) continue; /* with auto the CPU takes over where a GPU cannot be opened */
        EXPECT_RUN(0, "generate --model %s/model --raw --max-tokens 1 --device auto a", f);
        EXPECT((strstr(program_err, "using the CPU") != NULL) == (i != 1), "%s", program_err);
    }
}

/* The GPU's side of a bench as the emulator notes it: memory of an H200, no kernel run. */
static void expect_launches(const char *preset, const char *what, const char *kernel) {
    char *path = must_format("%s/%s%s.txt", test_folder(), preset, what), *text = NULL;
    size_t size;
    setenv("LAPIDARY_SIMT_LAUNCHES", path, 1);
    EXPECT_EXIT(0, "\"device_gb\"", "bench --preset %s %s --device cuda", preset, what);
    unsetenv("LAPIDARY_SIMT_LAUNCHES");
    EXPECT_OK(file_read(&text, &size, path, 1 << 20));
    EXPECT(strstr(text, kernel), "%s %s: no launch of %s in\n%s", preset, what, kernel, text);
    free(text), free(path);
}

/* Grids, threads, shared memory and the whole of the device's memory, at 4,096 tokens. */
CASE(gpu, launches_of_released_shapes_fit) {
    static const char *const presets[] = {"e2b", "e4b", "12b", "26b-a4b", "31b"};
    take_gpu_program();
    if (!is_emulated()) SKIP("a GPU runs what it is given");
    for (size_t i = 0; i < sizeof presets / sizeof *presets; i++) {
        expect_launches(presets[i], "--weights bf16 --tokens 4", "attend");
        expect_launches(presets[i], "--train lora --tokens 4096", "attention_slopes");
        expect_launches(presets[i], "--train full --tokens 4096 --lean --recompute", "adamw");
    }
    expect_launches("e2b", "--train qlora --tokens 4096", "query_products");
    expect_launches("26b-a4b", "--train qlora --tokens 4096", "backward_weighted");
    expect_launches("26b-a4b", "--weights q4_0 --tokens 4", "few_rows");
}
