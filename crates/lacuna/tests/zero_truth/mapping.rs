//! Mapping that a discard keeps (002-6).

use lacuna::block::Preallocation;
use lacuna::qcow2::format::{EntryWidth, L2Entry};
use lacuna::qcow2::{
    CreateOptions, DiscardPolicy, DiscardUnit, Image, OnDiscard, OpenOptions, Parts,
    PreallocationLayout, create,
};
use lacuna::storage::{FileAccess, FileOptions, FileStorage, MemoryStorage};
use pollster::block_on;
use testkit::Random;
use testkit::foreign::{QEMU_IMG, QEMU_IO, assert_same_guest, qemu_img_check};

use super::scenario::{
    Change, Disk, Setup, apply, assert_gave_back, assert_not_larger, entries_of, writing,
};

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
    let printed = QEMU_IO.succeed(["--image-opts", &options, "-c", "discard 0 128k"]);
    assert!(!printed.contains("failed"), "{printed}");
    let (ours, theirs) = (ours.left(), theirs.left());
    assert_eq!((ours.entries, ours.bytes), (theirs.entries, theirs.bytes));
    assert_not_larger(ours.allocated, theirs.allocated);
}

/// A disk whose every cluster has a place, made by the engine.
fn preallocated(folder: &std::path::Path, entry_width: EntryWidth) -> std::path::PathBuf {
    let options = CreateOptions {
        size_bytes: 32 * CLUSTER - 1536,
        entry_width,
        preallocation: Preallocation::Metadata,
        preallocation_layout: PreallocationLayout::Contiguous,
        ..CreateOptions::default()
    };
    let storage = MemoryStorage::new();
    block_on(create(&storage, &options)).unwrap();
    let path = folder.join("disk.qcow2");
    std::fs::write(&path, storage.to_vec()).unwrap();
    path
}

/// Random changes of whole, of half and of no clusters.
fn random_changes(random: &mut Random, unit: u64) -> Vec<Change> {
    let size = 32 * CLUSTER - 1536;
    let change = |_| {
        let unit = if random.one_in(2) { CLUSTER } else { unit };
        let at = random.below(size) / unit * unit;
        let len = (1 + random.below(4 * CLUSTER / unit)) * unit;
        let len = len.min(size - at);
        match random.below(4) {
            0 => Change::Write(at, len, 1 + random.below(200) as u8),
            1 => Change::Zero(at, len),
            2 => Change::ZeroUnmap(at, len),
            _ => Change::Discard(at, len),
        }
    };
    (0..60).map(change).collect()
}

#[test]
fn random_changes_leave_the_entries_and_bytes_that_stock_qemu_leaves() {
    for entry_width in [EntryWidth::Standard, EntryWidth::Extended] {
        for seed in testkit::seeds(4) {
            // Less than a subcluster is written by bytes; those match in what guests see only.
            let changes = random_changes(&mut Random::new(seed), CLUSTER / 32);
            let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            let ours = preallocated(ours.path(), entry_width);
            let theirs = preallocated(theirs.path(), entry_width);
            let before = entries_of(&std::fs::read(&ours).unwrap());
            let files = FileOptions { access: FileAccess::ReadWrite, ..FileOptions::default() };
            let storage = FileStorage::open(&ours, &files).unwrap();
            let options = keeping().discard_unit(DiscardUnit::Cluster);
            let image = block_on(Image::open(Parts::alone(storage), options)).unwrap();
            for change in &changes {
                block_on(apply(&image, *change));
            }
            block_on(image.close()).unwrap();

            let name = theirs.to_str().unwrap();
            let image =
                format!("driver=qcow2,discard-no-unref=on,discard=unmap,file.filename={name}");
            let mut words = vec!["--image-opts".to_owned(), image];
            words.extend(changes.iter().flat_map(|it| ["-c".to_owned(), it.command()]));
            let printed = QEMU_IO.succeed(&words);
            assert!(!printed.contains("failed"), "{printed}");

            for path in [&ours, &theirs] {
                assert!(qemu_img_check(path).is_clean());
            }
            let after = entries_of(&std::fs::read(&ours).unwrap());
            let hosts =
                |entries: &[L2Entry]| entries.iter().map(|it| it.host()).collect::<Vec<_>>();
            assert_eq!(hosts(&after), hosts(&before), "seed {seed}");
            let stock = entries_of(&std::fs::read(&theirs).unwrap());
            for (at, (ours, theirs)) in after.iter().zip(&stock).enumerate() {
                assert_eq!(ours, theirs, "seed {seed}, cluster {at}, {changes:x?}");
            }
            let (ours, theirs) = (("qcow2", &*ours), ("qcow2", &*theirs));
            assert_same_guest(ours, theirs);
        }
    }
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
    let storage = MemoryStorage::from(&std::fs::read(&disk.path).unwrap()[..]);
    let parts = Parts::alone(storage);
    let error = block_on(Image::open(parts, keeping())).unwrap_err();
    assert_eq!(error.kind(), lacuna::ErrorKind::Unsupported);
    assert!(error.to_string().contains("needs version 3"), "{error}");
}

fn places(disk: &Disk) -> Vec<Option<u64>> {
    disk.left().entries.iter().map(|entry| entry.host().map(|host| host.0)).collect()
}
