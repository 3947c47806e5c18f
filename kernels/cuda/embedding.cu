/* embedding.cu - gathering and scattering table rows.
 *
 * A table that stays in the host's memory is read by the GPU itself where its pages could be pinned
 * (device_pin), else the host gathers the rows of a batch and sends them. */
#include "kernels/cuda/packed.h"

extern "C" {
#include "kernels/cuda/device.h"
#include "kernels/embedding.h"
}

#include <stdlib.h>

template <typename Y, int D>
static __global__ void look_up(Y *y, PackedView table, int64_t first_col, const int32_t *ids,
                               float scale, int64_t N, int64_t width) {
    int64_t eights = width / 8;
    FOR_GRID(i, N * eights) {
        int64_t n = i / eights, d = i % eights * 8;
        float a[8];
        read8<D>(a, table, ids[n] * table.cols + first_col + d);
#pragma unroll
        for (int j = 0; j < 8; j++) y[n * width + d + j] = from_float<Y>(a[j] * scale);
    }
}

/* Widths that eight does not divide: floats alone. */
template <typename Y, typename X>
static __global__ void look_up_odd(Y *y, const X *table, int64_t cols, int64_t first_col,
                                   const int32_t *ids, float scale, int64_t N, int64_t width) {
    FOR_GRID(i, N * width)
    y[i] = from_float<Y>(to_float(table[ids[i / width] * cols + first_col + i % width]) * scale);
}

static void launch_look_up(Tensor y, Tensor table, int64_t first_col, Tensor ids, float scale) {
    int64_t N = tensor_rows(y), width = tensor_cols(y);
    unsigned grid = grid_for(y.device, tensor_count(y) / 8 + 1, 256);
    if (width % 8 || first_col % 8 || tensor_cols(table) % 8)
        WITH_FLOAT(y.dtype, Y, WITH_FLOAT(table.dtype, X, {
                       LAUNCH(y.device, (look_up_odd<Y, X>), grid, 256, 0, data_of<Y>(y),
                              data_of<X>(table), tensor_cols(table), first_col,
                              data_of<int32_t>(ids), scale, N, width);
                   }));
    else
        WITH_FLOAT(y.dtype, Y, WITH_ANY(table.dtype, D, {
                       LAUNCH(y.device, (look_up<Y, D>), grid, 256, 0, data_of<Y>(y),
                              view_of(table), first_col, data_of<int32_t>(ids), scale, N, width);
                   }));
}

/* The rows of a batch, gathered by the host into a table of their own that `rows` then names. */
static void look_up_on_host(Tensor y, Tensor table, int64_t first_col, Tensor ids, float scale) {
    int64_t N = tensor_rows(y);
    cuda_never_replay(y.device);
    int32_t *id = (int32_t *)must_malloc((size_t)N * sizeof *id);
    tensor_read(id, ids);
    Tensor host = y, own = ids;
    host.device = device_cpu();
    host.data = must_malloc(tensor_bytes(y));
    own.device = device_cpu();
    own.data = id;
    embedding_forward(host, table, first_col, own, scale);
    tensor_write(y, host.data);
    free(host.data);
    free(id);
}

extern "C" void cuda_embedding_forward(Tensor y, Tensor table, int64_t first_col, Tensor ids,
                                       float scale) {
    if (!tensor_count(y)) return;
    if (table.device->kind == DEVICE_CPU) {
        void *reached = cuda_reach(y.device, table.data);
        if (!reached) {
            look_up_on_host(y, table, first_col, ids, scale);
            return;
        }
        table.data = reached;
        table.device = y.device;
    }
    launch_look_up(y, table, first_col, ids, scale);
}

/* A block for each row that is the first with its id: it adds up all rows of that id, in order. */
template <typename T>
static __global__ void add_rows(float *table, int64_t cols, int64_t first_col, const T *dy,
                                const int32_t *ids, float scale, int32_t skip, int64_t N,
                                int64_t width) {
    int64_t n = blockIdx.x;
    int32_t id = ids[n];
    int mine = id == skip;
    for (int64_t m = threadIdx.x; m < n; m += blockDim.x) mine |= ids[m] == id;
    if (__syncthreads_or(mine)) return;
    for (int64_t d = threadIdx.x; d < width; d += blockDim.x) {
        float *at = table + id * cols + first_col + d, sum = *at;
        for (int64_t m = n; m < N; m++)
            if (ids[m] == id) sum += to_float(dy[m * width + d]) * scale;
        *at = sum;
    }
}

extern "C" void cuda_embedding_backward(Tensor dtable, int64_t first_col, Tensor dy, Tensor ids,
                                        float scale, int32_t skip) {
    int64_t N = tensor_rows(dy), width = tensor_cols(dy);
    if (!N || !width) return;
    WITH_FLOAT(dy.dtype, T, {
        LAUNCH(dy.device, (add_rows<T>), (unsigned)N, 256, 0, data_of<float>(dtable),
               tensor_cols(dtable), first_col, data_of<T>(dy), data_of<int32_t>(ids), scale, skip,
               N, width);
    });
}
