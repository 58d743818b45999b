# Writes numbered files, each flushed before it is told of, and much beside them that is not.
# FS: ext4, xfs or btrfs. STEPS: how many files. SEED: what they hold.
modprobe $FS || true
case $FS in
    ext4) mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 /dev/vda ;;
    *) mkfs.$FS -q -f /dev/vda ;;
esac
mount -t $FS /dev/vda /mnt
mkdir /mnt/d /mnt/noise
: > /mnt/log
sync
echo "@@ACK 0"

noise() {
    i=0
    while :; do
        i=$((i + 1))
        head -c $((i * 13337 % 300000 + 5000)) /dev/urandom > /mnt/noise/$((i % 23))
        [ $((i % 7)) != 0 ] || rm -f /mnt/noise/$((i % 11))
        [ $((i % 19)) != 0 ] || fstrim /mnt
    done
}
noise &

n=0
while [ $n -lt $STEPS ]; do
    n=$((n + 1))
    yes "record $n of $SEED" | head -c $((n * 7919 % 60000 + 100)) > /mnt/d/new
    sync /mnt/d/new
    mv /mnt/d/new /mnt/d/f$n
    [ $((n % 4)) != 0 ] || rm /mnt/d/f$((n / 2))
    sync /mnt/d
    printf '%-64s' $n | dd of=/mnt/log bs=64 seek=$n conv=notrunc,fsync 2> /dev/null
    echo "@@ACK $n"
done
kill $!
