//! What the engine does with images that contradict themselves, and with bits it does not know.

use std::sync::Arc;

use lacuna::ErrorKind;
use lacuna::block::{Layer, WriteFlags, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::qcow2::format::{IncompatibleFeatures, Version};
use lacuna::qcow2::{Access, CreateOptions, Image, OpenOptions, Parts, create, read_header};
use lacuna::storage::{MemoryStorage, Storage};
use lacuna::units::{GuestOffset, GuestRange, HostOffset};
use lacuna::{Error, Result};
use pollster::block_on;

type Memory = Arc<MemoryStorage>;

/// Where the first L2 table of a fresh image with one written cluster lies, and its data.
const L2: u64 = 0x40000;
const DATA: u64 = 0x50000;

fn image(version: Version) -> Memory {
    let storage = Arc::new(MemoryStorage::new());
    let options = CreateOptions { size_bytes: 64 << 20, version, ..CreateOptions::default() };
    block_on(create(&storage, &options)).unwrap();
    let image = open(&storage, Access::ReadWrite).unwrap();
    write(&image, 0).unwrap();
    block_on(image.close()).unwrap();
    assert_eq!(word(&storage, L2), DATA | 1 << 63, "the layout this file relies on");
    storage
}

fn open(storage: &Memory, access: Access) -> Result<Image<Memory>> {
    block_on(Image::open(Parts::alone(storage.clone()), OpenOptions::new(access)))
}

fn write(image: &Image<Memory>, start: u64) -> Result<()> {
    let bytes = Buffer::from(&[1; 4096][..]);
    block_on(image.write(GuestOffset(start), bytes, WriteFlags::empty())).0
}

fn read(image: &Image<Memory>, start: u64) -> Result<Vec<u8>> {
    let (result, bytes) = block_on(image.read(GuestOffset(start), Buffer::new(4096)));
    result.map(|()| bytes.to_vec())
}

fn poke(storage: &Memory, offset: u64, bytes: &[u8]) {
    block_on(storage.write_at(HostOffset(offset), Buffer::from(bytes))).0.unwrap();
}

fn word(storage: &Memory, offset: u64) -> u64 {
    let (result, bytes) = block_on(storage.read_at(HostOffset(offset), Buffer::new(8)));
    result.unwrap();
    u64::from_be_bytes(bytes[..8].try_into().unwrap())
}

fn is_marked(storage: &Memory) -> bool {
    let header = block_on(read_header(storage)).unwrap();
    header.features.incompatible.contains(IncompatibleFeatures::CORRUPT)
}

fn assert_corrupt<T: std::fmt::Debug>(result: Result<T>, text: &str) {
    let error: Error = result.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert!(error.to_string().contains(text), "{error}");
}

#[test]
fn a_write_that_would_hit_metadata_is_refused_and_marks_the_image() {
    for (target, name) in [
        (0, "the header"),
        (0x10000, "the refcount table"),
        (0x20000, "a refcount block"),
        (0x30000, "the active L1 table"),
        (L2, "an active L2 table"),
    ] {
        let storage = image(Version::V3);
        // Offset 0 means "no cluster" in an entry; the header is hit by way of the allocator.
        if target == 0 {
            poke(&storage, 0x20000, &[0; 2]);
        } else {
            poke(&storage, L2, &(target | 1 << 63).to_be_bytes());
        }
        let before = storage.to_vec();
        let image = open(&storage, Access::ReadWrite).unwrap();
        let start = if target == 0 { 1 << 20 } else { 0 };
        let name = if target == 0 { "refcount 0" } else { name };
        assert_corrupt(write(&image, start), name);
        assert!(is_marked(&storage), "{name}");
        assert_corrupt(write(&image, 8 << 20), "closed to changes");
        let after = storage.to_vec();
        assert_eq!(before[512..], after[512..before.len()], "{name}: nothing but the mark changed");
        drop(image);
        assert_corrupt(open(&storage, Access::ReadWrite), "marked corrupt");
        assert!(open(&storage, Access::ReadOnly).is_ok());
    }
}

#[test]
fn entries_that_point_nowhere_sensible_fail_reads_and_mark_only_what_is_open_for_writing() {
    for (entry, text) in [
        (DATA | 0x200 | 1 << 63, "no multiple of the cluster size"),
        (0x7f_0000_0000 | 1 << 63, "beyond the end of the file"),
    ] {
        let storage = image(Version::V3);
        poke(&storage, L2, &entry.to_be_bytes());
        if entry & 0x200 != 0 {
            let image = open(&storage, Access::ReadOnly).unwrap();
            assert_corrupt(read(&image, 0), text);
            assert!(!is_marked(&storage));
        }
        let image = open(&storage, Access::ReadWrite).unwrap();
        assert_corrupt(read(&image, 0), text);
        assert!(is_marked(&storage));
    }
}

#[test]
fn no_change_goes_over_an_entry_that_points_into_another_cluster() {
    for zeroes in [false, true] {
        let storage = image(Version::V3);
        // The second cluster's entry points into the first one's cluster.
        poke(&storage, L2 + 8, &(DATA | 0x200).to_be_bytes());
        let image = open(&storage, Access::ReadWrite).unwrap();
        let range = GuestRange::new(GuestOffset(0), 2 << 16);
        let result = if zeroes {
            block_on(image.write_zeroes(range, ZeroFlags::MAY_UNMAP))
        } else {
            let bytes = Buffer::from(&[1; 2 << 16][..]);
            block_on(image.write(range.start, bytes, WriteFlags::empty())).0
        };
        assert_corrupt(result, "no multiple of the cluster size");
        assert!(is_marked(&storage));
    }
}

#[test]
fn a_damaged_l1_entry_is_found_before_its_table_is_believed() {
    for (entry, text) in [
        (L2 | 0x200 | 1 << 63, "not a multiple of the cluster size"),
        (0x7f_0000_0000 | 1 << 63, "beyond the end of the file"),
    ] {
        let storage = image(Version::V3);
        poke(&storage, 0x30000, &entry.to_be_bytes());
        let image = open(&storage, Access::ReadWrite).unwrap();
        assert_corrupt(write(&image, 0), text);
        assert!(is_marked(&storage));
    }
}

#[test]
fn version_2_has_no_corrupt_bit_and_no_zero_flag() {
    let storage = image(Version::V2);
    poke(&storage, L2, &(DATA | 1 | 1 << 63).to_be_bytes());
    let image = open(&storage, Access::ReadWrite).unwrap();
    assert_corrupt(read(&image, 0), "zero flag of version 3");
    assert_corrupt(write(&image, 1 << 20), "closed to changes");
    drop(image);
    assert!(open(&storage, Access::ReadWrite).is_ok(), "there is no mark to see");
}

#[test]
fn unknown_autoclear_bits_fall_at_the_first_open_for_writing_and_unknown_compatible_bits_stay() {
    let storage = image(Version::V3);
    poke(&storage, 80, &(1_u64 << 40).to_be_bytes());
    poke(&storage, 88, &(1_u64 << 4 | 1 << 50).to_be_bytes());
    drop(open(&storage, Access::ReadOnly).unwrap());
    assert_eq!(word(&storage, 88), 1 << 4 | 1 << 50);
    let image = open(&storage, Access::ReadWrite).unwrap();
    assert_eq!(word(&storage, 88), 0, "before anything is written");
    block_on(image.close()).unwrap();
    assert_eq!(word(&storage, 80), 1 << 40);
}

#[test]
fn unknown_incompatible_bits_are_refused_by_number() {
    let storage = image(Version::V3);
    poke(&storage, 72, &(1_u64 << 20).to_be_bytes());
    let error = open(&storage, Access::ReadOnly).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("20"), "{error}");
}

