#!/bin/sh
# tests/run.sh - runs the built test runner (BACKEND=cuda: that of the CUDA build, static: of `make static`); last lines are "N skipped" and "N passed, N failed".
set -eu
cd "$(dirname "$0")/.."
build=build/${SANITIZE:-${BACKEND:-cpu}}
# The program whose device `cuda` is the emulator, or a GPU in a CUDA build.
gpu_program=$build/lapidary-simt
[ "${BACKEND:-cpu}" = cpu ] || gpu_program=$build/lapidary
export LAPIDARY_GPU_PROGRAM=${LAPIDARY_GPU_PROGRAM:-$gpu_program}
export LAPIDARY_PROGRAM=${LAPIDARY_PROGRAM:-$build/lapidary}
if [ "${1:-}${SANITIZE:-}" = quicktsan ]; then
    shift
    set -- gpu.experts gpu.embedding gpu.updates gpu.several_norms gpu.norms_in_pairs gpu.heads gpu.gradients_of_heads gpu.gates_with_codes \
        gpu.products_with gpu.attention_of_heads_of_512 gpu.attention_in_slabs gpu.attention_of_one_query "$@"
elif [ "${1:-}" = quick ]; then
    shift
    set -- step. invariant. kernel_ safetensors. adapter. node. run_config. model_config. rows. store. loader. fuzz. text. json. golden.answers "$@"
fi
# oneDNN and libgomp keep what they made until the end; only leaks of our own count.
export ASAN_OPTIONS=${ASAN_OPTIONS:-detect_leaks=0} UBSAN_OPTIONS=${UBSAN_OPTIONS:-print_stacktrace=1}
# Kernels under the emulator are watched for races, and nothing else is: the CPU's have one thread then. The first race ends a case.
if [ "${SANITIZE:-}" = tsan ]; then
    export OMP_NUM_THREADS=1 TSAN_OPTIONS=${TSAN_OPTIONS:-halt_on_error=1}
fi
# Cases run at a time (TEST_JOBS of them, else as many as there are processors): waiting threads leave those to the others.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
# ThreadSanitizer wants addresses where it expects them; some systems do not let go of their random ones, which most often suit it.
if [ "${SANITIZE:-}" = tsan ] && setarch -R true 2>/dev/null; then
    exec setarch -R "$build/tests/run" "$@"
fi
exec "$build/tests/run" "$@"
