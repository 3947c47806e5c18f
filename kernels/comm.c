/* comm.c - ranks over MPI. */
#include "kernels/comm.h"
#include "kernels/elementwise.h"

#include <inttypes.h>
#include <omp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#ifdef HAVE_MPI
#include <mpi.h>
#endif

/* Elements that all ranks together send one at a time, and bytes of one message. */
#define PIECES  ((int64_t)1 << 22)
#define MESSAGE ((size_t)1 << 26)

/* How many processes were started together, by what the launchers leave in the environment. */
static int started_together(void) {
    static const char *const names[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        const char *size = getenv(names[i]);
        if (size && atoi(size) > 0) return atoi(size);
    }
    return getenv("PMIX_RANK") ? 2 : 1; /* at least */
}

bool comm_was_started(void) {
    return started_together() > 1;
}

/* A group of GPUs, and memory for what comes from them to be summed. */
struct CommGpus {
    Device *device;
    void *group, *scratch;
};

#ifdef HAVE_MPI

/* Which rank of its host this is; the only host's where no launcher says. */
static int local_rank(int rank) {
    static const char *const names[] = {"OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID",
                                        "SLURM_LOCALID"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (getenv(names[i])) return atoi(getenv(names[i]));
    return rank;
}

static MPI_Comm handle_of(const Comm *c) {
    return MPI_Comm_f2c((MPI_Fint)c->handle);
}

/* The number in the run of rank r. */
static int in_run(const Comm *c, int r) {
    return c->first + r * c->stride;
}

/* Later ranks give the first time to say it alone. */
static double patience(const Comm *c, int times) {
    return times * c->timeout + (c->rank ? 3 + c->rank : 0);
}

static _Noreturn void end_run(const Comm *c, int missing) {
    char who[32] = "a rank";
    if (missing >= 0) snprintf(who, sizeof who, "rank %d", in_run(c, missing));
    fprintf(
        stderr,
        "lapidary: %s has not answered rank %d for %.0f s (parallel.timeout): the run ends; the "
        "newest save is whole\n",
        who, in_run(c, c->rank), c->timeout);
    MPI_Abort(MPI_COMM_WORLD, 1);
    abort();
}

/* Until all requests are done, `times` as long as a rank may take; `from` names whose messages they
 * are, -1: anyone's. */
static void wait_for(const Comm *c, int count, MPI_Request *requests, const int *from, int times) {
    double begin = omp_get_wtime();
    for (int turn = 0;; turn++) {
        int done = 0;
        MPI_Testall(count, requests, &done, MPI_STATUSES_IGNORE);
        if (done) return;
        if (turn < 1000) continue;
        usleep(turn < 20000 ? 20 : 200);
        if (c->timeout <= 0 || omp_get_wtime() - begin < patience(c, times)) continue;
        for (int i = 0; i < count; i++) {
            MPI_Test(&requests[i], &done, MPI_STATUS_IGNORE);
            if (!done && from[i] >= 0) end_run(c, from[i]);
        }
        end_run(c, -1);
    }
}

/* Messages under way, and whose they are. */
typedef struct Mail {
    MPI_Comm among;
    Device *gpu; /* whose memory they are in; NULL: the host's */
    DeviceMessage *messages;
    MPI_Request *requests;
    int *from, count;
} Mail;

static Mail mail_open(const Comm *c, Device *device) {
    size_t n = 2 * (size_t)c->size;
    return (Mail){handle_of(c),
                  device->kind == DEVICE_CUDA ? device : NULL,
                  must_malloc(n * sizeof(DeviceMessage)),
                  must_malloc(n * sizeof(MPI_Request)),
                  must_malloc(n * sizeof(int)),
                  0};
}

static void mail_send(Mail *m, int to, const void *bytes, int64_t count) {
    if (m->gpu)
        m->messages[m->count] = (DeviceMessage){to, NULL, bytes, (size_t)count};
    else
        MPI_Isend(bytes, (int)count, MPI_BYTE, to, 0, m->among, &m->requests[m->count]);
    m->from[m->count++] = -1;
}

static void mail_receive(Mail *m, int from, void *bytes, int64_t count) {
    if (m->gpu)
        m->messages[m->count] = (DeviceMessage){from, bytes, NULL, (size_t)count};
    else
        MPI_Irecv(bytes, (int)count, MPI_BYTE, from, 0, m->among, &m->requests[m->count]);
    m->from[m->count++] = from;
}

/* Until all of it is there, or has left: of a GPU's memory, before its work that follows. */
static void mail_wait(const Comm *c, Mail *m) {
    if (m->gpu)
        device_exchange(m->gpu, c->gpus->group, m->messages, m->count);
    else
        wait_for(c, m->count, m->requests, m->from, 1);
    m->count = 0;
}

static void mail_close(Mail *m) {
    free(m->messages);
    free(m->requests);
    free(m->from);
}

Status comm_open(Comm *c) {
    int given;
    *c = (Comm){.size = 1, .whole = true};
    if (started_together() == 1) return OK;
    MPI_Init_thread(NULL, NULL, MPI_THREAD_MULTIPLE, &given);
    c->threads = given == MPI_THREAD_MULTIPLE;
    MPI_Comm_rank(MPI_COMM_WORLD, &c->rank);
    MPI_Comm_size(MPI_COMM_WORLD, &c->size);
    c->local = local_rank(c->rank);
    c->stride = 1;
    c->handle = (int)MPI_Comm_c2f(MPI_COMM_WORLD);
    return OK;
}

void comm_group(Comm *group, const Comm *c, int size, bool apart) {
    *group = (Comm){.size = 1, .timeout = c->timeout, .local = c->local};
    if (!comm_is_many(c) || size == 1) return;
    CHECK(c->size % size == 0, "groups of %d among %d ranks", size, c->size);
    int groups = c->size / size, which = apart ? c->rank % groups : c->rank / size;
    MPI_Comm among;
    group->supposed = c->supposed;
    group->rank = apart ? c->rank / groups : c->rank % size;
    group->size = size;
    group->first = in_run(c, apart ? which : which * size);
    group->stride = c->stride * (apart ? groups : 1);
    if (c->supposed) return;
    MPI_Comm_split(handle_of(c), which, c->rank, &among);
    group->handle = (int)MPI_Comm_c2f(among);
}

void comm_again(Comm *again, const Comm *c) {
    MPI_Comm among;
    *again = *c;
    again->whole = false;
    again->gpus = NULL;
    if (comm_is_alone(c)) return;
    MPI_Comm_dup(handle_of(c), &among);
    again->handle = (int)MPI_Comm_c2f(among);
}

void comm_join_gpus(Comm *c, Device *device) {
    char id[DEVICE_ID_BYTES + 1] = {0}; /* and whether there is one */
    if (comm_is_alone(c) || device->kind != DEVICE_CUDA) return;
    if (!c->rank) id[DEVICE_ID_BYTES] = device_new_group(device, id);
    comm_broadcast(c, id, sizeof id);
    if (!id[DEVICE_ID_BYTES]) return;
    c->gpus = must_calloc(1, sizeof *c->gpus);
    c->gpus->device = device;
    c->gpus->group = device_join_group(device, id, c->rank, c->size);
}

void comm_close(Comm *c) {
    int open;
    if (c->gpus) {
        device_leave_group(c->gpus->group);
        device_release(c->gpus->device, c->gpus->scratch, PIECES * sizeof(float));
        free(c->gpus);
    }
    MPI_Initialized(&open);
    MPI_Comm among = !comm_is_alone(c) && open ? handle_of(c) : MPI_COMM_WORLD;
    if (among != MPI_COMM_WORLD)
        MPI_Comm_free(&among);
    else if (c->whole && open)
        MPI_Finalize();
    *c = (Comm){0};
}

void comm_barrier(const Comm *c) {
    MPI_Request request;
    int from = -1;
    if (comm_is_alone(c)) return;
    MPI_Ibarrier(handle_of(c), &request);
    wait_for(c, 1, &request, &from, 6);
}

void comm_broadcast(const Comm *c, void *bytes, size_t count) {
    int from = c->rank ? 0 : -1;
    if (comm_is_alone(c)) return;
    for (size_t done = 0; done < count; done += MESSAGE) {
        size_t n = count - done < MESSAGE ? count - done : MESSAGE;
        MPI_Request request;
        MPI_Ibcast((char *)bytes + done, (int)n, MPI_BYTE, 0, handle_of(c), &request);
        wait_for(c, 1, &request, &from, 1);
    }
}

/* `bytes` of each rank one behind the other, for all. Caller frees. */
static void *gather_all(const Comm *c, const void *mine, int bytes) {
    char *all = must_malloc((size_t)c->size * (size_t)bytes);
    Mail mail = mail_open(c, device_cpu());
    memcpy(all + c->rank * bytes, mine, (size_t)bytes);
    for (int r = 0; r < c->size; r++) {
        if (r == c->rank) continue;
        mail_send(&mail, r, mine, bytes);
        mail_receive(&mail, r, all + r * bytes, bytes);
    }
    mail_wait(c, &mail);
    mail_close(&mail);
    return all;
}

void comm_sum_doubles(const Comm *c, double *x, int64_t count) {
    if (comm_is_alone(c)) return;
    double *all = gather_all(c, x, (int)(count * (int64_t)sizeof *x));
    for (int64_t i = 0; i < count; i++) {
        x[i] = 0;
        for (int r = 0; r < c->size; r++) x[i] += all[r * count + i];
    }
    free(all);
}

int64_t comm_sum_count(const Comm *c, int64_t x) {
    if (comm_is_alone(c)) return x;
    int64_t *all = gather_all(c, &x, sizeof x), sum = 0;
    for (int r = 0; r < c->size; r++) sum += all[r];
    free(all);
    return sum;
}

int comm_most(const Comm *c, int x) {
    if (comm_is_alone(c)) return x;
    int *all = gather_all(c, &x, sizeof x), most = x;
    for (int r = 0; r < c->size; r++)
        if (all[r] > most) most = all[r];
    free(all);
    return most;
}

/* own (n) = what all ranks have for it, in their order; got (ranks, piece) has the others'. */
static void sum_in_order(const Comm *c, Tensor own, Tensor got) {
    int64_t n = tensor_count(own), piece = tensor_cols(got);
    float *to = own.data, *from = got.data;
    if (own.device->kind == DEVICE_CUDA) {
        tensor_copy(tensor_slice(tensor_at(got, c->rank), 0, n), own);
        for (int r = 0; r < c->size; r++)
            scale_copy(own, r ? ADD : SET, tensor_slice(tensor_at(got, r), 0, n), 1.0f);
        return;
    }
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++) {
        float sum = 0;
        for (int r = 0; r < c->size; r++) sum += r == c->rank ? to[i] : from[r * piece + i];
        to[i] = sum;
    }
}

