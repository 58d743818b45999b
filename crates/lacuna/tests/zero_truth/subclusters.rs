//! Subclusters: discard and zero in units smaller than a cluster (002-15).

use lacuna::qcow2::DiscardUnit;

use super::scenario::{BELOW, Change, Disk, Setup, assert_gave_back, writing};

const CLUSTER: u64 = 64 << 10;
const SUBCLUSTER: u64 = CLUSTER / 32;

fn setup<'a>(before: &'a [Change], backing: bool) -> Setup<'a> {
    Setup { options: "extended_l2=on", before, backing, ..Setup::default() }
}

#[test]
fn a_discarded_subcluster_reads_as_zeros_and_its_neighbours_stay() {
    for backing in [false, true] {
        let disk = Disk::make(&setup(&[Change::Write(0, CLUSTER, 7)], backing));
        disk.by_us(writing(), &[Change::Discard(SUBCLUSTER, SUBCLUSTER)]);
        let left = disk.left();
        assert_eq!(left.entries[0].subclusters.0, 0x0000_0002_ffff_fffd);
        assert!(left.bytes[..SUBCLUSTER as usize].iter().all(|byte| *byte == 7));
        let second = SUBCLUSTER as usize..2 * SUBCLUSTER as usize;
        assert!(left.bytes[second].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn qemu_ignores_less_than_a_cluster_and_so_does_the_engine_where_asked() {
    let before = [Change::Write(0, CLUSTER, 7)];
    let (ours, theirs) = (Disk::make(&setup(&before, false)), Disk::make(&setup(&before, false)));
    let change = [Change::Discard(SUBCLUSTER, SUBCLUSTER)];
    ours.by_us(writing().discard_unit(DiscardUnit::Cluster), &change);
    theirs.by_qemu(&change);
    let (left, theirs) = (ours.left(), theirs.left());
    assert_eq!((left.entries, left.bytes), (theirs.entries, theirs.bytes));
    assert_eq!(ours.left().entries[0].subclusters.0, 0xffff_ffff);
}

#[test]
fn a_cluster_whose_last_data_goes_is_freed() {
    for change in [Change::Discard as fn(u64, u64) -> Change, Change::ZeroUnmap] {
        let disk = Disk::make(&setup(&[Change::Write(0, CLUSTER, 7)], false));
        let before = disk.allocated();
        disk.by_us(writing(), &[change(0, CLUSTER / 2)]);
        assert!(disk.left().entries[0].host().is_some(), "half of it still holds data");
        disk.by_us(writing(), &[change(CLUSTER / 2, CLUSTER / 2)]);
        let left = disk.left();
        assert_eq!(left.entries[0].word, 0);
        assert!(left.bytes.iter().all(|byte| *byte == 0));
        assert_gave_back(before, left.allocated, CLUSTER);
    }
}

#[test]
fn the_host_gets_the_space_of_half_a_cluster_back() {
    let options = "extended_l2=on,cluster_size=2M";
    let size_bytes = 4 << 20;
    let before = [Change::Write(0, 2 << 20, 7)];
    let disk = Disk::make(&Setup { options, size_bytes, before: &before, ..Setup::default() });
    let before = disk.allocated();
    disk.by_us(writing(), &[Change::Discard(1 << 20, 1 << 20)]);
    assert_gave_back(before, disk.allocated(), 1 << 20);
    assert!(disk.left().bytes[..1 << 20].iter().all(|byte| *byte == 7));
}

#[test]
fn half_a_cluster_that_a_snapshot_shares_is_not_punched() {
    let options = "extended_l2=on,cluster_size=2M";
    let before = [Change::Write(0, 2 << 20, 7)];
    let setup =
        Setup { options, size_bytes: 4 << 20, before: &before, snapshot: true, backing: false };
    let disk = Disk::make(&setup);
    disk.by_us(writing(), &[Change::Discard(1 << 20, 1 << 20)]);
    assert!(disk.left().bytes[1 << 20..2 << 20].iter().all(|byte| *byte == 0));
    testkit::foreign::QEMU_IMG.succeed(["snapshot", "-a", "s", disk.path.to_str().unwrap()]);
    assert!(disk.left().bytes[..2 << 20].iter().all(|byte| *byte == 7));
}

#[test]
fn zeroing_that_must_keep_the_space_keeps_it() {
    let disk = Disk::make(&setup(&[Change::Write(0, CLUSTER, 7)], false));
    let before = disk.allocated();
    disk.by_us(writing(), &[Change::Zero(0, CLUSTER / 2), Change::Zero(CLUSTER / 2, CLUSTER / 2)]);
    let left = disk.left();
    assert!(left.entries[0].host().is_some());
    assert_eq!(left.entries[0].subclusters.0, 0xffff_ffff_0000_0000);
    assert_gave_back(before, left.allocated, 0);
}

#[test]
fn a_discard_over_a_backing_file_hides_it_and_keeps_what_is_unallocated_beside() {
    let disk = Disk::make(&setup(&[Change::Write(0, SUBCLUSTER, 7)], true));
    disk.by_us(writing(), &[Change::Discard(0, 2 * SUBCLUSTER)]);
    let left = disk.left();
    // No data is left, so the place goes; the other subclusters still show the backing file.
    assert_eq!((left.entries[0].word, left.entries[0].subclusters.0), (0, 0x3_0000_0000));
    let zeros = 2 * SUBCLUSTER as usize;
    assert!(left.bytes[..zeros].iter().all(|byte| *byte == 0));
    assert!(left.bytes[zeros..].iter().all(|byte| *byte == BELOW));
}

#[test]
fn part_of_a_compressed_cluster_is_not_discarded() {
    let disk = Disk::make(&setup(&[Change::Compressed(0, CLUSTER, 7)], false));
    let before = disk.left();
    disk.by_us(writing(), &[Change::Discard(0, SUBCLUSTER)]);
    assert_eq!(disk.left().entries, before.entries);
}
