#!/bin/sh
# ranks.sh - how a run scales over ranks, and how near its plan is: each number of ranks planned and run, in turn.
#
#   bench/ranks.sh RUN.yaml OUT "1 2 4 8" [key=value ...]
#
# The run file needs batch.accumulate of the most ranks. MPIRUN is what starts ranks (mpirun), PROGRAM what they run
# (./lapidary); LEVELS the levels of sharing (1). One JSON line for each: tokens per second (median of the steps but
# the first), planned, and the efficiency, tokens per second of a rank over those of a rank alone. On CPUs give each
# rank as many threads, alone or not: OMP_NUM_THREADS.
set -eu
[ $# -ge 3 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
cd "$(dirname "$0")/.."
run=$1 out=$2 numbers=$3
shift 3
program=${PROGRAM:-./lapidary} starter=${MPIRUN:-mpirun} alone=
for n in $numbers; do
    [ "$n" = 1 ] && start= || start="$starter -n $n"
    for level in ${LEVELS:-1}; do
        rm -rf "$out/$n-$level"
        plan=$($start $program plan "$run" "$@" $([ "$n" = 1 ] && echo --gpus 1) 2>/dev/null | grep "\"ranks\": $n, .*\"shard\": $level," |
            sed 's/.*"tokens_per_s": \([^}]*\)}.*/\1/')
        $start $program train "$run" output="$out/$n-$level" steps=6 parallel.shard="$level" "$@" >"$out-$n-$level.txt" 2>&1 ||
            { tail -3 "$out-$n-$level.txt" >&2; exit 1; }
        ran=$(sed 1,2d "$out/$n-$level/metrics.csv" | cut -d, -f10 | sort -g | sed -n 3p)
        [ "$n" = 1 ] && alone=$ran
        echo "$n $level $ran ${plan:-0} ${alone:-0}" | awk '{
            efficiency = "null"
            if ($5 + 0) efficiency = sprintf("%.2f", $3 / $1 / $5)
            printf "{\"ranks\": %d, \"shard\": %d, \"tokens_per_s\": %.1f, \"planned\": %.1f, \"efficiency\": %s}\n", $1, $2, $3, $4, efficiency }'
    done
done