/* Memory for PIECES floats; the caller frees the host's. */
static void *scratch_of(const Comm *c, Device *device) {
    if (device->kind == DEVICE_CPU) return must_malloc(PIECES * sizeof(float));
    void **scratch = &c->gpus->scratch;
    if (!*scratch) *scratch = device_allocate(device, PIECES * sizeof(float));
    if (!*scratch) give_up("the GPU is out of memory for what ranks exchange");
    return *scratch;
}

/* Rank r's part of x, of bounds[r] .. bounds[r + 1], in the pieces in which all send at a time. */
static void reduce_scatter(const Comm *c, Tensor x, const int64_t *bounds) {
    int64_t longest = 0, piece = PIECES / c->size;
    Tensor got = TENSOR(scratch_of(c, x.device), F32, c->size, piece);
    got.device = x.device;
    Mail mail = mail_open(c, x.device);
    for (int r = 0; r < c->size; r++)
        if (bounds[r + 1] - bounds[r] > longest) longest = bounds[r + 1] - bounds[r];
    for (int64_t done = 0; done < longest; done += piece) {
        int64_t mine = 0;
        for (int r = 0; r < c->size; r++) {
            int64_t left = bounds[r + 1] - bounds[r] - done, n = left < piece ? left : piece;
            if (r == c->rank) mine = n;
            if (r == c->rank || n <= 0) continue;
            mail_send(&mail, r, (float *)x.data + bounds[r] + done, n * (int64_t)sizeof(float));
        }
        for (int r = 0; r < c->size && mine > 0; r++)
            if (r != c->rank)
                mail_receive(&mail, r, (float *)got.data + r * piece,
                             mine * (int64_t)sizeof(float));
        mail_wait(c, &mail);
        if (mine > 0) sum_in_order(c, tensor_slice(x, bounds[c->rank] + done, mine), got);
    }
    mail_close(&mail);
    if (x.device->kind == DEVICE_CPU) free(got.data);
}

