/* merge.c - W + scale B A, and DoRA's factor on its rows. */
#include "model/merge.h"
#include "kernels/elementwise.h"

void merged_rows(const Gemma *g, const Param *p, int64_t first, int64_t count, float *out) {
    const Linear *l = gemma_owner(g, p);
    Tensor source = p->trainable ? p->master : p->value;
    int64_t cols = source.ndim > 1 ? tensor_cols(source) : tensor_count(source);
    Tensor to = TENSOR(out, F32, count, cols);
    if (!l || !l->lora) {
        Tensor rows = RESHAPE(source, tensor_count(source) / cols, cols);
        scale_copy(to, SET, tensor_slice(rows, first, count), 1.0f);
        return;
    }
    for (int64_t done = 0, n; done < count; done += n) { /* rows of one group at a time */
        int64_t inside = (first + done) % l->out;
        n = l->out - inside < count - done ? l->out - inside : count - done;
        linear_merged_rows(l, (first + done) / l->out, inside, tensor_slice(to, done, n));
    }
}

Tensor merged_factors(const Gemma *g, const Param *p, int64_t first, int64_t count) {
    const Linear *l = gemma_owner(g, p);
    if (!l || !l->factors) return tensor_absent();
    Tensor t = l->factors->value;
    return tensor_slice(RESHAPE(t, tensor_rows(t), tensor_cols(t)), first, count);
}
