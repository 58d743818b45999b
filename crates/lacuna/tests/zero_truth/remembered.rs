//! The wish to keep places, remembered in the image (002-6): an extension that stock tools leave
//! alone, and an autoclear bit that they clear.

use std::path::Path;
use std::sync::Arc;

use lacuna::block::{DiscardMode, Layer, Preallocation, WriteFlags, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::qcow2::check::{CheckOptions, Repair, check};
use lacuna::qcow2::format::{AutoclearFeatures, EntryWidth, Header, L2Entry, Version};
use lacuna::qcow2::{
    Access, CreateOptions, Image, OnDiscard, OpenOptions, Parts, PreallocationLayout, create,
};
use lacuna::storage::MemoryStorage;
use lacuna::units::{GuestOffset, GuestRange};
use pollster::block_on;
use testkit::foreign::{QEMU_IMG, qemu_img_check, qemu_io};

use super::scenario::{entries_of, writing};

const CLUSTER: u64 = 64 << 10;
const SIZE: u64 = 8 * CLUSTER;

fn remembering() -> CreateOptions {
    CreateOptions {
        size_bytes: SIZE,
        keep_mapping: true,
        preallocation: Preallocation::Metadata,
        preallocation_layout: PreallocationLayout::Contiguous,
        ..CreateOptions::default()
    }
}

fn made(options: &CreateOptions) -> Arc<MemoryStorage> {
    let storage = MemoryStorage::new();
    block_on(create(&storage, options)).unwrap();
    Arc::new(storage)
}

fn open(storage: &Arc<MemoryStorage>, options: OpenOptions) -> Image<Arc<MemoryStorage>> {
    block_on(Image::open(Parts::alone(Arc::clone(storage)), options)).unwrap()
}

fn header(storage: &MemoryStorage) -> Header {
    Header::decode(&storage.to_vec()).unwrap()
}

/// Whether the image says that everybody kept places so far.
fn says_kept(storage: &MemoryStorage) -> bool {
    header(storage).features.autoclear.contains(AutoclearFeatures::MAPPING_KEPT)
}

fn hosts(storage: &MemoryStorage) -> Vec<Option<u64>> {
    entries_of(&storage.to_vec()).iter().map(|entry| entry.host().map(|host| host.0)).collect()
}

fn write(image: &impl Layer, at: u64, len: u64) {
    let bytes = Buffer::from(&vec![7; len as usize][..]);
    block_on(image.write(GuestOffset(at), bytes, WriteFlags::empty())).0.unwrap();
}

fn discard(image: &impl Layer, at: u64, len: u64) {
    let range = GuestRange::new(GuestOffset(at), len);
    block_on(image.discard(range, DiscardMode::Guest)).unwrap();
}

fn zero_and_discard(image: &impl Layer) {
    write(image, 0, SIZE);
    discard(image, CLUSTER, 2 * CLUSTER);
    let range = GuestRange::new(GuestOffset(4 * CLUSTER), 2 * CLUSTER);
    block_on(image.write_zeroes(range, ZeroFlags::MAY_UNMAP)).unwrap();
}

#[test]
fn an_image_remembers_to_keep_places_without_any_option() {
    for entry_width in [EntryWidth::Standard, EntryWidth::Extended] {
        let storage = made(&CreateOptions { entry_width, ..remembering() });
        let places = hosts(&storage);
        for _ in 0..2 {
            let image = open(&storage, writing());
            zero_and_discard(&image);
            block_on(image.close()).unwrap();
            assert_eq!(hosts(&storage), places);
            assert!(says_kept(&storage) && header(&storage).keeps_mapping());
        }
    }
}

#[test]
fn an_image_that_was_not_asked_to_frees_and_says_nothing() {
    let storage = made(&CreateOptions { keep_mapping: false, ..remembering() });
    let image = open(&storage, writing());
    zero_and_discard(&image);
    block_on(image.close()).unwrap();
    assert_eq!(hosts(&storage).iter().filter(|host| host.is_none()).count(), 4);
    assert!(!says_kept(&storage) && !header(&storage).keeps_mapping());
}

#[test]
fn an_option_overrides_what_the_image_remembers_and_it_stops_saying_that_places_were_kept() {
    let storage = made(&remembering());
    let image = open(&storage, writing().on_discard(OnDiscard::Free));
    assert!(!says_kept(&storage), "before the first place can be taken");
    zero_and_discard(&image);
    block_on(image.close()).unwrap();
    assert_eq!(hosts(&storage).iter().filter(|host| host.is_none()).count(), 4);
    // The wish stays: from here on places are kept again, and nothing is claimed of the past.
    let places = hosts(&storage);
    let image = open(&storage, writing());
    discard(&image, 0, SIZE);
    block_on(image.close()).unwrap();
    assert_eq!(hosts(&storage), places);
    assert!(header(&storage).keeps_mapping() && !says_kept(&storage));
}

#[test]
fn opening_read_only_or_with_the_same_wish_changes_nothing() {
    let storage = made(&remembering());
    drop(open(&storage, OpenOptions::new(Access::ReadOnly).on_discard(OnDiscard::Free)));
    assert!(says_kept(&storage));
    let image = open(&storage, writing().on_discard(OnDiscard::KeepMapping));
    block_on(image.close()).unwrap();
    assert!(says_kept(&storage));
}

#[test]
fn after_a_stock_writer_the_wish_is_there_and_the_claim_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.qcow2");
    let image = made(&remembering()).to_vec();
    for (event, keeps_bit) in
        [("read", true), ("write", false), ("resize", false), ("snapshot", false)]
    {
        std::fs::write(&path, &image).unwrap();
        stock(event, &path);
        assert!(qemu_img_check(&path).is_clean());
        let storage = Arc::new(MemoryStorage::from(&std::fs::read(&path).unwrap()[..]));
        assert_eq!(says_kept(&storage), keeps_bit, "{event}");
        assert!(header(&storage).keeps_mapping(), "{event}");
        // Nothing the stranger did makes it wrong to keep places from here on.
        let places = hosts(&storage);
        let image = open(&storage, writing());
        discard(&image, 0, SIZE);
        block_on(image.close()).unwrap();
        assert_eq!(hosts(&storage), places, "{event}");
        std::fs::write(&path, storage.to_vec()).unwrap();
        assert!(qemu_img_check(&path).is_clean(), "{event}");
    }
}

