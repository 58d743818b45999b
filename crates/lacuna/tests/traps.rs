//! Traps of the format that other engines fell into (`docs/hostile.md`), where no other suite has a
//! test of just that.

use std::sync::Arc;

use lacuna::block::{DiscardMode, DynLayer, Layer, WriteFlags, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::qcow2::check::{CheckOptions, Harm, Repair, check};
use lacuna::qcow2::{Access, CreateOptions, Image, OpenOptions, Parts, Shrink, create};
use lacuna::raw::Raw;
use lacuna::storage::{MemoryStorage, Storage};
use lacuna::units::{GuestOffset, GuestRange, HostOffset};
use pollster::block_on;
use testkit::ImageBuilder;

type Memory = Arc<MemoryStorage>;

const CLUSTER: usize = 65536;
const COPIED: u64 = 1 << 63;

fn builder() -> ImageBuilder {
    ImageBuilder::new(3, 16, 1 << 20)
}

fn stored(builder: &ImageBuilder) -> Memory {
    let bytes = builder.build().bytes;
    Arc::new(MemoryStorage::from(&bytes.read_vec(0, bytes.len() as usize)[..]))
}

fn open_over(storage: &Memory, backing: Option<Arc<dyn DynLayer>>) -> Image<Memory> {
    let parts = Parts { backing, ..Parts::alone(storage.clone()) };
    block_on(Image::open(parts, OpenOptions::new(Access::ReadWrite))).unwrap()
}

fn open(storage: &Memory) -> Image<Memory> {
    open_over(storage, None)
}

/// A raw disk full of 0xbb.
fn backing(len: usize) -> Option<Arc<dyn DynLayer>> {
    let storage = MemoryStorage::from(&vec![0xbb; len][..]);
    Some(Arc::new(block_on(Raw::open(storage)).unwrap()))
}

fn write(image: &Image<Memory>, at: usize, bytes: &[u8]) {
    let offset = GuestOffset(at as u64);
    block_on(image.write(offset, Buffer::from(bytes), WriteFlags::empty())).0.unwrap();
}

fn read(image: &Image<Memory>, at: usize, len: usize) -> Vec<u8> {
    let (result, bytes) = block_on(image.read(GuestOffset(at as u64), Buffer::new(len)));
    result.unwrap();
    bytes.to_vec()
}

/// Closes the image, which is to be sound then.
fn close(image: Image<Memory>, storage: &Memory) {
    block_on(image.close()).unwrap();
    let report = block_on(check(storage, &CheckOptions::default(), &mut |_| {})).unwrap();
    assert!(report.is_clean(), "{report:?}");
}

/// D.1-5, D.1-10: the table of a part of the disk that was cut off must not come back over what its
/// cluster holds since.
#[test]
fn a_freed_table_is_not_written_over_the_next_owner_of_its_cluster() {
    let storage: Memory = Arc::default();
    let (per_table, size) = (64 * 512, 8 * 64 * 512);
    let options =
        CreateOptions { size_bytes: size as u64, cluster_bytes: 512, ..CreateOptions::default() };
    block_on(create(&storage, &options)).unwrap();
    let image = open(&storage);
    (0..8).for_each(|table| write(&image, table * per_table, &[table as u8 + 1; 512]));
    block_on(image.resize(per_table as u64, Shrink::Allow)).unwrap();
    block_on(image.resize(size as u64, Shrink::Refuse)).unwrap();
    // The clusters of the tables are free now: guest data takes them.
    (0..7 * 64).for_each(|cluster| write(&image, per_table + cluster * 512, &[0xdd; 512]));
    block_on(image.flush()).unwrap();
    assert_eq!(read(&image, per_table, 7 * per_table), vec![0xdd; 7 * per_table]);
    assert_eq!(read(&image, 0, 512), [1; 512]);
    close(image, &storage);
}

/// D.1-11: what is around a write into a zero cluster is zero, whatever lies below.
#[test]
fn part_of_a_zero_cluster_is_written_among_zeros_not_backing_bytes() {
    for image in [builder().zero(2), builder().reserved_zero(2, &[0xcc; CLUSTER])] {
        let storage = stored(&image.backing("base"));
        let image = open_over(&storage, backing(1 << 20));
        write(&image, 2 * CLUSTER + 1000, &[7; 24]);
        let mut expected = vec![0; CLUSTER];
        expected[1000..1024].fill(7);
        assert!(read(&image, 2 * CLUSTER, CLUSTER) == expected);
        assert_eq!(read(&image, 3 * CLUSTER, 512), [0xbb; 512]);
        close(image, &storage);
    }
}

/// D.1-12: what is copied around a write ends where the backing file does, to the byte.
#[test]
fn a_write_across_the_end_of_a_shorter_backing_file_is_followed_by_zeros() {
    const END: usize = 2 * CLUSTER + 1536;
    for at in [2 * CLUSTER, END - 512, END, END + 4096] {
        let storage = stored(&builder().backing("base"));
        let image = open_over(&storage, backing(END));
        write(&image, at, &[7; 700]);
        let mut expected = vec![0xbb; CLUSTER];
        expected[END - 2 * CLUSTER..].fill(0);
        expected[at - 2 * CLUSTER..][..700].fill(7);
        assert!(read(&image, 2 * CLUSTER, CLUSTER) == expected, "a write at {at:#x}");
        close(image, &storage);
    }
}

/// D.1-13: a reserved cluster that a snapshot has as well is not written.
#[test]
fn a_reserved_zero_cluster_of_a_snapshot_too_is_not_taken() {
    let built = builder().reserved_zero(0, &[0xcc; CLUSTER]).snapshot("one");
    let (storage, stale) = (stored(&built), built.build().data[&0]);
    let image = open(&storage);
    write(&image, 0, &[7; CLUSTER]);
    assert_eq!(read(&image, 0, CLUSTER), vec![7; CLUSTER]);
    close(image, &storage);
    let (result, bytes) = block_on(storage.read_at(HostOffset(stale), Buffer::new(CLUSTER)));
    result.unwrap();
    assert!(bytes.iter().all(|byte| *byte == 0xcc), "the snapshot's cluster is as it was");
}

/// D.1-14: after a crash the copied flags are not believed.
#[test]
fn copied_flags_of_an_image_that_was_not_closed_are_counted_anew() {
    let shared = builder().data(0, &[1; CLUSTER]).data(1, &[2; CLUSTER]).features(1, 0, 0);
    let first = shared.build().data[&0];
    assert_eq!(first, 0x30000, "the closure cannot take it along");
    let storage = stored(&shared.change_l2(1, |words| words[0] = COPIED | 0x30000));
    let image = open(&storage);
    write(&image, CLUSTER, &[9; 512]);
    assert_eq!(read(&image, 0, CLUSTER), vec![1; CLUSTER], "the other owner's bytes");
    block_on(image.close()).unwrap();
    let report = block_on(check(&storage, &CheckOptions::default(), &mut |_| {})).unwrap();
    assert!(report.findings.iter().all(|finding| finding.harm() == Harm::Harmless), "{report:?}");
}

/// Words that compress well, and not into a whole number of anything.
fn words(seed: usize) -> Vec<u8> {
    (0..CLUSTER).map(|index| (index / 37 * seed) as u8).collect()
}

/// D.1-16: in the entry of a compressed cluster bit 0 is a bit of the offset.
#[test]
fn a_compressed_cluster_at_an_odd_offset_is_not_taken_for_zeros() {
    let mut odd = 0;
    for seed in 1..20 {
        let storage: Memory = Arc::default();
        let options = CreateOptions { size_bytes: 1 << 20, ..CreateOptions::default() };
        block_on(create(&storage, &options)).unwrap();
        let image = open(&storage);
        for cluster in 0..4 {
            let bytes = Buffer::from(&words(seed + cluster)[..]);
            let at = GuestOffset((cluster * CLUSTER) as u64);
            block_on(image.write_compressed(at, bytes)).0.unwrap();
        }
        block_on(image.flush()).unwrap();
        // The first L2 table of a new image is its fifth cluster.
        let (result, table) = block_on(storage.read_at(HostOffset(0x40000), Buffer::new(32)));
        result.unwrap();
        odd += table.chunks(8).filter(|entry| entry[0] & 0x40 != 0 && entry[7] & 1 != 0).count();
        for cluster in 0..4 {
            assert!(read(&image, cluster * CLUSTER, CLUSTER) == words(seed + cluster));
        }
        close(image, &storage);
    }
    assert!(odd > 0, "none lies at an odd offset: this tests nothing");
}

/// D.1-17: compressed clusters share host clusters, and none takes its neighbours along.
#[test]
fn a_compressed_cluster_is_rewritten_and_freed_without_its_neighbours() {
    let storage: Memory = Arc::default();
    let options = CreateOptions { size_bytes: 1 << 20, ..CreateOptions::default() };
    block_on(create(&storage, &options)).unwrap();
    let image = open(&storage);
    let range = |cluster: usize| GuestRange::new(GuestOffset((cluster * CLUSTER) as u64), 65536);
    for cluster in 0..6 {
        let bytes = Buffer::from(&words(cluster + 1)[..]);
        block_on(image.write_compressed(range(cluster).start, bytes)).0.unwrap();
    }
    write(&image, CLUSTER + 512, &[7; 512]);
    block_on(image.discard(range(2), DiscardMode::Guest)).unwrap();
    block_on(image.write_zeroes(range(3), ZeroFlags::MAY_UNMAP)).unwrap();
    block_on(image.write_compressed(range(4).start, Buffer::from(&words(9)[..]))).0.unwrap();
    block_on(image.flush()).unwrap();
    let mut changed = words(2);
    changed[512..1024].fill(7);
    let expected = [words(1), changed, vec![0; CLUSTER], vec![0; CLUSTER], words(9), words(6)];
    for (cluster, expected) in expected.iter().enumerate() {
        assert!(read(&image, cluster * CLUSTER, CLUSTER) == *expected, "cluster {cluster}");
    }
    close(image, &storage);
}

/// A damaged pointer takes guest data for a table. A repair that put "entries" right in there would
/// ruin what the pointer's repair would bring back.
#[test]
fn a_repair_does_not_write_into_what_only_a_damaged_pointer_calls_a_table() {
    let filled = |byte: u8| (0..4).fold(builder(), |image, at| image.data(at, &[byte; CLUSTER]));
    // Reserved bits all over; no cluster is where an entry may point to.
    for byte in [1, 3, 0x55, 0x80, 0xff] {
        let healthy = stored(&filled(byte));
        let damaged = stored(&filled(byte).change_l1(0, |words| words[0] = COPIED | 0x30000));
        for _ in 0..2 {
            let options = CheckOptions { repair: Repair::All };
            let report = block_on(check(&damaged, &options, &mut |_| {})).unwrap();
            assert!(report.corruptions > 0, "{byte:#x}: {report:?}");
        }
        // Whoever knows better puts the pointer back, and nothing is lost.
        let right = (COPIED | 0x20000).to_be_bytes();
        block_on(damaged.write_at(HostOffset(0x10000), Buffer::from(&right[..]))).0.unwrap();
        let options = CheckOptions { repair: Repair::All };
        block_on(check(&damaged, &options, &mut |_| {})).unwrap();
        let (before, after) = (open(&healthy), open(&damaged));
        assert!(read(&before, 0, 1 << 20) == read(&after, 0, 1 << 20), "{byte:#x}");
    }
}
