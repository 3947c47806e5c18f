/* test_ranks.c - runs of several ranks under mpirun: the losses of one process, whatever their
 * number, and what ends them. */
#include "data/store.h"
#include "formats/file.h"
#include "formats/sha256.h"
#include "tests/fixture.h"
#include "tests/program.h"
#include "tests/small_media.h"
#include "train/metrics.h"

#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#define MPIRUN "mpirun --allow-run-as-root --oversubscribe --bind-to none"

static const char *alone; /* the program as one process */

/* From here on the program runs as so many ranks; 1: as one process without MPI. */
static void take_ranks(int ranks) {
    if (!alone) alone = must_format("%s", program_path());
    char *line =
        ranks == 1 ? must_format("%s", alone) : must_format(MPIRUN " -n %d %s", ranks, alone);
    setenv("LAPIDARY_PROGRAM", line, 1);
    free(line);
}

/* A tiny model, whose run file says 30 steps of four micro-batches. Four ranks on two processors
 * are no place for threads that wait actively. */
static void prepare(const char *model) {
    const char *f = test_folder();
    if (system("command -v mpirun >/dev/null 2>&1")) SKIP("no mpirun");
    setenv("OMP_NUM_THREADS", "1", 1);
    setenv("OMP_WAIT_POLICY", "passive", 1);
    take_ranks(1);
    EXPECT_RUN(0, "init %s %s/model --tokenizer demo/tokenizer --dtype f32%s", model, f,
               strcmp(model, "tiny") ? "" : " --layers 4");
    char *path = path_join(f, "run.yaml"),
         *text =
             must_format("model: %s/model\noutput: %s/out\ndtype: f32\n"
                         "data: {train: demo/gems.jsonl, eval: 0.02, max_length: 64, chat_format: "
                         "small}\n"
                         "batch: {sequences: 1, accumulate: 4}\nsteps: 30\neval_every: 10\n"
                         "save: {every: 50, keep: 9}\noptimizer: {lr: 1.0e-4, eps: 1.0e-2}\n",
                         f, f);
    EXPECT_OK(file_write(path, text, strlen(text)));
    free(path), free(text);
    take_ranks(2);
    program_run("train %s/none.yaml", f);
    if (strstr(program_output(), "has no MPI")) SKIP("this build has no MPI");
}

/* Losses, the first within 1e-6 and all within 1e-5 of those of `one`. */
static void expect_near(const char *one, const char *other) {
    Metrics *x, *y;
    int64_t m, n;
    char *a = must_format("%s/%s/metrics.csv", test_folder(), one),
         *b = must_format("%s/%s/metrics.csv", test_folder(), other);
    EXPECT_OK(metrics_read(&x, &m, a));
    EXPECT_OK(metrics_read(&y, &n, b));
    EXPECT(m == n && m >= 2, "%d and %d steps", (int)m, (int)n);
    for (int i = 0; i < m; i++) {
        double error = fabs(x[i].loss - y[i].loss) / fabs(x[i].loss);
        EXPECT(error <= (i ? 1e-5 : 1e-6), "%s: loss %d is off by %.1e", other, i + 1, error);
        EXPECT(x[i].tokens == y[i].tokens && x[i].trained_tokens == y[i].trained_tokens,
               "%s: step %d has other rows", other, i + 1);
        if (isnan(x[i].eval_loss)) continue;
        error = fabs(x[i].eval_loss - y[i].eval_loss) / fabs(x[i].eval_loss);
        EXPECT(error <= 1e-5, "%s: the evaluation at %d is off by %.1e", other, i + 1, error);
    }
    free(x), free(y), free(a), free(b);
}

static void expect_same_bits(const char *a, const char *b) {
    char *x = path_join(test_folder(), a), *y = path_join(test_folder(), b), hash_x[65], hash_y[65];
    EXPECT_OK(sha256_file(hash_x, x));
    EXPECT_OK(sha256_file(hash_y, y));
    EXPECT(!strcmp(hash_x, hash_y), "%s and %s differ", a, b);
    free(x), free(y);
}

