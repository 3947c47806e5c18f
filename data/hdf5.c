/* hdf5.c - a thin layer over the HDF5 library. */
#include "data/hdf5.h"

#include <errno.h>
#include <inttypes.h>
#include <nettle/sha2.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static void lock(void) {
    pthread_mutex_lock(&mutex);
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL); /* errors are told by Status */
}

static Status unlock(Status status) {
    pthread_mutex_unlock(&mutex);
    return status;
}

#define SEAL_SIZE 512
#define SEAL_TEXT "Lapidary HDF5, sha256 of what follows this block: "

/* The seal that belongs in front of an open file's contents. */
static bool make_seal(char seal[SEAL_SIZE], FILE *file) {
    struct sha256_ctx context;
    uint8_t digest[SHA256_DIGEST_SIZE], buffer[65536];
    sha256_init(&context);
    if (fseeko(file, SEAL_SIZE, SEEK_SET)) return false;
    for (size_t got; (got = fread(buffer, 1, sizeof buffer, file));)
        sha256_update(&context, got, buffer);
    if (ferror(file)) return false;
    sha256_digest(&context, sizeof digest, digest);
    memset(seal, 0, SEAL_SIZE);
    int used = snprintf(seal, SEAL_SIZE, "%s", SEAL_TEXT);
    for (int i = 0; i < SHA256_DIGEST_SIZE; i++)
        used += snprintf(seal + used, (size_t)(SEAL_SIZE - used), "%02x", digest[i]);
    seal[used] = '\n';
    return true;
}

static Status check_seal(const char *path) {
    char found[SEAL_SIZE] = "", expected[SEAL_SIZE];
    FILE *file = fopen(path, "rb");
    if (!file) FAIL(ERR_IO, "%s: %s", path, strerror(errno));
    bool whole = fread(found, 1, SEAL_SIZE, file) == SEAL_SIZE && make_seal(expected, file);
    fclose(file);
    if (strncmp(found, SEAL_TEXT, strlen(SEAL_TEXT)))
        FAIL(ERR_FORMAT, "%s: is no HDF5 file that Lapidary wrote", path);
    if (!whole || memcmp(found, expected, SEAL_SIZE))
        FAIL(ERR_FORMAT, "%s: is no readable HDF5 file: damaged or cut short", path);
    return OK;
}

Status h5_open(H5File *f, const char *path) {
    *f = (H5File){.id = -1, .path = must_strdup(path)};
    Status status = check_seal(path);
    if (status == OK) {
        lock();
        f->id = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT);
        unlock(OK);
        if (f->id < 0) status = status_fail(ERR_FORMAT, "%s: is no readable HDF5 file", path);
    }
    if (status != OK) h5_close(f);
    return status;
}

Status h5_create(H5File *f, const char *path) {
    *f = (H5File){.id = -1,
                  .path = must_strdup(path),
                  .temporary = must_format("%s.tmp%d", path, (int)getpid())};
    lock();
    hid_t plist = H5Pcreate(H5P_FILE_CREATE);
    H5Pset_userblock(plist, SEAL_SIZE);
    f->id = H5Fcreate(f->temporary, H5F_ACC_TRUNC, plist, H5P_DEFAULT);
    H5Pclose(plist);
    unlock(OK);
    if (f->id >= 0) return OK;
    status_fail(ERR_IO, "%s: cannot be written", path);
    h5_close(f);
    return ERR_IO;
}

Status h5_commit(H5File *f) {
    Status status = OK;
    lock();
    bool good = H5Fflush(f->id, H5F_SCOPE_GLOBAL) >= 0;
    good = H5Fclose(f->id) >= 0 && good;
    f->id = -1;
    unlock(OK);
    char seal[SEAL_SIZE];
    FILE *file = good ? fopen(f->temporary, "rb+") : NULL;
    good = file && make_seal(seal, file) && !fseeko(file, 0, SEEK_SET) &&
           fwrite(seal, 1, SEAL_SIZE, file) == SEAL_SIZE && !fflush(file) && !fsync(fileno(file));
    if (!good) status = status_fail(ERR_IO, "%s: cannot be written: %s", f->path, strerror(errno));
    if (file) fclose(file);
    if (status == OK && rename(f->temporary, f->path))
        status = status_fail(ERR_IO, "%s: cannot be put in place: %s", f->path, strerror(errno));
    if (status == OK) {
        free(f->temporary);
        f->temporary = NULL;
    }
    h5_close(f);
    return status;
}

