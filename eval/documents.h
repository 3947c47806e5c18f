/* documents.h - questions from the user's folder, in the layouts the public has them in.
 *
 * Rows come from JSONL, JSON lists, CSV with a header, plain text and HDF5 (one dataset a field),
 * each also gzipped but the last. A task's reader then makes them documents. */
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

/* Rows of one file, as objects. ERR_FORMAT names file and line of what is no row. */
Status rows_load(json_t **rows, const char *path);

/* Rows of a CSV text: lists of cells, RFC 4180 with line breaks in quotes. */
Status csv_parse(json_t **rows, Slice text, const char *name);

#endif
