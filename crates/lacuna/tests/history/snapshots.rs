//! Snapshots are read as they were, whatever happens to the disk meanwhile.

use lacuna::block::Layer;
use lacuna::buffer::Buffer;
use lacuna::qcow2::format::{AutoclearFeatures, IncompatibleFeatures};
use lacuna::qcow2::{Access, Image, OpenOptions, SnapshotChoice, SnapshotLayer};
use lacuna::storage::Storage;
use lacuna::units::HostOffset;
use lacuna::{Error, ErrorKind};
use pollster::block_on;
use testkit::foreign::qemu_img_check;
use testkit::{ImageBuilder, Random, SparseBytes};

use super::{
    Memory, Stock, content, discard, open, open_over, open_with, range, read, write, zero,
};

const MIB: u64 = 1 << 20;

fn named(name: &str) -> SnapshotChoice {
    SnapshotChoice::Name(name.into())
}

fn snapshot(image: &Image<Memory>, name: &str) -> SnapshotLayer<Memory> {
    block_on(image.snapshot(&named(name))).unwrap()
}

/// Three snapshots of a disk of 4 MiB with data, zeros, discards and compressed clusters.
fn three_snapshots(stock: &Stock) {
    stock.io(&["write -P 1 0 1M", "write -P 2 1536k 64k", "write -c -P 3 2M 64k"]);
    stock.img(&["snapshot", "-c", "one", "a.qcow2"]);
    stock.io(&["write -P 4 512k 768k", "write -z 0 128k", "discard 1536k 64k", "write -P 9 3M 1k"]);
    stock.img(&["snapshot", "-c", "two", "a.qcow2"]);
    stock.io(&["write -P 5 100k 3000k", "write -c -P 6 3264k 64k", "discard 0 64k"]);
    stock.img(&["snapshot", "-c", "three", "a.qcow2"]);
    stock.io(&["write -P 7 3M 512", "discard 1M 1M"]);
}

const NAMES: [&str; 3] = ["one", "two", "three"];

/// Extents cover the disk, and where they say zero it is.
fn assert_extents_are_true(layer: &impl Layer, bytes: &[u8]) {
    let mut at = 0;
    while at < layer.size_bytes() {
        let rest = range(at, layer.size_bytes() - at);
        for extent in block_on(layer.extents(rest)).unwrap() {
            assert_eq!(extent.range.start.0, at);
            let end = extent.range.end().0;
            let part = &bytes[at as usize..end as usize];
            assert!(!extent.status.reads_zero || lacuna::block::is_zero(part), "{extent:?}");
            at = end;
        }
    }
}

/// Changes the disk here and there, leaving half of it alone now and then.
fn change(image: &Image<Memory>, random: &mut Random) {
    let (at, len) = (random.below(60) * (64 << 10), (1 + random.below(16)) * 4096);
    match random.below(5) {
        0 => zero(image, range(at, len)),
        1 => discard(image, range(at, len * 16).intersection(&image.whole()).unwrap()),
        2 => block_on(image.flush()).unwrap(),
        _ => write(image, at, random.below(255) as u8, len),
    }
}

#[test]
fn snapshots_are_what_stock_converts_while_the_disk_is_written() {
    for (options, cache_bytes) in [
        ("compat=0.10", 32 << 20),
        ("compat=1.1", 32 << 20),
        ("cluster_size=4k", 0),
        ("cluster_size=512,refcount_bits=64", 0),
        ("extended_l2=on,compression_type=zstd", 32 << 20),
    ] {
        let stock = Stock::create(options, "4M");
        three_snapshots(&stock);
        let expected = NAMES.map(|name| stock.content(Some(name)));
        assert!(expected[0] != expected[1] && expected[1] != expected[2], "{options}");
        let storage = stock.load();
        for access in [Access::ReadOnly, Access::ReadWrite] {
            let image = open_with(&storage, OpenOptions::new(access).cache_bytes(cache_bytes));
            let layers = NAMES.map(|name| snapshot(&image, name));
            let mut random = Random::new(7);
            let steps = if access == Access::ReadWrite { 120 } else { 1 };
            for step in 0..steps {
                if access == Access::ReadWrite {
                    change(&image, &mut random);
                }
                let index = step % 3;
                assert!(content(&layers[index]) == expected[index], "{options} step {step}");
                assert_extents_are_true(&layers[index], &expected[index]);
            }
            block_on(image.close()).unwrap();
        }
        std::fs::write(stock.path(), storage.to_vec()).unwrap();
        let check = qemu_img_check(&stock.path());
        assert!(check.is_clean(), "{options}: {}", check.text);
        for (name, expected) in NAMES.iter().zip(&expected) {
            assert!(stock.content(Some(name)) == *expected, "{options} {name}");
        }
    }
}

