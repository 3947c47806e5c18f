#!/bin/sh
# gpu.sh - everything that needs a GPU, in stages that each take less than ten minutes.
#
#   bench/gpu.sh STAGE... [-- FILE]     stages: parity memcheck attention train qlora decode peers
#
# Takes the static program and the runner of the CUDA build (`make static`, `make CUDA=1 runner`) where
# they are, else builds the CUDA build here. What a stage measures is added to FILE, by default
# bench/results/DATE-gpu.md. Weights are random and drawn on the GPU: no file is needed.
set -eu
cd "$(dirname "$0")/.."
program=build/static/lapidary
[ -x "$program" ] || program=build/cuda/lapidary
[ -x "$program" ] || { make -j"$(nproc)" CUDA=1 all runner; program=build/cuda/lapidary; }
stages= file="bench/results/$(date +%Y-%m-%d)-gpu.md"
while [ $# -gt 0 ]; do
    case $1 in
    --) file=$2; shift ;;
    *) stages="$stages $1" ;;
    esac
    shift
done
[ -n "$stages" ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }

# A line for the person and for the file.
say() { printf '%s\n' "$*" | tee -a "$file"; }

# The program with --device cuda; what it prints, or that it failed and why.
measure() {
    "$program" "$@" --device cuda 2>gpu-error.txt | tee -a "$file" ||
        say "failed: $* ($(tail -1 gpu-error.txt))"
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
        BACKEND=cuda tests/run.sh gpu. 2>&1 | tee -a "$file" || true
        ;;
    memcheck) # one step of each variant under the sanitizer
        compute-sanitizer --error-exitcode 9 build/cuda/tests/run gpu.a_lora_step 2>&1 | tail -5 | tee -a "$file"
        compute-sanitizer --error-exitcode 9 build/cuda/tests/run gpu.a_full_step 2>&1 | tail -5 | tee -a "$file"
        compute-sanitizer --tool racecheck build/cuda/tests/run gpu.attention_of_heads 2>&1 | tail -5 | tee -a "$file"
        ;;
    attention) # beside torch's, which takes cuDNN where it can
        measure bench attention --tokens 4096
        python3 bench/gpu_peers.py attention 2>&1 | tee -a "$file" || true
        ;;
    train) # LoRA, rank 16, bf16; 989 TFLOP/s is an H200's limit without sparsity
        for preset in e2b e4b 26b-a4b 31b; do
            measure bench --preset $preset --train lora --rank 16 --tokens 4096
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
    peers) # transformers and peft on the same shapes
        python3 bench/gpu_peers.py train 2>&1 | tee -a "$file" || true
        ;;
    *)
        say "no stage $stage"
        ;;
    esac
    say '```'
done
rm -f gpu-error.txt
