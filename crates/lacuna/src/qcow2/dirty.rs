//! Reading persistent dirty bitmaps (B.10): which parts of the disk changed.
//!
//! * Always: what changes through an open image counts at once in the bitmaps that follow it,
//!   stored or not.
//! * Always bounded: the table of an opened bitmap takes at most 8 MiB, and its bits are read in
//!   pieces of 16 KiB.
//! * Never: a bitmap answers that may miss a change.

use std::collections::HashSet;
use std::sync::Arc;

use parking_lot::Mutex;

use super::bitmaps::directory;
use super::dirty_scan::{Answer, Part, Stretch, part, stretch};
use super::format::{BitmapEntry, BitmapFlags, BitmapTableEntry, StoredName};
use super::image::Image;
use crate::storage::Storage;
use crate::units::{GuestRange, HostOffset};
use crate::{Error, ErrorKind, Result};

/// Pieces of bits that one answer is made of at most.
const PIECES_AT_ONCE: usize = 64;
/// Extents that a walk asks for at a time.
const EXTENTS_AT_ONCE: usize = 1024;

/// What the directory says of a dirty bitmap.
///
/// Made by [`Image::bitmaps`], with an example.
#[derive(Clone, Debug)]
pub struct BitmapFacts {
    /// What it is called.
    pub name: StoredName,
    /// The guest bytes that one bit stands for: a power of two, 512 to 2 GiB. 0 where the image
    /// gives a number that is none.
    pub granularity_bytes: u64,
    /// It is to record every change from now on.
    pub is_enabled: bool,
    /// It was left in use: somebody changed the disk and did not store what changed. Not set for
    /// bitmaps that this open image follows itself.
    pub is_in_use: bool,
    /// Why it cannot be used, if so.
    pub problem: Option<Error>,
}

/// A part of the disk in one state.
///
/// Made by [`DirtyBitmap::extents`], with an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DirtyExtent {
    /// Where.
    pub range: GuestRange,
    /// Whether something may have changed there.
    pub is_dirty: bool,
}

/// A dirty bitmap of an open image: which parts of the disk may have changed since it was made, or
/// cleared.
///
/// A bitmap may name more than what changed, and never less. One that is enabled follows what
/// changes through the image while that is open; the answer to a question includes what was
/// acknowledged before. Cheap to clone; clones share the table, at most 8 MiB.
///
/// ```no_run
/// use lacuna::qcow2::{Access, Image, OpenOptions, Parts};
/// use lacuna::storage::{FileOptions, FileStorage};
///
/// # pollster::block_on(async {
/// let file = FileStorage::open("disk.qcow2", &FileOptions::read_only())?;
/// let image = Image::open(Parts::alone(file), OpenOptions::new(Access::ReadOnly)).await?;
/// let bitmap = image.bitmap(&"since-monday".into()).await?;
/// let mut changed = bitmap.ranges();
/// while let Some(range) = changed.next().await? {
///     println!("{} bytes at {}", range.len, range.start);
/// }
/// # Ok::<_, lacuna::Error>(())
/// # });
/// ```
pub struct DirtyBitmap<S: Storage> {
    image: Image<S>,
    of: Arc<Opened>,
}

struct Opened {
    name: StoredName,
    stored: Mutex<Arc<Stored>>,
}

/// A bitmap as storage has it.
struct Stored {
    /// Where its directory entry lies.
    at: HostOffset,
    entry: BitmapEntry,
    table: Vec<BitmapTableEntry>,
    /// Since when the table is the right one.
    generation: u64,
    /// For which size.
    size_bytes: u64,
}

impl<S: Storage> Clone for DirtyBitmap<S> {
    fn clone(&self) -> Self {
        Self { image: self.image.clone(), of: Arc::clone(&self.of) }
    }
}

impl<S: Storage> std::fmt::Debug for DirtyBitmap<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DirtyBitmap").field("name", &self.of.name).finish_non_exhaustive()
    }
}

/// An entry of the directory: where it lies, what it says, and why it cannot be used.
struct Listed {
    at: HostOffset,
    entry: BitmapEntry,
    is_in_use: bool,
    problem: Option<Error>,
}

