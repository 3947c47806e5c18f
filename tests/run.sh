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
if [ "${1:-}" = quick ]; then
    shift
    set -- step. invariant. kernel_ safetensors. adapter. node. run_config. model_config. rows. store. loader. fuzz. text. json. golden.answers "$@"
fi
# oneDNN and libgomp keep what they made until the end; only leaks of our own count.
export ASAN_OPTIONS=${ASAN_OPTIONS:-detect_leaks=0} UBSAN_OPTIONS=${UBSAN_OPTIONS:-print_stacktrace=1}
# Cases run at a time (TEST_JOBS of them, else as many as there are processors): waiting threads leave those to the others.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
exec "$build/tests/run" "$@"
