/* test_chat.c - a conversation with two functions, one of which fails, at the terminal and over
 * HTTP.
 *
 * A tiny model learns the conversation by heart first: what is tested is everything around it. */
#include "data/json.h"
#include "formats/file.h"
#include "infer/dialog.h"
#include "tests/program.h"
#include "tests/test.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define DECLARE(name)                                                                              \
    "{\"type\": \"function\", \"function\": {\"name\": \"" name                                    \
    "\", \"description\": \"d\", \"parameters\": {\"type\": \"object\", \"properties\": "          \
    "{\"stone\": {\"type\": \"string\"}}, \"required\": [\"stone\"]}}"
#define TOOLS "[" DECLARE("weigh") "}, " DECLARE("polish") "}]"
#define CALL(name)                                                                                 \
    "{\"role\": \"assistant\", \"tool_calls\": [{\"id\": \"c\", \"type\": \"function\", "          \
    "\"function\": {\"name\": \"" name "\", \"arguments\": {\"stone\": \"ruby\"}}}]"
#define SAY(role, text) "{\"role\": \"" role "\", \"content\": \"" text "\"}"
#define FIRST                                                                                      \
    SAY("user", "Weigh the ruby.")                                                                 \
    ", " CALL("weigh") ", \"tool_responses\": [{\"name\": \"weigh\", \"response\": {\"carat\": "   \
                       "2}}]}, " SAY("assistant", "It weighs 2 carat.")
#define SECOND                                                                                     \
    SAY("user", "Polish it.")                                                                      \
    ", " CALL("polish") ", \"tool_responses\": [{\"name\": \"polish\", \"response\": {\"error\": " \
                        "\"'polish' "                                                              \
                        "failed\", \"output\": \"no cloth\\n\"}}]}, " SAY("assistant",             \
                                                                          "That failed.")
/* The same as OpenAI's clients write it: text in a message of role tool. */
#define OVER_HTTP                                                                                  \
    SAY("user", "Weigh the ruby.")                                                                 \
    ", " CALL("weigh") "}, "                                                                       \
                       "{\"role\": \"tool\", \"tool_call_id\": \"c\", \"content\": \"2 carat\"}"

static char model[512];

/* The model that knows the conversation. */
static void train_model(void) {
    const char *dir = test_folder();
    char path[512];
    Text run = {0};
    static const char rows[] = "{\"messages\": [" FIRST "], \"tools\": " TOOLS "}\n"
                               "{\"messages\": [" FIRST ", " SECOND "], \"tools\": " TOOLS "}\n"
                               "{\"messages\": [" OVER_HTTP
                               ", " SAY("assistant", "Two carat.") "], \"tools\": " TOOLS "}\n";
    snprintf(path, sizeof path, "%s/rows.jsonl", dir);
    EXPECT_OK(file_write(path, rows, strlen(rows)));
    text_addf(&run,
              "model: %s/start\noutput: %s/run\nmethod: full\ndtype: f32\n"
              "data: {train: %s/rows.jsonl, packing: false, chat_format: small, max_length: 512}\n"
              "batch: {sequences: 3, accumulate: 1}\noptimizer: {lr: 3.0e-3}\n"
              "schedule: {name: cosine, warmup: 5}\nsteps: 90\nsave: {every: 1000}\n",
              dir, dir, dir);
    snprintf(path, sizeof path, "%s/run.yaml", dir);
    EXPECT_OK(file_write(path, run.bytes, run.size));
    EXPECT_RUN(0, "init tiny %s/start --tokenizer demo/tokenizer --dtype f32", dir);
    EXPECT_RUN(0, "train %s", path);
    snprintf(model, sizeof model, "%s/run/model", dir);
}

