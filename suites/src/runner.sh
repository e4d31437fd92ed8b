#!/bin/sh
# Runs the tests of /suites/list from one of them on, each for so many seconds at most, and says how each ended.
# suites.from=N: the first N are left out. suites.patience=N: time limits are N times longer.
from=0
patience=1
for word in $(cat /proc/cmdline); do
    case $word in
    suites.from=*) from=${word#*=} ;;
    suites.patience=*) patience=${word#*=} ;;
    esac
done
export LANG=C.UTF-8 TMPDIR=/tmp ROOT= LD_LIBRARY_PATH=/suites/lib
ulimit -c 0
ulimit -l unlimited
# 2 MiB each, for the tests of huge pages.
if [ -d /suites/vm ]; then
    echo 144 >/proc/sys/vm/nr_hugepages
    mkdir -p /suites/vm/huge
    mount -t hugetlbfs none /suites/vm/huge
fi
# A number that begins with 0 would be octal.
hundredths() {
    sed 's/ .*//; s/\.//; s/^0*\(.\)/\1/' /proc/uptime
}
number=0
while IFS='|' read -r name seconds folder command; do
    number=$((number + 1))
    [ "$number" -gt "$from" ] || continue
    echo "suites: begin $name"
    begin=$(hundredths)
    (cd "/$folder" && exec timeout -k 5 $((seconds * patience)) sh -c "$command") </dev/null >/tmp/said 2>&1
    status=$?
    end=$(hundredths)
    if [ "$status" != 0 ]; then
        tail -n 60 /tmp/said | tr -cd '\11\12\40-\176' | sed 's/^/suites> /'
    fi
    echo "suites: end $name $status $((end - begin))"
done </suites/list
dmesg | grep -E 'BUG:|WARNING: CPU|Oops|soft lockup|rcu: INFO|Call Trace' | head -n 20 | sed 's/^/suites: kernel: /'
echo "suites: done"
# What is said last is still on its way to the serial line when the machine ends.
sleep 0.5
