/* run_state.c - state.h5. */
#include "train/run_state.h"
#include "data/hdf5.h"
#include "formats/file.h"

#include <dirent.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* As f32, or as the bytes of packed states and bf16 values. */
static hid_t stored_type(Tensor t, int64_t *count) {
    bool bytes = t.dtype != F32;
    *count = bytes ? (int64_t)tensor_bytes(t) : tensor_count(t);
    return bytes ? H5T_NATIVE_UCHAR : H5T_NATIVE_FLOAT;
}

static Status write_tensor(H5File *f, const char *name, Tensor t) {
    int64_t count;
    if (!tensor_present(t)) return OK;
    hid_t type = stored_type(t, &count);
    Tensor host;
    TRY(tensor_stage(&host, t));
    tensor_read(host.data, t);
    Status status = h5_write(f, name, type, count, 0, false, host.data);
    tensor_unstage(t, host, true);
    return status;
}

/* Values that have no master, one by one: `each` writes or reads a tensor. */
static Status each_plain_value(H5File *f, const ParamList *params,
                               Status (*each)(H5File *f, const char *name, Tensor t)) {
    for (int i = 0; i < params->count; i++) {
        char name[32];
        const Param *p = params->items[i];
        if (!p->trainable || p->master.dtype == F32) continue;
        snprintf(name, sizeof name, "value_%d", i);
        TRY(each(f, name, p->master));
    }
    return OK;
}

static double bits(const Optimizer *o) {
    return o->config.states_8bit ? 8 : 32;
}

Status run_state_save(const RunState *state, const ParamList *params, const Optimizer *optimizer,
                      const char *path) {
    H5File f = {0};
    Status status = OK;
    TRY_DONE(h5_create(&f, path));
    TRY_DONE(h5_write_number(&f, "/", "step", (double)state->step));
    TRY_DONE(h5_write_number(&f, "/", "skipped", (double)state->skipped));
    TRY_DONE(h5_write_number(&f, "/", "best_eval", state->best_eval));
    TRY_DONE(h5_write_number(&f, "/", "evals_without_gain", (double)state->evals_without_gain));
    TRY_DONE(h5_write_number(&f, "/", "norm_count", (double)state->norm_count));
    TRY_DONE(h5_write_number(&f, "/", "optimizer_updates", (double)optimizer->t));
    TRY_DONE(h5_write_number(&f, "/", "optimizer_bits", bits(optimizer)));
    TRY_DONE(h5_write(&f, "norms", H5T_NATIVE_FLOAT, NORM_HISTORY, 0, false, state->norms));
    TRY_DONE(write_tensor(&f, "values", params->space));
    TRY_DONE(each_plain_value(&f, params, write_tensor));
    TRY_DONE(write_tensor(&f, "m", optimizer->m));
    TRY_DONE(write_tensor(&f, "v", optimizer->v));
    status = h5_commit(&f);
done:
    h5_close(&f);
    return status;
}

static int64_t rows_of(Tensor t) {
    return t.ndim ? t.shape[0] : 1;
}

/* The rows from `first` on that t has, of `all` in the file. */
static Status read_rows(H5File *f, const char *name, Tensor t, int64_t first, int64_t all) {
    int64_t count, own, rows = rows_of(t);
    if (!tensor_present(t) || !rows) return OK;
    hid_t type = stored_type(t, &own);
    int64_t expected = own / rows * all;
    TRY(h5_count(f, name, &count));
    if (count != expected)
        FAIL(ERR_FORMAT, "%s: '%s' holds %" PRId64 " values, this run has %" PRId64, f->path, name,
             count, expected);
    Tensor host;
    TRY(tensor_stage(&host, t));
    Status status = h5_read(f, name, type, own / rows * first, own, host.data);
    tensor_unstage(t, host, status != OK);
    return status;
}

static Status read_tensor(H5File *f, const char *name, Tensor t) {
    return read_rows(f, name, t, 0, rows_of(t));
}

static Status read_integer(H5File *f, const char *name, int64_t *out) {
    double value;
    TRY(h5_read_number(f, "/", name, &value));
    if (!(value >= 0 && value < 9e15)) FAIL(ERR_FORMAT, "%s: '%s' is %g", f->path, name, value);
    *out = (int64_t)value;
    return OK;
}

Status run_state_load(RunState *state, ParamList *params, Optimizer *optimizer, const char *path) {
    H5File f = {0};
    double stored_bits = 0;
    Status status = OK;
    TRY_DONE(h5_open(&f, path));
    TRY_DONE(read_integer(&f, "step", &state->step));
    TRY_DONE(read_integer(&f, "skipped", &state->skipped));
    TRY_DONE(read_integer(&f, "evals_without_gain", &state->evals_without_gain));
    TRY_DONE(read_integer(&f, "norm_count", &state->norm_count));
    TRY_DONE(read_integer(&f, "optimizer_updates", &optimizer->t));
    TRY_DONE(h5_read_number(&f, "/", "optimizer_bits", &stored_bits));
    if (stored_bits != bits(optimizer))
        FAIL_DONE(ERR_CONFIG,
                  "%s: the optimizer's states have %g bits, but optimizer.states asks for %g: "
                  "resume with what the run began with",
                  path, stored_bits, bits(optimizer));
    TRY_DONE(h5_read_number(&f, "/", "best_eval", &state->best_eval));
    TRY_DONE(h5_read(&f, "norms", H5T_NATIVE_FLOAT, 0, NORM_HISTORY, state->norms));
    TRY_DONE(read_tensor(&f, "values", params->space));
    TRY_DONE(each_plain_value(&f, params, read_tensor));
    int64_t blocks = params_bytes(params).trained / DYNAMIC_BLOCK;
    TRY_DONE(read_rows(&f, "m", optimizer->m, optimizer->begin, blocks));
    TRY_DONE(read_rows(&f, "v", optimizer->v, optimizer->begin, blocks));
    params_publish(params);
done:
    h5_close(&f);
    return status;
}

int64_t run_state_newest(const char *output) {
    char *path = path_join(output, "checkpoints");
    DIR *dir = opendir(path);
    int64_t newest = 0;
    for (struct dirent *entry; dir && (entry = readdir(dir));) {
        char *end;
        if (strncmp(entry->d_name, "step-", 5)) continue;
        int64_t step = strtoll(entry->d_name + 5, &end, 10);
        char *state = must_format("%s/%s/state.h5", path, entry->d_name);
        if (!*end && step > newest && file_exists(state)) newest = step;
        free(state);
    }
    if (dir) closedir(dir);
    free(path);
    return newest;
}
