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
