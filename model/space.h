/* space.h - where the values, gradients and masters of parameters lie: alone, or shared out over
 * ranks.
 *
 * Everything that is trained forms one flat space, cut in runs: the values of one layer that lie
 * behind each other. Of every run each rank that has it owns an equal share, whose states (level
 * 1), gradients (2) and values (3) it alone keeps. At level 3 the frozen values of a layer are
 * shared out by bytes as well, and a layer's values are there from space_need on until two layers
 * later.
 *
 * What experts only some ranks have is shared among those that have the same ones. */
#ifndef SPACE_H
#define SPACE_H

#include "configs/model_config.h"
#include "kernels/arena.h"
#include "kernels/comm.h"

typedef struct Param Param;
typedef struct ParamList ParamList;

typedef struct ParamRun {
    int layer;            /* -1: in none */
    int first, last;      /* of params->items, what is frozen between them left out */
    DType dtype;          /* of its values */
    bool experts;         /* that not every rank has */
    int64_t begin, end;   /* in the flat space: whole blocks of 8-bit states */
    int64_t own, own_end; /* of them this rank's share */
    int64_t share;        /* where its shares of all runs, behind each other, have this one */
    int64_t place;        /* where Space.values has it, all of it or the share; -1: nowhere */
    int64_t room;  /* where its values lie: in Space.working, or in a gathered layer's bytes */
    int64_t grads; /* where its gradients begin in Space.grads */
    bool whole;    /* Space.values has all of it */
    bool gathered; /* its values are there only while their layer is (level 3) */
} ParamRun;

/* A layer's frozen values, shared out by bytes: of all ranks, and of experts. */
typedef struct FrozenShare {
    int64_t begin, bytes; /* in the layer's bytes */
    int64_t kept;         /* where Space.kept has this rank's share */
} FrozenShare;

/* Which ranks share out what among them. */
typedef struct RankGroups {
    Comm all;      /* nothing goes through it: its numbers */
    Comm sharers;  /* what all ranks have alike */
    Comm across;   /* those that have the same shares of it */
    Comm replicas; /* experts: those that have the same ones */
    Comm experts;  /* those that have all experts between them; one: each has all */
} RankGroups;

typedef struct Space {
    int level;               /* 0: every rank has everything */
    const RankGroups *ranks; /* NULL: one */
    bool overlaps;           /* layers are exchanged beside the passes, by `beside`, with groups of
                              * its own */
    CommBeside *beside;
    const RankGroups *beside_ranks;
    bool whole_trained; /* what is trained stays on every rank, but for states and gradients */
    bool one_layer;     /* there is room for the gradients of one layer, all take turns */
    bool no_masters;    /* trainable bf16 values are updated as they are */
    ParamRun *runs;
    int count;
    Tensor values;         /* f32: trained values, or masters of bf16 ones */
    Tensor working;        /* bf16: the values of those */
    Tensor grads;          /* f32 */
    Tensor layer_grads[2]; /* the parts of them that layers share, even ones and odd ones, which
                            * differ where they are exchanged beside; absent unless one_layer */
    Tensor kept;           /* U8: shares of frozen values */
    Tensor buffers[2];     /* U8: the gathered values of even layers, and of odd ones */
    int held[2];           /* which layer's they are; -1: none's */
    FrozenShare frozen[LAYERS_MAX][2];
    Arena working_arena, trained_arena; /* what has a place of its own; the rest of the above */
} Space;

/* Bytes that params_place will take. */
typedef struct ParamBytes {
    size_t values;    /* frozen and bf16 working values, and shares of them */
    size_t masters;   /* trainable f32 values and masters */
    size_t gradients; /* of everything trainable, or of what one layer at a time needs */
    int64_t trained;  /* trainable values, padded as their states are */
    int64_t own;      /* of them this rank's share */
} ParamBytes;
ParamBytes params_bytes(ParamList *params);

/* Takes memory for everything declared. With `gradients` false trainable parameters get no
 * gradient. */
Status params_place(ParamList *params, Device *device, bool gradients);

void space_free(Space *s);

/* The ranks that a run is shared out among, and its bounds: rank r's share is bounds[r] ..
 * bounds[r + 1], counted from its beginning. */
const Comm *run_sharers(const RankGroups *ranks, const ParamRun *run);
void run_bounds(const RankGroups *ranks, const ParamRun *run, int64_t *bounds);

/* Gradients of all of a run: each rank's share becomes the sum of all ranks'; with `whole`, all of
 * them. */
void run_sum(const RankGroups *ranks, const ParamRun *run, Tensor grads, bool whole);

/* Parts first .. end - 1 of a run, in places of the flat space: of its gradients, and of its values
 * or masters, which must be here. */
Tensor run_grads(const Space *s, const ParamRun *run, int64_t first, int64_t end);
Tensor run_values(const Space *s, const ParamRun *run, int64_t first, int64_t end);

/* master -> value of a trainable parameter whose working dtype is not f32; run after an update. */
void param_publish(Param *p);
void params_publish(ParamList *params);

/* After a parameter's value was read: what of it is kept elsewhere, its master or shares. */
void param_adopt(ParamList *params, Param *p);
void params_adopt(ParamList *params);

/* After every rank has updated its shares: each has all values again. */
void space_join(ParamList *params);

/* A layer's values are there from here on; those of `next` (-1: none) are wanted after it and come
 * meanwhile. All ranks call it alike. */
void space_need(Space *s, int layer, int next);

/* All of p's value on rank 0, of whichever ranks have parts of it, until param_release. All ranks
 * call it. */
Status param_fetch(ParamList *params, Param *p);
void param_release(Param *p);

#endif
