/* kernel.h - a kernel is declared once and implemented once per device.
 *
 * KERNEL(name, arguments) declares
 *   name                    the front: checks the contract, then picks the device's twin
 *   cpu_name_generic/...    the CPU twin, compiled from one source at three instruction levels of
 *                           the architecture
 *   cuda_name               the CUDA twin (linked only into a CUDA build)
 * so that a missing twin is a link error and a changed signature is a compile error in every twin.
 * A front ends with ON_DEVICE(tensor, name)(arguments); a file in kernels/cpu defines CPU(name). */
#ifndef KERNEL_H
#define KERNEL_H

#include "kernels/tensor.h"

#ifdef __aarch64__
#define CPU_TWINS(name)                                                                            \
    { cpu_##name##_generic, cpu_##name##_dotprod, cpu_##name##_i8mm }
#define DECLARE_TWINS(name, ...)                                                                   \
    void cpu_##name##_generic(__VA_ARGS__);                                                        \
    void cpu_##name##_dotprod(__VA_ARGS__);                                                        \
    void cpu_##name##_i8mm(__VA_ARGS__)
#else
#define CPU_TWINS(name)                                                                            \
    { cpu_##name##_generic, cpu_##name##_avx2, cpu_##name##_avx512, cpu_##name##_avx512 }
#define DECLARE_TWINS(name, ...)                                                                   \
    void cpu_##name##_generic(__VA_ARGS__);                                                        \
    void cpu_##name##_avx2(__VA_ARGS__);                                                           \
    void cpu_##name##_avx512(__VA_ARGS__)
#endif

#define KERNEL(name, ...)                                                                          \
    void name(__VA_ARGS__);                                                                        \
    DECLARE_TWINS(name, __VA_ARGS__);                                                              \
    void cuda_##name(__VA_ARGS__)

#define ON_CPU(name) (((__typeof__(&cpu_##name##_generic)[CPU_LEVELS])CPU_TWINS(name))[cpu_level()])

#ifdef LAPIDARY_CUDA
#define PICK_TWIN(tensor, name) ((tensor).device->kind == DEVICE_CUDA ? cuda_##name : ON_CPU(name))
#else
#define PICK_TWIN(tensor, name) (ON_CPU(name))
#endif

/* In a front, last: calls the twin where the tensor lives, or returns when it is only measured. */
#define ON_DEVICE(tensor, name)                                                                    \
    if ((tensor).device->kind == DEVICE_MEASURE) return;                                           \
    PICK_TWIN(tensor, name)

#endif