/* One process alone, in folder `name`. */
static void run_alone(const char *name, const char *more) {
    const char *f = test_folder();
    take_ranks(1);
    EXPECT_RUN(0, "train %s/run.yaml output=%s/%s %s", f, f, name, more);
}

/* The same run on so many ranks, which share it as `parallel` says; the folder's name. */
static const char *compare(const char *one, int ranks, const char *more, const char *parallel) {
    static char other[64];
    const char *f = test_folder();
    static int count;
    snprintf(other, sizeof other, "%s-%d", one, ++count);
    take_ranks(ranks);
    EXPECT_RUN(0, "train %s/run.yaml output=%s/%s %s %s", f, f, other, more, parallel);
    expect_near(one, other);
    return other;
}

static char *model_file(const char *run) {
    return must_format("%s/model/model.safetensors", run);
}

#define FULL "method=full optimizer.lr=3e-5"

CASE(ranks, full_training_has_the_losses_of_one_process) {
    prepare("tiny");
    run_alone("full", FULL);
    compare("full", 2, FULL, "");
    compare("full", 4, FULL, "");
    char *one = model_file(compare("full", 3, FULL, "")),
         *again = model_file(compare("full", 3, FULL, "")),
         *whole = model_file(compare("full", 3, FULL, "parallel.shard=0"));
    expect_same_bits(one, again);
    expect_same_bits(one, whole);
    free(one), free(again), free(whole);
}

/* Gradients and values shared out too; and within pairs of ranks only. */
CASE(ranks, levels_have_the_losses_of_one_process) {
    prepare("tiny");
    run_alone("full", FULL);
    char *gradients = model_file(compare("full", 3, FULL, "parallel.shard=2")),
         *values = model_file(compare("full", 3, FULL, "parallel.shard=3 recompute=on"));
    expect_same_bits(gradients, values);
    compare("full", 4, FULL, "parallel.shard=3 parallel.within=2");
    free(gradients), free(values);
    run_alone("half", FULL " dtype=bf16 steps=6");
    take_ranks(3);
    const char *f = test_folder();
    EXPECT_RUN(0, "train %s/run.yaml output=%s/half3 " FULL " dtype=bf16 steps=6 parallel.shard=3",
               f, f);
    Metrics *a, *b;
    int64_t n, m;
    char *x = must_format("%s/half/metrics.csv", f), *y = must_format("%s/half3/metrics.csv", f);
    EXPECT_OK(metrics_read(&a, &n, x));
    EXPECT_OK(metrics_read(&b, &m, y));
    EXPECT(n == 6 && m == 6);
    for (int i = 0; i < 6; i++)
        EXPECT(fabs(a[i].loss - b[i].loss) < 2e-4 * a[i].loss, "loss %d: %g, %g", i + 1, a[i].loss,
               b[i].loss);
    free(a), free(b), free(x), free(y);
}

CASE(ranks, adapters_have_the_losses_of_one_process) {
    prepare("tiny");
    run_alone("lora", "method=lora lora.rank=4 lora.dropout=0.1");
    compare("lora", 2, "method=lora lora.rank=4 lora.dropout=0.1", "");
    run_alone("dora", "method=lora lora.rank=4 lora.dora=true steps=10");
    compare("dora", 3, "method=lora lora.rank=4 lora.dora=true steps=10", "parallel.shard=3");
    run_alone("qlora", "method=qlora lora.rank=4 optimizer.states=8bit");
    compare("qlora", 4, "method=qlora lora.rank=4 optimizer.states=8bit", "parallel.shard=2");
    compare("qlora", 2, "method=qlora lora.rank=4 optimizer.states=8bit", "parallel.shard=3");
    run_alone("qat", "method=qat steps=10");
    compare("qat", 3, "method=qat steps=10", "parallel.shard=2");
}

/* The rows of a micro-batch over ranks: in windows of 6 keys and without, more rows than a rank
 * has, and fewer rows than ranks. */
