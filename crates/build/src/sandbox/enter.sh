# Starts a sandbox: enter.sh ROOT STORE BUILD DISK BASE_ARCHIVE CERTIFICATES RUNC... in a mount namespace of its own. The host's paths may lead
# through directories that only its root may enter; the sandbox's root is not that, so it gets them in a place that all may see. What it may
# not write is mounted so here, by the host's root: the sandbox's root cannot take that back, not even in its own mount namespace.
set -eu
root=$1 store=$2 build=$3 disk=$4 base=$5 certificates=$6
shift 6
mount -t tmpfs -o mode=755,size=1m tmpfs /mnt
mkdir /mnt/root /mnt/store /mnt/build
: >/mnt/disk
: >/mnt/base.tar
: >/mnt/certificates
read_only() {
    mount --bind "$1" "$2"
    mount -o remount,bind,ro "$2"
}
read_only "$root" /mnt/root
mount --bind "$store" /mnt/store
read_only "$build" /mnt/build
mount --bind "$disk" /mnt/disk
read_only "$base" /mnt/base.tar
[ -z "$certificates" ] || read_only "$certificates" /mnt/certificates
exec "$@"