static void all_gather(const Comm *c, Tensor t, const int64_t *bounds) {
    char *x = t.data;
    size_t size = dtype_size(t.dtype);
    int64_t longest = 0, piece = 4 * PIECES / c->size / (int64_t)size;
    Mail mail = mail_open(c, t.device);
    for (int r = 0; r < c->size; r++)
        if (bounds[r + 1] - bounds[r] > longest) longest = bounds[r + 1] - bounds[r];
    for (int64_t done = 0; done < longest; done += piece) {
        for (int r = 0; r < c->size; r++) {
            int64_t n[] = {bounds[r + 1] - bounds[r] - done,
                           bounds[c->rank + 1] - bounds[c->rank] - done};
            for (int i = 0; i < 2; i++)
                if (n[i] > piece) n[i] = piece;
            if (r == c->rank) continue;
            if (n[0] > 0)
                mail_receive(&mail, r, x + (size_t)(bounds[r] + done) * size, n[0] * (int64_t)size);
            if (n[1] > 0)
                mail_send(&mail, r, x + (size_t)(bounds[c->rank] + done) * size,
                          n[1] * (int64_t)size);
        }
        mail_wait(c, &mail);
    }
    mail_close(&mail);
}

/* Bytes `done` on of what goes to, or comes from, a rank, at most a message of them. */
static int64_t message(int64_t rows, size_t row, size_t done) {
    size_t all = (size_t)rows * row, left = all > done ? all - done : 0;
    return (int64_t)(left < MESSAGE ? left : MESSAGE);
}

