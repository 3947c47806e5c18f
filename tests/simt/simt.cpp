/* simt.cpp - threads of a block as stacks of their own, and a device made of host memory.
 *
 * LAPIDARY_SIMT_FAIL makes calls fail as real ones do: driver, none, old, memory, register, image,
 * or lost, after LAPIDARY_SIMT_CALLS calls that work did. */
#include "simt.h"

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <list>
#include <map>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include <vector>

/* ---- who knows of whose work ---- */

/* In a build for ThreadSanitizer (SIMT_RACES) this file is not instrumented, the kernels are: what
 * orders their threads is said here and nowhere else. */
#ifdef SIMT_RACES
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreWritesBegin(const char *file, int line);
void AnnotateIgnoreReadsBegin(const char *file, int line);
void AnnotateIgnoreReadsEnd(const char *file, int line);
void AnnotateIgnoreWritesEnd(const char *file, int line);
void __tsan_read_range(const void *p, size_t size);
void __tsan_java_init(size_t heap, size_t size);
void __tsan_java_alloc(size_t at, size_t size);
extern char __start_simt_shared[], __stop_simt_shared[]; /* the kernels' static variables */
}
typedef void *Fiber;
static Fiber this_fiber() {
    return __tsan_get_current_fiber();
}
static Fiber new_fiber() {
    return __tsan_create_fiber(0);
}
static void switch_to(Fiber fiber) {
    __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync);
}
static void leave_known(void *place) {
    __tsan_release(place);
}
static void take_known(void *place) {
    __tsan_acquire(place);
}
/* Nobody has touched static shared memory. */
static void forget_shared() {
    size_t start = (size_t)__start_simt_shared & ~(size_t)7,
           size = ((size_t)__stop_simt_shared - start) & ~(size_t)7;
    static bool begun;
    if (!begun) __tsan_java_init(start, size);
    begun = true;
    __tsan_java_alloc(start, size);
}
static void count_read(const void *p, size_t size) {
    __tsan_read_range(p, size);
}
/* memcpy would count as the thread's own access. */
static void copy_unseen(unsigned char *to, const void *from, size_t size) {
    for (size_t i = 0; i < size; i++)
        ((volatile unsigned char *)to)[i] = ((const unsigned char *)from)[i];
}
SimtUnseen::SimtUnseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}
SimtUnseen::~SimtUnseen() {
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
}
#else
SimtUnseen::SimtUnseen() {}
SimtUnseen::~SimtUnseen() {}
typedef char Fiber;
static Fiber this_fiber() {
    return 0;
}
static Fiber new_fiber() {
    return 0;
}
static void switch_to(Fiber) {}
static void leave_known(void *) {}
static void take_known(void *) {}
static void forget_shared() {}
static void count_read(const void *, size_t) {}
static void copy_unseen(unsigned char *to, const void *from, size_t size) {
    memcpy(to, from, size);
}
#endif

/* ---- threads ---- */

static const size_t STACK = 256 * 1024, THREADS = 1024, CLUSTER = 2, WARPGROUP = 128;

/* Blocks in different slots know nothing of each other. What one has done is known to the next in
 * the same slot; so kernels begin with one or the other by turns, and go on in an order in which
 * blocks at any distance are in different ones somewhere. */
#ifdef SIMT_RACES
static const size_t SLOTS = 2;
#else
static const size_t SLOTS = 1;
#endif

enum State { READY, PAUSED, AT_WARP, AT_WARPGROUP, AT_WARPGROUPS, AT_BLOCK, AT_CLUSTER, DONE };

typedef std::vector<std::function<void()>> Group;

struct Lane {
    SimtThread view;
    State state;
    bool entered, waited; /* for the last kernel */
    unsigned turn;        /* of its warp's exchanges */
    jmp_buf here;
    char *stack;
    Fiber fiber;
    std::list<Group> asked[SIMT_KINDS]; /* the last group is not closed */
};

/* Where threads wait for each other. One may be there again while another still leaves: what they
 * know lies in two places in turn. */
struct Meeting {
    unsigned arrived, turn;
    char known[SLOTS][2];
};