void h5_close(H5File *f) {
    if (!f->path) return;
    lock();
    if (f->id >= 0) H5Fclose(f->id);
    unlock(OK);
    if (f->temporary) unlink(f->temporary);
    free(f->temporary);
    free(f->path);
    *f = (H5File){.id = -1};
}

Status h5_group(H5File *f, const char *name) {
    lock();
    hid_t group = H5Gcreate2(f->id, name, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
    if (group < 0)
        return unlock(status_fail(ERR_IO, "%s: group '%s' cannot be written", f->path, name));
    H5Gclose(group);
    return unlock(OK);
}

Status h5_write(H5File *f, const char *name, hid_t type, int64_t rows, int64_t cols, bool packed,
                const void *data) {
    lock();
    hsize_t dims[2] = {(hsize_t)rows, (hsize_t)cols}, chunk[2] = {16384, (hsize_t)cols};
    hid_t space = H5Screate_simple(cols ? 2 : 1, dims, NULL), plist = H5Pcreate(H5P_DATASET_CREATE);
    if (packed && rows >= 1024) {
        if (rows < 16384) chunk[0] = (hsize_t)rows;
        H5Pset_chunk(plist, cols ? 2 : 1, chunk);
        H5Pset_shuffle(plist);
        H5Pset_deflate(plist, 4);
    }
    hid_t set = H5Dcreate2(f->id, name, type, space, H5P_DEFAULT, plist, H5P_DEFAULT);
    bool good =
        set >= 0 && (!rows || H5Dwrite(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, data) >= 0);
    if (set >= 0) good = H5Dclose(set) >= 0 && good;
    H5Pclose(plist);
    H5Sclose(space);
    return unlock(good ? OK
                       : status_fail(ERR_IO, "%s: dataset '%s' cannot be written (disk full?)",
                                     f->path, name));
}

#define APPEND_CHUNK ((hsize_t)1 << 20)

static hid_t make_growing(H5File *f, const char *name, hid_t type) {
    hsize_t none = 0, most = H5S_UNLIMITED, chunk = APPEND_CHUNK;
    hid_t space = H5Screate_simple(1, &none, &most), plist = H5Pcreate(H5P_DATASET_CREATE);
    H5Pset_chunk(plist, 1, &chunk);
    hid_t set = H5Dcreate2(f->id, name, type, space, H5P_DEFAULT, plist, H5P_DEFAULT);
    H5Pclose(plist);
    H5Sclose(space);
    return set;
}

Status h5_append(H5File *f, const char *name, hid_t type, const void *data, int64_t count) {
    lock();
    bool there = H5Lexists(f->id, name, H5P_DEFAULT) > 0;
    hid_t set = there ? H5Dopen2(f->id, name, H5P_DEFAULT) : make_growing(f, name, type);
    hid_t old = set >= 0 ? H5Dget_space(set) : -1;
    hsize_t first = old >= 0 ? (hsize_t)H5Sget_simple_extent_npoints(old) : 0,
            size = (hsize_t)count, end = first + size;
    bool good = old >= 0 && H5Dset_extent(set, &end) >= 0;
    if (good && count) {
        hid_t space = H5Dget_space(set), memory = H5Screate_simple(1, &size, NULL);
        H5Sselect_hyperslab(space, H5S_SELECT_SET, &first, NULL, &size, NULL);
        good = H5Dwrite(set, type, memory, space, H5P_DEFAULT, data) >= 0;
        H5Sclose(memory);
        H5Sclose(space);
    }
    if (old >= 0) H5Sclose(old);
    if (set >= 0) good = H5Dclose(set) >= 0 && good;
    return unlock(good ? OK
                       : status_fail(ERR_IO, "%s: dataset '%s' cannot be written (disk full?)",
                                     f->path, name));
}

static Status open_set(H5File *f, const char *name, hid_t *set, hid_t *space) {
    *set = H5Dopen2(f->id, name, H5P_DEFAULT);
    if (*set < 0) FAIL(ERR_FORMAT, "%s: dataset '%s' is missing", f->path, name);
    *space = H5Dget_space(*set);
    return OK;
}

bool h5_has(H5File *f, const char *name) {
    char group[64];
    lock();
    snprintf(group, sizeof group, "%.*s", (int)strcspn(name, "/"), name);
    bool there = H5Lexists(f->id, group, H5P_DEFAULT) > 0 &&
                 (!strchr(name, '/') || H5Lexists(f->id, name, H5P_DEFAULT) > 0);
    unlock(OK);
    return there;
}

Status h5_count(H5File *f, const char *name, int64_t *count) {
    hid_t set = -1, space = -1;
    lock();
    Status status = open_set(f, name, &set, &space);
    if (status != OK) return unlock(status);
    *count = (int64_t)H5Sget_simple_extent_npoints(space);
    H5Sclose(space);
    H5Dclose(set);
    return unlock(OK);
}

Status h5_read(H5File *f, const char *name, hid_t type, int64_t first, int64_t count, void *data) {
    hid_t set = -1, space = -1;
    lock();
    Status status = open_set(f, name, &set, &space);
    if (status != OK) return unlock(status);
    int64_t total = (int64_t)H5Sget_simple_extent_npoints(space);
    bool whole = first == 0 && count == total,
         good = first >= 0 && count >= 0 && first + count <= total;
    if (good && whole) {
        good = H5Dread(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, data) >= 0;
    } else if (good && H5Sget_simple_extent_ndims(space) == 1) {
        hsize_t from = (hsize_t)first, n = (hsize_t)count;
        hid_t memory = H5Screate_simple(1, &n, NULL);
        H5Sselect_hyperslab(space, H5S_SELECT_SET, &from, NULL, &n, NULL);
        good = !count || H5Dread(set, type, memory, space, H5P_DEFAULT, data) >= 0;
        H5Sclose(memory);
    } else {
        good = false;
    }
    H5Sclose(space);
    H5Dclose(set);
    if (!good)
        status = status_fail(ERR_FORMAT,
                             "%s: elements %" PRId64 " to %" PRId64 " of '%s' cannot be read",
                             f->path, first, first + count, name);
    return unlock(status);
}

Status h5_write_text(H5File *f, const char *object, const char *name, const char *text) {
    lock();
    hid_t type = H5Tcopy(H5T_C_S1), space = H5Screate(H5S_SCALAR);
    H5Tset_size(type, strlen(text) + 1);
    H5Tset_cset(type, H5T_CSET_UTF8);
    hid_t attribute =
        H5Acreate_by_name(f->id, object, name, type, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
    bool good = attribute >= 0 && H5Awrite(attribute, type, text) >= 0;
    if (attribute >= 0) H5Aclose(attribute);
    H5Sclose(space);
    H5Tclose(type);
    return unlock(
        good ? OK : status_fail(ERR_IO, "%s: attribute '%s' cannot be written", f->path, name));
}

Status h5_read_text(H5File *f, const char *object, const char *name, char **text) {
    lock();
    *text = NULL;
    hid_t attribute = H5Aopen_by_name(f->id, object, name, H5P_DEFAULT, H5P_DEFAULT);
    hid_t type = attribute >= 0 ? H5Aget_type(attribute) : -1;
    size_t size = type >= 0 && H5Tget_class(type) == H5T_STRING && !H5Tis_variable_str(type)
                      ? H5Tget_size(type)
                      : 0;
    if (size && size < (64u << 20)) {
        *text = must_calloc(size + 1, 1);
        if (H5Aread(attribute, type, *text) < 0) {
            free(*text);
            *text = NULL;
        }
    }
    if (type >= 0) H5Tclose(type);
    if (attribute >= 0) H5Aclose(attribute);
    return unlock(*text ? OK
                        : status_fail(ERR_FORMAT, "%s: attribute '%s' is missing", f->path, name));
}

Status h5_write_number(H5File *f, const char *object, const char *name, double value) {
    lock();
    hid_t space = H5Screate(H5S_SCALAR);
    hid_t attribute = H5Acreate_by_name(f->id, object, name, H5T_IEEE_F64LE, space, H5P_DEFAULT,
                                        H5P_DEFAULT, H5P_DEFAULT);
    bool good = attribute >= 0 && H5Awrite(attribute, H5T_NATIVE_DOUBLE, &value) >= 0;
    if (attribute >= 0) H5Aclose(attribute);
    H5Sclose(space);
    return unlock(
        good ? OK : status_fail(ERR_IO, "%s: attribute '%s' cannot be written", f->path, name));
}

Status h5_read_number(H5File *f, const char *object, const char *name, double *value) {
    lock();
    hid_t attribute = H5Aopen_by_name(f->id, object, name, H5P_DEFAULT, H5P_DEFAULT);
    hid_t space = attribute >= 0 ? H5Aget_space(attribute) : -1;
    bool good = space >= 0 && H5Sget_simple_extent_npoints(space) == 1 &&
                H5Aread(attribute, H5T_NATIVE_DOUBLE, value) >= 0;
    if (space >= 0) H5Sclose(space);
    if (attribute >= 0) H5Aclose(attribute);
    return unlock(good ? OK
                       : status_fail(ERR_FORMAT, "%s: attribute '%s' is missing", f->path, name));
}
