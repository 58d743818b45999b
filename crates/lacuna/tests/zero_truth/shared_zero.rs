//! One cluster of zeros that many share, for version 2 over a backing file (004-3, -8, -9, -11b, -14).

use lacuna::block::{DiscardMode, Layer, ZeroFlags};
use lacuna::qcow2::format::{Header, L1Entry, L2Entry};
use lacuna::qcow2::{Access, Image, OpenOptions, SharedZeroCluster, Shrink};
use lacuna::storage::FileStorage;
use lacuna::units::{GuestOffset, GuestRange};
use pollster::block_on;
use testkit::foreign::{QEMU_IMG, qemu_img_check, qemu_io};

use super::scenario::{
    BELOW, Change, Disk, Left, Setup, assert_gave_back, assert_not_larger, writing,
};

const CLUSTER: u64 = 64 << 10;
const SIZE: u64 = 1 << 20;
/// "lzcl": the extension that names a sharer.
const MAGIC: [u8; 4] = [0x6c, 0x7a, 0x63, 0x6c];

fn sharing() -> OpenOptions {
    writing().shared_zero_cluster(SharedZeroCluster::On)
}

const OVERLAY: Setup<'_> =
    Setup { options: "compat=0.10", size_bytes: SIZE, backing: true, before: &[], snapshot: false };

/// Clusters that are data, compressed or nowhere, whatever they share.
fn mixed() -> Disk {
    let before = [Change::Write(0, 4 * CLUSTER, 7), Change::Compressed(4 * CLUSTER, CLUSTER, 8)];
    Disk::make(&Setup { before: &before, ..OVERLAY })
}

/// The one host cluster that all these entries share.
#[track_caller]
fn shared_by(entries: &[L2Entry]) -> u64 {
    let host = entries[0].host().expect("a cluster of zeros").0;
    for entry in entries {
        assert_eq!(entry.word, host, "shared, without any flag");
    }
    host
}

#[track_caller]
fn assert_zero(left: &Left, from: u64, to: u64) {
    assert!(left.bytes[from as usize..to as usize].iter().all(|byte| *byte == 0));
}

#[test]
fn zeroed_clusters_over_a_backing_file_share_one() {
    for change in [Change::Discard as fn(u64, u64) -> Change, Change::Zero, Change::ZeroUnmap] {
        let disk = Disk::make(&OVERLAY);
        let before = disk.allocated();
        disk.by_us(sharing(), &[change(0, SIZE)]);
        let left = disk.left();
        shared_by(&left.entries);
        assert_zero(&left, 0, SIZE);
        // The zeros, an L2 table, the table of the pins, a longer L1 table.
        assert_not_larger(left.allocated, before + 4 * CLUSTER);
        qemu_io(&disk.path, [format!("read -P 0 0 {SIZE}")]);
    }
}

#[test]
fn without_the_option_nothing_changes() {
    let disk = mixed();
    disk.by_us(
        writing(),
        &[Change::ZeroUnmap(0, 2 * CLUSTER), Change::Discard(3 * CLUSTER, CLUSTER)],
    );
    let left = disk.left();
    assert!(left.entries[0].is_copied() && left.entries[3].is_copied());
    assert_eq!(left.bytes[3 * CLUSTER as usize], 7);
    assert!(!std::fs::read(&disk.path).unwrap()[..512].windows(4).any(|word| word == MAGIC));
}

#[test]
fn every_kind_of_cluster_comes_to_share_and_gives_its_own_back() {
    for snapshot in [false, true] {
        let before =
            [Change::Write(0, 4 * CLUSTER, 7), Change::Compressed(4 * CLUSTER, CLUSTER, 8)];
        let disk = Disk::make(&Setup { before: &before, snapshot, ..OVERLAY });
        let allocated = disk.allocated();
        disk.by_us(sharing(), &[Change::ZeroUnmap(0, 6 * CLUSTER)]);
        let left = disk.left();
        shared_by(&left.entries[..6]);
        assert_zero(&left, 0, 6 * CLUSTER);
        assert_eq!(left.bytes[6 * CLUSTER as usize], BELOW);
        if !snapshot {
            // Four of data and one with compressed bytes go; the zeros, the pins and a longer L1 table
            // come.
            assert_gave_back(allocated + 3 * CLUSTER, left.allocated, 4 * CLUSTER + 4096);
        }
    }
}

