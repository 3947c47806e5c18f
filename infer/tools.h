/* tools.h - functions that a model may call, run as local commands.
 *
 * A tools file is a JSON list of what chats take ({"type": "function", "function": {...}}), each
 * with "command": the program and its arguments. The call's arguments go to its standard input as
 * JSON; what it prints is the response: a JSON object as it is, a JSON list of message parts
 * ({"type": "image", "path": ...}, text beside them) as parts, anything else as text. */
#ifndef TOOLS_H
#define TOOLS_H

#include "data/json.h"

typedef struct Tools {
    json_t *list;     /* declarations, as templates take them */
    json_t *commands; /* {name: [program, arguments...]} */
} Tools;

/* ERR_FORMAT naming what is no declaration. */
Status tools_load(Tools *t, const char *path);
void tools_free(Tools *t);

/* The command line of a function for people; NULL when there is none. Caller frees. */
char *tools_command_text(const Tools *t, const char *name);

/* Runs a function's command, at most `seconds`. Whatever goes wrong becomes the response
 * {"error": ...}: the model is told. Caller decrefs. */
json_t *tools_run(const Tools *t, const char *name, const json_t *arguments, int seconds);

#endif
