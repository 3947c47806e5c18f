/* documents.c - finding files, reading rows, and the layouts of the benchmarks. */
#include "eval/documents.h"
#include "eval/bfcl.h"
#include "eval/judge.h"
#include "eval/mersenne.h"
#include "eval/table.h"
#include "formats/file.h"
#include "formats/sha256.h"

#include <errno.h>
#include <glob.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* ---- known releases ---- */

/* SHA-256 of files as they were published. */
static const struct {
    const char *sha256, *release;
} releases[] = {
    {"3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14", "GSM8K test (2021)"},
    {"17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465", "GSM8K train (2021)"},
    {"b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef", "HumanEval (2021)"},
    {"e428f83ec735201c9db2a232727f4c20dbce87079ed386b6e3fb7f756d078756", "AIME 2024, NeMo-Skills"},
    {"b672f9c6660b68dd42f5fc705b17405f24eaa9991c98991d63463c6b683468a8", "AIME 2025, NeMo-Skills"},
    {"31fa88574e75103bcfee15811fec860aabd727af5cfe9327756305dbed8f5d70", "AIME 2026, LLMEval"},
    {"82dd63ba502eb2520c6b5d1d9a5c4b590e03ff261565175561f6228a367d1991", "BFCL v4, simple Python"},
    {"19f51a82eff42e5d62541aa500115a056eb78f437c2ba1f10415fd7c8e5dda84", "BFCL v4, parallel"},
    {"8863ea8433239f55c5f016154cf0830853c89f693c6ea270396a2fa121960579",
     "BFCL v4, parallel multiple"},
    {"2b6ed4c2e992cdcf5f1678a701851f944bef7550ee026ed1ddb89efed5be01a6", "BFCL v4, irrelevance"},
};

static Status note_file(Documents *d, const char *path) {
    SourceFile f = {.path = must_strdup(path)};
    Status status = sha256_file(f.sha256, path);
    if (status != OK) {
        free(f.path);
        return status;
    }
    for (size_t i = 0; i < sizeof releases / sizeof *releases; i++)
        if (!strcmp(releases[i].sha256, f.sha256)) f.release = releases[i].release;
    d->files = must_realloc(d->files, (size_t)(d->file_count + 1) * sizeof *d->files);
    d->files[d->file_count++] = f;
    return OK;
}

static Status rows_noted(json_t **rows, Documents *d, const char *path) {
    TRY(note_file(d, path));
    return table_load(rows, path);
}

/* ---- finding them ---- */

/* The files that a pattern below dir matches; where there are none, those of HDF5 that would be
 * called the same. Frees the pattern. */
static bool find_pattern(glob_t *found, char *pattern) {
    bool good = !glob(pattern, 0, NULL, found);
    char *dot = strrchr(pattern, '.');
    if (!good && dot) {
        globfree(found);
        char *other = must_format("%.*s.h5", (int)(dot - pattern), pattern);
        good = !glob(other, 0, NULL, found);
        free(other);
    }
    if (!good) {
        globfree(found);
        memset(found, 0, sizeof *found);
    }
    free(pattern);
    return good;
}

/* The files of the first pattern below dir that matches any; or dir itself, when that is a file. */
static Status find_files(glob_t *found, const Texts *patterns, const char *dir) {
    struct stat info;
    memset(found, 0, sizeof *found);
    if (stat(dir, &info)) FAIL(ERR_IO, "%s: %s", dir, strerror(errno));
    if (!S_ISDIR(info.st_mode)) {
        glob(dir, GLOB_NOCHECK, NULL, found);
        return OK;
    }
    for (int i = 0; i < patterns->count; i++)
        if (find_pattern(found, must_format("%s/%s", dir, patterns->items[i]))) break;
    return OK;
}

static Status must_find(glob_t *found, const Task *task, const char *dir) {
    TRY(find_files(found, &task->files, dir));
    if (found->gl_pathc) return OK;
    Text list = {0};
    for (int i = 0; i < task->files.count; i++)
        text_addf(&list, "%s%s", i ? ", " : "", task->files.items[i]);
    Status status = status_fail(ERR_IO, "%s: no questions for task '%s', expected %s", dir,
                                task->name, list.size ? list.bytes : "a file: give --data FILE");
    text_free(&list);
    return status;
}