static void all_to_all(const Comm *c, Tensor all_to, const int64_t *gets, Tensor all_from,
                       const int64_t *sends, size_t row) {
    Mail mail = mail_open(c, all_to.device);
    char *to = all_to.data;
    const char *from = all_from.data;
    size_t longest = 0;
    for (int r = 0; r < c->size; r++) {
        int64_t most = gets[r] > sends[r] ? gets[r] : sends[r];
        if ((size_t)most * row > longest) longest = (size_t)most * row;
    }
    for (size_t done = 0; done < longest; done += MESSAGE) {
        char *in = to;
        const char *out = from;
        for (int r = 0; r < c->size; r++) {
            int64_t get = message(gets[r], row, done), send = message(sends[r], row, done);
            if (r == c->rank)
                device_copy(all_to.device, in + done, all_from.device, out + done, (size_t)get);
            else if (get)
                mail_receive(&mail, r, in + done, get);
            if (r != c->rank && send) mail_send(&mail, r, out + done, send);
            in += (size_t)gets[r] * row;
            out += (size_t)sends[r] * row;
        }
        mail_wait(c, &mail);
    }
    mail_close(&mail);
}

Status comm_agree(const Comm *c, const char *what, uint64_t value) {
    if (comm_is_alone(c)) return OK;
    uint64_t *all = gather_all(c, &value, sizeof value);
    int other = 0;
    for (int r = c->size - 1; r > 0; r--)
        if (all[r] != all[0]) other = r;
    free(all);
    if (other)
        FAIL(ERR_CONFIG, "rank %d has another %s than rank 0, expected the same on all %d", other,
             what, c->size);
    return OK;
}

void comm_fetch(const Comm *c, int root, void *to, const void *from, size_t count) {
    if (root == 0) {
        if (c->rank == 0) memcpy(to, from, count);
        return;
    }
    for (size_t done = 0; done < count; done += MESSAGE) {
        size_t n = count - done < MESSAGE ? count - done : MESSAGE;
        if (c->rank == root)
            MPI_Send((const char *)from + done, (int)n, MPI_BYTE, 0, 1, handle_of(c));
        else if (c->rank == 0)
            MPI_Recv((char *)to + done, (int)n, MPI_BYTE, root, 1, handle_of(c), MPI_STATUS_IGNORE);
    }
}

