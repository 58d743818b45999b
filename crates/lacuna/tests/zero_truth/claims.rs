//! All-zero and all-unallocated in O(1): private bits and what changes them (000-1 to -16).

use std::path::Path;

use lacuna::block::{
    DiscardMode, Extent, ExtentStatus, KnownZeroes, Layer, Preallocation, WriteFlags, ZeroFlags,
    is_all_zeroes,
};
use lacuna::buffer::Buffer;
use lacuna::job::{ConvertOptions, convert};
use lacuna::qcow2::check::{CheckOptions, FindingKind, Repair, check};
use lacuna::qcow2::format::{AutoclearFeatures, Header};
use lacuna::qcow2::{
    Access, BackingName, CreateOptions, Image, OpenOptions, Parts, Shrink, create,
};
use lacuna::raw::Raw;
use lacuna::storage::{Create, FileAccess, FileOptions, FileStorage, MemoryStorage};
use lacuna::units::{GuestOffset, GuestRange};
use pollster::block_on;
use std::sync::Arc;
use testkit::foreign::{QEMU_IMG, QEMU_IO, qemu_img_check};

const CLUSTER: u64 = 64 << 10;
const BOTH: AutoclearFeatures = AutoclearFeatures::ZERO_CLAIMS;
const ZERO: AutoclearFeatures = AutoclearFeatures::ALL_ZERO;
const UNALLOCATED: AutoclearFeatures = AutoclearFeatures::ALL_UNALLOCATED;
const NONE: AutoclearFeatures = AutoclearFeatures::empty();

fn claiming() -> CreateOptions {
    CreateOptions { size_bytes: 1 << 20, zero_claims: true, ..CreateOptions::default() }
}

/// A new image in memory.
fn new(options: &CreateOptions) -> Arc<MemoryStorage> {
    let storage = Arc::new(MemoryStorage::new());
    block_on(create(&storage, options)).unwrap();
    storage
}

fn open(storage: &Arc<MemoryStorage>) -> Image<Arc<MemoryStorage>> {
    let parts = Parts::alone(Arc::clone(storage));
    block_on(Image::open(parts, OpenOptions::new(Access::ReadWrite))).unwrap()
}

fn claims(bytes: &[u8]) -> AutoclearFeatures {
    Header::decode(&bytes[..CLUSTER as usize]).unwrap().features.autoclear & BOTH
}

fn range(start: u64, len: u64) -> GuestRange {
    GuestRange::new(GuestOffset(start), len)
}

fn write(image: &Image<Arc<MemoryStorage>>, byte: u8) {
    let bytes = Buffer::from(&[byte; 512][..]);
    block_on(image.write(GuestOffset(0), bytes, WriteFlags::empty())).0.unwrap();
}

#[test]
fn a_new_image_claims_what_is_true_where_it_was_asked_to() {
    assert_eq!(claims(&new(&claiming()).to_vec()), BOTH);
    let silent = CreateOptions { zero_claims: false, ..claiming() };
    assert_eq!(claims(&new(&silent).to_vec()), NONE);
    for preallocation in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
        let options = CreateOptions { preallocation, ..claiming() };
        assert_eq!(claims(&new(&options).to_vec()), ZERO, "{preallocation:?} (000-12)");
    }
    let backing = Some(BackingName { name: "below".into(), format: Some("raw".into()) });
    let overlay = CreateOptions { backing, ..claiming() };
    assert_eq!(claims(&new(&overlay).to_vec()), UNALLOCATED, "000-2");
}

#[test]
fn version_2_has_no_bits_to_claim_with() {
    let options = CreateOptions { version: lacuna::qcow2::format::Version::V2, ..claiming() };
    let error = block_on(create(&MemoryStorage::new(), &options)).unwrap_err();
    assert!(error.to_string().contains("version 3 (compat=1.1) can"), "{error}");
}