#[test]
fn what_a_snapshot_does_not_hold_comes_from_the_backing_file() {
    let stock = Stock::create("compat=1.1", "1M");
    let base = stock.folder.path().join("base.raw");
    std::fs::write(&base, vec![8; 600 << 10]).unwrap();
    stock.img(&["rebase", "-u", "-b", "base.raw", "-F", "raw", "a.qcow2"]);
    stock.io(&["write -P 1 64k 64k", "write -z 256k 64k"]);
    stock.img(&["snapshot", "-c", "one", "a.qcow2"]);
    stock.io(&["write -P 2 0 1M"]);
    let expected = stock.content(Some("one"));
    assert_eq!((expected[0], expected[64 << 10], expected[256 << 10]), (8, 1, 0));
    let image = open_over(&stock.load(), &base, OpenOptions::new(Access::ReadOnly));
    let one = snapshot(&image, "one");
    assert!(content(&one) == expected);
    let extents = block_on(one.extents(one.whole())).unwrap();
    let depths: Vec<_> = extents.iter().map(|it| (it.range.len >> 10, it.status.depth.0)).collect();
    assert_eq!(depths, [(64, 2), (64, 1), (128, 2), (64, 1), (280, 2), (424, 0)]);
    assert!(!block_on(one.known_zeroes()).unwrap().open);
}

#[test]
fn a_snapshot_has_the_size_that_the_disk_had() {
    let stock = Stock::create("compat=1.1", "1M");
    stock.io(&["write -P 1 0 1M"]);
    stock.img(&["snapshot", "-c", "small", "a.qcow2"]);
    stock.img(&["resize", "-q", "a.qcow2", "3M"]);
    stock.io(&["write -P 2 0 3M"]);
    stock.img(&["snapshot", "-c", "large", "a.qcow2"]);
    stock.img(&["resize", "-q", "--shrink", "a.qcow2", "2M"]);
    let image = open(&stock.load(), Access::ReadOnly);
    let (small, large) = (snapshot(&image, "small"), snapshot(&image, "large"));
    assert_eq!(
        (image.size_bytes(), small.size_bytes(), large.size_bytes()),
        (2 * MIB, MIB, 3 * MIB)
    );
    assert!(content(&small).iter().all(|byte| *byte == 1));
    assert!(content(&large).iter().all(|byte| *byte == 2));
    assert_eq!(read(&small, range(MIB, 1)).unwrap_err().kind(), ErrorKind::OutOfBounds);
}

