//! Discard policy by type (A.3.1).

use lacuna::block::{Layer, ZeroFlags};
use lacuna::qcow2::{DiscardPolicy, GuestDiscard, Image, Parts, Shrink};
use lacuna::units::{GuestOffset, GuestRange};
use pollster::block_on;

use super::batches::Counting;
use super::scenario::{Change, Disk, Setup, assert_gave_back, writing};

const CLUSTER: u64 = 64 << 10;
const BEFORE: &[Change] = &[Change::Write(0, 4 * CLUSTER, 7)];

fn disk() -> Disk {
    Disk::make(&Setup { before: BEFORE, ..Setup::default() })
}

#[test]
fn an_ignored_discard_changes_nothing_and_zeroing_keeps_the_place() {
    let policy = DiscardPolicy { guest: GuestDiscard::Ignore, ..DiscardPolicy::default() };
    let disk = disk();
    let before = disk.left();
    disk.by_us(writing().discard(policy), &[Change::Discard(0, CLUSTER)]);
    let left = disk.left();
    assert_eq!((left.entries, left.bytes), (before.entries.clone(), before.bytes.clone()));
    assert_gave_back(before.allocated, left.allocated, 0);
    disk.by_us(writing().discard(policy), &[Change::ZeroUnmap(0, CLUSTER)]);
    let left = disk.left();
    assert_eq!(left.entries[0].word, before.entries[0].word | 1);
    assert_gave_back(before.allocated, left.allocated, 0);
}

#[test]
fn request_decides_whether_freed_guest_clusters_are_punched() {
    for (request, punched) in [(true, CLUSTER), (false, 0)] {
        let disk = disk();
        let before = disk.allocated();
        let policy = DiscardPolicy { request, ..DiscardPolicy::default() };
        disk.by_us(writing().discard(policy), &[Change::Discard(0, CLUSTER)]);
        assert_gave_back(before, disk.allocated(), punched);
        assert_eq!(disk.left().entries[0].word, 1, "freed in any case");
    }
}

/// Growth gives the L1 table another place: what it leaves is no guest's.
#[test]
fn other_decides_whether_a_table_that_was_replaced_is_punched() {
    for (other, punches) in [(true, 1), (false, 0)] {
        let options = "cluster_size=4k";
        let disk = Disk::make(&Setup { options, before: BEFORE, ..Setup::default() });
        let storage = Counting::of(&std::fs::read(&disk.path).unwrap());
        let policy = DiscardPolicy { other, ..DiscardPolicy::default() };
        let parts = Parts::alone(storage.clone());
        let image = block_on(Image::open(parts, writing().discard(policy))).unwrap();
        block_on(async {
            image.resize(4 << 30, Shrink::Refuse).await?;
            image.flush().await?;
            image.close().await
        })
        .unwrap();
        assert_eq!(storage.punches(), punches, "other: {other}");
    }
}

#[test]
fn a_table_that_a_snapshot_shares_is_punched_under_no_policy() {
    // A second L2 table takes the place of the shared one, which the snapshot keeps.
    for other in [false, true] {
        let setup = Setup { before: BEFORE, snapshot: true, ..Setup::default() };
        let disk = Disk::make(&setup);
        let policy = DiscardPolicy { other, ..DiscardPolicy::default() };
        disk.by_us(writing().discard(policy), &[Change::Discard(0, CLUSTER)]);
        testkit::foreign::QEMU_IMG.succeed(["snapshot", "-a", "s", disk.path.to_str().unwrap()]);
        assert!(disk.left().bytes[..4 * CLUSTER as usize].iter().all(|byte| *byte == 7));
    }
}

#[test]
fn what_lies_behind_a_shrunk_disk_is_punched_under_every_policy() {
    let quiet = DiscardPolicy {
        guest: GuestDiscard::Ignore,
        request: false,
        snapshot: false,
        other: false,
    };
    // The cluster in front of the file's end stays in use, so that only a punch gives space back.
    let before = [Change::Write(2 * CLUSTER, CLUSTER, 7), Change::Write(0, CLUSTER, 8)];
    let disk = Disk::make(&Setup { before: &before, ..Setup::default() });
    let allocated = disk.allocated();
    let image = disk.open(writing().discard(quiet));
    block_on(image.resize(2 * CLUSTER, Shrink::Allow)).unwrap();
    block_on(image.close()).unwrap();
    assert_gave_back(allocated, disk.allocated(), CLUSTER);
}

#[test]
fn a_punch_waits_until_the_map_is_durable() {
    let disk = disk();
    let image = disk.open(writing());
    let before = disk.allocated();
    let range = GuestRange::new(GuestOffset(0), CLUSTER);
    block_on(image.write_zeroes(range, ZeroFlags::MAY_UNMAP)).unwrap();
    // Nothing may be lost before the change is durable.
    assert_gave_back(before, disk.allocated(), 0);
    block_on(image.flush()).unwrap();
    assert_gave_back(before, disk.allocated(), CLUSTER);
    block_on(image.close()).unwrap();
}

/// An entry that points at the refcount table: to free it would be to punch it.
#[test]
fn clearing_an_entry_that_points_at_metadata_is_refused_and_harms_nothing() {
    use std::os::unix::fs::FileExt;
    for keeps in [false, true] {
        let disk = disk();
        let header = std::fs::read(&disk.path).unwrap();
        let word = |at: usize| u64::from_be_bytes(header[at..at + 8].try_into().unwrap());
        let (refcount_table, l1) = (word(48), word(40) as usize);
        let l2 = word(l1) & 0x00ff_ffff_ffff_fe00;
        let file = std::fs::OpenOptions::new().write(true).open(&disk.path).unwrap();
        file.write_all_at(&(refcount_table | 1 << 63).to_be_bytes(), l2).unwrap();
        drop(file);
        let options = match keeps {
            true => writing().on_discard(lacuna::qcow2::OnDiscard::KeepMapping),
            false => writing(),
        };
        let image = disk.open(options);
        let range = GuestRange::new(GuestOffset(0), CLUSTER);
        let error = block_on(image.discard(range, lacuna::block::DiscardMode::Guest)).unwrap_err();
        assert_eq!(error.kind(), lacuna::ErrorKind::Corrupt, "{error}");
        drop(image);
        let after = std::fs::read(&disk.path).unwrap();
        let table = refcount_table as usize..refcount_table as usize + CLUSTER as usize;
        assert!(after[table.clone()] == header[table], "the table was touched");
    }
}
