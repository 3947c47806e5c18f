/* merge.c - W + scale B A, and DoRA's factor on its rows. */
#include "model/merge.h"
#include "kernels/elementwise.h"

/* The rows where the model is. */
static void merge(const Gemma *g, const Param *p, int64_t first, Tensor to) {
    const Linear *l = gemma_owner(g, p);
    Tensor source = param_source(p);
    int64_t count = tensor_rows(to), cols = tensor_cols(to);
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

void merged_rows(const Gemma *g, const Param *p, int64_t first, int64_t count, float *out) {
    int64_t cols = p->value.ndim > 1 ? tensor_cols(p->value) : tensor_count(p->value);
    Tensor to = TENSOR(out, F32, count, cols);
    to.device = param_source(p).device;
    if (to.device->kind == DEVICE_CPU) {
        merge(g, p, first, to);
        return;
    }
    to.data = device_allocate(to.device, tensor_bytes(to));
    CHECK(to.data, "no memory for %s on the device", tensor_text(to));
    merge(g, p, first, to);
    tensor_read(out, to);
    device_release(to.device, to.data, tensor_bytes(to));
}

Tensor merged_factors(const Gemma *g, const Param *p, int64_t first, int64_t count) {
    const Linear *l = gemma_owner(g, p);
    if (!l || !l->factors) return tensor_absent();
    Tensor t = l->factors->value;
    return tensor_slice(RESHAPE(t, tensor_rows(t), tensor_cols(t)), first, count);
}
