#!/bin/sh
# What udhcpc learns of the network becomes the system's settings. An address that somebody else set is left alone.
bound=/run/udhcpc.$interface
case $1 in
deconfig)
    ip link set "$interface" up
    [ ! -e "$bound" ] || ip addr del "$(cat "$bound")" dev "$interface"
    rm -f "$bound"
    ;;
bound | renew)
    ip addr replace "$ip/$mask" dev "$interface"
    echo "$ip/$mask" >"$bound"
    [ -z "$mtu" ] || ip link set "$interface" mtu "$mtu" 2>/dev/null
    for gateway in $router; do
        ip route replace default via "$gateway" dev "$interface"
        break
    done
    for server in $dns; do
        echo "nameserver $server"
    done >/etc/resolv.conf
    ;;
esac
