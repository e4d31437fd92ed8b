#!/bin/sh
# Looks whether the system works: every CPU there is, arithmetic, files, processes, the clock. Any failure ends it.
set -eu
step="start"
# What is said last is still on its way to the serial line when the port is written that ends the machine.
trap '[ "$step" = end ] || echo "systems: failed at $step"; sleep 0.5' EXIT
echo "systems: $(uname -srm)"
for word in $(cat /proc/cmdline); do
    case $word in systems.cpus=*) cpus=${word#*=} ;; esac
done
step="number of CPUs"
[ "$(nproc)" = "$cpus" ]

# SHA-256 of 4 MiB of zeros, on each CPU in turn, then on all at once.
step=arithmetic
zeros=bb9f8df61474d25e71fa00722318cd387396ca1736605e1248821cc0de3d3af8
digest() {
    sum=$(taskset -c "$1" sh -c 'dd if=/dev/zero bs=64k count=64 2>/dev/null | sha256sum')
    [ "${sum%% *}" = "$zeros" ]
}
cpu=0
while [ "$cpu" -lt "$cpus" ]; do
    digest "$cpu"
    cpu=$((cpu + 1))
done
cpu=0
jobs=
while [ "$cpu" -lt "$cpus" ]; do
    digest "$cpu" &
    jobs="$jobs $!"
    cpu=$((cpu + 1))
done
for job in $jobs; do wait "$job"; done

# What is compressed comes back, through processes and pipes.
step=processes
seq 1 50000 >/tmp/numbers
gzip -c /tmp/numbers | gunzip -c | cmp - /tmp/numbers
[ "$(awk '{ sum += 1 / $1 } END { printf "%.9f", sum }' /tmp/numbers)" = 11.397003949 ]
mkdir /tmp/many
for n in $(seq 1 200); do echo "$n" >"/tmp/many/$n"; done
[ "$(cat /tmp/many/* | wc -l)" = 200 ]

# The clock goes on while it sleeps, and not by leaps.
step=clock
hundredths() {
    cut -d ' ' -f 1 /proc/uptime | tr -d . | sed 's/^0*//'
}
before=$(hundredths)
sleep 0.2
after=$(hundredths)
[ $((after - before)) -ge 20 ] && [ $((after - before)) -le 3000 ]

# What only this system has.
step=more
if [ -x /doppel/more ]; then /doppel/more; fi
step=end
echo "systems: passed"
