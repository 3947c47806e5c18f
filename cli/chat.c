/* chat.c - lapidary chat: a conversation at the terminal. */
#include "infer/chat.h"
#include "cli/command.h"

#include <editline/readline.h>
#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define DIM   "\033[2m"
#define BOLD  "\033[1m"
#define PLAIN "\033[0m"

static volatile sig_atomic_t interrupted;

static void interrupt(int signal) {
    (void)signal;
    interrupted = 1;
}

typedef struct Terminal {
    bool colours, edits; /* standard output and input are terminals */
    bool thinking;       /* the last piece was a thought */
    bool always;         /* calls run without asking */
    FILE *answers;       /* where yes and no are read */
} Terminal;

static const char *style(const Terminal *t, const char *code) {
    return t->colours ? code : "";
}

static void end_thought(Terminal *t) {
    if (t->thinking) printf("%s\n\n", style(t, PLAIN));
    t->thinking = false;
}

static void show_piece(void *context, PieceKind kind, Slice text, const json_t *call) {
    Terminal *t = context;
    if (kind == PIECE_THOUGHT && !t->thinking) printf("%s", style(t, DIM));
    if (kind != PIECE_THOUGHT) end_thought(t);
    t->thinking = kind == PIECE_THOUGHT;
    if (call) return; /* asked about before it runs */
    fwrite(text.bytes, 1, text.size, stdout);
    fflush(stdout);
}

/* The next line; NULL at the end. Caller frees. */
static char *read_line(const Terminal *t, const char *prompt) {
    if (t->edits) return readline(prompt);
    char *line = NULL;
    size_t space = 0;
    ssize_t n = getline(&line, &space, stdin);
    if (n < 0) {
        free(line);
        return NULL;
    }
    if (n && line[n - 1] == '\n') line[n - 1] = 0;
    return line;
}

static bool allow_call(void *context, const char *name, const json_t *arguments,
                       const char *command) {
    Terminal *t = context;
    Text shown = {0};
    end_thought(t);
    text_add_json(&shown, arguments);
    printf("\n%s%s%s %s\n%sruns: %s%s\n", style(t, BOLD), name, style(t, PLAIN), shown.bytes,
           style(t, DIM), command, style(t, PLAIN));
    fflush(stdout);
    text_free(&shown);
    if (t->always) return true;
    char *line = read_line(t, "run it? [y]es, [a]lways, [n]o: ");
    bool yes = line && (*line == 'y' || *line == 'Y' || *line == 'a');
    t->always = line && *line == 'a';
    free(line);
    return yes;
}

static void show_response(void *context, const char *name, const json_t *response) {
    Terminal *t = context;
    Text shown = {0};
    text_add_json(&shown, response);
    printf("%s%s: %s%s\n", style(t, DIM), name, shown.bytes, style(t, PLAIN));
    text_free(&shown);
}

static bool is_stopped(void *context) {
    (void)context;
    return interrupted;
}

static const char help[] =
    "/image FILE     a picture for what you say next; /audio and /video likewise\n"
    "/clear          start anew\n"
    "/system TEXT    the system text from now on; without TEXT none\n"
    "/think on|off   let the model think first\n"
    "/save FILE      the conversation as a row that train takes\n"
    "/load FILE      go on with a saved one\n"
    "/help           this\n"
    "/quit           (or Ctrl-D)\n"
    "Ctrl-C stops an answer. A line that ends in \\ goes on with the next.\n";

static Status attach(Chat *c, const char *type, const char *path) {
    json_t *part = json_pack("{s:s, s:s}", "type", type, "path", path);
    if (!part) FAIL(ERR_FORMAT, "the name of the file is not UTF-8");
    Status status = chat_attach(c, part);
    json_decref(part);
    return status;
}

/* A line that is an order to the program. False: leave. */
static bool obey(Chat *c, const char *line) {
    char word[16] = "";
    const char *rest = line + strcspn(line, " ");
    snprintf(word, sizeof word, "%.*s", (int)(rest - line), line);
    while (*rest == ' ') rest++;
    Status status = OK;
    if (!strcmp(word, "/quit") || !strcmp(word, "/exit")) return false;
    if (!strcmp(word, "/clear"))
        chat_clear(c);
    else if (!strcmp(word, "/system"))
        chat_set_system(c, rest);
    else if (!strcmp(word, "/think") && (!strcmp(rest, "on") || !strcmp(rest, "off")))
        c->settings.think = !strcmp(rest, "on");
    else if ((!strcmp(word, "/image") || !strcmp(word, "/audio") || !strcmp(word, "/video")) &&
             *rest)
        status = attach(c, word + 1, rest);
    else if (!strcmp(word, "/save") && *rest)
        status = chat_save(c, rest);
    else if (!strcmp(word, "/load") && *rest)
        status = chat_load(c, rest);
    else
        fputs(help, stderr);
    if (status != OK) fprintf(stderr, "lapidary: %s\n", status_message());
    return true;
}

/* Lines that end in a backslash go on. */
static char *read_message(const Terminal *t) {
    Text all = {0};
    char *line;
    bool any = false;
    while ((line = read_line(t, all.size ? "... " : "> "))) {
        size_t n = strlen(line);
        bool more = n && line[n - 1] == '\\';
        text_add(&all, line, n - more);
        if (more) text_adds(&all, "\n");
        free(line);
        any = true;
        if (!more) break;
    }
    return any ? all.bytes : NULL;
}

