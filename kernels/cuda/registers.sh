#!/bin/sh
# registers.sh - a table of kernels from the logs of `ptxas -v`: architecture, registers, bytes of
# stack, spilled bytes, static shared memory.
set -eu
awk '
/Compiling entry function/ { split($0, part, "\047"); name = part[2]; arch = part[4] }
/bytes stack frame/ { stack = $1; spill = $5 + $9 }
/Used [0-9]+ registers/ {
    shared = 0
    for (i = 1; i <= NF; i++) {
        if ($i == "registers,") registers = $(i - 1)
        if ($i == "bytes" && $(i + 1) ~ /^smem/) shared = $(i - 1)
    }
    print arch, registers, stack, spill, shared, name
}' "$@" | c++filt | sed 's/([A-Za-z]*)\([0-9]\)/\1/g; s/(.*//; s/void //' | sort -u -k6 -k1,1 |
awk 'BEGIN { printf "%-7s %9s %5s %5s %7s  %s\n", "arch", "registers", "stack", "spill", "shared", "kernel" }
{ name = $6; for (i = 7; i <= NF; i++) name = name " " $i
  printf "%-7s %9d %5d %5d %7d  %s\n", $1, $2, $3, $4, $5, name; spilled += $4 }
END { printf "%d kernels, %d bytes spilled\n", NR, spilled }'
