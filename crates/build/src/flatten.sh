# Turns an image into a file system: flatten.sh ROOTFS BYTES UUID LAYER... Runs in a build's sandbox, in the directory of the layers, of which
# the uppermost comes first. Prints the bytes that the contents take.
set -eu
rootfs=$1 bytes=$2 uuid=$3
shift 3
tree=/run/tree links=/run/links
mkdir -p "$tree" "$links"
# The kernel takes the names of all layers in one page of memory.
lower=
number=0
for layer; do
    ln -sfn "$PWD/$layer" "$links/$number"
    lower=$lower:$number
    number=$((number + 1))
done
trap 'umount "$tree"' EXIT
# Where root is not the kernel's, layers say what they hide in attributes of users.
options=ro
grep -Eq ' 0 +0 +4294967295' /proc/self/uid_map || options=ro,userxattr
# By the older system call: the newer one takes options of 256 bytes at most.
export LIBMOUNT_FORCE_MOUNT2=always
if [ "$number" -gt 1 ]; then
    (cd "$links" && mount -t overlay -o "$options,lowerdir=${lower#:}" overlay "$tree")
else
    mount --bind "$1" "$tree"
fi

contents=$(du -sxB1 "$tree" | cut -f1)
if [ "$contents" -gt "$bytes" ]; then
    echo "No space left: $contents bytes do not fit into $bytes" >&2
    exit 1
fi
files=$(du -sx --inodes "$tree" | cut -f1)
inodes=$((bytes / 16384))
[ "$inodes" -gt $((files * 2 + 1024)) ] || inodes=$((files * 2 + 1024))

# The features are spelt out because mke2fs.conf differs from host to host. No journal: the disk is never used without the memory that goes
# with it, so nothing would ever be replayed. The inode tables need no zeroing in a file that is all holes, and without lazy_itable_init the
# guest does not do it either.
export E2FSPROGS_FAKE_TIME=1
mke2fs -q -F -t ext4 -b 4096 -I 256 -m 0 -N "$inodes" -U "$uuid" \
    -O none,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum \
    -E hash_seed="$uuid",lazy_itable_init=0,root_owner=0:0 -d "$tree" "$rootfs"

# The guest mounts over these. Made in the file system and not in the tree, because there they would carry today's date.
for dir in dev etc proc run sys tmp; do
    if [ ! -e "$tree/$dir" ] && [ ! -L "$tree/$dir" ]; then
        echo "mkdir /$dir"
        [ "$dir" != tmp ] || echo "set_inode_field /tmp mode 041777"
    fi
done | debugfs -w -f - "$rootfs" >/dev/null 2>&1
echo "$contents"
