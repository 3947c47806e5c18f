/* comm.h - the ranks of a run: processes that MPI has started together, each with a part of the
 * work.
 *
 * Everything is called by all ranks, in the same order. Sums are made in the order of the ranks by
 * the rank they belong to, so that every rank has the same bits and a run repeats. Alone, a process
 * is rank 0 of 1 and nothing here does anything. Tensors on GPUs go from one to the other through
 * NCCL where it is there (comm_join_gpus), in order with the kernels, else through the host's
 * memory. When a rank ends otherwise than by comm_close, mpirun ends the others. When one does not
 * answer for `timeout`, whoever waits for it says which and ends the run; barriers wait six times
 * as long, comm_fetch for ever. */
#ifndef COMM_H
#define COMM_H

#include "kernels/tensor.h"

typedef struct Comm {
    int rank, size;        /* size 0: not opened, one process */
    double timeout;        /* seconds; 0: none */
    int local;             /* which of its host's ranks it is */
    bool whole;            /* all ranks of the run; else a group of them */
    int first, stride;     /* rank r of a group is rank first + r * stride of the run */
    int handle;            /* MPI's, as its Fortran side numbers it */
    bool threads;          /* several threads may call at once, each with a group of its own */
    struct CommGpus *gpus; /* the same ranks' GPUs, which exchange data directly; NULL: through the
                            * host */
    bool supposed;         /* for plans: there are no others, and nothing is exchanged */
} Comm;

static inline bool comm_is_many(const Comm *c) {
    return c->size > 1;
}

/* Whether there is nobody to exchange anything with; c may be NULL. */
static inline bool comm_is_alone(const Comm *c) {
    return !c || !comm_is_many(c) || c->supposed;
}

/* Whether a launcher started this process as one of several. */
bool comm_was_started(void);

/* Joins the ranks that mpirun or a scheduler started. ERR_CONFIG: it started several, and this
 * build has no MPI. */
Status comm_open(Comm *c);

/* The group of this rank among groups of `size` of c's: those that follow each other, or (apart)
 * one out of each such run of c->size / size ranks. `size` divides c's. */
void comm_group(Comm *group, const Comm *c, int size, bool apart);

/* The same ranks again, for another thread's calls. */
void comm_again(Comm *again, const Comm *c);

/* From here on tensors of this device go directly to the other ranks', if NCCL is found. All ranks
 * of the run call it alike. */
void comm_join_gpus(Comm *c, Device *device);

/* Leaves a group, or all of MPI. */
void comm_close(Comm *c);

/* The device of that name; of several ranks on a host each takes a GPU of its own, unless one is
 * named. */
Status comm_open_device(const Comm *c, Device **device, const char *name);

void comm_barrier(const Comm *c);

/* From rank 0 to all. */
void comm_broadcast(const Comm *c, void *bytes, size_t count);

/* The sum over all ranks, and the largest. */
double comm_sum(const Comm *c, double x);
void comm_sum_doubles(const Comm *c, double *x, int64_t count);
int64_t comm_sum_count(const Comm *c, int64_t x);
int comm_most(const Comm *c, int x);
void comm_sum_floats(const Comm *c, float *x, int64_t count);

/* ERR_CONFIG on all ranks where one has another value than rank 0: "rank 2 has another WHAT". */
Status comm_agree(const Comm *c, const char *what, uint64_t value);

/* t f32, cut at bounds[0 .. size]: rank r's part becomes the sum of all ranks' of it, the rest is
 * left as it is. */
void comm_reduce_scatter(const Comm *c, Tensor t, const int64_t *bounds);

/* Every part becomes what its rank has. Any dtype that is not packed. */
void comm_all_gather(const Comm *c, Tensor t, const int64_t *bounds);

/* Both, over the whole of t: every rank has the sum. */
void comm_all_reduce(const Comm *c, Tensor t);

/* sends[r] rows of `from`, behind each other, to each rank r, and gets[r] rows from it into `to`,
 * which have the same bytes.   to (at least all of gets, ...), from (at least all of sends, ...) */
void comm_all_to_all(const Comm *c, Tensor to, const int64_t *gets, Tensor from,
                     const int64_t *sends);

/* Rank `root`'s bytes to rank 0, at `to`; others do nothing. */
void comm_fetch(const Comm *c, int root, void *to, const void *from, size_t count);

/* Makes calls beside the caller's, in the order in which they were begun: all ranks begin the same.
 * On the CPU a thread makes them, and kernels that it runs have one processor; on a GPU they are in
 * a stream of their own. */
typedef struct CommBeside CommBeside;
typedef void CommWork(void *context, int number);

CommBeside *comm_beside_open(Device *device);
void comm_beside_close(CommBeside *b); /* once all is done; accepts NULL */

/* Has work(context, number) called soon; with b NULL, before it returns. */
void comm_beside_begin(CommBeside *b, CommWork *work, void *context, int number);

/* Until everything that was begun is done. */
void comm_beside_wait(CommBeside *b);

#endif
