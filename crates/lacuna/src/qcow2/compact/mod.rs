//! Compaction in place: clusters move from the tail of a file into holes until it is as short as what is
//! in use allows, and then it is cut.
//!
//! The story: a check surveys the image; `plan` says, purely, how long the file needs to be and where
//! there is room; `rounds` goes through the kinds of clusters, data first and refcounts last, as
//! `collect` finds them with all their pointers; `moves` carries them in an order that a crash cannot
//! hurt, with `anchors` for what is pinned; `blocks` ends it. On request `guest_order` puts data in order before. See `docs/design/compaction.md`.
//!
//! * Always: the image is closed to everybody else.
//! * Always: the refcount of what moves goes with it, so that no copied flag changes.
//! * Never: something is moved to which not every pointer was found.

mod anchors;
mod bits;
mod blocks;
mod collect;
mod counts;
mod guest_order;
mod moves;
mod options;
mod plan;
mod refuse;
mod rounds;
mod shuffle;
mod streams;
mod structures;
mod walk;

use self::anchors::Anchors;
use self::counts::Counts;
use self::plan::Plan;
pub(super) use self::plan::goal;
pub(super) use self::refuse::refuse_header;
use self::refuse::{Leaks, refuse_findings};
use self::structures::Structures;
use super::check::{Progress, Survey};
use super::format::{AutoclearFeatures, Geometry, IncompatibleFeatures};
use super::image::Image;
use crate::storage::Storage;
use crate::{Error, Result};

pub use options::{
    CompactClusters, CompactEstimate, CompactExtents, CompactOptions, CompactOrder, CompactPace,
    CompactPhase, CompactProgress, CompactReport, CompactStep, KeptMapping,
};

/// Bytes that move at a time, at least.
const BATCH_BYTES: u64 = 64 << 20;

/// Someone who hears how far a compaction is.
type Listener<'a> = &'a mut (dyn FnMut(CompactProgress) + Send);

/// A compaction under way.
struct Compaction<'a, S> {
    storage: &'a S,
    geometry: Geometry,
    options: &'a CompactOptions,
    listener: Listener<'a>,
    /// Clusters of the file as it was.
    clusters: u64,
    counts: Counts,
    structures: Structures,
    plan: Plan,
    anchors: Anchors,
    /// Whether the dirty bit is set until the end.
    is_covered: bool,
    batch_bytes: u64,
    /// Bytes that were found to lie beyond the goal.
    total_bytes: u64,
    /// Where tables of one cluster are to gather.
    front: bits::Bits,
    /// Whether data stays in the tail until it is put in order.
    leaves_data: bool,
    /// Whether this pass has moved something.
    moved_any: bool,
    report: CompactReport,
}

impl<S: Storage> Image<S> {
    /// Closes the image and moves its clusters towards the front of the file until it is as short as
    /// they allow. Pins that hold a cluster for nobody go first. Durable when it returns; a guest, snapshots and bitmaps read the same.
    ///
    /// A crash leaves leaks at worst; in version 3 with snapshots also the dirty bit, so that the next
    /// opener repairs it. Whoever stops it early, by the options, gets a clean image that is as short as
    /// what was moved so far allows; running again goes on.
    ///
    /// # Errors
    /// `Unsupported` for an external data file, encryption and header fields that are not known;
    /// `InvalidRequest` for an image that is to keep places; `Corrupt` for one in which a check finds
    /// anything, leaks included; all before anything moves. Else what reading, writing and closing
    /// give: the image is as after a crash then.
    ///
    /// ```
    /// use lacuna::block::{DiscardMode, Layer, WriteFlags};
    /// use lacuna::buffer::Buffer;
    /// use lacuna::qcow2::{Access, CompactOptions, CreateOptions, Image, OpenOptions, Parts, create};
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
    ///     let report = image.compact(&CompactOptions::default(), &mut |_| ()).await?;
    ///     assert!(report.after_bytes + (2 << 20) < report.before_bytes);
    ///     assert_eq!(storage.len().await?, report.after_bytes);
    ///     Ok::<_, lacuna::Error>(())
    /// }).unwrap();
    /// ```
    pub async fn compact(
        self,
        options: &CompactOptions,
        progress: &mut (dyn FnMut(CompactProgress) + Send),
    ) -> Result<CompactReport> {
        self.check_writable()?;
        refuse_header(&self.header(), options)?;
        self.clone().close().await?;
        let storage = self.storage();
        let survey = survey(storage, options, Leaks::Refused, progress).await?;
        let claim = AutoclearFeatures::MAPPING_KEPT;
        if survey.header.features.autoclear.contains(claim) {
            let off = |header: &mut super::format::Header| {
                header.features.autoclear -= claim;
                Ok(())
            };
            super::header_change::change_header(storage, off).await?;
        }
        let mut compaction = Compaction::new(storage, survey, options, progress).await?;
        compaction.drop_unused_pins().await?;
        compaction.prepare();
        compaction.run().await?;
        if options.order == CompactOrder::Guest && !compaction.report.is_stopped {
            compaction.run_in_order().await?;
        }
        compaction.finish().await?;
        Ok(compaction.report)
    }
}

