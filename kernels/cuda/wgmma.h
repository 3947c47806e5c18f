/* wgmma.h - products of tiles on Hopper's tensor cores: a warpgroup (four warps) multiplies 64 rows
 * by N columns, operands read from shared memory while the threads go on (PTX ISA, "wgmma").
 *
 * A tile in shared memory is rows of 64 elements, 128 bytes, in which the eight chunks of 16 bytes
 * are exchanged by the row's number mod 8; it begins at a multiple of 1024 bytes and has a multiple
 * of eight rows. Wider matrices are such blocks of 64 columns one behind the other. Of the result a
 * warp has 16 rows, as in mma.h: with g = lane / 4 and t = lane % 4 a lane has rows g and g + 8 of
 * columns 8 j + 2 t and 8 j + 2 t + 1 in d[4 j .. 4 j + 3].
 *
 * Code for sm_90a alone has these instructions (ON_HOPPER); on the host every lane computes its own
 * results. */
#ifndef CUDA_WGMMA_H
#define CUDA_WGMMA_H

#include "kernels/cuda/mma.h"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ON_HOPPER 1
#else
#define ON_HOPPER 0
#endif

#define TILE_COLUMNS 64
#define WARPGROUP    128

/* Element (row, column) of a tile with `rows` rows, column a multiple of 8: of its chunk the first.
 */
DEVICE_FUNCTION int tile_at(int row, int column, int rows) {
    return (column / 64 * rows + row) * 64 + (column / 8 % 8 ^ row % 8) * 8;
}

/* The row of a warpgroup's 64 that this lane has results of; the other is eight further. */
DEVICE_FUNCTION int result_row() {
    return threadIdx.x % WARPGROUP / 32 * 16 + threadIdx.x % 32 / 4;
}

/* Where in shared memory an operand begins. */
struct Operand {
#ifdef __CUDACC__
    uint64_t descriptor;
#else
    const unsigned char *at;
    int block;
#endif
};

/* The tile from `row` of the block of columns that has `column`, and further columns of the same 64
 * where K runs along columns. `row` is a multiple of 8, `column` of 16. */
DEVICE_FUNCTION Operand operand(const bf16 *tile, int row, int column, int rows) {
    const bf16 *at = tile + (column / 64 * rows + row) * 64 + column % 64;
#ifdef __CUDACC__
    uint64_t place = (uint64_t)__cvta_generic_to_shared(at) >> 4 & 0x3fff;
    /* eight rows further: 1024 bytes; the next block of columns: rows * 128 bytes; 128-byte swizzle
     */
    return Operand{place | (uint64_t)(rows * 8) << 16 | (uint64_t)64 << 32 | (uint64_t)1 << 62};
#else
    return Operand{(const unsigned char *)at, rows * 128};
#endif
}

/* From another row and column of the same tile: of many operands the rest is computed once. */
DEVICE_FUNCTION Operand further(Operand tile, int row, int column, int rows) {
    int at = (column / 64 * rows + row) * 64 + column % 64;
#ifdef __CUDACC__
    uint64_t upper = tile.descriptor & 0xffffffff00000000u;
    tile.descriptor = upper | ((unsigned)tile.descriptor + (unsigned)at / 8);
#else
    tile.at += 2 * at;
#endif
    return tile;
}

#ifdef __CUDACC__

#define D4(i)   "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(i)  D4(i), D4(i + 4), D4(i + 8), D4(i + 12)
#define D32(i)  D16(i), D16(i + 16)
#define D64(i)  D32(i), D32(i + 32)
#define D128(i) D64(i), D64(i + 64)
#define R16     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define R32                                                                                        \
    R16 ", "                                                                                       \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define R64                                                                                        \
    R32 ", "                                                                                       \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "         \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define R128                                                                                       \
    R64 ", "                                                                                       \
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "         \
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "         \
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "   \
        "%111, "                                                                                   \
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, "     \
        "%126, %127"

#define WGMMA(N, OPERANDS, TURNS)                                                                  \
    "{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n" #N                    \
    "k16.f32.bf16.bf16 {" OPERANDS ", p, 1, 1, " TURNS "; }"