/// The state machine of A.1.2: an event and what is claimed afterwards.
#[test]
fn each_event_leaves_the_claims_that_are_still_true() {
    type Event = fn(&Image<Arc<MemoryStorage>>);
    let events: [(&str, Event, AutoclearFeatures); 9] = [
        ("nothing", |_| {}, BOTH),
        ("a read", |image| drop(block_on(image.read(GuestOffset(0), Buffer::new(512)))), BOTH),
        ("a write", |image| write(image, 7), NONE),
        ("a write of zeros", |image| write(image, 0), NONE),
        (
            "a compressed write",
            |image| {
                let bytes = Buffer::from(&vec![7; CLUSTER as usize][..]);
                block_on(image.write_compressed(GuestOffset(0), bytes)).0.unwrap();
            },
            NONE,
        ),
        (
            "write zeroes",
            |image| block_on(image.write_zeroes(range(0, CLUSTER), ZeroFlags::empty())).unwrap(),
            ZERO,
        ),
        (
            "discard of nothing",
            |image| block_on(image.discard(image.whole(), DiscardMode::Guest)).unwrap(),
            BOTH,
        ),
        ("growth", |image| block_on(image.resize(2 << 20, Shrink::Refuse)).unwrap(), BOTH),
        ("shrinking", |image| block_on(image.resize(1 << 19, Shrink::Allow)).unwrap(), BOTH),
    ];
    for (what, event, left) in events {
        let storage = new(&claiming());
        let image = open(&storage);
        event(&image);
        block_on(image.close()).unwrap();
        assert_eq!(claims(&storage.to_vec()), left, "{what}");
        let report = block_on(check(&storage, &CheckOptions::default(), &mut |_| {})).unwrap();
        assert!(report.is_clean(), "{what}: {report:?}");
    }
}

/// The host copies past the engine: what it brings is not looked at.
#[test]
fn a_range_copied_by_the_host_takes_the_claims_off() {
    let folder = tempfile::tempdir().unwrap();
    let (path, data) = (folder.path().join("a.qcow2"), folder.path().join("data"));
    on_disk(&path);
    std::fs::write(&data, [7; 4096]).unwrap();
    let storage = FileStorage::open(&path, &FileOptions::read_write()).unwrap();
    let parts = Parts::alone(storage);
    let image = block_on(Image::open(parts, OpenOptions::new(Access::ReadWrite))).unwrap();
    let source = FileStorage::open(&data, &FileOptions::read_only()).unwrap();
    let source = block_on(Raw::open(source)).unwrap();
    let extent = block_on(source.extents(source.whole())).unwrap()[0];
    let copied = block_on(image.copy_from(GuestOffset(0), source.host_source(&extent).unwrap()));
    // Whether the file system can copy or not: the claims went before it was asked.
    drop(copied);
    assert_eq!(claims(&std::fs::read(&path).unwrap()), NONE);
}

/// An image that was not closed is repaired when it is opened; what it said then counts no more.
#[test]
fn the_repair_of_an_image_that_was_not_closed_takes_the_claims_off() {
    let storage = new(&CreateOptions { lazy_refcounts: true, ..claiming() });
    let dirty = Buffer::from(&[1][..]);
    let byte = lacuna::units::HostOffset(79);
    block_on(lacuna::storage::Storage::write_at(&storage, byte, dirty)).0.unwrap();
    assert_eq!(claims(&storage.to_vec()), BOTH);
    block_on(open(&storage).close()).unwrap();
    assert_eq!(claims(&storage.to_vec()), NONE);
}

/// A later format may give the bits another meaning: then it names them.
#[test]
fn a_bit_that_the_image_calls_something_else_claims_nothing() {
    let storage = new(&claiming());
    let mut bytes = storage.to_vec();
    let at = bytes.windows(8).position(|name| name == b"all zero").unwrap();
    bytes[at..at + 8].copy_from_slice(b"all mine");
    // Data, so that the claim would be a lie.
    let storage = Arc::new(MemoryStorage::from(&bytes[..]));
    let header = Header::decode(&bytes[..CLUSTER as usize]).unwrap();
    assert_eq!(header.zero_claims(), UNALLOCATED);
    block_on(open(&storage).close()).unwrap();
    assert_eq!(claims(&storage.to_vec()), UNALLOCATED, "an unknown autoclear bit is cleared");
}

