//! The bodies of the fuzz targets: bytes that nobody vouches for go in, nothing may panic.
//!
//! `fuzz/fuzz_targets` calls them under libFuzzer; `tests/fuzz_corpus.rs` replays the corpus and
//! mutates it as an ordinary test.
//!
//! * Always: a body demands more than survival where it can: what decodes must encode to something
//!   that decodes to the same, what was written must read back.
//! * Never: one input takes long. Images that claim large tables are decoded but not opened.

mod choices;
mod history;
mod images;
mod jobs;
mod nbd;
mod nbd_seeds;
mod recipe;

pub use history::{damaged_history, history};
pub use images::{damaged_image, damaged_operations, operations};
pub use jobs::damaged_jobs;
pub use nbd::{nbd_client, nbd_server, nbd_uri};
pub use nbd_seeds::{NbdSeed, nbd_seeds};

use lacuna::block::{DiscardMode, Layer, WriteFlags, ZeroFlags, is_zero};
use lacuna::buffer::Buffer;
use lacuna::fuzzing;
use lacuna::qcow2::check::{CheckOptions, Repair, check};
use lacuna::qcow2::format::{
    BitmapEntry, BitmapTableEntry, CompressionType, Header, L1Entry, L2Entry, RefcountTableEntry,
    RefcountWidth, Snapshot, SnapshotTableDecoder, SubclusterBitmap,
};
use lacuna::qcow2::{Access, Image, OpenOptions, Parts};
use lacuna::storage::MemoryStorage;
use lacuna::units::{GuestOffset, GuestRange, HostRange};
use pollster::block_on;

/// Largest tables of an image that is opened and checked here, in entries.
const MAX_ENTRIES: u32 = 1 << 12;

/// Takes the bytes for an image: decodes header, extensions and every table, opens it, reads,
/// writes, checks and repairs it.
pub fn header_and_tables(data: &[u8]) {
    let Ok(header) = Header::decode_for_check(data) else {
        assert!(Header::decode(data).is_err(), "only the stricter way of decoding takes it");
        return;
    };
    encodes_to_the_same(&header);
    words_as_entries(&header, data);
    let snapshots = snapshot_table(&header, data);
    bitmap_directory(&header, data);
    if is_small(&header, snapshots.as_deref()) {
        read_only(data);
        written(data);
        checked(data);
    }
}

fn encodes_to_the_same(header: &Header) {
    // A foreign writer may fit more into the cluster than fits in our order, and refcount tables
    // that only a check accepts are not encoded.
    let Ok(bytes) = header.encode() else { return };
    let mut again = Header::decode(&bytes).expect("what was encoded decodes");
    again.extensions.feature_names.clone_from(&header.extensions.feature_names);
    assert_eq!(&again, header);
}

/// The bytes of a range; what lies past the end reads as zeros.
fn part(data: &[u8], range: HostRange) -> Vec<u8> {
    let start = usize::try_from(range.start.0).unwrap_or(usize::MAX).min(data.len());
    let len = usize::try_from(range.len).unwrap_or(usize::MAX);
    let mut bytes: Vec<u8> = data[start..].iter().copied().take(len).collect();
    bytes.resize(len, 0);
    bytes
}

fn words_as_entries(header: &Header, data: &[u8]) {
    let geometry = &header.geometry;
    let (words, _) = data.as_chunks::<8>();
    for pair in words.windows(2).take(512) {
        let [first, second] = [pair[0], pair[1]].map(u64::from_be_bytes);
        let entry = L2Entry { word: first, subclusters: SubclusterBitmap(second) };
        if let Some(run) = entry.compressed_run(geometry) {
            assert!(run.range().len <= 2 * geometry.cluster_bytes());
            let kept = L2Entry::compressed(run, geometry).word;
            assert!(entry.has_reserved_bits(geometry) || kept == entry.word);
        }
        assert!(entry.host().is_none() || !entry.is_compressed());
        for index in 0..32 {
            let (state, end) = entry.subclusters.run(index);
            assert!(end > index && end <= 32 && state == entry.subclusters.state(index));
        }
        let l1 = L1Entry(first);
        assert_eq!(l1.table(), l1.with_copied(true).table());
        let bitmap = BitmapTableEntry(first);
        let kept = BitmapTableEntry::new(bitmap.cluster());
        assert!(bitmap.has_reserved_bits() || kept == bitmap);
        let refcounts = RefcountTableEntry(first);
        let kept = refcounts.block().map_or(RefcountTableEntry::ABSENT, RefcountTableEntry::new);
        assert!(refcounts.has_reserved_bits() || kept == refcounts);
    }
    let width = RefcountWidth::of(geometry);
    for index in 0..width.counts_in(data.len()).min(4096) {
        assert!(width.read(data, index) <= width.max());
    }
}

fn snapshot_table(header: &Header, data: &[u8]) -> Option<Vec<Snapshot>> {
    let mut decoder = SnapshotTableDecoder::new(header.snapshots);
    while let Some(range) = decoder.wanted() {
        decoder.feed(&part(data, range)).ok()?;
    }
    let snapshots = decoder.into_snapshots();
    let bytes = Snapshot::encode_table(&snapshots, header.size_bytes).ok()?;
    let again = Snapshot::decode_table(&bytes, header.snapshots.count).expect("encoded here");
    assert!(again.iter().zip(&snapshots).all(|(again, first)| again.name == first.name));
    Some(snapshots)
}

