/* bulk.h - Hopper's copies of whole tiles into shared memory, one thread asking for them, into one
 * or both blocks of a pair, and the barriers that count what has arrived (PTX ISA,
 * "cp.async.bulk.tensor", "mbarrier"). Tiles lie as wgmma.h wants them.
 *
 * Code for sm_90a alone has these instructions; on the host copies are there at once. */
#ifndef CUDA_BULK_H
#define CUDA_BULK_H

#include "kernels/cuda/wgmma.h"

/* ---- the matrices that tiles are cut from ---- */

/* `groups` matrices of bf16, (rows, cols) each, and the tile that one copy brings: 64 columns by
 * `tile_rows` rows of each of `tile_groups` matrices. What lies outside them comes as zeros. */
#ifdef __CUDACC__
#include <cudaTypedefs.h>
typedef CUtensorMap TileMap;
#else
struct TileMap {
    const bf16 *data;
    int64_t cols, rows, groups;
    int tile_rows, tile_groups;
};
#endif

/* cols a multiple of 8, data of 16 bytes, tile_rows times tile_groups up to 256. Made on the host
 * (device.cu). */
TileMap cuda_tile_map(const void *data, int64_t groups, int64_t rows, int64_t cols, int tile_rows,
                      int tile_groups = 1);

/* ---- barriers ---- */

/* Lies in shared memory. A phase ends when so many threads have arrived, and all bytes that were
 * announced. */
#ifdef __CUDACC__
typedef uint64_t Barrier;
#else
typedef SimtBarrier Barrier;
/* The same place in the shared memory of another block of the pair. */
template <typename T> static T *simt_in_block(T *p, unsigned rank) {
    ptrdiff_t blocks = (ptrdiff_t)rank - (ptrdiff_t)simt_thread->cluster_rank;
    return (T *)((char *)p + blocks * (ptrdiff_t)simt_thread->cluster_shared);
}
#endif

DEVICE_FUNCTION unsigned pair_rank() {
#ifdef __CUDACC__
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
#else
    return simt_thread->cluster_rank;
#endif
}

/* Every thread of both blocks. */
DEVICE_FUNCTION void pair_sync() {
#if defined(__CUDACC__) && ON_HOPPER
    asm volatile("barrier.cluster.arrive.release;\n"
                 "barrier.cluster.wait.acquire;" ::
                     : "memory");
#elif !defined(__CUDACC__)
    simt_cluster_sync();
#endif
}

/* By one thread; pair_sync before anyone uses it. */
DEVICE_FUNCTION void barrier_begin(Barrier *b, int threads) {
#if defined(__CUDACC__) && ON_HOPPER
    unsigned at = (unsigned)__cvta_generic_to_shared(b);
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n"
                 "fence.mbarrier_init.release.cluster;" ::"r"(at),
                 "r"(threads)
                 : "memory");
#elif !defined(__CUDACC__)
    *b = Barrier{0, (uint16_t)threads, (uint8_t)threads, 0};
#endif
}

/* This thread arrives at its block's barrier, and so many bytes are to. */
DEVICE_FUNCTION void barrier_announce(Barrier *b, int bytes) {
#if defined(__CUDACC__) && ON_HOPPER
    unsigned at = (unsigned)__cvta_generic_to_shared(b);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes)
                 : "memory");
#elif !defined(__CUDACC__)
    simt_count(b, 1, bytes);
#endif
}

/* This thread arrives at the barrier of block `rank` of the pair. */
DEVICE_FUNCTION void barrier_arrive(Barrier *b, unsigned rank) {
#if defined(__CUDACC__) && ON_HOPPER
    unsigned at = (unsigned)__cvta_generic_to_shared(b);
    asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(at),
                 "r"(rank)
                 : "memory");
#elif !defined(__CUDACC__)
    simt_count(simt_in_block(b, rank), 1, 0);
#endif
}

/* Until the phase of this parity has ended: 0 the first, 1 the second, 0 the third. */
DEVICE_FUNCTION void barrier_wait(Barrier *b, unsigned parity) {
#if defined(__CUDACC__) && ON_HOPPER
    unsigned at = (unsigned)__cvta_generic_to_shared(b);
    asm volatile("{ .reg .pred done;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again; }" ::"r"(at),
                 "r"(parity)
                 : "memory");
#elif !defined(__CUDACC__)
    simt_wait_phase(b, parity);
#endif
}

/* ---- copies ---- */

/* The tile at (row, col) of a group's matrix, into shared memory at `to`, and its bytes to the
 * barrier: of this block, or, to BOTH, of each block of the pair at the same place. */
