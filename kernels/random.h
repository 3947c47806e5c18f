/* random.h - keyed random numbers: value i of stream k is a function of (k, i) and nothing else.
 *
 * Nothing is drawn in order, so any thread may make any part, a resumed run makes what an
 * uninterrupted one would, and a mask is made again instead of kept. The mixer is SplitMix64's
 * finaliser (Steele, Lea, Flood 2014) applied to key + i * odd constant. */
#ifndef RANDOM_H
#define RANDOM_H

#include <stdint.h>

#ifndef INLINE /* kernels/cuda makes them its own as well */
#define INLINE static inline
#endif

INLINE uint64_t random_mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* A stream key from a seed and a name or number. */
INLINE uint64_t random_key(uint64_t seed, uint64_t salt) {
    return random_mix(random_mix(seed + 0x9e3779b97f4a7c15u) ^ (salt * 0xd1342543de82ef95u + 1));
}
uint64_t random_key_name(uint64_t seed, const char *name);

INLINE uint64_t random_u64(uint64_t key, uint64_t index) {
    return random_mix(key + (index + 1) * 0x9e3779b97f4a7c15u);
}

/* Uniform in [0, 1). */
INLINE float random_uniform(uint64_t key, uint64_t index) {
    return (float)(random_u64(key, index) >> 40) * 0x1p-24f;
}
INLINE double random_uniform_double(uint64_t key, uint64_t index) {
    return (double)(random_u64(key, index) >> 11) * 0x1p-53;
}

/* One of the two bf16 next to x, as bits, the nearer one more often: on average x itself. */
INLINE uint16_t random_bf16(float x, uint64_t key, uint64_t index) {
    union {
        float f;
        uint32_t u;
    } bits = {x};
    if ((bits.u & 0x7f800000u) == 0x7f800000u) /* infinities, and NaN that stay NaN */
        return (uint16_t)(bits.u >> 16 | (bits.u & 0x7fffffu ? 0x40 : 0));
    return (uint16_t)((bits.u + (uint32_t)(random_u64(key, index) & 0xffff)) >> 16);
}

/* Standard normal (Box-Muller), values first .. first + count - 1 of the stream. */
void random_normal(float *values, uint64_t key, uint64_t first, int64_t count);

#endif
