//! Keeps enabled dirty bitmaps in step with writes (B.10).
//!
//! * Always: the first change of an open image marks every enabled bitmap in use, durably, before
//!   anything else; only a clean close takes the mark off again. After a crash nobody trusts one.
//! * Always: what changes is marked before it changes, in memory, a chunk per cluster of bitmap
//!   data; closing merges the chunks into what is stored.
//! * Never: a bitmap is touched that is disabled, was in use already, or has extra data that says
//!   it must not be.

use std::collections::BTreeMap;
use std::ops::Range;

use super::format::{BitmapCluster, BitmapEntry, BitmapFlags, BitmapTableEntry, Header};
use super::image::Image;
use super::write_back::Refcounting;
use crate::Result;
use crate::buffer::Buffer;
use crate::storage::Storage;
use crate::units::{GuestRange, HostOffset, HostRange};

/// The bitmaps that follow the writes of an open image.
#[derive(Debug, Default)]
pub(super) struct Bitmaps {
    tracked: Vec<Tracked>,
    /// They are marked in use, so that closing has to store them.
    pub(super) in_use: bool,
    /// Counts changes of where bitmaps lie: what was read of one before may be somebody else's.
    pub(super) generation: u64,
}

#[derive(Clone, Debug)]
struct Tracked {
    entry: BitmapEntry,
    /// Where the directory entry lies.
    at: HostOffset,
    /// Bits of one cluster of bitmap data.
    chunk_bits: u64,
    /// New bits by chunk.
    chunks: BTreeMap<u64, Vec<u8>>,
}

impl Bitmaps {
    /// Finds the bitmaps to follow.
    ///
    /// # Errors
    /// `Corrupt` where the directory cannot be decoded: it could not be kept in step.
    pub(super) async fn load<S: Storage>(storage: &S, header: &Header) -> Result<Self> {
        let mut tracked = Vec::new();
        for (at, entry) in directory(storage, header).await? {
            if is_followed(&entry) {
                entry.check(&header.geometry, header.size_bytes)?;
                let chunk_bits = header.geometry.cluster_bytes() * 8;
                tracked.push(Tracked { entry, at, chunk_bits, chunks: BTreeMap::new() });
            }
        }
        Ok(Self { tracked, in_use: false, generation: 0 })
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.tracked.is_empty()
    }

    /// Says whether the directory entry at an offset is that of a bitmap in use by us.
    pub(super) fn uses(&self, at: HostOffset) -> bool {
        self.in_use && self.tracked.iter().any(|bitmap| bitmap.at == at)
    }

    /// Returns the entry at an offset of the directory as it is in memory, where it is followed.
    pub(super) fn followed(&self, at: HostOffset) -> Option<&BitmapEntry> {
        self.find(at).map(|bitmap| &bitmap.entry)
    }

    fn find(&self, at: HostOffset) -> Option<&Tracked> {
        self.tracked.iter().find(|bitmap| bitmap.at == at)
    }

    /// Returns the first of some chunks in which something was marked since the image was opened.
    pub(super) fn first_marked(&self, at: HostOffset, chunks: Range<u64>) -> Option<u64> {
        self.find(at)?.chunks.range(chunks).next().map(|(index, _)| *index)
    }

    /// Adds what was marked since the image was opened to a part of a chunk that starts at byte
    /// `from` of it.
    pub(super) fn add_marks(&self, at: HostOffset, chunk: u64, from: usize, bytes: &mut [u8]) {
        let marks = self.find(at).and_then(|bitmap| bitmap.chunks.get(&chunk));
        let marks = marks.and_then(|marks| marks.get(from..)).unwrap_or_default();
        for (byte, new) in bytes.iter_mut().zip(marks) {
            *byte |= new;
        }
    }

    /// Takes note of where a table lies from here on, and how long it is.
    pub(super) fn move_table(&mut self, at: HostOffset, entry: &BitmapEntry) {
        for bitmap in self.tracked.iter_mut().filter(|bitmap| bitmap.at == at) {
            (bitmap.entry.table_offset, bitmap.entry.table_entries) =
                (entry.table_offset, entry.table_entries);
        }
    }

    /// Forgets what was marked behind the end of the disk.
    pub(super) fn cut_at(&mut self, size_bytes: u64) {
        for bitmap in &mut self.tracked {
            bitmap.cut_at(size_bytes);
        }
    }

    /// Notes that guest bytes change.
    pub(super) fn mark(&mut self, range: GuestRange) {
        for bitmap in &mut self.tracked {
            bitmap.mark(range);
        }
    }
}

