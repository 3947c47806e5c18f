/* routing.c - the contracts of routing.h. */
#include "kernels/routing.h"

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

void row_weights(Tensor weights, Tensor slot, Tensor source, Tensor share, Tensor experts,
                 Tensor scale) {
    CHECK(weights.dtype == F32 && tensor_count(weights) == tensor_count(source) &&
              tensor_count(slot) == tensor_count(share),
          "row weights: %s of %s", tensor_text(weights), tensor_text(share));
    ON_DEVICE(weights, row_weights)(weights, slot, source, share, experts, scale);
}

void row_weights_backward(Tensor dshare, Tensor dscale, Tensor dweights, Tensor slot, Tensor share,
                          Tensor experts, Tensor scale) {
    CHECK(dweights.dtype == F32 && tensor_count(dshare) == tensor_count(share) &&
              tensor_count(slot) == tensor_count(share),
          "row weights: %s from %s", tensor_text(dshare), tensor_text(dweights));
    ON_DEVICE(dweights, row_weights_backward)
    (dshare, dscale, dweights, slot, share, experts, scale);
}

void routing_sort(Tensor offsets, Tensor counts, Tensor slot, Tensor source, Tensor experts) {
    int64_t E = tensor_count(counts), A = tensor_cols(experts), N = tensor_rows(experts);
    CHECK(E <= 1024 && tensor_count(offsets) == E + 1 && tensor_count(slot) == N * A &&
              tensor_count(source) == routing_rows(N, A, E),
          "routing: %s into %s", tensor_text(experts), tensor_text(source));
    ON_DEVICE(experts, routing_sort)(offsets, counts, slot, source, experts);
}
