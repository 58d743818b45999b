//! Compaction of an image that is in use: what lies at the end of the file moves into holes, a little
//! at a time, and the file is cut, while guests read and write.
//!
//! The story: `count` says how long the file needs to be; `walk` goes through all tables once and finds
//! what lies behind that, and who points to it (`qcow2/pointers.rs`, `table_walk.rs`); `moves` carries clusters and tables,
//! `streams` what is compressed. Then the file is cut, as by a disk that shrinks. All changes go through
//! the tables in memory and an ordinary write-back. See `docs/design/live-compaction.md`.
//!
//! * Always: content stays what it is, so that bitmaps are not told.
//! * Never: something moves to which not every pointer was found.
//! * Always: snapshots stay as they are within a step. Where they change between two, the pass begins
//!   anew: their tables, and the disk's, are others then.
//! * Not moved: what more entries show than change under one lock, and tables of several clusters that
//!   find no run. What of it lies at the end keeps the file long; it is said.

mod bitmaps;
mod count;
mod moves;
mod options;
mod refcounts;
mod snapshots;
mod streams;
mod walk;

pub use options::{LiveCompactOptions, LiveCompactPhase, LiveCompactProgress, LiveCompacted};

use self::count::{Count, Counted};
use self::moves::{Holes, Outcome};
use self::streams::Streams;
use self::walk::{Walk, Walked};
use super::compact::{CompactOptions, refuse_header};
use super::image::Image;
use super::options::OnDiscard;
use super::sharing::Relocated;
use super::write_back::Refcounting;
use crate::buffer::Hold;
use crate::storage::Storage;
use crate::{Error, ErrorKind, Result};

/// What is written meanwhile may need another pass, and what had no room.
const PASSES: u32 = 8;
/// L1 entries that are looked at in one step.
const ENTRIES_AT_ONCE: usize = 1 << 16;

/// A compaction that goes step by step, while others use the image.
///
/// Dropped between steps or within one, it leaves a valid image, as short as it was cut so far;
/// another one goes on from there.
///
/// ```
/// use lacuna::block::{DiscardMode, Layer, WriteFlags};
/// use lacuna::buffer::Buffer;
/// use lacuna::qcow2::{Access, CreateOptions, Image, LiveCompactOptions, LiveCompaction};
/// use lacuna::qcow2::{OpenOptions, Parts, create};
/// use lacuna::storage::{MemoryStorage, Storage};
/// use lacuna::units::{GuestOffset, GuestRange};
/// use std::sync::Arc;
///
/// pollster::block_on(async {
///     let storage = Arc::new(MemoryStorage::new());
///     create(&storage, &CreateOptions { size_bytes: 1 << 30, ..Default::default() }).await?;
///     let parts = Parts::alone(Arc::clone(&storage));
///     let image = Image::open(parts, OpenOptions::new(Access::ReadWrite)).await?;
///     let bytes = Buffer::from(&vec![7; 4 << 20][..]);
///     image.write(GuestOffset(0), bytes, WriteFlags::empty()).await.0?;
///     image.discard(GuestRange::new(GuestOffset(0), 3 << 20), DiscardMode::Guest).await?;
///     let before = storage.len().await?;
///     let mut compaction = LiveCompaction::new(&image, LiveCompactOptions::default())?;
///     while let Some(progress) = compaction.step().await? {
///         assert!(progress.done_bytes <= progress.total_bytes);
///     }
///     assert_eq!(compaction.so_far().left_bytes, 0);
///     assert!(storage.len().await? + (2 << 20) < before);
///     image.close().await
/// }).unwrap();
/// ```
pub struct LiveCompaction<S: Storage> {
    image: Image<S>,
    options: LiveCompactOptions,
    state: State,
    done: LiveCompacted,
    pass: u32,
    /// What [`Meta::histories`] was when this pass began.
    history: u64,
    /// Whether the last pass moved something.
    moved_any: bool,
    /// Nothing comes after the next cut.
    is_last: bool,
    /// Bytes that this pass moved, and is to move.
    moved: u64,
    total: u64,
}

enum State {
    Begin,
    Count(Count),
    Bitmaps(Holes),
    /// The goal.
    Runs(u64),
    Walk(Box<Walk>),
    Streams(Box<Streams>),
    Tables {
        holes: Holes,
        index: usize,
    },
    Snapshots(Holes),
    Refcounts(Holes),
    /// The first cluster that is to be cut off.
    Cut(u64),
    Over,
}