#[test]
fn an_identifier_counts_before_a_name() {
    let stock = Stock::create("compat=1.1", "1M");
    for (byte, name) in [(1, "one"), (2, "two"), (3, "1")] {
        stock.io(&[&format!("write -P {byte} 0 64k")]);
        stock.img(&["snapshot", "-c", name, "a.qcow2"]);
    }
    let image = open(&stock.load(), Access::ReadOnly);
    let names: Vec<_> = block_on(image.snapshots()).unwrap();
    assert_eq!(names.iter().map(|it| it.name.to_string()).collect::<Vec<_>>(), ["one", "two", "1"]);
    for word in ["one", "two", "1", "2", "3"] {
        let layer = block_on(image.snapshot(&SnapshotChoice::IdOrName(word.into()))).unwrap();
        assert_eq!(content(&layer)[0], stock.content(Some(word))[0], "{word}");
    }
    let both = |id: &str, name: &str| SnapshotChoice::Both { id: id.into(), name: name.into() };
    assert_eq!(content(&block_on(image.snapshot(&both("3", "1"))).unwrap())[0], 3);
    assert_eq!(content(&snapshot(&image, "1"))[0], 3);
    let error = block_on(image.snapshot(&both("1", "two"))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(error.to_string(), "The image has no snapshot with identifier '1' and name 'two'");
}

#[test]
fn a_snapshot_of_an_empty_disk_is_known_to_be_zeros_and_refuses_changes() {
    let stock = Stock::create("compat=1.1", "1M");
    stock.img(&["snapshot", "-c", "empty", "a.qcow2"]);
    let image = open(&stock.load(), Access::ReadWrite);
    write(&image, 0, 1, 4096);
    let empty = snapshot(&image, "empty");
    assert!(block_on(empty.known_zeroes()).unwrap().open);
    assert!(empty.is_read_only() && content(&empty).iter().all(|byte| *byte == 0));
    let bytes = Buffer::from(&[1; 512][..]);
    let flags = lacuna::block::WriteFlags::empty();
    let (result, _) = block_on(empty.write(lacuna::units::GuestOffset(0), bytes, flags));
    assert_eq!(result.unwrap_err().kind(), ErrorKind::ReadOnly);
}

#[test]
fn what_is_claimed_of_the_disk_is_not_believed_of_a_snapshot() {
    let stock = Stock::create("compat=1.1", "1M");
    stock.io(&["write -P 1 0 64k"]);
    stock.img(&["snapshot", "-c", "one", "a.qcow2"]);
    stock.io(&["write -z 0 1M"]);
    // Stock rewrites the header without our bits: put there as for a disk that was zeroed.
    let storage = stock.load();
    let bits = AutoclearFeatures::ALL_ZERO.bits().to_be_bytes();
    block_on(storage.write_at(HostOffset(88), Buffer::from(&bits[..]))).0.unwrap();
    let image = open(&storage, Access::ReadOnly);
    assert!(block_on(image.known_zeroes()).unwrap().open, "the claim this test is about");
    let one = snapshot(&image, "one");
    let first = block_on(one.extents(one.whole())).unwrap()[0];
    assert!(!first.status.reads_zero && first.range.len == 64 << 10);
    assert!(!block_on(one.known_zeroes()).unwrap().open);
    assert_eq!(content(&one)[0], 1);
}

/// An image with one snapshot; offsets of the fields of its entry.
struct Hostile {
    image: SparseBytes,
    entry: u64,
}

impl Hostile {
    fn new(version: u32) -> Self {
        let built =
            ImageBuilder::new(version, 16, 1 << 20).data(0, &[7; 512]).snapshot("one").build();
        Self { image: built.bytes, entry: built.snapshot_table }
    }

    fn with(mut self, field: u64, bytes: &[u8]) -> Self {
        self.image.write(self.entry + field, bytes);
        self
    }

    fn memory(&self) -> Memory {
        Memory::new(lacuna::storage::MemoryStorage::from(&self.image.to_vec()[..]))
    }

    fn error(&self) -> Error {
        let image = open(&self.memory(), Access::ReadOnly);
        block_on(image.snapshot(&named("one"))).unwrap_err()
    }
}

#[test]
fn a_snapshot_whose_table_cannot_be_true_is_refused() {
    // L1 offset, L1 entries and disk size stand at 0, 8 and 48 of an entry (B.9).
    for (field, bytes, text) in [
        (0, 0x1_0001_u64.to_be_bytes(), "multiple of the cluster size"),
        (0, (1_u64 << 40).to_be_bytes(), "passes the end of the file"),
        (0, 0xffff_ffff_ffff_0000_u64.to_be_bytes(), "L1 table"),
        (48, u64::MAX.to_be_bytes(), "needs 34359738368"),
        (48, (1_u64 << 30).to_be_bytes(), "has 1 entries; a disk of 1073741824 bytes needs 2"),
    ] {
        let error = Hostile::new(3).with(field, &bytes).error();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(error.to_string().contains(text), "{error}");
    }
    let error = Hostile::new(3).with(8, &u32::MAX.to_be_bytes()).error();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
}

#[test]
fn only_version_2_may_leave_out_the_size_of_the_disk() {
    // No extra data: identifier and name follow at 40.
    let bare = |version| Hostile::new(version).with(36, &[0; 4]).with(40, b"1one");
    let image = open(&bare(2).memory(), Access::ReadOnly);
    let layer = snapshot(&image, "one");
    assert_eq!((layer.size_bytes(), content(&layer)[0]), (1 << 20, 7));
    let error = bare(3).error();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("size of its disk is missing"), "{error}");
}

#[test]
fn a_broken_map_of_a_snapshot_does_not_close_the_disk_to_changes() {
    let hostile = Hostile::new(3);
    let l1 = hostile.image.read_vec(hostile.entry, 8).try_into().map(u64::from_be_bytes).unwrap();
    let mut image = hostile.image.clone();
    image.write(l1, &0x5_0200_u64.to_be_bytes());
    let memory = Hostile { image, entry: hostile.entry }.memory();
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let image = open(&memory, access);
        let layer = snapshot(&image, "one");
        let error = read(&layer, range(0, 512)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert_eq!(block_on(layer.extents(layer.whole())).unwrap_err().kind(), ErrorKind::Corrupt);
        assert!(image.failure().is_none());
        if access == Access::ReadWrite {
            write(&image, 0, 1, 4096);
        }
        block_on(image.close()).unwrap();
    }
    let header = block_on(lacuna::qcow2::read_header(&memory)).unwrap();
    assert!(!header.features.incompatible.contains(IncompatibleFeatures::CORRUPT));
}

#[test]
fn readers_of_a_snapshot_see_nothing_of_a_writer() {
    let stock = Stock::create("cluster_size=4k", "4M");
    three_snapshots(&stock);
    let expected = stock.content(Some("two"));
    let image = open_with(&stock.load(), OpenOptions::new(Access::ReadWrite).cache_bytes(0));
    let layer = snapshot(&image, "two");
    std::thread::scope(|scope| {
        let writer = image.clone();
        scope.spawn(move || {
            let mut random = Random::new(3);
            (0..400).for_each(|_| change(&writer, &mut random));
        });
        for _ in 0..40 {
            assert!(content(&layer.clone()) == expected);
        }
    });
    block_on(image.close()).unwrap();
}