#else

Status comm_open(Comm *c) {
    *c = (Comm){.size = 1, .whole = true};
    if (started_together() > 1)
        FAIL(ERR_CONFIG, "started as one of several ranks, and this build has no MPI: install it "
                         "(libopenmpi-dev) and build again");
    return OK;
}

void comm_group(Comm *group, const Comm *c, int size, bool apart) {
    (void)apart;
    *group = (Comm){.size = size, .supposed = c->supposed};
}
void comm_again(Comm *again, const Comm *c) {
    *again = *c;
    again->whole = false;
}
void comm_close(Comm *c) {
    *c = (Comm){0};
}
void comm_barrier(const Comm *c) {
    (void)c;
}
void comm_broadcast(const Comm *c, void *bytes, size_t count) {
    (void)c, (void)bytes, (void)count;
}
void comm_sum_doubles(const Comm *c, double *x, int64_t count) {
    (void)c, (void)x, (void)count;
}
int64_t comm_sum_count(const Comm *c, int64_t x) {
    (void)c;
    return x;
}
int comm_most(const Comm *c, int x) {
    (void)c;
    return x;
}
Status comm_agree(const Comm *c, const char *what, uint64_t value) {
    (void)c, (void)what, (void)value;
    return OK;
}
void comm_join_gpus(Comm *c, Device *device) {
    (void)c, (void)device;
}
static void reduce_scatter(const Comm *c, Tensor x, const int64_t *bounds) {
    (void)c, (void)x, (void)bounds;
}
static void all_gather(const Comm *c, Tensor t, const int64_t *bounds) {
    (void)c, (void)t, (void)bounds;
}
static void all_to_all(const Comm *c, Tensor to, const int64_t *gets, Tensor from,
                       const int64_t *sends, size_t row) {
    (void)c, (void)to, (void)gets, (void)from, (void)sends, (void)row;
}
void comm_fetch(const Comm *c, int root, void *to, const void *from, size_t count) {
    (void)c, (void)root;
    memcpy(to, from, count);
}

#endif

double comm_sum(const Comm *c, double x) {
    comm_sum_doubles(c, &x, 1);
    return x;
}

/* The tensor, or where it cannot be exchanged where it is a copy in the host's memory. */
static Tensor exchangeable(const Comm *c, Tensor t, bool read) {
    if (t.device->kind == DEVICE_CPU || c->gpus) return t;
    Tensor host = t;
    host.device = device_cpu();
    host.data = must_malloc(tensor_bytes(t));
    if (read) tensor_read(host.data, t);
    return host;
}

static void exchanged(Tensor t, Tensor host, bool written) {
    if (host.data == t.data) return;
    if (written) tensor_write(t, host.data);
    free(host.data);
}

void comm_reduce_scatter(const Comm *c, Tensor t, const int64_t *bounds) {
    if (comm_is_alone(c)) return;
    CHECK(t.dtype == F32, "ranks sum %s", tensor_text(t));
    Tensor x = exchangeable(c, t, true);
    reduce_scatter(c, x, bounds);
    exchanged(t, x, true);
}

void comm_all_gather(const Comm *c, Tensor t, const int64_t *bounds) {
    if (comm_is_alone(c)) return;
    Tensor x = exchangeable(c, t, true);
    all_gather(c, x, bounds);
    exchanged(t, x, true);
}

void comm_all_to_all(const Comm *c, Tensor to, const int64_t *gets, Tensor from,
                     const int64_t *sends) {
    int64_t get = 0, send = 0;
    if (!to.data) return; /* only measured */
    for (int r = 0; r < c->size; r++) get += gets[r], send += sends[r];
    to = tensor_slice(to, 0, get);
    from = tensor_slice(from, 0, send);
    if (comm_is_alone(c)) {
        tensor_copy(to, from);
        return;
    }
    Tensor x = exchangeable(c, from, true), y = exchangeable(c, to, false);
    all_to_all(c, y, gets, x, sends, tensor_bytes(tensor_slice(to, 0, 1)));
    exchanged(from, x, false);
    exchanged(to, y, true);
}

