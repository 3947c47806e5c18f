#!/bin/sh
# hosts.sh - two network namespaces as two hosts of Open MPI, each with an address of its own.
#
#   tests/hosts.sh up ID               makes them, ID a process that is there as long as they are; status 77 where that is not permitted
#   tests/hosts.sh run ID ARGUMENTS    mpirun on the first, over TCP, two ranks on each
#   tests/hosts.sh cut ID              takes the cable away
#   tests/hosts.sh down ID             ends what runs there, and removes them
#   tests/hosts.sh agent ID HOST COMMAND   what mpirun calls to reach the other
set -eu
what=$1 id=$2
shift 2
a=lapidary-$id-a b=lapidary-$id-b first=10.77.0.1 second=10.77.0.2
case $what in
up)
    for old in $(ip netns list 2>/dev/null | sed -n 's/^lapidary-\([0-9]*\)-a.*/\1/p'); do # of tests that were ended
        [ -d "/proc/$old" ] || "$0" down "$old"
    done
    [ "$(id -u)" = 0 ] && command -v ip >/dev/null && ip netns add "$a" 2>/dev/null || exit 77
    { ip netns add "$b" && ip link add "l$id.a" type veth peer name "l$id.b" && ip link set "l$id.a" netns "$a" &&
        ip link set "l$id.b" netns "$b"; } 2>/dev/null || { "$0" down "$id"; exit 77; }
    ip -n "$a" addr add $first/24 dev "l$id.a"
    ip -n "$b" addr add $second/24 dev "l$id.b"
    for end in "$a l$id.a" "$b l$id.b"; do
        ip -n "${end% *}" link set lo up
        ip -n "${end% *}" link set "${end#* }" up
    done
    ;;
run)
    exec ip netns exec "$a" mpirun --allow-run-as-root --oversubscribe --bind-to none \
        --mca plm_rsh_agent "$0 agent $id" --mca btl tcp,self --mca btl_tcp_if_include $first/24 \
        --mca oob_tcp_if_include $first/24 -H $first:2,$second:2 "$@"
    ;;
cut)
    ip -n "$a" link set "l$id.a" down
    ;;
down)
    for name in "$a" "$b"; do
        ip netns pids "$name" 2>/dev/null | xargs -r kill -KILL 2>/dev/null || true
        ip netns del "$name" 2>/dev/null || true
    done
    ;;
agent)
    host=$1
    shift
    [ "$host" = $first ] && name=$a || name=$b
    exec ip netns exec "$name" sh -c "$*"
    ;;
esac
