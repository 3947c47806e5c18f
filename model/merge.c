/* merge.c - W + scale B A, and DoRA's factor on its rows. */
#include "model/merge.h"
#include "kernels/elementwise.h"
#include "kernels/matmul.h"

static const Linear *owner_of(const Gemma *g, const Param *p) {
    for (const Linear *l = g->linears.first; l; l = l->next)
        if (l->weight == p) return l;
    return NULL;
}

void merged_rows(const Gemma *g, const Param *p, int64_t first, int64_t count, float *out) {
    Tensor source = p->trainable ? p->master : p->value;
    int64_t cols = source.ndim > 1 ? tensor_cols(source) : tensor_count(source);
    Tensor rows = RESHAPE(source, tensor_count(source) / cols, cols);
    scale_copy(TENSOR(out, F32, count, cols), SET, tensor_slice(rows, first, count), 1.0f);
    const Linear *l = owner_of(g, p);
    if (!l || !l->lora) return;
    const Lora *lora = l->lora;
    for (int64_t done = 0; done < count;) { /* rows of one group at a time */
        int64_t row = first + done, group = row / l->out, inside = row % l->out;
        int64_t n = l->out - inside < count - done ? l->out - inside : count - done;
        Tensor A = l->groups > 1 ? tensor_at(lora->A->value, group) : lora->A->value;
        Tensor B = l->groups > 1 ? tensor_at(lora->B->value, group) : lora->B->value;
        Tensor part = TENSOR(out + done * cols, F32, n, cols);
        matmul_ordered(NN, part, ADD, tensor_slice(B, inside, n), A, lora->scale);
        for (int64_t i = 0; lora->magnitude && i < n; i++)
            for (int64_t c = 0; c < cols; c++)
                out[(done + i) * cols + c] *= ((const float *)lora->factor.data)[inside + i];
        done += n;
    }
}