#[test]
fn zeroing_without_leave_to_unmap_keeps_the_place_of_data() {
    let disk = mixed();
    let before = disk.left();
    disk.by_us(sharing(), &[Change::Zero(0, 6 * CLUSTER)]);
    let left = disk.left();
    assert_eq!(left.entries[..4], before.entries[..4]);
    shared_by(&left.entries[4..6]);
    assert_zero(&left, 0, 6 * CLUSTER);
}

#[test]
fn a_write_copies_first_and_the_others_stay_zero() {
    let disk = Disk::make(&OVERLAY);
    disk.by_us(sharing(), &[Change::Zero(0, SIZE), Change::Write(CLUSTER + 512, 512, 9)]);
    let left = disk.left();
    assert!(left.entries[1].is_copied());
    shared_by(&[&left.entries[..1], &left.entries[2..]].concat());
    assert_zero(&left, 0, CLUSTER + 512);
    assert_zero(&left, CLUSTER + 1024, SIZE);
    assert_eq!(left.bytes[CLUSTER as usize + 512..][..512], [9; 512]);
}

#[test]
fn zeroing_what_shares_already_changes_nothing() {
    let disk = Disk::make(&OVERLAY);
    disk.by_us(sharing(), &[Change::Zero(0, SIZE)]);
    let before = std::fs::read(&disk.path).unwrap();
    disk.by_us(sharing(), &[Change::Zero(0, SIZE), Change::Zero(100, 1000)]);
    assert_eq!(std::fs::read(&disk.path).unwrap(), before);
}

#[test]
fn shared_clusters_are_known_to_be_zeros_without_a_read() {
    let disk = Disk::make(&OVERLAY);
    disk.by_us(sharing(), &[Change::Zero(0, SIZE)]);
    for choice in [SharedZeroCluster::AsRemembered, SharedZeroCluster::Off] {
        let image = disk.open(OpenOptions::new(Access::ReadOnly).shared_zero_cluster(choice));
        let extents = block_on(image.extents(image.whole())).unwrap();
        assert_eq!(extents.len(), 1);
        assert!(extents[0].status.reads_zero && extents[0].status.host.is_none());
    }
}

#[test]
fn stock_qemu_may_overwrite_every_sharer_in_turn() {
    let disk = Disk::make(&OVERLAY);
    disk.by_us(sharing(), &[Change::Zero(0, SIZE)]);
    for cluster in 0..SIZE / CLUSTER {
        let change = match cluster % 2 {
            0 => Change::Write(cluster * CLUSTER, CLUSTER, 5),
            _ => Change::Write(cluster * CLUSTER + 512, 512, 6),
        };
        disk.by_qemu(&[change]);
        let left = disk.left();
        assert_zero(&left, (cluster + 1) * CLUSTER, SIZE);
    }
    // The pins alone are left; the cluster is taken up again.
    disk.by_us(writing(), &[Change::ZeroUnmap(0, SIZE)]);
    shared_by(&disk.left().entries);
}

#[test]
fn stock_qemu_may_snapshot_grow_and_commit_such_an_image() {
    let disk = Disk::make(&OVERLAY);
    disk.by_us(sharing(), &[Change::Zero(0, SIZE)]);
    let path = disk.path.to_str().unwrap();
    let steps: [&[&str]; 6] = [
        &["snapshot", "-c", "one", path],
        &["snapshot", "-a", "one", path],
        &["snapshot", "-d", "one", path],
        &["resize", "-q", path, "8G"],
        &["amend", "-o", "compat=1.1", path],
        &["commit", "-q", path],
    ];
    for step in steps {
        QEMU_IMG.succeed(step);
        let checked = qemu_img_check(&disk.path);
        assert!(checked.is_clean(), "{step:?}: {}", checked.text);
    }
}

#[test]
fn shrinking_by_stock_qemu_leaks_the_zeros_and_nothing_worse() {
    let disk = Disk::make(&OVERLAY);
    disk.by_us(sharing(), &[Change::Zero(0, SIZE)]);
    QEMU_IMG.succeed(["resize", "-q", "--shrink", disk.path.to_str().unwrap(), "512k"]);
    let checked = qemu_img_check(&disk.path);
    assert!(checked.is_safe() && checked.leaks > 0, "{}", checked.text);
    // The remembered pins are gone: another cluster is made.
    disk.by_us(writing(), &[Change::Zero(0, SIZE / 2)]);
    assert!(qemu_img_check(&disk.path).is_safe());
    qemu_io(&disk.path, [format!("read -P 0 0 {}", SIZE / 2)]);
}

