/* test_eval.c - the rules of evaluation against what their authors' programs gave. */
#include "data/json.h"
#include "eval/latex.h"
#include "eval/math_answer.h"
#include "eval/mersenne.h"
#include "eval/prompt.h"
#include "eval/rescore.h"
#include "eval/results.h"
#include "eval/table.h"
#include "formats/file.h"
#include "formats/sha256.h"
#include "tests/program.h"
#include "tests/test.h"

#include <math.h>

/* Rows of a JSONL file below the shared data. */
static json_t *shared_rows(const char *name) {
    json_t *rows;
    char *path = shared_path(name);
    EXPECT_OK(table_load(&rows, path));
    return rows;
}

static const char *text_of(const json_t *row, const char *key) {
    const char *text = json_string_value(json_object_get(row, key));
    return text ? text : "";
}

/* Numbers within rounding, everything else exactly. */
static bool same(const json_t *a, const json_t *b) {
    if (json_is_number(a) && json_is_number(b)) {
        double x = json_number_value(a), y = json_number_value(b);
        return fabs(x - y) <= 1e-12 * fmax(1, fabs(x));
    }
    return json_equal(a, b);
}

CASE(eval, saved_responses_score_as_the_harnesses_score_them) {
    static const char *const keys[] = {"extracted",   "normalized", "score",
                                       "math_verify", "step",       "warning"};
    size_t i;
    json_t *row;
    json_array_foreach(shared_rows("eval/scoring-cases.jsonl"), i, row) {
        json_t *mine = json_object();
        const char *const given[] = {"task", "suite", "filter", "doc", "response"};
        for (int k = 0; k < 5; k++) json_object_set(mine, given[k], json_object_get(row, given[k]));
        EXPECT_OK(rescore_row(mine, false));
        for (int k = 0; k < 6; k++) {
            const json_t *expected = json_object_get(row, keys[k]);
            if (expected)
                EXPECT(same(expected, json_object_get(mine, keys[k])), "%s, %s: %s",
                       text_of(row, "id"), text_of(row, "filter"), keys[k]);
        }
    }
}

static double *doubles(const json_t *list, int64_t *n) {
    *n = (int64_t)json_array_size(list);
    double *values = must_calloc((size_t)*n + 1, sizeof *values);
    for (int64_t i = 0; i < *n; i++) values[i] = json_number_value(json_array_get(list, (size_t)i));
    return values;
}

static double number(const json_t *row, const char *key) {
    return json_number_value(json_object_get(row, key));
}

static void check_group(const json_t *row) {
    Estimate parts[8];
    int64_t n;
    double *means = doubles(json_object_get(row, "means"), &n),
           *errors = doubles(json_object_get(row, "stderrs"), &n),
           *sizes = doubles(json_object_get(row, "sizes"), &n);
    for (int64_t i = 0; i < n; i++) parts[i] = (Estimate){means[i], errors[i], (int64_t)sizes[i]};
    Estimate w = estimate_group(parts, n, true), u = estimate_group(parts, n, false);
    EXPECT_CLOSE(w.mean, number(row, "weighted_mean"), 1e-14);
    EXPECT_CLOSE(w.stderr_, number(row, "pooled_stderr"), 1e-14);
    EXPECT_CLOSE(u.mean, number(row, "unweighted_mean"), 1e-14);
    EXPECT_CLOSE(u.stderr_, number(row, "unweighted_stderr"), 1e-14);
}

static void check_choices(const json_t *row) {
    int64_t n;
    double *lls = doubles(json_object_get(row, "lls"), &n);
    Slice choices[8];
    for (int64_t i = 0; i < n; i++)
        choices[i] = json_slice(json_array_get(json_object_get(row, "choices"), (size_t)i));
    Choosing c = choose(lls, choices, n);
    EXPECT(c.by_sum == (int64_t)number(row, "pred") &&
           c.by_characters == (int64_t)number(row, "pred_norm") &&
           c.by_bytes == (int64_t)number(row, "pred_bytes"));
}

