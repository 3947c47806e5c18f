/* mma.h - products of small tiles on tensor cores, and how tiles come into a warp's registers.
 *
 * A warp multiplies 16 rows by 8 columns. With g = lane / 4 and t = lane % 4 a lane holds of the
 * result rows g and g + 8 of columns 2 t and 2 t + 1, and of the operands what the comments say
 * (PTX ISA, "matrix fragments"). On the host the lanes give each other their parts and every lane
 * computes its own results. */
#ifndef CUDA_MMA_H
#define CUDA_MMA_H

#include "kernels/cuda/cuda.h"

#ifndef __CUDACC__

/* What lane `lane` of an exchange gave: element i of type T, `offset` bytes in. */
template <typename T> static T simt_part(const unsigned char *all, int lane, int offset, int i) {
    T out;
    memcpy(&out, all + 64 * lane + offset + i * (int)sizeof(T), sizeof out);
    return out;
}

/* The product of all lanes' operands, this lane's part of it: K deep, elements of T, the numbers
 * they stand for by `value`. A register holds 4 / sizeof(T) neighbours along K. */
template <int K, typename T, typename C, typename F>
static void simt_multiply(C (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], F value) {
    constexpr int each = 4 / (int)sizeof(T), half = K / 2;
    unsigned char mine[64] = {0};
    memcpy(mine, a, sizeof a);
    memcpy(mine + 32, b, sizeof b);
    const unsigned char *all = simt_exchange(mine, 64);
    int g = simt_lane() / 4, t = simt_lane() % 4;
    for (int i = 0; i < 4; i++) {
        int row = g + i / 2 * 8, column = 2 * t + i % 2;
        for (int k = 0; k < K; k++) {
            int from = k % half / each, part = k / half, at = k % each;
            T x = simt_part<T>(all, row % 8 * 4 + from, 0, (2 * part + row / 8) * each + at),
              y = simt_part<T>(all, column * 4 + from, 32, part * each + at);
            c[i] += value(x) * value(y);
        }
    }
}

#endif

/* c += a b, bf16 with f32 sums; K = 16.
 *   a[0], a[1]  rows g, g + 8 of columns 2 t, 2 t + 1;  a[2], a[3]  of columns 2 t + 8, 2 t + 9
 *   b[0]        column g of rows 2 t, 2 t + 1;          b[1]        of rows 2 t + 8, 2 t + 9 */
DEVICE_FUNCTION void mma_bf16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#ifdef __CUDACC__
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    simt_multiply<16, bf16>(c, a, b, [](bf16 x) { return to_float(x); });
#endif
}

/* c += a b, f32 of which the leading 10 bits of the significand count (TF32); K = 8.
 *   a[0], a[1]  rows g, g + 8 of column t;  a[2], a[3]  of column t + 4
 *   b[0], b[1]  rows t, t + 4 of column g */
DEVICE_FUNCTION void mma_tf32(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#ifdef __CUDACC__
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    simt_multiply<8, unsigned>(c, a, b,
                               [](unsigned x) { return __uint_as_float(x & 0xffffe000u); });
#endif
}

/* c += a b, signed bytes with exact sums; K = 32.
 *   a[0], a[1]  rows g, g + 8 of columns 4 t .. 4 t + 3;  a[2], a[3]  of columns 16 + 4 t ..
 *   b[0], b[1]  column g of rows 4 t .. 4 t + 3 and 16 + 4 t .. */
DEVICE_FUNCTION void mma_int8(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#ifdef __CUDACC__
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    simt_multiply<32, int8_t>(c, a, b, [](int8_t x) { return (int)x; });
#endif
}

/* Four 8 x 8 tiles of 16-bit elements from shared memory: lane i names row i % 8 of tile i / 8, and
 * holds of each tile row g, columns 2 t and 2 t + 1. */
DEVICE_FUNCTION void load_tiles(unsigned (&x)[4], const void *row) {
#ifdef __CUDACC__
    unsigned place = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(place)
                 : "memory");
#else
    const unsigned char *all = simt_exchange(&row, sizeof row);
    int g = simt_lane() / 4, t = simt_lane() % 4;
    for (int i = 0; i < 4; i++) {
        const unsigned char *from = simt_part<const unsigned char *>(all, 8 * i + g, 0, 0);
        memcpy(&x[i], from + 4 * t, 4);
    }
#endif
}

/* The same turned around: a lane holds of each tile rows 2 t and 2 t + 1 of column g. */
DEVICE_FUNCTION void load_turned_tiles(unsigned (&x)[4], const void *row) {
#ifdef __CUDACC__
    unsigned place = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(place)
                 : "memory");
#else
    const unsigned char *all = simt_exchange(&row, sizeof row);
    int g = simt_lane() / 4, t = simt_lane() % 4;
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) {
            const unsigned char *from =
                simt_part<const unsigned char *>(all, 8 * i + 2 * t + j, 0, 0);
            memcpy((char *)&x[i] + 2 * j, from + 2 * g, 2);
        }
#endif
}

/* 16 bytes from global to shared memory without passing through registers; zeros where `here` is
 * false. Done when copies_wait says so. */
DEVICE_FUNCTION void copy_16(void *shared, const void *global, bool here) {
#ifdef __CUDACC__
    unsigned place = (unsigned)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(global),
                 "r"(here ? 16 : 0)
                 : "memory");
#else
    simt_ask(SIMT_COPIES, [=] {
        if (here)
            memcpy(shared, global, 16);
        else
            memset(shared, 0, 16);
    });
#endif
}
/* What was asked for since the last call is one group. */
DEVICE_FUNCTION void copies_close_group() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    simt_close_group(SIMT_COPIES);
#endif
}
/* Until all but the newest `LEFT` groups of this thread have arrived. */
template <int LEFT> DEVICE_FUNCTION void copies_wait() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#else
    simt_wait(SIMT_COPIES, LEFT);
#endif
}

/* A float as the TF32 nearest to it. */
DEVICE_FUNCTION unsigned to_tf32(float x) {
    unsigned u = __float_as_uint(x);
    return (u + 0x1000u) & 0xffffe000u;
}

#endif
