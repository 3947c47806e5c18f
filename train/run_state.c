/* run_state.c - state.h5. */
#include "train/run_state.h"
#include "data/hdf5.h"
#include "formats/file.h"

#include <dirent.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PIECE 4 /* numbers that describe one */

/* A piece of a parameter that a file has: `count` elements from `first` of its whole value on, which
 * begin at `at` in the file's values and states. */
typedef struct Piece {
    int64_t param, first, count, at;
} Piece;

/* Those of this rank's shares. Caller frees. */
static Piece *own_pieces(const ParamList *params, int *count) {
    const Space *s = &params->space;
    Piece *pieces = must_malloc((size_t)(params->count + 1) * sizeof *pieces);
    *count = 0;
    for (int i = 0; i < s->count; i++) {
        const ParamRun *r = &s->runs[i];
        for (int k = r->first; k <= r->last; k++) {
            const Param *p = params->items[k];
            if (!p->trainable) continue;
            int64_t n = tensor_count(p->value), begin = p->offset, end = p->offset + n;
            if (begin < r->own) begin = r->own;
            if (end > r->own_end) end = r->own_end;
            if (begin >= end) continue;
            int64_t before = p->groups ? p->group * (n / p->value.shape[0]) : 0;
            pieces[(*count)++] =
                (Piece){k, before + begin - p->offset, end - begin, r->share + begin - r->own};
        }
    }
    return pieces;
}

/* Whether this rank is the one that writes its share: of those that have the same, the first does. */
static bool writes(const Space *s, const ParamRun *r) {
    if (!s->ranks) return true;
    if (!s->level) return !run_sharers(s->ranks, r)->rank;
    return r->experts || !s->ranks->across.rank;
}

/* Bytes of the host between a share's values and where the space has them. */
static void each_share(const Space *s, float *host, bool reads) {
    for (int i = 0; i < s->count; i++) {
        const ParamRun *r = &s->runs[i];
        if (r->place < 0 || r->own == r->own_end) continue;
        Tensor values = run_values(s, r, r->own, r->own_end);
        if (reads)
            tensor_read(host + r->share, values);
        else
            tensor_write(values, host + r->share);
    }
}

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
        if (!p->trainable || !params->space.no_masters || p->value.dtype == F32) continue;
        snprintf(name, sizeof name, "value_%d", i);
        TRY(each(f, name, p->value));
    }
    return OK;
}

static double bits(const Optimizer *o) {
    return o->config.states_8bit ? 8 : 32;
}

/* Trained values of the run, whatever the ranks. */
static double trained_values(const ParamList *params) {
    double sum = 0;
    for (int i = 0; i < params->count; i++) {
        const Param *p = params->items[i];
        double times = p->groups ? (double)p->groups / (double)p->value.shape[0] : 1;
        if (p->trainable) sum += times * (double)tensor_count(p->value);
    }
    return sum;
}

static Status write_shares(H5File *f, ParamList *params, const Optimizer *optimizer) {
    const Space *s = &params->space;
    int count, kept = 0;
    Piece *pieces = own_pieces(params, &count);
    for (int i = 0, r = 0; i < count; i++) {
        while (pieces[i].param > s->runs[r].last) r++;
        if (writes(s, &s->runs[r])) pieces[kept++] = pieces[i];
    }
    Status status = h5_write(f, "pieces", H5T_NATIVE_INT64, PIECE * kept, 0, false, pieces);
    free(pieces);
    TRY(status);
    int64_t n = params_bytes(params).own;
    float *host = must_calloc((size_t)n + 1, sizeof *host);
    each_share(s, host, true);
    status = h5_write(f, "values", H5T_NATIVE_FLOAT, n, 0, false, host);
    free(host);
    TRY(status);
    TRY(each_plain_value(f, params, write_tensor));
    TRY(write_tensor(f, "m", optimizer->m));
    return write_tensor(f, "v", optimizer->v);
}

/* The file of a rank: the first one's says how many there are. */
static char *part_path(const char *folder, int rank) {
    return rank ? must_format("%s/state-%d.h5", folder, rank) : path_join(folder, "state.h5");
}