/* Equal parts of `count`. */
static int64_t *equal_parts(const Comm *c, int64_t count) {
    int64_t *bounds = must_malloc((size_t)(c->size + 1) * sizeof *bounds);
    for (int r = 0; r <= c->size; r++) bounds[r] = count * r / c->size;
    return bounds;
}

static void sum_everywhere(const Comm *c, Tensor t) {
    int64_t *bounds = equal_parts(c, tensor_count(t));
    reduce_scatter(c, t, bounds);
    all_gather(c, t, bounds);
    free(bounds);
}

void comm_sum_floats(const Comm *c, float *x, int64_t count) {
    if (!comm_is_alone(c)) sum_everywhere(c, TENSOR(x, F32, count));
}

void comm_all_reduce(const Comm *c, Tensor t) {
    if (comm_is_alone(c)) return;
    CHECK(t.dtype == F32, "ranks sum %s", tensor_text(t));
    Tensor x = exchangeable(c, t, true);
    sum_everywhere(c, RESHAPE(x, tensor_count(x)));
    exchanged(t, x, true);
}

Status comm_open_device(const Comm *c, Device **device, const char *name) {
    char own[32];
    snprintf(own, sizeof own, "cuda:%d", c->local);
    if (comm_is_many(c) && !strcmp(name, "cuda")) return device_open(device, own);
    TRY(device_open(device, name));
    if (comm_is_many(c) && !strcmp(name, "auto") && (*device)->kind == DEVICE_CUDA)
        return device_open(device, own);
    return OK;
}

/* ---- beside ---- */

#define JOBS 8 /* begun and not done, at most */

typedef struct Job {
    CommWork *work;
    void *context;
    int number;
} Job;

struct CommBeside {
    Device *gpu; /* whose work it is; NULL: a thread's */
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    Job jobs[JOBS];
    int64_t begun, done;
    bool stop;
};

static void *work_beside(void *context) {
    CommBeside *b = context;
    omp_set_num_threads(1);
    pthread_mutex_lock(&b->mutex);
    for (;;) {
        while (b->done == b->begun && !b->stop) pthread_cond_wait(&b->changed, &b->mutex);
        if (b->done == b->begun) break;
        Job job = b->jobs[b->done % JOBS];
        pthread_mutex_unlock(&b->mutex);
        job.work(job.context, job.number);
        pthread_mutex_lock(&b->mutex);
        b->done++;
        pthread_cond_broadcast(&b->changed);
    }
    pthread_mutex_unlock(&b->mutex);
    return NULL;
}

CommBeside *comm_beside_open(Device *device) {
    CommBeside *b = must_calloc(1, sizeof *b);
    if (device->kind == DEVICE_CUDA) {
        b->gpu = device;
        return b;
    }
    pthread_mutex_init(&b->mutex, NULL);
    pthread_cond_init(&b->changed, NULL);
    CHECK(!pthread_create(&b->thread, NULL, work_beside, b), "no thread for what goes beside");
    return b;
}

void comm_beside_close(CommBeside *b) {
    if (b && !b->gpu) {
        pthread_mutex_lock(&b->mutex);
        b->stop = true;
        pthread_cond_broadcast(&b->changed);
        pthread_mutex_unlock(&b->mutex);
        pthread_join(b->thread, NULL);
    }
    free(b);
}

void comm_beside_begin(CommBeside *b, CommWork *work, void *context, int number) {
    if (!b || b->gpu) {
        if (b) device_enter_beside(b->gpu);
        work(context, number);
        if (b) device_leave_beside(b->gpu);
        return;
    }
    pthread_mutex_lock(&b->mutex);
    while (b->begun - b->done == JOBS) pthread_cond_wait(&b->changed, &b->mutex);
    b->jobs[b->begun++ % JOBS] = (Job){work, context, number};
    pthread_cond_broadcast(&b->changed);
    pthread_mutex_unlock(&b->mutex);
}

void comm_beside_wait(CommBeside *b) {
    if (!b) return;
    if (b->gpu) {
        device_join_beside(b->gpu);
        return;
    }
    pthread_mutex_lock(&b->mutex);
    while (b->done < b->begun) pthread_cond_wait(&b->changed, &b->mutex);
    pthread_mutex_unlock(&b->mutex);
}
