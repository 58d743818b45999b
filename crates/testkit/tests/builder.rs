//! qemu-img agrees that built images are right, and sees what was made wrong.

use testkit::foreign::{QEMU_IMG, qemu_img_check, qemu_io};
use testkit::{Built, ImageBuilder};

fn check(built: &Built) -> testkit::foreign::QemuCheck {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image.qcow2");
    built.bytes.save(&path);
    qemu_img_check(&path)
}

/// A stored (uncompressed) deflate block holding `bytes`.
fn deflate(bytes: &[u8]) -> Vec<u8> {
    let len = bytes.len() as u16;
    [&[1][..], &len.to_le_bytes(), &(!len).to_le_bytes(), bytes].concat()
}

fn full(version: u32, cluster_bits: u32, order: u32) -> ImageBuilder {
    let size = 40_u64 << cluster_bits;
    let stream = deflate(&vec![5; 1 << cluster_bits.min(15)]);
    let builder = ImageBuilder::new(version, cluster_bits, size).refcount_order(order);
    let builder = builder.data(1, &[7; 512]).data(33, &[9; 512]);
    let builder = if version == 3 { builder.zero(2).reserved_zero(3, b"stale") } else { builder };
    // A stored block is longer than a small cluster, which qcow2 does not forbid to read.
    if cluster_bits > 15 { builder.compressed(5, &stream) } else { builder }
}

#[test]
fn built_images_are_clean() {
    for cluster_bits in [9, 12, 16, 21] {
        for order in 0..=6 {
            let found = check(&full(3, cluster_bits, order).build());
            assert!(found.is_clean(), "{cluster_bits} bits, order {order}: {}", found.text);
        }
        let found = check(&full(2, cluster_bits, 4).build());
        assert!(found.is_clean(), "version 2, {cluster_bits} bits: {}", found.text);
        let found = check(&full(3, cluster_bits, 4).snapshot("one").snapshot("two").build());
        assert!(found.is_clean(), "snapshots, {cluster_bits} bits: {}", found.text);
    }
    let found = check(&full(3, 16, 4).extended().build());
    assert!(found.is_clean(), "{}", found.text);
}

#[test]
fn qemu_io_reads_what_was_built() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image.qcow2");
    full(3, 16, 4).snapshot("one").build().bytes.save(&path);
    qemu_io(
        &path,
        ["read -P 7 64k 512", "read -P 0 66048 190k", "read -P 9 2112k 512"].map(String::from),
    );
    assert!(
        QEMU_IMG.succeed(["snapshot".as_ref(), "-l".as_ref(), path.as_os_str()]).contains("one")
    );
}

#[test]
fn wrong_refcounts_and_entries_are_seen() {
    let base = full(3, 16, 4);
    let data = base.build().data[&1] >> 16;
    let leaked = check(&base.clone().refcount(data, 2).build());
    assert_eq!((leaked.leaks, leaked.code), (1, 2), "{}", leaked.text);
    assert!(!check(&base.clone().refcount(data, 0).build()).is_safe());
    assert!(!check(&base.clone().change_l2(1, |words| words[0] |= 2).build()).is_safe());
    assert!(!check(&base.clone().change_l1(0, |words| words[0] |= 1).build()).is_safe());
    assert_eq!(check(&base.patch(20, &63_u32.to_be_bytes()).build()).code, 1);
}
