/* fixture.h - reading the HDF5 fixtures that tests/oracle makes. */
#ifndef FIXTURE_H
#define FIXTURE_H

#include "formats/checkpoint.h"
#include "model/step.h"
#include "tests/test.h"

#include <hdf5.h>

typedef struct Fixture {
    hid_t file;
    char dir[300]; /* the model of the fixture as a checkpoint folder */
} Fixture;

/* Opens tests/fixtures/NAME and lays out its checkpoint in the test's folder. */
Fixture fixture_open(const char *name);

/* Opens tests/fixtures/NAME, which holds no model. */
Fixture fixture_open_plain(const char *name);

bool fixture_has(const Fixture *f, const char *name);

/* A whole dataset; *count elements. Caller frees. */
float *fixture_floats(const Fixture *f, const char *name, int64_t *count);
int32_t *fixture_ints(const Fixture *f, const char *name, int64_t *count);
uint8_t *fixture_bytes(const Fixture *f, const char *name, int64_t *count);

/* Writes a byte dataset to dir/file. */
void fixture_write(const Fixture *f, const char *name, const char *dir, const char *file);

/* Numbers in [-1, 1) of stream t, made by a formula in the oracle too. */
float fixture_formula(uint32_t t, uint32_t i);

#define FIXTURE_ROWS 800

/* The fixture's sequences as one packed batch. */
typedef struct Packed {
    Batch batch;
    int32_t ids[FIXTURE_ROWS], positions[FIXTURE_ROWS], starts[FIXTURE_ROWS], targets[FIXTURE_ROWS],
        spans[FIXTURE_ROWS];
    float weights[FIXTURE_ROWS], nll[FIXTURE_ROWS];
    int64_t scored;
} Packed;

/* All of its sequences, or the one numbered `only` (-1: all). Caller frees. */
Packed *fixture_batch(const Fixture *f, int only);

#endif
