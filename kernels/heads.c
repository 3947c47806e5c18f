/* heads.c - the contract of heads.h. */
#include "kernels/heads.h"

void heads_forward(const HeadSet *sets, int count, Tensor cos, Tensor sin, float eps) {
    CHECK(count > 0 && count <= HEAD_SETS, "heads: %d sets", count);
    for (int i = 0; i < count; i++) {
        const HeadSet *s = &sets[i];
        int64_t C = sets->x.shape[2];
        CHECK(s->x.ndim == 3 && s->x.shape[0] == sets->x.shape[0] && s->x.shape[2] == C &&
                  s->x.dtype == sets->x.dtype && s->y.dtype == s->x.dtype,
              "heads: %s to %s", tensor_text(s->x), tensor_text(s->y));
        CHECK(s->y.ndim == 3 && s->y.shape[1] == s->x.shape[1] && s->y.shape[2] == C &&
                  (tensor_present(s->rows) ? tensor_count(s->rows) : s->y.shape[0]) ==
                      s->x.shape[0],
              "heads: y %s of %s", tensor_text(s->y), tensor_text(s->x));
        CHECK(!tensor_present(s->weight) || tensor_count(s->weight) == C, "heads: weight %s",
              tensor_text(s->weight));
        CHECK(!tensor_present(s->rstd) ||
                  (s->rstd.dtype == F32 && tensor_count(s->rstd) == s->x.shape[0] * s->x.shape[1]),
              "heads: rstd is not one a head");
        CHECK(!s->turns || (tensor_count(cos) == s->x.shape[0] * C / 2 && C % 2 == 0),
              "heads: tables are not (N, C/2)");
    }
    if (!tensor_count(sets->x)) return;
    ON_DEVICE(sets->x, heads_forward)(sets, count, cos, sin, eps);
}

void heads_backward(const HeadGradient *sets, int count, Tensor cos, Tensor sin) {
    CHECK(count > 0 && count <= HEAD_SETS, "heads: %d sets", count);
    for (int i = 0; i < count; i++) {
        const HeadGradient *s = &sets[i];
        int64_t C = sets->x.shape[2], elements = tensor_count(s->x);
        CHECK(s->x.ndim == 3 && s->x.shape[0] == sets->x.shape[0] && s->x.shape[2] == C &&
                  s->x.dtype == sets->x.dtype && s->dx.dtype == s->x.dtype &&
                  tensor_count(s->dx) == elements,
              "heads: gradient %s of %s", tensor_text(s->dx), tensor_text(s->x));
        CHECK(tensor_count(s->dy) == elements && (s->dy.dtype == F32 || s->dy.dtype == s->x.dtype),
              "heads: gradient from %s of %s", tensor_text(s->dy), tensor_text(s->x));
        CHECK(!tensor_present(s->also) ||
                  (tensor_count(s->also) == elements && s->also.dtype == F32),
              "heads: gradient from %s too, of %s", tensor_text(s->also), tensor_text(s->x));
        CHECK(!tensor_present(s->weight) || tensor_count(s->weight) == C, "heads: weight %s",
              tensor_text(s->weight));
        CHECK(s->rstd.dtype == F32 && tensor_count(s->rstd) == s->x.shape[0] * s->x.shape[1],
              "heads: rstd is not one a head");
        CHECK(C % 2 == 0 && (!s->turns || tensor_count(cos) == s->x.shape[0] * C / 2),
              "heads: tables are not (N, C/2)");
    }
    if (!tensor_count(sets->x)) return;
    ON_DEVICE(sets->x, heads_backward)(sets, count, cos, sin);
}