CASE(ranks, shared_rows_have_the_losses_of_one_process) {
    prepare("tiny");
    const char *lora = "method=lora lora.rank=4 data.max_length=512 batch.accumulate=2 steps=6";
    run_alone("long", lora);
    compare("long", 4, lora, "parallel.context=4");
    run_alone("full", FULL);
    compare("full", 4, FULL, "parallel.context=2 parallel.shard=2");
    run_alone("apart", FULL " data.packing=false data.max_length=256 steps=3");
    compare("apart", 4, FULL " data.packing=false data.max_length=256 steps=3",
            "parallel.context=4");
}

/* A model with experts, small enough for the small tokenizer. */
static void prepare_experts(void) {
    Fixture fixture = fixture_open("model_26b-a4b.h5");
    char *path = path_join(fixture.dir, "config.json"), *text, *vocab;
    size_t size;
    EXPECT_OK(file_read(&text, &size, path, 1 << 20));
    while ((vocab = strstr(text, ": 80")))
        memcpy(vocab, ":2e3", 4); /* room for the small tokenizer */
    EXPECT_OK(file_write(path, text, size));
    prepare(path);
    free(path), free(text);
}

#define EXPERTS "method=lora lora.rank=4 lora.experts=true moe.train_router=true moe.aux_loss=0.01"

CASE(ranks, experts_have_the_losses_of_one_process) {
    prepare_experts();
    run_alone("moe", EXPERTS);
    compare("moe", 3, EXPERTS, "");
    compare("moe", 4, EXPERTS, "parallel.experts=4");
    EXPECT(strstr(program_err, "rows for the experts of each rank, 1 being an even share: "), "%s",
           program_err);
    compare("moe", 2, EXPERTS, "parallel.experts=2 parallel.shard=0");
    compare("moe", 4, EXPERTS, "parallel.context=4");
}

/* Experts, rows and values over four ranks; then their run goes on with three, with one, and that
 * one's with two that have the experts between them. */
CASE(ranks, experts_rows_and_values_at_once_and_a_run_that_changes_ranks) {
    const char *f = test_folder(), *full = FULL " moe.aux_loss=0.01 save.keep=2 ";
    prepare_experts();
    run_alone("moe", full);
    char *first = must_format("%ssteps=10 schedule.name=constant", full),
         *second = must_format("%ssteps=20 schedule.name=constant", full),
         *third = must_format("%ssteps=30 schedule.name=constant", full);
    take_ranks(1);
    EXPECT_RUN(0, "train %s/run.yaml output=%s/one %s", f, f, third);
    take_ranks(4);
    EXPECT_RUN(0,
               "train %s/run.yaml output=%s/parts %s parallel.experts=2 parallel.context=2 "
               "parallel.shard=3",
               f, f, first);
    take_ranks(3);
    EXPECT_RUN(0, "train %s/run.yaml output=%s/parts %s --resume parallel.shard=2", f, f, second);
    take_ranks(2);
    EXPECT_RUN(0, "train %s/run.yaml output=%s/parts %s --resume parallel.experts=2", f, f, third);
    expect_near("one", "parts");
    take_ranks(8);
    EXPECT_EXIT(1, "a divisor of the model's 8 experts that leaves two or more to each rank",
                "train %s/run.yaml output=%s/many %s batch.accumulate=8 parallel.experts=8", f, f,
                full);
    free(first), free(second), free(third);
}

/* Pictures, a tone, and a picture that a tool shows: micro-batches over ranks, and their rows. */
CASE(ranks, media_have_the_losses_of_one_process) {
    const char *f = test_folder();
    prepare("tiny --media");
    small_media_rows();
    char *media = must_format("data.train=%s/rows.jsonl data.eval=null data.max_length=256 "
                              "data.image_tokens=70 steps=6 method=lora lora.rank=4 "
                              "lora.train_also=[embedding_projection]",
                              f);
    run_alone("media", media);
    compare("media", 3, media, "parallel.shard=2");
    compare("media", 2, media, "parallel.context=2");
    free(media);
}