#[test]
fn a_dirty_image_is_repaired_before_it_is_written_and_left_alone_when_only_read() {
    let storage = Arc::new(MemoryStorage::new());
    let options =
        CreateOptions { size_bytes: 64 << 20, lazy_refcounts: true, ..Default::default() };
    block_on(create(&storage, &options)).unwrap();
    let image = open(&storage, Access::ReadWrite).unwrap();
    write(&image, 0).unwrap();
    block_on(image.flush()).unwrap();
    drop(image);
    let dirty = |storage: &Memory| {
        let header = block_on(read_header(storage)).unwrap();
        header.features.incompatible.contains(IncompatibleFeatures::DIRTY)
    };
    assert!(dirty(&storage), "refcounts are postponed");
    let image = open(&storage, Access::ReadOnly).unwrap();
    assert_eq!(read(&image, 0).unwrap(), [1; 4096]);
    assert!(dirty(&storage));
    let image = open(&storage, Access::ReadWrite).unwrap();
    assert!(!dirty(&storage), "repaired");
    assert_eq!(read(&image, 0).unwrap(), [1; 4096]);
    write(&image, 1 << 20).unwrap();
    assert!(dirty(&storage));
    block_on(image.close()).unwrap();
    assert!(!dirty(&storage));
}

/// Nothing is made for where an entry points: refcounts of that place would take 8 TiB.
#[test]
fn a_snapshot_of_a_map_that_points_far_behind_the_file_is_refused() {
    let storage = image(Version::V3);
    let far = 1_u64 << 55;
    poke(&storage, L2, &far.to_be_bytes());
    let before = storage.to_vec();
    let image = open(&storage, Access::ReadWrite).unwrap();
    let made = block_on(image.create_snapshot(&"one".into(), std::time::UNIX_EPOCH));
    assert_corrupt(made, "more references than its refcount says");
    drop(image);
    assert!(storage.to_vec() == before);
}
