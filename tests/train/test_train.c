/* test_train.c - whole runs of the tiny model through the program: resumed, killed, stopped,
 * refused. */
#include "formats/file.h"
#include "formats/learned_scales.h"
#include "formats/sha256.h"
#include "tests/fixture.h"
#include "tests/program.h"
#include "train/metrics.h"

#include <math.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

/* A tiny model and a run file in the test's folder; `more` are further lines. */
static void prepare(const char *more) {
    char *path = path_join(test_folder(), "run.yaml"), *text;
    EXPECT_RUN(0, "init tiny %s/model --tokenizer demo/tokenizer --dtype f32 --layers 4",
               test_folder());
    text = must_format(
        "model: %s/model\noutput: %s/out1\ndtype: f32\n"
        "data: {train: demo/gems.jsonl, eval: 0.05, max_length: 96, chat_format: small}\n"
        "batch: {sequences: 2, accumulate: 2}\nsteps: 24\neval_every: 8\nsave: {every: 3, keep: "
        "2}\n%s",
        test_folder(), test_folder(), more);
    EXPECT_OK(file_write(path, text, strlen(text)));
    free(path), free(text);
}

static void expect_same_file(const char *a, const char *b) {
    char *x = path_join(test_folder(), a), *y = path_join(test_folder(), b), hash_x[65], hash_y[65];
    EXPECT_OK(sha256_file(hash_x, x));
    EXPECT_OK(sha256_file(hash_y, y));
    EXPECT(!strcmp(hash_x, hash_y), "%s and %s differ", a, b);
    free(x), free(y);
}

/* Losses and rates of two runs, without the timings. */
static void expect_same_curve(const char *a, const char *b, int64_t steps) {
    Metrics *x, *y;
    int64_t m, n;
    char *p = path_join(test_folder(), a), *q = path_join(test_folder(), b);
    EXPECT_OK(metrics_read(&x, &m, p));
    EXPECT_OK(metrics_read(&y, &n, q));
    EXPECT(m == steps && n == steps, "%d and %d rows", (int)m, (int)n);
    for (int64_t i = 0; i < m; i++)
        EXPECT(x[i].step == i + 1 && y[i].step == i + 1 && x[i].loss == y[i].loss &&
                   x[i].lr == y[i].lr && x[i].grad_norm == y[i].grad_norm &&
                   (x[i].eval_loss == y[i].eval_loss || isnan(x[i].eval_loss)),
               "step %d", (int)i + 1);
    free(x), free(y), free(p), free(q);
}

static void resumed_equals_uninterrupted(const char *more, const char *dtype, const char *weights) {
    const char *f = test_folder();
    prepare(more);
    EXPECT_RUN(0, "train %s/run.yaml --dtype %s", f, dtype);
    /* The same run, killed hard after its first save and resumed. */
    char *save = must_format("%s/out2/checkpoints/step-3/state.h5", f),
         *yaml = must_format("%s/run.yaml", f);
    char *output = must_format("output=%s/out2", f);
    pid_t child = fork();
    if (child == 0) {
        char *null = must_format("%s/killed", f);
        if (!freopen(null, "w", stderr)) _exit(1);
        execl(program_path(), program_path(), "train", yaml, output, "--dtype", dtype,
              (char *)NULL);
        _exit(1);
    }
    for (int i = 0; i < 3000 && !file_exists(save); i++) usleep(10000);
    kill(child, SIGKILL);
    int status;
    waitpid(child, &status, 0);
    EXPECT(file_exists(save), "no save came in time");
    EXPECT_RUN(0, "train %s/run.yaml output=%s/out2 --dtype %s --resume", f, f, dtype);
    char *a = must_format("out1/%s", weights), *b = must_format("out2/%s", weights);
    expect_same_file(a, b);
    expect_same_curve("out1/metrics.csv", "out2/metrics.csv", 24);
    /* Ended while the last weights were written: there is no step left, and they are written. */
    char *newest = must_format("%s/%s", f, b);
    EXPECT(!unlink(newest), "%s", newest);
    EXPECT_RUN(0, "train %s/run.yaml output=%s/out2 --dtype %s --resume", f, f, dtype);
    expect_same_file(a, b);
    free(newest);
    free(a), free(b), free(save), free(yaml), free(output);
}