impl<S: Storage> Image<S> {
    /// Lists the persistent dirty bitmaps, in the order of their directory. None where a program
    /// that knows none has changed the image since: they mean nothing then.
    ///
    /// # Errors
    /// `Corrupt` where the directory cannot be decoded, else what reading gives.
    ///
    /// ```no_run
    /// # use lacuna::qcow2::{Access, Image, OpenOptions, Parts};
    /// # use lacuna::storage::{FileOptions, FileStorage};
    /// # pollster::block_on(async {
    /// # let file = FileStorage::open("disk.qcow2", &FileOptions::read_only())?;
    /// # let image = Image::open(Parts::alone(file), OpenOptions::new(Access::ReadOnly)).await?;
    /// for bitmap in image.bitmaps().await? {
    ///     match bitmap.problem {
    ///         None => println!("{}: {} bytes per bit", bitmap.name, bitmap.granularity_bytes),
    ///         Some(problem) => println!("{}: {problem}", bitmap.name),
    ///     }
    /// }
    /// # Ok::<_, lacuna::Error>(())
    /// # });
    /// ```
    pub async fn bitmaps(&self) -> Result<Vec<BitmapFacts>> {
        let facts = |listed: Listed| BitmapFacts {
            granularity_bytes: 1_u64.checked_shl(listed.entry.granularity_bits.into()).unwrap_or(0),
            is_enabled: listed.entry.flags.contains(BitmapFlags::AUTO),
            is_in_use: listed.is_in_use,
            name: listed.entry.name,
            problem: listed.problem,
        };
        Ok(self.list_bitmaps().await?.into_iter().map(facts).collect())
    }

    /// Opens a dirty bitmap for questions.
    ///
    /// # Errors
    /// `NotFound` where there is none of that name, or all are outdated; `Corrupt` where it was
    /// left in use, so that it may miss changes, or where it contradicts itself; `Unsupported` for
    /// a bitmap of a kind that is not known.
    pub async fn bitmap(&self, name: &StoredName) -> Result<DirtyBitmap<S>> {
        let stored = Mutex::new(Arc::new(self.load_bitmap(name).await?));
        let of = Arc::new(Opened { name: name.clone(), stored });
        Ok(DirtyBitmap { image: self.clone(), of })
    }

    async fn list_bitmaps(&self) -> Result<Vec<Listed>> {
        let header = self.header();
        let placed = directory(&self.0.storage, &header).await?;
        let meta = self.0.meta.lock();
        let mut names = HashSet::new();
        let list = placed.into_iter().map(|(at, stored)| {
            // Memory knows better what this open image follows, and what is in use by itself.
            let followed = meta.bitmaps.followed(at);
            let is_in_use = followed.is_none() && stored.flags.contains(BitmapFlags::IN_USE);
            let entry = followed.cloned().unwrap_or(stored);
            let is_second = !names.insert(entry.name.clone());
            let problem = entry.check(&header.geometry, meta.size_bytes).err().or_else(|| {
                match (is_in_use, is_second) {
                    (true, _) => Some(left_in_use(&entry.name)),
                    (_, true) => Some(twice(&entry.name)),
                    _ => None,
                }
            });
            Listed { at, entry, is_in_use, problem }
        });
        Ok(list.collect())
    }

    async fn load_bitmap(&self, name: &StoredName) -> Result<Stored> {
        loop {
            let (generation, size_bytes) = self.bitmap_moment();
            let listed = self.list_bitmaps().await?;
            let Some(found) = listed.into_iter().find(|listed| listed.entry.name == *name) else {
                return Err(self.no_bitmap(name));
            };
            if let Some(problem) = found.problem {
                return Err(problem);
            }
            let table = self.checked_table(&found.entry).await;
            if self.bitmap_moment() == (generation, size_bytes) {
                let (at, entry, table) = (found.at, found.entry, table?);
                return Ok(Stored { at, entry, table, generation, size_bytes });
            }
        }
    }

    /// What was read of a bitmap counts while this stays the same.
    fn bitmap_moment(&self) -> (u64, u64) {
        let meta = self.0.meta.lock();
        (meta.bitmaps.generation, meta.size_bytes)
    }

    pub(super) fn no_bitmap(&self, name: &StoredName) -> Error {
        let header = self.0.header.lock();
        let outdated = header.extensions.bitmaps.is_some() && header.valid_bitmaps().is_none();
        let text = match outdated {
            true => format!(
                "Bitmap '{name}' cannot be used: the image was changed by a program that keeps no \
                 bitmaps, so that all of them are outdated"
            ),
            false => format!("The image has no bitmap '{name}'"),
        };
        Error::new(ErrorKind::NotFound, text)
    }

