/* tensorboard.c - TFRecord framing around the messages of event.proto. */
#include "train/tensorboard.h"
#include "train/event.pb-c.h"

#include <stdlib.h>
#include <time.h>

static uint32_t crc32c(const uint8_t *bytes, size_t size) {
    uint32_t crc = ~0u;
    for (size_t i = 0; i < size; i++) {
        crc ^= bytes[i];
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
    }
    return ~crc;
}

static uint32_t masked(const uint8_t *bytes, size_t size) {
    uint32_t crc = crc32c(bytes, size);
    return (crc >> 15 | crc << 17) + 0xa282ead8u;
}

static void put_little(uint8_t *out, uint64_t value, int bytes) {
    for (int i = 0; i < bytes; i++) out[i] = (uint8_t)(value >> (8 * i));
}

static Status write_event(FILE *file, const Lapidary__Event *event) {
    size_t size = lapidary__event__get_packed_size(event);
    uint8_t *record = must_malloc(size + 16);
    put_little(record, size, 8);
    put_little(record + 8, masked(record, 8), 4);
    lapidary__event__pack(event, record + 12);
    put_little(record + 12 + size, masked(record + 12, size), 4);
    bool good = fwrite(record, 1, size + 16, file) == size + 16 && fflush(file) == 0;
    free(record);
    return good ? OK : status_fail(ERR_IO, "TensorBoard events cannot be written");
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

Status event_write_version(FILE *file) {
    Lapidary__Event event = LAPIDARY__EVENT__INIT;
    event.wall_time = now();
    event.file_version = "brain.Event:2";
    return write_event(file, &event);
}

Status event_write_scalar(FILE *file, int64_t step, const char *tag, float value) {
    Lapidary__Scalar scalar = LAPIDARY__SCALAR__INIT, *values[] = {&scalar};
    Lapidary__Summary summary = LAPIDARY__SUMMARY__INIT;
    Lapidary__Event event = LAPIDARY__EVENT__INIT;
    scalar.tag = (char *)tag;
    scalar.simple_value = value;
    summary.n_value = 1;
    summary.value = values;
    event.wall_time = now();
    event.step = step;
    event.summary = &summary;
    return write_event(file, &event);
}
