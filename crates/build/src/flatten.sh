# Turns an image into a file system: flatten.sh ROOTFS BYTES UUID IMAGE BUILDAH...
# Runs in a mount namespace of its own, so a mount cannot outlive it. Prints the bytes that the contents take.
set -eu
rootfs=$1 bytes=$2 uuid=$3 image=$4
shift 4
container=$("$@" from --pull-never "$image")
trap '"$@" rm "$container" >/dev/null' EXIT
tree=$("$@" mount "$container")

# The guest mounts over these. The tests come first because nothing may be done through a link that the image's author made.
for dir in dev etc proc run sys tmp; do
    [ -e "$tree/$dir" ] || [ -L "$tree/$dir" ] || mkdir -m 0755 "$tree/$dir"
done
[ -L "$tree/tmp" ] || chmod 1777 "$tree/tmp"

contents=$(du -sxB1 "$tree" | cut -f1)
files=$(du -sx --inodes "$tree" | cut -f1)
inodes=$((bytes / 16384))
[ "$inodes" -gt $((files * 2 + 1024)) ] || inodes=$((files * 2 + 1024))

# The features are spelt out because mke2fs.conf differs from host to host. No journal: the disk is never used without the memory that goes
# with it, so nothing would ever be replayed. The inode tables need no zeroing in a file that is all holes, and without lazy_itable_init the
# guest does not do it either.
E2FSPROGS_FAKE_TIME=1 mke2fs -q -F -t ext4 -b 4096 -I 256 -m 0 -N "$inodes" -U "$uuid" \
    -O none,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum \
    -E hash_seed="$uuid",lazy_itable_init=0,root_owner=0:0 -d "$tree" "$rootfs"
echo "$contents"
