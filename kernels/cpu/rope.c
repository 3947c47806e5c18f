/* rope.c - rotary tables and rotations. */
#include "kernels/rope.h"
#include "kernels/cpu/cpu.h"

void CPU(rope_table)(Tensor cos_table, Tensor sin_table, Tensor positions, float theta,
                     int64_t rotated, float factor) {
    int64_t half = tensor_cols(cos_table), N = tensor_count(positions);
    const int32_t *position = positions.data;
    float *c = cos_table.data, *s = sin_table.data, frequency[half];
    for (int64_t i = 0; i < half; i++) {
        double exponent = (double)i / (double)half;
        frequency[i] = i < rotated ? (float)(1.0 / pow((double)theta, exponent)) / factor : 0.0f;
    }
#pragma omp parallel for schedule(static) if (N > 4)
    for (int64_t n = 0; n < N; n++)
        for (int64_t i = 0; i < half; i++) {
            float angle = (float)position[n] * frequency[i];
            c[n * half + i] = i < rotated ? cosf(angle) : 1.0f;
            s[n * half + i] = i < rotated ? sinf(angle) : 0.0f;
        }
}

static void rotate(Tensor y, Tensor x, Tensor cos_table, Tensor sin_table, float sign) {
    int64_t axes = cos_table.ndim == 3 ? cos_table.shape[1] : 1;
    int64_t N = x.shape[0], runs = x.shape[1] * axes, C = x.shape[2] / axes, half = C / 2;
#pragma omp parallel for schedule(static) if (N > 4)
    for (int64_t n = 0; n < N; n++) {
        const float *c = (const float *)cos_table.data + n * axes * half,
                    *s = (const float *)sin_table.data + n * axes * half;
        float buffer[C], out[C];
        for (int64_t run = 0; run < runs; run++) {
            int64_t first = (n * runs + run) * C, turn_at = run % axes * half;
            const float *row = load_f32(buffer, x, first, C);
            turn_row(out, row, c + turn_at, s + turn_at, half, sign);
            store_f32(y, first, C, out);
        }
    }
}

void CPU(rope_forward)(Tensor y, Tensor x, Tensor cos_table, Tensor sin_table) {
    rotate(y, x, cos_table, sin_table, 1);
}

void CPU(rope_backward)(Tensor dx, Tensor dy, Tensor cos_table, Tensor sin_table) {
    rotate(dx, dy, cos_table, sin_table, -1);
}