/* What lanes give lies in two sets: a lane may be one exchange ahead of another that still reads.
 */
struct Warp {
    unsigned char given[2][32 * 64];
    char known[SLOTS][2];
    unsigned arrived;
    size_t size;
};

static Lane lanes[THREADS];
static Warp warps[THREADS / 32];
static char *stacks;
static jmp_buf scheduler;
static Fiber scheduler_fiber;
/* Threads of a block, and of the cluster of blocks that run at once. */
static unsigned running, count, total, finished;
static unsigned slot;          /* of the blocks that run */
static bool stirred;           /* whether any thread has come further */
static int any_of[CLUSTER][2]; /* what the threads of a block said at its barrier */
static Meeting at_block[CLUSTER], at_warpgroup[THREADS / WARPGROUP], at_warpgroups[CLUSTER],
    at_cluster;
static Fiber fibers[SLOTS * THREADS];
/* Who counts for a block, its copy engine, and who reads shared memory for engine and tensor cores
 * where fences are watched. */
static Fiber counting[SLOTS], copying[SLOTS], reading[SLOTS];
static bool is_early; /* whether this kernel may begin before the last has ended */
/* What is known to kernels, to those that have not waited for the last, and left behind; what a
 * block's threads had written before a fence, and what its counting has found of others'; what was
 * shown to engine and tensor cores, and read by them. */
static char begun, settled, ended[SLOTS], fenced[SLOTS], found[SLOTS], shown[SLOTS], read_by[SLOTS];
/* Copies it has been asked for and has not done. Of late blocks every other has an early engine,
 * which finds memory that was given back while late products still read it. */
static std::list<std::function<void()>> engine;
static bool engine_is_late;
static const std::function<void()> *current_body;
static const char *current_name = "no kernel";
SimtThread *simt_thread;
bool simt_is_late;

[[noreturn]] static void broken(const char *what) {
    fprintf(stderr, "simt: %s (block %u,%u,%u): %s\n", current_name, simt_thread->block.x,
            simt_thread->block.y, simt_thread->block.z, what);
    abort();
}

static void leave(State state) {
    Lane &me = lanes[running];
    me.state = state;
    if (_setjmp(me.here)) return;
    switch_to(scheduler_fiber);
    _longjmp(scheduler, 1);
}

static unsigned lanes_of(unsigned warp) {
    return total - warp * 32 < 32 ? total - warp * 32 : 32;
}

const unsigned char *simt_exchange(const void *mine, size_t size) {
    Lane &me = lanes[running];
    Warp &w = warps[running / 32];
    unsigned char *set = w.given[me.turn & 1];
    copy_unseen(set + 64 * (running % 32), mine, size);
    if (w.arrived && w.size != size) broken("lanes of a warp at different operations");
    w.size = size;
    me.turn++;
    if (++w.arrived == lanes_of(running / 32)) {
        w.arrived = 0;
        for (unsigned i = running / 32 * 32; i < running / 32 * 32 + lanes_of(running / 32); i++)
            if (lanes[i].state == AT_WARP) lanes[i].state = READY;
        return set;
    }
    leave(AT_WARP);
    return set;
}

void simt_warp_sync() {
    char *known = &warps[running / 32].known[slot][lanes[running].turn & 1], nothing = 0;
    leave_known(known);
    simt_exchange(&nothing, 1);
    take_known(known);
}

/* The thread waits; or, as the last of `all` from lane `first` on, lets them go on. */
static void meet(State state, Meeting &meeting, unsigned first, unsigned all) {
    char *known = &meeting.known[slot][meeting.turn & 1];
    leave_known(known);
    if (++meeting.arrived < all) {
        leave(state);
    } else {
        meeting.arrived = 0;
        meeting.turn++;
        for (unsigned i = first; i < first + all; i++)
            if (lanes[i].state == state) lanes[i].state = READY;
    }
    take_known(known);
}

void __syncthreads() {
    unsigned block = running / count;
    meet(AT_BLOCK, at_block[block], block * count, count);
}

int __syncthreads_or(int value) {
    unsigned block = running / count;
    int *any = &any_of[block][at_block[block].turn & 1];
    if (!at_block[block].arrived) *any = 0;
    *any |= value;
    __syncthreads();
    return *any;
}

