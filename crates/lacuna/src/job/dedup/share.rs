//! Has clusters of an image that hold the same bytes share one place.
//!
//! * In steps of about [`DedupOptions::slice_bytes`], so that whoever runs it can wait between them:
//!   for a bandwidth, for a guest that has work, or for good.
//! * The image may be in use. Fingerprints may be stale then: the image compares bytes before anything
//!   is shared, while nobody can write to them.
//! * Memory: [`DedupOptions::memory_bytes`], what [`walk`](super::walk) takes, and a batch of groups.

use std::pin::pin;

use futures_util::TryStreamExt;

use super::candidates::{Candidates, Groups, Passes};
use super::fingerprint::Fingerprinter;
use super::hosts::OfHosts;
use super::walk::{Window, window_bytes, windows};
use crate::block::{Layer, is_zero, no_status, step_aside};
use crate::qcow2::{Image, Worth};
use crate::storage::Storage;
use crate::units::{GuestCluster, GuestOffset, GuestRange};
use crate::{Error, Result};

/// Less memory than this makes no sense.
const LEAST_MEMORY_BYTES: u64 = 1 << 20;

/// A step shares among so many clusters at least: each waits for storage several times.
pub(super) const FEWEST_MEMBERS: u64 = 8;

/// When equal clusters share a place: pins that hold on to it take tables of whole clusters.
///
/// ```
/// assert_eq!(lacuna::job::Sharing::default(), lacuna::job::Sharing::Always);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Sharing {
    /// Always.
    #[default]
    Always,
    /// Where that saves more than pins take: with clusters of 2 MiB, four of them.
    WhereItPays,
}

/// How to deduplicate.
///
/// ```
/// assert_eq!(lacuna::job::DedupOptions::default().memory_bytes, 256 << 20);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct DedupOptions {
    /// Bytes for fingerprints, at least 1 MiB: ten for each cluster with data. Where those of all do
    /// not fit, the image is read in several passes.
    pub memory_bytes: u64,
    /// About how many bytes are read, or compared, in one step. Sharing makes each step durable, so
    /// that small ones cost more.
    pub slice_bytes: u64,
    /// When clusters share; weighed once a pass.
    pub sharing: Sharing,
    /// Of fingerprints, for runs that are to be the same again. `None` draws one, so that no guest can
    /// prepare content for it.
    pub seed: Option<u64>,
}

impl Default for DedupOptions {
    fn default() -> Self {
        Self {
            memory_bytes: 256 << 20,
            slice_bytes: 64 << 20,
            sharing: Sharing::default(),
            seed: None,
        }
    }
}

/// What was done so far.
///
/// ```
/// assert_eq!(lacuna::job::Deduped::default().freed_bytes, 0);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Deduped {
    /// Whole clusters with data that were looked at.
    pub clusters: u64,
    /// Of these, how many hold nothing but zeros: they share nothing, a sweep gives them back.
    pub zero_clusters: u64,
    /// Guest clusters that share a place now and did not before.
    pub shared: u64,
    /// Clusters that were made to be shared.
    pub keepers: u64,
    /// Clusters that only snapshots had, or that were shared already, and that were given up for another
    /// one with the same bytes.
    pub united: u64,
    /// Clusters that looked equal, and were not: other bytes with the same fingerprint, or written
    /// to meanwhile.
    pub differed: u64,
    /// Bytes of the image file that nothing uses any more, less those of the clusters made.
    pub freed_bytes: u64,
    /// Bytes that went with pins of clusters that nobody shared any more; part of `freed_bytes`.
    pub unpinned_bytes: u64,
    /// What was not shared, as it would not have paid; of the last pass that was so.
    pub declined: Worth,
}

/// What is being done.
///
/// ```
/// assert_ne!(lacuna::job::DedupPhase::Find, lacuna::job::DedupPhase::Share);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DedupPhase {
    /// Reading data and noting fingerprints.
    Find,
    /// Comparing and sharing.
    Share,
}

