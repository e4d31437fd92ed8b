# A tour of what a system does, in busybox: each step fails the script where the system does not do it right.
set -e
step() { echo "step: $*"; }

step kernel messages without complaints
if dmesg | grep -iE 'warning|oops|BUG:|soft lockup|call trace|unstable|clocksource.*skew|rcu.*stall'; then
    exit 1
fi

step check sums of files
cd /doppel && sha256sum -c sums && cd /

step fork and exec
n=0
while [ $n -lt 200 ]; do
    n=$((n + 1))
    [ "$(/bin/busybox echo $n)" = $n ]
done

step pipes
[ "$(seq 1 20000 | sort -rn | awk '{ s += $1 } END { print s }')" = 200010000 ]
dd if=/dev/zero bs=64k count=64 2>/dev/null | gzip | gunzip | wc -c | grep -qx 4194304

step signals
got=
trap 'got=$got.usr1' USR1
kill -USR1 $$
kill -USR1 $$
[ "$got" = .usr1.usr1 ]
sleep 100 & kill $!
set +e
wait $!
[ $? = 143 ] || exit 1
timeout 1 sh -c 'while :; do :; done'
[ $? = 143 ] || exit 1
set -e

step time goes on
uptime() { cut -d ' ' -f 1 /proc/uptime | tr -d .; }
before=$(uptime)
sleep 0.3
after=$(uptime)
[ $((after - before)) -ge 29 ]
[ $((after - before)) -lt 300 ]

step clocks of the machine
source=/sys/devices/system/clocksource/clocksource0
usual=$(cat $source/current_clocksource)
for clock in hpet acpi_pm; do
    grep -qw $clock $source/available_clocksource
    echo $clock >$source/current_clocksource
    [ "$(cat $source/current_clocksource)" = $clock ]
    before=$(uptime)
    sleep 0.3
    after=$(uptime)
    [ $((after - before)) -ge 29 ]
    [ $((after - before)) -lt 300 ]
done
echo $usual >$source/current_clocksource

step memory and files
dd if=/dev/urandom of=/tmp/a bs=1M count=8 2>/dev/null
cp /tmp/a /tmp/b
cmp /tmp/a /tmp/b
rm /tmp/a /tmp/b

step drivers and file systems as modules
modprobe loop
dd if=/dev/zero of=/tmp/image bs=1M count=16 2>/dev/null
mke2fs -q -F /tmp/image >/dev/null
mount -o loop -t ext2 /tmp/image /mnt || { modprobe ext4 && mount -o loop -t ext4 /tmp/image /mnt; }
cp /bin/busybox /mnt/
cmp /bin/busybox /mnt/busybox
umount /mnt

step done
