//! Bitmaps as they were at one moment, for as long as what they name is copied.
//!
//! | bitmap | in the image, from the moment on | finished | dropped |
//! |---|---|---|---|
//! | frozen | what it named, and what changes | what changed since the moment | as in the image |
//! | made | what changes | the same | the same |
//!
//! * Always: the image names no less than that, whatever happens. What was frozen, and what changed since,
//!   are kept apart in memory only.
//! * Always bounded: frozen bits, and those since, take no more memory than the bitmap does in the image.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use super::super::dirty::DirtyExtent;
use super::super::dirty_scan::{Answer, part};
use super::super::format::{BitmapCluster, BitmapEntry, BitmapTableEntry, StoredName};
use super::super::image::Image;
use super::super::resize::MAX_SIZE_BYTES;
use super::directory::AtRest;
use super::edit::NewBitmap;
use super::size::Measure;
use super::{Chunks, cut, mark};
use crate::storage::Storage;
use crate::units::{GuestOffset, GuestRange, HostRange};
use crate::{Error, ErrorKind, Result};

/// Freezes that were made in this process.
static FREEZES: AtomicU64 = AtomicU64::new(0);

/// What changed since a bitmap was frozen.
#[derive(Debug)]
pub(super) struct Recording {
    /// Of which freeze it is.
    of: u64,
    name: StoredName,
    measure: Measure,
    chunks: Chunks,
}

impl Recording {
    pub(super) fn mark(&mut self, range: GuestRange) {
        mark(&mut self.chunks, self.measure, range);
    }
}

/// Bitmaps of one moment; made by [`Image::freeze_bitmaps`], with an example there.
///
/// Dropped, it leaves the bitmaps of the image as if nothing had been frozen.
pub struct FrozenBitmaps<S: Storage> {
    image: Image<S>,
    number: u64,
    bitmaps: Vec<FrozenBitmap>,
}

impl<S: Storage> std::fmt::Debug for FrozenBitmaps<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrozenBitmaps").field("bitmaps", &self.bitmaps).finish_non_exhaustive()
    }
}

/// A bitmap as it was at one moment: what may have changed before it.
///
/// Made by [`Image::freeze_bitmaps`], with an example there.
pub struct FrozenBitmap {
    name: StoredName,
    measure: Measure,
    chunks: BTreeMap<u64, Bits>,
}

/// A cluster of bits of which one at least is set.
enum Bits {
    All,
    Some(Box<[u8]>),
}

impl std::fmt::Debug for FrozenBitmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrozenBitmap").field("name", &self.name).finish_non_exhaustive()
    }
}

impl FrozenBitmap {
    /// Returns what the bitmap is called.
    #[must_use]
    pub const fn name(&self) -> &StoredName {
        &self.name
    }

    /// Returns the leading extents of `range`, at most `at_most` and at least one, in guest order
    /// without gaps; neighbours differ. They may end before the range does: ask on from there. Nothing for
    /// an empty range. What lies behind the end that the disk had is clean.
    #[must_use]
    pub fn extents(&self, range: GuestRange, at_most: usize) -> Vec<DirtyExtent> {
        let chunk_bits = self.measure.chunk_bits;
        let mut answer = Answer::about(range, self.measure.granularity_bits, at_most);
        while !answer.open().is_empty() {
            let chunk = answer.open().start / chunk_bits;
            match self.chunks.get(&chunk) {
                Some(Bits::All) => answer.push((chunk + 1) * chunk_bits, true),
                Some(Bits::Some(bits)) => {
                    let part = part(chunk_bits, answer.open());
                    let from = part.from as usize;
                    answer.push_bits(part, chunk_bits, &bits[from..from + part.len as usize]);
                }
                None => {
                    let next = self.chunks.range(chunk..).next().map(|(next, _)| next * chunk_bits);
                    answer.push(next.unwrap_or_else(|| answer.open().end), false);
                }
            }
        }
        answer.finish()
    }
}

