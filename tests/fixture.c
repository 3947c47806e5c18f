/* fixture.c - whole datasets out of HDF5. */
#include "tests/fixture.h"
#include "formats/file.h"

static void *read_all(const Fixture *f, const char *name, hid_t type, size_t element,
                      int64_t *count) {
    hid_t set = H5Dopen2(f->file, name, H5P_DEFAULT);
    if (set < 0) test_fail(__FILE__, __LINE__, "the fixture has no %s", name);
    hid_t space = H5Dget_space(set);
    *count = H5Sget_simple_extent_npoints(space);
    void *data = must_malloc((size_t)*count * element);
    if (H5Dread(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, data) < 0)
        test_fail(__FILE__, __LINE__, "%s unreadable", name);
    H5Sclose(space);
    H5Dclose(set);
    return data;
}

float *fixture_floats(const Fixture *f, const char *name, int64_t *count) {
    return read_all(f, name, H5T_NATIVE_FLOAT, sizeof(float), count);
}

int32_t *fixture_ints(const Fixture *f, const char *name, int64_t *count) {
    return read_all(f, name, H5T_NATIVE_INT32, sizeof(int32_t), count);
}

uint8_t *fixture_bytes(const Fixture *f, const char *name, int64_t *count) {
    return read_all(f, name, H5T_NATIVE_UINT8, 1, count);
}

void fixture_write(const Fixture *f, const char *name, const char *dir, const char *file) {
    int64_t count;
    uint8_t *bytes = fixture_bytes(f, name, &count);
    char *path = path_join(dir, file);
    EXPECT_OK(file_write(path, bytes, (size_t)count));
    free(bytes);
    free(path);
}

bool fixture_has(const Fixture *f, const char *name) {
    return H5Lexists(f->file, name, H5P_DEFAULT) > 0;
}

Fixture fixture_open_plain(const char *name) {
    Fixture f = {0};
    char *path = fixture_path(name);
    f.file = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT);
    if (f.file < 0) test_fail(__FILE__, __LINE__, "%s cannot be opened", path);
    free(path);
    return f;
}

Fixture fixture_open(const char *name) {
    Fixture f = fixture_open_plain(name);
    snprintf(f.dir, sizeof f.dir, "%s/base", test_folder());
    EXPECT_OK(folder_make(f.dir));
    fixture_write(&f, "model.safetensors", f.dir, "model.safetensors");
    fixture_write(&f, "config.json", f.dir, "config.json");
    return f;
}

float fixture_formula(uint32_t t, uint32_t i) {
    uint32_t h = i + 0x9e3779b9u * (t + 1);
    h ^= h >> 16;
    h *= 0x7feb352du;
    h ^= h >> 15;
    h *= 0x846ca68bu;
    h ^= h >> 16;
    return (float)((double)h / 2147483648.0 - 1.0);
}

Packed *fixture_batch(const Fixture *f, int only) {
    int64_t n, count;
    int32_t *ids = fixture_ints(f, "ids", &n), *lengths = fixture_ints(f, "lengths", &count);
    Packed *p = must_calloc(1, sizeof *p);
    int64_t at = 0, from = 0;
    for (int64_t s = 0; s < count; from += lengths[s], s++) {
        if (only >= 0 && s != only) continue;
        for (int64_t t = 0, start = at; t < lengths[s]; t++, at++) {
            p->ids[at] = ids[from + t];
            p->positions[at] = (int32_t)t;
            p->starts[at] = (int32_t)start;
            p->targets[at] = t + 1 < lengths[s] ? ids[from + t + 1] : -1;
            p->spans[at] = -1;
            p->scored += t + 1 < lengths[s];
        }
    }
    for (int64_t i = 0; i < at; i++) p->weights[i] = 1.0f / (float)p->scored;
    p->batch = (Batch){.N = at,
                       .ids = p->ids,
                       .positions = p->positions,
                       .starts = p->starts,
                       .targets = p->targets,
                       .weights = p->weights};
    free(ids);
    free(lengths);
    return p;
}