CASE(chat, functions_run_when_allowed_and_their_failures_are_told) {
    char path[512], *bytes;
    size_t size;
    static const char tools[] = "[" DECLARE(
        "weigh") ", \"command\": [\"sh\", \"-c\", \"cat >&2; echo '{\\\"carat\\\": "
                 "2}'\"]}, " DECLARE(
                     "polish") ", \"command\": [\"sh\", \"-c\", \"cat >&2; echo no cloth; "
                               "exit 3\"]}]";
    train_model();
    snprintf(path, sizeof path, "%s/tools.json", test_folder());
    EXPECT_OK(file_write(path, tools, strlen(tools)));
    snprintf(path, sizeof path, "%s/said.txt", test_folder());
    static const char said[] = "Weigh the ruby.\ny\nPolish it.\ny\n/clear\nWeigh the ruby.\nn\n";
    EXPECT_OK(file_write(path, said, strlen(said)));
    EXPECT_RUN(0,
               "chat --model %s --dtype f32 --chat-format small --temperature 0 --tools "
               "%s/tools.json --save %s/saved.jsonl < %s",
               model, test_folder(), test_folder(), path);
    EXPECT(strstr(program_out, "weigh: {\"carat\": 2}\nIt weighs 2 carat."), "%s", program_out);
    EXPECT(strstr(program_out, "'polish' failed\", \"output\": \"no cloth\\n\"}\nThat failed."),
           "%s", program_out);
    EXPECT(strstr(program_out, "the user did not allow this call"), "%s", program_out);
    EXPECT(strstr(program_err, "{\"stone\": \"ruby\"}"), "a command was not given its arguments");
    snprintf(path, sizeof path, "%s/saved.jsonl", test_folder());
    EXPECT_OK(file_read(&bytes, &size, path, 1 << 20));
    EXPECT(strstr(bytes, "\"tool_responses\"") && strstr(bytes, "did not allow"), "%s", bytes);
    EXPECT_RUN(0, "prepare --model %s --data %s --out %s/saved.h5 --chat-format small", model, path,
               test_folder());
}

/* ---- HTTP ---- */

static pid_t server;
static int port;

static void start_server(const char *more) {
    int ends[2];
    char line[256] = "";
    EXPECT(!pipe(ends));
    server = fork();
    if (!server) {
        char *command = must_format("exec %s serve --model %s --port 0 --dtype f32 --chat-format "
                                    "small --context 400 %s",
                                    program_path(), model, more);
        prctl(PR_SET_PDEATHSIG, SIGTERM); /* a failed test leaves no server */
        dup2(ends[1], 2);
        execl("/bin/sh", "sh", "-c", command, NULL);
        _exit(127);
    }
    close(ends[1]);
    for (size_t n = 0; n + 1 < sizeof line && !strchr(line, '\n'); n++)
        if (read(ends[0], line + n, 1) != 1) break;
    const char *colon = strstr(line, "127.0.0.1:");
    EXPECT(colon, "the server says '%s'", line);
    port = atoi(colon + 10);
}

static void stop_server(void) {
    int state;
    kill(server, SIGTERM);
    waitpid(server, &state, 0);
    EXPECT(WIFEXITED(state) && WEXITSTATUS(state) == 0, "the server ended with %d", state);
}

static int connect_to(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    EXPECT(fd >= 0 && !connect(fd, (struct sockaddr *)&address, sizeof address));
    return fd;
}

/* Sends a request; the whole reply, headers and all. */
static char *ask(const char *method, const char *path, const char *headers, const char *body) {
    int fd = connect_to();
    char *request = must_format("%s %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%s"
                                "Content-Length: %zu\r\n\r\n%s",
                                method, path, headers, strlen(body), body);
    Text reply = {0};
    char buffer[4096];
    EXPECT(write(fd, request, strlen(request)) == (ssize_t)strlen(request));
    for (ssize_t n; (n = read(fd, buffer, sizeof buffer)) > 0;) text_add(&reply, buffer, (size_t)n);
    close(fd);
    free(request);
    return reply.bytes;
}

#define EXPECT_REPLY(code, part, method, path, headers, body)                                      \
    do {                                                                                           \
        char *said = ask(method, path, headers, body);                                             \
        EXPECT(said &&atoi(said + 9) == (code), "%s", said);                                       \
        EXPECT(strstr(said, part), "'%s' lacks '%s'", said, part);                                 \
        free(said);                                                                                \
    } while (0)

#define CHAT_PATH "/v1/chat/completions"
#define GREEDY    ", \"temperature\": 0, \"tools\": " TOOLS "}"