static void check_windows(const json_t *row) {
    const json_t *windows = json_object_get(row, "windows"), *window;
    int64_t n = (int64_t)json_array_size(json_object_get(row, "tokens")),
            most = (int64_t)number(row, "max_seq_len"),
            context = (int64_t)number(row, "context_len");
    size_t i;
    Window w;
    json_array_foreach(windows, i, window) {
        const json_t *input = json_array_get(window, 0), *targets = json_array_get(window, 1);
        EXPECT(rolling_window(&w, (int64_t)i, n, most, context) ==
               (int64_t)json_array_size(targets));
        EXPECT(w.context + w.count - 1 == (int64_t)json_array_size(input));
        EXPECT(json_equal(json_array_get(targets, 0),
                          json_array_get(json_object_get(row, "tokens"), (size_t)w.targets)));
    }
    EXPECT(rolling_window(&w, (int64_t)json_array_size(windows), n, most, context) == 0);
}

static void check_perplexity(const json_t *row) {
    Results r = {0};
    TaskResult *t = results_add(&r, "t");
    size_t i;
    json_t *doc;
    json_array_foreach(json_object_get(row, "docs"), i, doc) {
        Slice text = json_slice(json_object_get(doc, "text"));
        double ll = number(doc, "loglikelihood");
        EXPECT(count_words(text) == (int64_t)number(doc, "words"));
        EXPECT(text.size == (size_t)number(doc, "bytes"));
        result_value(t, "w", "none", FIGURE_PERPLEXITY, (int64_t)i, ll, (double)count_words(text));
        result_value(t, "b", "none", FIGURE_PERPLEXITY, (int64_t)i, ll, (double)text.size);
        result_value(t, "bits", "none", FIGURE_BITS, (int64_t)i, ll, (double)text.size);
    }
    static const char *const keys[] = {"word_perplexity", "byte_perplexity", "bits_per_byte"};
    for (int k = 0; k < 3; k++)
        EXPECT_CLOSE(figure_estimate(&t->figures[k], 0).mean, number(row, keys[k]),
                     1e-12 * number(row, keys[k]));
}

CASE(eval, metrics_equal_the_harness) {
    size_t i;
    json_t *row;
    json_array_foreach(shared_rows("eval/metric-cases.jsonl"), i, row) {
        const char *op = text_of(row, "op");
        int64_t n;
        if (!strcmp(op, "mean_and_stderr")) {
            double *values = doubles(json_object_get(row, "values"), &n);
            if (!n) { /* given by its count and sum */
                n = (int64_t)number(row, "n");
                values = must_calloc((size_t)n, sizeof *values);
                for (int64_t k = 0; k < (int64_t)number(row, "sum"); k++) values[k] = 1;
            }
            Estimate e = estimate_mean(values, n);
            EXPECT_CLOSE(e.mean, number(row, "mean"), 1e-15);
            EXPECT_CLOSE(e.stderr_, number(row, "stderr"), 1e-15);
        } else if (!strcmp(op, "group")) {
            check_group(row);
        } else if (!strcmp(op, "pass_at_k")) {
            EXPECT_CLOSE(pass_at_k((int64_t)number(row, "n"), (int64_t)number(row, "c"),
                                   (int64_t)number(row, "k")),
                         number(row, "out"), 1e-14);
        } else if (!strcmp(op, "multiple_choice")) {
            check_choices(row);
        } else if (!strcmp(op, "perplexity")) {
            check_perplexity(row);
        } else if (!strcmp(op, "rolling_windows")) {
            check_windows(row);
        } else if (!strcmp(op, "bootstrap_median")) {
            double *values = doubles(json_object_get(row, "values"), &n);
            EXPECT_CLOSE(bootstrap_error(median_of, values, n, 1000), number(row, "iters_1000"),
                         1e-12);
            EXPECT_CLOSE(bootstrap_error(median_of, values, n, 3000), number(row, "iters_3000"),
                         1e-12);
        } else if (!strcmp(op, "majority")) {
            const json_t *answers = json_object_get(row, "answers");
            Slice slices[16];
            n = (int64_t)json_array_size(answers);
            for (int64_t k = 0; k < n; k++)
                slices[k] = json_slice(json_array_get(answers, (size_t)k));
            Slice winner = slices[majority_vote(slices, n)];
            EXPECT(slice_is(winner, text_of(row, "out")));
        } else {
            EXPECT(false, "no check of %s", op);
        }
    }
}

