/* schedule.c - warm-up, then one of four shapes. */
#include "optim/schedule.h"

#include <math.h>

double schedule_rate(const RunConfig *c, int64_t i, int64_t steps) {
    double peak = c->optimizer.lr, low = c->schedule.min_lr, warmup = c->schedule.warmup;
    double warm = warmup < 1 ? ceil(warmup * (double)steps) : floor(warmup), at = (double)i,
           factor = 1;
    if (at < warm) return peak * at / warm;
    double progress = (at - warm) / fmax(1, (double)steps - warm);
    switch (c->schedule.name) {
    case SCHEDULE_CONSTANT:
        return peak;
    case SCHEDULE_LINEAR:
        factor = 1 - progress;
        break;
    case SCHEDULE_COSINE:
        factor = 0.5 * (1 + cos(M_PI * progress));
        break;
    case SCHEDULE_WSD: {
        double decay = ceil(0.1 * (double)steps), start = (double)steps - decay;
        factor = at < start ? 1 : 0.5 * (1 + cos(M_PI * (at - start) / fmax(1, decay)));
        break;
    }
    }
    return low + (peak - low) * fmax(0, factor);
}
