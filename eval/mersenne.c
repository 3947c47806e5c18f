/* mersenne.c - the generator and its methods. */
#include "eval/mersenne.h"
#include "kernels/status.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define N 624
#define M 397

static void init(Mersenne *m, uint32_t seed) {
    m->state[0] = seed;
    for (uint32_t i = 1; i < N; i++)
        m->state[i] = 1812433253u * (m->state[i - 1] ^ m->state[i - 1] >> 30) + i;
    m->at = N;
}

void mersenne_seed(Mersenne *m, uint64_t seed) {
    uint32_t key[] = {(uint32_t)seed, (uint32_t)(seed >> 32)}, *s = m->state;
    uint32_t words = key[1] ? 2 : 1, i = 1, j = 0;
    init(m, 19650218u);
    for (int k = 0; k < N; k++) {
        s[i] = (s[i] ^ (s[i - 1] ^ s[i - 1] >> 30) * 1664525u) + key[j] + j;
        if (++i >= N) s[0] = s[N - 1], i = 1;
        if (++j >= words) j = 0;
    }
    for (int k = 0; k < N - 1; k++) {
        s[i] = (s[i] ^ (s[i - 1] ^ s[i - 1] >> 30) * 1566083941u) - i;
        if (++i >= N) s[0] = s[N - 1], i = 1;
    }
    s[0] = 0x80000000u;
}

uint32_t mersenne_bits(Mersenne *m) {
    uint32_t *s = m->state;
    if (m->at >= N) {
        for (int k = 0; k < N; k++) {
            uint32_t y = (s[k] & 0x80000000u) | (s[(k + 1) % N] & 0x7fffffffu);
            s[k] = s[(k + M) % N] ^ y >> 1 ^ (y & 1 ? 0x9908b0dfu : 0);
        }
        m->at = 0;
    }
    uint32_t y = s[m->at++];
    y ^= y >> 11;
    y ^= y << 7 & 0x9d2c5680u;
    y ^= y << 15 & 0xefc60000u;
    return y ^ y >> 18;
}

double mersenne_random(Mersenne *m) {
    uint32_t a = mersenne_bits(m) >> 5, b = mersenne_bits(m) >> 6;
    return (a * 67108864.0 + b) / 9007199254740992.0;
}

int64_t mersenne_below(Mersenne *m, int64_t n) {
    int bits = 64 - __builtin_clzll((uint64_t)n);
    CHECK(n > 0 && bits <= 32, "a draw below %lld", (long long)n);
    for (;;) {
        int64_t drawn = mersenne_bits(m) >> (32 - bits);
        if (drawn < n) return drawn;
    }
}

void mersenne_shuffle(Mersenne *m, int64_t *items, int64_t n) {
    for (int64_t i = n - 1; i > 0; i--) {
        int64_t j = mersenne_below(m, i + 1), held = items[i];
        items[i] = items[j];
        items[j] = held;
    }
}

/* Small populations are copied and picked from, large ones drawn from until nothing repeats. */
void mersenne_sample(Mersenne *m, int64_t *picked, int64_t n, int64_t k) {
    int64_t small = 21, power = 1;
    CHECK(k <= n, "a sample of %lld from %lld", (long long)k, (long long)n);
    while (power < 3 * k) power *= 4;
    if (k > 5) small += power;
    if (n <= small) {
        int64_t *pool = must_malloc((size_t)n * sizeof *pool);
        for (int64_t i = 0; i < n; i++) pool[i] = i;
        for (int64_t i = 0; i < k; i++) {
            int64_t j = mersenne_below(m, n - i);
            picked[i] = pool[j];
            pool[j] = pool[n - i - 1];
        }
        free(pool);
        return;
    }
    for (int64_t i = 0; i < k; i++)
        for (bool again = true; again;) {
            picked[i] = mersenne_below(m, n);
            again = false;
            for (int64_t j = 0; j < i; j++) again |= picked[j] == picked[i];
        }
}

void mersenne_choices(Mersenne *m, int64_t *picked, int64_t n, int64_t k) {
    for (int64_t i = 0; i < k; i++) picked[i] = (int64_t)(mersenne_random(m) * (double)n);
}