/* The instructions for N columns, COUNT results a thread: %A and %B are the operands' numbers. */
#define WGMMA_OF(N, REGISTERS, RESULTS, A0, A1, A2, A3, B, TURN)                                   \
    template <bool TURN_A, bool TURN_B>                                                            \
    DEVICE_FUNCTION void wgmma_issue(float(&d)[N / 2], Operand a, Operand b) {                     \
        asm volatile(WGMMA(N, REGISTERS "}, %" #A0 ", %" #A1, "%" #A2 ", %" #A3)                   \
                     : RESULTS                                                                     \
                     : "l"(a.descriptor), "l"(b.descriptor), "n"(TURN_A), "n"(TURN_B));            \
    }                                                                                              \
    template <bool TURN_B>                                                                         \
    DEVICE_FUNCTION void wgmma_issue(float(&d)[N / 2], const unsigned(&a)[4], Operand b) {         \
        asm volatile(                                                                              \
            WGMMA(N, REGISTERS "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B, "%" #TURN)     \
            : RESULTS                                                                              \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor), "n"(TURN_B));         \
    }
WGMMA_OF(32, R16, D16(0), 16, 17, 18, 19, 20, 21)
WGMMA_OF(64, R32, D32(0), 32, 33, 34, 35, 36, 37)
WGMMA_OF(128, R64, D64(0), 64, 65, 66, 67, 68, 69)
WGMMA_OF(256, R128, D128(0), 128, 129, 130, 131, 132, 133)

#else

/* Element (i, k) of an operand; TURNED: K are its rows. */
template <bool TURNED> static const unsigned char *simt_place(Operand o, int i, int k) {
    const unsigned char *p =
        TURNED ? o.at + i / 64 * o.block + k * 128 + i % 64 * 2 : o.at + i * 128 + k * 2;
    return (const unsigned char *)((uintptr_t)p ^ ((uintptr_t)p >> 7 & 7) << 4);
}
template <bool TURNED> static float simt_element(Operand o, int i, int k) {
    return to_float(*(const bf16 *)simt_place<TURNED>(o, i, k));
}

/* What the tensor cores read of `rows` rows of an operand; one thread says it for the warpgroup. */
template <bool TURNED> static void simt_read_operand(Operand o, int rows) {
    if (threadIdx.x % WARPGROUP) return;
    for (int i = 0; TURNED && i < 16 * rows; i += 64) /* a line of 64 of them */
        simt_async_read(o.at + i / 16 / 64 * o.block + i / 64 % 16 * 128, 128);
    for (int i = 0; !TURNED && i < rows; i++)
        for (int k = 0; k < 16; k += 8) simt_async_read(simt_place<false>(o, i, k), 16);
}

template <bool TURN_B, int COUNT, typename F>
static void simt_wgmma(float (&d)[COUNT], Operand b, F left) {
    simt_read_operand<TURN_B>(b, 2 * COUNT);
    int g = simt_lane() / 4, t = simt_lane() % 4;
    for (int k = 0; k < 16; k++) {
        float x[2] = {left(g, k), left(g + 8, k)};
        for (int i = 0; i < COUNT; i++)
            d[i] += x[i / 2 % 2] * simt_element<TURN_B>(b, i / 4 * 8 + 2 * t + i % 2, k);
    }
}

template <bool TURN_A, bool TURN_B, int COUNT>
static void wgmma_issue(float (&d)[COUNT], Operand a, Operand b) {
    int row = (int)threadIdx.x % WARPGROUP / 32 * 16;
    simt_ask(SIMT_PRODUCTS, [=, &d] {
        simt_read_operand<TURN_A>(a, 64);
        simt_wgmma<TURN_B>(d, b, [=](int i, int k) { return simt_element<TURN_A>(a, row + i, k); });
    });
}

template <bool TURN_B, int COUNT>
static void wgmma_issue(float (&d)[COUNT], const unsigned (&a)[4], Operand b) {
    std::array<unsigned char, 32 * 64> all;
    memcpy(all.data(), simt_exchange(a, sizeof a), all.size());
    simt_ask(SIMT_PRODUCTS, [=, &d] {
        simt_wgmma<TURN_B>(d, b, [&](int i, int k) {
            return to_float(simt_part<bf16>(all.data(), i % 8 * 4 + k % 8 / 2, 0,
                                            (i / 8 + k / 8 * 2) * 2 + k % 2));
        });
    });
}

#endif

/* d (64, N) += a (64, 16) b (16, N), N = 2 COUNT, asked for. TURN_A, TURN_B: K are the rows of that
 * operand in memory. */
template <bool TURN_A, bool TURN_B, int COUNT>
DEVICE_FUNCTION void wgmma(float (&d)[COUNT], Operand a, Operand b) {
#if ON_HOPPER
    wgmma_issue<TURN_A, TURN_B>(d, a, b);
#endif
}
/* a in registers, as mma_bf16 has it. */
template <bool TURN_B, int COUNT>
DEVICE_FUNCTION void wgmma(float (&d)[COUNT], const unsigned (&a)[4], Operand b) {
#if ON_HOPPER
    wgmma_issue<TURN_B>(d, a, b);
#endif
}

/* Before the first product on registers that the threads have written. */
DEVICE_FUNCTION void wgmma_begin() {
#if defined(__CUDACC__) && ON_HOPPER
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
/* What was asked for since the last call is one group. */
DEVICE_FUNCTION void wgmma_close_group() {
#if defined(__CUDACC__) && ON_HOPPER
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#elif !defined(__CUDACC__)
    simt_close_group(SIMT_PRODUCTS);
#endif
}
/* Until all but the newest LEFT groups are done. */
template <int LEFT> DEVICE_FUNCTION void wgmma_wait() {
#if defined(__CUDACC__) && ON_HOPPER
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
#elif !defined(__CUDACC__)
    simt_wait(SIMT_PRODUCTS, LEFT);
    simt_warpgroup_sync(); /* a product is done when it is for all four warps */
#endif
}
/* After waiting: the compiler reads these results from here on, not before. */
template <int COUNT> DEVICE_FUNCTION void wgmma_results(float (&d)[COUNT]) {
#ifdef __CUDACC__
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i])::"memory");
#else
    (void)d;
#endif
}

/* What this thread has written to shared memory, copies that have arrived included, is there for
 * products asked for after the next barrier. */
DEVICE_FUNCTION void shared_for_products() {
#if defined(__CUDACC__) && ON_HOPPER
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#elif !defined(__CUDACC__)
    simt_async_fence();
#endif
}

#endif
