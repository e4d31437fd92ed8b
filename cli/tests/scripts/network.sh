# The user network from inside. The command line says where the test's servers are.
for word in $(cat /proc/cmdline); do
    case $word in
    http=*) http=${word#http=} ;;
    sink=*) sink=${word#sink=} ;;
    closed=*) closed=${word#closed=} ;;
    sum=*) sum=${word#sum=} ;;
    esac
done
fail() {
    echo "FAILED: $*"
    ip addr
    ip route
    dmesg | tail -20
    exit 1
}
n=0
until ip route | grep -q 'default via 10.0.2.2'; do
    n=$((n + 1))
    [ $n -lt 600 ] || fail "no address"
    sleep 0.05
done
ip addr show eth0 | grep -q 'inet 10.0.2.15/24' || fail "another address"
grep -q 'nameserver 10.0.2.3' /etc/resolv.conf || fail "another name server"
echo step: address
ping -c 3 -W 2 10.0.2.2 || fail ping
echo step: ping
nslookup guest.test | grep -q 192.0.2.77 || fail nslookup
echo step: nslookup
wget -q -O /tmp/data "http://10.0.2.2:$http/data" || fail wget
[ "$(sha256sum </tmp/data | cut -c1-64)" = "$sum" ] || fail "the data is damaged"
echo step: wget
nc -w 5 10.0.2.2 "$sink" </tmp/data >/tmp/answer || fail nc
[ "$(cat /tmp/answer)" = "$sum" ] || fail "the data arrived damaged: $(cat /tmp/answer)"
echo step: upload
nc -w 5 10.0.2.2 "$closed" </dev/null 2>/tmp/error && fail "somebody listens"
grep -q refused /tmp/error || fail "not refused: $(cat /tmp/error)"
echo step: refused