/* On the emulator each rank has a GPU, and MPI's messages stand for NCCL's. */
CASE(ranks, gpus_have_the_losses_of_one) {
    prepare_experts();
    const char *few = EXPERTS " steps=2 batch.accumulate=2 data.max_length=24 data.eval=1e-9 "
                              "--device cuda:0";
    alone = must_format("%s", getenv("LAPIDARY_GPU_PROGRAM"));
    run_alone("gpu", few);
    compare("gpu", 2, few, "parallel.experts=2 parallel.context=2 parallel.shard=3");
    EXPECT(strstr(program_err, "between GPUs directly, by NCCL"), "%s", program_err);
}

/* Starts two ranks in folder `name`, their output in NAME.txt, and once there is a save sends the
 * second a signal; the status that mpirun ends with. */
static int signal_second(const char *name, const char *more, const char *signal) {
    const char *f = test_folder();
    char *line = must_format(
             MPIRUN " -n 2 sh -c 'echo $$ >%s/pid.$OMPI_COMM_WORLD_RANK; exec %s train "
                    "%s/run.yaml output=%s/%s method=full save.every=5 %s' >%s/%s.txt 2>&1",
             f, alone, f, f, name, more, f, name),
         *saved = must_format("%s/%s/checkpoints/step-5/state.h5", f, name),
         *stop = must_format("kill -%s $(cat %s/pid.1)", signal, f);
    pid_t child = fork();
    if (!child) _exit(system(line) ? 1 : 0);
    for (int i = 0; i < 6000 && !file_exists(saved); i++) usleep(5000);
    EXPECT(file_exists(saved), "no save came in time");
    EXPECT(!system(stop), "the second rank is gone already");
    int status = 0, ended = 0;
    for (int i = 0; i < 300 && !ended; i++) {
        usleep(100000);
        ended = waitpid(child, &status, WNOHANG);
    }
    EXPECT(ended && WIFEXITED(status), "the run does not end");
    free(line), free(saved), free(stop);
    return WEXITSTATUS(status);
}

/* A rank is killed: the run ends, and three ranks go on where it was. */
CASE(ranks, a_killed_rank_ends_the_run_and_others_resume_it) {
    const char *f = test_folder();
    prepare("tiny");
    take_ranks(1);
    EXPECT_RUN(0, "train %s/run.yaml output=%s/one method=full", f, f);
    EXPECT(signal_second("two", "", "KILL") == 1, "the run ends well");
    take_ranks(3);
    EXPECT_RUN(0, "train %s/run.yaml output=%s/two method=full --resume", f, f);
    expect_near("one", "two");
}

/* A rank that stops without ending: the other says which, and ends the run. */
CASE(ranks, a_rank_that_does_not_answer_ends_the_run) {
    char *said = must_format("%s/stuck.txt", test_folder()), *text;
    size_t size;
    prepare("tiny");
    EXPECT(signal_second("stuck", "parallel.timeout=2", "STOP") == 1, "the run ends well");
    EXPECT_OK(file_read(&text, &size, said, 1 << 20));
    EXPECT(strstr(text, "lapidary: rank 1 has not answered rank 0 for 2 s"), "%s", text);
    free(said), free(text);
}

/* The second of two ranks cannot write its part of a save: the run ends and says which, and why. */
CASE(ranks, a_full_disk_of_one_rank_ends_the_run) {
    const char *f = test_folder();
    prepare("tiny");
    char *line = must_format(MPIRUN " -n 2 sh -c 'if [ $OMPI_COMM_WORLD_RANK = 1 ]; then trap \"\" "
                                    "XFSZ; ulimit -f 1000; fi; exec %s train %s/run.yaml "
                                    "output=%s/full " FULL " save.every=5' >%s/full.txt 2>&1",
                             alone, f, f, f),
         *said = must_format("%s/full.txt", f),
         *save = must_format("%s/full/checkpoints/step-5", f), *text;
    size_t size;
    EXPECT(system(line), "the run ends well");
    EXPECT_OK(file_read(&text, &size, said, 1 << 20));
    EXPECT(strstr(text, "lapidary: rank 1: ") && strstr(text, "state-1.h5"), "%s", text);
    EXPECT(!file_exists(save), "a save without all of its parts");
    free(line), free(said), free(save), free(text);
}