/* Draws in calls of `k`, compared as one list. */
static void check_draws(const json_t *row, Mersenne *m) {
    const char *op = text_of(row, "op");
    const json_t *out = json_object_get(row, "out");
    int64_t population = (int64_t)number(row, "population"), k = (int64_t)number(row, "k"),
            picked[64];
    for (size_t i = 0; i < json_array_size(out); i++) {
        const json_t *one = json_array_get(out, i);
        if (!strcmp(op, "getrandbits32")) {
            EXPECT(mersenne_bits(m) == (uint32_t)json_integer_value(one));
        } else if (!strcmp(op, "random")) {
            EXPECT(mersenne_random(m) == json_real_value(one));
        } else if (!strcmp(op, "randint_0_3")) {
            EXPECT(mersenne_below(m, 4) == json_integer_value(one));
        } else {
            if (!strcmp(op, "shuffle")) {
                k = (int64_t)json_array_size(json_object_get(row, "list"));
                for (int64_t j = 0; j < k; j++) picked[j] = j;
                mersenne_shuffle(m, picked, k);
            } else if (!strcmp(op, "sample_indices")) {
                mersenne_sample(m, picked, population, k);
            } else {
                EXPECT(!strcmp(op, "choices_indices"));
                mersenne_choices(m, picked, population, k);
            }
            for (int64_t j = 0; j < k; j++)
                EXPECT(picked[j] == json_integer_value(json_array_get(one, (size_t)j)));
        }
    }
}

CASE(eval, intervals_of_shares_and_rates_do_not_begin_below_zero) {
    double low, high;
    Figure rate = {.kind = FIGURE_RATE};
    figure_interval(&rate, (Estimate){0.5, 0.4, 3}, &low, &high);
    EXPECT(low == 0, "%g", low);
    EXPECT_CLOSE(high, 0.5 + 1.96 * 0.4, 1e-12); /* a rate of errors may be more than one */
    figure_interval(NULL, (Estimate){0.9, 0.1, 3}, &low, &high);
    EXPECT(high == 1, "%g", high);
    figure_interval(&rate, (Estimate){-3, 1, 3}, &low, &high);
    EXPECT_CLOSE(low, -3 - 1.96, 1e-12);
}

CASE(eval, the_generator_draws_what_cpython_draws) {
    size_t i;
    json_t *row;
    json_array_foreach(shared_rows("eval/prng-cases.jsonl"), i, row) {
        Mersenne m;
        mersenne_seed(&m, (uint64_t)number(row, "seed"));
        check_draws(row, &m);
    }
}

/* The whole task once; prompts of its first documents are looked up. */
static void check_prompts(const json_t *cases, const char *name, const char *task_name,
                          const char *folder, int64_t shots) {
    Task task;
    Documents d;
    PromptOptions o = {.shots = shots, .seed = 1234};
    Shots drawn;
    int checked = 0;
    EXPECT_OK(task_find(&task, task_name));
    EXPECT_OK(documents_load(&d, &task, folder));
    for (int s = 0; s < d.count; s++) {
        EXPECT_OK(shots_init(&drawn, &task, &d.suites[s], &o));
        for (size_t doc = 0; doc < 20 && doc < json_array_size(d.suites[s].docs); doc++) {
            int64_t picked[16];
            size_t i;
            json_t *row;
            shots_next(&drawn, picked);
            json_array_foreach(cases, i, row) {
                if (strcmp(text_of(row, "task"), name ? name : d.suites[s].name) ||
                    number(row, "doc_id") != (double)doc ||
                    number(row, "num_fewshot") != (double)shots)
                    continue;
                Text prompt = {0};
                char hash[65];
                EXPECT_OK(prompt_render(&prompt, NULL, &task, &o, &d.suites[s],
                                        json_array_get(d.suites[s].docs, doc), picked,
                                        drawn.count));
                sha256_text(hash, prompt.bytes, prompt.size);
                EXPECT(!strcmp(hash, text_of(row, "sha256")), "%s, document %zu, %d shots:\n%s",
                       d.suites[s].name, doc, (int)shots, prompt.bytes);
                checked++;
            }
        }
    }
    EXPECT(checked > 1, "%s: no prompt was compared", task_name);
}

/* Few-shot examples that no data file has stand in a prompt that is given in full: Q/A or
 * problem/solution pairs between blank lines. */