CASE(serve, calls_come_and_go_and_what_is_wrong_is_said) {
    train_model();
    start_server("--body 20000");
    EXPECT_REPLY(200, "\"status\": \"ok\"", "GET", "/health", "", "");
    EXPECT_REPLY(200, "<title>Lapidary</title>", "GET", "/", "", "");
    EXPECT_REPLY(200, "\"id\": \"model\"", "GET", "/v1/models", "", "");
    EXPECT_REPLY(200, "\"arguments\": \"{\\\"stone\\\": \\\"ruby\\\"}\"", "POST", CHAT_PATH, "",
                 "{\"messages\": [" SAY("user", "Weigh the ruby.") "]" GREEDY);
    EXPECT_REPLY(200, "\"finish_reason\": \"tool_calls\"", "POST", CHAT_PATH, "",
                 "{\"messages\": [" SAY("user", "Weigh the ruby.") "]" GREEDY);
    EXPECT_REPLY(200, "Two carat.", "POST", CHAT_PATH, "", "{\"messages\": [" OVER_HTTP "]" GREEDY);
    EXPECT_REPLY(200, "\"tool_calls\": [{\"index\": 0", "POST", CHAT_PATH, "",
                 "{\"stream\": true, \"messages\": [" SAY("user", "Weigh the ruby.") "]" GREEDY);
    EXPECT_REPLY(
        200, "\"name\": \"polish\", \"arguments\": \"{\\\"stone\\\":", "POST", CHAT_PATH, "",
        "{\"messages\": [" SAY(
            "user",
            "Weigh the ruby.") "], \"tool_choice\": {\"type\": "
                               "\"function\", \"function\": {\"name\": \"polish\"}}" GREEDY);
    EXPECT_REPLY(200, "\"tool_calls\"", "POST", CHAT_PATH, "",
                 "{\"messages\": [" SAY("user", "Hello") "], \"tool_choice\": \"required\"" GREEDY);
    EXPECT_REPLY(200, "\\\"cut\\\":", "POST", CHAT_PATH, "",
                 "{\"messages\": [" SAY(
                     "user", "Weigh the ruby.") "], \"temperature\": 0, "
                                                "\"response_format\": {\"type\": \"json_schema\", "
                                                "\"json_schema\": {\"schema\": "
                                                "{\"properties\": {\"cut\": {\"type\": "
                                                "\"boolean\"}}, \"required\": [\"cut\"]}}}}");
    EXPECT_REPLY(
        400, "'pattern' is not understood", "POST", CHAT_PATH, "",
        "{\"messages\": [" SAY(
            "user", "x") "], \"response_format\": {\"type\": "
                         "\"json_schema\", \"json_schema\": {\"schema\": {\"pattern\": \"a\"}}}}");
    EXPECT_REPLY(400, "no function 'cut'", "POST", CHAT_PATH, "",
                 "{\"messages\": [" SAY(
                     "user", "x") "], \"tool_choice\": {\"type\": "
                                  "\"function\", \"function\": {\"name\": \"cut\"}}" GREEDY);
    EXPECT_REPLY(200, "data: [DONE]", "POST", "/v1/completions", "",
                 "{\"stream\": true, \"prompt\": \"Weigh\", \"max_tokens\": 3}");
    EXPECT_REPLY(404, "\"error\"", "GET", "/nothing", "", "");
    EXPECT_REPLY(405, "POST only", "GET", CHAT_PATH, "", "");
    EXPECT_REPLY(400, "no JSON", "POST", CHAT_PATH, "", "{\"messages\": [");
    EXPECT_REPLY(400, "'messages' is not", "POST", CHAT_PATH, "", "{}");
    EXPECT_REPLY(400, "'max_tokens' is 0", "POST", CHAT_PATH, "",
                 "{\"messages\": [" SAY("user", "x") "], \"max_tokens\": 0}");
    EXPECT_REPLY(400, "reads text alone", "POST", CHAT_PATH, "",
                 "{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": "
                 "\"input_audio\"}]}]}");
    EXPECT_REPLY(404, "no model 'other'", "POST", CHAT_PATH, "",
                 "{\"model\": \"other\", \"messages\": [" SAY("user", "x") "]}");
    char *long_body = must_calloc(1, 30000), *words = must_calloc(1, 9000);
    memset(words, 'x', 8000);
    snprintf(long_body, 30000, "{\"prompt\": \"%s\"}", words);
    EXPECT_REPLY(400, "context_length_exceeded", "POST", "/v1/completions", "", long_body);
    memset(long_body, ' ', 25000);
    EXPECT_REPLY(413, "body_too_large", "POST", "/v1/completions", "", long_body);
    EXPECT_REPLY(200, "lapidary_sequences_running 0", "GET", "/metrics", "", "");
    stop_server();
}