static Suite *add_suite(Documents *d, const char *name, const char *alias, const char *group) {
    d->suites = must_realloc(d->suites, (size_t)(d->count + 1) * sizeof *d->suites);
    Suite *s = &d->suites[d->count++];
    *s = (Suite){.name = must_strdup(name),
                 .alias = must_strdup(alias),
                 .group = group ? must_strdup(group) : NULL,
                 .docs = json_array(),
                 .examples = json_array()};
    return s;
}

/* dir, or the folder of dir when that is a file. */
static char *folder_of(const char *dir) {
    struct stat info;
    return !stat(dir, &info) && S_ISDIR(info.st_mode) ? must_strdup(dir) : path_folder(dir);
}

/* Few-shot examples: rows of the first of the task's files that is there. `subject` fills the
 * pattern's {subject}. */
static Status find_examples(json_t **rows, Documents *d, const Task *task, const char *dir,
                            const char *subject) {
    char *folder = folder_of(dir);
    Status status = OK;
    *rows = NULL;
    for (int i = 0; i < task->fewshot_files.count && !*rows && status == OK; i++) {
        const char *pattern = task->fewshot_files.items[i], *brace = strstr(pattern, "{subject}");
        glob_t found;
        if (!find_pattern(&found, brace ? must_format("%s/%.*s%s%s", folder, (int)(brace - pattern),
                                                      pattern, subject ? subject : "", brace + 9)
                                        : must_format("%s/%s", folder, pattern)))
            continue;
        status = rows_noted(rows, d, found.gl_pathv[0]);
        globfree(&found);
    }
    free(folder);
    return status;
}

/* ---- readers ---- */

/* All documents with media are named from one folder. */
static Status set_folder(Suite *s, const Task *task, const char *path) {
    char *folder = path_folder(path);
    Status status = OK;
    if (s->folder && strcmp(s->folder, folder) && task->media_count)
        status = status_fail(ERR_FORMAT,
                             "%s: questions with media lie in %s too: give one file as --data",
                             path, s->folder);
    free(s->folder);
    s->folder = folder;
    return status;
}

/* Rows as they are; split by a field where the task says so. */
static Status read_rows(Documents *d, const Task *task, const char *dir) {
    glob_t found;
    json_t *examples = NULL, *rows = NULL, *row;
    size_t i;
    Status status = OK;
    TRY(must_find(&found, task, dir));
    TRY_DONE(find_examples(&examples, d, task, dir, NULL));
    for (size_t f = 0; f < found.gl_pathc; f++) {
        TRY_DONE(rows_noted(&rows, d, found.gl_pathv[f]));
        json_array_foreach(rows, i, row) {
            const char *part = task->by ? json_string_value(json_object_get(row, task->by)) : NULL;
            char *name = must_strdup(task->name);
            if (task->by && !part) {
                free(name);
                FAIL_DONE(ERR_FORMAT, "%s: row %zu has no '%s'", found.gl_pathv[f], i + 1,
                          task->by);
            }
            if (part) {
                free(name);
                name = must_format("%s_%s", task->name, part);
                for (char *c = name; *c; c++)
                    if (*c == ' ') *c = '_';
            }
            Suite *suite = NULL;
            for (int k = 0; k < d->count; k++)
                if (!strcmp(d->suites[k].name, name)) suite = &d->suites[k];
            if (!suite) suite = add_suite(d, name, part ? part : name, part ? task->name : NULL);
            json_array_append(suite->docs, row);
            free(name);
            TRY_DONE(set_folder(suite, task, found.gl_pathv[f]));
        }
        json_decref(rows);
        rows = NULL;
    }
    for (int k = 0; k < d->count; k++) json_array_foreach(examples, i, row) {
            const char *part = task->by ? json_string_value(json_object_get(row, task->by)) : NULL;
            if (!task->by || (part && !strcmp(part, d->suites[k].alias)))
                json_array_append(d->suites[k].examples, row);
        }
done:
    json_decref(rows);
    json_decref(examples);
    globfree(&found);
    return status;
}

/* MMLU: {question, subject, choices, answer}, the answer an index. Files have a header or none, and
 * the answer is a letter or an index. */