static void write_examples(const json_t *cases, const char *name, const char *head,
                           const char *middle, const char *question, const char *answer,
                           const char *path) {
    size_t i;
    json_t *row;
    FILE *f = fopen(path, "w");
    json_array_foreach(cases, i, row) {
        const char *at = text_of(row, "prompt");
        if (strcmp(text_of(row, "task"), name) || !*at) continue;
        for (const char *next; (next = strstr(at + 1, head)); at = next) {
            const char *split = strstr(at, middle);
            json_t *example = json_pack(
                "{s:o, s:o}", question,
                json_stringn(at + strlen(head), (size_t)(split - at) - strlen(head)), answer,
                json_stringn(split + strlen(middle), (size_t)(next - split) - strlen(middle) - 2));
            char *line = json_dumps(example, 0);
            fprintf(f, "%s\n", line);
        }
    }
    fclose(f);
}

CASE(eval, prompts_are_the_harness_s_bytes) {
    json_t *cases = shared_rows("eval/prompt-cases.jsonl");
    char *data = shared_path("data"), path[512];
    check_prompts(cases, NULL, "mmlu", data, 5);
    check_prompts(cases, "gsm8k", "gsm8k", data, 5);
    snprintf(path, sizeof path, "%s/gsm8k", test_folder());
    EXPECT_OK(folder_make(path));
    snprintf(path, sizeof path, "%s/gsm8k/cot.jsonl", test_folder());
    write_examples(cases, "gsm8k_cot", "Q: ", "\nA: ", "question", "target", path);
    snprintf(path, sizeof path, "%s/gsm8k/test.jsonl", test_folder());
    EXPECT_OK(file_copy(shared_path("data/gsm8k/test.jsonl"), path, false));
    check_prompts(cases, "gsm8k_cot", "gsm8k_cot", test_folder(), 8);
    snprintf(path, sizeof path, "%s/math500", test_folder());
    EXPECT_OK(folder_make(path));
    snprintf(path, sizeof path, "%s/math500/fewshot.jsonl", test_folder());
    write_examples(cases, "minerva_math500", "Problem:\n", "\n\nSolution: ", "problem", "solution",
                   path);
    snprintf(path, sizeof path, "%s/math500/atest.jsonl", test_folder());
    EXPECT_OK(file_copy(shared_path("data/math500/test-000-349.jsonl"), path, false));
    check_prompts(cases, "minerva_math500", "math500", test_folder(), 4);
}

/* A whole run of the harness, fed back. */
CASE(eval, a_replayed_run_gives_the_harness_s_results) {
    static const char *const names[] = {
        "mmlu_anatomy",       "mmlu_global_facts", "mmlu_high_school_mathematics",
        "mmlu_cloze_anatomy", "gsm8k_local",       "aime24_local",
        "aime25_local"};
    Results r = {0};
    char *path = shared_path("eval/replay/results.json"), *bytes;
    size_t size;
    json_t *expected, *task, *value;
    const char *name, *key;
    EXPECT_OK(file_read(&bytes, &size, path, 1 << 20));
    EXPECT_OK(json_read(&expected, bytes, size, path));
    for (int i = 0; i < 7; i++) {
        char *file = must_format("eval/replay/samples_%s.jsonl", names[i]);
        EXPECT_OK(rescore_samples(&r, shared_path(file), NULL, i < 3 ? "mmlu_mini" : NULL));
    }
    json_t *mine = results_json(&r, 1000);
    json_object_foreach(json_object_get(expected, "results"), name, task) {
        const json_t *ours = json_object_get(json_object_get(mine, "results"), name);
        json_object_foreach(task, key, value) if (strcmp(key, "alias"))
            EXPECT(same(value, json_object_get(ours, key)), "%s: %s", name, key);
    }
}