void simt_warpgroup_sync() {
    unsigned group = running / WARPGROUP;
    meet(AT_WARPGROUP, at_warpgroup[group], group * WARPGROUP, WARPGROUP);
}

void simt_warpgroups_sync(unsigned many) {
    unsigned block = running / count, all = many * WARPGROUP;
    meet(AT_WARPGROUPS, at_warpgroups[block], (block + 1) * count - all, all);
}

void simt_cluster_sync() {
    meet(AT_CLUSTER, at_cluster, 0, total);
}

unsigned __ballot_sync(unsigned, int value) {
    char mine = value != 0;
    const unsigned char *all = simt_exchange(&mine, 1);
    unsigned out = 0;
    for (unsigned i = 0; i < lanes_of(running / 32); i++) out |= (unsigned)(all[64 * i] & 1) << i;
    return out;
}

void simt_wait_for_last() {
    lanes[running].waited = true;
    take_known(&begun);
}

void __threadfence() {
    leave_known(&fenced[slot]);
    take_known(&found[slot]);
}

int atomicAdd(int *p, int value) {
    switch_to(counting[slot]);
    take_known(&fenced[slot]);
    leave_known(p);
    take_known(p);
    leave_known(&found[slot]);
    switch_to(lanes[running].fiber);
    int before = *p;
    *p += value;
    return before;
}

static bool watches_fences() {
    static const bool does = SLOTS > 1 && getenv("LAPIDARY_SIMT_FENCES");
    return does;
}

/* What is known here is known to who reads for engine and tensor cores. */
static void show(void *known) {
    if (!watches_fences()) return;
    switch_to(reading[slot]);
    take_known(known);
    switch_to(lanes[running].fiber);
}

void simt_async_fence() {
    leave_known(&shown[slot]);
    show(&shown[slot]);
}

void simt_async_read(const void *p, size_t size) {
    if (!watches_fences()) return;
    switch_to(reading[slot]);
    take_known(&ended[slot]);
    count_read(p, size);
    leave_known(&read_by[slot]);
    switch_to(lanes[running].fiber);
}

/* ---- what is asked for and waited for ---- */

void simt_later(SimtAsked kind, std::function<void()> work) {
    std::list<Group> &groups = lanes[running].asked[kind];
    if (groups.empty()) groups.emplace_back();
    groups.back().push_back(work);
}

void simt_close_group(SimtAsked kind) {
    if (!simt_is_late) return;
    std::list<Group> &groups = lanes[running].asked[kind];
    if (groups.empty()) groups.emplace_back();
    groups.emplace_back();
}

void simt_wait(SimtAsked kind, size_t left) {
    std::list<Group> &groups = lanes[running].asked[kind];
    while (simt_is_late && groups.size() > left + 1) {
        for (auto &work : groups.front()) work();
        groups.pop_front();
    }
    if (kind != SIMT_COPIES && watches_fences()) take_known(&read_by[slot]);
}

void simt_count(SimtBarrier *b, int threads, int bytes) {
    leave_known(b);
    b->missing = (uint16_t)(b->missing - threads);
    b->bytes += bytes;
    if (b->missing || b->bytes) return;
    b->missing = b->threads;
    b->phase ^= 1;
}

void simt_wait_phase(SimtBarrier *b, unsigned parity) {
    while (b->phase == parity) leave(PAUSED);
    stirred = true;
    take_known(b);
    show(b);
}

void simt_engine(std::function<void()> work) {
    if (!engine_is_late) {
        work();
        return;
    }
    SimtThread *asks = simt_thread;
    engine.push_back([=] {
        simt_thread = asks;
        work();
    });
    leave_known(&copying[slot]);
}

/* ---- blocks ---- */

