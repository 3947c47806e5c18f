#!/bin/sh
# gpu.sh - everything that needs a GPU, in stages that each take less than ten minutes.
#
#   bench/gpu.sh STAGE... [-- FILE]     stages: parity memcheck attention train long full qlora decode turns peers peers4 kernels
#
# Takes what `make static` built, else builds for this machine. What a stage measures is added to FILE,
# by default bench/results/DATE-gpu.md. Weights are random and drawn on the GPU: no file is needed.
set -eu
cd "$(dirname "$0")/.."
build=build/static
[ -x $build/lapidary ] || build=build/cuda
[ -x $build/lapidary ] || make -j"$(nproc)" CUDA=1 all runner
program=$build/lapidary
stages= file="bench/results/$(date +%Y-%m-%d)-gpu.md" errors=$(mktemp)
trap 'rm -f "$errors"' EXIT
while [ $# -gt 0 ]; do
    case $1 in
    --) file=$2; shift ;;
    *) stages="$stages $1" ;;
    esac
    shift
done
[ -n "$stages" ] || { sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2; }

# A line for the person and for the file.
say() { printf '%s\n' "$*" | tee -a "$file"; }

# The program with --device cuda; what it prints, or that it failed and why.
measure() {
    "$program" "$@" --device cuda 2>"$errors" | tee -a "$file"
    [ -s "$errors" ] && say "$*: $(tail -1 "$errors")" || true
}

# Cases of the tests under one of compute-sanitizer's tools; its last lines.
sanitize() {
    tool=$1
    shift
    say "$tool: $*"
    compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 9 $build/tests/run "$@" 2>&1 | tail -3 | tee -a "$file"
}

if [ ! -e "$file" ]; then
    mkdir -p "$(dirname "$file")"
    say "# $(date +%Y-%m-%d), GPU"
    say
    say "$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo 'no nvidia-smi')"
fi

for stage in $stages; do
    say
    say "## $stage"
    say
    say '```'
    case $stage in
    parity) # each kernel, and whole steps, runs and answers, against the CPU
        BACKEND=${build#build/} tests/run.sh gpu. 2>&1 | tee -a "$file" || true
        ;;
    memcheck) # kernels and a step of each variant; attention's and grouped products' shared memory
        sanitize memcheck gpu.a_lora gpu.a_full gpu.attention gpu.products gpu.experts gpu.rmsnorm gpu.cross gpu.updates
        sanitize racecheck gpu.attention_of_heads gpu.products_of_groups
        ;;
    attention) # beside torch's, which takes cuDNN where it can
        measure bench attention --tokens 4096
        python3 bench/gpu_peers.py attention 2>/dev/null | tee -a "$file" || true
        ;;
    train) # LoRA, rank 16, bf16; 989 TFLOP/s is an H200's limit without sparsity
        for preset in e2b e4b 12b 26b-a4b 31b; do
            measure bench --preset $preset --train lora --rank 16 --tokens 4096
        done
        ;;
    long) # layers' inputs on the GPU, and in the host's memory
        for place in --recompute --offload; do
            measure bench --preset 31b --layers 24 --train lora --rank 16 --tokens 16384 $place
        done
        ;;
    full) # all weights: 8-bit states, no masters, a layer's gradients at a time
        for preset in e2b 12b 31b; do
            measure bench --preset $preset --train full --tokens 4096 --lean --recompute
        done
        ;;
    qlora)
        for preset in 26b-a4b 31b; do
            measure bench --preset $preset --train qlora --rank 16 --tokens 2048 --recompute
        done
        ;;
    decode) # one sequence; and sixteen
        for preset in e2b e4b 26b-a4b 31b; do
            for weights in bf16 q4_0; do
                measure bench --preset $preset --weights $weights --tokens 64
            done
        done
        measure bench --preset e2b --weights q4_0 --tokens 64 --sequences 16
        ;;
    turns) # beside the program that BEFORE names: machines, and minutes, differ by more than most changes do
        now=$program
        for turn in 1 2; do
            for program in "${BEFORE:?the program to compare with}" "$now"; do
                say "$program"
                measure bench attention --tokens 4096
                for preset in e2b 26b-a4b; do
                    measure bench --preset $preset --train lora --rank 16 --tokens 4096
                done
                measure bench --preset 31b --weights q4_0 --tokens 64
            done
        done
        program=$now
        ;;
    peers) # transformers and peft on the same shapes
        python3 bench/gpu_peers.py train 2>/dev/null | tee -a "$file" || true
        ;;
    peers4) # QLoRA with bitsandbytes, where that can be imported
        python3 bench/gpu_peers.py train --bits 4 --tokens 2048 --presets 26b-a4b,31b 2>/dev/null | tee -a "$file" || true
        ;;
    kernels) # which take the time (kernel_times.c)
        for preset in e2b 26b-a4b; do
            say "$preset, LoRA"
            CUDA_INJECTION64_PATH=$PWD/$build/kernel_times.so KERNEL_TIMES_TOP=25 \
                "$program" bench --preset $preset --train lora --rank 16 --tokens 4096 --device cuda 2>&1 >/dev/null | tee -a "$file"
        done
        ;;
    *)
        say "no stage $stage"
        ;;
    esac
    say '```'
done