    /// Reads the table of a bitmap whose entry was checked. All data must lie in the file: bits
    /// that got lost would read as clear.
    pub(super) async fn checked_table(&self, entry: &BitmapEntry) -> Result<Vec<BitmapTableEntry>> {
        let file_bytes = self.0.storage.len().await?;
        let table_bytes = u64::from(entry.table_entries) * 8;
        let end = entry.table_offset.0.checked_add(table_bytes);
        if end.is_none_or(|end| end > file_bytes) {
            return Err(Error::corrupt(format!(
                "Table of bitmap '{}' at {} passes the end of the file at {file_bytes:#x}",
                entry.name, entry.table_offset
            )));
        }
        let geometry = self.geometry();
        let table = self.load_bitmap_table(entry).await?;
        match table.iter().position(|word| !word.is_sound(&geometry, file_bytes)) {
            None => Ok(table),
            Some(index) => Err(Error::corrupt(format!(
                "Table of bitmap '{}': entry {index} ({:#018x}) names no cluster of the file",
                entry.name, table[index].0
            ))),
        }
    }
}

pub(super) fn left_in_use(name: &StoredName) -> Error {
    Error::corrupt(format!(
        "Bitmap '{name}' is marked in use: the disk was changed and what changed was not stored, \
         so that the bitmap may miss it"
    ))
}

fn twice(name: &StoredName) -> Error {
    Error::corrupt(format!("A bitmap before this one is called '{name}' too"))
}

impl<S: Storage> DirtyBitmap<S> {
    /// Returns what the bitmap is called.
    #[must_use]
    pub fn name(&self) -> &StoredName {
        &self.of.name
    }

    /// Returns the guest bytes that one bit stands for: a power of two, 512 to 2 GiB.
    #[must_use]
    pub fn granularity_bytes(&self) -> u64 {
        1 << self.of.stored.lock().entry.granularity_bits
    }

    /// Returns the size of the disk whose changes it names.
    pub(super) fn size_bytes(&self) -> u64 {
        self.image.size()
    }