static void enter() {
    take_known(is_early ? &settled : &begun);
    take_known(&ended[slot]);
    (*current_body)();
    if (is_early && !lanes[running].waited) broken("it has not waited for the last kernel");
    for (int kind = 0; kind < SIMT_KINDS; kind++) {
        std::list<Group> &groups = lanes[running].asked[kind];
        for (auto &group : groups) /* copies nobody waits for any more end too */
            if (kind != SIMT_COPIES && !group.empty())
                broken("a thread ended before what it asked for was done");
        groups.clear();
    }
    leave_known(&ended[slot]);
    lanes[running].state = DONE;
    finished++;
    switch_to(scheduler_fiber);
    _longjmp(scheduler, 1);
}

static void resume(unsigned i) {
    Lane &lane = lanes[i];
    running = i;
    simt_thread = &lane.view;
    if (_setjmp(scheduler)) return;
    switch_to(lane.fiber);
    if (lane.entered) _longjmp(lane.here, 1);
    lane.entered = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = lane.stack;
    context.uc_stack.ss_size = STACK;
    context.uc_link = NULL;
    makecontext(&context, enter, 0);
    setcontext(&context);
}

/* The copy engine does what it was asked for last of all that is to do. */
static void run_engine() {
    if (engine.empty()) broken("threads wait for others that ended, or for what never comes");
    switch_to(copying[slot]);
    take_known(&copying[slot]);
    engine.front()();
    engine.pop_front();
    switch_to(scheduler_fiber);
}

/* The blocks of one cluster. */
static void run_blocks(dim3 block, size_t first) {
    finished = 0;
    for (Meeting &m : at_block) m.arrived = 0;
    for (Meeting &m : at_warpgroup) m.arrived = 0;
    for (Meeting &m : at_warpgroups) m.arrived = 0;
    at_cluster.arrived = 0;
    for (unsigned i = 0; i < (total + 31) / 32; i++) warps[i].arrived = 0;
    for (unsigned i = 0; i < total; i++) {
        Lane &lane = lanes[i];
        unsigned k = i % count;
        lane.view.thread = dim3(k % block.x, k / block.x % block.y, k / block.x / block.y);
        lane.state = READY;
        lane.entered = lane.waited = false;
        lane.turn = 0;
        if (!fibers[first + i]) fibers[first + i] = new_fiber();
        lane.fiber = fibers[first + i];
        lane.stack = stacks + (first + i) * STACK;
    }
    if (!counting[slot]) counting[slot] = new_fiber();
    if (!copying[slot]) copying[slot] = new_fiber();
    if (!reading[slot]) reading[slot] = new_fiber();
    while (finished < total) {
        stirred = false;
        for (unsigned k = 0; k < total; k++) {
            unsigned i = simt_is_late ? total - 1 - k : k;
            if (lanes[i].state == READY)
                stirred = true;
            else if (lanes[i].state != PAUSED)
                continue;
            resume(i);
        }
        if (!stirred) run_engine();
    }
    if (!engine.empty()) broken("a block ended before what it asked for was done");
    for (unsigned i = 0; i < (total + 31) / 32; i++)
        if (warps[i].arrived) broken("a thread ended while its warp waits for it");
    for (Meeting &m : at_block)
        if (m.arrived) broken("a thread ended while its block waits for it");
    for (Meeting &m : at_warpgroup)
        if (m.arrived) broken("a thread ended while its warpgroup waits for it");
    for (Meeting &m : at_warpgroups)
        if (m.arrived) broken("a thread ended while warpgroups of its block wait for it");
    if (at_cluster.arrived) broken("a thread ended while its cluster waits for it");
}

/* ---- memory ---- */

static const size_t PAGE = 4096;
static std::map<char *, size_t> allocations;
static size_t taken;
static int open_depth;
static cudaError_t last_error;

static bool fails(const char *what) {
    const char *name = getenv("LAPIDARY_SIMT_FAIL");
    return name && !strcmp(name, what);
}

/* With LAPIDARY_SIMT_LAUNCHES=FILE kernels do not run: on a device of an H200's size what they
 * would be launched with is checked, and FILE gets a line "NAME THREADS SHARED GRID" for each kind
 * of launch. Released shapes go through this way. */
static const char *launches_path() {
    static const char *const path = getenv("LAPIDARY_SIMT_LAUNCHES");
    return path;
}

static size_t device_bytes() {
    return launches_path() ? (size_t)141 << 30 : (size_t)8 << 30;
}