/// How far it is.
///
/// See [`Dedup`] for an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DedupProgress {
    /// What is being done.
    pub phase: DedupPhase,
    /// The pass, from 0, and how many there are.
    pub pass: (u64, u64),
    /// Guest bytes of the phase that lie behind.
    pub done_bytes: u64,
    /// Guest bytes of the phase: the disk, or the clusters that look equal.
    pub total_bytes: u64,
    /// Guest bytes that the last step read.
    pub read_bytes: u64,
    /// What was done so far.
    pub so_far: Deduped,
}

/// A deduplication that goes step by step.
///
/// Dropped between steps or within one, it leaves a valid image that shares what was shared so far;
/// another run goes on from there.
///
/// ```
/// use lacuna::block::{Layer, WriteFlags};
/// use lacuna::buffer::Buffer;
/// use lacuna::job::{Dedup, DedupOptions};
/// use lacuna::qcow2::{Access, CreateOptions, Image, OpenOptions, Parts, create};
/// use lacuna::storage::MemoryStorage;
/// use lacuna::units::GuestOffset;
///
/// pollster::block_on(async {
///     let storage = MemoryStorage::new();
///     create(&storage, &CreateOptions { size_bytes: 1 << 20, ..Default::default() }).await?;
///     let image = Image::open(Parts::alone(storage), OpenOptions::new(Access::ReadWrite)).await?;
///     let same = Buffer::from(&[7; 4 << 16][..]);
///     image.write(GuestOffset(0), same, WriteFlags::empty()).await.0?;
///     let mut dedup = Dedup::new(&image, DedupOptions::default())?;
///     while let Some(progress) = dedup.step().await? {
///         assert!(progress.done_bytes <= progress.total_bytes);
///     }
///     assert_eq!((dedup.so_far().shared, dedup.so_far().freed_bytes), (4, 3 << 16));
///     image.close().await
/// }).unwrap();
/// ```
pub struct Dedup<S: Storage> {
    image: Image<S>,
    options: DedupOptions,
    fingerprinter: Fingerprinter,
    state: State<S>,
    done: Deduped,
    pass: (u64, u64),
}

enum State<S: Storage> {
    Begin,
    Find { passes: Passes, at: GuestOffset, candidates: Candidates },
    Share { passes: Passes, groups: Groups },
    Hosts(Box<OfHosts<S>>),
    Over,
}

impl<S: Storage> Dedup<S> {
    /// Prepares to deduplicate an image. Nothing is read or written yet.
    ///
    /// # Errors
    /// What [`Image::why_not_share`] says; `InvalidRequest` for too little memory.
    pub fn new(image: &Image<S>, options: DedupOptions) -> Result<Self> {
        if let Some(reason) = image.why_not_share() {
            return Err(reason);
        }
        if options.memory_bytes < LEAST_MEMORY_BYTES {
            return Err(Error::invalid("Deduplication takes at least 1 MiB of memory"));
        }
        Ok(Self {
            image: image.clone(),
            options,
            fingerprinter: Fingerprinter::new(options.seed),
            state: State::Begin,
            done: Deduped::default(),
            pass: (0, 1),
        })
    }

    /// Returns what was done so far.
    #[must_use]
    pub const fn so_far(&self) -> Deduped {
        self.done
    }

    /// Does one step; nothing where all is done. What a step shared is durable on return.
    ///
    /// # Errors
    /// What reading, [`Image::share`] and [`Image::drop_unused_pins`] give. The image is valid then.
    pub async fn step(&mut self) -> Result<Option<DedupProgress>> {
        let progress = match std::mem::replace(&mut self.state, State::Over) {
            State::Begin => self.begin().await?,
            State::Find { passes, at, candidates } => self.find(passes, at, candidates).await?,
            State::Share { passes, groups } => self.share(passes, groups).await?,
            State::Hosts(work) => return self.hosts(work).await,
            State::Over => return Ok(None),
        };
        Ok(Some(progress))
    }

