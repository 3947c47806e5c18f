/* tools.c - a child process with JSON in and out. */
#include "infer/tools.h"
#include "formats/file.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define OUTPUT_MAX (1 << 20)

static Status add_tool(Tools *t, const char *path, size_t i, json_t *item) {
    const json_t *function = json_object_get(item, "function"),
                 *command = json_object_get(item, "command");
    const char *name = json_string_value(json_object_get(function, "name"));
    size_t k;
    json_t *word;
    if (!name) FAIL(ERR_FORMAT, "%s: entry %zu has no function with a name", path, i + 1);
    if (command) {
        if (!json_is_array(command) || !json_array_size(command))
            FAIL(ERR_FORMAT, "%s: '%s': command is no list of words", path, name);
        json_array_foreach(command, k, word) if (!json_is_string(word))
            FAIL(ERR_FORMAT, "%s: '%s': command is no list of words", path, name);
        json_object_set(t->commands, name, (json_t *)command);
    }
    json_t *copy = json_copy(item);
    json_object_del(copy, "command");
    json_array_append_new(t->list, copy);
    return OK;
}

Status tools_load(Tools *t, const char *path) {
    char *bytes;
    size_t size, i;
    json_t *list = NULL, *item;
    *t = (Tools){.list = json_array(), .commands = json_object()};
    TRY(file_read(&bytes, &size, path, (size_t)64 << 20));
    Status status = json_read(&list, bytes, size, path);
    free(bytes);
    if (status == OK && !json_is_array(list))
        status = status_fail(ERR_FORMAT, "%s: not a list of functions", path);
    json_array_foreach(list, i, item) if (status == OK) status = add_tool(t, path, i, item);
    json_decref(list);
    if (status != OK) tools_free(t);
    return status;
}

void tools_free(Tools *t) {
    json_decref(t->list);
    json_decref(t->commands);
    *t = (Tools){0};
}

char *tools_command_text(const Tools *t, const char *name) {
    const json_t *command = json_object_get(t->commands, name);
    size_t i;
    json_t *word;
    Text text = {0};
    if (!command) return NULL;
    json_array_foreach(command, i, word)
        text_addf(&text, "%s%s", i ? " " : "", json_string_value(word));
    return text.bytes;
}

static json_t *error_of(const char *format, const char *what) {
    return json_pack("{s:o}", "error", json_sprintf(format, what));
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* The child, with its own group so that all it starts can be stopped. */
static pid_t start(char *const *words, int in, int out) {
    pid_t pid = fork();
    if (pid) return pid;
    setpgid(0, 0);
    dup2(in, 0);
    dup2(out, 1);
    signal(SIGINT, SIG_DFL);
    signal(SIGPIPE, SIG_DFL);
    execvp(words[0], words);
    _exit(127);
}

/* Writes what there is to say and reads what comes, until the child closes its end. */
static bool talk(int to, int from, const Text *input, Text *output, double until) {
    size_t written = 0;
    bool open = true;
    while (open) {
        struct pollfd p[] = {{from, POLLIN, 0}, {to, POLLOUT, 0}};
        double left = until - now();
        if (left <= 0 || output->size > OUTPUT_MAX) return false;
        if (poll(p, to >= 0 ? 2 : 1, (int)(left * 1000) + 1) < 0 && errno != EINTR) return false;
        if (to >= 0 && p[1].revents) {
            ssize_t n = write(to, input->bytes + written, input->size - written);
            if (n > 0) written += (size_t)n;
            if ((n < 0 && errno != EAGAIN && errno != EINTR) || written == input->size) {
                close(to);
                to = -1;
            }
        }
        if (p[0].revents) {
            char buffer[4096];
            ssize_t n = read(from, buffer, sizeof buffer);
            if (n > 0) text_add(output, buffer, (size_t)n);
            open = n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR));
        }
    }
    if (to >= 0) close(to);
    return true;
}

/* Whether it is a list of parts as messages have them. */
static bool is_parts(const json_t *value) {
    static const char *const types[] = {"text", "image", "audio", "video"};
    size_t i;
    json_t *part;
    json_array_foreach(value, i, part) {
        const char *type = json_string_value(json_object_get(part, "type"));
        bool known = false;
        for (size_t k = 0; k < sizeof types / sizeof *types; k++)
            known |= type && !strcmp(type, types[k]);
        if (!known) return false;
    }
    return json_array_size(value) > 0;
}

static json_t *response_of(const Text *output) {
    json_t *value = NULL;
    Slice s = slice_strip((Slice){output->bytes ? output->bytes : "", output->size});
    if (!utf8_valid(s.bytes, s.size)) return error_of("%s", "the output is not UTF-8");
    bool json = s.size && (*s.bytes == '{' || *s.bytes == '[');
    if (json && json_read(&value, s.bytes, s.size, "output") == OK &&
        (json_is_object(value) || is_parts(value)))
        return value;
    json_decref(value);
    return json_stringn(s.bytes, s.size);
}

json_t *tools_run(const Tools *t, const char *name, const json_t *arguments, int seconds) {
    const json_t *command = json_object_get(t->commands, name);
    size_t count = json_array_size(command);
    char *words[count + 1];
    int in[2], out[2], state = 0;
    Text input = {0}, output = {0};
    if (!command) return error_of("there is no function '%s'", name);
    for (size_t i = 0; i < count; i++)
        words[i] = (char *)json_string_value(json_array_get(command, i));
    words[count] = NULL;
    if (pipe2(in, O_CLOEXEC)) return error_of("%s", strerror(errno));
    if (pipe2(out, O_CLOEXEC)) {
        close(in[0]), close(in[1]);
        return error_of("%s", strerror(errno));
    }
    text_add_json(&input, arguments);
    text_adds(&input, "\n");
    pid_t pid = start(words, in[0], out[1]);
    close(in[0]), close(out[1]);
    fcntl(in[1], F_SETFL, O_NONBLOCK);
    void (*before)(int) = signal(SIGPIPE, SIG_IGN);
    bool whole = pid > 0 && talk(in[1], out[0], &input, &output, now() + seconds);
    signal(SIGPIPE, before);
    close(out[0]);
    if (pid > 0) {
        if (!whole) kill(-pid, SIGKILL);
        waitpid(pid, &state, 0);
    }
    json_t *response = NULL;
    if (!whole)
        response = error_of("'%s' took too long, or said too much", name);
    else if (WIFEXITED(state) && WEXITSTATUS(state) == 127)
        response = error_of("'%s' cannot be started", words[0]);
    else if (!WIFEXITED(state) || WEXITSTATUS(state))
        response = json_pack("{s:o, s:o}", "error", json_sprintf("'%s' failed", name), "output",
                             json_stringn(output.bytes ? output.bytes : "", output.size));
    else
        response = response_of(&output);
    if (!response) response = error_of("'%s' failed", name);
    text_free(&input);
    text_free(&output);
    return response;
}
