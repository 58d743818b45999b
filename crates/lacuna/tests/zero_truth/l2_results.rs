//! The table A.2.1: what zeroing and discarding leave in an L2 entry.

use lacuna::block::ExtentStatus;
use lacuna::qcow2::format::{L2Entry, SubclusterBitmap};
use lacuna::qcow2::{DiscardUnit, Placement};

use super::scenario::{
    BELOW, Change, Disk, Left, Setup, assert_gave_back, assert_not_larger, writing,
};

const CLUSTER: u64 = 64 << 10;

/// What became of the cluster's entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    /// Data where it was, with the same flags.
    Data,
    /// Data that was nowhere before.
    NewData,
    /// Nothing: what lies below shows.
    Nothing,
    /// Reads as zeros, no place on the host.
    Zero,
    /// Reads as zeros, the place is kept with the same flags.
    ZeroInPlace,
}

fn entry_of(before: L2Entry, after: L2Entry, extended: bool) -> Entry {
    let zero = match extended {
        true => after.subclusters == SubclusterBitmap::ALL_ZERO,
        false => after.has_zero_flag(),
    };
    let same_place = after.host().is_some()
        && after.host() == before.host()
        && after.is_copied() == before.is_copied();
    match (after.host(), zero) {
        (None, true) => Entry::Zero,
        (None, false) => Entry::Nothing,
        (Some(_), true) if same_place => Entry::ZeroInPlace,
        (Some(_), false) if same_place => Entry::Data,
        (Some(_), false) if before.host().is_none() => Entry::NewData,
        _ => panic!("{before:x?} became {after:x?}"),
    }
}

/// One row: what is there, what is done, and what is left in each kind of image.
struct Row {
    what: &'static str,
    before: &'static [Change],
    shared: bool,
    change: Change,
    /// Version 2 without and with a backing file, version 3 likewise; nothing where the case
    /// cannot be.
    left: [Option<Entry>; 4],
}

const DATA: &[Change] = &[Change::Write(0, CLUSTER, 7)];
const COMPRESSED: &[Change] = &[Change::Compressed(0, CLUSTER, 7)];
const RESERVED: &[Change] = &[Change::Write(0, CLUSTER, 7), Change::Zero(0, CLUSTER)];
const ZERO: Change = Change::Zero(0, CLUSTER);
const ZERO_UNMAP: Change = Change::ZeroUnmap(0, CLUSTER);
const DISCARD: Change = Change::Discard(0, CLUSTER);

const fn row(
    what: &'static str,
    before: &'static [Change],
    change: Change,
    left: [Option<Entry>; 4],
) -> Row {
    Row { what, before, shared: false, change, left }
}

fn rows() -> Vec<Row> {
    use Entry::{Data, NewData, Nothing, Zero, ZeroInPlace};
    let only_v3 = |entry| [None, None, Some(entry), Some(entry)];
    let all = |a, b, c, d| [Some(a), Some(b), Some(c), Some(d)];
    vec![
        row("zero on data", DATA, ZERO, all(Nothing, Data, ZeroInPlace, ZeroInPlace)),
        row("zero and unmap on data", DATA, ZERO_UNMAP, all(Nothing, Data, Zero, Zero)),
        row("discard on data", DATA, DISCARD, all(Nothing, Data, Zero, Zero)),
        row("zero on nothing", &[], ZERO, all(Nothing, NewData, Zero, Zero)),
        row("zero and unmap on nothing", &[], ZERO_UNMAP, all(Nothing, NewData, Zero, Zero)),
        row("discard on nothing", &[], DISCARD, all(Nothing, Nothing, Nothing, Zero)),
        row("zero on compressed", COMPRESSED, ZERO, all(Nothing, NewData, Zero, Zero)),
        row("unmap of compressed", COMPRESSED, ZERO_UNMAP, all(Nothing, NewData, Zero, Zero)),
        row("unmap of a reserved place", RESERVED, ZERO_UNMAP, only_v3(Zero)),
        row("discard of a reserved place", RESERVED, DISCARD, only_v3(Zero)),
        row("zero on a reserved place", RESERVED, ZERO, only_v3(ZeroInPlace)),
        row("data into a reserved place", RESERVED, Change::Write(0, CLUSTER, 9), only_v3(Data)),
        Row { shared: true, ..row("zero on shared", DATA, ZERO, only_v3(ZeroInPlace)) },
        Row { shared: true, ..row("unmap of shared", DATA, ZERO_UNMAP, only_v3(Zero)) },
        Row { shared: true, ..row("discard of shared", DATA, DISCARD, only_v3(Zero)) },
    ]
}