static Status mmlu_docs(json_t **docs, Documents *d, const char *path, const char *subject) {
    json_t *rows = NULL, *out = json_array(), *row;
    size_t i;
    Text text = {0};
    Status status = OK;
    TRY_DONE(note_file(d, path));
    if (!table_is(path, ".csv")) {
        TRY_DONE(table_load(&rows, path));
        json_array_foreach(rows, i, row) {
            json_t *copy = json_copy(row);
            if (!json_object_get(copy, "subject"))
                json_object_set_new(copy, "subject", json_string(subject));
            json_array_append_new(out, copy);
        }
        goto done;
    }
    TRY_DONE(table_text(&text, path));
    TRY_DONE(table_csv(&rows, (Slice){text.bytes, text.size}, path));
    json_array_foreach(rows, i, row) {
        const char *answer = json_string_value(json_array_get(row, 5));
        if (json_array_size(row) != 6)
            FAIL_DONE(ERR_FORMAT,
                      "%s: row %zu has %zu cells, expected question, four choices and "
                      "answer",
                      path, i + 1, json_array_size(row));
        if (i == 0 && !strcmp(answer, "answer")) continue;
        int64_t index = *answer >= 'A' && *answer <= 'D' ? *answer - 'A' : *answer - '0';
        if (!*answer || answer[1] || index < 0 || index > 3)
            FAIL_DONE(ERR_FORMAT, "%s: row %zu: answer '%s', expected A to D or 0 to 3", path,
                      i + 1, answer);
        json_array_append_new(out, json_pack("{s:O, s:s, s:[O,O,O,O], s:I}", "question",
                                             json_array_get(row, 0), "subject", subject, "choices",
                                             json_array_get(row, 1), json_array_get(row, 2),
                                             json_array_get(row, 3), json_array_get(row, 4),
                                             "answer", (json_int_t)index));
    }
done:
    text_free(&text);
    json_decref(rows);
    if (status == OK)
        *docs = out;
    else
        json_decref(out);
    return status;
}

/* The subject in a path that matches PREFIX*SUFFIX: anatomy of .../anatomy_test.csv. */
static char *subject_of(const char *path) {
    const char *slash = strrchr(path, '/');
    char *name = must_strdup(slash ? slash + 1 : path);
    char *end = strstr(name, "_test.");
    if (!end) end = strstr(name, "_dev.");
    if (end) {
        *end = 0;
        return name;
    }
    free(name); /* mmlu/anatomy/test.jsonl */
    char *copy = must_strdup(path), *cut = strrchr(copy, '/');
    if (cut) *cut = 0;
    slash = strrchr(copy, '/');
    name = must_strdup(slash ? slash + 1 : copy);
    free(copy);
    return name;
}

static Status read_mmlu(Documents *d, const Task *task, const char *dir) {
    glob_t found;
    Status status = OK;
    TRY(must_find(&found, task, dir));
    for (size_t f = 0; f < found.gl_pathc && status == OK; f++) {
        char *subject = subject_of(found.gl_pathv[f]),
             *name = must_format("%s_%s", task->name, subject), *folder = folder_of(dir);
        Suite *suite = add_suite(d, name, subject, task->name);
        json_t *docs = NULL;
        status = mmlu_docs(&docs, d, found.gl_pathv[f], subject);
        if (docs) json_decref(suite->docs), suite->docs = docs;
        for (int i = 0; i < task->fewshot_files.count && status == OK; i++) {
            const char *pattern = task->fewshot_files.items[i],
                       *brace = strstr(pattern, "{subject}");
            if (!brace) continue;
            json_t *examples = NULL;
            glob_t dev;
            if (!find_pattern(&dev, must_format("%s/%.*s%s%s", folder, (int)(brace - pattern),
                                                pattern, subject, brace + 9)))
                continue;
            status = mmlu_docs(&examples, d, dev.gl_pathv[0], subject);
            globfree(&dev);
            if (!examples) continue;
            json_decref(suite->examples);
            suite->examples = examples;
            break;
        }
        free(subject);
        free(name);
        free(folder);
    }
    globfree(&found);
    return status;
}