    /// Frees what earlier runs shared and nobody shares any more, and plans the passes.
    async fn begin(&mut self) -> Result<DedupProgress> {
        let unpinned = self.image.drop_unused_pins().await?;
        self.done.unpinned_bytes = unpinned * self.cluster_bytes();
        self.done.freed_bytes += self.done.unpinned_bytes;
        let geometry = self.image.geometry();
        let all = geometry.clusters_for(self.image.size_bytes());
        let data = self.count_data().await?;
        let passes = Passes::new(all, data, self.options.memory_bytes);
        self.pass = (0, passes.count());
        self.begin_pass(passes);
        Ok(self.progress(DedupPhase::Find, (0, self.image.size_bytes()), 0))
    }

    fn begin_pass(&mut self, passes: Passes) {
        let candidates = passes.begin(self.pass.0);
        self.state = State::Find { passes, at: GuestOffset(0), candidates };
    }

    async fn count_data(&self) -> Result<u64> {
        let (mut at, mut data_bytes) = (GuestOffset(0), 0);
        while at.0 < self.image.size_bytes() {
            let rest = GuestRange::new(at, self.image.size_bytes() - at.0);
            let extents = self.image.extents(rest).await?;
            at = extents.last().ok_or_else(|| no_status(rest))?.range.end();
            let data = extents.iter().filter(|extent| extent.is_own_data());
            data_bytes += data.map(|extent| extent.range.len).sum::<u64>();
        }
        Ok(data_bytes.div_ceil(self.cluster_bytes()))
    }

    async fn find(
        &mut self,
        passes: Passes,
        at: GuestOffset,
        mut candidates: Candidates,
    ) -> Result<DedupProgress> {
        let image = self.image.clone();
        let total = image.size_bytes();
        let step = window_bytes(self.cluster_bytes());
        let len = self.options.slice_bytes.next_multiple_of(step).max(step);
        let slice = GuestRange::new(at, len.min(total.saturating_sub(at.0)));
        let mut read_bytes = 0;
        {
            let mut windows = pin!(windows(&image, slice, self.cluster_bytes()));
            while let Some(window) = windows.try_next().await? {
                read_bytes += self.note(&window, &mut candidates);
            }
        }
        self.state = match slice.end().0 >= total {
            true => self.weigh(passes, candidates.into_groups()).await?,
            false => State::Find { passes, at: slice.end(), candidates },
        };
        Ok(self.progress(DedupPhase::Find, (slice.end().0, total), read_bytes))
    }

    /// Notes the whole clusters of a window; returns how many bytes were looked at.
    fn note(&mut self, window: &Window, candidates: &mut Candidates) -> u64 {
        let size = self.cluster_bytes();
        let is_first = self.pass.0 == 0;
        let mut read_bytes = 0;
        for part in &window.parts {
            read_bytes += part.range.len;
            for cluster in part.range.start.0.div_ceil(size)..part.range.end().0 / size {
                let start = (cluster * size - window.range.start.0) as usize;
                let content = &window.bytes[start..start + size as usize];
                let is_zero = is_zero(content);
                self.done.clusters += u64::from(is_first);
                self.done.zero_clusters += u64::from(is_first && is_zero);
                if !is_zero {
                    let found = self.fingerprinter.of(content);
                    // Plain ones never share with compressed ones: groups of one kind are wanted.
                    let found = if part.status.is_compressed { found.other() } else { found };
                    candidates.note(found, cluster);
                }
            }
        }
        read_bytes
    }

    /// Says what comes after a pass has found groups.
    async fn weigh(&mut self, passes: Passes, groups: Groups) -> Result<State<S>> {
        if self.options.sharing == Sharing::Always || groups.members().0 == 0 {
            return Ok(State::Share { passes, groups });
        }
        let worth = self.image.weigh(groups.all().map(of_guest)).await?;
        if worth.pays() || worth.saved_bytes == 0 {
            return Ok(State::Share { passes, groups });
        }
        self.done.declined = worth;
        Ok(State::Share { passes, groups: groups.none() })
    }

