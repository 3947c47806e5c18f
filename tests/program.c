/* program.c - a shell line, and its outputs read back. */
#include "tests/program.h"
#include "formats/file.h"

#include <stdarg.h>
#include <sys/wait.h>

char program_out[1 << 16], program_err[1 << 16];

const char *program_path(void) {
    const char *path = getenv("LAPIDARY_PROGRAM");
    return path ? path : "./lapidary";
}

static void read_back(char *buffer, size_t size, const char *name) {
    char *path = path_join(test_folder(), name);
    FILE *file = fopen(path, "rb");
    EXPECT(file, "%s cannot be read", path);
    buffer[fread(buffer, 1, size - 1, file)] = 0;
    fclose(file);
    free(path);
}

int program_run(const char *format, ...) {
    char arguments[2048], line[3072];
    va_list list;
    va_start(list, format);
    vsnprintf(arguments, sizeof arguments, format, list);
    va_end(list);
    snprintf(line, sizeof line, "%s %s >%s/out 2>%s/err", program_path(), arguments, test_folder(),
             test_folder());
    int status = system(line);
    read_back(program_out, sizeof program_out, "out");
    read_back(program_err, sizeof program_err, "err");
    return WIFEXITED(status) ? WEXITSTATUS(status) : 256 + WTERMSIG(status);
}

const char *program_output(void) {
    static char both[sizeof program_out + sizeof program_err];
    snprintf(both, sizeof both, "%s%s", program_out, program_err);
    return both;
}
