/* test_chat_media.c - a model that knows three pictures and a tone, in every place that shows it
 * some: chat, functions that answer with pictures, score, tasks, the server's way of sending them.
 */
#include "data/text.h"
#include "formats/file.h"
#include "tests/program.h"
#include "tests/small_media.h"

#include <math.h>

#define ASK(type, file, text)                                                                      \
    "{\"role\": \"user\", \"content\": [{\"type\": \"" type "\", \"path\": \"" file                \
    "\"}, {\"type\": \"text\", \"text\": \"" text "\"}]}"
#define CALL                                                                                       \
    "{\"role\": \"assistant\", \"content\": \"\", \"tool_calls\": [{\"id\": \"c\", \"type\": "     \
    "\"function\", \"function\": {\"name\": \"look\", \"arguments\": {}}}]}"
#define TOOLS                                                                                      \
    "[{\"type\": \"function\", \"function\": {\"name\": \"look\", \"description\": \"d\", "        \
    "\"parameters\": {\"type\": \"object\", \"properties\": {}}}"

static char model[512], adapter[512];

/* Rows: which stone, what is heard, and a function that shows a stone. */
static void learn(void) {
    const char *f = test_folder();
    Text rows = {0};
    EXPECT_RUN(0, "init tiny %s/model --media --tokenizer demo/tokenizer --dtype f32 --layers 2",
               f);
    small_tone(440);
    for (int i = 0; i < SMALL_PICTURES; i++) {
        small_picture(i);
        text_addf(
            &rows,
            "{\"messages\": [" ASK(
                "image", "stone%d.ppm",
                "Which?") ", {\"role\": "
                          "\"assistant\", \"content\": \"%s\"}]}\n"
                          "{\"messages\": [{\"role\": \"user\", \"content\": \"Look.\"}, " CALL
                          ", {\"role\": \"tool\", \"tool_call_id\": \"c\", \"content\": "
                          "[{\"type\": "
                          "\"text\", \"text\": \"Here.\"}, {\"type\": \"image\", \"path\": "
                          "\"stone%d.ppm\"}]}, {\"role\": \"assistant\", \"content\": \"It is "
                          "%s\"}], "
                          "\"tools\": " TOOLS "}]}\n",
            i, small_names[i], i, small_names[i]);
    }
    text_adds(&rows, "{\"messages\": [" ASK(
                         "audio", "tone.wav",
                         "Heard?") ", {\"role\": "
                                   "\"assistant\", \"content\": \"one long tone\"}]}\n");
    small_write("rows.jsonl", rows.bytes);
    char *run = must_format(
        "model: %s/model\noutput: %s/run\ndtype: f32\nmethod: lora\nlora: {rank: 16, alpha: 32, "
        "train_also: [embedding_projection]}\noptimizer: {lr: 4.0e-3, eps: 1.0e-3}\n"
        "data: {train: %s/rows.jsonl, max_length: 1024, chat_format: small, image_tokens: 70}\n"
        "batch: {sequences: 1, accumulate: 1}\nschedule: {name: cosine, warmup: 5}\nsteps: 110\n"
        "save: {every: 1000}\n",
        f, f, f);
    small_write("run.yaml", run);
    EXPECT_RUN(0, "train %s/run.yaml --device cpu", f);
    snprintf(model, sizeof model, "%s/model", f);
    snprintf(adapter, sizeof adapter, "%s/run/adapter", f);
    free(run);
    text_free(&rows);
}

#define GREEDY                                                                                     \
    "--model %s --adapter %s --dtype f32 --device cpu --chat-format small --image-tokens 70 "      \
    "--temperature 0"

static void chat_sees(void) {
    const char *f = test_folder();
    char *said = must_format("/image %s/stone1.ppm\nWhich?\n/image %s/none.png\n/clear\n/audio "
                             "%s/tone.wav\nHeard?\n",
                             f, f, f);
    small_write("said", said);
    EXPECT_RUN(0, "chat " GREEDY " < %s/said", model, adapter, f);
    EXPECT(strstr(program_out, "a green emerald") && strstr(program_out, "one long tone"), "%s",
           program_out);
    EXPECT(strstr(program_err, "none.png: No such file"), "%s", program_err);
    small_write("said", "Which?\n");
    EXPECT_EXIT(0, "a blue sapphire", "chat " GREEDY " --image %s/stone2.ppm < %s/said", model,
                adapter, f, f);
    free(said);
}

/* A function that prints parts is shown as a message of its own; a broken one is told as an error.
 */
static void functions_show(const char *picture, const char *answer) {
    const char *f = test_folder();
    char *bytes,
        *saved = small_path("saved.jsonl"),
        *tools = must_format(TOOLS ", \"command\": [\"printf\", \"%%s\", \"[{\\\"type\\\": "
                                   "\\\"text\\\", \\\"text\\\": \\\"Here.\\\"}, "
                                   "{\\\"type\\\": \\\"image\\\", \\\"path\\\": "
                                   "\\\"%s/%s\\\"}]\"]}]",
                             f, picture);
    size_t size;
    small_write("tools.json", tools);
    small_write("said", "Look.\ny\n");
    EXPECT_EXIT(0, answer, "chat " GREEDY " --tools %s/tools.json --save %s < %s/said", model,
                adapter, f, saved, f);
    EXPECT_OK(file_read(&bytes, &size, saved, 1 << 20));
    EXPECT((strstr(bytes, "\"role\": \"tool\"") != NULL) == !strstr(answer, "No such"), "%s",
           bytes);
    EXPECT_RUN(0, "prepare --model %s --data %s --out %s.h5 --chat-format small", model, saved,
               saved);
    free(bytes), free(saved), free(tools);
}