    async fn share(&mut self, passes: Passes, mut groups: Groups) -> Result<DedupProgress> {
        let size = self.cluster_bytes();
        let most = (self.options.slice_bytes / size).max(FEWEST_MEMBERS);
        let before = groups.members().1;
        let batch = groups.next_batch(most as usize);
        if !batch.is_empty() {
            let batch: Vec<_> = batch.into_iter().map(of_guest).collect();
            let shared = self.image.share(&batch).await?;
            self.done.shared += shared.shared;
            self.done.keepers += shared.keepers;
            self.done.differed += shared.differed;
            self.done.freed_bytes += shared.freed_bytes;
        }
        let (total, done) = groups.members();
        let progress =
            self.progress(DedupPhase::Share, (done * size, total * size), (done - before) * size);
        if done < total {
            self.state = State::Share { passes, groups };
        } else if self.pass.0 + 1 < self.pass.1 {
            self.pass.0 += 1;
            self.begin_pass(passes);
        } else {
            let (image, fingerprinter) = (&self.image, self.fingerprinter);
            let work = OfHosts::new(image, self.options, fingerprinter);
            self.state = State::Hosts(Box::new(work));
        }
        Ok(progress)
    }

    /// Goes on with what the disk does not show alone.
    async fn hosts(&mut self, mut work: Box<OfHosts<S>>) -> Result<Option<DedupProgress>> {
        let step = work.step(&mut self.done).await?;
        if step.is_over {
            return Ok(None);
        }
        self.state = State::Hosts(work);
        let (phase, done) = match step.found {
            Some(found) => (DedupPhase::Find, found),
            None => (DedupPhase::Share, (0, 0)),
        };
        Ok(Some(self.progress(phase, done, step.read_bytes)))
    }

    fn progress(&self, phase: DedupPhase, done: (u64, u64), read_bytes: u64) -> DedupProgress {
        let (done_bytes, total_bytes) = done;
        let (pass, so_far) = (self.pass, self.done);
        DedupProgress { phase, pass, done_bytes, total_bytes, read_bytes, so_far }
    }

    fn cluster_bytes(&self) -> u64 {
        self.image.geometry().cluster_bytes()
    }
}

/// Clusters of the disk, by what a list of candidates calls them.
fn of_guest(numbers: Vec<u64>) -> Vec<GuestCluster> {
    numbers.into_iter().map(GuestCluster).collect()
}

/// Has clusters of an image that hold the same bytes share one place, from beginning to end.
///
/// Guests may read and write meanwhile; between steps others get their turn. Durable on return.
/// Compressed clusters of the disk share where their content is equal; others also with what only snapshots have,
/// and within snapshots. What backing layers have is left alone. Afterwards, whoever writes to the image must heed the COPIED
/// flag (B.4), as for internal snapshots.
///
/// # Errors
/// As [`Dedup::new`] and [`Dedup::step`].
///
/// ```
/// # use lacuna::job::{DedupOptions, dedup};
/// # use lacuna::qcow2::{Access, CreateOptions, Image, OpenOptions, Parts, create};
/// # use lacuna::storage::MemoryStorage;
/// # pollster::block_on(async {
/// # let storage = MemoryStorage::new();
/// # create(&storage, &CreateOptions { size_bytes: 1 << 20, ..Default::default() }).await?;
/// # let image = Image::open(Parts::alone(storage), OpenOptions::new(Access::ReadWrite)).await?;
/// let options = DedupOptions { slice_bytes: 1 << 20, ..DedupOptions::default() };
/// let done = dedup(&image, options, &mut |_| ()).await?;
/// assert_eq!(done.shared, 0);
/// # Ok::<_, lacuna::Error>(())
/// # })?;
/// # Ok::<_, lacuna::Error>(())
/// ```
pub async fn dedup<S: Storage>(
    image: &Image<S>,
    options: DedupOptions,
    progress: &mut (dyn FnMut(DedupProgress) + Send),
) -> Result<Deduped> {
    let mut dedup = Dedup::new(image, options)?;
    while let Some(reached) = dedup.step().await? {
        progress(reached);
        step_aside().await;
    }
    Ok(dedup.so_far())
}
