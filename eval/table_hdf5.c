/* table_hdf5.c - rows of an HDF5 file that somebody else wrote. */
#include "data/json.h"
#include "eval/table.h"

#include <errno.h>
#include <hdf5.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#define ROWS_MAX    ((hsize_t)100 << 20) /* elements of a field */
#define SECONDS_MAX 120                  /* for a whole file */

/* The value of an element; NULL where its type is not one of ours. Texts are UTF-8 or NULL. */
static json_t *element_value(hid_t type, const void *bytes);

static json_t *text_value(hid_t type, const void *bytes) {
    if (H5Tis_variable_str(type) > 0) {
        const char *text = *(char *const *)bytes;
        return json_string(text ? text : "");
    }
    size_t size = strnlen(bytes, H5Tget_size(type));
    if (H5Tget_strpad(type) == H5T_STR_SPACEPAD)
        while (size && ((const char *)bytes)[size - 1] == ' ') size--;
    return json_stringn(bytes, size);
}

/* h5py writes booleans as an enum of FALSE and TRUE. */
static json_t *enum_value(hid_t type, const void *bytes) {
    char name[64];
    if (H5Tenum_nameof(type, bytes, name, sizeof name) < 0) return NULL;
    if (!strcmp(name, "TRUE") || !strcmp(name, "FALSE")) return json_boolean(*name == 'T');
    return json_string(name);
}

static json_t *list_value(hid_t type, const void *bytes) {
    const hvl_t *list = bytes;
    hid_t inner = H5Tget_super(type);
    json_t *out = json_array();
    for (size_t i = 0; i < list->len && out; i++) {
        json_t *one = element_value(inner, (const char *)list->p + i * H5Tget_size(inner));
        if (one && !json_array_append_new(out, one)) continue;
        json_decref(out);
        out = NULL;
    }
    H5Tclose(inner);
    return out;
}

static json_t *element_value(hid_t type, const void *bytes) {
    switch (H5Tget_class(type)) {
    case H5T_STRING:
        return text_value(type, bytes);
    case H5T_INTEGER:
        return json_integer(*(const int64_t *)bytes);
    case H5T_FLOAT:
        return json_real(*(const double *)bytes);
    case H5T_ENUM:
        return enum_value(type, bytes);
    case H5T_VLEN:
        return list_value(type, bytes);
    default:
        return NULL;
    }
}

/* How elements of a file's type look in memory; closed by the caller. */
static hid_t memory_type(hid_t type) {
    hid_t inner, out;
    switch (H5Tget_class(type)) {
    case H5T_INTEGER:
        return H5Tcopy(H5T_NATIVE_INT64);
    case H5T_FLOAT:
        return H5Tcopy(H5T_NATIVE_DOUBLE);
    case H5T_VLEN:
        type = H5Tget_super(type);
        inner = memory_type(type);
        out = H5Tvlen_create(inner);
        H5Tclose(inner);
        H5Tclose(type);
        return out;
    default:
        return H5Tcopy(type);
    }
}