CASE(train, a_killed_and_resumed_lora_run_equals_an_uninterrupted_one) {
    resumed_equals_uninterrupted("method: lora\nlora: {rank: 4, dropout: 0.1}\n", "f32",
                                 "adapter/adapter_model.safetensors");
}

CASE(train, a_killed_and_resumed_full_run_equals_an_uninterrupted_one) {
    resumed_equals_uninterrupted("method: full\noptimizer: {lr: 1.0e-3, weight_decay: 0.1}\n",
                                 "f32", "model/model.safetensors");
}

CASE(train, eight_bit_states_resume) {
    resumed_equals_uninterrupted("method: full\noptimizer: {lr: 1.0e-3, states: 8bit}\n", "f32",
                                 "model/model.safetensors");
    EXPECT_EXIT(1, "the optimizer's states have 8 bits, but optimizer.states asks for 32",
                "train %s/run.yaml output=%s/out2 optimizer.states=f32 steps=40 --resume",
                test_folder(), test_folder());
}

/* Factors of the scales are saved beside the weights, go on in the next run, and an export proves
 * that the file holds what training computed with. */
CASE(train, learned_scales_resume_and_are_exported) {
    const char *f = test_folder();
    resumed_equals_uninterrupted("method: qat\nquant: {learned_scale: true}\n", "f32",
                                 "model/" LEARNED_SCALES);
    EXPECT_EXIT(0, "applied", "export --model %s/out1/model --to q4_0-gguf %s/a.gguf --verify", f,
                f);
    EXPECT(!strstr(program_err, "applied 0"), "%s", program_err);
    tree_remove(path_join(f, "model"));
    prepare("method: qat-lora\nquant: {learned_scale: true}\nlora: {rank: 4}\n");
    EXPECT_RUN(0, "train %s/run.yaml output=%s/out3", f, f);
    EXPECT_RUN(
        0, "export --model %s/model --adapter %s/out3/adapter --to q4_0-gguf %s/b.gguf --verify", f,
        f, f);
    EXPECT_EXIT(0, "its learned scales are left behind",
                "train %s/run.yaml output=%s/out4 lora.init=%s/out3/adapter "
                "quant.learned_scale=false steps=1",
                f, f, f);
    EXPECT_RUN(0, "train %s/run.yaml output=%s/out5 lora.init=%s/out3/adapter steps=1", f, f, f);
}

CASE(train, bf16_full_training_without_masters_resumes) {
    resumed_equals_uninterrupted(
        "method: full\noptimizer: {lr: 1.0e-3, masters: none, states: 8bit}\n", "bf16",
        "model/model.safetensors");
}

/* One layer's gradients at a time, or all of them: the same update. */
CASE(train, updates_on_the_way_back_equal_those_at_the_end) {
    static const char *const methods[] = {"full", "qat", "lora"};
    const char *f = test_folder();
    for (int i = 0; i < 3; i++) {
        char *more = must_format("method: %s\nclip: 0\non_bad_step: stop\n", methods[i]);
        tree_remove(path_join(f, "model"));
        prepare(more);
        EXPECT_RUN(0, "train %s/run.yaml batch.accumulate=1 steps=6 output=%s/end%d", f, f, i);
        EXPECT_RUN(0,
                   "train %s/run.yaml batch.accumulate=1 steps=6 output=%s/way%d "
                   "optimizer.fused=true",
                   f, f, i);
        const char *file = i == 2 ? "adapter/adapter_model.safetensors" : "model/model.safetensors";
        char *a = must_format("end%d/%s", i, file), *b = must_format("way%d/%s", i, file);
        expect_same_file(a, b);
        free(a), free(b), free(more);
    }
    EXPECT_EXIT(1, "needs batch.accumulate: 1",
                "train %s/run.yaml optimizer.fused=true output=%s/no", f, f);
}