impl<S: Storage> Image<S> {
    /// Keeps what `names` say at a moment at which nothing changes the disk, and makes `new` at the same
    /// moment; durable on return. The bitmaps of the image go on recording as ever. With neither, it waits for such a
    /// moment, and nothing else.
    ///
    /// A change that was dropped, and that a driver still works on, is waited for too.
    ///
    /// # Errors
    /// As [`bitmap`](Self::bitmap); `InvalidRequest` for one that records nothing; `Busy` for one that is
    /// frozen; as [`add_bitmap`](Self::add_bitmap). Nothing has happened then.
    ///
    /// ```
    /// use lacuna::block::{Layer, WriteFlags};
    /// use lacuna::buffer::Buffer;
    /// use lacuna::qcow2::{Access, CreateOptions, Image, NewBitmap, OpenOptions, Parts, create};
    /// use lacuna::storage::MemoryStorage;
    /// use lacuna::units::GuestOffset;
    ///
    /// pollster::block_on(async {
    ///     let storage = MemoryStorage::new();
    ///     create(&storage, &CreateOptions { size_bytes: 1 << 30, ..Default::default() }).await?;
    ///     let image = Image::open(Parts::alone(storage), OpenOptions::new(Access::ReadWrite)).await?;
    ///     image.add_bitmap(&NewBitmap::new("daily")).await?;
    ///     let bytes = || Buffer::from(&[7; 512][..]);
    ///     image.write(GuestOffset(0), bytes(), WriteFlags::empty()).await.0?;
    ///     let frozen = image.freeze_bitmaps(&["daily".into()], &[]).await?;
    ///     image.write(GuestOffset(1 << 20), bytes(), WriteFlags::empty()).await.0?;
    ///     let before = frozen.bitmap("daily").unwrap().extents(image.whole(), 9);
    ///     assert!(before[0].is_dirty && !before[1].is_dirty && before.len() == 2);
    ///     // What it names was copied.
    ///     frozen.finish().await?;
    ///     let mut changed = image.bitmap(&"daily".into()).await?.ranges();
    ///     assert_eq!(changed.next().await?.unwrap().start, GuestOffset(1 << 20));
    ///     image.close().await
    /// }).unwrap();
    /// ```
    pub async fn freeze_bitmaps(
        &self,
        names: &[StoredName],
        new: &[NewBitmap],
    ) -> Result<FrozenBitmaps<S>> {
        let number = FREEZES.fetch_add(1, Ordering::Relaxed);
        let mut frozen = FrozenBitmaps { image: self.clone(), number, bitmaps: Vec::new() };
        if names.is_empty() && new.is_empty() {
            self.wait_for_changes().await?;
            return Ok(frozen);
        }
        let mut rest = self.bitmaps_at_rest().await?;
        for name in names {
            let entry = rest.recording(name)?.clone();
            if frozen.bitmaps.iter().any(|bitmap| bitmap.name == *name) {
                return Err(Error::invalid(format!("Bitmap '{name}' is named twice")));
            }
            frozen.bitmaps.push(self.frozen_bits(&entry).await?);
        }
        for new in new {
            rest.add(new).await?;
        }
        frozen.begin();
        if new.is_empty() {
            return Ok(frozen);
        }
        let entries = std::mem::take(&mut rest.entries);
        rest.replace(&entries, Vec::new()).await?;
        Ok(frozen)
    }

    /// Waits until no change of the disk is under way.
    async fn wait_for_changes(&self) -> Result<()> {
        let everything = GuestRange::new(GuestOffset(0), MAX_SIZE_BYTES);
        self.be_alone(everything).await.map(drop)
    }

    async fn frozen_bits(&self, entry: &BitmapEntry) -> Result<FrozenBitmap> {
        let measure = Measure::of(entry, &self.geometry());
        let table = self.checked_table(entry).await?;
        let mut chunks = BTreeMap::new();
        for (chunk, place) in (0..).zip(&table) {
            match place.cluster() {
                BitmapCluster::AllZeros => {}
                BitmapCluster::AllOnes => drop(chunks.insert(chunk, Bits::All)),
                BitmapCluster::Data(_) => {
                    let bits = self.chunk_of(&table, chunk, measure).await?;
                    if bits.iter().any(|byte| *byte != 0) {
                        chunks.insert(chunk, Bits::Some(bits.into()));
                    }
                }
            }
        }
        Ok(FrozenBitmap { name: entry.name.clone(), measure, chunks })
    }
}

