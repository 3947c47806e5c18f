/* mersenne.h - CPython's random number generator, which harnesses draw few-shot examples with.
 *
 * MT19937 (Matsumoto and Nishimura 1998) under the methods of Python's `random` module, bit for
 * bit: only for rules that are stated in terms of it. */
#ifndef MERSENNE_H
#define MERSENNE_H

#include <stdint.h>

typedef struct Mersenne {
    uint32_t state[624];
    int at;
} Mersenne;

/* random.seed(int) */
void mersenne_seed(Mersenne *m, uint64_t seed);

/* getrandbits(32), random(), _randbelow(n) */
uint32_t mersenne_bits(Mersenne *m);
double mersenne_random(Mersenne *m);
int64_t mersenne_below(Mersenne *m, int64_t n);

/* shuffle(list): items (n) change places. */
void mersenne_shuffle(Mersenne *m, int64_t *items, int64_t n);

/* sample(range(n), k) into picked (k); k <= n. */
void mersenne_sample(Mersenne *m, int64_t *picked, int64_t n, int64_t k);

/* choices(range(n), k=k) into picked (k). */
void mersenne_choices(Mersenne *m, int64_t *picked, int64_t n, int64_t k);

#endif
