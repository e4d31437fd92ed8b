# Several processors: found, in use, switched off and on again. $CPUS is how many there are.

fail() {
    echo "FAILED: $1"
    exit 1
}

[ "$(nproc)" = "$CPUS" ] || fail "$(nproc) processors"
[ "$(grep -c ^processor /proc/cpuinfo)" = "$CPUS" ] || fail "cpuinfo"
[ "$(cat /sys/devices/system/cpu/cpu0/topology/core_cpus_list)" = 0 ] || fail "cores"
[ "$(cat /sys/devices/system/cpu/cpu0/topology/package_cpus_list)" = "0-$((CPUS - 1))" ] || fail "packages"
echo "step: topology"

# One sum on each processor at the same time.
head -c 300000 /dev/zero > /zeros
expected=$(sha256sum < /zeros)
for n in $(seq 0 $((CPUS - 1))); do
    taskset -c "$n" sh -c 'sha256sum < /zeros > /sum.'"$n" &
done
wait
for n in $(seq 0 $((CPUS - 1))); do
    [ "$(cat "/sum.$n")" = "$expected" ] || fail "sum on $n"
done
echo "step: sums"

/doppel/parallel || fail "parallel"
echo "step: threads"

for cpu in /sys/devices/system/cpu/cpu[1-9]*/online; do
    echo 0 > "$cpu" || fail "switching $cpu off"
done
[ "$(nproc)" = 1 ] || fail "processors left"
/doppel/parallel counters || fail "on one"
for cpu in /sys/devices/system/cpu/cpu[1-9]*/online; do
    echo 1 > "$cpu" || fail "switching $cpu on"
done
[ "$(nproc)" = "$CPUS" ] || fail "processors back"
/doppel/parallel counters || fail "again"
echo "step: off and on"

[ "$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)" = tsc ] || fail "clock"
# (A busy host makes Linux say how long an interrupt took, here as in QEMU.)
dmesg -r | sed -n 's/^<[0-4]>\[[^]]*\] /warning: /p' | grep -v "hrtimer: interrupt took" > /warnings
cat /warnings
[ -s /warnings ] && fail "the kernel complains"
echo "step: done"