/// Reads the directory: where each entry lies, and what it says.
pub(super) async fn directory<S: Storage>(
    storage: &S,
    header: &Header,
) -> Result<Vec<(HostOffset, BitmapEntry)>> {
    let Some(extension) = header.valid_bitmaps() else { return Ok(Vec::new()) };
    let buffer = Buffer::new(extension.directory_bytes as usize);
    let (result, bytes) = storage.read_at(extension.directory_offset, buffer).await;
    result.map_err(|error| error.context("Reading the bitmap directory"))?;
    let mut at = extension.directory_offset;
    let mut placed = Vec::new();
    for entry in BitmapEntry::decode_directory(&bytes, &extension)? {
        let len = BitmapEntry::encode_directory(std::slice::from_ref(&entry))?.len() as u64;
        placed.push((at, entry));
        at = at + len;
    }
    Ok(placed)
}

/// Encodes the fields of a directory entry that change: the table, and the flags.
pub(super) fn changing_fields(entry: &BitmapEntry, flags: BitmapFlags) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&entry.table_offset.0.to_be_bytes());
    bytes[8..12].copy_from_slice(&entry.table_entries.to_be_bytes());
    bytes[12..].copy_from_slice(&flags.bits().to_be_bytes());
    bytes
}

fn is_followed(entry: &BitmapEntry) -> bool {
    let knows_extra =
        entry.extra_data.is_empty() || entry.flags.contains(BitmapFlags::EXTRA_DATA_COMPATIBLE);
    entry.flags.contains(BitmapFlags::AUTO)
        && !entry.flags.contains(BitmapFlags::IN_USE)
        && knows_extra
}

impl Tracked {
    fn mark(&mut self, range: GuestRange) {
        if range.is_empty() {
            return;
        }
        let first = range.start.0 >> self.entry.granularity_bits;
        let last = (range.end().0 - 1) >> self.entry.granularity_bits;
        for index in first / self.chunk_bits..=last / self.chunk_bits {
            let start = index * self.chunk_bits;
            let bytes = (self.chunk_bits / 8) as usize;
            let chunk = self.chunks.entry(index).or_insert_with(|| vec![0; bytes]);
            let to = (last - start).min(self.chunk_bits - 1);
            set_bits(chunk, first.saturating_sub(start), to);
        }
    }
}

impl Tracked {
    fn cut_at(&mut self, size_bytes: u64) {
        let end = size_bytes.div_ceil(1 << self.entry.granularity_bits);
        let last = end / self.chunk_bits;
        self.chunks.retain(|index, _| *index <= last);
        if let Some(chunk) = self.chunks.get_mut(&last) {
            clear_bits_from(chunk, end % self.chunk_bits);
        }
    }
}

/// Clears bit `from` and all behind it; says whether one was set.
pub(super) fn clear_bits_from(bytes: &mut [u8], from: u64) -> bool {
    let (first, mut keep) = ((from / 8) as usize, !(0xff_u8 << (from % 8)));
    let mut was_set = false;
    for byte in &mut bytes[first..] {
        was_set |= *byte & !keep != 0;
        *byte &= keep;
        keep = 0;
    }
    was_set
}

/// Sets bits `from..=to`, lowest bit of a byte first.
fn set_bits(bytes: &mut [u8], from: u64, to: u64) {
    let (first, last) = ((from / 8) as usize, (to / 8) as usize);
    let head = 0xff << (from % 8);
    let tail = 0xff >> (7 - to % 8);
    if first == last {
        bytes[first] |= head & tail;
        return;
    }
    bytes[first] |= head;
    bytes[first + 1..last].fill(0xff);
    bytes[last] |= tail;
}

impl<S: Storage> Image<S> {
    /// Marks the bitmaps in use, durably; changes may follow then.
    pub(super) async fn mark_bitmaps_in_use(&self) -> Result<()> {
        self.write_bitmap_flags(BitmapFlags::IN_USE).await?;
        let mut meta = self.0.meta.lock();
        meta.bitmaps.in_use = true;
        meta.gate.bitmaps = false;
        Ok(())
    }

    async fn write_bitmap_flags(&self, in_use: BitmapFlags) -> Result<()> {
        let entries: Vec<_> = {
            let meta = self.0.meta.lock();
            // With the table: the entry that tells of a moved one may not have been written.
            let of = |it: &Tracked| {
                let flags = it.entry.flags.difference(BitmapFlags::IN_USE).union(in_use);
                (it.at, changing_fields(&it.entry, flags))
            };
            meta.bitmaps.tracked.iter().map(of).collect()
        };
        for (at, bytes) in entries {
            self.write_bytes(at, &bytes).await?;
        }
        self.0.storage.flush().await
    }

