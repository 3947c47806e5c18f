/* packed.h - eight neighbouring elements of a tensor of any dtype as floats: of packed weights as
 * kernels/blocks.h lays them out. */
#ifndef CUDA_PACKED_H
#define CUDA_PACKED_H

#include "kernels/cuda/cuda.h"

extern "C" {
#include "kernels/blocks.h"
}

#include <type_traits>

/* The 256 levels of DYNAMIC8 (or its unsigned one) in the device's memory (update.cu). */
const float *cuda_dynamic_levels(const Device *device, bool is_signed);

/* Not __constant__: lanes ask for different ones at once. */
static __device__ const float device_nf4_levels[16] = NF4_LEVELS;

/* A tensor to read; levels where its dtype needs them. */
struct PackedView {
    const void *data;
    int64_t cols, origin;
    const float *levels;
    bool aligned; /* floats that can be read eight at a time */
};

static inline PackedView view_of(Tensor t) {
    bool dynamic = t.dtype == DYNAMIC8 || t.dtype == DYNAMIC8_UNSIGNED || t.dtype == NF4_NESTED;
    const float *levels =
        dynamic ? cuda_dynamic_levels(t.device, t.dtype != DYNAMIC8_UNSIGNED) : NULL;
    bool aligned = (uintptr_t)t.data % 16 == 0 && tensor_cols(t) % 8 == 0;
    return PackedView{t.data, tensor_cols(t), t.origin, levels, aligned};
}

DEVICE_FUNCTION float f16_value(uint16_t bits) {
    return to_float(f16{bits});
}

/* The 6-bit scale and minimum of sub-block j of a K-quant. */
DEVICE_FUNCTION void read_scale(const uint8_t *s, int j, int *scale, int *min) {
    if (j < 4) {
        *scale = s[j] & 63;
        *min = s[j + 4] & 63;
    } else {
        *scale = (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
        *min = (s[j + 4] >> 4) | (s[j] >> 6) << 4;
    }
}

DEVICE_FUNCTION void read_nf4_8(float (&x)[8], const uint8_t *qs, float absmax) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
        x[2 * j] = absmax * device_nf4_levels[qs[j] >> 4];
        x[2 * j + 1] = absmax * device_nf4_levels[qs[j] & 15];
    }
}

template <typename T> DEVICE_FUNCTION void load_apart(float (&x)[8], const T *p) {
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = to_float(p[i]);
}

/* Elements first .. first + 7; first is a multiple of 8. */
template <int D> DEVICE_FUNCTION void read8(float (&x)[8], const PackedView &t, int64_t first) {
    if constexpr (D == Q4_0) {
        const BlockQ4_0 *b = (const BlockQ4_0 *)t.data + first / 32;
        float d = f16_value(b->d);
        int j = first % 16, shift = first % 32 / 16 * 4;
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = d * (float)((b->qs[j + i] >> shift & 15) - 8);
    } else if constexpr (D == Q8_0) {
        const BlockQ8_0 *b = (const BlockQ8_0 *)t.data + first / 32;
        float d = f16_value(b->d);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = d * (float)b->qs[first % 32 + i];
    } else if constexpr (D == Q4_K || D == Q5_K) {
        typedef std::conditional_t<D == Q4_K, BlockQ4_K, BlockQ5_K> Block;
        const Block *b = (const Block *)t.data + first / 256;
        int at = first % 256, j = at / 32, scale, min;
        read_scale(b->scales, j, &scale, &min);
        float s = f16_value(b->d) * (float)scale, m = f16_value(b->dmin) * (float)min;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int q = b->qs[j / 2 * 32 + at % 32 + i] >> (j % 2 * 4) & 15;
            if constexpr (D == Q5_K) q |= (b->qh[at % 32 + i] >> j & 1) << 4;
            x[i] = __fadd_rn(__fmul_rn(s, (float)q), -m);
        }
    } else if constexpr (D == Q6_K) {
        const BlockQ6_K *b = (const BlockQ6_K *)t.data + first / 256;
        int at = first % 256, half = at / 128, part = at % 128 / 32, i0 = at % 32;
        float s = f16_value(b->d) * (float)b->scales[8 * half + 2 * part + i0 / 16];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int low = b->ql[64 * half + 32 * (part % 2) + i0 + i] >> (part / 2 * 4) & 15;
            int high = b->qh[32 * half + i0 + i] >> (2 * part) & 3;
            x[i] = s * (float)((low | high << 4) - 32);
        }
    } else if constexpr (D == NF4) {
        const BlockNF4 *b = (const BlockNF4 *)t.data + first / 64;
        read_nf4_8(x, b->qs + first % 64 / 2, b->absmax);
    } else if constexpr (D == NF4_NESTED) {
        int64_t at = (first + t.origin) / 64;
        const BlockNF4Nested *b = (const BlockNF4Nested *)t.data + at / 256;
        float absmax = __fadd_rn(__fmul_rn(t.levels[b->absmax[at % 256]], b->scale), b->offset);
        read_nf4_8(x, b->qs[at % 256] + first % 64 / 2, absmax);
    } else if constexpr (D == DYNAMIC8 || D == DYNAMIC8_UNSIGNED) {
        const BlockDynamic8 *b = (const BlockDynamic8 *)t.data + first / DYNAMIC_BLOCK;
#pragma unroll
        for (int i = 0; i < 8; i++)
            x[i] = b->absmax * t.levels[b->codes[first % DYNAMIC_BLOCK + i]];
    } else if constexpr (D == Q4_0_TILED || D == Q8_0_TILED) {
        int64_t row = first / t.cols, col = first % t.cols;
        int64_t tile = row / TILE_HEIGHT * (t.cols / TILE_WIDTH) + col / TILE_WIDTH;
        int r = row % TILE_HEIGHT, half = col % TILE_WIDTH / 32;
        if constexpr (D == Q4_0_TILED) {
            const TileQ4_0 *b = (const TileQ4_0 *)t.data + tile;
            float d = f16_value(b->d[half][r]);
            int q = col % 32 / 4;
#pragma unroll
            for (int i = 0; i < 8; i++)
                x[i] = d * (float)((b->qs[q + i / 4][4 * r + i % 4] >> (4 * half) & 15) - 8);
        } else {
            const TileQ8_0 *b = (const TileQ8_0 *)t.data + tile;
            float d = f16_value(b->d[half][r]);
            int q = col % TILE_WIDTH / 4;
#pragma unroll
            for (int i = 0; i < 8; i++)
                x[i] = d * (float)((int)b->qs[q + i / 4][4 * r + i % 4] - 128);
        }
    } else if constexpr (D == F32) {
        if (t.aligned) {
            float low[4], high[4];
            load(low, (const float *)t.data + first);
            load(high, (const float *)t.data + first + 4);
#pragma unroll
            for (int i = 0; i < 8; i++) x[i] = i < 4 ? low[i] : high[i - 4];
        } else {
            load_apart(x, (const float *)t.data + first);
        }
    } else if constexpr (D == BF16) {
        if (t.aligned)
            load(x, (const bf16 *)t.data + first);
        else
            load_apart(x, (const bf16 *)t.data + first);
    } else {
        load_apart(x, (const f16 *)t.data + first);
    }
}

