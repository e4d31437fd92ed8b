# Transfers over and over while the host kills the process of the network, until the host says that it is enough.
for word in $(cat /proc/cmdline); do
    case $word in
    http=*) http=${word#http=} ;;
    sink=*) sink=${word#sink=} ;;
    sum=*) sum=${word#sum=} ;;
    esac
done
fail() {
    echo "FAILED: $*"
    ip addr
    dmesg | tail -20
    exit 1
}
until ip route | grep -q 'default via 10.0.2.2'; do sleep 0.05; done
changes=$(cat /sys/class/net/eth0/carrier_changes)
mkdir -p /tmp/www
echo hello from the guest >/tmp/www/index.html
httpd -p 80 -h /tmp/www
echo serving
whole=0 broken=0 up=0
while [ "$(timeout 10 wget -q -O - "http://10.0.2.2:$http/enough" 2>/dev/null)" != yes ]; do
    if timeout 10 wget -q -O /tmp/data "http://10.0.2.2:$http/data" 2>/dev/null; then
        [ "$(sha256sum </tmp/data | cut -c1-64)" = "$sum" ] || fail "what arrived is damaged"
        whole=$((whole + 1))
        if nc -w 3 10.0.2.2 "$sink" </tmp/data >/tmp/answer 2>/dev/null && [ -s /tmp/answer ]; then
            [ "$(cat /tmp/answer)" = "$sum" ] || fail "what was sent is damaged"
            up=$((up + 1))
        fi
    else
        broken=$((broken + 1))
        [ "$broken" -lt 300 ] || fail "hardly anything arrives"
    fi
done
echo "transfers: $whole to the guest, $up from it, $broken broken off"
[ "$whole" -gt 0 ] && [ "$up" -gt 0 ] || fail "nothing arrived"
# The link never went down, and the address is the same, also for who asks again.
[ "$(cat /sys/class/net/eth0/carrier_changes)" = "$changes" ] || fail "the link went down"
ip addr show eth0 | grep -q 'inet 10.0.2.15/24' || fail "another address"
udhcpc -i eth0 -n -q -t 10 2>&1 | grep -q 'lease of 10.0.2.15 obtained' || fail "no lease"
ping -c 3 -W 2 10.0.2.2 || fail ping
nslookup guest.test | grep -q 192.0.2.77 || fail nslookup
dmesg | grep -iE 'virtio_net|eth0.*(error|hang|timed out)|BUG: |WARNING: ' && fail "the kernel complains"
exit 0