impl<S: Storage> AtRest<'_, S> {
    /// Finds a bitmap that records what changes, and is not frozen.
    fn recording(&self, name: &StoredName) -> Result<&BitmapEntry> {
        let entry = &self.entries[self.usable(name)?];
        let meta = self.image.0.meta.lock();
        if !meta.bitmaps.tracked.iter().any(|tracked| tracked.entry.name == *name) {
            return Err(Error::invalid(format!(
                "Bitmap '{name}' is disabled: it does not record what changes"
            )));
        }
        match meta.bitmaps.recordings.iter().any(|recording| recording.name == *name) {
            true => Err(Error::new(ErrorKind::Busy, format!("Bitmap '{name}' is frozen already"))),
            false => Ok(entry),
        }
    }
}

impl<S: Storage> FrozenBitmaps<S> {
    /// Returns a bitmap that was frozen.
    #[must_use]
    pub fn bitmap(&self, name: &str) -> Option<&FrozenBitmap> {
        let name = StoredName::from(name);
        self.bitmaps.iter().find(|bitmap| bitmap.name == name)
    }

    /// Returns all that were frozen, in the order in which they were named.
    pub fn bitmaps(&self) -> impl Iterator<Item = &FrozenBitmap> {
        self.bitmaps.iter()
    }

    /// Has the frozen bitmaps name what changed since the moment, and no more; all of them in one step.
    /// Durable on return; it has ended then.
    ///
    /// # Errors
    /// As [`Image::merge_bitmap`]; the bitmaps of the image are as they were then, and it can be tried again.
    /// `InvalidRequest` where it has ended.
    pub async fn finish(&self) -> Result<()> {
        if self.bitmaps.is_empty() {
            return Ok(());
        }
        let mut rest = self.image.bitmaps_at_rest().await?;
        let mut dropped: Vec<HostRange> = Vec::new();
        for bitmap in &self.bitmaps {
            let index = rest.usable(&bitmap.name)?;
            let table = self.table_since(bitmap).await?;
            dropped.extend(rest.change_table(index, &table).await?);
        }
        let entries = std::mem::take(&mut rest.entries);
        rest.replace(&entries, dropped).await?;
        self.end();
        Ok(())
    }

    /// Ends it: the bitmaps of the image stay as if nothing had been frozen. What was frozen can be read on.
    pub fn end(&self) {
        let mut meta = self.image.0.meta.lock();
        meta.bitmaps.recordings.retain(|recording| recording.of != self.number);
    }

    /// Writes the bits of what changed since the moment; returns the table of them.
    async fn table_since(&self, bitmap: &FrozenBitmap) -> Result<Vec<BitmapTableEntry>> {
        let measure = bitmap.measure;
        let size_bytes = self.image.0.meta.lock().size_bytes;
        let mut table = vec![BitmapTableEntry::default(); measure.chunks(size_bytes) as usize];
        for (index, bits) in self.since(bitmap, size_bytes)? {
            if let Some(place) = table.get_mut(index as usize)
                && bits.iter().any(|byte| *byte != 0)
            {
                *place = self.image.write_chunk(bits, measure, index).await?;
            }
        }
        Ok(table)
    }

    fn since(&self, bitmap: &FrozenBitmap, size_bytes: u64) -> Result<Chunks> {
        let meta = self.image.0.meta.lock();
        let own =
            |recording: &&Recording| recording.of == self.number && recording.name == bitmap.name;
        let found = meta.bitmaps.recordings.iter().find(own);
        let mut chunks = match found {
            Some(recording) => recording.chunks.clone(),
            None => return Err(Error::invalid("What was frozen has ended before")),
        };
        drop(meta);
        cut(&mut chunks, bitmap.measure, size_bytes);
        Ok(chunks)
    }

    /// Records what changes from here on.
    fn begin(&self) {
        let recordings = self.bitmaps.iter().map(|bitmap| Recording {
            of: self.number,
            name: bitmap.name.clone(),
            measure: bitmap.measure,
            chunks: Chunks::new(),
        });
        self.image.0.meta.lock().bitmaps.recordings.extend(recordings);
    }
}

impl<S: Storage> Drop for FrozenBitmaps<S> {
    fn drop(&mut self) {
        self.end();
    }
}
