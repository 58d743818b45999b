//! Snapshots that stock makes, listed and read by both.

mod common;

use common::Sandbox;

/// An image whose snapshots differ, and one whose name is the identifier of another.
const MADE: &str = "
    stock-img create -q -f qcow2 image 4M
    stock-io -c 'write -P 1 0 1M' image >&2
    stock-img snapshot -c one image
    stock-io -c 'write -P 2 512k 2M' -c 'write -c -P 4 3M 64k' image >&2
    stock-img snapshot -c two image
    stock-io -c 'write -P 3 0 4M' image >&2
    stock-img snapshot -c 1 image
    stock-img create -q -f qcow2 none 1M
    stock-img create -q -f raw raw 1M";

/// Made once and copied: a snapshot carries the time at which it was made.
fn both() -> (Sandbox, Sandbox) {
    let (stock, ours) = (Sandbox::stock(), Sandbox::ours());
    stock.prepare(&format!("set -e; {MADE}"));
    for name in ["image", "none", "raw"] {
        std::fs::copy(stock.path(name), ours.path(name)).unwrap();
    }
    (stock, ours)
}

#[test]
fn lists_are_those_of_stock() {
    let (stock, ours) = both();
    let lines = "qemu-img snapshot -l image
         qemu-img snapshot image
         qemu-img snapshot -q -U --list image
         qemu-img snapshot --image-opts driver=qcow2,file.filename=image
         qemu-img snapshot -l none
         qemu-img snapshot -l raw
         qemu-img snapshot -l missing
         qemu-img snapshot -l
         qemu-img snapshot
         qemu-img snapshot -l -l image
         qemu-img snapshot -l -c x image
         qemu-img snapshot -a
         qemu-img snapshot --output=json image";
    common::both_in(&stock, &ours, lines);
}

#[test]
fn what_is_read_of_a_snapshot_is_what_stock_reads() {
    let (stock, ours) = both();
    let words = [
        "one",
        "two",
        "1",
        "2",
        "3",
        "nope",
        "''",
        "snapshot.id=1",
        "snapshot.name=1",
        "snapshot.id=3,snapshot.name=1",
        "snapshot.id=1,snapshot.name=two",
        "snapshot.name=nope",
        "snapshot.foo=1",
    ];
    for word in words {
        common::both_in(
            &stock,
            &ours,
            &format!(
                "qemu-img convert -l {word} -O raw image out && md5sum out; rm -f out
                 qemu-img measure -l {word} -O qcow2 image
                 qemu-img measure -l {word} -O raw image"
            ),
        );
    }
    common::both_in(
        &stock,
        &ours,
        "qemu-img convert -l one -O qcow2 image copy && stock-img compare copy image
         qemu-img convert -l one -O raw image image out
         qemu-img convert -l snapshot.name=one -O raw image none out && md5sum out
         qemu-img convert -l snapshot.name=one -O raw none image out
         qemu-img convert -l one -O raw raw out
         qemu-img measure -l one -O qcow2 raw",
    );
}

#[test]
fn programs_are_told_of_the_disk_sizes() {
    let (_, ours) = both();
    let listed = ours.command("stock-img resize -q image 5M; lacuna snapshot --output=json image");
    let list: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap();
    let seen: Vec<_> = list.as_array().unwrap().iter().map(|it| (&it["name"], &it["id"])).collect();
    assert_eq!(seen.len(), 3);
    assert_eq!((seen[2].0, seen[2].1), (&"1".into(), &"3".into()));
    assert_eq!(list[0]["disk-size"], 4 << 20);
    assert_eq!(ours.run("lacuna snapshot --output=json none").text, "[\n]\n");
}

#[test]
fn a_snapshot_is_copied_with_the_size_that_its_disk_had() {
    let (_, ours) = both();
    ours.prepare("stock-img resize -q image 8M; lacuna convert -l one -O raw image small");
    let bytes = ours.bytes("small");
    assert_eq!((bytes.len(), bytes[0], bytes[1 << 20]), (4 << 20, 1, 0));
}

/// What a disk and its snapshots hold, and whether stock finds anything wrong.
const LOOK: &str = "stock-img check -q image && md5sum image.raw snapshots.txt";