/// 000-6, 000-12: a disk that is mapped everywhere reads as zeros everywhere, by its claim.
#[test]
fn a_claim_of_zeros_shows_in_every_extent_and_leaves_the_other_facts_alone() {
    let extents = |zero_claims| {
        let options = CreateOptions {
            size_bytes: 40 << 20,
            cluster_bytes: 4096,
            preallocation: Preallocation::Full,
            zero_claims,
            ..claiming()
        };
        let image = open(&new(&options));
        block_on(image.extents(image.whole())).unwrap()
    };
    let (claimed, silent) = (extents(true), extents(false));
    assert!(claimed.iter().all(|it| it.status.reads_zero && !it.status.is_hole));
    assert!(silent.iter().all(|it| !it.status.reads_zero && !it.status.is_hole));
    let places = |extents: &[Extent]| -> Vec<_> {
        extents.iter().map(|it| (it.range, it.status.host, it.status.depth)).collect()
    };
    assert_eq!(places(&claimed), places(&silent));
}

/// 000-6, 000-7: the whole disk in one answer with one extent, however many tables it could have.
#[test]
fn a_disk_that_maps_nothing_is_one_extent() {
    for zero_claims in [true, false] {
        let image = open(&new(&CreateOptions { size_bytes: 1 << 44, zero_claims, ..claiming() }));
        let extents = block_on(image.extents(image.whole())).unwrap();
        assert_eq!(extents.len(), 1, "claims: {zero_claims}");
        assert_eq!(
            (extents[0].range, extents[0].status),
            (image.whole(), ExtentStatus::UNALLOCATED)
        );
    }
}

/// Both ends know: the target keeps its space and its claim, and nothing is looked at.
#[test]
fn a_copy_of_a_zero_disk_leaves_a_preallocated_zero_target_as_it_is() {
    let full = CreateOptions { preallocation: Preallocation::Full, ..claiming() };
    let (source, target) = (open(&new(&full)), new(&full));
    let before = target.to_vec();
    let image = open(&target);
    let copied = block_on(convert(&source, &image, &ConvertOptions::default(), &mut |_| ()));
    assert_eq!(copied.unwrap().skipped_bytes, 1 << 20);
    block_on(image.close()).unwrap();
    assert!(target.to_vec() == before, "the target was changed");
}

#[test]
fn zeros_of_a_backing_layer_are_no_reason_to_leave_a_target_alone() {
    let below = block_on(Raw::create(MemoryStorage::new(), 1 << 20)).unwrap();
    let backing = Some(BackingName { name: "below".into(), format: Some("raw".into()) });
    let storage = new(&CreateOptions { backing, ..claiming() });
    let parts = Parts { backing: Some(Arc::new(below)), ..Parts::alone(Arc::clone(&storage)) };
    let image = block_on(Image::open(parts, OpenOptions::new(Access::ReadWrite))).unwrap();
    let source = open(&new(&claiming()));
    let copied = block_on(convert(&source, &image, &ConvertOptions::default(), &mut |_| ()));
    assert_eq!(copied.unwrap().zeroed_bytes, 1 << 20);
    let extents = block_on(image.extents(image.whole())).unwrap();
    assert!(extents.iter().all(|it| it.status.reads_zero && it.status.depth.0 == 1));
    block_on(image.close()).unwrap();
}

#[test]
fn a_claim_is_off_on_storage_before_the_write_returns() {
    let storage = new(&claiming());
    let image = open(&storage);
    write(&image, 7);
    assert_eq!(claims(&storage.to_vec()), NONE);
}

#[test]
fn growth_with_preallocation_maps_and_is_still_all_zero() {
    let storage = new(&claiming());
    let image = open(&storage);
    block_on(image.grow(2 << 20, Preallocation::Metadata)).unwrap();
    block_on(image.close()).unwrap();
    assert_eq!(claims(&storage.to_vec()), ZERO);
}