CASE(serve, a_key_is_asked_for_and_a_full_queue_turns_away) {
    int slow[8];
    train_model();
    start_server("--key secret --sequences 1 --queue 2");
    EXPECT_REPLY(401, "invalid_api_key", "GET", "/v1/models", "", "");
    EXPECT_REPLY(401, "invalid_api_key", "GET", "/v1/models", "Authorization: Bearer secre\r\n",
                 "");
    EXPECT_REPLY(200, "\"data\"", "GET", "/v1/models", "Authorization: Bearer secret\r\n", "");
    static const char body[] = "{\"prompt\": \"go\", \"max_tokens\": 300, \"temperature\": 2, "
                               "\"stream\": true}";
    for (int i = 0; i < 8; i++) { /* readers who never read, then leave */
        char *request = must_format("POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: "
                                    "Bearer secret\r\nContent-Length: %zu\r\n\r\n%s",
                                    strlen(body), body);
        slow[i] = connect_to();
        EXPECT(write(slow[i], request, strlen(request)) == (ssize_t)strlen(request));
    }
    int turned = 0, served = 0;
    for (int i = 0; i < 8; i++) {
        char reply[16] = "";
        EXPECT(recv(slow[i], reply, 12, MSG_WAITALL) == 12);
        turned += !strcmp(reply + 9, "429");
        served += !strcmp(reply + 9, "200");
        close(slow[i]);
    }
    EXPECT(turned > 0 && served > 0 && turned + served == 8, "%d and %d", turned, served);
    for (int i = 0; i < 50; i++) { /* they are given up, and the next is served */
        char *metrics = ask("GET", "/metrics", "Authorization: Bearer secret\r\n", "");
        bool idle = strstr(metrics, "running 0\n") && strstr(metrics, "waiting 0\n");
        free(metrics);
        if (idle) break;
        usleep(100000);
        EXPECT(i < 49, "answers nobody reads go on");
    }
    EXPECT_REPLY(200, "\"choices\"", "POST", "/v1/completions", "Authorization: Bearer secret\r\n",
                 "{\"prompt\": \"go\", \"max_tokens\": 2}");
    stop_server();
    EXPECT_EXIT(2, "give --key", "serve --model %s --host 0.0.0.0 --port 0", model);
}

/* ---- pieces ---- */

static void add_piece(void *context, PieceKind kind, Slice text, const json_t *call) {
    Text *out = context;
    static const char *const marks[] = {"T", "C", "F"};
    text_addf(out, "[%s:%.*s]", marks[kind],
              (int)(call ? json_string_length(json_object_get(call, "name")) : text.size),
              call ? json_string_value(json_object_get(call, "name")) : text.bytes);
}

/* A place that cuts no mark in two: they are single tokens. */
static size_t past_mark(Slice s, size_t n) {
    static const char *const marks[] = {"<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>"};
    for (int i = 0; i < 4; i++)
        for (size_t at = 0; (at = slice_find(s, marks[i], at)) < s.size; at++)
            if (at < n && n < at + strlen(marks[i])) return at + strlen(marks[i]);
    return n;
}

CASE(dialog, pieces_of_an_answer_do_not_depend_on_how_it_comes) {
    static const struct {
        const char *prompt, *answer, *pieces;
    } cases[] = {{"", "Hello there.", "C:Hello there."},
                 {"", "<|channel>thought\nhm, so\n<channel|>Yes", "T:hm, so|C:Yes"},
                 {"<|turn>model\n<|channel>thought\n", "well\n<channel|>\nNo ", "T:well|C:No"},
                 {"", "<|channel>thought<channel|>A", "C:A"},
                 {"", "Look: <|tool_call>call:f{a:1}<tool_call|><|tool_call>call:g{}<tool_call|>",
                  "C:Look:|F:f|F:g"},
                 {"", "<|tool_call>call:f{a:1}", "F:f"},
                 {"", "<|channel>thought\nnever closed", "T:never closed"}};
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++)
        for (size_t step = 1; step < 60; step += 7) {
            Text got = {0}, merged = {0};
            Pieces p;
            Slice all = slice_of(cases[c].answer);
            pieces_init(&p, slice_of(cases[c].prompt), NULL, add_piece, &got);
            for (size_t n = step; n < all.size; n += step)
                pieces_feed(&p, (Slice){all.bytes, past_mark(all, n)}, false);
            pieces_feed(&p, all, true);
            for (size_t i = 0; i < got.size; i++) { /* neighbours of one kind are one */
                if (merged.size && got.bytes[i] == '[') {
                    const char *last = strrchr(merged.bytes, '|');
                    char kind = last ? last[1] : *merged.bytes;
                    if (kind == got.bytes[i + 1] && kind != 'F') {
                        i += 2;
                        continue;
                    }
                    text_adds(&merged, "|");
                }
                if (!strchr("[]", got.bytes[i])) text_add(&merged, got.bytes + i, 1);
            }
            EXPECT(merged.size && !strcmp(merged.bytes, cases[c].pieces), "'%s' by %zu: %s",
                   cases[c].answer, step, merged.bytes);
        }
}