#[test]
fn making_applying_and_deleting_leaves_what_stock_leaves() {
    let (stock, ours) = both();
    let steps = "qemu-img snapshot -c three image
         qemu-img snapshot -d two image
         qemu-img snapshot -d 2 image
         qemu-img snapshot -d nope image
         qemu-img snapshot -a one image
         qemu-img snapshot -q -a 4 image
         qemu-img snapshot -a nope image
         qemu-img snapshot -c '' image
         qemu-img snapshot -a '' image
         qemu-img snapshot -d '' image
         qemu-img snapshot -c one image
         qemu-img snapshot -d one image
         qemu-img snapshot -a 1 image
         qemu-img snapshot -f raw -c x raw
         qemu-img snapshot -f raw -a x raw
         qemu-img snapshot -f raw -d x raw
         qemu-img snapshot -c x missing
         qemu-img snapshot -U -c x image
         qemu-img snapshot -c x -a y image";
    for step in steps.lines() {
        common::both_in(&stock, &ours, step);
        for sandbox in [&stock, &ours] {
            // All but when they were made.
            sandbox.prepare(
                "stock-img convert -O raw image image.raw
                 stock-img snapshot -l image | sed 's/20..-..-.. ..:..:..//' > snapshots.txt",
            );
        }
        common::both_in(&stock, &ours, LOOK);
    }
}

#[test]
fn what_cannot_be_kept_is_refused_as_by_stock_and_nothing_changes() {
    let (stock, ours) = (Sandbox::stock(), Sandbox::ours());
    let made = "stock-img create -q -f qcow2 -o refcount_bits=1 narrow 4M
         stock-io -c 'write 0 1M' narrow >&2
         stock-img create -q -f qcow2 -o refcount_bits=64 wide 4M
         stock-io -c 'write 0 512' wide >&2
         printf '\\377\\377\\377\\377\\377\\377\\377\\377' |
             dd of=wide bs=1 seek=$((0x20028)) conv=notrunc 2>/dev/null
         cp wide wide.before
         stock-img create -q -f qcow2 -o data_file=d external 4M
         stock-img create -q -f qcow2 marked 4M; stock-img snapshot -c s marked
         stock-img bitmap --add marked b";
    for sandbox in [&stock, &ours] {
        sandbox.prepare(made);
    }
    common::both_in(
        &stock,
        &ours,
        "qemu-img snapshot -c s narrow
         qemu-img snapshot -c s wide
         qemu-img snapshot -c s external
         qemu-img snapshot -a s external
         qemu-img snapshot -d s external
         qemu-img snapshot -a s marked",
    );
    assert_eq!(
        ours.run("stock-img check narrow | head -1").text,
        "No errors were found on the image.\n"
    );
    assert_eq!(ours.run("cmp wide wide.before && echo same").text, "same\n");
    let refused = ours.run("lacuna snapshot -c s narrow").text;
    assert!(refused.contains("refcount_bits=16"), "{refused}");
}

#[test]
fn a_bitmap_is_told_of_what_applying_changes() {
    let ours = Sandbox::ours();
    ours.prepare(
        "stock-img create -q -f qcow2 image 4M; stock-io -c 'write -P 1 0 128k' image >&2
         stock-img snapshot -c one image; stock-io -c 'write -P 2 64k 64k' -c 'write 1M 64k' image >&2
         stock-img bitmap --add image b; lacuna snapshot -a one image; stock-img check -q image",
    );
    let map = ours.run(
        "stock-nbd -t -r -f qcow2 -B b -k $PWD/s image & awaited s
         nbdinfo --map=qemu:dirty-bitmap:b 'nbd+unix:///?socket='$PWD/s | awk '{print $1, $2, $3}'; kill $!",
    );
    assert_eq!(
        map.text,
        "0 65536 0\n65536 65536 1\n131072 917504 0\n1048576 65536 1\n1114112 3080192 0\n"
    );
}

#[test]
fn the_snapshot_that_holds_shared_clusters_is_no_snapshot_of_the_disk() {
    let ours = Sandbox::ours();
    ours.prepare(
        "stock-img create -q -f qcow2 image 4M; stock-io -c 'write -P 1 0 1M' image >&2
         lacuna dedup image >&2; lacuna snapshot -c one image; stock-io -c 'write -P 2 64k 64k' image >&2
         lacuna snapshot -c two image; lacuna snapshot -a one image; lacuna snapshot -d two image
         stock-img check -q image",
    );
    for action in ["-a", "-d"] {
        let refused = ours.run(&format!("lacuna snapshot {action} lacuna-pin image"));
        assert!(refused.text.contains("dedup --unpin"), "{}", refused.text);
    }
    let list = ours.run("lacuna snapshot -l image | awk '{print $1}'").text;
    assert_eq!(list, "Snapshot\nID\nlacuna-pin\n1\n");
    assert_eq!(ours.run("stock-io -c 'read -P 1 0 1M' image | grep -c failed").text, "0\n");
}