/* Two ranks on each of two hosts (tests/hosts.sh); then, in another run, the cable between them
 * goes once there is a save: all ranks end, and three on one host go on. Open MPI's mpirun itself
 * waits for the host that it cannot reach, and is ended here. */
CASE(ranks, two_hosts_and_a_cut_link) {
    const char *f = test_folder();
    prepare("tiny");
    int id = (int)getpid(), status = 0;
    char *up = must_format("tests/hosts.sh up %d", id),
         *down = must_format("tests/hosts.sh down %d", id),
         *cut = must_format("tests/hosts.sh cut %d", id),
         *left = must_format(
             "for p in $(ip netns pids lapidary-%d-a) $(ip netns pids lapidary-%d-b); do "
             "cat /proc/$p/comm; done 2>/dev/null | grep -q '^lapidary'",
             id, id),
         *hosts = must_format("tests/hosts.sh run %d -n 4 %s", id, alone),
         *line =
             must_format("exec %s train %s/run.yaml output=%s/cut method=full optimizer.lr=3e-5 "
                         "parallel.timeout=1 save.every=5 "
                         ">%s/cut.txt 2>&1",
                         hosts, f, f, f),
         *saved = must_format("%s/cut/checkpoints/step-5/state.h5", f),
         *said = must_format("%s/cut.txt", f), *text = NULL;
    if (system(up)) SKIP("network namespaces are not permitted");
    take_ranks(1);
    EXPECT_RUN(0, "train %s/run.yaml output=%s/one method=full optimizer.lr=3e-5", f, f);
    setenv("LAPIDARY_PROGRAM", hosts, 1);
    EXPECT_RUN(0, "train %s/run.yaml output=%s/four method=full optimizer.lr=3e-5", f, f);
    expect_near("one", "four");
    pid_t child = fork();
    if (!child) {
        execl("/bin/sh", "sh", "-c", line, (char *)NULL);
        _exit(1);
    }
    for (int i = 0; i < 6000 && !file_exists(saved); i++) usleep(5000);
    bool cut_off = file_exists(saved) && !system(cut);
    size_t size;
    for (int i = 0; i < 300 && !(text && strstr(text, "has not answered")); i++) {
        free(text);
        text = NULL;
        usleep(100000);
        EXPECT_OK(file_read(&text, &size, said, 1 << 20));
    }
    bool ended = false; /* each rank has a patience of its own */
    for (int i = 0; i < 80 && !ended; i++) {
        usleep(500000);
        ended = system(left) != 0;
    }
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    status = system(down);
    EXPECT(cut_off, "no save came in time");
    EXPECT(text && strstr(text, "has not answered rank 0 for 1 s"), "%s", text);
    EXPECT(ended, "ranks are left behind");
    take_ranks(3);
    EXPECT_RUN(0, "train %s/run.yaml output=%s/cut method=full optimizer.lr=3e-5 --resume", f, f);
    expect_near("one", "cut");
    free(up), free(down), free(cut), free(left), free(hosts), free(line), free(saved), free(said),
        free(text);
}

/* The number behind "key": of the first line of what was printed that has `part`. */
static double planned(const char *part, const char *key) {
    char *line = strstr(program_out, part), *at = line ? strstr(line, key) : NULL;
    EXPECT(at, "'%s' lacks %s of %s", program_out, key, part);
    return strtod(at + strlen(key), NULL);
}

