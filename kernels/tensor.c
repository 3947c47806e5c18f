/* tensor.c - making views and describing them. */
#include "kernels/tensor.h"

#include <inttypes.h>
#include <stdio.h>

const char *dtype_name(DType dtype) {
    static const char *const names[DTYPE_COUNT] = {
        "f32",          "bf16",         "i32",      "u8",
        "f16",          "q4_0",         "q8_0",     "q4_K",
        "q5_K",         "q6_K",         "nf4",      "nf4 (nested)",
        "q4_0 (tiled)", "q8_0 (tiled)", "dynamic8", "dynamic8 (unsigned)"};
    return dtype < DTYPE_COUNT ? names[dtype] : "?";
}

bool dtype_fits(DType dtype, int64_t rows, int64_t cols) {
    if (dtype_is_tiled(dtype)) return rows % TILE_HEIGHT == 0 && cols % TILE_WIDTH == 0;
    if (dtype == NF4_NESTED) return rows * cols % 64 == 0;
    return (dtype == NF4 ? rows * cols : cols) % dtype_block(dtype).count == 0;
}

DType dtype_tiled(DType dtype) {
    return dtype == Q4_0 ? Q4_0_TILED : dtype == Q8_0 ? Q8_0_TILED : dtype;
}

DType dtype_untiled(DType dtype) {
    return dtype == Q4_0_TILED ? Q4_0 : dtype == Q8_0_TILED ? Q8_0 : dtype;
}

Tensor tensor_make(void *data, DType dtype, int ndim, const int64_t *shape) {
    CHECK(ndim <= 4, "a tensor has %d dimensions", ndim);
    Tensor t = {.data = data, .device = device_cpu(), .dtype = dtype, .ndim = ndim};
    for (int i = 0; i < ndim; i++) t.shape[i] = shape[i];
    return t;
}

Tensor tensor_reshape(Tensor t, int ndim, const int64_t *shape) {
    int64_t count = tensor_count(t);
    bool placed = t.device != NULL;
    t.ndim = ndim;
    for (int i = 0; i < ndim; i++) t.shape[i] = shape[i];
    CHECK(!placed || tensor_count(t) == count, "reshape from %" PRId64 " to %" PRId64 " elements",
          count, tensor_count(t));
    return t;
}

Tensor tensor_slice(Tensor t, int64_t first, int64_t count) {
    if (!t.device) return t;
    CHECK(first >= 0 && count >= 0 && first + count <= t.shape[0],
          "slice %" PRId64 "+%" PRId64 " of %s", first, count, tensor_text(t));
    DTypeBlock block = dtype_block(t.dtype);
    int64_t inner = t.shape[0] ? tensor_count(t) / t.shape[0] : 0;
    if (t.dtype == NF4_NESTED) {
        t.origin += first * inner;
    } else {
        CHECK(first * inner % block.count == 0 &&
                  (!dtype_is_tiled(t.dtype) || first * (inner / tensor_cols(t)) % TILE_HEIGHT == 0),
              "a slice of %s begins inside a block", tensor_text(t));
        if (t.data) t.data = (char *)t.data + (size_t)(first * inner / block.count) * block.bytes;
    }
    t.shape[0] = count;
    return t;
}

Tensor tensor_at(Tensor t, int64_t index) {
    t = tensor_slice(t, index, 1);
    t.ndim--;
    for (int i = 0; i < t.ndim; i++) t.shape[i] = t.shape[i + 1];
    return t;
}

static bool is_measured(Tensor t) {
    return t.device->kind == DEVICE_MEASURE;
}

void tensor_write(Tensor to, const void *from) {
    if (!is_measured(to)) device_copy(to.device, to.data, device_cpu(), from, tensor_bytes(to));
}

void tensor_read(void *to, Tensor from) {
    if (!is_measured(from))
        device_copy(device_cpu(), to, from.device, from.data, tensor_bytes(from));
}

void tensor_copy(Tensor to, Tensor from) {
    CHECK(tensor_bytes(to) == tensor_bytes(from), "copy of %s into %s", tensor_text(from),
          tensor_text(to));
    if (!is_measured(to) && !is_measured(from))
        device_copy(to.device, to.data, from.device, from.data, tensor_bytes(to));
}

float tensor_first(Tensor t) {
    union {
        float f32;
        uint16_t bf16;
    } value[1] = {{0}};
    if (is_measured(t)) return 0;
    device_copy(device_cpu(), value, t.device, t.data, dtype_size(t.dtype));
    return t.dtype == F32 ? value->f32 : bf16_to_f32(value->bf16);
}

const void *tensor_host(Tensor t, void *buffer) {
    if (t.device->kind == DEVICE_CPU) return t.data;
    tensor_read(buffer, t);
    return buffer;
}

Status tensor_stage(Tensor *host, Tensor t) {
    *host = t;
    if (t.device->kind == DEVICE_CPU) return OK;
    host->device = device_cpu();
    host->data = device_allocate(device_cpu(), tensor_bytes(t));
    if (!host->data)
        FAIL(ERR_IO, "out of memory: %zu bytes to hold %s", tensor_bytes(t), tensor_text(t));
    return OK;
}

void tensor_unstage(Tensor t, Tensor host, bool failed) {
    if (t.device->kind == DEVICE_CPU) return;
    if (!failed) tensor_write(t, host.data);
    device_release(device_cpu(), host.data, tensor_bytes(t));
}

const char *tensor_text(Tensor t) {
    static _Thread_local char buffers[4][112];
    static _Thread_local unsigned turn;
    char *text = buffers[turn++ % 4];
    int used = snprintf(text, sizeof buffers[0], "(");
    for (int i = 0; i < t.ndim; i++)
        used += snprintf(text + used, sizeof buffers[0] - (size_t)used, "%s%" PRId64, i ? ", " : "",
                         t.shape[i]);
    snprintf(text + used, sizeof buffers[0] - (size_t)used, ") %s", dtype_name(t.dtype));
    return text;
}
