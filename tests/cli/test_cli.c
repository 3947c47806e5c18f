/* test_cli.c - exit statuses and messages of the program on input that is wrong. */
#include "formats/file.h"
#include "tests/program.h"

CASE(cli, a_wrong_command_line_exits_2) {
    EXPECT_EXIT(2, "usage:", "%s", "");
    EXPECT_EXIT(2, "unknown command 'polish'", "polish");
    EXPECT_EXIT(2, "unknown option --modle", "score --modle x");
    EXPECT_EXIT(2, "OUT is missing", "init tiny");
    EXPECT_EXIT(2, "--kv go with --model", "bench --preset tiny --prompt 4");
    EXPECT_EXIT(2, "--rank go with --preset", "bench --weights q4_0");
    EXPECT_EXIT(2, "is no preset", "init e3b %s/x", test_folder());
    EXPECT_EXIT(2, "expected a whole number", "init tiny %s/x --layers many", test_folder());
    EXPECT_EXIT(2, "--model is missing", "score hello");
}

CASE(cli, every_command_has_help) {
    static const char *const names[] = {"init",  "inspect", "prepare",  "doctor",
                                        "train", "score",   "generate", "tokenize",
                                        "parse", "export",  "plot"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        EXPECT_EXIT(0, "usage: lapidary", "%s --help", names[i]);
}

CASE(cli, wrong_files_exit_1_with_their_name) {
    const char *f = test_folder();
    char *yaml = path_join(f, "run.yaml");
    EXPECT_EXIT(1, "nowhere: is not there", "inspect nowhere");
    EXPECT_EXIT(1, "nowhere/config.json", "score --model nowhere hello");
    const char *unknown = "model: m\noutput: o\ndata: {train: d}\nfoo: 1\n";
    EXPECT_OK(file_write(yaml, unknown, strlen(unknown)));
    EXPECT_EXIT(1, "run.yaml:4: unknown key 'foo'", "train %s", yaml);
    const char *good = "model: m\noutput: o\ndata: {train: d}\n";
    EXPECT_OK(file_write(yaml, good, strlen(good)));
    EXPECT_EXIT(2, "unknown key 'lora.rnk'", "train %s lora.rnk=3", yaml);
    EXPECT_EXIT(0, "", "init tiny %s/m --tokenizer demo/tokenizer --layers 2", f);
    EXPECT_EXIT(1, "is already there", "init tiny %s/m --tokenizer demo/tokenizer --layers 2", f);
    EXPECT_EXIT(1, "no chat template; give --chat-format", "generate --model %s/m hello", f);
    EXPECT_EXIT(1, "cannot make the folder",
                "train %s model=%s/m data.train=demo/gems.jsonl output=/proc/no/way", yaml, f);
    free(yaml);
}

CASE(cli, row_commands_answer_every_row_in_order) {
    const char *f = test_folder();
    char *rows = path_join(f, "rows.jsonl");
    const char *text = "{\"text\": \"Milk\"}\n\n{\"txt\": 1}\nnonsense\n{\"text\": \"is white\", "
                       "\"more\": null}\n";
    EXPECT_OK(file_write(rows, text, strlen(text)));
    EXPECT_EXIT(0, "{\"error\": ", "tokenize --model demo/tokenizer --data %s", rows);
    int lines = 0, errors = 0;
    for (char *p = program_out; (p = strchr(p, '\n')); p++) lines++;
    for (char *p = program_out; (p = strstr(p, "\"error\"")); p++) errors++;
    EXPECT(lines == 4 && errors == 2, "%d lines, %d errors", lines, errors);
    EXPECT_EXIT(0, "", "init tiny %s/m --tokenizer demo/tokenizer --layers 2", f);
    EXPECT_EXIT(1, "rows.jsonl:3", "score --model %s/m --data %s", f, rows);
    EXPECT_EXIT(0, "{\"role\": \"assistant\", \"content\": \"hi\"}", "parse 'hi<turn|>'");
    free(rows);
}

/* A file system of 1 MB: what does not fit is told, and nothing half-written is left. */
CASE(cli, a_full_disk_is_an_error_and_leaves_nothing) {
    char mount[512], line[1024];
    snprintf(mount, sizeof mount, "%s/small", test_folder());
    EXPECT_OK(folder_make(mount));
    snprintf(line, sizeof line, "mount -t tmpfs -o size=1m tmpfs %s 2>/dev/null", mount);
    if (system(line)) SKIP("a tmpfs cannot be mounted here");
    int code = program_run("init tiny %s/m --tokenizer demo/tokenizer", mount);
    char copy[512];
    snprintf(copy, sizeof copy, "%.500s", program_output());
    snprintf(line, sizeof line, "ls -A %s | wc -l > %s/left", mount, test_folder());
    int listed = system(line);
    snprintf(line, sizeof line, "umount %s", mount);
    int unmounted = system(line);
    EXPECT(!listed && !unmounted);
    EXPECT(code == 1 && strstr(copy, "No space left"), "exit status %d: %s", code, copy);
    char *left, *path = path_join(test_folder(), "left");
    size_t size;
    EXPECT_OK(file_read(&left, &size, path, 100));
    EXPECT(atoi(left) == 0, "%s entries are left", left);
}
