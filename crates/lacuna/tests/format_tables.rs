//! Refcounts, snapshot tables and bitmap directories: round trips, and what QEMU wrote.

use std::path::Path;
use std::process::Command;

use lacuna::qcow2::format::{
    BitmapCluster, BitmapEntry, BitmapFlags, BitmapTableEntry, BitmapsExtension, CompressedRun,
    EntryWidth, Geometry, Header, L1Entry, L1Location, L2Entry, RefcountTableEntry, RefcountWidth,
    Snapshot, SnapshotTableDecoder, StoredName, SubclusterBitmap, SubclusterState, Version,
};
use lacuna::units::HostOffset;
use proptest::collection::vec;
use proptest::prelude::*;

/// Runs qemu-img in `folder`; a missing tool is a failure.
fn qemu_img(folder: &Path, arguments: &[&str]) {
    let output = Command::new("qemu-img")
        .args(arguments)
        .current_dir(folder)
        .output()
        .expect("qemu-img is missing: apt-get install qemu-utils");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {arguments:?}: {errors}");
}

fn part(file: &[u8], offset: HostOffset, len: u64) -> &[u8] {
    let start = usize::try_from(offset.0).unwrap();
    &file[start..start + usize::try_from(len).unwrap()]
}

#[test]
fn snapshot_table_of_qemu_decodes_and_encodes_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    qemu_img(folder.path(), &["create", "-q", "-f", "qcow2", "image", "1M"]);
    qemu_img(folder.path(), &["snapshot", "-c", "first", "image"]);
    qemu_img(folder.path(), &["snapshot", "-c", "second one", "image"]);
    let mut file = std::fs::read(folder.path().join("image")).unwrap();
    let header = Header::decode(&file).unwrap();
    file.resize(file.len() + (1 << 20), 0);

    let mut decoder = SnapshotTableDecoder::new(header.snapshots);
    while let Some(range) = decoder.wanted() {
        decoder.feed(part(&file, range.start, range.len)).unwrap();
    }
    let table_bytes = decoder.table_bytes();
    let snapshots = decoder.into_snapshots();
    let names: Vec<_> = snapshots.iter().map(|snapshot| snapshot.name.to_string()).collect();
    assert_eq!(names, ["first", "second one"]);
    assert_eq!(snapshots[1].id.as_bytes(), b"2");
    assert_eq!(snapshots[0].disk_size_bytes, Some(1 << 20));
    let encoded = Snapshot::encode_table(&snapshots, 1 << 20).unwrap();
    assert_eq!(encoded, part(&file, header.snapshots.offset, table_bytes));
    assert!(snapshots.iter().all(|snapshot| snapshot.check_l1(&header.geometry).is_ok()));
}

#[test]
fn bitmap_directory_of_qemu_decodes_and_encodes_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    qemu_img(folder.path(), &["create", "-q", "-f", "qcow2", "image", "1M"]);
    qemu_img(folder.path(), &["bitmap", "--add", "image", "odd name"]);
    qemu_img(folder.path(), &["bitmap", "--add", "--disable", "-g", "4k", "image", "b"]);
    let file = std::fs::read(folder.path().join("image")).unwrap();
    let header = Header::decode(&file).unwrap();
    let extension = header.valid_bitmaps().unwrap();
    let directory = part(&file, extension.directory_offset, extension.directory_bytes);
    let entries = BitmapEntry::decode_directory(directory, &extension).unwrap();
    assert_eq!(entries[0].name.to_string(), "odd name");
    assert_eq!((entries[0].flags, entries[0].granularity_bits), (BitmapFlags::AUTO, 16));
    assert_eq!((entries[1].flags, entries[1].granularity_bits), (BitmapFlags::empty(), 12));
    for entry in &entries {
        entry.check(&header.geometry, header.size_bytes).unwrap();
        let table = part(&file, entry.table_offset, 8);
        let first = BitmapTableEntry(u64::from_be_bytes(table.try_into().unwrap()));
        assert_eq!(first.cluster(), BitmapCluster::AllZeros);
    }
    assert_eq!(BitmapEntry::encode_directory(&entries).unwrap(), directory);
}