/* MMMLU: a CSV a language, with Question, A to D, Answer and Subject. */
static Status read_mmmlu(Documents *d, const Task *task, const char *dir) {
    glob_t found;
    json_t *rows = NULL, *row;
    size_t i;
    Status status = OK;
    TRY(must_find(&found, task, dir));
    for (size_t f = 0; f < found.gl_pathc; f++) {
        const char *slash = strrchr(found.gl_pathv[f], '/');
        char *language = must_strdup(slash ? slash + 1 : found.gl_pathv[f]),
             *dot = strchr(language, '.');
        if (dot) *dot = 0;
        char *name = must_format("%s_%s", task->name,
                                 strncmp(language, "mmlu_", 5) ? language : language + 5);
        Suite *suite = add_suite(d, name, name + strlen(task->name) + 1, task->name);
        free(language);
        free(name);
        TRY_DONE(rows_noted(&rows, d, found.gl_pathv[f]));
        json_array_foreach(rows, i, row) {
            static const char *const keys[] = {"Question", "A", "B", "C", "D", "Answer"};
            const char *cells[6];
            for (int k = 0; k < 6; k++)
                if (!(cells[k] = json_string_value(json_object_get(row, keys[k]))))
                    FAIL_DONE(ERR_FORMAT, "%s: row %zu has no '%s'", found.gl_pathv[f], i + 1,
                              keys[k]);
            if (strlen(cells[5]) != 1 || *cells[5] < 'A' || *cells[5] > 'D')
                FAIL_DONE(ERR_FORMAT, "%s: row %zu: answer '%s', expected A to D",
                          found.gl_pathv[f], i + 1, cells[5]);
            const char *subject = json_string_value(json_object_get(row, "Subject"));
            json_array_append_new(
                suite->docs, json_pack("{s:s, s:s, s:[s,s,s,s], s:i}", "question", cells[0],
                                       "subject", subject ? subject : "", "choices", cells[1],
                                       cells[2], cells[3], cells[4], "answer", *cells[5] - 'A'));
        }
        json_decref(rows);
        rows = NULL;
    }
done:
    json_decref(rows);
    globfree(&found);
    return status;
}

/* An answer of GPQA as both harnesses clean it. */
static char *gpqa_clean(const char *text) {
    Slice s = slice_strip(slice_of(text));
    Text out = {0};
    text_add(&out, "", 0);
    for (size_t i = 0; i < s.size; i++) {
        if (s.size - i >= 8 && !memcmp(s.bytes + i, " [title]", 8)) {
            text_adds(&out, ". ");
            i += 7;
        } else {
            text_add(&out, s.bytes + i, 1);
        }
    }
    Text single = {0};
    text_add(&single, "", 0);
    for (size_t i = 0; i < out.size; i++) { /* pairs of spaces, from the left, once */
        text_add(&single, out.bytes + i, 1);
        if (out.bytes[i] == ' ' && i + 1 < out.size && out.bytes[i + 1] == ' ') i++;
    }
    text_free(&out);
    return single.bytes;
}

/* GPQA: four answers in an order drawn by a generator of its own, seeded 0. `simple`: as
 * simple-evals draws it, a permutation for each of four rounds over the right answer and the wrong
 * ones; else as the harness does, a shuffle of the wrong ones and the right. */
