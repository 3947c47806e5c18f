/* half.h - the two 16-bit floats as bits. */
#ifndef HALF_H
#define HALF_H

#include <stdint.h>

#ifndef __cplusplus /* CUDA's sources have their own */
static inline float f16_to_f32(uint16_t bits) {
    union {
        uint16_t u;
        _Float16 f;
    } value = {bits};
    return (float)value.f;
}

static inline uint16_t f32_to_f16(float value) {
    union {
        _Float16 f;
        uint16_t u;
    } bits = {(_Float16)value};
    return bits.u;
}

static inline float bf16_to_f32(uint16_t bits) {
    union {
        uint32_t u;
        float f;
    } value = {(uint32_t)bits << 16};
    return value.f;
}

/* Round to nearest, ties to even; NaN stays NaN. */
static inline uint16_t f32_to_bf16(float value) {
    union {
        float f;
        uint32_t u;
    } bits = {value};
    if ((bits.u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits.u >> 16 | 0x40);
    return (uint16_t)((bits.u + 0x7fff + (bits.u >> 16 & 1)) >> 16);
}

#endif

#endif
