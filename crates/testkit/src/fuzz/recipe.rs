//! Small images made by choices: of every version, width and kind of cluster; and damage done to them.

use std::collections::BTreeSet;

use lacuna::block::{DiscardMode, Layer as _, WriteFlags, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::qcow2::Access;
use lacuna::qcow2::format::{BitmapEntry, CompressionType, Header};
use lacuna::units::{GuestOffset, GuestRange};
use pollster::block_on;

use super::choices::Choices;
use super::images::{GROWTH, memory, open};
use crate::{Built, ImageBuilder, Operation, SparseBytes};

/// A valid image, and what its guest reads.
pub(super) struct Recipe {
    built: Built,
    /// The bytes of the file.
    pub(super) file: Vec<u8>,
    /// Where directory and tables of bitmaps begin, and how many bytes of each there are.
    bitmaps: Vec<(u64, u64)>,
    pub(super) guest: SparseBytes,
    pub(super) version: u32,
    pub(super) cluster_bytes: u64,
    pub(super) size_bytes: u64,
}

/// Clusters of a disk at most: those of 512 bytes have two L2 tables.
const CLUSTERS: u64 = 96;
/// Clusters of a disk at most where they are of 16 KiB.
const LARGE_CLUSTERS: u64 = 64;
/// Places that are damaged at most.
const DAMAGES: u64 = 6;
/// Clusters that hold something at most.
const FILLED: u64 = 12;

impl Recipe {
    /// Makes an image. What is chosen is always one that a writer could have left.
    pub(super) fn choose(choices: &mut Choices<'_>) -> Self {
        let version = *choices.pick(&[3, 3, 3, 2]);
        let extended = version == 3 && choices.one_in(4);
        let cluster_bits = if extended { 14 } else { *choices.pick(&[9, 9, 9, 10, 12]) };
        let cluster_bytes = 1 << cluster_bits;
        let clusters = if extended { few(choices) } else { 1 + choices.below(CLUSTERS) };
        let size_bytes = clusters * cluster_bytes - 512 * choices.below(cluster_bytes / 512);
        let mut image = ImageBuilder::new(version, cluster_bits, size_bytes);
        let order = if version == 3 { *choices.pick(&[4, 4, 0, 1, 2, 3, 5, 6]) } else { 4 };
        image = image.refcount_order(order);
        let zstd = version == 3 && choices.one_in(3);
        if extended {
            image = image.extended();
        }
        if zstd {
            image = image.zstd();
        }
        let kind = if zstd { CompressionType::Zstd } else { CompressionType::Deflate };
        let (mut guest, mut filled) = (SparseBytes::default(), BTreeSet::new());
        for _ in 0..choices.below(FILLED) {
            let cluster = choices.below(clusters);
            if !filled.insert(cluster) {
                continue;
            }
            let fill = Fill { cluster, cluster_bytes, kind, version, extended, narrow: order < 3 };
            image = fill.add(image, &mut guest, choices);
        }
        // One bit cannot count two owners, two bits count up to three.
        if order > 0 {
            for index in 0..choices.below(3) {
                image = image.snapshot(["one", "two"][index as usize]);
            }
        }
        let bitmaps = if version == 3 { choices.byte() % 3 } else { 0 };
        for name in &BITMAPS[..usize::from(bitmaps)] {
            image = image.bitmap(name, AUTO, 9 + choices.byte() % 4);
        }
        guest.set_len(size_bytes);
        let built = image.build();
        let mut file = built.bytes.to_vec();
        if bitmaps > 0 {
            file = touched(&file, &guest, filled.first().copied().unwrap_or(0) * cluster_bytes);
        }
        let bitmaps = bitmap_places(&file);
        Self { built, file, bitmaps, guest, version, cluster_bytes, size_bytes }
    }

    /// By how much the file may grow that a damaged image is in, beyond what is written: by tables, and by
    /// what refcounts call used that are damaged. It is not written to, and takes no space.
    pub(super) fn growth(&self) -> u64 {
        let header = Header::decode(&self.file[..self.cluster_bytes as usize]);
        let header = header.expect("what was made is valid");
        let counted = header.geometry.refcount_block_entries() * self.cluster_bytes;
        GROWTH + DAMAGES * counted
    }

    /// Damages the file; where it does so is where the format has something to say.
    pub(super) fn damage(&self, file: &mut [u8], choices: &mut Choices<'_>) {
        for _ in 0..1 + choices.below(DAMAGES) {
            let at = self.place(choices, file.len());
            let width = *choices.pick(&[8, 8, 1, 2, 4]);
            let Some(bytes) = file.get_mut(at..at + width) else { continue };
            let old = bytes.iter().fold(0, |word: u64, byte| word << 8 | u64::from(*byte));
            let new = match choices.byte() % 6 {
                0 => old ^ (1 << (choices.byte() % 64)),
                1 => old.wrapping_add(self.cluster_bytes),
                2 => old.wrapping_sub(self.cluster_bytes),
                3 => *choices.pick(&EDGES),
                4 => {
                    (choices.below(64) * self.cluster_bytes) | (u64::from(choices.byte() & 1) << 63)
                }
                _ => choices.word(),
            };
            bytes.copy_from_slice(&new.to_be_bytes()[8 - width..]);
        }
    }

    fn place(&self, choices: &mut Choices<'_>, len: usize) -> usize {
        let built = &self.built;
        let word = |base: u64, choices: &mut Choices<'_>| {
            base as usize + 8 * choices.below(self.cluster_bytes / 8) as usize
        };
        let tables: Vec<u64> = built.l2.values().copied().collect();
        match choices.byte() % 10 {
            0 => *choices.pick(&HEADER_FIELDS),
            1 => built.l1 as usize + 8 * choices.below(4) as usize,
            2 | 3 if !tables.is_empty() => {
                let table = *choices.pick(&tables);
                word(table, choices)
            }
            4 => word(*choices.pick(&built.refcount_blocks), choices),
            5 => built.refcount_table as usize + 8 * choices.below(4) as usize,
            6 if built.snapshot_table != 0 => {
                built.snapshot_table as usize + choices.below(96) as usize
            }
            8 | 9 if !self.bitmaps.is_empty() => {
                let (start, bytes) = *choices.pick(&self.bitmaps);
                (start + choices.below(bytes)) as usize
            }
            _ => choices.below(len as u64) as usize,
        }
    }
}