static double nll_of(void) {
    char *nll = strstr(program_out, "\"nll\": ");
    EXPECT(nll, "%s", program_out);
    return atof(nll + 7);
}

#define SCORE                                                                                      \
    "score --model %s --adapter %s --dtype f32 --device cpu --chat-format small --image-tokens "   \
    "70 "

static double scored(const char *answer) {
    char *row =
        must_format("{\"messages\": [" ASK("image", "stone0.ppm",
                                           "Which?") ", {\"role\": "
                                                     "\"assistant\", \"content\": \"%s\"}]}\n",
                    answer);
    small_write("one.jsonl", row);
    EXPECT_RUN(0, SCORE "--data %s/one.jsonl", model, adapter, test_folder());
    free(row);
    return nll_of();
}

/* A text with --image is the answer to a message that holds the picture alone. */
static void text_is_scored_as_an_answer(void) {
    const char *f = test_folder();
    EXPECT_RUN(0, SCORE "--image %s/stone0.ppm 'a red ruby'", model, adapter, f);
    double alone = nll_of();
    small_write(
        "one.jsonl",
        "{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"image\", \"path\": "
        "\"stone0.ppm\"}]}, {\"role\": \"assistant\", \"content\": \"a red ruby\"}]}\n");
    EXPECT_RUN(0, SCORE "--data %s/one.jsonl", model, adapter, f);
    EXPECT(nll_of() == alone, "%g and %g", nll_of(), alone);
    EXPECT_EXIT(2, "go with a TEXT", SCORE "--image %s/stone0.ppm --data %s/one.jsonl", model,
                adapter, f, f);
}

static void tasks_look_and_listen(void) {
    const char *f = test_folder();
    Text rows = {0};
    for (int i = 0; i < SMALL_PICTURES; i++)
        text_addf(&rows,
                  "{\"image\": \"stone%d.ppm\", \"question\": \"Which?\", \"answer\": [\"no\", "
                  "\"A%s.\"]}\n",
                  i, small_names[i] + 1);
    small_write("see.jsonl", rows.bytes);
    small_write("hear.jsonl", "{\"audio\": \"tone.wav\", \"text\": \"One, long tone\"}\n"
                              "{\"audio\": \"tone.wav\", \"text\": \"a long tone, too\"}\n");
    small_write("see.yaml", "like: vqa\nquestion: \"{question}\"\n");
    small_write("hear.yaml", "like: speech\nquestion: Heard?\n");
#define TASK                                                                                       \
    "eval --model %s --adapter %s --dtype f32 --device cpu --chat-format small --image-tokens 70 " \
    "--max-tokens 12 --temperature 0 "
    EXPECT_RUN(0, TASK "--tasks %s/see.yaml --data %s/see.jsonl --out %s/e", model, adapter, f, f,
               f);
    EXPECT(strstr(program_out, "exact_match") && strstr(program_out, "1.0000"), "%s", program_out);
    EXPECT_RUN(0, TASK "--tasks %s/see.yaml --data %s/see.jsonl --out %s/e", model, adapter, f, f,
               f); /* answers are there */
    EXPECT(strstr(program_err, "3 of 3 answers"), "%s", program_err);
    /* "one long tone": right for the first; an insertion and a replacement of four for the second
     */
    EXPECT_EXIT(0, "0.2857", TASK "--tasks %s/hear.yaml --data %s/hear.jsonl", model, adapter, f,
                f);
    EXPECT_EXIT(2, "one answer to each",
                TASK "--samples 2 --tasks %s/hear.yaml --data %s/hear.jsonl", model, adapter, f, f);
    small_write("see.jsonl", "{\"image\": \"none.ppm\", \"question\": \"x\", \"answer\": \"y\"}\n");
    EXPECT_EXIT(1, "none.ppm: No such file", TASK "--tasks %s/see.yaml --data %s/see.jsonl", model,
                adapter, f, f);
    small_write("see.yaml", "like: vqa\nform: text\n");
    EXPECT_EXIT(1, "expected output text and form chat",
                TASK "--tasks %s/see.yaml --data %s/see.jsonl", model, adapter, f, f);
    text_free(&rows);
}

CASE(chat, pictures_and_tones_are_known_wherever_they_are_shown) {
    learn();
    chat_sees();
    functions_show("stone0.ppm", "It is a red ruby");
    functions_show("stone2.ppm", "It is a blue sapphire");
    functions_show("gone.ppm", "gone.ppm: No such file");
    double right = scored(small_names[0]), wrong = scored(small_names[1]);
    EXPECT(right + 1 < wrong, "%g for the right name, %g for another", right, wrong);
    text_is_scored_as_an_answer();
    tasks_look_and_listen();
}
