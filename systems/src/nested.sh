#!/bin/sh
# Boots the default guest in a Doppel in this guest; it passes where a script in there ran and its status came out.
set -e
cat /nested/initrd /nested/script >/tmp/initrd
echo "nested: Doppel starts"
status=0
/nested/doppel run --debug-exit --memory 256M --kernel /nested/vmlinuz --initrd /tmp/initrd \
    --cmdline console=ttyS0 --net none </dev/null >/tmp/console 2>&1 || status=$?
tail -n 30 /tmp/console | sed 's/^/nested> /'
[ "$status" = 33 ]
grep -q "nested: it runs" /tmp/console
