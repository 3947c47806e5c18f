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

/* A lane's V activations from element `at` on, as they are stored; lanes of a warp have packs that
 * follow each other, and all of them call it. */
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
#pragma unroll
    for (int j = 0; j < V; j++) to.codes[at + j] = (int8_t)rintf(__fmul_rn(v[j], inverse));
    if (at % 32 == 0) to.scales[at / 32] = __fdiv_rn(most, 127.0f);
}

/* Makes those of a tensor that is there already. */
void round_activations(const Device *device, Codes to, Tensor x);

#endif