    /// Merges what changed into the stored bitmaps and takes the marks off.
    pub(super) async fn store_bitmaps(&self) -> Result<()> {
        let tracked = {
            let mut meta = self.0.meta.lock();
            if !meta.bitmaps.in_use {
                return Ok(());
            }
            let size_bytes = meta.size_bytes;
            meta.bitmaps.cut_at(size_bytes);
            meta.bitmaps.tracked.clone()
        };
        let mut tables = Vec::new();
        for bitmap in &tracked {
            tables.push(self.merge_chunks(bitmap).await?);
        }
        // New clusters of bitmap data have their refcounts on storage before a table names them.
        self.write_back(Refcounting::Written).await?;
        for (bitmap, table) in tracked.iter().zip(tables) {
            let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.0.to_be_bytes()).collect();
            self.write_bitmap(bitmap.entry.table_offset, &bytes).await?;
        }
        self.0.storage.flush().await?;
        self.write_bitmap_flags(BitmapFlags::empty()).await?;
        self.0.meta.lock().bitmaps.in_use = false;
        Ok(())
    }

    /// Reads the table of a bitmap whose entry was checked.
    pub(super) async fn load_bitmap_table(
        &self,
        entry: &BitmapEntry,
    ) -> Result<Vec<BitmapTableEntry>> {
        let table_bytes = u64::from(entry.table_entries) * 8;
        let bytes = self.load(entry.table_offset, table_bytes, "bitmap table").await?;
        let (words, _) = bytes.as_chunks::<8>();
        Ok(words.iter().map(|word| BitmapTableEntry(u64::from_be_bytes(*word))).collect())
    }

    /// Writes the chunks of one bitmap. Returns its table as it must be stored next.
    async fn merge_chunks(&self, bitmap: &Tracked) -> Result<Vec<BitmapTableEntry>> {
        let mut table = self.load_bitmap_table(&bitmap.entry).await?;
        for (index, chunk) in &bitmap.chunks {
            let Some(entry) = table.get_mut(*index as usize) else { continue };
            *entry = self.merge_chunk(*entry, chunk).await?;
        }
        Ok(table)
    }

    /// The image says where a bitmap lies, and may lie.
    pub(super) async fn write_bitmap(&self, offset: HostOffset, bytes: &[u8]) -> Result<()> {
        let range = HostRange::new(offset, bytes.len() as u64);
        let checked = self.0.meta.lock().structures.check(range, None);
        match checked {
            Ok(()) => self.write_bytes(offset, bytes).await,
            Err(error) => Err(self.mark_corrupt(error).await),
        }
    }

    async fn merge_chunk(&self, entry: BitmapTableEntry, chunk: &[u8]) -> Result<BitmapTableEntry> {
        let (offset, merged) = match entry.cluster() {
            BitmapCluster::AllOnes => return Ok(entry),
            BitmapCluster::AllZeros => (self.plan(|meta| meta.allocate(1)).await?, chunk.to_vec()),
            BitmapCluster::Data(offset) => {
                let stored = self.load(offset, chunk.len() as u64, "bitmap data").await?;
                let merged = stored.iter().zip(chunk).map(|(old, new)| old | new).collect();
                (offset, merged)
            }
        };
        self.write_bitmap(offset, &merged).await?;
        Ok(BitmapTableEntry::new(BitmapCluster::Data(offset)))
    }
}

#[cfg(test)]
mod tests {
    use super::{clear_bits_from, set_bits};

    #[test]
    fn bits_are_cleared_from_a_place_on_and_none_before() {
        for from in 0..40 {
            let mut bytes = [0xff; 5];
            assert!(clear_bits_from(&mut bytes, from));
            for bit in 0..40 {
                assert_eq!(bytes[(bit / 8) as usize] >> (bit % 8) & 1 == 1, bit < from);
            }
            assert!(!clear_bits_from(&mut bytes, from));
        }
    }

    #[test]
    fn a_run_of_bits_is_set_and_no_neighbour() {
        for from in 0..40 {
            for to in from..40 {
                let mut bytes = [0; 5];
                set_bits(&mut bytes, from, to);
                for bit in 0..40 {
                    let is_set = bytes[(bit / 8) as usize] >> (bit % 8) & 1 == 1;
                    assert_eq!(is_set, (from..=to).contains(&bit), "bit {bit} of {from}..={to}");
                }
            }
        }
    }
}