impl<S: Storage> LiveCompaction<S> {
    /// Prepares to compact an image. Nothing is read or written yet.
    ///
    /// # Errors
    /// What [`Image::why_not_compact`] says.
    pub fn new(image: &Image<S>, options: LiveCompactOptions) -> Result<Self> {
        match image.why_not_compact() {
            Some(reason) => Err(reason),
            None => Ok(Self {
                image: image.clone(),
                // However short steps are to be, each gets on.
                options: LiveCompactOptions { slice_bytes: options.slice_bytes.max(1), ..options },
                state: State::Begin,
                done: LiveCompacted::default(),
                pass: 0,
                history: 0,
                moved_any: true,
                is_last: false,
                moved: 0,
                total: 0,
            }),
        }
    }

    /// Returns what was done so far.
    #[must_use]
    pub const fn so_far(&self) -> LiveCompacted {
        self.done
    }

    /// Does one step; nothing where all is done. What a step moved is durable on return.
    ///
    /// # Errors
    /// What reading, writing and flushing give; `Corrupt` where snapshots or pins are damaged. The
    /// image is valid then.
    pub async fn step(&mut self) -> Result<Option<LiveCompactProgress>> {
        let state = std::mem::replace(&mut self.state, State::Over);
        let (phase, read_bytes) = match state {
            State::Begin => (LiveCompactPhase::Count, self.begin().await?),
            State::Count(count) => return self.count(count).await.map(Some),
            State::Bitmaps(holes) => (LiveCompactPhase::Move, self.bitmaps(holes).await?),
            State::Runs(goal) => (LiveCompactPhase::Move, self.runs(goal).await?),
            State::Walk(walk) => (LiveCompactPhase::Move, self.walk(walk).await?),
            State::Streams(streams) => (LiveCompactPhase::Move, self.streams(streams).await?),
            State::Tables { holes, index } => {
                (LiveCompactPhase::Move, self.tables(holes, index).await?)
            }
            State::Snapshots(holes) => (LiveCompactPhase::Move, self.snapshots(holes).await?),
            State::Refcounts(holes) => (LiveCompactPhase::Move, self.refcounts(holes).await?),
            State::Cut(from) => (LiveCompactPhase::Cut, self.cut(from).await?),
            State::Over => return Ok(None),
        };
        let (done, total) = match phase {
            LiveCompactPhase::Move => (self.moved, self.total),
            LiveCompactPhase::Count | LiveCompactPhase::Cut => (0, 0),
        };
        Ok(Some(self.progress(phase, (done, total), read_bytes)))
    }

    /// Has all that was freed before be free.
    async fn begin(&mut self) -> Result<u64> {
        for _ in 0..2 {
            self.image.write_back(self.image.usual_refcounting()).await?;
        }
        // Whatever is written from here on goes to the lowest holes.
        self.image.0.meta.lock().refcounts.search_from_the_start();
        self.state = State::Count(Count::default());
        Ok(0)
    }

    async fn count(&mut self, mut count: Count) -> Result<LiveCompactProgress> {
        let (read_bytes, counted) = self.image.count_on(&mut count).await?;
        let cluster_bytes = self.image.geometry().cluster_bytes();
        let end = self.image.end_cluster() * cluster_bytes;
        let done = (count.at * cluster_bytes).min(end);
        match counted {
            Some(counted) => self.counted(counted).await?,
            None => self.state = State::Count(count),
        }
        Ok(self.progress(LiveCompactPhase::Count, (done, end), read_bytes))
    }

    /// Decides whether another pass has something to do.
    async fn counted(&mut self, counted: Counted) -> Result<()> {
        self.done.left_bytes = counted.beyond * self.image.geometry().cluster_bytes();
        let goes_on = counted.beyond > 0 && self.moved_any && self.pass < PASSES;
        if !goes_on {
            // Where a pass went before, its cut was the last one.
            self.is_last = self.pass == 0;
            self.state = if self.is_last { State::Cut(counted.goal) } else { State::Over };
            return Ok(());
        }
        self.pass += 1;
        (self.moved_any, self.moved, self.total) = (false, 0, self.done.left_bytes);
        self.state = State::Bitmaps(Holes::below(counted.goal));
        Ok(())
    }

