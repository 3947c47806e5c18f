/* routing.c - the contracts of routing.h, and the sort itself (a few thousand integers, on the
 * host). */
#include "kernels/routing.h"

#include <string.h>

void router_forward(Tensor probs, Tensor share, Tensor experts, Tensor logits) {
    CHECK(tensor_count(probs) == tensor_count(logits) &&
              tensor_count(share) == tensor_count(experts) &&
              tensor_rows(share) == tensor_rows(logits) &&
              tensor_cols(share) <= tensor_cols(logits) && tensor_cols(logits) <= 1024 &&
              tensor_cols(share) <= 64,
          "router: %s from %s", tensor_text(share), tensor_text(logits));
    ON_DEVICE(logits, router_forward)(probs, share, experts, logits);
}

void router_backward(Tensor dlogits, Tensor dshare, Tensor probs, Tensor share, Tensor experts,
                     Tensor balance) {
    CHECK(tensor_count(dlogits) == tensor_count(probs) &&
              tensor_count(dshare) == tensor_count(share),
          "router: %s for %s", tensor_text(dlogits), tensor_text(probs));
    ON_DEVICE(probs, router_backward)(dlogits, dshare, probs, share, experts, balance);
}

void combine_forward(Tensor y, Tensor rows, Tensor slot, Tensor share, Tensor experts,
                     Tensor scale) {
    CHECK(tensor_cols(y) == tensor_cols(rows) && y.dtype == rows.dtype &&
              tensor_rows(y) == tensor_rows(slot),
          "combine: %s from %s", tensor_text(y), tensor_text(rows));
    ON_DEVICE(y, combine_forward)(y, rows, slot, share, experts, scale);
}

void combine_backward(Tensor drows, Tensor dshare, Tensor dscale, Tensor dy, Tensor rows,
                      Tensor slot, Tensor share, Tensor experts, Tensor scale) {
    CHECK(tensor_cols(dy) == tensor_cols(rows) && tensor_count(drows) == tensor_count(rows),
          "combine: %s from %s", tensor_text(dy), tensor_text(rows));
    ON_DEVICE(dy, combine_backward)(drows, dshare, dscale, dy, rows, slot, share, experts, scale);
}

void routing_sort(Tensor offsets, Tensor counts, Tensor slot, Tensor source, Tensor experts) {
    int64_t E = tensor_count(counts), A = tensor_cols(experts), N = tensor_rows(experts);
    if (experts.device->kind == DEVICE_MEASURE) return;
    int32_t *offset = offsets.data, *count = counts.data, *place = slot.data, *from = source.data;
    const int32_t *expert = experts.data;
    memset(count, 0, (size_t)E * sizeof *count);
    for (int64_t i = 0; i < N * A; i++) count[expert[i]]++;
    offset[0] = 0;
    for (int64_t e = 0; e < E; e++)
        offset[e + 1] = offset[e] + (count[e] + ROUTING_ALIGN - 1) / ROUTING_ALIGN * ROUTING_ALIGN;
    CHECK(offset[E] <= tensor_count(source), "routing: %d rows in a space of %s", offset[E],
          tensor_text(source));
    for (int64_t m = 0; m < tensor_count(source); m++) from[m] = -1;
    int32_t next[1024];
    memcpy(next, offset, (size_t)E * sizeof *next);
    for (int64_t i = 0; i < N * A; i++) {
        int32_t m = next[expert[i]]++;
        place[i] = m;
        from[m] = (int32_t)(i / A);
    }
}