struct Launches {
    struct Kind {
        std::string name;
        unsigned threads;
        size_t shared;
        bool operator<(const Kind &o) const {
            return std::tie(name, threads, shared) < std::tie(o.name, o.threads, o.shared);
        }
    };
    std::map<Kind, size_t> most, times; /* blocks; launches */
    ~Launches() {
        if (!launches_path()) return;
        FILE *file = fopen(launches_path(), "a");
        for (auto &l : most)
            fprintf(file, "%s %u %zu %zu %zu\n", l.first.name.c_str(), l.first.threads,
                    l.first.shared, l.second, times[l.first]);
        fclose(file);
    }
};
static Launches launches;

/* Memory of the device can be reached inside kernels and copies alone. */
static void reach(bool open) {
    if (open ? open_depth++ : --open_depth) return;
    for (auto &a : allocations)
        mprotect(a.first, a.second, open ? PROT_READ | PROT_WRITE : PROT_NONE);
}

static size_t whole_pages(size_t bytes) {
    return (bytes + PAGE - 1) / PAGE * PAGE;
}

cudaError_t cudaMalloc(void **p, size_t bytes) {
    size_t size = whole_pages(bytes);
    if (fails("memory") || taken + size > device_bytes())
        return last_error = cudaErrorMemoryAllocation;
    void *memory = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return last_error = cudaErrorMemoryAllocation;
    allocations[(char *)memory] = size;
    taken += size;
    *p = memory;
    return cudaSuccess;
}

cudaError_t cudaFree(void *p) {
    auto a = allocations.find((char *)p);
    if (!p) return cudaSuccess;
    if (a == allocations.end()) return last_error = cudaErrorInvalidValue;
    munmap(p, a->second);
    taken -= a->second;
    allocations.erase(a);
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *total = device_bytes();
    *available = device_bytes() - taken;
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned) {
    *p = malloc(bytes);
    return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFreeHost(void *p) {
    free(p);
    return cudaSuccess;
}

cudaError_t cudaHostRegister(void *, size_t, unsigned) {
    return fails("register") ? last_error = cudaErrorNotSupported : cudaSuccess;
}
cudaError_t cudaHostUnregister(void *) {
    return cudaSuccess;
}
cudaError_t cudaHostGetDevicePointer(void **device, void *host, unsigned) {
    *device = host;
    return cudaSuccess;
}

/* ---- launches, and graphs of them ---- */

struct SimtGraph {
    std::vector<std::function<void()>> calls;
};
static SimtGraph *recorded;

static bool is_lost() {
    static long calls;
    const char *most = getenv("LAPIDARY_SIMT_CALLS");
    return fails("lost") && ++calls > (most ? atol(most) : 0);
}

static cudaError_t call(std::function<void()> work) {
    if (is_lost()) return last_error = cudaErrorLaunchFailure;
    if (recorded)
        recorded->calls.push_back(work);
    else
        work();
    return cudaSuccess;
}

static void run_grid(const char *name, dim3 grid, dim3 block, size_t shared, unsigned cluster,
                     bool early, const std::function<void()> &body) {
    count = block.x * block.y * block.z;
    total = count * cluster;
    if (!count || total > THREADS || cluster > CLUSTER || grid.x % cluster ||
        (cluster > 1 && count % 32) || shared > 227 * 1024 || !grid.x || grid.x > 0x7fffffff ||
        !grid.y || grid.y > 65535 || !grid.z || grid.z > 65535) {
        fprintf(stderr, "simt: %s: %u threads, %zu bytes of shared memory, grid %u,%u,%u\n", name,
                count, shared, grid.x, grid.y, grid.z);
        abort();
    }
    if (launches_path()) {
        launches.times[{name, count, shared}]++;
        size_t &most = launches.most[{name, count, shared}],
               blocks = (size_t)grid.x * grid.y * grid.z;
        if (blocks > most) most = blocks;
        return;
    }
    size_t each = (shared + 1023) / 1024 * 1024;
    SimtUnseen unseen;
    std::vector<unsigned char> dynamic[SLOTS];
    if (!stacks) {
        stacks = (char *)mmap(NULL, SLOTS * THREADS * STACK, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stacks == MAP_FAILED) abort();
    }
    const char *order = getenv("LAPIDARY_SIMT_ORDER");
    simt_is_late = order && !strcmp(order, "reversed");
    scheduler_fiber = this_fiber();
    current_name = name;
    current_body = &body;
    is_early = early;
    static unsigned launched;
    launched++;
    if (!early) leave_known(&settled);
    leave_known(&begun);
    reach(true);
    unsigned blocks = grid.x * grid.y * grid.z;
    for (unsigned turn = 0; turn < blocks; turn += cluster) {
        unsigned i = simt_is_late ? blocks - cluster - turn : turn;
        engine_is_late = simt_is_late && turn / cluster % 2 == 0;
        slot = (unsigned)(__builtin_popcount(turn / cluster) + launched) % SLOTS;
        dynamic[slot].assign(each * cluster + 1024, 0xff);
        forget_shared();
        unsigned char *aligned = dynamic[slot].data() + (-(uintptr_t)dynamic[slot].data() & 1023);
        for (unsigned k = 0; k < total; k++) {
            unsigned rank = k / count, b = i + rank;
            lanes[k].view = {dim3(),
                             dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y),
                             block,
                             grid,
                             aligned + rank * each,
                             rank,
                             each};
        }
        run_blocks(block, slot * THREADS);
    }
    for (char &slots_ended : ended) take_known(&slots_ended);
    reach(false);
}

