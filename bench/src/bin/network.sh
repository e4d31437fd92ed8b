#!/bin/sh
# Measures the network from inside; a line for each result.
for word in $(cat /proc/cmdline); do
    case $word in
    iperf=*) iperf=${word#iperf=} ;;
    greeter=*) greeter=${word#greeter=} ;;
    esac
done
until ip route | grep -q default; do sleep 0.05; done
# The first packets are slow everywhere: ARP, code that runs for the first time.
ping -c 5 -i 0.1 10.0.2.2 >/dev/null
median=$(ping -c 40 -i 0.1 10.0.2.2 | grep -o 'time=[0-9.]*' | cut -c6- | sort -n | sed -n 20p)
echo "result ping $median"
rate() {
    iperf3 -c 10.0.2.2 -p "$iperf" -t 5 -O 1 -f m "$@" | grep receiver | grep -o '[0-9.]* Mbits' | cut -d' ' -f1
}
echo "result up $(rate)"
echo "result down $(rate -R)"
now() {
    cut -d' ' -f1 /proc/uptime | tr -d .
}
start=$(now)
n=0
while [ $n -lt 200 ]; do
    nc -w 5 10.0.2.2 "$greeter" </dev/null >/dev/null
    n=$((n + 1))
done
echo "result connections $((20000 / ($(now) - start)))"
