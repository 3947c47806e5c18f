/* hdf5.h - whole datasets and attributes of HDF5 files, with errors in our words.
 *
 * The library is not safe for threads: every function here takes one lock. */
#ifndef HDF5_FILES_H
#define HDF5_FILES_H

#include "kernels/status.h"

#include <hdf5.h>
#include <stdint.h>

typedef struct H5File {
    hid_t id;
    char *path, *temporary; /* temporary: while writing */
} H5File;

/* Opens a file that h5_commit wrote. Its first 512 bytes, HDF5's user block, hold the SHA-256 of
 * the rest, which is checked first: the library is not made for damaged files and can read beyond
 * its buffers. */
Status h5_open(H5File *f, const char *path);

/* A new file under a temporary name; commit syncs and renames it. */
Status h5_create(H5File *f, const char *path);
Status h5_commit(H5File *f);
void h5_close(H5File *f); /* also abandons what was not committed; accepts a zeroed file */

/* A dataset of `rows` x `cols` (cols 0: one dimension) elements; packed: in compressed chunks, for
 * what is kept long and read in parts. */
Status h5_write(H5File *f, const char *name, hid_t type, int64_t rows, int64_t cols, bool packed,
                const void *data);

/* Adds elements to the end of a dataset, which the first call makes. */
Status h5_append(H5File *f, const char *name, hid_t type, const void *data, int64_t count);

/* Whether there is a dataset of that name, in a group or in none. */
bool h5_has(H5File *f, const char *name);

/* Elements in a dataset; ERR_FORMAT when it is missing. */
Status h5_count(H5File *f, const char *name, int64_t *count);

/* Elements first .. first + count - 1 of a dataset seen as one line. Only whole datasets may have
 * two dimensions. */
Status h5_read(H5File *f, const char *name, hid_t type, int64_t first, int64_t count, void *data);

/* A group with everything above it. */
Status h5_group(H5File *f, const char *name);

Status h5_write_text(H5File *f, const char *object, const char *name, const char *text);
Status h5_read_text(H5File *f, const char *object, const char *name,
                    char **text); /* caller frees */
Status h5_write_number(H5File *f, const char *object, const char *name, double value);
Status h5_read_number(H5File *f, const char *object, const char *name, double *value);

#endif