/// Has the engine and qemu-io do the same to two equal disks, and compares all that is left.
fn both(setup: &Setup<'_>, change: Change) -> (L2Entry, Left) {
    let (ours, theirs) = (Disk::make(setup), Disk::make(setup));
    let before = ours.left().entries[0];
    let as_qemu = writing().placement(Placement::QemuCompatible).discard_unit(DiscardUnit::Cluster);
    ours.by_us(as_qemu, &[change]);
    theirs.by_qemu(&[change]);
    let (ours, theirs) = (ours.left(), theirs.left());
    assert_eq!(ours.entries, theirs.entries, "{setup:?} {change:?}");
    assert!(ours.bytes == theirs.bytes, "{setup:?} {change:?}: other bytes");
    assert_eq!(ours.extents, theirs.extents, "{setup:?} {change:?}");
    assert_not_larger(ours.allocated, theirs.allocated);
    (before, ours)
}

fn check(row: &Row, options: &str, backing: bool, expected: Entry) {
    let what = format!("{} ({options}, backing file: {backing})", row.what);
    let setup =
        Setup { options, backing, before: row.before, snapshot: row.shared, ..Setup::default() };
    let (before, left) = both(&setup, row.change);
    let extended = options.contains("extended_l2");
    let before = L2Entry { word: before.word & !1, ..before };
    assert_eq!(entry_of(before, left.entries[0], extended), expected, "{what}");
    let byte = match (expected, row.change) {
        (_, Change::Write(_, _, byte)) => byte,
        // Version 2 over a backing file cannot free: a discard changes nothing.
        (Entry::Data, Change::Discard(..)) => 7,
        (Entry::Nothing, _) if backing => BELOW,
        _ => 0,
    };
    assert!(left.bytes[..CLUSTER as usize].iter().all(|it| *it == byte), "{what}: bytes");
    assert_facts(left.extents[0].status, expected, backing, &what);
}

/// Each fact for itself: which layer decides, whether the bytes are zeros, whether the host has
/// space set aside.
fn assert_facts(found: ExtentStatus, expected: Entry, backing: bool, what: &str) {
    let facts = (found.depth.0, found.reads_zero, found.is_hole, found.host.is_some());
    let right = match expected {
        Entry::Data | Entry::NewData => (1, false, false, true),
        Entry::Nothing if backing => (2, false, false, true),
        Entry::Nothing => (0, true, true, false),
        Entry::Zero => (1, true, true, false),
        Entry::ZeroInPlace => (1, true, false, true),
    };
    assert_eq!(facts, right, "{what}: depth, zero, hole, host");
}

#[test]
fn zeroing_and_discarding_leave_what_the_table_says() {
    for row in rows() {
        let cases = [
            ("compat=0.10", false),
            ("compat=0.10", true),
            ("compat=1.1", false),
            ("compat=1.1", true),
        ];
        for ((options, backing), expected) in cases.into_iter().zip(row.left) {
            if let Some(expected) = expected {
                check(&row, options, backing, expected);
            }
        }
    }
}

#[test]
fn the_same_table_holds_with_extended_l2_entries() {
    for row in rows() {
        for (backing, expected) in [false, true].into_iter().zip(&row.left[2..]) {
            if let Some(expected) = expected {
                check(&row, "extended_l2=on", backing, *expected);
            }
        }
    }
}

/// The host gets back what the map no longer needs, and only that.
#[test]
fn freed_clusters_leave_the_host_and_reserved_ones_stay() {
    for (change, freed) in [(ZERO, 0), (ZERO_UNMAP, CLUSTER), (DISCARD, CLUSTER)] {
        let disk = Disk::make(&Setup { before: DATA, ..Setup::default() });
        let before = disk.allocated();
        disk.by_us(writing(), &[change]);
        assert_gave_back(before, disk.allocated(), freed);
    }
}

#[test]
fn part_of_a_cluster_is_zeroed_by_bytes_unless_the_rest_reads_as_zeros() {
    let half = CLUSTER / 2;
    for (before, expected) in [
        (&[][..], Entry::Zero),
        (&[Change::ZeroUnmap(0, CLUSTER)][..], Entry::Zero),
        (RESERVED, Entry::ZeroInPlace),
        (DATA, Entry::Data),
    ] {
        let (was, left) = both(&Setup { before, ..Setup::default() }, Change::Zero(0, half));
        let was = L2Entry { word: was.word & !1, ..was };
        assert_eq!(entry_of(was, left.entries[0], false), expected, "{before:?}");
        assert!(left.bytes[..half as usize].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn an_entry_in_the_target_state_is_not_written_again() {
    use lacuna::block::{Layer, ZeroFlags};
    let disk = Disk::make(&Setup::default());
    disk.by_us(writing(), &[ZERO]);
    let before = std::fs::read(&disk.path).unwrap();
    let image = disk.open(writing());
    pollster::block_on(async {
        image
            .write_zeroes(image.whole().intersection(&range(0, CLUSTER)).unwrap(), ZeroFlags::FUA)
            .await?;
        image.close().await
    })
    .unwrap();
    assert!(std::fs::read(&disk.path).unwrap() == before, "001-3: the file was changed");
}

fn range(start: u64, len: u64) -> lacuna::units::GuestRange {
    lacuna::units::GuestRange::new(lacuna::units::GuestOffset(start), len)
}
