//! Preallocation with all metadata in front of one run of data (002-4, -5, -7).

use std::ops::Range;
use std::sync::Arc;

use lacuna::block::{DynLayer, Layer, Preallocation, WriteFlags};
use lacuna::buffer::Buffer;
use lacuna::qcow2::check::{CheckOptions, check};
use lacuna::qcow2::format::{EntryWidth, Header, SubclusterBitmap, Version};
use lacuna::qcow2::{
    BackingName, CreateOptions, DataFileName, Image, OnDiscard, Parts, PreallocationLayout, create,
};
use lacuna::raw::Raw;
use lacuna::storage::MemoryStorage;
use lacuna::units::GuestOffset;
use pollster::block_on;
use testkit::foreign::{QEMU_IMG, qemu_img_check, qemu_io};

use super::scenario::{entries_of, writing};

const MODES: [Preallocation; 3] =
    [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full];

fn contiguous(size_bytes: u64) -> CreateOptions {
    CreateOptions {
        size_bytes,
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

/// Returns the one run of host clusters (in bytes) that some guest clusters have, in guest order.
fn host_run(image: &[u8], guest: Range<usize>) -> Range<u64> {
    let cluster_bytes = Header::decode(image).unwrap().geometry.cluster_bytes();
    let hosts: Vec<u64> =
        entries_of(image)[guest].iter().map(|entry| entry.host().unwrap().0).collect();
    let run: Vec<u64> = (0..hosts.len() as u64).map(|at| hosts[0] + at * cluster_bytes).collect();
    assert!(hosts == run, "guest and host do not differ by one constant");
    hosts[0]..run.last().unwrap() + cluster_bytes
}

/// Returns where each cluster of metadata lies.
fn metadata(image: &[u8]) -> Vec<u64> {
    let word = |at: u64| u64::from_be_bytes(image[at as usize..][..8].try_into().unwrap());
    let header = Header::decode(image).unwrap();
    let cluster_bytes = header.geometry.cluster_bytes();
    let table = header.refcount_table.offset.0;
    let table_bytes = u64::from(header.refcount_table.clusters) * cluster_bytes;
    let l1_bytes = u64::from(header.l1.entries) * 8;
    let entries = |start: u64, len: u64| (start..start + len).step_by(8).map(word);
    let l2 = entries(header.l1.offset.0, l1_bytes).map(|entry| entry & 0x00ff_ffff_ffff_fe00);
    let blocks = entries(table, table_bytes);
    let clusters = |start: u64, len: u64| (start..start + len).step_by(cluster_bytes as usize);
    let tables = clusters(table, table_bytes).chain(clusters(header.l1.offset.0, l1_bytes));
    l2.chain(blocks).filter(|at| *at != 0).chain(tables).collect()
}

/// Kinds of images whose tables are many or few, large or small.
fn kinds() -> Vec<CreateOptions> {
    let kind = |cluster_bytes: u64, clusters: u64, refcount_bits| CreateOptions {
        cluster_bytes,
        refcount_bits,
        ..contiguous(clusters * cluster_bytes - cluster_bytes / 2)
    };
    let extended = |options| CreateOptions { entry_width: EntryWidth::Extended, ..options };
    vec![
        kind(512, 1, 16),
        kind(512, 20_000, 64),
        kind(512, 3_000, 1),
        kind(4096, 3_000, 16),
        kind(65536, 3, 16),
        kind(65536, 20_000, 64),
        extended(kind(16384, 3_000, 16)),
        extended(kind(2 << 20, 3, 8)),
        CreateOptions { version: Version::V2, ..kind(4096, 1_025, 16) },
    ]
}

#[test]
fn all_metadata_lies_in_front_of_one_run_of_data() {
    for options in kinds() {
        let storage = made(&options);
        let image = storage.to_vec();
        let clusters = options.size_bytes.div_ceil(options.cluster_bytes) as usize;
        let data = host_run(&image, 0..clusters);
        let behind = metadata(&image).into_iter().filter(|at| *at >= data.start).count();
        assert_eq!(behind, 0, "{options:?}");
        let in_front = metadata(&image).len() as u64 + 1;
        assert_eq!(data.start, in_front * options.cluster_bytes, "nothing else lies there");
        assert!(
            image.len() as u64 <= data.end && image.len() as u64 > data.end - options.cluster_bytes
        );
        let report = block_on(check(&storage, &CheckOptions::default(), &mut |_| {})).unwrap();
        assert!(report.is_clean(), "{options:?}: {report:x?}");
    }
}

#[test]
fn a_disk_without_clusters_has_nothing_to_lay_out() {
    let storage = made(&contiguous(0));
    let report = block_on(check(&storage, &CheckOptions::default(), &mut |_| {})).unwrap();
    assert!(report.is_clean(), "{report:x?}");
}

#[test]
fn stock_qemu_finds_the_image_clean_and_writes_to_the_run() {
    let folder = tempfile::tempdir().unwrap();
    for (number, options) in kinds().into_iter().enumerate() {
        let path = folder.path().join(format!("{number}.qcow2"));
        std::fs::write(&path, made(&options).to_vec()).unwrap();
        assert!(qemu_img_check(&path).is_clean(), "{options:?}");
        let image = std::fs::read(&path).unwrap();
        let clusters = options.size_bytes.div_ceil(options.cluster_bytes) as usize;
        let data = host_run(&image, 0..clusters);
        let size = options.size_bytes.next_multiple_of(512);
        let middle = size / 2 / 512 * 512;
        qemu_io(
            &path,
            [
                "write -P 7 0 512".to_owned(),
                format!("write -P 8 {} 512", size - 512),
                format!("read -P 8 {} 512", size - 512),
                format!("read -P {} {middle} 512", if middle == 0 { 8 } else { 0 }),
            ],
        );
        assert!(qemu_img_check(&path).is_clean(), "{options:?}");
        assert_eq!(host_run(&std::fs::read(&path).unwrap(), 0..clusters), data, "{options:?}");
    }
}

#[test]
fn the_file_is_reserved_as_firmly_as_asked() {
    let folder = tempfile::tempdir().unwrap();
    for preallocation in MODES {
        use std::os::unix::fs::MetadataExt;
        let options = CreateOptions { preallocation, ..contiguous(8 << 20) };
        let path = folder.path().join("disk.qcow2");
        let files = lacuna::storage::FileOptions::replace();
        let storage = lacuna::storage::FileStorage::open(&path, &files).unwrap();
        block_on(create(&storage, &options)).unwrap();
        drop(storage);
        let status = std::fs::metadata(&path).unwrap();
        let reserved = status.blocks() * 512 >= 8 << 20;
        assert_eq!(reserved, preallocation != Preallocation::Metadata, "{preallocation:?}");
        let map = QEMU_IMG.succeed(["map", "--output=json", path.to_str().unwrap()]);
        assert_eq!(map.lines().count(), 1, "one extent: {map}");
        assert!(qemu_img_check(&path).is_clean());
    }
}

/// With subclusters a cluster has its place and still shows what lies below (002-4).
#[test]
fn over_a_backing_file_with_subclusters_every_kind_of_preallocation_falls_through() {
    let folder = tempfile::tempdir().unwrap();
    let below = folder.path().join("below.raw");
    std::fs::write(&below, vec![0xbb; 1 << 20]).unwrap();
    for preallocation in MODES {
        let options = CreateOptions {
            preallocation,
            entry_width: EntryWidth::Extended,
            backing: Some(BackingName { name: "below.raw".into(), format: Some("raw".into()) }),
            ..contiguous(1 << 20)
        };
        let storage = made(&options);
        let image = storage.to_vec();
        let data = host_run(&image, 0..16);
        assert!(entries_of(&image).iter().all(|entry| entry.subclusters == SubclusterBitmap(0)));

        let path = folder.path().join("disk.qcow2");
        std::fs::write(&path, &image).unwrap();
        assert!(qemu_img_check(&path).is_clean());
        let commands = ["read -P 0xbb 0 1M", "write -P 7 2048 2048", "read -P 0xbb 4096 1040384"];
        qemu_io(&path, commands.map(str::to_owned));
        assert!(qemu_img_check(&path).is_clean());
        assert_eq!(host_run(&std::fs::read(&path).unwrap(), 0..16), data, "written in place");

        let raw = MemoryStorage::from(&std::fs::read(&below).unwrap()[..]);
        let backing = Arc::new(block_on(Raw::open(raw)).unwrap()) as Arc<dyn DynLayer>;
        let parts = Parts { backing: Some(backing), ..Parts::alone(Arc::clone(&storage)) };
        let image = block_on(Image::open(parts, writing())).unwrap();
        let bytes = Buffer::from(&[7; 100][..]);
        block_on(image.write(GuestOffset(5000), bytes, WriteFlags::empty())).0.unwrap();
        let (result, bytes) = block_on(image.read(GuestOffset(0), Buffer::new(1 << 20)));
        result.unwrap();
        let expected = |at: usize| if (5000..5100).contains(&at) { 7 } else { 0xbb };
        assert!(bytes.iter().enumerate().all(|(at, byte)| *byte == expected(at)));
        block_on(image.close()).unwrap();
        assert_eq!(host_run(&storage.to_vec(), 0..16), data);
    }
}

#[test]
fn clusters_without_subclusters_would_hide_a_backing_file() {
    let backing = Some(BackingName { name: "below.raw".into(), format: Some("raw".into()) });
    let options = CreateOptions { backing, ..contiguous(1 << 20) };
    let error = block_on(create(&MemoryStorage::new(), &options)).unwrap_err();
    assert!(error.to_string().contains("would hide the backing file"), "{error}");
}

#[test]
fn a_layout_needs_something_to_lay_out() {
    let options = CreateOptions { preallocation: Preallocation::Off, ..contiguous(1 << 20) };
    let error = block_on(create(&MemoryStorage::new(), &options)).unwrap_err();
    assert!(error.to_string().contains("falloc or full preallocation would be right"), "{error}");
    // With a data file guest and host offsets are the same in any case.
    let data_file = Some(DataFileName { name: "disk.raw".into(), raw: true });
    let options = CreateOptions { data_file, ..options };
    assert_eq!(host_run_start(&options), None);
}

/// Guest cluster 0 of a data file lies at offset 0, which entries do not tell from nothing.
fn host_run_start(options: &CreateOptions) -> Option<u64> {
    entries_of(&made(options).to_vec())[0].host().map(|host| host.0)
}

#[test]
fn a_disk_that_grows_gets_its_tables_first_and_then_one_run() {
    // Small clusters: the growth takes many L2 tables and refcount blocks.
    for (keep_mapping, modes) in [(true, &MODES[..]), (false, &MODES[1..])] {
        for mode in modes {
            let options =
                CreateOptions { cluster_bytes: 4096, keep_mapping, ..contiguous(8 << 20) };
            let storage = made(&options);
            let old = host_run(&storage.to_vec(), 0..2048);
            let parts = Parts::alone(Arc::clone(&storage));
            let image = block_on(Image::open(parts, writing())).unwrap();
            block_on(image.grow(40 << 20, *mode)).unwrap();
            block_on(image.close()).unwrap();
            let bytes = storage.to_vec();
            assert_eq!(host_run(&bytes, 0..2048), old, "what was there stays");
            let new = host_run(&bytes, 2048..10240);
            let inside = metadata(&bytes).into_iter().filter(|at| new.contains(at)).count();
            assert_eq!(inside, 0, "{mode:?}");
            let report = block_on(check(&storage, &CheckOptions::default(), &mut |_| {})).unwrap();
            assert!(report.is_clean(), "{report:x?}");
        }
    }
}

#[test]
fn a_disk_that_shrinks_keeps_the_places_of_what_is_left() {
    let options = CreateOptions { keep_mapping: true, ..contiguous(4 << 20) };
    let storage = made(&options);
    let before = host_run(&storage.to_vec(), 0..32);
    let image = block_on(Image::open(Parts::alone(Arc::clone(&storage)), writing())).unwrap();
    block_on(image.resize(2 << 20, lacuna::qcow2::Shrink::Allow)).unwrap();
    block_on(image.close()).unwrap();
    let bytes = storage.to_vec();
    assert_eq!(host_run(&bytes, 0..32), before);
    assert!(bytes.len() as u64 <= before.end, "the file ends with the disk");
    let report = block_on(check(&storage, &CheckOptions::default(), &mut |_| {})).unwrap();
    assert!(report.is_clean(), "{report:x?}");
}

/// Without the wish to keep places a discard of preallocated clusters gives them up (002-8).
#[test]
fn a_real_discard_frees_preallocated_clusters() {
    for entry_width in [EntryWidth::Standard, EntryWidth::Extended] {
        let storage = made(&CreateOptions { entry_width, ..contiguous(1 << 20) });
        let options = writing().on_discard(OnDiscard::Free);
        let image = block_on(Image::open(Parts::alone(Arc::clone(&storage)), options)).unwrap();
        let whole = lacuna::units::GuestRange::new(GuestOffset(0), 1 << 20);
        block_on(image.discard(whole, lacuna::block::DiscardMode::Guest)).unwrap();
        block_on(image.close()).unwrap();
        let bytes = storage.to_vec();
        assert!(entries_of(&bytes).iter().all(|entry| entry.host().is_none()));
        let report = block_on(check(&storage, &CheckOptions::default(), &mut |_| {})).unwrap();
        assert!(report.is_clean(), "{report:x?}");
    }
}
