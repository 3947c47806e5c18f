/* session.h - everything a run needs, opened in order: checkpoint, data, model, memory. */
#ifndef SESSION_H
#define SESSION_H

#include "configs/run_config.h"
#include "data/loader.h"
#include "formats/adapter.h"
#include "formats/checkpoint.h"
#include "kernels/comm.h"
#include "optim/optimizer.h"

/* What the run will take, byte for byte, before any of it is taken. */
typedef struct MemoryPlan {
    size_t experts;     /* of the weights */
    double expert_bits; /* a weight of them */
    size_t weights, mapped, masters, gradients, optimizer, activations, scratch, total;
    size_t towers; /* what they make of media, kept where nothing trains them */
    size_t available;
    StackMode mode;
    size_t host;  /* of the host's memory, with STACK_OFFLOAD */
    int64_t rows; /* of the largest micro-batch */
} MemoryPlan;

typedef struct Session {
    RunConfig config;
    Comm comm;
    Comm context; /* the ranks with which this one shares the rows of micro-batches */
    RankGroups ranks, beside_ranks; /* the latter for Space.beside */
    CommBeside *beside;
    int data_rank, data_ranks; /* which of the groups of such ranks it is in, and how many there
                                * are: they take micro-batches turn by turn */
    Checkpoint checkpoint;
    Tokenizer *tokenizer;
    RowReader reader;
    Store store;
    AdapterSpec spec;
    Gemma g;
    MemoryPlan plan;
    StackMode least_mode; /* that some rank needs */
    StepOptions options;
    MediaItem largest[2];
    StepMemory memory;
    Optimizer optimizer;
    Loader *loader;
} Session;

/* Opens checkpoint, tokenizer and dataset, declares the model and makes the memory plan; takes no
 * memory for weights yet. Tokenises JSONL into `store_path` unless a fresh store is already there:
 * of several ranks the first does, and the others wait. `comm`: NULL for one process alone. */
Status session_open(Session *s, RunConfig *config, const Comm *comm, const char *store_path,
                    StoreProgress *progress);

/* Fills s->plan for a rank that has so many bytes, with activations kept, recomputed, or waiting
 * elsewhere, as the run file says or as they fit. For s->comm.size ranks at s->config.shard. */
Status session_plan(Session *s, size_t available);

/* The same for so many ranks of which this is one, that are not there: for plans. */
Status session_suppose(Session *s, int ranks, size_t available);

/* Takes the memory, loads the weights, starts the optimizer. ERR_IO when the plan does not fit. */
Status session_place(Session *s);

void session_close(Session *s);

/* Whether the ranks' GPUs exchange data directly. */
bool session_links_gpus(const Session *s);

/* The plan as a table on standard error. */
void memory_plan_print(const MemoryPlan *plan);

#endif
