//! `zero-unmap=unallocate`: thread 001's rule, on request (001-2, 001-6).

use lacuna::qcow2::format::L2Entry;
use lacuna::qcow2::{Image, OnDiscard, OpenOptions, Parts, ZeroUnmap};
use lacuna::storage::MemoryStorage;
use std::sync::Arc;

use lacuna::block::{DynLayer, Layer, WriteFlags, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::raw::Raw;
use lacuna::units::{GuestOffset, GuestRange};
use pollster::block_on;

use super::scenario::{BELOW, Change, Disk, Setup, assert_gave_back, writing};

const CLUSTER: u64 = 64 << 10;
const BEFORE: &[Change] = &[Change::Write(0, 4 * CLUSTER, 7)];

fn unallocating() -> OpenOptions {
    writing().zero_unmap(ZeroUnmap::Unallocate)
}

#[test]
fn without_a_backing_file_unmapped_clusters_become_unallocated() {
    for options in ["compat=1.1", "extended_l2=on"] {
        let disk = Disk::make(&Setup { options, before: BEFORE, ..Setup::default() });
        let before = disk.allocated();
        disk.by_us(
            unallocating(),
            &[Change::ZeroUnmap(0, CLUSTER), Change::Discard(CLUSTER, CLUSTER)],
        );
        let left = disk.left();
        assert_eq!(left.entries[..2], [L2Entry::UNALLOCATED; 2], "{options}");
        assert_gave_back(before, left.allocated, 2 * CLUSTER);
        assert!(left.bytes[..2 * CLUSTER as usize].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn without_leave_to_unmap_the_place_is_kept() {
    let disk = Disk::make(&Setup { before: BEFORE, ..Setup::default() });
    disk.by_us(unallocating(), &[Change::Zero(0, CLUSTER)]);
    assert!(disk.left().entries[0].host().is_some() && disk.left().entries[0].has_zero_flag());
}

#[test]
fn over_a_backing_file_with_data_the_zero_flag_hides_it() {
    let disk = Disk::make(&Setup { before: BEFORE, backing: true, ..Setup::default() });
    disk.by_us(unallocating(), &[Change::ZeroUnmap(0, CLUSTER)]);
    let left = disk.left();
    assert_eq!(left.entries[0], L2Entry::ZERO_PLAIN);
    assert!(left.bytes[..CLUSTER as usize].iter().all(|byte| *byte == 0));
    assert!(left.bytes[4 * CLUSTER as usize..].iter().all(|byte| *byte == BELOW));
}

/// The backing layer here holds data in its second cluster only.
#[test]
fn over_a_backing_layer_that_is_known_to_be_zero_there_nothing_is_left() {
    let disk = Disk::make(&Setup { backing: true, before: BEFORE, ..Setup::default() });
    let below = block_on(Raw::create(MemoryStorage::new(), 3 * CLUSTER)).unwrap();
    let data = Buffer::from(&vec![5; CLUSTER as usize][..]);
    block_on(below.write(GuestOffset(CLUSTER), data, WriteFlags::empty())).0.unwrap();
    let storage = Arc::new(MemoryStorage::from(&std::fs::read(&disk.path).unwrap()[..]));
    let backing = Some(Arc::new(below) as Arc<dyn DynLayer>);
    let parts = Parts { backing, ..Parts::alone(Arc::clone(&storage)) };
    let image = block_on(Image::open(parts, unallocating())).unwrap();
    let range = GuestRange::new(GuestOffset(0), 4 * CLUSTER);
    block_on(image.write_zeroes(range, ZeroFlags::MAY_UNMAP)).unwrap();
    let extents = block_on(image.extents(range)).unwrap();
    let depths: Vec<_> =
        extents.iter().map(|it| (it.range.len / CLUSTER, it.status.depth.0)).collect();
    // The fourth lies behind the end of the backing layer.
    assert_eq!(depths.iter().map(|(len, _)| len).sum::<u64>(), 4);
    assert!(extents.iter().all(|extent| extent.status.reads_zero));
    let top: u64 = extents.iter().filter(|it| it.status.depth.0 == 1).map(|it| it.range.len).sum();
    assert_eq!(top, CLUSTER, "only over data is the zero flag needed: {depths:?}");
    block_on(image.close()).unwrap();
}

#[test]
fn a_kept_mapping_goes_before_the_wish_to_unallocate() {
    let disk = Disk::make(&Setup { before: BEFORE, ..Setup::default() });
    disk.by_us(unallocating().on_discard(OnDiscard::KeepMapping), &[Change::Discard(0, CLUSTER)]);
    assert!(disk.left().entries[0].host().is_some());
}