template <bool BOTH>
DEVICE_FUNCTION void copy_tile(bf16 *to, Barrier *b, const TileMap &map, int64_t group, int64_t row,
                               int64_t col) {
#if defined(__CUDACC__) && ON_HOPPER
    unsigned place = (unsigned)__cvta_generic_to_shared(to),
             at = (unsigned)__cvta_generic_to_shared(b);
    if (BOTH)
        asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
                     ".multicast::cluster [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(place),
                     "l"(&map), "r"((int)col), "r"((int)row), "r"((int)group), "r"(at),
                     "h"((uint16_t)3)
                     : "memory");
    else
        asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
                     " [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(place),
                     "l"(&map), "r"((int)col), "r"((int)row), "r"((int)group), "r"(at)
                     : "memory");
#elif !defined(__CUDACC__)
    simt_engine([=] {
        for (unsigned rank = 0; rank < PAIR; rank++) {
            if (!BOTH && rank != simt_thread->cluster_rank) continue;
            bf16 *tile = simt_in_block(to, rank);
            int rows = map.tile_rows * map.tile_groups;
            for (int r = 0; r < rows; r++)
                for (int c = 0; c < 64; c++) {
                    int64_t g = group + r / map.tile_rows, at = row + r % map.tile_rows;
                    bool here = at < map.rows && col + c < map.cols && g < map.groups;
                    tile[tile_at(r, c / 8 * 8, rows) + c % 8] =
                        here ? map.data[(g * map.rows + at) * map.cols + col + c] : bf16{0};
                }
            simt_count(simt_in_block(b, rank), 0, -rows * 128);
        }
    });
#endif
}

/* The tile in shared memory goes to (row, col) of a group's matrix, but for what lies outside.
 * Those who wrote it have said so (shared_for_products) and met. */
DEVICE_FUNCTION void store_tile(const TileMap &map, const bf16 *from, int64_t group, int64_t row,
                                int64_t col) {
#if defined(__CUDACC__) && ON_HOPPER
    unsigned place = (unsigned)__cvta_generic_to_shared(from);
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];\n"
                 "cp.async.bulk.commit_group;" ::"l"(&map),
                 "r"((int)col), "r"((int)row), "r"((int)group), "r"(place)
                 : "memory");
#elif !defined(__CUDACC__)
    simt_ask(SIMT_STORES, [=] {
        int rows = map.tile_rows * map.tile_groups;
        simt_async_read(from, (size_t)rows * 128);
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < 64 && col + c < map.cols; c++) {
                int64_t g = group + r / map.tile_rows, at = row + r % map.tile_rows;
                if (at < map.rows && g < map.groups)
                    ((bf16 *)map.data)[(g * map.rows + at) * map.cols + col + c] =
                        from[tile_at(r, c / 8 * 8, rows) + c % 8];
            }
    });
    simt_close_group(SIMT_STORES);
#endif
}

/* Until the tiles that this thread has stored may be written to again. */
DEVICE_FUNCTION void stores_have_read() {
#if defined(__CUDACC__) && ON_HOPPER
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
#elif !defined(__CUDACC__)
    simt_wait(SIMT_STORES, 0);
#endif
}

/* The threads of this warpgroup, the block's number `which`. */
DEVICE_FUNCTION void warpgroup_sync(int which) {
#if defined(__CUDACC__) && ON_HOPPER
    asm volatile("bar.sync %0, %1;" ::"r"(which + 1), "n"(WARPGROUP) : "memory");
#elif !defined(__CUDACC__)
    (void)which;
    simt_warpgroup_sync();
#endif
}

/* ---- who brings and who multiplies ---- */

#define BROUGHT_THREADS (3 * WARPGROUP) /* one warpgroup brings, two multiply 64 rows each */

/* Which of those who multiply this is. */
DEVICE_FUNCTION int brought_half() {
    return (int)threadIdx.x / WARPGROUP - 1;
}

/* The row of a tile that this lane of them has results of; the other is eight further. */
DEVICE_FUNCTION int brought_row() {
    return brought_half() * 64 + result_row();
}

/* The threads of both that multiply. */
DEVICE_FUNCTION void multipliers_sync() {
#if defined(__CUDACC__) && ON_HOPPER
    asm volatile("bar.sync 3, %0;" ::"n"(2 * WARPGROUP) : "memory");
#elif !defined(__CUDACC__)
    simt_warpgroups_sync(2);
#endif
}

/* ---- registers ---- */

/* How many registers each thread of the warpgroup has from here on: fewer than at the start, or
 * more, which others must have given back. */
template <int COUNT> DEVICE_FUNCTION void registers_fewer() {
#if defined(__CUDACC__) && ON_HOPPER
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}
template <int COUNT> DEVICE_FUNCTION void registers_more() {
#if defined(__CUDACC__) && ON_HOPPER
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

#endif