static int own_rank(const ParamList *params) {
    return params->space.ranks ? params->space.ranks->all.rank : 0;
}

/* How many ranks, the first ones, have shares to write. */
static int file_count(const Space *s) {
    if (!s->ranks) return 1;
    int experts = s->ranks->experts.size, sharers = s->ranks->sharers.size;
    return !s->level ? experts : experts > 1 ? s->ranks->all.size : sharers;
}

Status run_state_save(const RunState *state, ParamList *params, const Optimizer *optimizer,
                      const char *folder) {
    int rank = own_rank(params), files = file_count(&params->space);
    if (rank >= files) return OK;
    H5File f = {0};
    char *path = part_path(folder, rank);
    Status status = OK;
    TRY_DONE(h5_create(&f, path));
    TRY_DONE(h5_write_number(&f, "/", "files", files));
    TRY_DONE(h5_write_number(&f, "/", "trained_values", trained_values(params)));
    TRY_DONE(h5_write_number(&f, "/", "step", (double)state->step));
    TRY_DONE(h5_write_number(&f, "/", "skipped", (double)state->skipped));
    TRY_DONE(h5_write_number(&f, "/", "best_eval", state->best_eval));
    TRY_DONE(h5_write_number(&f, "/", "evals_without_gain", (double)state->evals_without_gain));
    TRY_DONE(h5_write_number(&f, "/", "norm_count", (double)state->norm_count));
    TRY_DONE(h5_write_number(&f, "/", "optimizer_updates", (double)optimizer->t));
    TRY_DONE(h5_write_number(&f, "/", "optimizer_bits", bits(optimizer)));
    TRY_DONE(h5_write(&f, "norms", H5T_NATIVE_FLOAT, NORM_HISTORY, 0, false, state->norms));
    TRY_DONE(write_shares(&f, params, optimizer));
    status = h5_commit(&f);
done:
    h5_close(&f);
    free(path);
    return status;
}

static Status read_tensor(H5File *f, const char *name, Tensor t) {
    int64_t count, own;
    hid_t type = stored_type(t, &own);
    TRY(h5_count(f, name, &count));
    if (count != own)
        FAIL(ERR_FORMAT, "%s: '%s' holds %" PRId64 " values, this run has %" PRId64, f->path, name,
             count, own);
    Tensor host;
    TRY(tensor_stage(&host, t));
    Status status = h5_read(f, name, type, 0, own, host.data);
    tensor_unstage(t, host, status != OK);
    return status;
}

/* What is filled from all files: this rank's shares, in the host's memory. */
typedef struct Shares {
    Piece *pieces;
    int count;
    float *values;
    Tensor m, v;
    int64_t found; /* elements */
} Shares;

/* The states of elements from `at` on of a file to those from `to` on. */
static Status read_states(H5File *f, const char *name, Tensor host, int64_t to, int64_t at,
                          int64_t n) {
    if (!tensor_present(host)) return OK;
    if (host.dtype == F32)
        return h5_read(f, name, H5T_NATIVE_FLOAT, at, n, (float *)host.data + to);
    if (to % DYNAMIC_BLOCK || at % DYNAMIC_BLOCK)
        FAIL(ERR_CONFIG,
             "%s: states of 8 bits are in blocks of %d values that other ranks cut elsewhere: resume "
             "with the parallel.experts that the run had",
             f->path, DYNAMIC_BLOCK);
    int64_t bytes = dtype_block(host.dtype).bytes,
            blocks = (n + DYNAMIC_BLOCK - 1) / DYNAMIC_BLOCK;
    return h5_read(f, name, H5T_NATIVE_UCHAR, at / DYNAMIC_BLOCK * bytes, blocks * bytes,
                   (char *)host.data + to / DYNAMIC_BLOCK * bytes);
}