CASE(train, bf16_full_training_resumes_from_f32_masters) {
    resumed_equals_uninterrupted("method: full\nrecompute: on\n", "bf16",
                                 "model/model.safetensors");
}

CASE(train, sigterm_saves_and_exits_143) {
    const char *f = test_folder();
    prepare("method: lora\n");
    char *yaml = must_format("%s/run.yaml", f), *csv = must_format("%s/out1/metrics.csv", f);
    pid_t child = fork();
    if (child == 0) {
        char *null = must_format("%s/stopped", f);
        if (!freopen(null, "w", stderr)) _exit(1);
        execl(program_path(), program_path(), "train", yaml, "steps=100000", "save.every=100000",
              (char *)NULL);
        _exit(1);
    }
    Metrics *rows = NULL;
    int64_t count = 0;
    for (int i = 0; i < 3000 && count < 2; i++) {
        usleep(10000);
        if (file_exists(csv) && metrics_read(&rows, &count, csv) != OK) count = 0;
    }
    kill(child, SIGTERM);
    int status;
    waitpid(child, &status, 0);
    EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 143, "status %x", status);
    EXPECT_OK(metrics_read(&rows, &count, csv));
    char *save = must_format("%s/out1/checkpoints/step-%d/state.h5", f, (int)count);
    EXPECT(file_exists(save), "%s is missing", save);
    EXPECT_RUN(0, "train %s/run.yaml steps=%d --resume", f, (int)count + 2);
}

CASE(train, the_loss_falls_for_every_method) {
    static const char *const methods[] = {
        "method: full\noptimizer: {lr: 3.0e-3}\n",
        "method: full\noptimizer: {lr: 3.0e-3, states: 8bit}\n",
        "method: full\noptimizer: {name: sgd, lr: 0.3, momentum: 0.9}\n",
        "method: lora\nlora: {rank: 16}\noptimizer: {lr: 1.0e-2}\n",
        "method: lora\nlora: {rank: 8, dora: true, train_also: [norm]}\noptimizer: {lr: 1.0e-2}\n"};
    for (size_t i = 0; i < sizeof methods / sizeof *methods; i++) {
        Metrics *rows;
        int64_t count;
        char *text = must_format("schedule: {name: constant, warmup: 0}\n%s", methods[i]);
        if (i) tree_remove(path_join(test_folder(), "model"));
        prepare(text);
        EXPECT_RUN(0, "train %s/run.yaml steps=40 output=%s/m%d data.eval=null", test_folder(),
                   test_folder(), (int)i);
        char *csv = must_format("%s/m%d/metrics.csv", test_folder(), (int)i);
        EXPECT_OK(metrics_read(&rows, &count, csv));
        EXPECT(count == 40 && rows[39].loss < rows[0].loss - 0.2, "%s: from %g to %g", methods[i],
               rows[0].loss, rows[39].loss);
        free(rows), free(csv), free(text);
    }
}

/* A model with experts, from the reference's own config.json. */
CASE(train, experts_train_with_and_without_adapters_on_them) {
    const char *f = test_folder();
    Fixture fixture = fixture_open("model_26b-a4b.h5");
    char *path = must_format("%s/config.json", fixture.dir), *text, *vocab;
    size_t size;
    EXPECT_OK(file_read(&text, &size, path, 1 << 20));
    while ((vocab = strstr(text, ": 80")))
        memcpy(vocab, ":2e3", 4); /* room for the small tokenizer */
    EXPECT_OK(file_write(path, text, size));
    EXPECT_RUN(0, "init %s %s/moe --tokenizer demo/tokenizer --dtype f32", path, f);
    static const char *const methods[] = {"method=lora lora.experts=true moe.train_router=true",
                                          "method=full"};
    prepare("optimizer: {lr: 1.0e-2}\nschedule: {name: constant, warmup: 0}\n");
    for (int i = 0; i < 2; i++) {
        Metrics *rows;
        int64_t count;
        EXPECT_RUN(0, "train %s/run.yaml model=%s/moe output=%s/moe%d moe.aux_loss=0.01 %s", f, f,
                   f, i, methods[i]);
        char *csv = must_format("%s/moe%d/metrics.csv", f, i);
        EXPECT_OK(metrics_read(&rows, &count, csv));
        EXPECT(rows[count - 1].loss < rows[0].loss - 0.1 && rows[0].aux_loss >= 2.9,
               "loss %g to %g, balancing loss %g", rows[0].loss, rows[count - 1].loss,
               rows[0].aux_loss);
        free(rows), free(csv);
    }
    ExpertShare *shares;
    int64_t share_count;
    char *experts = must_format("%s/moe0/experts.csv", f);
    EXPECT_OK(expert_shares_read(&shares, &share_count, experts));
    EXPECT(share_count == 24 * 4 && shares[0].most >= 1 && shares[0].least <= 1, "%d shares",
           (int)share_count);
    free(shares), free(experts);
    EXPECT_RUN(0, "score --model %s/moe --adapter %s/moe0/adapter --dtype f32 hello", f, f);
    free(path), free(text);
}