/* The same for the end of dense tensors whose count is no multiple of 8; zeros behind it. */
template <int D>
DEVICE_FUNCTION void read_up_to_8(float (&x)[8], const PackedView &t, int64_t first,
                                  int64_t count) {
    if (first + 8 <= count) {
        read8<D>(x, t, first);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        x[i] = 0;
        if (first + i >= count) continue;
        if constexpr (D == F32) x[i] = ((const float *)t.data)[first + i];
        if constexpr (D == BF16) x[i] = to_float(((const bf16 *)t.data)[first + i]);
        if constexpr (D == F16) x[i] = to_float(((const f16 *)t.data)[first + i]);
    }
}

/* Runs the statements with D the dtype as a constant. */
#define PACKED_CASE(NAME, D, ...)                                                                  \
    case NAME: {                                                                                   \
        constexpr int D = NAME;                                                                    \
        __VA_ARGS__;                                                                               \
        break;                                                                                     \
    }
#define WITH_PACKED(dtype_value, D, ...)                                                           \
    switch (dtype_value) {                                                                         \
        PACKED_CASE(Q4_0, D, __VA_ARGS__)                                                          \
        PACKED_CASE(Q8_0, D, __VA_ARGS__)                                                          \
        PACKED_CASE(Q4_K, D, __VA_ARGS__)                                                          \
        PACKED_CASE(Q5_K, D, __VA_ARGS__)                                                          \
        PACKED_CASE(Q6_K, D, __VA_ARGS__)                                                          \
        PACKED_CASE(NF4, D, __VA_ARGS__)                                                           \
        PACKED_CASE(NF4_NESTED, D, __VA_ARGS__)                                                    \
        PACKED_CASE(Q4_0_TILED, D, __VA_ARGS__)                                                    \
        PACKED_CASE(Q8_0_TILED, D, __VA_ARGS__)                                                    \
        PACKED_CASE(DYNAMIC8, D, __VA_ARGS__)                                                      \
        PACKED_CASE(DYNAMIC8_UNSIGNED, D, __VA_ARGS__)                                             \
    default:                                                                                       \
        CHECK(false, "%s on the GPU", dtype_name(dtype_value));                                    \
    }
#define WITH_ANY(dtype_value, D, ...)                                                              \
    switch (dtype_value) {                                                                         \
        PACKED_CASE(F32, D, __VA_ARGS__)                                                           \
        PACKED_CASE(BF16, D, __VA_ARGS__)                                                          \
        PACKED_CASE(F16, D, __VA_ARGS__)                                                           \
    default:                                                                                       \
        WITH_PACKED(dtype_value, D, __VA_ARGS__)                                                   \
    }

#endif
