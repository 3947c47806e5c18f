/* columns.h - sums down the columns of a matrix, in an order that only its shape decides. */
#ifndef CUDA_COLUMNS_H
#define CUDA_COLUMNS_H

#include "kernels/cuda/cuda.h"

#define COLUMN_ROWS 8 /* rows that threads of a block look at side by side */

/* partial[s][d] = sum of term(n, d) over the rows n of split s. */
template <typename F>
static __global__ void column_partials(float *partial, int64_t N, int64_t D, int64_t rows, F term) {
    __shared__ float sums[COLUMN_ROWS][33];
    int x = threadIdx.x & 31, y = threadIdx.x >> 5;
    int64_t d = (int64_t)blockIdx.x * 32 + x, first = (int64_t)blockIdx.y * rows;
    int64_t last = first + rows < N ? first + rows : N;
    float sum = 0;
    if (d < D)
        for (int64_t n = first + y; n < last; n += COLUMN_ROWS) sum += term(n, d);
    sums[y][x] = sum;
    __syncthreads();
    if (y || d >= D) return;
    for (int i = 1; i < COLUMN_ROWS; i++) sum += sums[i][x];
    partial[blockIdx.y * D + d] = sum;
}

static __global__ void column_join(float *y, const float *partial, int64_t D, int splits) {
    FOR_GRID(d, D) {
        float sum = y[d];
        for (int s = 0; s < splits; s++) sum += partial[s * D + d];
        y[d] = sum;
    }
}

/* y[d] += sum over n of term(n, d). */
template <typename F>
static void add_column_sums(const Device *device, float *y, int64_t N, int64_t D, F term) {
    int64_t rows = N < 64 * 64 ? 64 : ceil_div(N, 64), splits = ceil_div(N, rows);
    if (!N || !D) return;
    float *partial = (float *)cuda_workspace(device, (size_t)(splits * D) * sizeof(float));
    dim3 grid((unsigned)ceil_div(D, 32), (unsigned)splits);
    LAUNCH(device, (column_partials<F>), grid, 32 * COLUMN_ROWS, 0, partial, N, D, rows, term);
    LAUNCH(device, (column_join), grid_for(device, D, 256), 256, 0, y, partial, D, (int)splits);
}

#endif