/// Has a guest write what is there already, so that bitmaps have clusters that name it.
fn touched(file: &[u8], guest: &SparseBytes, at: u64) -> Vec<u8> {
    let storage = memory(file);
    let image = open(&storage, Access::ReadWrite).expect("a valid image opens");
    let bytes = Buffer::from(&guest.read_vec(at, 512)[..]);
    block_on(image.write(GuestOffset(at), bytes, WriteFlags::empty())).0.expect("there is room");
    block_on(image.close()).expect("nothing keeps it from closing");
    storage.to_vec()
}

/// Where the directory of bitmaps lies, and what it names; nothing without one.
fn bitmap_places(file: &[u8]) -> Vec<(u64, u64)> {
    let header = Header::decode(file).expect("what was made is valid");
    let Some(bitmaps) = header.valid_bitmaps() else { return Vec::new() };
    let start = bitmaps.directory_offset.0;
    let directory = &file[start as usize..][..bitmaps.directory_bytes as usize];
    let entries = BitmapEntry::decode_directory(directory, &bitmaps).expect("it is valid");
    let tables = entries.iter().map(|one| (one.table_offset.0, 8 * u64::from(one.table_entries)));
    std::iter::once((start, bitmaps.directory_bytes)).chain(tables).collect()
}

/// What bitmaps are called, and that they are to be kept (B.10).
pub(super) const BITMAPS: [&str; 3] = ["a", "b", "c"];
const AUTO: u32 = 1 << 1;

/// Values at the edges of fields and limits.
const EDGES: [u64; 12] = [
    0,
    1,
    0x200,
    0x10000,
    1 << 31,
    u32::MAX as u64,
    1 << 56,
    (1 << 56) - 512,
    1 << 62,
    1 << 63,
    (1 << 63) - 1,
    u64::MAX,
];

/// Where the fields of a header are (B.1).
const HEADER_FIELDS: [usize; 20] =
    [4, 8, 16, 20, 24, 32, 36, 40, 48, 56, 60, 64, 72, 80, 88, 96, 100, 104, 112, 116];

