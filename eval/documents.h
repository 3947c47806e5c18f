/* documents.h - questions from the user's folder, in the layouts the public has them in.
 *
 * Rows come from `table`; a task's reader then makes them documents. */
#ifndef DOCUMENTS_H
#define DOCUMENTS_H

#include "eval/task.h"

/* A file that questions came from. */
typedef struct SourceFile {
    char *path, sha256[65];
    const char *release; /* which known release it is, or NULL */
} SourceFile;

/* Documents that are reported together: a whole task, or one subject of it. */
typedef struct Suite {
    char *name, *alias;
    char *group;      /* what it is a part of; NULL: stands alone */
    char *folder;     /* that media are named from: of the file of its first document; or NULL */
    json_t *docs;     /* list of objects */
    json_t *examples; /* few-shot examples, likewise; empty where there are none */
} Suite;

typedef struct Documents {
    Suite *suites;
    int count;
    SourceFile *files;
    int file_count;
} Documents;

/* Reads a task's questions below `dir` (or from `dir`, when that is a file). */
Status documents_load(Documents *d, const Task *task, const char *dir);
void documents_free(Documents *d);

#endif