/* Four ranks' plan before the run, and what the run then says. */
CASE(ranks, the_plan_is_what_a_rank_takes) {
    const char *f = test_folder();
    prepare("tiny");
    take_ranks(1);
    for (int shard = 0; shard <= 3; shard++) {
        char *level = must_format("\"shard\": %d,", shard);
        take_ranks(1);
        EXPECT_RUN(0, "plan %s/run.yaml --gpus 4 method=full", f);
        double total = planned(level, "\"total_gb\": ") - planned(level, "\"process_gb\": "),
               states = planned(level, "\"states_gb\": "),
               all = planned("\"shard\": 0,", "\"states_gb\": ");
        EXPECT(shard ? states < 0.6 * all : states == all, "level %d: states of %g GB, all are %g",
               shard, states, all);
        take_ranks(4);
        EXPECT_RUN(0, "train %s/run.yaml output=%s/plan%d method=full steps=1 parallel.shard=%d", f,
                   f, shard, shard);
        char *line = strstr(program_err, "  total");
        EXPECT(line && fabs(strtod(line + 7, NULL) - total) <= 0.0101,
               "level %d: %g GB planned: %s", shard, total, program_err);
        free(level);
    }
    take_ranks(2);
    EXPECT_RUN(0, "plan %s/run.yaml method=full", f);
    EXPECT(planned("\"ranks\": 2, \"nodes\": 1, \"shard\": 3", "\"tokens_per_s\": ") > 0);
    take_ranks(1);
    EXPECT_RUN(0, "plan %s/run.yaml --gpus 4 --nodes 2 --gpu h200 parallel.within=2", f);
    EXPECT(planned("\"shard\": 1", "\"sent_far_gb\": ") <=
           planned("\"shard\": 1", "\"sent_gb\": "));
    EXPECT_EXIT(1, "8 ranks: batch.accumulate is 4", "plan %s/run.yaml --gpus 8", f);
    EXPECT_EXIT(2, "expected a100, h100, h200 or b200", "plan %s/run.yaml --gpu v100", f);
    EXPECT_EXIT(0, "\"ranks\": 4", "plan %s/run.yaml --gpu h200", f);
}

/* Rows with and without media, so many that three ranks have some each. */
static void many_rows(void) {
    char *path = path_join(test_folder(), "rows.jsonl"), *few;
    size_t size;
    Text rows = {0};
    small_media_rows();
    EXPECT_OK(file_read(&few, &size, path, 1 << 20));
    for (int i = 0; i < 30; i++) {
        text_adds(&rows, few);
        text_addf(&rows,
                  "{\"messages\": [{\"role\": \"user\", \"content\": \"Row?\"}, {\"role\": "
                  "\"assistant\", \"content\": \"%d\"}]}\n",
                  i);
    }
    small_write("rows.jsonl", rows.bytes);
    free(path), free(few);
    text_free(&rows);
}