/// What a cluster gets.
struct Fill {
    cluster: u64,
    cluster_bytes: u64,
    kind: CompressionType,
    version: u32,
    extended: bool,
    /// Refcounts cannot count all the streams in a cluster, and those of two snapshots.
    narrow: bool,
}

impl Fill {
    fn add(
        &self,
        image: ImageBuilder,
        guest: &mut SparseBytes,
        choices: &mut Choices<'_>,
    ) -> ImageBuilder {
        let (cluster, len) = (self.cluster, self.cluster_bytes as usize);
        let at = cluster * self.cluster_bytes;
        let byte = choices.byte();
        let bytes = steps(byte, len);
        let mut read = |bytes: &[u8]| guest.write(at, bytes);
        match choices.byte() % 5 {
            2 if self.version == 3 => {
                read(&vec![0; len]);
                image.zero(cluster)
            }
            3 if self.version == 3 => {
                read(&vec![0; len]);
                image.reserved_zero(cluster, &bytes)
            }
            4 if !self.narrow => match self.stream(&bytes) {
                Some(stream) => {
                    read(&bytes);
                    image.compressed(cluster, &stream)
                }
                None => image,
            },
            1 if self.extended => {
                // Every third subcluster is there, every third is zero, of the rest nothing is known.
                let bitmap = 0x1249_2492 | 0x2492_4924 << 32;
                let sub = len / 32;
                let mut shown = bytes.clone();
                for (index, part) in shown.chunks_mut(sub).enumerate() {
                    if bitmap >> index & 1 == 0 {
                        part.fill(0);
                    }
                }
                read(&shown);
                image.data(cluster, &bytes).subclusters(cluster, bitmap)
            }
            _ => {
                read(&bytes);
                image.data(cluster, &bytes)
            }
        }
    }

    fn stream(&self, bytes: &[u8]) -> Option<Vec<u8>> {
        let mut stream = vec![0; bytes.len()];
        let len = lacuna::fuzzing::compress(self.kind, bytes, &mut stream).ok()??;
        stream.truncate(len);
        Some(stream)
    }
}

/// Chooses up to 16 clusters three times of four, for what costs time is their bytes.
fn few(choices: &mut Choices<'_>) -> u64 {
    let clusters = choices.below(LARGE_CLUSTERS);
    1 + if clusters % 4 == 3 { clusters } else { clusters % 16 }
}

/// Sectors that a disk is resized to at most.
const fn sectors(cluster_bytes: u64) -> u64 {
    let clusters = if cluster_bytes > 4096 { LARGE_CLUSTERS / 2 } else { CLUSTERS };
    clusters * cluster_bytes / 512
}

/// Bytes that go up by one every 40.
fn steps(first: u8, len: usize) -> Vec<u8> {
    let mut bytes = vec![first; len];
    for (index, step) in bytes.chunks_mut(40).enumerate() {
        step.fill(first.wrapping_add(index as u8));
    }
    bytes
}

/// Chooses something that a guest may ask of a disk of this size.
pub(super) fn operation(choices: &mut Choices<'_>, size_bytes: u64, cluster: u64) -> Operation {
    let unit = *choices.pick(&[cluster, 512, 1]);
    let start = (choices.below(65536) * unit % size_bytes.max(1)).min(size_bytes);
    let most = *choices.pick(&[cluster, 512, 5 * cluster, 16]);
    let len = (1 + choices.below(most)).min(size_bytes - start);
    let range = GuestRange::new(GuestOffset(start), len);
    let seed = choices.byte().into();
    match choices.byte() % 10 {
        0 => Operation::Read(range),
        1 => Operation::WriteZeroes { range, flags: ZeroFlags::MAY_UNMAP },
        2 => Operation::WriteZeroes { range, flags: ZeroFlags::empty() },
        3 => Operation::Discard { range, mode: DiscardMode::Guest },
        4 => {
            let start = start / cluster * cluster;
            let range = GuestRange::new(GuestOffset(start), cluster.min(size_bytes - start));
            Operation::WriteCompressed { range, seed }
        }
        5 => Operation::Flush,
        6 => Operation::Reopen,
        7 => Operation::Resize { size_bytes: 512 * (1 + choices.below(sectors(cluster))) },
        _ => Operation::Write { range, seed, flags: WriteFlags::empty() },
    }
}