void simt_launch(const char *name, dim3 grid, dim3 block, size_t shared, unsigned cluster,
                 bool early, std::function<void()> body) {
    if (fails("image")) {
        last_error = cudaErrorNoKernelImageForDevice;
        return;
    }
    call([=] { run_grid(name, grid, block, shared, cluster, early, body); });
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t) {
    if (launches_path()) {
        if (kind == cudaMemcpyDeviceToHost) memset(to, 0, bytes);
        return cudaSuccess;
    }
    return call([=] {
        reach(true);
        memmove(to, from, bytes);
        reach(false);
        leave_known(&settled);
    });
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t) {
    if (launches_path()) return cudaSuccess;
    return call([=] {
        reach(true);
        memset(to, value, bytes);
        reach(false);
        leave_known(&settled);
    });
}

void simt_host_call(std::function<void()> work) {
    if (launches_path()) return;
    call([=] {
        leave_known(&settled);
        reach(true);
        work();
        reach(false);
    });
}

cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
    recorded = new SimtGraph;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *graph) {
    *graph = recorded;
    recorded = NULL;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long) {
    *exec = new SimtGraph(*graph);
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
    for (auto &work : exec->calls) work();
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    delete exec;
    return cudaSuccess;
}

/* ---- the device ---- */

cudaError_t cudaGetDeviceCount(int *found) {
    *found = 0;
    if (fails("driver")) return last_error = cudaErrorInsufficientDriver;
    if (fails("none")) return last_error = cudaErrorNoDevice;
    *found = 1;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    return device == 0 ? cudaSuccess : last_error = cudaErrorInvalidDevice;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
    *p = cudaDeviceProp();
    strcpy(p->name, "SIMT emulator");
    p->totalGlobalMem = device_bytes();
    p->sharedMemPerBlockOptin = 227 * 1024;
    p->major = fails("old") ? 7 : 9;
    p->multiProcessorCount = launches_path() ? 132 : 4;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr, int) {
    *value = 1;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) {
    *version = fails("driver") ? 11040 : 13000;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = 13000;
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) {
    *stream = NULL;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
    return is_lost() ? cudaErrorLaunchFailure : cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
    *event = NULL;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) {
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) {
    return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) {
    return cudaSuccess;
}
cudaError_t cudaGetLastError() {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess:
        return "no error";
    case cudaErrorMemoryAllocation:
        return "out of memory";
    case cudaErrorInsufficientDriver:
        return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoDevice:
        return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice:
        return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice:
        return "no kernel image is available for execution on the device";
    case cudaErrorLaunchFailure:
        return "unspecified launch failure";
    default:
        return "another error";
    }
}