static double eval_before_training(void) {
    double loss = -1;
    char *line = strstr(program_err, "eval loss before training: ");
    EXPECT(line && sscanf(line, "eval loss before training: %lf", &loss) == 1);
    return loss;
}

/* DoRA computes with a factor that follows its values: evaluations must see the newest. */
CASE(train, evaluations_use_the_newest_adapter) {
    const char *f = test_folder();
    Metrics *rows;
    int64_t count;
    prepare("optimizer: {lr: 3.0e-2}\nschedule: {name: constant, warmup: 0}\n");
    EXPECT_RUN(0, "train %s/run.yaml output=%s/lora steps=1", f, f);
    double base = eval_before_training();
    EXPECT_RUN(0, "train %s/run.yaml output=%s/dora steps=4 eval_every=4 lora.dora=true", f, f);
    EXPECT_CLOSE(eval_before_training(), base, 1e-3);
    char *csv = must_format("%s/dora/metrics.csv", f);
    EXPECT_OK(metrics_read(&rows, &count, csv));
    EXPECT_RUN(0, "train %s/run.yaml output=%s/more steps=1 lora.init=%s/dora/adapter", f, f, f);
    EXPECT_CLOSE(eval_before_training(), rows[3].eval_loss, 1e-3);
    EXPECT(fabs(rows[3].eval_loss - base) > 0.05, "%g, %g before", rows[3].eval_loss, base);
    free(rows), free(csv);
}

/* Questions asked during training get the answers that the saved adapter gives later. */
CASE(train, tasks_are_asked_on_the_way) {
    const char *f = test_folder();
    char *csv, *bytes;
    size_t size;
    int rows = 0;
    prepare(
        "method: lora\nlora: {rank: 8}\noptimizer: {lr: 1.0e-2}\neval_tasks: {names: "
        "[demo/exam/gems_choice.yaml, demo/exam/gems_answer.yaml], data: demo/exam, limit: 6}\n");
    EXPECT_RUN(0, "train %s/run.yaml output=%s/asked steps=5 eval_every=3", f, f);
    csv = must_format("%s/asked/tasks.csv", f);
    EXPECT_OK(file_read(&bytes, &size, csv, 1 << 20));
    EXPECT(strstr(bytes, "step,task,metric,filter,value,stderr\n0,gems_choice,acc,none,") == bytes,
           "%s", bytes);
    for (size_t i = 0; i < size; i++) rows += bytes[i] == '\n';
    EXPECT(rows == 1 + 3 * 3 && strstr(bytes, "\n3,gems_answer,exact_match,") &&
               strstr(bytes, "\n5,gems_choice,acc_norm,"),
           "%s", bytes);
    EXPECT_RUN(0,
               "eval --model %s/model --adapter %s/asked/adapter --dtype f32 --chat-format small "
               "--tasks demo/exam/gems_choice.yaml,demo/exam/gems_answer.yaml --data demo/exam "
               "--limit 6 --out %s/later",
               f, f, f);
    expect_same_file("later/samples_gems_choice.jsonl",
                     "asked/tasks/step-5/samples_gems_choice.jsonl");
    expect_same_file("later/samples_gems_answer.jsonl",
                     "asked/tasks/step-5/samples_gems_answer.jsonl");
    EXPECT_EXIT(2, "no task 'gsm9k'", "train %s/run.yaml output=%s/wrong eval_tasks.names=gsm9k", f,
                f);
    EXPECT_EXIT(1, "no questions for task 'gsm8k'",
                "train %s/run.yaml output=%s/wrong2 eval_tasks.names=gsm8k", f, f);
    free(csv), free(bytes);
}

