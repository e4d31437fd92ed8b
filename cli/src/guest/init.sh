#!/bin/sh
# The first process of Doppel's default guest: mounts, drivers, then a script if there is one, else a shell.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
/bin/busybox --install -s
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
ln -sf /proc/self/fd /dev/fd
hostname doppel
ip link set lo up

# Load a driver for each device that asks for one; a driver may find further devices.
drivers() {
    cat $(find /sys/devices -name modalias) 2>/dev/null | sort -u
}
known=
while asking=$(drivers) && [ "$asking" != "$known" ]; do
    known=$asking
    for alias in $asking; do
        modprobe -q "$alias" 2>/dev/null
    done
done

# A network card: ask for an address, without waiting for the answer.
if [ -e /sys/class/net/eth0 ]; then
    ip link set eth0 up
    udhcpc -i eth0 -b -S -t 5 -T 1 -s /etc/udhcpc.sh >/dev/null 2>&1 &
fi

# /doppel/script, from an archive appended to this one, runs instead of a shell. Its exit status goes to the
# debug-exit port as 16 + status; without that port the guest powers off.
if [ -x /doppel/script ]; then
    /doppel/script </dev/null
    status=$?
    sync
    debug-exit $((16 + (status & 63)))
    poweroff -f
fi

# doppel.tty=ROWSxCOLUMNS,TERM: a serial line cannot carry the size and kind of the terminal, so doppel says them here.
export TERM=vt220
for word in $(cat /proc/cmdline); do
    case $word in
    doppel.tty=*)
        word=${word#doppel.tty=}
        size=${word%%,*}
        TERM=${word#*,}
        stty rows "${size%x*}" cols "${size#*x}" </dev/console
        ;;
    esac
done

echo
echo "Linux $(uname -r) in Doppel. This system lives in memory; leave the shell (exit, Ctrl-D) to power off."
echo "After a change of the window's size run: resize"
cd /root
setsid cttyhack sh -l
poweroff -f
