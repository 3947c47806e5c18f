/* store_layout.h - what building a store and reading it have in common. */
#ifndef STORE_LAYOUT_H
#define STORE_LAYOUT_H

#include "data/store.h"

#define STORE_VERSION 2

/* Everything that changes what rows become, as text: equal texts make equal samples. Caller frees.
 */
char *store_settings(const DataConfig *c, int64_t seed);

/* The source file of that number: those of train, then those of eval. */
const char *store_source_at(const DataConfig *c, int i);

/* A set but for its slots, checked. */
Status store_read_set(H5File *f, const char *name, SampleSet *set);
void store_free_set(SampleSet *set);

#endif