CASE(train, folders_with_a_run_and_folders_without_are_told_apart) {
    const char *f = test_folder();
    prepare("method: lora\n");
    EXPECT_RUN(1, "train %s/run.yaml --resume", f);
    EXPECT(strstr(program_err, "holds no run to resume"));
    /* one that could not begin does not count */
    EXPECT_EXIT(1, "none.jsonl: cannot be opened", "train %s/run.yaml data.train=none.jsonl", f);
    EXPECT_RUN(0, "train %s/run.yaml steps=1", f);
    EXPECT_EXIT(1, "already holds a run", "train %s/run.yaml steps=1", f);
}

CASE(train, outputs_load_everywhere_they_are_named) {
    const char *f = test_folder();
    prepare("method: lora\nlora: {rank: 4}\n");
    EXPECT_RUN(0, "train %s/run.yaml", f);
    EXPECT_RUN(1, "train %s/run.yaml", f);
    EXPECT(strstr(program_err, "already holds a run"));
    static const char *const left[] = {"adapter/adapter_config.json",
                                       "best/adapter_model.safetensors",
                                       "run.yaml",
                                       "data.h5",
                                       "metrics.csv",
                                       "report.svg",
                                       "checkpoints/step-24/state.h5",
                                       "checkpoints/step-21/adapter/adapter_model.safetensors"};
    for (size_t i = 0; i < sizeof left / sizeof *left; i++) {
        char *path = must_format("%s/out1/%s", f, left[i]);
        EXPECT(file_exists(path), "%s is missing", path);
        free(path);
    }
    EXPECT_RUN(0, "inspect %s/out1 --json", f);
    EXPECT_RUN(0, "inspect %s/out1/adapter", f);
    EXPECT_RUN(0, "inspect %s/out1/data.h5", f);
    EXPECT_RUN(0, "inspect %s/model", f);
    EXPECT_RUN(0, "doctor %s/run.yaml", f);
    EXPECT(strstr(program_out, "checks:"));
    EXPECT_RUN(0, "plot %s/out1 --out %s/plot.svg", f, f);
    EXPECT_RUN(0,
               "generate --model %s/model --adapter %s/out1/adapter --dtype f32 --chat-format "
               "small --max-tokens 4 --json hi",
               f, f);
    EXPECT(strstr(program_out, "\"message\": {"));
    EXPECT_RUN(
        0,
        "export --model %s/model --adapter %s/out1/adapter --to safetensors --dtype f32 %s/merged",
        f, f, f);
    EXPECT_RUN(0, "export --model %s/model --adapter %s/out1/adapter --to peft %s/again", f, f, f);
    expect_same_file("out1/adapter/adapter_model.safetensors", "again/adapter_model.safetensors");
    EXPECT_RUN(0, "score --model %s/merged --dtype f32 \"Topaz has a hardness of 8.\"", f);
    double merged_nll = 0, apart_nll = 1;
    EXPECT(sscanf(program_out, "{\"tokens\": %*d, \"nll\": %lf", &merged_nll) == 1, "%s",
           program_out);
    EXPECT_RUN(0,
               "score --model %s/model --adapter %s/out1/adapter --dtype f32 \"Topaz has a "
               "hardness of 8.\"",
               f, f);
    EXPECT(sscanf(program_out, "{\"tokens\": %*d, \"nll\": %lf", &apart_nll) == 1, "%s",
           program_out);
    EXPECT_CLOSE(merged_nll, apart_nll, 1e-3);
}
