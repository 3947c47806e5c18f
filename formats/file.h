/* file.h - whole files: read, and written so that a reader never sees half of one. */
#ifndef FILE_H
#define FILE_H

#include "kernels/status.h"

#include <stdint.h>
#include <stdio.h>

/* The bytes of a file, with a zero behind them; caller frees. Refuses more than `limit` bytes. */
Status file_read(char **bytes, size_t *size, const char *path, size_t limit);

/* Maps a whole regular file for reading; the caller unmaps. A file without bytes is an error. */
Status file_map(uint8_t **map, size_t *size, const char *path);

bool file_exists(const char *path);

/* dir/name; caller frees. */
char *path_join(const char *dir, const char *name);

/* The folder that a file lies in; caller frees. */
char *path_folder(const char *path);

/* From now on SIGINT and SIGTERM make the next write fail with ERR_STOPPED, so that whoever writes
 * removes what it has begun. For commands whose whole work is a file. */
void file_stop_on_signals(void);

/* Whether such a signal came. */
bool file_stopping(void);

/* A file written under a temporary name beside its own; commit syncs and renames it, abandon
 * removes it. */
typedef struct FileWriter {
    FILE *stream;
    char *path, *temporary;
} FileWriter;

Status file_writer_open(FileWriter *w, const char *path);
Status file_writer_write(FileWriter *w, const void *bytes, size_t size);
Status file_writer_commit(FileWriter *w);
void file_writer_abandon(FileWriter *w); /* accepts a zeroed or committed writer */

Status file_write(const char *path, const void *bytes, size_t size);

/* Copies a file, unchanged; OK and nothing written when the source is absent and `optional`. */
Status file_copy(const char *from, const char *to, bool optional);

/* Creates a folder and its parents. */
Status folder_make(const char *path);

/* A folder filled under a temporary name beside its own; commit puts it in place of what was there.
 */
Status folder_begin(char **temporary, const char *path);
Status folder_commit(char *temporary, const char *path);
void folder_abandon(char *temporary); /* removes it and frees the name; accepts NULL */

/* Removes a folder and everything in it, or a file. */
void tree_remove(const char *path);

#endif