fn bitmap_directory(header: &Header, data: &[u8]) {
    let Some(extension) = header.valid_bitmaps() else { return };
    let range = HostRange::new(extension.directory_offset, extension.directory_bytes.min(1 << 20));
    let bytes = part(data, range);
    let Ok(entries) = BitmapEntry::decode_directory(&bytes, &extension) else { return };
    for entry in &entries {
        // Either answer is right; it must not panic.
        drop(entry.check(&header.geometry, header.size_bytes));
    }
    let again = BitmapEntry::encode_directory(&entries).expect("no entry grew");
    assert_eq!(BitmapEntry::decode_directory(&again, &extension).ok(), Some(entries));
}

fn is_small(header: &Header, snapshots: Option<&[Snapshot]>) -> bool {
    let table_bytes =
        u64::from(header.refcount_table.clusters).saturating_mul(header.geometry.cluster_bytes());
    header.l1.entries <= MAX_ENTRIES
        && table_bytes <= 8 * u64::from(MAX_ENTRIES)
        && snapshots.is_some_and(|snapshots| {
            snapshots.len() <= 8 && snapshots.iter().all(|one| one.l1.entries <= MAX_ENTRIES)
        })
}

fn open(data: &[u8], access: Access) -> Option<Image<MemoryStorage>> {
    let parts = Parts { storage: MemoryStorage::from(data), data: None, backing: None };
    block_on(Image::open(parts, OpenOptions::new(access))).ok()
}

fn read_only(data: &[u8]) {
    let Some(image) = open(data, Access::ReadOnly) else { return };
    let size_bytes = image.size_bytes();
    for start in [0, size_bytes / 2, size_bytes.saturating_sub(4096)] {
        let len = usize::try_from((size_bytes - start).min(4096)).expect("at most 4096");
        drop(block_on(image.read(GuestOffset(start), Buffer::new(len))));
    }
    let mut at = GuestOffset(0);
    for _ in 0..8 {
        let rest = GuestRange::new(at, size_bytes - at.0);
        let Ok(extents) = (if rest.is_empty() { return } else { block_on(image.extents(rest)) })
        else {
            return;
        };
        let len: u64 = extents.iter().map(|extent| extent.range.len).sum();
        assert!(len > 0 && len <= rest.len, "extents make headway and stay in the range");
        at = at + len;
    }
}

/// What is written reads back, whatever the tables say of other places.
fn written(data: &[u8]) {
    let Some(image) = open(data, Access::ReadWrite) else { return };
    let size_bytes = image.size_bytes();
    if size_bytes < 8192 {
        return;
    }
    let at = GuestOffset((size_bytes / 2) & !511);
    let bytes = [0x5a; 1024];
    let (written, _) = block_on(image.write(at, Buffer::from(&bytes[..]), WriteFlags::empty()));
    if written.is_ok() {
        let (read, buffer) = block_on(image.read(at, Buffer::new(1024)));
        assert!(read.is_ok() && buffer[..] == bytes, "what was written reads back");
    }
    let range = GuestRange::new(GuestOffset(0), 4096);
    if block_on(image.write_zeroes(range, ZeroFlags::empty())).is_ok() {
        let (read, buffer) = block_on(image.read(GuestOffset(0), Buffer::new(4096)));
        assert!(read.is_ok() && is_zero(&buffer), "zeros read back");
    }
    drop(block_on(image.discard(range, DiscardMode::Guest)));
    drop(block_on(image.flush()));
    drop(block_on(image.close()));
}

fn checked(data: &[u8]) {
    let storage = MemoryStorage::from(data);
    let before = block_on(check(&storage, &CheckOptions::default(), &mut |_| ()));
    assert!(storage.to_vec() == data, "a check without repair writes nothing");
    if before.is_ok() {
        drop(block_on(check(&storage, &CheckOptions { repair: Repair::All }, &mut |_| ())));
    }
}

/// Takes the bytes for the content of a backup's manifest.
pub fn backup_manifest(data: &[u8]) {
    lacuna_backup::fuzzing::manifest(data);
}

/// Takes the bytes for a segment of a backup.
pub fn backup_segment(data: &[u8]) {
    lacuna_backup::fuzzing::segment(data);
}

/// Takes the first byte for codec and cluster size and the rest for the bytes of a compressed
/// cluster; decompresses them, and compresses and restores what comes out.
pub fn compressed_cluster(data: &[u8]) {
    let Some((choice, stream)) = data.split_first() else { return };
    let kind = if choice & 1 == 0 { CompressionType::Deflate } else { CompressionType::Zstd };
    let mut cluster = vec![0; 512 << ((choice >> 1) % 8)];
    if fuzzing::decompress(kind, stream, &mut cluster).is_err() {
        return;
    }
    let mut again = vec![0; cluster.len()];
    if let Ok(Some(len)) = fuzzing::compress(kind, &cluster, &mut again) {
        let mut restored = vec![0; cluster.len()];
        fuzzing::decompress(kind, &again[..len], &mut restored).expect("compressed here");
        assert!(restored == cluster, "compressing loses nothing");
    }
}
