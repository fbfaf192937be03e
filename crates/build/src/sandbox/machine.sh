# Prepares a build's virtual machine and starts the image builder's daemon: machine.sh PORT..., the ports of the host's loopback that are shared.
# Ends when the daemon answers.
set -eu
while read -r module; do
    insmod "/hearth/modules/$module" 2>/run/insmod || grep -q 'File exists' /run/insmod || { cat /run/insmod >&2; exit 1; }
done </hearth/modules/order

# Disks are found by their serial numbers.
for disk in context image base store; do
    for device in /sys/block/vd*; do
        [ "$(cat "$device/serial")" = "$disk" ] || continue
        mknod "/dev/$disk" b $(tr ':' ' ' <"$device/dev")
    done
    [ -b "/dev/$disk" ] || { echo "the machine has no disk $disk" >&2; exit 1; }
done
tar --extract --file /dev/context --directory /build
ln -sf /dev/image /build/disk
ln -sf /dev/base /hearth/base.tar
if [ -s /build/certificates ]; then cp /build/certificates /etc/ssl/certs/ca-certificates.crt; fi
if [ "$(blkid -o value -s TYPE /dev/store)" != ext4 ]; then
    mke2fs -q -t ext4 -m 0 -E lazy_itable_init=1,lazy_journal_init=1,nodiscard /dev/store
fi
# What is deleted becomes free on the host's disk.
mount -t ext4 -o noatime,discard,noinit_itable /dev/store /var/lib/docker
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=1777 tmpfs /tmp

if [ $# -gt 0 ]; then
    echo 1 >/proc/sys/net/ipv4/conf/all/route_localnet
    gateway=$(ip -4 route show default | cut -d ' ' -f 3)
    ports=$(echo "$@" | tr ' ' ',')
    # The daemon reaches them where the host has them; steps do not.
    nft "table ip shared {
        chain output { type nat hook output priority -100; ip daddr 127.0.0.1 tcp dport { $ports } dnat to $gateway; }
        chain forward { type filter hook forward priority 0; ip daddr $gateway tcp dport { $ports } reject with tcp reset; }
    }"
fi
set -- --mtu "$(cat /sys/class/net/eth0/mtu)"
set +e
. /build/daemon.sh
