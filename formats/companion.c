/* companion.c - from the folder, or out of the GGUF. */
#include "formats/companion.h"
#include "formats/file.h"
#include "formats/gguf_model.h"

#include <stdlib.h>
#include <string.h>

#define COMPANION_MAX ((size_t)1 << 30)

char *companion_path(const char *model, const char *name) {
    return gguf_is_model(model) ? must_strdup(model) : path_join(model, name);
}

Status companion_find(char **bytes, size_t *size, const char *model, const char *name) {
    Status status = OK;
    *bytes = NULL;
    *size = 0;
    if (gguf_is_model(model)) {
        Gguf g, towers;
        TRY(gguf_open_model(&g, &towers, model));
        status = gguf_companion(&g, towers.path ? &towers : NULL, name, bytes, size);
        gguf_close(&g);
        gguf_close(&towers);
        return status;
    }
    char *path = path_join(model, name);
    if (file_exists(path)) status = file_read(bytes, size, path, COMPANION_MAX);
    free(path);
    return status;
}

Status companion_read(char **bytes, size_t *size, const char *model, const char *name) {
    TRY(companion_find(bytes, size, model, name));
    if (*bytes) return OK;
    if (gguf_is_model(model)) FAIL(ERR_FORMAT, "%s: holds no %s", model, name);
    char *path = path_join(model, name);
    Status status = file_read(bytes, size, path, COMPANION_MAX); /* says why it is not there */
    free(path);
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
        TRY(companion_find(&bytes, &size, model, names[i]));
        if (!bytes) continue;
        char *to = path_join(dir, names[i]);
        Status status = file_write(to, bytes, size);
        free(to);
        free(bytes);
        TRY(status);
    }
    return OK;
}