    /// Moves what bitmaps have, some at a time.
    async fn bitmaps(&mut self, mut holes: Holes) -> Result<u64> {
        let clusters = self.image.move_bitmaps(&mut holes).await?;
        self.state = match clusters {
            0 => State::Runs(holes.goal),
            _ => State::Bitmaps(holes),
        };
        Ok(self.moved_durably(clusters))
    }

    /// Moves tables of several clusters, while there are runs of holes, and begins the walk.
    async fn runs(&mut self, goal: u64) -> Result<u64> {
        let clusters = self.image.move_runs(goal).await?;
        let _pins_stay = self.image.begin_pinning().await?;
        self.history = self.image.0.meta.lock().histories;
        let others = self.image.other_tables().await?;
        self.state = State::Walk(Box::new(Walk::new(goal, self.options.memory_bytes, others)));
        Ok(self.moved_durably(clusters))
    }

    /// Keeps pins and snapshots as they are while the hold lives. Nothing where snapshots have changed
    /// since the pass began: it begins anew then.
    async fn go_on(&mut self) -> Result<Option<Hold>> {
        let pins_stay = self.image.begin_pinning().await?;
        if self.image.0.meta.lock().histories == self.history {
            return Ok(Some(pins_stay));
        }
        (self.pass, self.moved_any) = (self.pass - 1, true);
        self.state = State::Count(Count::default());
        Ok(None)
    }

    async fn walk(&mut self, mut walk: Box<Walk>) -> Result<u64> {
        let Some(pins_stay) = self.go_on().await? else { return Ok(0) };
        let walked = self.image.walk_on(&mut walk, self.options.slice_bytes).await?;
        drop(pins_stay);
        self.settle(walked).await?;
        self.state = match walked.is_over {
            false => State::Walk(walk),
            true => State::Streams(Box::new(Streams::new(*walk, &self.image.geometry()))),
        };
        Ok(walked.read_bytes)
    }

    async fn streams(&mut self, mut streams: Box<Streams>) -> Result<u64> {
        let Some(pins_stay) = self.go_on().await? else { return Ok(0) };
        let walked = self.image.move_streams(&mut streams, self.options.slice_bytes).await?;
        drop(pins_stay);
        self.settle(walked).await?;
        self.state = match walked.is_over {
            false => State::Streams(streams),
            true => State::Tables { holes: Holes::below(streams.goal()), index: 0 },
        };
        Ok(walked.read_bytes)
    }

    /// Moves tables, as no entry is known any more by where its table lies.
    async fn tables(&mut self, mut holes: Holes, mut index: usize) -> Result<u64> {
        let Some(pins_stay) = self.go_on().await? else { return Ok(0) };
        if index == 0 {
            self.image.drop_unused_pins_held().await?;
        }
        let counts = || {
            let meta = self.image.0.meta.lock();
            (meta.l1.entries.len(), meta.pins.l1.entries.len())
        };
        let (active, pins) = counts();
        // The active L1 table, and the one of the pins with the snapshot table, come between and last.
        let last = active + pins + 1;
        let cluster_bytes = self.image.geometry().cluster_bytes();
        let (mut walked, stop) = (Walked::default(), index + ENTRIES_AT_ONCE);
        while index <= last && index < stop {
            walked.moved_bytes += cluster_bytes
                * match index == last {
                    true => self.snapshot_table(&holes).await?,
                    false => {
                        u64::from(self.table(index, active, &mut holes).await? == Outcome::Moved)
                    }
                };
            index += 1;
            if walked.moved_bytes >= self.options.slice_bytes {
                break;
            }
        }
        drop(pins_stay);
        self.settle(walked).await?;
        self.state = match index <= last {
            true => State::Tables { holes, index },
            false => State::Snapshots(holes),
        };
        Ok(walked.moved_bytes)
    }

    /// Moves tables of snapshots, some at a time.
    async fn snapshots(&mut self, holes: Holes) -> Result<u64> {
        let Some(pins_stay) = self.go_on().await? else { return Ok(0) };
        let clusters = self.image.move_snapshots(&holes).await?;
        // That was this pass itself.
        self.history = self.image.0.meta.lock().histories;
        let moved_bytes = clusters * self.image.geometry().cluster_bytes();
        // Until storage has it, nobody is to look for them there.
        self.settle(Walked { moved_bytes, ..Walked::default() }).await?;
        drop(pins_stay);
        self.state = match clusters {
            0 => State::Refcounts(Holes::below(holes.goal)),
            _ => State::Snapshots(holes),
        };
        Ok(moved_bytes)
    }