static Status read_gpqa(Documents *d, const Task *task, const char *dir, bool simple) {
    static const char *const keys[] = {"Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2",
                                       "Incorrect Answer 3", "Question"};
    glob_t found;
    json_t *rows = NULL, *row;
    size_t i;
    Mersenne m;
    Status status = OK;
    TRY(must_find(&found, task, dir));
    mersenne_seed(&m, 0);
    Suite *suite = add_suite(d, task->name, task->name, NULL);
    TRY_DONE(rows_noted(&rows, d, found.gl_pathv[0]));
    for (int round = 0; round < (simple ? 4 : 1); round++) json_array_foreach(rows, i, row) {
            char *texts[4];
            int64_t order[] = {1, 2, 3, 0};
            for (int k = 0; k < 5; k++)
                if (!json_is_string(json_object_get(row, keys[k])))
                    FAIL_DONE(ERR_FORMAT, "%s: row %zu has no '%s'", found.gl_pathv[0], i + 1,
                              keys[k]);
            for (int k = 0; k < 4; k++) {
                const char *text = json_string_value(json_object_get(row, keys[k]));
                texts[k] = simple ? must_strdup(text) : gpqa_clean(text);
            }
            if (simple)
                mersenne_sample(&m, order, 4, 4);
            else
                mersenne_shuffle(&m, order, 4);
            int right = 0;
            while (strcmp(texts[order[right]], texts[0])) right++;
            char letter[] = {'(', (char)('A' + right), ')', 0};
            json_array_append_new(suite->docs,
                                  json_pack("{s:O, s:s, s:s, s:s, s:s, s:[s,s,s,s], s:s, s:i}",
                                            "Question", json_object_get(row, "Question"), "choice1",
                                            texts[order[0]], "choice2", texts[order[1]], "choice3",
                                            texts[order[2]], "choice4", texts[order[3]], "choices",
                                            texts[order[0]], texts[order[1]], texts[order[2]],
                                            texts[order[3]], "answer", letter, "problem", (int)i));
            for (int k = 0; k < 4; k++) free(texts[k]);
        }
done:
    json_decref(rows);
    globfree(&found);
    return status;
}

/* MBPP: problems 11 to 510 are asked, 2 to 4 are the examples. */
static Status read_mbpp(Documents *d, const Task *task, const char *dir) {
    glob_t found;
    json_t *rows = NULL, *row;
    size_t i;
    Status status = OK;
    TRY(must_find(&found, task, dir));
    Suite *suite = add_suite(d, task->name, task->name, NULL);
    TRY_DONE(rows_noted(&rows, d, found.gl_pathv[0]));
    json_array_foreach(rows, i, row) {
        json_int_t id = json_integer_value(json_object_get(row, "task_id"));
        if (id >= 2 && id <= 4) json_array_append(suite->examples, row);
        if (id >= 11 && id <= 510) json_array_append(suite->docs, row);
    }
done:
    json_decref(rows);
    globfree(&found);
    return status;
}

/* BFCL: a file a category, its accepted calls beside it in possible_answer/. Single turns only:
 * conversations with services that keep state are left out. */
static Status read_bfcl(Documents *d, const Task *task, const char *dir) {
    glob_t found;
    json_t *rows = NULL, *answers = NULL, *row, *function;
    size_t i, k;
    Status status = OK;
    TRY(must_find(&found, task, dir));
    for (size_t f = 0; f < found.gl_pathc; f++) {
        const char *path = found.gl_pathv[f], *slash = strrchr(path, '/'),
                   *file = slash ? slash + 1 : path;
        if (strstr(file, "multi_turn")) continue;
        const char *head = strncmp(file, "BFCL_v4_", 8) ? file : file + 8;
        char *category = must_format("%.*s", (int)strcspn(head, "."), head),
             *name = must_format("%s_%s", task->name, category),
             *beside =
                 must_format("%.*s/possible_answer/%s", (int)(file != path ? file - path - 1 : 1),
                             file != path ? path : ".", file);
        Suite *suite = add_suite(d, name, category, task->name);
        bool none = strstr(category, "irrelevance") != NULL;
        free(category);
        free(name);
        status = rows_noted(&rows, d, path);
        if (status == OK && !none) status = rows_noted(&answers, d, beside);
        free(beside);
        TRY_DONE(status);
        if (!none && json_array_size(rows) != json_array_size(answers))
            FAIL_DONE(ERR_FORMAT, "%s: %zu questions, and %zu accepted answers", path,
                      json_array_size(rows), json_array_size(answers));
        json_array_foreach(rows, i, row) {
            json_t *doc = json_copy(row), *tools = json_array(),
                   *answer = json_array_get(answers, i);
            if (!none && !json_equal(json_object_get(row, "id"), json_object_get(answer, "id"))) {
                json_decref(doc);
                json_decref(tools);
                FAIL_DONE(ERR_FORMAT, "%s: row %zu and its accepted answer have different ids",
                          path, i + 1);
            }
            json_array_foreach(json_object_get(row, "function"), k, function)
                json_array_append_new(tools, bfcl_tool(function));
            json_object_set(doc, "messages", json_array_get(json_object_get(row, "question"), 0));
            json_object_set_new(doc, "tools", tools);
            if (answer)
                json_object_set(doc, "ground_truth", json_object_get(answer, "ground_truth"));
            json_array_append_new(suite->docs, doc);
        }
        json_decref(rows);
        json_decref(answers);
        rows = answers = NULL;
    }
done:
    json_decref(rows);
    json_decref(answers);
    globfree(&found);
    return status;
}