    /// Returns how many bytes of memory it and its clones take together, at most 8 MiB.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        size_of_val(&*self.of.stored.lock().table)
    }

    /// Returns the leading extents of `range`, at most `at_most` and at least one, in guest order
    /// without gaps; neighbours differ. They may end before the range does, and the last one
    /// before its state changes: ask on from there. Nothing for an empty range.
    ///
    /// Cheap enough for each request: it reads only the bits of the range, up to 1 MiB of them.
    ///
    /// # Errors
    /// `OutOfBounds` past the end of the disk; else what reading gives, and what
    /// [`Image::bitmap`] does after a change of the disk's size.
    ///
    /// ```no_run
    /// # use lacuna::block::Layer;
    /// # use lacuna::qcow2::{Access, Image, OpenOptions, Parts};
    /// # use lacuna::storage::{FileOptions, FileStorage};
    /// # pollster::block_on(async {
    /// # let file = FileStorage::open("disk.qcow2", &FileOptions::read_only())?;
    /// # let image = Image::open(Parts::alone(file), OpenOptions::new(Access::ReadOnly)).await?;
    /// let bitmap = image.bitmap(&"since-monday".into()).await?;
    /// let first = bitmap.extents(image.whole(), 1).await?[0];
    /// println!("{} bytes: dirty is {}", first.range.len, first.is_dirty);
    /// # Ok::<_, lacuna::Error>(())
    /// # });
    /// ```
    pub async fn extents(&self, range: GuestRange, at_most: usize) -> Result<Vec<DirtyExtent>> {
        loop {
            let stored = self.stored().await?;
            self.image.0.meta.lock().check_bounds(range)?;
            let answer = self.answer(&stored, range, at_most).await;
            // Else what was read may have been somebody else's by then.
            if self.image.bitmap_moment() == (stored.generation, stored.size_bytes) {
                return answer;
            }
        }
    }

    /// Goes through what is dirty on the whole disk.
    #[must_use]
    pub fn ranges(&self) -> DirtyRanges<S> {
        let rest = GuestRange::new(crate::units::GuestOffset(0), self.image.size());
        DirtyRanges { bitmap: self.clone(), rest, told: Vec::new().into_iter(), open: None }
    }

    async fn stored(&self) -> Result<Arc<Stored>> {
        let stored = Arc::clone(&self.of.stored.lock());
        if self.image.bitmap_moment() == (stored.generation, stored.size_bytes) {
            return Ok(stored);
        }
        let fresh = Arc::new(self.image.load_bitmap(&self.of.name).await?);
        *self.of.stored.lock() = Arc::clone(&fresh);
        Ok(fresh)
    }

    async fn answer(
        &self,
        stored: &Stored,
        range: GuestRange,
        at_most: usize,
    ) -> Result<Vec<DirtyExtent>> {
        let chunk_bits = self.image.geometry().cluster_bytes() * 8;
        let mut answer = Answer::about(range, stored.entry.granularity_bits, at_most);
        let mut pieces = 0;
        while !answer.open().is_empty() && pieces < PIECES_AT_ONCE {
            let chunk = answer.open().start / chunk_bits;
            let bits = match stretch(&stored.table, chunk_bits, answer.open()) {
                Stretch::Data(part) => part,
                Stretch::Set { chunks } => {
                    answer.push((chunk + chunks) * chunk_bits, true);
                    continue;
                }
                Stretch::Clear { chunks } => {
                    let end = self.clear_until(stored, chunk, chunks);
                    if end > chunk {
                        answer.push(end * chunk_bits, false);
                        continue;
                    }
                    part(chunk_bits, answer.open())
                }
            };
            let bytes = self.bits(stored, bits).await?;
            answer.push_bits(bits, chunk_bits, &bytes);
            pieces += 1;
        }
        Ok(answer.finish())
    }

    /// Returns the first of some clusters of bits, clear in storage, in which something was marked
    /// in memory; else the one behind them.
    fn clear_until(&self, stored: &Stored, chunk: u64, chunks: u64) -> u64 {
        let all = chunk..chunk + chunks;
        let meta = self.image.0.meta.lock();
        meta.bitmaps.first_marked(stored.at, all.clone()).unwrap_or(all.end)
    }

    /// Returns bits, those included that are not stored yet.
    async fn bits(&self, stored: &Stored, part: Part) -> Result<Vec<u8>> {
        let mut bytes = match part.cluster {
            Some(cluster) => {
                self.image.load(cluster + part.from, part.len, "bitmap data").await?.to_vec()
            }
            None => vec![0; part.len as usize],
        };
        // Looked at last: closing the image stores them, and leaves them in memory.
        let meta = self.image.0.meta.lock();
        meta.bitmaps.add_marks(stored.at, part.chunk, part.from as usize, &mut bytes);
        Ok(bytes)
    }
}

/// A walk over what is dirty; made by [`DirtyBitmap::ranges`], with an example there.
///
/// Ranges come in guest order and do not touch each other. What changes while the walk is under
/// way may be missing if the walk has passed it. An error does not end the walk: asking again goes
/// on where it stood.
pub struct DirtyRanges<S: Storage> {
    bitmap: DirtyBitmap<S>,
    /// What was not asked about yet.
    rest: GuestRange,
    told: std::vec::IntoIter<DirtyExtent>,
    /// A dirty range that may go on.
    open: Option<GuestRange>,
}

impl<S: Storage> std::fmt::Debug for DirtyRanges<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DirtyRanges")
            .field("bitmap", &self.bitmap)
            .field("rest", &self.rest)
            .finish_non_exhaustive()
    }
}

impl<S: Storage> DirtyRanges<S> {
    /// Returns the next dirty range, or nothing at the end.
    ///
    /// # Errors
    /// As [`DirtyBitmap::extents`].
    pub async fn next(&mut self) -> Result<Option<GuestRange>> {
        loop {
            if let Some(extent) = self.told.next() {
                if let Some(done) = self.take(extent) {
                    return Ok(Some(done));
                }
                continue;
            }
            if self.rest.is_empty() {
                return Ok(self.open.take());
            }
            let told = self.bitmap.extents(self.rest, EXTENTS_AT_ONCE).await?;
            let end = told.last().map_or_else(|| self.rest.end(), |last| last.range.end());
            self.rest = GuestRange::new(end, self.rest.end() - end);
            self.told = told.into_iter();
        }
    }

    /// Takes note of an extent; returns a range that is over with it.
    const fn take(&mut self, extent: DirtyExtent) -> Option<GuestRange> {
        match (extent.is_dirty, &mut self.open) {
            (false, _) => self.open.take(),
            (true, Some(open)) => {
                open.len += extent.range.len;
                None
            }
            (true, None) => {
                self.open = Some(extent.range);
                None
            }
        }
    }
}
