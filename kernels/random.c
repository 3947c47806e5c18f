/* random.c - names as keys, and normal numbers in bulk. */
#include "kernels/random.h"

#include <math.h>

uint64_t random_key_name(uint64_t seed, const char *name) {
    uint64_t hash = 0xcbf29ce484222325u; /* FNV-1a */
    for (; *name; name++) hash = (hash ^ (uint8_t)*name) * 0x100000001b3u;
    return random_key(seed, hash);
}

/* Index 2j is the cosine and 2j + 1 the sine of one pair of uniforms, so any range can be made
 * alone. */
void random_normal(float *values, uint64_t key, uint64_t first, int64_t count) {
    int64_t i = 0;
    while (i < count) {
        uint64_t pair = (first + (uint64_t)i) / 2, bits = random_u64(key, pair);
        float u = ((float)(bits >> 40) + 0.5f) * 0x1p-24f;
        float angle = (float)(bits & 0xffffff) * (6.2831853071795865f * 0x1p-24f);
        float radius = sqrtf(-2.0f * logf(u));
        if ((first + (uint64_t)i) % 2 == 0) {
            values[i++] = radius * cosf(angle);
            if (i == count) break;
        }
        values[i++] = radius * sinf(angle);
    }
}
