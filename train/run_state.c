/* run_state.c - state.h5. */
#include "train/run_state.h"
#include "data/hdf5.h"
#include "formats/file.h"

#include <dirent.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

static Status write_tensor(H5File *f, const char *name, Tensor t) {
    return tensor_present(t)
               ? h5_write(f, name, H5T_NATIVE_FLOAT, tensor_count(t), 0, false, t.data)
               : OK;
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
    TRY_DONE(h5_write(&f, "norms", H5T_NATIVE_FLOAT, NORM_HISTORY, 0, false, state->norms));
    TRY_DONE(write_tensor(&f, "values", params->space));
    TRY_DONE(write_tensor(&f, "m", optimizer->m));
    TRY_DONE(write_tensor(&f, "v", optimizer->v));
    status = h5_commit(&f);
done:
    h5_close(&f);
    return status;
}

static Status read_tensor(H5File *f, const char *name, Tensor t) {
    int64_t count;
    if (!tensor_present(t)) return OK;
    TRY(h5_count(f, name, &count));
    if (count != tensor_count(t))
        FAIL(ERR_FORMAT, "%s: '%s' holds %" PRId64 " values, this run trains %" PRId64, f->path,
             name, count, tensor_count(t));
    return h5_read(f, name, H5T_NATIVE_FLOAT, 0, count, t.data);
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
    Status status = OK;
    TRY_DONE(h5_open(&f, path));
    TRY_DONE(read_integer(&f, "step", &state->step));
    TRY_DONE(read_integer(&f, "skipped", &state->skipped));
    TRY_DONE(read_integer(&f, "evals_without_gain", &state->evals_without_gain));
    TRY_DONE(read_integer(&f, "norm_count", &state->norm_count));
    TRY_DONE(read_integer(&f, "optimizer_updates", &optimizer->t));
    TRY_DONE(h5_read_number(&f, "/", "best_eval", &state->best_eval));
    TRY_DONE(h5_read(&f, "norms", H5T_NATIVE_FLOAT, 0, NORM_HISTORY, state->norms));
    TRY_DONE(read_tensor(&f, "values", params->space));
    TRY_DONE(read_tensor(&f, "m", optimizer->m));
    TRY_DONE(read_tensor(&f, "v", optimizer->v));
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