/* What a file's piece has of one of ours. */
static Status read_overlap(H5File *f, Shares *s, const Piece *own, const Piece *theirs) {
    int64_t first = own->first, end = own->first + own->count;
    if (first < theirs->first) first = theirs->first;
    if (end > theirs->first + theirs->count) end = theirs->first + theirs->count;
    if (own->param != theirs->param || first >= end) return OK;
    int64_t to = own->at + first - own->first, at = theirs->at + first - theirs->first,
            n = end - first;
    TRY(h5_read(f, "values", H5T_NATIVE_FLOAT, at, n, s->values + to));
    TRY(read_states(f, "m", s->m, to, at, n));
    TRY(read_states(f, "v", s->v, to, at, n));
    s->found += n;
    return OK;
}

static Status read_shares(H5File *f, Shares *s) {
    int64_t n;
    TRY(h5_count(f, "pieces", &n));
    Piece *pieces = must_malloc((size_t)(n + PIECE) * sizeof(int64_t));
    Status status = OK;
    TRY_DONE(h5_read(f, "pieces", H5T_NATIVE_INT64, 0, n, pieces));
    for (int64_t i = 0; i < n / PIECE; i++)
        for (int k = 0; k < s->count; k++)
            if (s->pieces[k].param == pieces[i].param)
                TRY_DONE(read_overlap(f, s, &s->pieces[k], &pieces[i]));
done:
    free(pieces);
    return status;
}

/* Values and states of this rank's shares from the first file, which is open, and the others. */
static Status load_shares(H5File *first, const char *folder, int files, ParamList *params,
                          Optimizer *optimizer) {
    Shares s = {0};
    Status status = OK;
    int64_t all = 0;
    s.values = must_calloc((size_t)params_bytes(params).own + 1, sizeof *s.values);
    s.pieces = own_pieces(params, &s.count);
    for (int i = 0; i < s.count; i++) all += s.pieces[i].count;
    if (tensor_present(optimizer->m)) TRY_DONE(tensor_stage(&s.m, optimizer->m));
    if (tensor_present(optimizer->v)) TRY_DONE(tensor_stage(&s.v, optimizer->v));
    for (int r = 0; r < files; r++) {
        H5File f = {0};
        char *path = part_path(folder, r);
        if (r) status = h5_open(&f, path);
        if (status == OK) status = read_shares(r ? &f : first, &s);
        h5_close(&f);
        free(path);
        if (status != OK) goto done;
    }
    if (s.found != all)
        FAIL_DONE(ERR_FORMAT, "%s: its files hold %" PRId64 " of the %" PRId64 " values wanted here",
                  folder, s.found, all);
    each_share(&params->space, s.values, false);
done:
    if (tensor_present(s.m)) tensor_unstage(optimizer->m, s.m, status != OK);
    if (tensor_present(s.v)) tensor_unstage(optimizer->v, s.v, status != OK);
    free(s.values);
    free(s.pieces);
    return status;
}

static Status read_integer(H5File *f, const char *name, int64_t *out) {
    double value;
    TRY(h5_read_number(f, "/", name, &value));
    if (!(value >= 0 && value < 9e15)) FAIL(ERR_FORMAT, "%s: '%s' is %g", f->path, name, value);
    *out = (int64_t)value;
    return OK;
}

Status run_state_load(RunState *state, ParamList *params, Optimizer *optimizer,
                      const char *folder) {
    H5File f = {0};
    char *path = part_path(folder, 0);
    double stored_bits = 0, stored_values = 0;
    int64_t files = 0;
    Status status = OK;
    TRY_DONE(h5_open(&f, path));
    TRY_DONE(read_integer(&f, "step", &state->step));
    TRY_DONE(read_integer(&f, "files", &files));
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
    TRY_DONE(h5_read_number(&f, "/", "trained_values", &stored_values));
    if (stored_values != trained_values(params))
        FAIL_DONE(ERR_FORMAT, "%s: holds %.0f trained values, this run has %.0f", path,
                  stored_values, trained_values(params));
    TRY_DONE(h5_read_number(&f, "/", "best_eval", &state->best_eval));
    TRY_DONE(h5_read(&f, "norms", H5T_NATIVE_FLOAT, 0, NORM_HISTORY, state->norms));
    TRY_DONE(each_plain_value(&f, params, read_tensor));
    TRY_DONE(load_shares(&f, folder, (int)files, params, optimizer));
    params_publish(params);
    space_join(params);
done:
    h5_close(&f);
    free(path);
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
