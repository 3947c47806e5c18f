/* codes.h - activations in 8 bits: a scale for 32 along a row (largest / 127), and codes; as
 * products of packed weights take them, and as kernels before them can make them on the way. */
#ifndef CUDA_CODES_H
#define CUDA_CODES_H

#include "kernels/cuda/cuda.h"

struct Codes {
    int8_t *codes;
    float *scales; /* NULL: nobody wants them */
};

/* Those of `count` activations in memory of count + count / 8 bytes. */
static inline Codes codes_in(void *memory, int64_t count) {
    return Codes{(int8_t *)memory, (float *)((char *)memory + count)};
}

/* The integer nearest to x, which is within 127, in 8 bits: a sum with 1.5 * 2^23 ends in it. */
DEVICE_FUNCTION unsigned nearest_code(float x) {
    return __float_as_uint(__fadd_rn(x, 12582912.0f)) & 255;
}

/* A lane's V activations from element `at` on, as they are stored, V 1, 4 or 8; lanes of a warp
 * have packs that follow each other, and all of them call it. */
template <int V>
DEVICE_FUNCTION void store_codes(Codes to, int64_t at, const float (&v)[V], bool here) {
    float most = 0;
#pragma unroll
    for (int j = 0; j < V; j++) most = fmaxf(most, here ? fabsf(v[j]) : 0.0f);
#pragma unroll
    for (int lanes = 1; lanes < 32 / V; lanes *= 2)
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, lanes));
    float inverse = most > 0 ? __fdiv_rn(127.0f, most) : 0.0f;
    if (!here) return;
    unsigned codes[V];
#pragma unroll
    for (int j = 0; j < V; j++) codes[j] = nearest_code(__fmul_rn(v[j], inverse));
    if constexpr (V % 4 == 0) {
#pragma unroll
        for (int j = 0; j < V; j += 4)
            *(unsigned *)(to.codes + at + j) =
                codes[j] | codes[j + 1] << 8 | codes[j + 2] << 16 | codes[j + 3] << 24;
    } else {
        to.codes[at] = (int8_t)codes[0];
    }
    if (at % 32 == 0) to.scales[at / 32] = __fdiv_rn(most, 127.0f);
}

/* Makes those of a tensor that is there already. */
void round_activations(const Device *device, Codes to, Tensor x);

#endif