/* The history of lines, in the user's state folder. */
static char *history_path(void) {
    const char *state = getenv("XDG_STATE_HOME"), *home = getenv("HOME");
    char *dir = state && *state ? must_strdup(state)
                : home          ? must_format("%s/.local/state", home)
                                : NULL;
    if (!dir) return NULL;
    char *path = must_format("%s/lapidary_history", dir);
    mkdir(dir, 0700);
    free(dir);
    return path;
}

static Status converse(Chat *c, const char *save) {
    Terminal t = {.colours = isatty(1), .edits = isatty(0)};
    ChatView view = {&t, show_piece, allow_call, show_response, is_stopped};
    struct sigaction action = {.sa_handler = interrupt};
    char *history = t.edits ? history_path() : NULL, *line;
    sigaction(SIGINT, &action, NULL);
    if (t.edits) {
        using_history();
        if (history) read_history(history);
        fprintf(stderr, "%s/help says what there is; Ctrl-D leaves%s\n", style(&t, DIM),
                style(&t, PLAIN));
    }
    Status last = OK;
    for (;;) {
        interrupted = 0;
        line = read_message(&t);
        if (!line && interrupted) continue; /* Ctrl-C at the prompt: a fresh line */
        if (!line) break;
        Slice said = slice_strip(slice_of(line));
        bool go_on = true;
        if (said.size && t.edits) add_history(line);
        if (said.size && *said.bytes == '/') {
            go_on = obey(c, said.bytes);
        } else if (said.size) {
            interrupted = 0;
            last = chat_say(c, said.bytes, &view);
            end_thought(&t);
            printf("\n");
            if (last != OK) fprintf(stderr, "lapidary: %s\n", status_message());
            if (last == OK && save) last = chat_save(c, save);
        }
        free(line);
        if (!go_on) break;
    }
    if (history) write_history(history);
    free(history);
    return t.edits ? OK : last;
}

Status command_chat(int argc, char **argv) {
    const char *model = NULL, *adapter = NULL, *device = "auto", *dtype = "bf16", *format = "auto",
               *load = NULL, *save = NULL;
    ChatSettings s = {.context = 8192, .rounds = 16, .seconds = 60};
    double temperature = NAN, top_p = NAN, min_p = NAN;
    int64_t top_k = -1, seed = -1;
    MediaOptions media = {0};
    Option options[] = {
        {"--model", OPTION_TEXT, &model, "DIR  checkpoint folder or GGUF"},
        {"--adapter", OPTION_TEXT, &adapter, "DIR  PEFT folder, applied without merging"},
        {"--system", OPTION_TEXT, &s.system, "TEXT  the system text"},
        {"--think", OPTION_FLAG, &s.think, "let the model think first"},
        {"--tools", OPTION_TEXT, &s.tools, "FILE  functions and the commands that run them"},
        {"--load", OPTION_TEXT, &load, "FILE  go on with a saved conversation"},
        {"--save", OPTION_TEXT, &save, "FILE  where the conversation is kept, after every turn"},
        MEDIA_FILES(media),
        MEDIA_BUDGETS(s.reading),
        {"--context", OPTION_INT, &s.context, "N  tokens of the conversation (8192)"},
        {"--temperature", OPTION_REAL, &temperature, "X  0 is greedy"},
        {"--top-k", OPTION_INT, &top_k, "N"},
        {"--top-p", OPTION_REAL, &top_p, "X"},
        {"--min-p", OPTION_REAL, &min_p, "X"},
        {"--seed", OPTION_INT, &seed, "N  (42)"},
        {"--draft", OPTION_TEXT, &s.draft, "DIR  an assistant that guesses ahead"},
        {"--kv", OPTION_TEXT, &s.kv, "bf16|q8_0|q4_0  keys and values (the model's dtype)"},
        {"--device", OPTION_TEXT, &device, "auto|cpu|cuda[:n]"},
        {"--dtype", OPTION_TEXT, &dtype, "bf16|f32  (bf16)"},
        {"--chat-format", OPTION_TEXT, &format, "auto|large|small"},
        {NULL, OPTION_FLAG, NULL, NULL}};
    Arguments a = {.usage = "chat --model DIR [--adapter DIR] [options]",
                   .about = "A conversation at the terminal. Functions of the tools file run as "
                            "local commands,\neach after you agreed.",
                   .options = options};
    Model m;
    Chat c = {0};
    TRY(arguments_parse(&a, argc, argv));
    if (a.helped) return OK;
    if (!model) FAIL(ERR_USAGE, "--model is missing: lapidary %s", a.usage);
    TRY(media_budgets_check(&s.reading));
    if (s.context < 2) FAIL(ERR_USAGE, "--context is too small");
    TRY(chat_format_find(&s.format, model, format));
    TRY(model_open(&m, model, adapter, device, dtype, WEIGHTS_LOADED, WITH_MEDIA));
    Status status = OK;
    TRY_DONE(chat_open(&c, &m, &s));
    if (!isnan(temperature)) c.sampling.temperature = temperature;
    if (!isnan(top_p)) c.sampling.top_p = top_p;
    if (!isnan(min_p)) c.sampling.min_p = min_p;
    if (top_k >= 0) c.sampling.top_k = top_k;
    if (seed >= 0) c.sampling.seed = (uint64_t)seed;
    TRY_DONE(sampling_check(&c.sampling));
    if (load) TRY_DONE(chat_load(&c, load));
    for (size_t i = 0; i < json_array_size(media.parts); i++)
        TRY_DONE(chat_attach(&c, json_array_get(media.parts, i)));
    TRY_DONE(converse(&c, save));
done:
    json_decref(media.parts);
    chat_close(&c);
    model_close(&m);
    return status;
}
