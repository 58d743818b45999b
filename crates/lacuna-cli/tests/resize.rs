//! `resize` against the stock tool: same words, same exit codes, the same disk afterwards.

mod common;

use common::{Sandbox, both};

#[test]
fn sizes_are_absolute_or_relative_and_shrinking_needs_leave() {
    both(
        "qemu-img create -q -f qcow2 a 1M
         qemu-img resize a 2M
         qemu-img resize a +1M
         qemu-img resize a -1M
         qemu-img resize a -- -1M
         qemu-img resize --shrink a -1M
         qemu-img resize a 512k
         qemu-img resize --shrink a 512k
         qemu-img resize -q a 2M
         qemu-img resize a 1000
         qemu-img resize a +1000
         qemu-img resize a 0
         qemu-img resize --shrink a -5M
         qemu-img resize a +0
         qemu-img resize a 0x300000
         qemu-img resize --image-opts driver=qcow2,file.filename=a 7M
         stock-img info a | grep virtual
         qemu-img create -q -f raw r 1M
         qemu-img resize r 3M
         qemu-img resize -f raw r 4M
         qemu-img resize -f raw r 1M
         qemu-img resize --shrink -f raw r 1M
         qemu-img resize -f raw --preallocation=falloc r 4M
         qemu-img resize -f raw --preallocation=full r 5M
         qemu-img resize -f raw r 5300001; stat -c %s r
         qemu-img resize -f raw r +1; stat -c %s r",
    );
}

#[test]
fn what_cannot_be_resized_is_refused_in_the_same_words() {
    both(
        "stock-img create -q -f qcow2 a 1M; stock-img create -q -f raw r 1M
         qemu-img resize
         qemu-img resize a
         qemu-img resize a --shrink
         qemu-img resize a 8E
         qemu-img resize a 7E
         qemu-img resize a +7E
         qemu-img resize a foo
         qemu-img resize nope foo
         qemu-img resize a +
         qemu-img resize a ''
         qemu-img resize a 1.5
         qemu-img resize a 18446744073709551615
         qemu-img resize a 18446744073709551616
         qemu-img resize a 1M 2M
         qemu-img resize --preallocation=foo a 2M
         qemu-img resize --preallocation=full a 1M
         qemu-img resize --preallocation=full --shrink a 64k
         qemu-img resize --preallocation=metadata -f raw r 2M
         qemu-img resize --shrink --preallocation=falloc -f raw r 512k
         qemu-img resize -f qcow2 r 5M
         qemu-img resize -f foo a 5M
         qemu-img resize nope 5M
         qemu-img resize '' 5M
         qemu-img resize -f qcow2 --image-opts driver=qcow2,file.filename=a 7M
         qemu-img resize -f raw r 7E
         qemu-img resize --bogus a 5M
         qemu-img resize -U a 5M
         stock-img create -q -f qcow2 -o compat=v2 s 1M; stock-img snapshot -c x s
         qemu-img resize s 2M
         qemu-img resize --shrink s 512k",
    );
}

/// Sums the lengths of a map by status: where the host clusters lie is each tool's own choice.
const SUMS: &str = "sed 's/.*\"length\": \\([0-9]*\\), \"depth\": 0, \\(.*compressed\\).*/\\1 \\2/' \
                    | awk '{n = $1; $1 = \"\"; sum[$0] += n} END {for (s in sum) print s, sum[s]}' \
                    | sort";

/// Lines that make `disk` by one of several recipes, and a size to grow it to.
const DISKS: [&str; 5] = [
    "qemu-img create -q -f qcow2 disk 3M",
    "qemu-img create -q -f qcow2 -o compat=0.10,cluster_size=4k disk 3M",
    "qemu-img create -q -f qcow2 -o extended_l2=on disk 3M",
    "qemu-img create -q -f qcow2 -o data_file=data disk 3M",
    "qemu-img create -q -f qcow2 -o data_file=data,data_file_raw=on disk 3M",
];

#[test]
fn grown_disks_are_mapped_as_by_the_stock_tool() {
    for disk in DISKS {
        for mode in ["off", "metadata", "falloc", "full"] {
            both(&format!(
                "{disk}; stock-io -c 'write -P 7 1M 1M' -c 'write -P 7 2M 900k' -c 'discard 2M 64k' disk >/dev/null
                 qemu-img resize --preallocation={mode} disk 5M
                 stock-img map --output=json disk | {SUMS}
                 stock-img check disk | head -1
                 stock-io -c 'read -P 0 3000832 2242048' disk | head -1
                 stock-io -c 'read -P 7 1M 1M' disk | head -1
                 qemu-img resize --preallocation={mode} disk 50M
                 stock-img map --output=json disk | {SUMS}
                 stock-img check disk | head -1
                 qemu-img resize --shrink disk 64k; stock-img check disk | head -1
                 stat -c %n:%s data*"
            ));
        }
    }
}

