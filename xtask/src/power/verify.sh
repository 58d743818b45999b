# Looks at disks that lost power: each is mounted, so that its journal is replayed, has all that was told
# to be flushed, can be written, and is without fault for its checker.
# FS: their file system. SEED: what files hold. ACKS: the last number told of each disk, in order.
modprobe $FS || true
letters='a b c d e f g h i j k l m n o p q r s t'

# The files of this disk up to the one behind the last told of, which may be there or not.
files() {
    k=1
    while [ $k -le $(($1 + 1)) ]; do
        f=/mnt/d/f$k
        wish=there
        [ $k -le $1 ] || wish=any
        if [ $((k % 2)) = 0 ]; then
            [ $((2 * k)) -gt $1 ] || wish=gone
            [ $((2 * k)) != $(($1 + 1)) ] || wish=any
        fi
        if [ -e $f ]; then
            [ $wish != gone ] || { echo "$f is still there"; return 1; }
            yes "record $k of $SEED" | head -c $((k * 7919 % 60000 + 100)) | cmp - $f || return 1
        else
            [ $wish != there ] || { echo "$f is gone"; return 1; }
        fi
        k=$((k + 1))
    done
}

# The log has a line for each.
log() {
    [ $1 -gt 0 ] || return 0
    k=0
    while [ $k -lt $1 ]; do
        k=$((k + 1))
        printf '%-64s' $k
    done > /tmp/wanted
    dd if=/mnt/log bs=64 skip=1 count=$1 2> /dev/null | cmp - /tmp/wanted
}

# What was never flushed may be there or not, and can be read.
noise() {
    for f in /mnt/noise/*; do
        [ ! -e $f ] || cat $f > /dev/null || return 1
    done
}

checked() {
    case $FS in
        ext4) e2fsck -fn $1 ;;
        btrfs) btrfs check $1 ;;
        xfs) xfs_repair -n $1 ;;
    esac > /tmp/check 2>&1 || { cat /tmp/check; return 1; }
}

look() {
    mount -t $FS $1 /mnt || { dmesg | tail -n 20; return 1; }
    files $2 && log $2 && noise && echo later > /mnt/later && sync
    seen=$?
    umount /mnt && checked $1 && return $seen
}

bad=0
for acked in $ACKS; do
    disk=/dev/vd${letters%% *}
    letters=${letters#* }
    if look $disk $acked; then
        echo "@@GOOD $disk $acked"
    else
        echo "@@BAD $disk $acked"
        bad=$((bad + 1))
    fi
done
[ $bad = 0 ]