#[test]
fn make_zero_does_nothing_where_zero_is_known_and_claims_it_afterwards() {
    let storage = new(&claiming());
    let image = open(&storage);
    let before = storage.to_vec();
    block_on(image.make_zero()).unwrap();
    assert!(storage.to_vec() == before, "000-15");
    write(&image, 7);
    assert!(!block_on(image.known_zeroes()).unwrap().open);
    block_on(image.make_zero()).unwrap();
    assert!(block_on(image.known_zeroes()).unwrap().open);
    assert_eq!(claims(&storage.to_vec()), ZERO);
    write(&image, 7);
    assert_eq!(claims(&storage.to_vec()), NONE, "and off again");
    block_on(image.close()).unwrap();
}

/// The wish stands in the table of names, for which QEMU finds no room in small clusters.
#[test]
fn the_wish_is_remembered_at_every_cluster_size() {
    for cluster_bytes in [512, 4096, 8192, 2 << 20] {
        let storage = new(&CreateOptions { cluster_bytes, ..claiming() });
        let image = open(&storage);
        write(&image, 7);
        block_on(image.make_zero()).unwrap();
        block_on(image.close()).unwrap();
        let header = block_on(lacuna::qcow2::read_header(&storage)).unwrap();
        assert_eq!(header.zero_claims(), ZERO, "clusters of {cluster_bytes} bytes");
    }
}

#[test]
fn an_image_that_was_not_asked_to_claims_nothing_after_make_zero() {
    let storage = new(&CreateOptions { zero_claims: false, ..claiming() });
    let image = open(&storage);
    write(&image, 7);
    block_on(image.make_zero()).unwrap();
    block_on(image.close()).unwrap();
    assert_eq!(claims(&storage.to_vec()), NONE);
}

// ---- what is known ---------------------------------------------------------------------------

#[test]
fn an_empty_l1_table_is_known_to_be_zero_without_any_bit() {
    let image = open(&new(&CreateOptions { zero_claims: false, ..claiming() }));
    let known = block_on(image.known_zeroes()).unwrap();
    assert_eq!(known, KnownZeroes { create: true, truncate: true, open: true });
}

#[test]
fn a_preallocated_image_is_known_to_be_zero_by_its_claim_only() {
    for (zero_claims, open) in [(true, true), (false, false)] {
        let preallocation = Preallocation::Full;
        let options = CreateOptions { preallocation, zero_claims, ..claiming() };
        let image = self::open(&new(&options));
        assert_eq!(block_on(image.known_zeroes()).unwrap().open, open);
    }
}

#[test]
fn through_a_chain_both_layers_must_be_known_to_be_zero() {
    for (data_below, open) in [(false, true), (true, false)] {
        let below = block_on(Raw::create(MemoryStorage::new(), 1 << 20)).unwrap();
        if data_below {
            let bytes = Buffer::from(&[7; 512][..]);
            block_on(below.write(GuestOffset(0), bytes, WriteFlags::empty())).0.unwrap();
        }
        let backing = Some(BackingName { name: "below".into(), format: Some("raw".into()) });
        let storage = new(&CreateOptions { backing, ..claiming() });
        let parts = Parts { backing: Some(Arc::new(below)), ..Parts::alone(storage) };
        let image = block_on(Image::open(parts, OpenOptions::new(Access::ReadOnly))).unwrap();
        let known = block_on(image.known_zeroes()).unwrap();
        assert_eq!(known, KnownZeroes { create: false, truncate: true, open });
        assert_eq!(block_on(is_all_zeroes(&image)).unwrap(), open);
    }
}

#[test]
fn the_walk_finds_zeros_behind_a_short_head_that_it_reads() {
    for (byte, is_zero) in [(0, true), (7, false)] {
        let disk = block_on(Raw::create(MemoryStorage::new(), 1 << 30)).unwrap();
        let head = Buffer::from(&[byte; 4096][..]);
        block_on(disk.write(GuestOffset(0), head, WriteFlags::empty())).0.unwrap();
        assert_eq!(block_on(is_all_zeroes(&disk)).unwrap(), is_zero, "A.1.4");
    }
}

