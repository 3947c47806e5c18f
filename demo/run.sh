#!/bin/sh
# demo/run.sh - trains a tiny model, tunes it on a domain with LoRA, and shows what changed.
#
#   demo/run.sh                          the project's own corpus and a tiny model
#   MODEL=DIR DATA=FILE demo/run.sh      a real checkpoint and your rows, with the same steps
set -eu
cd "$(dirname "$0")/.."
program=./lapidary
out=${OUT:-runs/demo}

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

if [ -n "${MODEL:-}" ]; then
    : "${DATA:?give DATA=FILE.jsonl beside MODEL}"
    rm -rf "$out/lora"
    mkdir -p "$out"
    cat > "$out/lora.yaml" <<END
model: "$MODEL"
output: "$out/lora"
method: lora
data: {train: "$DATA", eval: 0.05, max_length: 512}
steps: ${STEPS:-20}
batch: {sequences: 1, accumulate: 1}
eval_every: 10
END
    say "LoRA of $MODEL on $DATA"
    $program train "$out/lora.yaml"
    base=$MODEL
    format=auto
    questions=
else
    say "1. A tiny E2B-shaped model with towers, trained on everyday questions and functions (demo/base.jsonl)"
    rm -rf "$out"
    $program init tiny "$out/start" --media --tokenizer demo/tokenizer --dtype f32
    $program train demo/base.yaml "model=$out/start" "output=$out/base"
    say "2. A LoRA on questions about minerals (demo/gems.jsonl); eval asks in wordings it never saw"
    $program train demo/lora.yaml "model=$out/base/model" "output=$out/lora"
    base=$out/base/model
    format=small
    questions='How hard is topaz?
Give the chemical formula of fluorite.
Which refractive index does diamond have?
In which system does zircon crystallise?'
fi

say "3. Merged checkpoint"
rm -rf "$out/merged"
$program export --model "$base" --adapter "$out/lora/adapter" --to safetensors --dtype f32 "$out/merged"

if [ -n "$questions" ]; then
    say "4. Before and after"
    printf '%s\n' "$questions" | while read -r question; do
        printf '\n  %s\n' "$question"
        printf '    before  %s\n' "$($program generate --model "$base" --dtype f32 --chat-format $format --max-tokens 24 "$question")"
        printf '    after   %s\n' "$($program generate --model "$base" --adapter "$out/lora/adapter" --dtype f32 --chat-format $format --max-tokens 24 "$question")"
        printf '    merged  %s\n' "$($program generate --model "$out/merged" --dtype f32 --chat-format $format --max-tokens 24 "$question")"
    done
fi

if [ -n "$questions" ]; then
    say "5. An exam of 60 held-out questions, before and after (demo/exam)"
    rm -rf "$out/exam-before" "$out/exam-after"
    tasks=demo/exam/gems_answer.yaml,demo/exam/gems_choice.yaml
    $program eval --model "$base" --tasks $tasks --data demo/exam --limit 60 --dtype f32 --chat-format $format --out "$out/exam-before" > /dev/null
    $program eval --model "$base" --adapter "$out/lora/adapter" --tasks $tasks --data demo/exam --limit 60 --dtype f32 --chat-format $format \
        --out "$out/exam-after" > /dev/null
    $program eval compare "$out/exam-before" "$out/exam-after"
fi

if [ -n "$questions" ]; then
    say "6. Charts that functions answer with, and spoken digits (demo/media), on the same model; the exam's charts are new to it"
    for what in charts digits; do
        $program train demo/$what.yaml "model=$base" "output=$out/$what"
        for adapter in "" "--adapter $out/$what/adapter"; do
            printf '\n  %s\n' "${adapter:-before}"
            $program eval --model "$base" $adapter --tasks demo/exam/${what}_exam.yaml --data demo/media/${what}_exam.jsonl \
                --dtype f32 --chat-format $format --temperature 0 --image-tokens 70 2> /dev/null
        done
    done
    question='Which stone sold best yesterday?'
    printf '\n  A conversation in which the function runs (demo/media/tools.json)\n\n> %s\n' "$question"
    printf '%s\ny\n' "$question" | $program chat --model "$base" --adapter "$out/charts/adapter" --dtype f32 \
        --chat-format $format --temperature 0 --image-tokens 70 --tools demo/media/tools.json
fi

say "Left for you"
printf '  adapter            %s\n  merged checkpoint  %s\n  curves             %s\n  metrics            %s\n' \
    "$out/lora/adapter" "$out/merged" "$out/lora/report.svg" "$out/lora/metrics.csv"
[ -z "$questions" ] || printf '  exam               %s\n' "$out/exam-after/report.html"