#[test]
fn snapshot_without_extra_data_takes_the_disk_size_when_encoded() {
    let mut bytes = vec![0; 48];
    bytes[13] = 1;
    bytes[35] = 9;
    bytes[40] = b'x';
    let snapshots = Snapshot::decode_table(&bytes, 1).unwrap();
    assert_eq!((snapshots[0].disk_size_bytes, snapshots[0].vm_state_bytes), (None, 9));
    let encoded = Snapshot::encode_table(&snapshots, 4096).unwrap();
    let again = Snapshot::decode_table(&encoded, 1).unwrap();
    assert_eq!(again[0].disk_size_bytes, Some(4096));
    assert_eq!((again[0].vm_state_bytes, again[0].instruction_count), (9, None));
}

fn names(max: usize) -> impl Strategy<Value = StoredName> {
    vec(any::<u8>(), 1..max).prop_map(StoredName::new)
}

prop_compose! {
    fn snapshots()(
        (l1, entries) in (any::<u64>(), any::<u32>()),
        (id, name) in (names(9), names(300)),
        (seconds, nanoseconds, clock) in (any::<u32>(), any::<u32>(), any::<u64>()),
        (state, size, count) in (any::<u64>(), any::<u64>(), 0..u64::MAX),
        unknown_extra in vec(any::<u8>(), 0..1000),
    ) -> Snapshot {
        Snapshot {
            l1: L1Location { offset: HostOffset(l1), entries },
            id, name,
            created_seconds: seconds,
            created_nanoseconds: nanoseconds,
            guest_clock_nanoseconds: clock,
            vm_state_bytes: state,
            disk_size_bytes: Some(size),
            instruction_count: Some(count),
            unknown_extra,
        }
    }
}

prop_compose! {
    fn bitmaps()(
        (table, table_entries) in (any::<u64>(), any::<u32>()),
        (flags, kind, granularity_bits) in (any::<u32>(), any::<u8>(), any::<u8>()),
        (name, extra_data) in (names(1023), vec(any::<u8>(), 0..50)),
    ) -> BitmapEntry {
        BitmapEntry {
            table_offset: HostOffset(table),
            table_entries,
            flags: BitmapFlags::from_bits_retain(flags),
            kind, granularity_bits, name, extra_data,
        }
    }
}

