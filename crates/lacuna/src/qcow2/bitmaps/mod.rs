//! Keeps enabled dirty bitmaps in step with writes (B.10).
//!
//! `store` brings storage after memory, `intents` bound what a crash loses in between, `directory` says which bitmaps there are and changes it,
//! `edit`, `freeze`, `merge` and `repair` are what people ask for, `size` follows the disk's size, `moves` gives what lies badly another place.
//!
//! * Always: the first change of an open image marks every enabled bitmap in use, durably, before
//!   anything else; only what stores them takes the mark off again. After a crash nobody trusts one
//!   but who knows our `intents`, and takes them into account (`recover`).
//! * Always: what changes is marked before it changes, in memory, a chunk per cluster of bitmap
//!   data; closing merges the chunks into what is stored.
//! * Never: a bitmap is touched that is disabled, was in use already, or has extra data that says
//!   it must not be.

mod directory;
mod edit;
mod freeze;
mod intents;
mod merge;
mod moves;
mod recover;
mod repair;
mod size;
mod store;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;

use self::freeze::Recording;
use self::intents::Intents;
use self::size::Measure;
use super::format::{BitmapEntry, BitmapFlags, Header};
use crate::Result;
use crate::storage::Storage;
use crate::units::{GuestRange, HostOffset};

pub(super) use directory::{Still, directory};
pub use edit::NewBitmap;
pub use freeze::{FrozenBitmap, FrozenBitmaps};
pub(super) use moves::Moves;
pub use repair::{BitmapRepairs, repair_bitmaps};

/// Where the flags lie in a directory entry.
const FLAGS_AT: u64 = 12;

/// The bitmaps that follow the writes of an open image.
#[derive(Debug, Default)]
pub(super) struct Bitmaps {
    tracked: Vec<Tracked>,
    /// They are marked in use, so that closing has to store them.
    pub(super) in_use: bool,
    /// The directory on storage may be another one than the one known here.
    pub(super) outdated: bool,
    /// They were left in use and are only read: what has an intent counts as changed.
    left: bool,
    /// Some other bitmap was left in use by somebody who keeps no intents.
    has_stale: bool,
    intents: Intents,
    /// Storage may say that intents are kept, though none are: telling it so has failed.
    intents_unsure: bool,
    /// What changed since some of them were frozen.
    recordings: Vec<Recording>,
    /// Places that words of storage are to name, and those that a write-back is about to store.
    moves: Moves,
    moves_on_their_way: Moves,
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
    chunks: Chunks,
    /// Those that are on their way to storage.
    storing: Chunks,
}

/// Bits of a bitmap, by the cluster of bitmap data that they belong to.
type Chunks = BTreeMap<u64, Vec<u8>>;

impl Bitmaps {
    /// Finds the bitmaps to follow.
    ///
    /// # Errors
    /// `Corrupt` where the directory cannot be decoded: it could not be kept in step.
    pub(super) async fn load<S: Storage>(storage: &S, header: &Header) -> Result<Self> {
        let mut loaded = Self::default();
        for (at, entry) in directory(storage, header).await? {
            loaded.has_stale |= entry.flags.contains(BitmapFlags::IN_USE);
            if is_followed(&entry) {
                entry.check(&header.geometry, header.size_bytes)?;
                loaded.tracked.push(Tracked::new(at, entry, header));
            }
        }
        loaded.intents = recover::load_intents(storage, header).await?;
        Ok(loaded)
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.tracked.is_empty()
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
        let bitmap = self.find(at)?;
        let first = |of: &Chunks| of.range(chunks.clone()).next().map(|(index, _)| *index);
        let left = self.left.then(|| bitmap.first_left(&self.intents, &chunks)).flatten();
        [first(&bitmap.chunks), first(&bitmap.storing), left].into_iter().flatten().min()
    }

    /// Adds what was marked since the image was opened to a part of a chunk that starts at byte
    /// `from` of it.
    pub(super) fn add_marks(&self, at: HostOffset, chunk: u64, from: usize, bytes: &mut [u8]) {
        let Some(bitmap) = self.find(at) else { return };
        for marks in [&bitmap.chunks, &bitmap.storing] {
            let marks = marks.get(&chunk).and_then(|marks| marks.get(from..)).unwrap_or_default();
            add_bits(bytes, marks);
        }
        if self.left {
            bitmap.add_left(&self.intents, chunk, from, bytes);
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

    /// Says whether guest bytes may change: a crash would not hide it. If not, an intent is asked for.
    pub(super) fn may_change(&mut self, range: GuestRange) -> bool {
        self.tracked.is_empty() || self.intents.cover(range)
    }

    /// Notes that guest bytes change.
    pub(super) fn mark(&mut self, range: GuestRange) {
        for bitmap in &mut self.tracked {
            bitmap.mark(range);
        }
        for recording in &mut self.recordings {
            recording.mark(range);
        }
    }
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
    fn new(at: HostOffset, entry: BitmapEntry, header: &Header) -> Self {
        let chunk_bits = header.geometry.cluster_bytes() * 8;
        Self { entry, at, chunk_bits, chunks: Chunks::new(), storing: Chunks::new() }
    }

    const fn measure(&self) -> Measure {
        Measure { granularity_bits: self.entry.granularity_bits, chunk_bits: self.chunk_bits }
    }

    fn mark(&mut self, range: GuestRange) {
        let measure = self.measure();
        mark(&mut self.chunks, measure, range);
    }
}

/// Sets the bits that stand for a range.
fn mark(chunks: &mut Chunks, measure: Measure, range: GuestRange) {
    if range.is_empty() {
        return;
    }
    let first = range.start.0 >> measure.granularity_bits;
    let last = (range.end().0 - 1) >> measure.granularity_bits;
    for index in first / measure.chunk_bits..=last / measure.chunk_bits {
        let start = index * measure.chunk_bits;
        let bytes = (measure.chunk_bits / 8) as usize;
        let chunk = chunks.entry(index).or_insert_with(|| vec![0; bytes]);
        let to = (last - start).min(measure.chunk_bits - 1);
        set_bits(chunk, first.saturating_sub(start), to);
    }
}

/// Forgets the bits behind the end of a disk.
fn cut(chunks: &mut Chunks, measure: Measure, size_bytes: u64) {
    let end = measure.bits(size_bytes);
    let last = end / measure.chunk_bits;
    chunks.retain(|index, _| *index <= last);
    if let Some(chunk) = chunks.get_mut(&last) {
        clear_bits_from(chunk, end % measure.chunk_bits);
    }
}

impl Tracked {
    /// Sends all that is marked on its way to storage.
    fn begin_storing(&mut self) {
        for (index, chunk) in std::mem::take(&mut self.chunks) {
            match self.storing.entry(index) {
                Entry::Vacant(place) => {
                    place.insert(chunk);
                }
                Entry::Occupied(mut sent) => add_bits(sent.get_mut(), &chunk),
            }
        }
    }

    fn cut_at(&mut self, size_bytes: u64) {
        let measure = self.measure();
        cut(&mut self.chunks, measure, size_bytes);
    }
}

/// Sets the bits of `bytes` that are set in `more`.
fn add_bits(bytes: &mut [u8], more: &[u8]) {
    for (byte, new) in bytes.iter_mut().zip(more) {
        *byte |= new;
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