#[test]
fn the_next_run_takes_the_same_cluster_up_again() {
    let disk = Disk::make(&OVERLAY);
    disk.by_us(sharing(), &[Change::Zero(0, CLUSTER)]);
    let allocated = disk.left().allocated;
    disk.by_us(writing(), &[Change::Zero(4 * CLUSTER, 4 * CLUSTER)]);
    let left = disk.left();
    shared_by(&[&left.entries[..1], &left.entries[4..8]].concat());
    assert_eq!(left.allocated, allocated);
    disk.by_us(
        writing().shared_zero_cluster(SharedZeroCluster::Off),
        &[Change::Zero(SIZE / 2, CLUSTER)],
    );
    assert!(disk.left().entries[8].is_copied());
}

/// Returns where the extension's data lies in the file.
fn hint_at(bytes: &[u8]) -> usize {
    bytes[..512].windows(4).position(|word| word == MAGIC).expect("remembered") + 8
}

/// Returns where the first pin's entry lies.
fn pin_at(bytes: &[u8]) -> usize {
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let header = Header::decode(&bytes[..CLUSTER as usize]).unwrap();
    let pin = GuestOffset(word(hint_at(bytes)) * CLUSTER);
    let index = header.geometry.l1_index(pin) as usize;
    let table = L1Entry(word(header.l1.offset.0 as usize + 8 * index)).table().unwrap();
    table.0 as usize + 8 * header.geometry.l2_index(pin) as usize
}

fn put(bytes: &mut [u8], at: usize, word: u64) {
    bytes[at..at + 8].copy_from_slice(&word.to_be_bytes());
}

#[test]
fn a_hint_that_names_something_else_is_not_believed() {
    let disk = mixed();
    disk.by_us(sharing(), &[Change::Zero(6 * CLUSTER, CLUSTER)]);
    let sound = std::fs::read(&disk.path).unwrap();
    let shared = disk.left().entries[6];
    // A data cluster, a sharer within the disk, nothing, beyond all tables, beyond all numbers; none at
    // the place of a pin in its table.
    for cluster in [0, 6, 12, 8000, 1 << 40, u64::MAX - 8191, u64::MAX / CLUSTER - 8191] {
        let mut bytes = sound.clone();
        let at = hint_at(&bytes);
        put(&mut bytes, at, cluster);
        std::fs::write(&disk.path, &bytes).unwrap();
        disk.by_us(writing(), &[Change::Zero(8 * CLUSTER, 2 * CLUSTER)]);
        let left = disk.left();
        assert_ne!(shared_by(&left.entries[8..10]), shared.word, "{cluster:#x}");
        assert_eq!(left.bytes[..4 * CLUSTER as usize], [7; 4 * CLUSTER as usize]);
        assert_zero(&left, 8 * CLUSTER, 10 * CLUSTER);
    }
}

#[test]
fn a_pin_that_shows_no_shared_zeros_is_not_believed() {
    let disk = mixed();
    disk.by_us(sharing(), &[Change::Zero(6 * CLUSTER, CLUSTER)]);
    let sound = std::fs::read(&disk.path).unwrap();
    let pin = pin_at(&sound);
    let zeros = u64::from_be_bytes(sound[pin..pin + 8].try_into().unwrap());
    let data = disk.left().entries[0].word;
    // COPIED, compressed, a flag, out of line, beyond the file, a table, somebody's data.
    let words =
        [zeros | 1 << 63, zeros | 1 << 62, zeros | 1, zeros + 512, 1 << 40, 0, 2 * CLUSTER, data];
    for word in words {
        let mut bytes = sound.clone();
        put(&mut bytes, pin, word);
        std::fs::write(&disk.path, &bytes).unwrap();
        let image = disk.open(writing());
        let range = GuestRange::new(GuestOffset(8 * CLUSTER), CLUSTER);
        block_on(image.write_zeroes(range, ZeroFlags::empty())).unwrap();
        assert_eq!(read(&image, 0, CLUSTER), vec![7; CLUSTER as usize], "{word:#x}");
        assert_eq!(read(&image, range.start.0, CLUSTER), vec![0; CLUSTER as usize], "{word:#x}");
    }
    // Bytes that are not zeros.
    let mut bytes = sound.clone();
    bytes[zeros as usize + 100] = 1;
    std::fs::write(&disk.path, &bytes).unwrap();
    disk.by_us(writing(), &[Change::Zero(8 * CLUSTER, CLUSTER)]);
    let left = disk.left();
    assert_ne!(left.entries[8].word, zeros);
    assert_eq!(left.bytes[6 * CLUSTER as usize + 100], 1);
    assert_zero(&left, 8 * CLUSTER, 9 * CLUSTER);
}

