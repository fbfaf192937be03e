# Starts a sandbox: enter.sh ROOT STORE BUILD BASE_ARCHIVE CERTIFICATES RUNC... in a mount namespace of its own. The host's paths may lead
# through directories that only its root may enter; the sandbox's root is not that, so it gets them in a place that all may see.
set -eu
root=$1 store=$2 build=$3 base=$4 certificates=$5
shift 5
mount -t tmpfs -o mode=755,size=1m tmpfs /mnt
mkdir /mnt/root /mnt/store /mnt/build
: >/mnt/base.tar
: >/mnt/certificates
mount --bind "$root" /mnt/root
mount --bind "$store" /mnt/store
mount --bind "$build" /mnt/build
mount --bind "$base" /mnt/base.tar
[ -z "$certificates" ] || mount --bind "$certificates" /mnt/certificates
exec "$@"
