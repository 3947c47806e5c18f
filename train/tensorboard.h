/* tensorboard.h - event records as TensorBoard reads them. */
#ifndef TENSORBOARD_H
#define TENSORBOARD_H

#include "kernels/status.h"

#include <stdint.h>
#include <stdio.h>

/* Writes the record that opens an event file. */
Status event_write_version(FILE *file);

/* Writes one scalar: length, masked CRC-32C of it, the protobuf record, masked CRC-32C of that. */
Status event_write_scalar(FILE *file, int64_t step, const char *tag, float value);

#endif
