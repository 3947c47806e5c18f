/* serve.c - lapidary serve: an OpenAI-compatible server with a chat page. */
#include "cli/command.h"
#include "infer/server.h"

#include <stdlib.h>
#include <string.h>

/* NAME=DIR, or DIR whose last part is the name. */
static void split_adapter(const char *item, char **name, const char **dir) {
    const char *equals = strchr(item, '='), *slash = strrchr(item, '/');
    *dir = equals ? equals + 1 : item;
    *name = equals  ? must_format("%.*s", (int)(equals - item), item)
            : slash ? must_strdup(slash + 1)
                    : must_strdup(item);
}

static char *last_part(const char *path) {
    size_t n = strlen(path), at;
    while (n && path[n - 1] == '/') n--;
    for (at = n; at && path[at - 1] != '/'; at--) continue;
    return must_format("%.*s", (int)(n - at), path + at);
}

Status command_serve(int argc, char **argv) {
    const char *model = NULL, *device = "auto", *dtype = "bf16", *format = "auto";
    OptionList adapters = {0};
    ServeOptions o = serve_options_default();
    Option options[] = {
        {"--model", OPTION_TEXT, &model, "DIR  checkpoint folder or GGUF"},
        {"--adapter", OPTION_LIST, &adapters, "NAME=DIR  a PEFT folder, served as model NAME"},
        {"--name", OPTION_TEXT, &o.name, "NAME  of the base model (its folder's)"},
        {"--host", OPTION_TEXT, &o.host, "ADDRESS  to listen on (127.0.0.1)"},
        {"--port", OPTION_INT, &o.port, "N  (8080); 0 is any that is free"},
        {"--key", OPTION_TEXT, &o.key, "KEY  that clients show; a must beyond loopback"},
        {"--sequences", OPTION_INT, &o.sequences, "N  answers at once (16)"},
        {"--context", OPTION_INT, &o.context, "N  tokens of one request (8192)"},
        {"--cache", OPTION_INT, &o.cache, "N  tokens whose keys are kept (two contexts or more)"},
        {"--queue", OPTION_INT, &o.queue, "N  answers that wait (256); more are turned away"},
        {"--body", OPTION_INT, &o.body, "N  bytes of one request (32 MiB)"},
        {"--media", OPTION_TEXT, &o.media,
         "DIR  pictures and sound that messages may name; without it they come in data URLs"},
        MEDIA_BUDGETS(o.reading),
        {"--connections", OPTION_INT, &o.connections, "N  at once (512)"},
        {"--draft", OPTION_TEXT, &o.draft, "DIR  an assistant that guesses ahead"},
        {"--kv", OPTION_TEXT, &o.kv, "bf16|q8_0|q4_0  keys and values (the model's dtype)"},
        {"--device", OPTION_TEXT, &device, "auto|cpu|cuda[:n]"},
        {"--dtype", OPTION_TEXT, &dtype, "bf16|f32  (bf16)"},
        {"--chat-format", OPTION_TEXT, &format, "auto|large|small"},
        {NULL, OPTION_FLAG, NULL, NULL}};
    Arguments a = {.usage = "serve --model DIR [--adapter NAME=DIR]... [options]",
                   .about = "Serves /v1/chat/completions and /v1/completions as OpenAI's clients "
                            "expect them,\nwith a chat page at /.",
                   .options = options};
    Model m;
    char *names[64], *own = NULL;
    const char *dirs[64];
    int count = 0;
    TRY(arguments_parse(&a, argc, argv));
    if (a.helped) return OK;
    if (!model) FAIL(ERR_USAGE, "--model is missing: lapidary %s", a.usage);
    TRY(media_budgets_check(&o.reading));
    if (o.port < 0 || o.port > 65535 || o.sequences < 1 || o.sequences > 512 || o.context < 2 ||
        o.queue < 1 || o.body < 1 || o.connections < 1 || o.cache < 0)
        FAIL(ERR_USAGE, "--port, --sequences, --context, --cache, --queue, --body or "
                        "--connections is out of range");
    for (; count < adapters.count; count++)
        split_adapter(adapters.items[count], &names[count], &dirs[count]);
    Status status = model_open_several(&m, model, dirs, count, device, dtype, WITH_MEDIA);
    if (status == OK) {
        int64_t most = m.g.config.max_position_embeddings;
        o.has_format = chat_format_find(&o.format, model, format) == OK;
        if (!o.has_format && strcmp(format, "auto")) status = ERR_USAGE;
        if (!o.name) o.name = own = last_part(model);
        o.adapters = (const char *const *)names;
        if (o.context > most) o.context = most;
        if (status == OK) status = serve(&m, &o);
        model_close(&m);
    }
    for (int i = 0; i < count; i++) free(names[i]);
    free(own);
    return status;
}
