/* run_state.c - state.h5. */
#include "train/run_state.h"
#include "data/hdf5.h"
#include "formats/file.h"

#include <dirent.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PIECE 5 /* numbers that describe one */

/* A piece of a parameter that a file has: `count` elements from `first` of its whole value on,
 * which begin at `at` in the file's states and at `value` in its values. */
typedef struct Piece {
    int64_t param, first, count, at, value;
} Piece;

/* Those of this rank's shares. Caller frees. */
static Piece *own_pieces(const ParamList *params, int *count) {
    const Space *s = &params->space;
    Piece *pieces = must_malloc((size_t)(params->count + 1) * sizeof *pieces);
    int64_t values = 0;
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
            pieces[(*count)++] = (Piece){k, before + begin - p->offset, end - begin,
                                         r->share + begin - r->own, values + begin - r->own};
        }
        if (r->place >= 0) values += r->own_end - r->own;
    }
    return pieces;
}

/* Whether this rank is the one that writes its share: of those that have the same, the first does.
 */
static bool writes(const Space *s, const ParamRun *r) {
    if (!s->ranks) return true;
    if (!s->level) return !run_sharers(s->ranks, r)->rank;
    return r->experts || !s->ranks->across.rank;
}

/* Elements, or bytes of packed states, that go between file and memory at a time. */
#define AT_ONCE ((int64_t)1 << 22)

/* f32, or the bytes of packed states and bf16 values, as one line. */
static Tensor stored_line(Tensor t) {
    int64_t n = t.dtype == F32 ? tensor_count(t) : (int64_t)tensor_bytes(t);
    Tensor line = tensor_make(t.data, t.dtype == F32 ? F32 : U8, 1, &n);
    line.device = t.device;
    return line;
}

static hid_t stored_type(Tensor line) {
    return line.dtype == F32 ? H5T_NATIVE_FLOAT : H5T_NATIVE_UCHAR;
}

/* Adds all of a tensor to the end of a dataset. */
static Status append(H5File *f, const char *name, Tensor t) {
    if (!tensor_present(t)) return OK;
    Tensor line = stored_line(t);
    void *host = must_malloc((size_t)AT_ONCE * dtype_size(line.dtype));
    Status status = OK;
    for (int64_t at = 0, n; at < tensor_count(line) && status == OK; at += n) {
        n = tensor_count(line) - at < AT_ONCE ? tensor_count(line) - at : AT_ONCE;
        const void *bytes = tensor_host(tensor_slice(line, at, n), host);
        status = h5_append(f, name, stored_type(line), bytes, n);
    }
    free(host);
    return status;
}

/* Elements `first` and on of a dataset to all of a tensor. */
static Status read_into(H5File *f, const char *name, int64_t first, Tensor t) {
    Tensor line = stored_line(t);
    void *host = must_malloc((size_t)AT_ONCE * dtype_size(line.dtype));
    Status status = OK;
    for (int64_t at = 0, n; at < tensor_count(line) && status == OK; at += n) {
        n = tensor_count(line) - at < AT_ONCE ? tensor_count(line) - at : AT_ONCE;
        status = h5_read(f, name, stored_type(line), first + at, n, host);
        if (status == OK) tensor_write(tensor_slice(line, at, n), host);
    }
    free(host);
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
    for (int i = 0; i < s->count; i++) {
        const ParamRun *r = &s->runs[i];
        if (r->place >= 0 && r->own < r->own_end)
            TRY(append(f, "values", run_values(s, r, r->own, r->own_end)));
    }
    TRY(each_plain_value(f, params, append));
    TRY(append(f, "m", optimizer->m));
    return append(f, "v", optimizer->v);
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

static Status read_all(H5File *f, const char *name, Tensor t) {
    int64_t count, own = tensor_count(stored_line(t));
    TRY(h5_count(f, name, &count));
    if (count != own)
        FAIL(ERR_FORMAT, "%s: '%s' holds %" PRId64 " values, this run has %" PRId64, f->path, name,
             count, own);
    return read_into(f, name, 0, t);
}

/* What is filled from all files. */
typedef struct Shares {
    ParamList *params;
    Optimizer *optimizer;
    Piece *pieces; /* of this rank */
    int count;
    int64_t found; /* elements */
} Shares;

/* The states of elements from `at` on of a file to those from `to` on. */
static Status read_states(H5File *f, const char *name, Tensor states, int64_t to, int64_t at,
                          int64_t n) {
    if (!tensor_present(states)) return OK;
    if (states.dtype == F32)
        return read_into(f, name, at, tensor_slice(stored_line(states), to, n));
    if (to % DYNAMIC_BLOCK || at % DYNAMIC_BLOCK)
        FAIL(ERR_CONFIG,
             "%s: states of 8 bits are in blocks of %d values that other ranks cut elsewhere: "
             "resume with the parallel.experts that the run had",
             f->path, DYNAMIC_BLOCK);
    int64_t blocks = (n + DYNAMIC_BLOCK - 1) / DYNAMIC_BLOCK;
    return read_into(f, name, at / DYNAMIC_BLOCK * dtype_block(states.dtype).bytes,
                     tensor_slice(states, to / DYNAMIC_BLOCK, blocks));
}

static const ParamRun *run_of_share(const Space *s, int64_t at) {
    int i = 0;
    while (at >= s->runs[i].share + s->runs[i].own_end - s->runs[i].own) i++;
    return &s->runs[i];
}

/* What a file's piece has of one of ours. */
static Status read_overlap(H5File *f, Shares *s, const Piece *own, const Piece *theirs) {
    int64_t first = own->first, end = own->first + own->count;
    if (first < theirs->first) first = theirs->first;
    if (end > theirs->first + theirs->count) end = theirs->first + theirs->count;
    if (own->param != theirs->param || first >= end) return OK;
    int64_t to = own->at + first - own->first, at = theirs->at + first - theirs->first,
            n = end - first;
    const Space *space = &s->params->space;
    const ParamRun *r = run_of_share(space, to);
    int64_t place = r->own + to - r->share;
    if (r->place >= 0)
        TRY(read_into(f, "values", theirs->value + first - theirs->first,
                      run_values(space, r, place, place + n)));
    TRY(read_states(f, "m", s->optimizer->m, to, at, n));
    TRY(read_states(f, "v", s->optimizer->v, to, at, n));
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
    Shares s = {.params = params, .optimizer = optimizer};
    Status status = OK;
    int64_t all = 0;
    s.pieces = own_pieces(params, &s.count);
    for (int i = 0; i < s.count; i++) all += s.pieces[i].count;
    for (int i = 0; i < files && (!i || s.found < all);
         i++) { /* as many ranks: its own has it all */
        int r = (own_rank(params) + i) % files;
        H5File f = {0};
        char *path = part_path(folder, r);
        if (r) status = h5_open(&f, path);
        if (status == OK) status = read_shares(r ? &f : first, &s);
        h5_close(&f);
        free(path);
        if (status != OK) goto done;
    }
    if (s.found != all)
        FAIL_DONE(ERR_FORMAT,
                  "%s: its files hold %" PRId64 " of the %" PRId64 " values wanted here", folder,
                  s.found, all);
done:
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
    TRY_DONE(each_plain_value(&f, params, read_all));
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
