/* table.h - rows of a file: JSONL, JSON lists, CSV with a header, plain text, each also gzipped,
 * and HDF5 (one dataset a field). */
#ifndef TABLE_H
#define TABLE_H

#include "data/text.h"
#include "kernels/status.h"

#include <jansson.h>

/* A list of objects. ERR_FORMAT names file and line of what is no row. */
Status table_load(json_t **rows, const char *path);

/* Whether a path has an ending, gzipped or not. */
bool table_is(const char *path, const char *ending);

/* The whole of a file, gzipped or not. */
Status table_text(Text *out, const char *path);

/* Rows of a CSV text: lists of cells, RFC 4180 with line breaks in quotes. */
Status table_csv(json_t **rows, Slice text, const char *name);

/* Rows of an HDF5 file: every dataset of its root group is a field, its first dimension the rows;
 * a second one, or elements of variable length, make a list of each. Text, integers, numbers, and
 * booleans as h5py writes them. The library is not made for damaged files, so another process
 * reads, and may fall. */
Status table_hdf5(json_t **rows, const char *path);

#endif