fn read(image: &Image<FileStorage>, at: u64, len: u64) -> Vec<u8> {
    let buffer = lacuna::buffer::Buffer::new(len as usize);
    let (result, bytes) = block_on(image.read(GuestOffset(at), buffer));
    result.unwrap();
    bytes.to_vec()
}

#[test]
fn a_full_refcount_begins_another_cluster() {
    const SMALL: u64 = 512;
    // More clusters than 16 bits can count.
    let size_bytes = 70_000 * SMALL;
    let options = "compat=0.10,cluster_size=512";
    let disk = Disk::make(&Setup { options, size_bytes, ..OVERLAY });
    disk.by_us(sharing(), &[Change::ZeroUnmap(0, size_bytes)]);
    let left = disk.left();
    let first = left.entries[0].word;
    let sharers = left.entries.iter().filter(|entry| entry.word == first).count();
    assert_eq!(sharers, 65_535 - 2, "two of the references are pins");
    shared_by(&left.entries[sharers..]);
    assert_zero(&left, 0, size_bytes);
    // Both are pinned: stock QEMU may overwrite what it likes.
    disk.by_qemu(&[Change::Write((sharers as u64 - 8) * SMALL, 100 * SMALL, 4)]);
    disk.left();
}

#[test]
fn pins_keep_out_of_the_way_of_a_disk_that_changes_its_size() {
    const SMALL: u64 = 512;
    let options = "compat=0.10,cluster_size=512";
    let disk = Disk::make(&Setup { options, size_bytes: 64 << 10, ..OVERLAY });
    disk.by_us(sharing(), &[Change::Zero(0, 64 << 10)]);
    // The L1 table is a cluster of 64 entries, which map 2 MiB.
    for size_bytes in [1 << 20, 4 << 20, 96 << 10, 32 << 10, 3 << 20] {
        let image = disk.open(writing());
        block_on(image.resize(size_bytes, Shrink::Allow)).unwrap();
        block_on(image.close()).unwrap();
        let left = disk.left();
        assert_zero(&left, 0, size_bytes);
        let (shared, allocated) = (shared_by(&left.entries[..64]), left.allocated);
        disk.by_us(writing(), &[Change::Write(0, SMALL, 3), Change::ZeroUnmap(0, SMALL)]);
        assert_eq!(shared_by(&disk.left().entries[..64]), shared, "at {size_bytes}");
        assert_not_larger(disk.allocated(), allocated);
        disk.by_qemu(&[Change::Write(512, 62 * SMALL, 3)]);
        disk.left();
        disk.by_us(writing(), &[Change::ZeroUnmap(0, 64 * SMALL)]);
    }
}

#[test]
fn a_fast_request_shares_with_leave_to_unmap_only() {
    let disk = mixed();
    let image = disk.open(sharing());
    let data = GuestRange::new(GuestOffset(0), 2 * CLUSTER);
    let fast = block_on(image.write_zeroes(data, ZeroFlags::FAST));
    assert_eq!(fast.unwrap_err().kind(), lacuna::ErrorKind::Unsupported);
    assert_eq!(read(&image, 0, CLUSTER), vec![7; CLUSTER as usize]);
    block_on(image.write_zeroes(data, ZeroFlags::FAST | ZeroFlags::MAY_UNMAP)).unwrap();
    block_on(image.discard(data, DiscardMode::Full)).unwrap();
    assert_eq!(read(&image, 0, CLUSTER), vec![BELOW; CLUSTER as usize]);
    block_on(image.close()).unwrap();
    disk.left();
}