CASE(eval, expressions_are_equal_by_value) {
    static const struct {
        const char *a, *b;
        bool equal;
    } pairs[] = {{"\\frac{1}{2}", "0.5", true},
                 {"\\frac12", "\\dfrac{2}{4}", true},
                 {"(x+1)^2", "x^2+2x+1", true},
                 {"(x+1)^2", "x^2+2x+2", false},
                 {"\\sqrt{8}", "2\\sqrt2", true},
                 {"\\sqrt[3]{27}", "3", true},
                 {"2^{-1}", "\\frac{1}{2}", true},
                 {"(1,2)", "(1, 2)", true},
                 {"(1,2)", "(2,1)", false},
                 {"(1,2)", "[1,2]", false},
                 {"(1,2]", "(1,2)", false},
                 {"1{,}000", "1", false},
                 {"100,000", "100000", true},
                 {"3\\pi", "9.42", false},
                 {"x_1+x_2", "x_2+x_1", true},
                 {"x_1", "x_2", false},
                 {"\\sin^2 x + \\cos^2 x", "1", true},
                 {"\\left(\\frac{3}{4}\\right)^2", "\\frac{9}{16}", true},
                 {"50\\%", "\\frac{1}{2}", true},
                 {"5!", "120", true},
                 {"|{-3}|", "3", true},
                 {"12 \\text{ cm}", "12", true},
                 {"\\log_2 8", "3", true},
                 {"((((", "1", false},
                 {"", "1", false}};
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++)
        EXPECT(latex_equal(slice_of(pairs[i].a), slice_of(pairs[i].b)) == pairs[i].equal,
               "%s and %s", pairs[i].a, pairs[i].b);
}

CASE(eval, csv_keeps_quotes_commas_and_line_breaks) {
    json_t *rows;
    EXPECT_OK(table_csv(&rows,
                        slice_of("\xef\xbb\xbf"
                                 "a,b\r\n\"x, \"\"y\"\"\nz\",\n,2"),
                        "t"));
    EXPECT(json_array_size(rows) == 3);
    EXPECT(!strcmp(json_string_value(json_array_get(json_array_get(rows, 0), 0)), "a"));
    EXPECT(!strcmp(json_string_value(json_array_get(json_array_get(rows, 1), 0)), "x, \"y\"\nz"));
    EXPECT(!strcmp(json_string_value(json_array_get(json_array_get(rows, 1), 1)), ""));
    EXPECT(!strcmp(json_string_value(json_array_get(json_array_get(rows, 2), 1)), "2"));
    EXPECT_ERROR(table_csv(&rows, slice_of("a\n\"open"), "t.csv"), "t.csv:3: a quoted cell");
}

CASE(eval, questions_of_h5py_are_rows) {
    static const char expected[] =
        "{\"question\": \"What colour is a sapph\\u00efre, most often?\", \"choices\": [\"red\", "
        "\"blue\"], \"answer\": 1, \"mohs\": 9.0, \"checked\": false, \"source\": \"book\", "
        "\"tags\": []}";
    json_t *rows, *row;
    char path[512];
    EXPECT_OK(table_load(&rows, "tests/fixtures/questions.h5"));
    EXPECT_OK(json_read(&row, expected, strlen(expected), "row"));
    EXPECT(json_array_size(rows) == 3 && json_equal(json_array_get(rows, 1), row), "%s",
           json_dumps(rows, 0));
    EXPECT(json_array_size(json_object_get(json_array_get(rows, 0), "tags")) == 2);
    snprintf(path, sizeof path, "%s/cut.h5", test_folder());
    EXPECT_OK(file_write(path, "\x89HDF\r\n\x1a\nrest", 12));
    EXPECT_ERROR(table_load(&rows, path), "cut.h5: is no readable HDF5 file");
}