fn stock(event: &str, path: &Path) {
    let name = path.to_str().unwrap();
    match event {
        "read" => drop(QEMU_IMG.succeed(["bench", "-q", "-c", "1", "-f", "qcow2", name])),
        "write" => drop(qemu_io(path, ["write 0 64k".to_owned(), "discard 64k 64k".to_owned()])),
        "resize" => drop(QEMU_IMG.succeed(["resize", "-q", name, "1M"])),
        _ => drop(QEMU_IMG.succeed(["snapshot", "-c", "one", name])),
    }
}

#[test]
fn a_repair_stops_saying_that_places_were_kept() {
    let storage = made(&remembering());
    let options = CheckOptions { repair: Repair::All };
    block_on(check(&storage, &options, &mut |_| {})).unwrap();
    assert!(!says_kept(&storage) && header(&storage).keeps_mapping());
}

#[test]
fn version_2_cannot_remember() {
    let options = CreateOptions { version: Version::V2, ..remembering() };
    let error = block_on(create(&MemoryStorage::new(), &options)).unwrap_err();
    assert!(error.to_string().contains("keep their place"), "{error}");
}

#[test]
fn the_smallest_clusters_have_room_for_the_wish() {
    let storage = made(&CreateOptions { cluster_bytes: 512, ..remembering() });
    assert!(header(&storage).keeps_mapping() && says_kept(&storage));
}

#[test]
fn a_compressed_write_goes_to_the_place_that_a_cluster_has() {
    let storage = made(&remembering());
    let places = hosts(&storage);
    let image = open(&storage, writing());
    discard(&image, 0, SIZE);
    for cluster in 0..2 {
        let bytes = Buffer::from(&[7; CLUSTER as usize][..]);
        block_on(image.write_compressed(GuestOffset(cluster * CLUSTER), bytes)).0.unwrap();
    }
    let (result, bytes) = block_on(image.read(GuestOffset(0), Buffer::new(2 * CLUSTER as usize)));
    result.unwrap();
    assert!(bytes.iter().all(|byte| *byte == 7));
    block_on(image.close()).unwrap();
    assert_eq!(hosts(&storage), places);
}

#[test]
fn a_compressed_write_to_a_cluster_without_a_place_is_compressed() {
    let none = CreateOptions {
        preallocation: Preallocation::Off,
        preallocation_layout: PreallocationLayout::default(),
        ..remembering()
    };
    let storage = made(&none);
    let image = open(&storage, writing());
    let bytes = Buffer::from(&[7; CLUSTER as usize][..]);
    block_on(image.write_compressed(GuestOffset(0), bytes)).0.unwrap();
    block_on(image.close()).unwrap();
    assert!(entries_of(&storage.to_vec())[0].is_compressed());
}

/// A snapshot needs its bytes where they are: a write goes elsewhere, once; the new place is kept.
#[test]
fn only_a_write_under_a_snapshot_moves_a_cluster() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.qcow2");
    let storage = made(&remembering());
    let image = open(&storage, writing());
    write(&image, 0, SIZE);
    block_on(image.close()).unwrap();
    std::fs::write(&path, storage.to_vec()).unwrap();
    QEMU_IMG.succeed(["snapshot", "-c", "one", path.to_str().unwrap()]);
    let storage = Arc::new(MemoryStorage::from(&std::fs::read(&path).unwrap()[..]));
    let places = hosts(&storage);

    let image = open(&storage, writing());
    discard(&image, 0, 2 * CLUSTER);
    block_on(image.flush()).unwrap();
    assert_eq!(hosts(&storage), places, "a discard moves nothing");
    assert!(entries(&storage)[..2].iter().all(|entry| !entry.is_copied()), "still shared");
    write(&image, 0, 512);
    write(&image, 2 * CLUSTER, 512);
    block_on(image.flush()).unwrap();
    let moved = hosts(&storage);
    assert!(moved[0] != places[0] && moved[2] != places[2], "copied on write");
    assert_eq!((moved[1], &moved[3..]), (places[1], &places[3..]));
    for _ in 0..2 {
        discard(&image, 0, SIZE);
        write(&image, 0, 512);
        write(&image, 2 * CLUSTER, 512);
    }
    block_on(image.close()).unwrap();
    assert_eq!(hosts(&storage), moved, "from then on it stays");

    std::fs::write(&path, storage.to_vec()).unwrap();
    assert!(qemu_img_check(&path).is_clean());
    QEMU_IMG.succeed(["snapshot", "-a", "one", path.to_str().unwrap()]);
    qemu_io(&path, [format!("read -P 7 0 {SIZE}")]);
}

fn entries(storage: &MemoryStorage) -> Vec<L2Entry> {
    entries_of(&storage.to_vec())
}