/* The same dataset and the same answers from three ranks as from one process. */
CASE(ranks, datasets_and_answers_are_those_of_one_process) {
    const char *f = test_folder();
    const char *exam = "--tasks demo/exam/gems_answer.yaml,demo/exam/gems_choice.yaml --data "
                       "demo/exam --chat-format small --limit 12 --bootstrap 100 --dtype f32";
    prepare("tiny --media");
    many_rows();
    for (int n = 1; n <= 3; n += 2) {
        take_ranks(n);
        EXPECT_RUN(0,
                   "prepare %s/run.yaml data.train=%s/rows.jsonl data.eval=0.3 data.max_length=512 "
                   "data.image_tokens=70 --out %s/data%d.h5",
                   f, f, f, n);
        EXPECT(strstr(program_out, "180 rows, 180 samples"), "%s", program_out);
        EXPECT_RUN(0, "eval --model %s/model %s --out %s/eval%d", f, exam, f, n);
        EXPECT(strstr(program_out, "gems_choice"), "%s", program_out);
    }
    Store a, b;
    DataConfig c = data_config_default();
    char *one = must_format("%s/data1.h5", f), *three = must_format("%s/data3.h5", f);
    EXPECT_OK(store_open(&a, one, NULL, &c, 1));
    EXPECT_OK(store_open(&b, three, NULL, &c, 1));
    EXPECT(a.media_count == 4 && b.media_count == 4, "%d and %d media", (int)a.media_count,
           (int)b.media_count);
    EXPECT(!memcmp(a.media, b.media, (size_t)a.media_count * sizeof *a.media));
    for (int eval = 0; eval < 2; eval++) {
        const SampleSet *x = eval ? &a.eval : &a.train, *y = eval ? &b.eval : &b.train;
        EXPECT(x->count == y->count && x->count, "%d and %d samples", (int)x->count, (int)y->count);
        EXPECT(!memcmp(x->slot_begins, y->slot_begins, (size_t)(x->count + 1) * sizeof(int64_t)));
        for (int64_t i = 0; i < x->count; i++) {
            int32_t ids[2][512];
            uint8_t mask[2][512];
            EXPECT(sample_length(x, i) == sample_length(y, i));
            EXPECT_OK(store_read(&a, eval, i, ids[0], mask[0]));
            EXPECT_OK(store_read(&b, eval, i, ids[1], mask[1]));
            EXPECT(!memcmp(ids[0], ids[1], (size_t)sample_length(x, i) * sizeof **ids));
        }
    }
    store_close(&a), store_close(&b);
    expect_same_bits("eval1/samples_gems_answer.jsonl", "eval3/samples_gems_answer.jsonl");
    expect_same_bits("eval1/samples_gems_choice.jsonl", "eval3/samples_gems_choice.jsonl");
    free(one), free(three);
}

CASE(ranks, ranks_that_do_not_fit_together_are_refused) {
    const char *f = test_folder();
    prepare("tiny");
    take_ranks(4);
    EXPECT_EXIT(1, "batch.accumulate is 2, expected at least 4",
                "train %s/run.yaml output=%s/few batch.accumulate=2 method=full", f, f);
    EXPECT_EXIT(1, "expected masters f32",
                "train %s/run.yaml output=%s/lean method=full optimizer.masters=none dtype=bf16", f,
                f);
    take_ranks(1);
    char *pair = must_format(MPIRUN " -n 1 %s train %s/run.yaml : -n 1 %s", alone, f, alone);
    setenv("LAPIDARY_PROGRAM", pair, 1);
    EXPECT_EXIT(1, "rank 1 has another run file than rank 0", "train %s/run.yaml seed=8", f);
    take_ranks(1);
    EXPECT_EXIT(1, "shard is 5, expected 0 to 3", "train %s/run.yaml output=%s/no parallel.shard=5",
                f, f);
    EXPECT_EXIT(1, "parallel.context is 2, expected a divisor of the number of ranks, 1",
                "train %s/run.yaml output=%s/no parallel.context=2", f, f);
    take_ranks(2);
    EXPECT_EXIT(1, "has no experts", "train %s/run.yaml output=%s/none parallel.experts=2", f, f);
    EXPECT_EXIT(1, "eval_tasks: expected none with parallel.shard 3",
                "train %s/run.yaml output=%s/asks parallel.shard=3 "
                "eval_tasks.names=[demo/exam/gems_choice.yaml] eval_tasks.data=demo/exam",
                f, f);
    EXPECT_EXIT(2, "--out is missing: 2 ranks",
                "eval --model %s/model --tasks demo/exam/gems_choice.yaml --data demo/exam "
                "--chat-format small",
                f);
    char *absolute = realpath(alone, NULL),
         *elsewhere =
             must_format(MPIRUN " -n 2 sh -c 'if [ $OMPI_COMM_WORLD_RANK = 1 ]; then cd /; "
                                "fi; exec \"$0\" \"$@\"' %s",
                         absolute);
    setenv("LAPIDARY_PROGRAM", elsewhere, 1);
    EXPECT_EXIT(1, "rank 1: demo/gems.jsonl: cannot be opened", "train %s/run.yaml output=%s/path",
                f, f);
    free(pair), free(absolute), free(elsewhere);
}
