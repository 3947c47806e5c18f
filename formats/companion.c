/* companion.c - from the folder, or out of the GGUF. */
#include "formats/companion.h"
#include "formats/file.h"
#include "formats/gguf_model.h"

#include <stdlib.h>
#include <string.h>

#define COMPANION_MAX ((size_t)1 << 30)

bool companion_exists(const char *model, const char *name) {
    if (gguf_is_file(model)) {
        Gguf g;
        char *bytes = NULL;
        size_t size;
        if (!strcmp(name, "tokenizer.json") || !strcmp(name, "config.json")) return true;
        if (gguf_open(&g, model) != OK) return false;
        bool there = gguf_companion(&g, name, &bytes, &size) == OK && bytes;
        free(bytes);
        gguf_close(&g);
        return there;
    }
    char *path = path_join(model, name);
    bool there = file_exists(path);
    free(path);
    return there;
}

char *companion_path(const char *model, const char *name) {
    return gguf_is_file(model) ? must_strdup(model) : path_join(model, name);
}

Status companion_read(char **bytes, size_t *size, const char *model, const char *name) {
    if (!gguf_is_file(model)) {
        char *path = path_join(model, name);
        Status status = file_read(bytes, size, path, COMPANION_MAX);
        free(path);
        return status;
    }
    Gguf g;
    TRY(gguf_open(&g, model));
    Status status = gguf_companion(&g, name, bytes, size);
    if (status == OK && !*bytes) status = status_fail(ERR_FORMAT, "%s: holds no %s", model, name);
    gguf_close(&g);
    return status;
}

Status companions_copy(const char *model, const char *dir) {
    static const char *const names[] = {"tokenizer.json",          "tokenizer_config.json",
                                        "special_tokens_map.json", "chat_template.jinja",
                                        "generation_config.json",  "processor_config.json",
                                        "preprocessor_config.json"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char *bytes = NULL;
        size_t size;
        if (!companion_exists(model, names[i])) continue;
        TRY(companion_read(&bytes, &size, model, names[i]));
        char *to = path_join(dir, names[i]);
        Status status = file_write(to, bytes, size);
        free(to);
        free(bytes);
        TRY(status);
    }
    return OK;
}