CASE(eval, what_cannot_be_scored_is_refused_before_anything_is_asked) {
    static const struct {
        int code;
        const char *part, *arguments;
    } cases[] = {
        {2, "no task 'gsm9k'", "--tasks gsm9k --data F"},
        {2, "'gsm8k' is named twice", "--tasks gsm8k,gsm8k --data F"},
        {1, "F/none: No such file", "--tasks gsm8k --data F/none"},
        {1, "no questions for task 'mmlu', expected mmlu/test", "--tasks mmlu --data F"},
        {1, "cut.jsonl:2: no JSON", "--tasks gsm8k --shots 0 --data F/cut.jsonl"},
        {1, "document 1: a document has no 'answer'",
         "--tasks gsm8k --shots 0 --data F/mute.jsonl"},
        {1, "the answer is none of the 2",
         "--tasks demo/exam/gems_choice.yaml --data F/wide.jsonl"},
        {1, "there are no choices", "--tasks demo/exam/gems_choice.yaml --data F/cut2.jsonl"},
        {1, "has no questions", "--tasks demo/exam/gems_choice.yaml --data F/empty.jsonl"},
        {1, "a choice alone is longer", "--tasks demo/exam/gems_choice.yaml --data F/long.jsonl"},
        {1, "100 few-shot examples are wanted, 2", "--tasks gsm8k --shots 100 --data F"},
        {2, "--limit is 0", "--tasks gsm8k --limit 0 --data F"},
        {2, "--limit is -1", "--tasks gsm8k --limit -1 --data F"},
        {2, "--shots is -2", "--tasks gsm8k --shots -2 --data F"},
        {2, "--batch is 0", "--tasks gsm8k --shots 0 --batch 0 --data F"},
        {2, "--run-code says", "--tasks humaneval --data F/code.jsonl"},
        {1, "cannot make the folder", "--tasks gsm8k --shots 0 --data F --out /proc/answers"},
    };
    const char *f = test_folder();
    static const char *const files[][2] = {
        {"cut.jsonl", "{\"question\": \"a\", \"answer\": \"#### 1\"}\n{\"question\": \n"},
        {"mute.jsonl", "{\"question\": \"a\", \"answer\": \"#### 1\"}\n{\"question\": \"b\"}\n"},
        {"wide.jsonl", "{\"question\": \"a\", \"choices\": [\"x\", \"y\"], \"answer\": 2}\n"},
        {"cut2.jsonl", "{\"question\": \"a\", \"choices\": [], \"answer\": 0}\n"},
        {"empty.jsonl", "\n"},
        {"code.jsonl", "{\"task_id\": \"a\", \"prompt\": \"def f():\\n\", \"test\": \"\", "
                       "\"entry_point\": \"f\", \"canonical_solution\": \"\"}\n"},
        {"gsm8k/test.jsonl", "{\"question\": \"a\", \"answer\": \"#### 1\"}\n"},
        {"gsm8k/train.jsonl", "{\"question\": \"a\", \"answer\": \"#### 1\"}\n"
                              "{\"question\": \"b\", \"answer\": \"#### 2\"}\n"},
    };
    char path[512];
    snprintf(path, sizeof path, "%s/gsm8k", f);
    EXPECT_OK(folder_make(path));
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        snprintf(path, sizeof path, "%s/%s", f, files[i][0]);
        EXPECT_OK(file_write(path, files[i][1], strlen(files[i][1])));
    }
    Text row = {0};
    text_adds(&row, "{\"question\": \"a\", \"answer\": 0, \"choices\": [\"b\", \"");
    for (int i = 0; i < 20000; i++) text_adds(&row, "so ");
    text_adds(&row, "\"]}\n");
    snprintf(path, sizeof path, "%s/long.jsonl", f);
    EXPECT_OK(file_write(path, row.bytes, row.size));
    text_free(&row);
    EXPECT_RUN(0, "init tiny %s/model --tokenizer demo/tokenizer --dtype f32 --layers 2", f);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Text words = {0};
        for (const char *c = cases[i].arguments; *c; c++)
            text_adds(&words, *c == 'F' ? f : (char[]){*c, 0});
        const char *part = cases[i].part[0] == 'F' ? cases[i].part + 1 : cases[i].part;
        EXPECT_EXIT(cases[i].code, part, "eval --model %s/model --dtype f32 --chat-format small %s",
                    f, words.bytes);
        text_free(&words);
    }
}

CASE(eval, bad_tasks_are_named) {
    Task t;
    char path[512];
    EXPECT_ERROR(task_find(&t, "nonsense"), "no task 'nonsense'; there are mmlu");
    snprintf(path, sizeof path, "%s/own.yaml", test_folder());
    EXPECT_OK(file_write(path, "like: gsm8k\nshotz: 3\n", 21));
    EXPECT_ERROR(task_find(&t, path), "own.yaml:2: unknown key 'shotz'");
    EXPECT_OK(file_write(path, "output: words\n", 14));
    EXPECT_ERROR(task_find(&t, path), "expected one of text, choices, rolling");
    EXPECT_OK(file_write(path, "filters: {a: [{regex: '('}]}\n", 29));
    EXPECT_ERROR(task_find(&t, path), "pattern '('");
    EXPECT_OK(task_find(&t, "aime24@lm-eval"));
    EXPECT(t.scorer == SCORER_AIME && t.max_tokens == 32768 && t.files.count == 2);
}
