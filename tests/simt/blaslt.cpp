/* blaslt.cpp - the emulator's dense products: plain loops in place of cuBLASLt. */
#include "kernels/cuda/blaslt.h"

void simt_host_call(std::function<void()> work);

static float at(const void *p, DType dtype, int64_t i) {
    return dtype == F32 ? ((const float *)p)[i] : to_float(((const bf16 *)p)[i]);
}

void blaslt_matmul(const Device *device, Layout layout, void *y, DType y_dtype, int64_t y_stride,
                   Write write, const void *a, int64_t a_stride, const void *b, DType dtype,
                   int64_t M, int64_t N, int64_t K, float alpha) {
    cuda_stream(device);
    simt_host_call([=] {
        for (int64_t m = 0; m < M; m++)
            for (int64_t n = 0; n < N; n++) {
                float sum = 0;
                for (int64_t k = 0; k < K; k++)
                    sum += at(a, dtype, layout == TN ? k * a_stride + m : m * a_stride + k) *
                           at(b, dtype, layout == NT ? n * K + k : k * N + n);
                int64_t i = m * y_stride + n;
                sum = alpha * sum + (write == ADD ? at(y, y_dtype, i) : 0.0f);
                if (y_dtype == F32)
                    ((float *)y)[i] = sum;
                else
                    ((bf16 *)y)[i] = to_bf16(sum);
            }
    });
}