/* LiveCodeBench: {question_content, starter_code, public_test_cases, private_test_cases, metadata,
 * ...}; the cases of both kinds become test_cases, a method's name func_name. */
static Status read_livecodebench(Documents *d, const Task *task, const char *dir) {
    glob_t found;
    json_t *rows = NULL, *row;
    size_t i;
    Status status = OK;
    TRY(must_find(&found, task, dir));
    Suite *suite = add_suite(d, task->name, task->name, NULL);
    for (size_t f = 0; f < found.gl_pathc; f++) {
        TRY_DONE(rows_noted(&rows, d, found.gl_pathv[f]));
        json_array_foreach(rows, i, row) {
            json_t *cases = json_array(), *more = NULL, *metadata = NULL;
            static const char *const keys[] = {"public_test_cases", "private_test_cases"};
            for (int k = 0; k < 2 && status == OK; k++) {
                json_t *given = json_object_get(row, keys[k]);
                if (json_is_array(given)) {
                    json_array_extend(cases, given);
                } else if (json_is_string(given)) {
                    status = judge_decode(&more, json_slice(given));
                    if (status == OK) json_array_extend(cases, more);
                    json_decref(more);
                    more = NULL;
                }
            }
            Slice text = json_slice(json_object_get(row, "metadata"));
            if (status == OK && text.size)
                status = json_read(&metadata, text.bytes, text.size, "metadata");
            if (status != OK)
                status = status_prefix(status, "%s: row %zu", found.gl_pathv[f], i + 1);
            json_t *doc = json_copy(row);
            json_object_del(doc, "private_test_cases");
            json_object_set_new(doc, "test_cases", cases);
            if (!json_object_get(doc, "starter_code"))
                json_object_set_new(doc, "starter_code", json_string(""));
            json_t *name = json_object_get(metadata, "func_name");
            if (json_is_string(name)) json_object_set(doc, "func_name", name);
            json_decref(metadata);
            json_array_append_new(suite->docs, doc);
            TRY_DONE(status);
        }
        json_decref(rows);
        rows = NULL;
    }
done:
    json_decref(rows);
    globfree(&found);
    return status;
}

Status documents_load(Documents *d, const Task *task, const char *dir) {
    Status status;
    *d = (Documents){0};
    if (!strcmp(task->reads, "rows"))
        status = read_rows(d, task, dir);
    else if (!strcmp(task->reads, "mmlu"))
        status = read_mmlu(d, task, dir);
    else if (!strcmp(task->reads, "mmmlu"))
        status = read_mmmlu(d, task, dir);
    else if (!strncmp(task->reads, "gpqa", 4))
        status = read_gpqa(d, task, dir, task->reads[4] != 0);
    else if (!strcmp(task->reads, "mbpp"))
        status = read_mbpp(d, task, dir);
    else if (!strcmp(task->reads, "bfcl"))
        status = read_bfcl(d, task, dir);
    else if (!strcmp(task->reads, "livecodebench"))
        status = read_livecodebench(d, task, dir);
    else
        status = status_fail(
            ERR_CONFIG,
            "task '%s' reads '%s', expected rows, mmlu, mmmlu, gpqa, mbpp, bfcl or livecodebench",
            task->name, task->reads);
    if (status != OK) documents_free(d);
    return status;
}

void documents_free(Documents *d) {
    for (int i = 0; i < d->count; i++) {
        free(d->suites[i].name);
        free(d->suites[i].alias);
        free(d->suites[i].group);
        free(d->suites[i].folder);
        json_decref(d->suites[i].docs);
        json_decref(d->suites[i].examples);
    }
    for (int i = 0; i < d->file_count; i++) free(d->files[i].path);
    free(d->suites);
    free(d->files);
    *d = (Documents){0};
}