// ---- check -----------------------------------------------------------------------------------

#[test]
fn check_finds_a_wrong_claim_once_and_repair_takes_it_off() {
    let storage = new(&CreateOptions { zero_claims: false, ..claiming() });
    let image = open(&storage);
    write(&image, 7);
    block_on(image.close()).unwrap();
    let byte = lacuna::units::HostOffset(95);
    block_on(lacuna::storage::Storage::write_at(&storage, byte, Buffer::from(&[12][..])))
        .0
        .unwrap();
    let report = block_on(check(&storage, &CheckOptions::default(), &mut |_| {})).unwrap();
    assert_eq!(report.corruptions, 2, "one for each claim");
    let is_claim = |kind: &FindingKind| matches!(kind, FindingKind::ClaimWrong { index: 0, .. });
    assert!(report.findings.iter().all(|finding| is_claim(&finding.kind)), "{report:?}");
    let options = CheckOptions { repair: Repair::All };
    let report = block_on(check(&storage, &options, &mut |_| {})).unwrap();
    assert_eq!((report.corruptions, report.corruptions_fixed), (0, 2));
    assert_eq!(claims(&storage.to_vec()), NONE);
}

#[test]
fn a_repair_takes_claims_off_even_where_they_are_true() {
    let storage = new(&claiming());
    let options = CheckOptions { repair: Repair::Leaks };
    let report = block_on(check(&storage, &options, &mut |_| {})).unwrap();
    assert!(report.is_clean());
    assert_eq!(claims(&storage.to_vec()), NONE);
}

// ---- stock QEMU ------------------------------------------------------------------------------

fn on_disk(path: &Path) {
    let options = FileOptions {
        access: FileAccess::ReadWrite,
        create: Create::Replace,
        ..FileOptions::default()
    };
    let storage = FileStorage::open(path, &options).unwrap();
    block_on(create(&storage, &claiming())).unwrap();
}

/// 000-5: a raw file is known to be zero exactly while it is one hole.
#[test]
fn a_raw_file_is_known_to_be_zero_while_all_of_it_is_a_hole() {
    let folder = tempfile::tempdir().unwrap();
    let storage = FileStorage::open(folder.path().join("a"), &FileOptions::replace()).unwrap();
    // Not whole sectors: the tail reads as zeros too.
    let disk = block_on(Raw::create(storage, (1 << 30) + 100)).unwrap();
    let disk = block_on(Raw::open(disk.into_storage())).unwrap();
    let known = || block_on(disk.known_zeroes()).unwrap();
    assert_eq!(known(), KnownZeroes { create: true, truncate: true, open: true });
    block_on(disk.write(GuestOffset(1 << 20), Buffer::zeroed(512), WriteFlags::empty())).0.unwrap();
    assert!(!known().open, "data may be anything");
    block_on(disk.write_zeroes(disk.whole(), ZeroFlags::MAY_UNMAP)).unwrap();
    assert!(known().open);
}

/// A.1.3.
#[test]
fn stock_qemu_keeps_the_bits_while_it_reads_and_clears_them_when_it_opens_to_write() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.qcow2");
    let name = path.to_str().unwrap();
    on_disk(&path);
    assert!(qemu_img_check(&path).is_clean());
    for words in [&["info", name][..], &["map", name], &["snapshot", "-l", name]] {
        QEMU_IMG.succeed(words);
        assert_eq!(claims(&std::fs::read(&path).unwrap()), BOTH, "{words:?}");
    }
    QEMU_IO.succeed(["-r", "-c", "read 0 64k", name]);
    assert_eq!(claims(&std::fs::read(&path).unwrap()), BOTH);
    QEMU_IO.succeed(["-c", "read 0 64k", name]);
    assert_eq!(claims(&std::fs::read(&path).unwrap()), NONE, "opened to write, nothing written");
    on_disk(&path);
    QEMU_IMG.succeed(["check", "-q", "-r", "all", name]);
    assert_eq!(claims(&std::fs::read(&path).unwrap()), NONE);
}
