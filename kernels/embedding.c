/* embedding.c - the contracts of embedding.h. */
#include "kernels/embedding.h"

static void check_embedding(Tensor y, Tensor table, int64_t first_col, Tensor ids) {
    CHECK(table.ndim == 2 && ids.dtype == I32 && tensor_rows(y) == tensor_count(ids),
          "embedding: %s from %s", tensor_text(y), tensor_text(table));
    CHECK(first_col >= 0 && first_col + tensor_cols(y) <= tensor_cols(table),
          "embedding: columns beyond the table");
}

void embedding_forward(Tensor y, Tensor table, int64_t first_col, Tensor ids, float scale) {
    check_embedding(y, table, first_col, ids);
    ON_DEVICE(y, embedding_forward)(y, table, first_col, ids, scale);
}

void embedding_backward(Tensor dtable, int64_t first_col, Tensor dy, Tensor ids, float scale,
                        int32_t skip) {
    check_embedding(dy, dtable, first_col, ids);
    CHECK(dtable.dtype == F32, "embedding: dtable is %s", dtype_name(dtable.dtype));
    ON_DEVICE(dy, embedding_backward)(dtable, first_col, dy, ids, scale, skip);
}
