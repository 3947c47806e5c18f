/* test_sandbox.c - programs that misbehave are contained and fail. */
#include "eval/documents.h"
#include "eval/judge.h"
#include "eval/rescore.h"
#include "eval/sandbox.h"
#include "eval/table.h"
#include "tests/test.h"

#include <sys/stat.h>
#include <time.h>

static SandboxResult run(const char *program, const char *input) {
    SandboxResult r;
    SandboxLimits limits = {2, (int64_t)512 << 20, 1 << 20, 1 << 16};
    EXPECT_OK(sandbox_python(&r, slice_of(program), slice_of(input), &limits));
    text_add(&r.output, "", 0);
    return r;
}

static void need(void) {
    if (sandbox_check() != OK) SKIP("%s", status_message());
}

CASE(sandbox, good_programs_pass_and_wrong_ones_fail) {
    need();
    SandboxResult r = run("print(input()[::-1])", "abc\n");
    EXPECT(r.end == SANDBOX_PASSED && !strcmp(r.output.bytes, "cba\n"), "%s", r.output.bytes);
    r = run("assert 1 == 2", "");
    EXPECT(r.end == SANDBOX_FAILED && strstr(r.output.bytes, "AssertionError"));
    r = run("def (", "");
    EXPECT(r.end == SANDBOX_FAILED && strstr(r.output.bytes, "SyntaxError"));
    r = run("import threading\nt = threading.Thread(target=print, args=(5,))\nt.start()\nt.join()",
            "");
    EXPECT(r.end == SANDBOX_PASSED && !strcmp(r.output.bytes, "5\n"), "%s", r.output.bytes);
}

CASE(sandbox, loops_and_sleeps_end_in_time) {
    need();
    time_t start = time(NULL);
    EXPECT(run("while True: pass", "").end != SANDBOX_PASSED);
    EXPECT(run("import time\ntime.sleep(60)", "").end == SANDBOX_TIMEOUT);
    EXPECT(run("import os, time\nos.close(1); os.close(2); time.sleep(60)", "").end ==
           SANDBOX_TIMEOUT);
    EXPECT(run("while True: print('x' * 1000)", "").end != SANDBOX_PASSED);
    EXPECT(time(NULL) - start < 20);
}

CASE(sandbox, forks_memory_files_and_sockets_are_denied) {
    need();
    SandboxResult r = run("import os\nwhile True: os.fork()", "");
    EXPECT(r.end == SANDBOX_FAILED && strstr(r.output.bytes, "PermissionError"), "%s",
           r.output.bytes);
    r = run("import subprocess\nsubprocess.run(['ls'])", "");
    EXPECT(r.end == SANDBOX_FAILED, "%s", r.output.bytes);
    r = run("x = []\nwhile True: x.append(bytearray(1 << 20))", "");
    EXPECT(r.end == SANDBOX_FAILED && strstr(r.output.bytes, "MemoryError"), "%s", r.output.bytes);
    r = run("f = open('big', 'wb')\nfor i in range(100): f.write(bytes(1 << 20)); f.flush()", "");
    EXPECT(r.end == SANDBOX_FAILED, "%s", r.output.bytes);
    r = run("open('/usr/evil', 'w')", "");
    EXPECT(r.end == SANDBOX_FAILED && strstr(r.output.bytes, "Read-only"), "%s", r.output.bytes);
    r = run("import os\nprint(os.path.exists('/etc/passwd'), os.path.exists('/root'), "
            "os.path.exists('/home'), os.path.exists('/work'))",
            "");
    EXPECT(!strcmp(r.output.bytes, "False False False False\n"), "%s", r.output.bytes);
    r = run("import socket\nsocket.create_connection(('127.0.0.1', 22))", "");
    EXPECT(r.end == SANDBOX_FAILED && strstr(r.output.bytes, "PermissionError"), "%s",
           r.output.bytes);
    r = run("import os\nos.kill(1, 9)\nos.kill(-1, 9)\nprint('here')", "");
    EXPECT(r.end != SANDBOX_TIMEOUT);
}

CASE(sandbox, nothing_is_left_behind) {
    need();
    char marker[] = "/tmp/lapidary-sandbox-marker";
    struct stat info;
    run("open('/tmp/lapidary-sandbox-marker', 'w').write('x')", "");
    EXPECT(stat(marker, &info), "a file of the program is outside");
}

CASE(judge, outputs_are_compared_by_lines_and_numbers) {
    static const struct {
        const char *a, *b;
        bool same;
    } pairs[] = {{"1 2\n3\n", "1 2\n3", true}, {" 1 \n", "1", true},   {"1.0 2", "1 2.00", true},
                 {"1 2", "1  2", true},        {"1\n2", "1 2", false}, {"yes", "Yes", false},
                 {"1 2 3", "1 2", false}};
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++)
        EXPECT(judge_same(slice_of(pairs[i].a), slice_of(pairs[i].b)) == pairs[i].same, "%s",
               pairs[i].a);
}

/* A list of one case as releases hide it: JSON, pickled, compressed, in base 64. */
static const char hidden[] =
    "eJxrYJlqxwABPVbR1UqZeQWlJUpWCkrGCiYxeUo6Ckr5pSVQIXOIQElqcUlJZUEqSKi4JCUzT6k2dooeALJaFKU=";

CASE(judge, hidden_cases_are_read_and_run) {
    json_t *cases, *bad;
    bool passed;
    Text right = {0}, wrong = {0}, method = {0};
    EXPECT_OK(judge_decode(&cases, slice_of(hidden)));
    EXPECT_ERROR(judge_decode(&bad, slice_of("AAAA")), "no zlib stream");
    EXPECT_ERROR(judge_decode(&bad, slice_of("*")), "base 64");
    need();
    text_adds(&right, "print(sum(map(int, input().split())))");
    text_adds(&wrong, "print(8)");
    EXPECT_OK(judge_cases(&passed, &right, cases, NULL));
    EXPECT(passed);
    EXPECT_OK(judge_cases(&passed, &wrong, cases, NULL));
    EXPECT(!passed);
    text_adds(&method, "class Solution:\n    def add(self, a: List[int], b: int):\n"
                       "        return [x + b for x in a]\n");
    cases = json_pack("[{s:s, s:s}]", "input", "[1, 2]\n3", "output", "[4, 5]");
    EXPECT_OK(judge_cases(&passed, &method, cases, json_string("add")));
    EXPECT(passed);
}

CASE(judge, the_authors_solutions_pass_and_broken_ones_do_not) {
    json_t *rows, *row;
    size_t i;
    EXPECT_OK(table_load(&rows, shared_path("data/humaneval/HumanEval.jsonl.gz")));
    need();
    json_array_foreach(rows, i, row) {
        if (i % 4) continue;
        json_t *mine =
            json_pack("{s:s, s:s, s:O, s:O}", "task", "humaneval", "filter", "create_test", "doc",
                      row, "response", json_object_get(row, "canonical_solution"));
        EXPECT_OK(rescore_row(mine, true));
        EXPECT(json_number_value(json_object_get(mine, "score")) == 1, "HumanEval/%zu", i);
        json_object_set_new(mine, "response", json_string("    return None\n"));
        EXPECT_OK(rescore_row(mine, true));
        EXPECT(json_number_value(json_object_get(mine, "score")) == 0, "HumanEval/%zu", i);
    }
}