#[test]
fn a_disk_grows_past_what_its_refcount_table_can_count() {
    for (mode, size) in [("metadata", "40M"), ("falloc", "40M"), ("full", "20M"), ("falloc", "90M")]
    {
        both(&format!(
            "qemu-img create -q -f qcow2 -o cluster_size=512 disk 3M
             stock-io -c 'write -P 7 0 3M' disk >/dev/null
             timeout 60 qemu-img resize --preallocation={mode} disk {size}
             stock-img check disk | head -1
             stock-img check --output=json disk | grep allocated-clusters
             stock-io -c 'read -P 7 0 3M' -c 'read -P 0 3M 17M' disk | grep -c ^read"
        ));
    }
}

#[test]
fn a_longer_backing_file_does_not_come_to_light() {
    for mode in ["off", "metadata", "falloc", "full"] {
        for (extended, size) in [("off", "3M"), ("off", "3000832"), ("on", "3M")] {
            both(&format!(
                "stock-img create -q -f raw base 10M
                 stock-io -f raw -c 'write -P 7 0 10M' base >/dev/null
                 qemu-img create -q -f qcow2 -o extended_l2={extended} -b base -F raw disk {size}
                 qemu-img resize --preallocation={mode} disk 20M
                 stock-img map --output=json disk
                 stock-io -c 'read -P 7 0 3000832' disk | head -1
                 stock-io -c 'read -P 0 3M 17M' disk | head -1
                 stock-img check disk"
            ));
        }
    }
}

#[test]
fn a_cut_disk_gives_up_refcount_blocks_that_count_nothing() {
    let (stock, ours) = both(
        "stock-img create -q -f qcow2 -o cluster_size=512,refcount_bits=64 a 9M
         stock-io -c 'write 0 9M' a >/dev/null
         qemu-img resize --shrink a 4k; stock-img check -q a; cp a first
         qemu-img resize a 8M; stock-io -c 'write 0 8M' a >/dev/null
         qemu-img resize --shrink a 4k; stock-img check -q a",
    );
    let len = |it: &Sandbox, file: &str| it.run(&format!("stat -c %s {file}")).text;
    let len = |it, file| len(it, file).trim_end().parse::<u64>().unwrap();
    // A block that counts only other blocks goes as well, here alone.
    assert!(len(&ours, "first") < len(&stock, "first"));
    assert_eq!(len(&ours, "a"), len(&stock, "a"));
}

#[test]
fn bitmaps_follow_the_size() {
    let (stock, ours) = both(
        "stock-img create -q -f qcow2 a 10M; stock-io -c 'write 0 3M' a >/dev/null
         stock-img bitmap --add -g 64k a b0; stock-img bitmap --add --disable -g 512 a b1
         stock-io -c 'write 1M 2M' -c 'write 9M 64k' a >/dev/null
         qemu-img resize a 20M; stock-img check -q a
         qemu-img resize --shrink a 5M; stock-img check -q a
         qemu-img resize a 20000M; stock-img check -q a
         qemu-img resize --shrink a 1000M; stock-img check -q a
         stock-img info --output=json a | grep -A40 '\"bitmaps\"'
         stock-img measure -O qcow2 a | grep bitmaps
         (exec >/dev/null 2>&1; stock-io -c 'write 0 1M' -c 'sigraise 9' a; true)
         qemu-img resize a 30000M
         qemu-img resize --shrink a 10M",
    );
    drop((stock, ours));
}

#[test]
fn space_reserved_by_growing_lies_in_one_run() {
    let ours = Sandbox::ours();
    for line in ["lacuna", "qemu-img"] {
        ours.prepare(&format!(
            "rm -f a; {line} create -q -f qcow2 -o cluster_size=4k a 1M
             {line} resize -q --preallocation=falloc a 200M"
        ));
        let map = ours.run("stock-img map --output=json a | grep -c '\"data\": true'");
        assert_eq!(map.text, "1\n");
        assert_eq!(ours.run("stock-img check -q a").code, Some(0));
    }
}

#[test]
fn a_growth_that_finds_no_room_leaves_the_disk_as_it_was() {
    let (_, ours) = both(
        "qemu-img create -q -f qcow2 a 1M
         trap '' XFSZ; ulimit -f 500; qemu-img resize -f raw a 1M >/dev/null 2>&1; echo $?
         stock-img check -q a; stock-img info a | grep virtual",
    );
    let refused = ours.run("trap '' XFSZ; ulimit -f 500; lacuna resize --preallocation=full a 9M");
    assert_eq!(refused.code, Some(1), "{}", refused.text);
    let info = ours.run("stock-img check -q a; stock-img info a | grep virtual");
    assert_eq!(info.text, "virtual size: 1 MiB (1048576 bytes)\n");
}