proptest! {
    #[test]
    fn snapshot_tables_survive_encoding_whole_and_in_pieces(
        snapshots in vec(snapshots(), 0..20),
    ) {
        let bytes = Snapshot::encode_table(&snapshots, 0).unwrap();
        let count = u32::try_from(snapshots.len()).unwrap();
        prop_assert_eq!(&Snapshot::decode_table(&bytes, count).unwrap(), &snapshots);
        let place = lacuna::qcow2::format::SnapshotTableLocation { offset: HostOffset(512), count };
        let mut decoder = SnapshotTableDecoder::new(place);
        while let Some(range) = decoder.wanted() {
            let start = usize::try_from(range.start.0 - 512).unwrap();
            let mut piece = bytes.get(start..).unwrap_or_default().to_vec();
            piece.resize(usize::try_from(range.len).unwrap(), 0);
            decoder.feed(&piece).unwrap();
        }
        prop_assert_eq!(decoder.table_bytes(), bytes.len() as u64);
        prop_assert_eq!(decoder.into_snapshots(), snapshots);
    }

    #[test]
    fn bitmap_directories_survive_encoding(entries in vec(bitmaps(), 1..20)) {
        let bytes = BitmapEntry::encode_directory(&entries).unwrap();
        let extension = BitmapsExtension {
            count: u32::try_from(entries.len()).unwrap(),
            directory_bytes: bytes.len() as u64,
            directory_offset: HostOffset(0x10000),
        };
        prop_assert_eq!(BitmapEntry::decode_directory(&bytes, &extension).unwrap(), entries);
    }

    #[test]
    fn bitmap_table_entries_survive_encoding(offset in (1_u64..1 << 47).prop_map(|n| n << 9)) {
        for cluster in [
            BitmapCluster::AllOnes,
            BitmapCluster::AllZeros,
            BitmapCluster::Data(HostOffset(offset & 0x00ff_ffff_ffff_fe00)),
        ] {
            let entry = BitmapTableEntry::new(cluster);
            prop_assert!(!entry.has_reserved_bits());
            prop_assert_eq!(entry.cluster(), cluster);
        }
    }

    #[test]
    fn table_pointers_survive_encoding(cluster in 1_u64..1 << 47) {
        let host = HostOffset(cluster << 9);
        let (l1, l2) = (L1Entry::new(host), L2Entry::standard(host));
        prop_assert_eq!((l1.table(), l1.is_copied()), (Some(host), true));
        prop_assert_eq!((l2.host(), l2.is_copied(), l2.is_compressed()), (Some(host), true, false));
        prop_assert_eq!(l2.with_zero_flag().host(), Some(host));
        prop_assert!(!l1.has_reserved_bits() && !l1.with_copied(false).is_copied());
        let block = RefcountTableEntry::new(host);
        prop_assert_eq!((block.block(), block.has_reserved_bits()), (Some(host), false));
    }

    #[test]
    fn compressed_runs_survive_encoding_at_every_cluster_size(
        bits in 9_u32..=21,
        start in 1_u64..1 << 56,
        len in 1_u64..1 << 21,
    ) {
        let geometry = Geometry::new(Version::V3, bits, 4, EntryWidth::Standard).unwrap();
        let start = (start % CompressedRun::offset_limit(&geometry)).max(1);
        let run = CompressedRun::new(HostOffset(start), len.min(geometry.cluster_bytes() - 1));
        let entry = L2Entry::compressed(run, &geometry);
        prop_assert_eq!(entry.compressed_run(&geometry), Some(run));
        prop_assert!(entry.is_compressed() && !entry.is_copied());
        prop_assert!(!entry.has_reserved_bits(&geometry));
        // The whole stream, to the end of its last sector.
        let range = run.range();
        prop_assert_eq!(range.start, HostOffset(start));
        prop_assert!(range.len >= len.min(geometry.cluster_bytes() - 1));
        prop_assert_eq!(range.end().0 % 512, 0);
    }

    #[test]
    fn subcluster_states_follow_a_model(changes in vec((0_u8..3, 0_u32..32, 1_u32..=32), 0..12)) {
        let mut model = [SubclusterState::Unallocated; 32];
        let mut bitmap = SubclusterBitmap::default();
        for (what, from, len) in changes {
            let to = (from + len).min(32);
            let (state, changed) = match what {
                0 => (SubclusterState::Data, bitmap.with_data(from, to)),
                1 => (SubclusterState::Zero, bitmap.with_zero(from, to)),
                _ => (SubclusterState::Unallocated, bitmap.with_unallocated(from, to)),
            };
            bitmap = changed;
            model[from as usize..to as usize].fill(state);
        }
        prop_assert!(!bitmap.is_invalid());
        for (index, state) in model.iter().enumerate() {
            let (found, end) = bitmap.run(u32::try_from(index).unwrap());
            prop_assert_eq!(found, *state);
            let same = model[index..].iter().take_while(|other| *other == state).count();
            prop_assert_eq!(end as usize, index + same);
        }
    }

    #[test]
    fn refcounts_of_every_width_read_back_and_leave_their_neighbours_alone(
        order in 0_u32..=6,
        changes in vec((0_usize..64, any::<u64>()), 1..200),
    ) {
        let geometry = Geometry::new(Version::V3, 9, order, EntryWidth::Standard).unwrap();
        let width = RefcountWidth::of(&geometry);
        prop_assert_eq!(width.max(), geometry.refcount_max());
        prop_assert_eq!(width.counts_in(512) as u64, geometry.refcount_block_entries());
        let mut model = vec![0; width.counts_in(512)];
        let mut block = vec![0; 512];
        for (index, count) in changes {
            let count = count & width.max();
            model[index] = count;
            width.write(&mut block, index, count);
        }
        for (index, count) in model.iter().enumerate() {
            prop_assert_eq!(width.read(&block, index), *count, "count {}", index);
        }
    }
}

#[test]
fn refcounts_narrower_than_a_byte_start_at_its_low_bits() {
    let widths = [RefcountWidth::Bits1, RefcountWidth::Bits2, RefcountWidth::Bits4];
    let blocks = widths.map(|width| {
        let mut block = [0; 8];
        width.write(&mut block, 3, 1);
        block[..2].to_vec()
    });
    assert_eq!(blocks, [[0x08, 0], [0x40, 0], [0, 0x10]].map(|block| block.to_vec()));
    let mut block = [0; 8];
    RefcountWidth::Bits16.write(&mut block, 1, 0x1234);
    assert_eq!(block, [0, 0, 0x12, 0x34, 0, 0, 0, 0]);
}