/// Says what compacting the image would do. Nothing is written; nobody may write meanwhile. Leaks count
/// as free, as they would be repaired before.
///
/// # Errors
/// As [`Image::compact`] has them before anything moves, but for leaks; what reading gives.
///
/// ```
/// use lacuna::qcow2::{CompactOptions, CreateOptions, compact_estimate, create};
/// use lacuna::storage::MemoryStorage;
///
/// pollster::block_on(async {
///     let storage = MemoryStorage::new();
///     create(&storage, &CreateOptions { size_bytes: 1 << 30, ..Default::default() }).await?;
///     let estimate = compact_estimate(&storage, &CompactOptions::default()).await?;
///     assert_eq!(estimate.moved_bytes, 0);
///     Ok::<_, lacuna::Error>(())
/// }).unwrap();
/// ```
pub async fn compact_estimate<S: Storage>(
    storage: &S,
    options: &CompactOptions,
) -> Result<CompactEstimate> {
    refuse_header(&super::read_header(storage).await?, options)?;
    let mut nobody = |_| ();
    let survey = survey(storage, options, Leaks::Ignored, &mut nobody).await?;
    let mut compaction = Compaction::new(storage, survey, options, &mut nobody).await?;
    compaction.forget_unused_pins().await?;
    compaction.prepare();
    let mut estimate = CompactEstimate {
        before_bytes: compaction.report.before_bytes,
        goal_bytes: (compaction.plan.goal << compaction.geometry.cluster_bits())
            .min(compaction.report.before_bytes),
        moved_bytes: compaction.total_bytes,
        extents: None,
    };
    if options.order == CompactOrder::Guest {
        compaction.estimate_order(&mut estimate).await?;
    }
    Ok(estimate)
}

/// Checks the image; only a sound one goes on.
async fn survey<S: Storage>(
    storage: &S,
    options: &CompactOptions,
    leaks: Leaks,
    listener: Listener<'_>,
) -> Result<Survey> {
    let mut heard = |progress: Progress| {
        let phase = CompactPhase::Survey;
        listener(CompactProgress { phase, done: progress.done, total: progress.total });
    };
    let survey = Survey::make(storage, &mut heard).await?;
    refuse_header(&survey.header, options)?;
    let bits = IncompatibleFeatures::DIRTY | IncompatibleFeatures::CORRUPT;
    if survey.header.features.incompatible.intersects(bits) {
        return Err(Error::corrupt("The image is marked dirty or corrupt; repair it first"));
    }
    refuse_findings(&survey, leaks)?;
    Ok(survey)
}

impl<'a, S: Storage> Compaction<'a, S> {
    async fn new(
        storage: &'a S,
        survey: Survey,
        options: &'a CompactOptions,
        listener: Listener<'a>,
    ) -> Result<Self> {
        let (geometry, file_bytes) = (survey.geometry, survey.file_bytes);
        // With what its tables take for a while that is within 1 % of the file.
        let least = (file_bytes / 110).max(BATCH_BYTES);
        Ok(Self {
            storage,
            geometry,
            options,
            listener,
            clusters: survey.clusters,
            counts: Counts::new(geometry, survey.references, survey.refcounts),
            structures: Structures::read(storage).await?,
            plan: Plan { goal: 0, holes: bits::Bits::default(), windows: Vec::new() },
            anchors: Anchors::default(),
            is_covered: false,
            batch_bytes: options.batch_bytes.unwrap_or(least),
            total_bytes: 0,
            front: bits::Bits::default(),
            leaves_data: options.order == CompactOrder::Guest,
            moved_any: false,
            report: CompactReport {
                before_bytes: file_bytes,
                after_bytes: file_bytes,
                ..CompactReport::default()
            },
        })
    }

    /// Says what is to be done.
    fn prepare(&mut self) {
        self.plan = self.make_plan();
        self.total_bytes = self.beyond_goal() << self.geometry.cluster_bits();
    }

    /// Puts data in order, and moves what that left in the tail.
    async fn run_in_order(&mut self) -> Result<()> {
        self.put_in_order().await?;
        self.leaves_data = false;
        if !self.report.is_stopped {
            self.run().await?;
        }
        self.count_extents_after().await
    }

    /// Returns how many clusters in use lie beyond the goal, or where a table is to come.
    fn beyond_goal(&self) -> u64 {
        let is_beyond = |it: &u64| *it >= self.plan.goal || self.plan.in_window(*it);
        self.counts.used().filter(is_beyond).count() as u64
    }

    fn tell_moved(&mut self) {
        let (phase, done) = (CompactPhase::Move, self.report.moved_bytes);
        (self.listener)(CompactProgress { phase, done, total: self.total_bytes.max(done) });
    }
}