    /// Moves refcount blocks and the refcount table, last, as all that moves before makes more of them.
    async fn refcounts(&mut self, mut holes: Holes) -> Result<u64> {
        let slice_bytes = self.options.slice_bytes;
        let clusters = self.image.move_refcounts(&mut holes, slice_bytes).await?;
        self.state = match clusters {
            0 => State::Cut(holes.goal),
            _ => State::Refcounts(holes),
        };
        Ok(self.moved_durably(clusters))
    }

    async fn table(&self, index: usize, active: usize, holes: &mut Holes) -> Result<Outcome> {
        let image = &self.image;
        match index.checked_sub(active) {
            None => image.plan(|meta| meta.move_table(index, holes)).await,
            Some(0) => image.plan(|meta| meta.move_active_l1(holes)).await,
            Some(pins) => image.plan(|meta| meta.move_pin_table_at(pins - 1, holes)).await,
        }
    }

    /// Returns how many clusters have moved.
    async fn snapshot_table(&self, holes: &Holes) -> Result<u64> {
        match self.image.plan(|meta| meta.move_snapshot_table(holes.goal)).await? {
            Relocated::Moved(clusters) => Ok(clusters),
            Relocated::NoRoom | Relocated::Stay => Ok(0),
        }
    }

    /// Makes durable what was moved; old places are free then.
    async fn settle(&mut self, walked: Walked) -> Result<()> {
        if walked.moved_bytes == 0 {
            return Ok(());
        }
        self.count_moved(walked.moved_bytes);
        self.image.write_back(self.image.usual_refcounting()).await
    }

    /// Takes note of clusters that were moved. Returns how many bytes they have.
    fn moved_durably(&mut self, clusters: u64) -> u64 {
        let bytes = clusters * self.image.geometry().cluster_bytes();
        self.count_moved(bytes);
        bytes
    }

    fn count_moved(&mut self, bytes: u64) {
        self.moved_any |= bytes > 0;
        self.moved += bytes;
        self.done.moved_bytes += bytes;
    }

    async fn cut(&mut self, from: u64) -> Result<u64> {
        // What was freed last is free after the second one.
        for _ in 0..2 {
            self.image.write_back(Refcounting::Written).await?;
        }
        let per_block = self.image.geometry().refcount_block_entries();
        self.done.shortened_bytes += self.image.cut_file(from.div_ceil(per_block)).await?;
        self.state = match self.is_last {
            true => State::Over,
            false => State::Count(Count::default()),
        };
        Ok(0)
    }

    fn progress(
        &self,
        phase: LiveCompactPhase,
        (done, total): (u64, u64),
        step_bytes: u64,
    ) -> LiveCompactProgress {
        let (total_bytes, so_far) = (total.max(done), self.done);
        LiveCompactProgress { phase, done_bytes: done, total_bytes, step_bytes, so_far }
    }
}

impl<S: Storage> Image<S> {
    /// Says why this image cannot be compacted while it is open, if it cannot: it was opened read-only,
    /// has an external data file, keeps clusters where they are, or has header fields that are not known.
    ///
    /// ```
    /// # use lacuna::qcow2::{Access, CreateOptions, Image, OpenOptions, Parts, create};
    /// # use lacuna::storage::MemoryStorage;
    /// # pollster::block_on(async {
    /// let storage = MemoryStorage::new();
    /// create(&storage, &CreateOptions { size_bytes: 512, ..Default::default() }).await?;
    /// let image = Image::open(Parts::alone(storage), OpenOptions::new(Access::ReadOnly)).await?;
    /// assert_eq!(image.why_not_compact().unwrap().kind(), lacuna::ErrorKind::ReadOnly);
    /// # Ok::<_, lacuna::Error>(())
    /// # })?;
    /// # Ok::<_, lacuna::Error>(())
    /// ```
    #[must_use]
    pub fn why_not_compact(&self) -> Option<Error> {
        let (is_writable, keeps) = {
            let meta = self.0.meta.lock();
            (meta.writable, meta.on_discard == OnDiscard::KeepMapping)
        };
        if !is_writable {
            return Some(Error::new(ErrorKind::ReadOnly, "The image was opened read-only"));
        }
        if let Err(reason) = refuse_header(&self.header(), &CompactOptions::default()) {
            return Some(reason);
        }
        let text = "The image keeps its clusters where they are; open it with discards that free to \
                    give that up";
        keeps.then(|| Error::invalid(text))
    }
}
