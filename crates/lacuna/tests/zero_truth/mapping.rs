//! Mapping that a discard keeps (002-6).

use lacuna::qcow2::{DiscardPolicy, OnDiscard, OpenOptions};
use testkit::foreign::QEMU_IMG;

use super::scenario::{Change, Disk, Setup, assert_gave_back, assert_not_larger, writing};

const CLUSTER: u64 = 64 << 10;

fn keeping() -> OpenOptions {
    writing().on_discard(OnDiscard::KeepMapping)
}

#[test]
fn a_discarded_cluster_keeps_its_place_and_gives_the_host_its_bytes() {
    for options in ["compat=1.1", "extended_l2=on"] {
        let before = [Change::Write(0, 4 * CLUSTER, 7)];
        let disk = Disk::make(&Setup { options, before: &before, ..Setup::default() });
        let (allocated, places) = (disk.allocated(), places(&disk));
        disk.by_us(keeping(), &[Change::Discard(0, CLUSTER), Change::ZeroUnmap(CLUSTER, CLUSTER)]);
        assert_eq!(self::places(&disk), places, "{options}");
        let left = disk.left();
        assert!(left.bytes[..2 * CLUSTER as usize].iter().all(|byte| *byte == 0));
        assert_gave_back(allocated, left.allocated, 2 * CLUSTER);
        // What is written there later stays, whenever the punch happened.
        disk.by_us(
            keeping(),
            &[Change::Discard(2 * CLUSTER, CLUSTER), Change::Write(2 * CLUSTER, CLUSTER, 9)],
        );
        assert!(
            disk.left().bytes[2 * CLUSTER as usize..][..CLUSTER as usize]
                .iter()
                .all(|byte| *byte == 9)
        );
        assert_eq!(self::places(&disk), places, "{options}");
    }
}

#[test]
fn stock_qemu_keeps_the_same_entries() {
    let before = [Change::Write(0, 4 * CLUSTER, 7)];
    let (ours, theirs) = (
        Disk::make(&Setup { before: &before, ..Setup::default() }),
        Disk::make(&Setup { before: &before, ..Setup::default() }),
    );
    ours.by_us(keeping(), &[Change::Discard(0, 2 * CLUSTER)]);
    let name = theirs.path.to_str().unwrap();
    let options = format!("driver=qcow2,discard-no-unref=on,discard=unmap,file.filename={name}");
    let printed =
        testkit::foreign::QEMU_IO.succeed(["--image-opts", &options, "-c", "discard 0 128k"]);
    assert!(!printed.contains("failed"), "{printed}");
    let (ours, theirs) = (ours.left(), theirs.left());
    assert_eq!((ours.entries, ours.bytes), (theirs.entries, theirs.bytes));
    assert_not_larger(ours.allocated, theirs.allocated);
}

#[test]
fn a_cluster_that_a_snapshot_shares_is_not_punched() {
    let before = [Change::Write(0, 4 * CLUSTER, 7)];
    let disk = Disk::make(&Setup { before: &before, snapshot: true, ..Setup::default() });
    disk.by_us(keeping(), &[Change::Discard(0, 4 * CLUSTER)]);
    assert!(disk.left().bytes.iter().all(|byte| *byte == 0));
    QEMU_IMG.succeed(["snapshot", "-a", "s", disk.path.to_str().unwrap()]);
    assert!(disk.left().bytes[..4 * CLUSTER as usize].iter().all(|byte| *byte == 7));
}

#[test]
fn the_space_stays_where_the_policy_says_so() {
    let before = [Change::Write(0, 4 * CLUSTER, 7)];
    let disk = Disk::make(&Setup { before: &before, ..Setup::default() });
    let allocated = disk.allocated();
    let policy = DiscardPolicy { request: false, ..DiscardPolicy::default() };
    disk.by_us(keeping().discard(policy), &[Change::Discard(0, 4 * CLUSTER)]);
    assert_gave_back(allocated, disk.allocated(), 0);
    assert!(disk.left().bytes.iter().all(|byte| *byte == 0));
}

#[test]
fn version_2_cannot_keep_places() {
    let disk = Disk::make(&Setup { options: "compat=0.10", ..Setup::default() });
    let storage = lacuna::storage::MemoryStorage::from(&std::fs::read(&disk.path).unwrap()[..]);
    let parts = lacuna::qcow2::Parts::alone(storage);
    let error = pollster::block_on(lacuna::qcow2::Image::open(parts, keeping())).unwrap_err();
    assert_eq!(error.kind(), lacuna::ErrorKind::Unsupported);
    assert!(error.to_string().contains("needs version 3"), "{error}");
}

fn places(disk: &Disk) -> Vec<Option<u64>> {
    disk.left().entries.iter().map(|entry| entry.host().map(|host| host.0)).collect()
}