/* Puts a field into rows, which the first field makes. */
static Status add_field(json_t *rows, hid_t file, const char *name, bool first, const char *path) {
    hid_t set = H5Dopen2(file, name, H5P_DEFAULT), stored, type, space;
    hsize_t dims[2] = {0, 1}, count;
    if (set < 0) FAIL(ERR_FORMAT, "%s: '%s' is no dataset", path, name);
    stored = H5Dget_type(set);
    space = H5Dget_space(set);
    type = memory_type(stored);
    int rank = H5Sget_simple_extent_ndims(space);
    if (rank < 1 || rank > 2)
        FAIL(ERR_FORMAT, "%s: '%s' has not one or two dimensions", path, name);
    H5Sget_simple_extent_dims(space, dims, NULL);
    count = dims[0] * dims[1];
    if (dims[0] > ROWS_MAX || dims[1] > ROWS_MAX || count > ROWS_MAX)
        FAIL(ERR_FORMAT, "%s: '%s' is too large", path, name);
    if (!first && json_array_size(rows) != dims[0])
        FAIL(ERR_FORMAT, "%s: '%s' has %" PRIu64 " rows, other fields %zu", path, name,
             (uint64_t)dims[0], json_array_size(rows));
    size_t size = H5Tget_size(type);
    char *bytes = must_calloc(count + 1, size);
    if (H5Dread(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, bytes) < 0)
        FAIL(ERR_FORMAT, "%s: '%s' cannot be read", path, name);
    for (hsize_t i = 0; i < count; i++) {
        hsize_t r = i / dims[1];
        json_t *one = element_value(type, bytes + i * size), *list;
        if (!one)
            FAIL(ERR_FORMAT, "%s: '%s': row %" PRIu64 " is neither text in UTF-8 nor a number",
                 path, name, (uint64_t)r + 1);
        if (first && i % dims[1] == 0) json_array_append_new(rows, json_object());
        if (rank == 1) {
            json_object_set_new(json_array_get(rows, r), name, one);
            continue;
        }
        list = json_object_get(json_array_get(rows, r), name);
        if (!list) json_object_set_new(json_array_get(rows, r), name, list = json_array());
        json_array_append_new(list, one);
    }
    return OK;
}

/* What the other process does; it ends after it, so nothing is given back. */
static Status read_fields(json_t *rows, const char *path) {
    H5G_info_t info;
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
    hid_t file = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT);
    if (file < 0 || H5Gget_info(file, &info) < 0)
        FAIL(ERR_FORMAT, "%s: is no readable HDF5 file", path);
    if (!info.nlinks) FAIL(ERR_FORMAT, "%s: there is no dataset in it", path);
    for (hsize_t i = 0; i < info.nlinks; i++) {
        char name[256];
        if (H5Lget_name_by_idx(file, ".", H5_INDEX_NAME, H5_ITER_INC, i, name, sizeof name,
                               H5P_DEFAULT) < 0)
            FAIL(ERR_FORMAT, "%s: is no readable HDF5 file", path);
        TRY(add_field(rows, file, name, i == 0, path));
    }
    return OK;
}

static void write_fields(int to, const char *path) {
    json_t *rows = json_array();
    Text out = {0};
    alarm(SECONDS_MAX);
    setrlimit(RLIMIT_CORE, &(struct rlimit){0});
    if (!freopen("/dev/null", "w", stderr)) _exit(1);
    if (read_fields(rows, path) == OK)
        text_add_json(&out, rows);
    else
        text_adds(&out, status_message());
    for (size_t at = 0; at < out.size;) {
        ssize_t n = write(to, out.bytes + at, out.size - at);
        if (n < 0 && errno != EINTR) _exit(1);
        if (n > 0) at += (size_t)n;
    }
    _exit(0);
}

Status table_hdf5(json_t **rows, const char *path) {
    int ends[2], state = 1;
    Text text = {0};
    char buffer[1 << 16];
    if (access(path, R_OK) || pipe(ends)) FAIL(ERR_IO, "%s: %s", path, strerror(errno));
    pid_t pid = fork();
    if (!pid) {
        close(ends[0]);
        write_fields(ends[1], path);
    }
    close(ends[1]);
    for (ssize_t n; pid > 0 && (n = read(ends[0], buffer, sizeof buffer)) != 0;)
        if (n > 0)
            text_add(&text, buffer, (size_t)n);
        else if (errno != EINTR)
            break;
    close(ends[0]);
    while (pid > 0 && waitpid(pid, &state, 0) < 0 && errno == EINTR) continue;
    Status status = OK;
    if (state || !text.size)
        status = status_fail(ERR_FORMAT, "%s: is no readable HDF5 file", path);
    else if (*text.bytes != '[')
        status = status_fail(ERR_FORMAT, "%s", text.bytes);
    else
        status = json_read(rows, text.bytes, text.size, path);
    text_free(&text);
    return status;
}
