/* forecast.h - how long a run's steps will take, from what its shapes ask for and how fast kernels
 * and links are: measured here and now, or known of a GPU. */
#ifndef FORECAST_H
#define FORECAST_H

#include "train/session.h"

typedef struct Speeds {
    const char *name;
    double memory_bytes;                 /* that a device has; 0: this machine's, and products of
                                          * packed weights were timed with their unpacking */
    double products, grouped, attention; /* operations a second */
    double moving;                       /* bytes a second of kernels that only move them */
    double near, far; /* bytes a second that a rank sends to ranks of its host, and to others */
    double summing;   /* the share of that speed that is left where sums are made of it */
    bool overlaps;    /* what layers exchange goes beside the passes */
} Speeds;

/* Those of a GPU; NULL: unknown. Operations of the H200 were measured (docs/gpu.md), others follow
 * from their makers' figures, as links do. */
const Speeds *speeds_of(const char *gpu);

/* Times the run's largest products, its attention, a gate, and what comm's ranks send, which all
 * call it at once. ERR_IO: no memory to time in. */
Status speeds_measure(Speeds *speeds, const Session *s, const Comm *comm);

typedef struct Forecast {
    double pass, update;       /* seconds: of one micro-batch, and of the optimizer */
    double near, far;          /* bytes that a rank sends in a step, within its host and beyond */
    double step, tokens_per_s; /* of all ranks, with full micro-batches */
} Forecast;

/* Of the run that s->plan is for, on hosts of so many ranks. */
Forecast forecast_run(Session *s, const Speeds *speeds, int host);

#endif
