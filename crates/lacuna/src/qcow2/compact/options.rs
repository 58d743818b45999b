//! What a compaction is told, and what it tells.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::block::BoxFuture;

/// Memory that is used for what is being moved, unless said otherwise.
const MEMORY_BYTES: u64 = 256 << 20;

/// Whether to go on.
///
/// ```
/// assert_ne!(lacuna::qcow2::CompactStep::GoOn, lacuna::qcow2::CompactStep::Stop);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CompactStep {
    /// The next batch may follow.
    GoOn,
    /// No more is moved; the file is cut as far as it has become free.
    Stop,
}

/// Someone who is told the bytes written by each batch, and may take time to answer.
///
/// ```
/// use lacuna::qcow2::{CompactPace, CompactStep};
/// let pace = CompactPace::new(|_bytes| Box::pin(async { CompactStep::GoOn }));
/// assert!(format!("{pace:?}").starts_with("CompactPace"));
/// ```
#[derive(Clone)]
pub struct CompactPace(Arc<dyn Fn(u64) -> BoxFuture<'static, CompactStep> + Send + Sync>);

impl CompactPace {
    /// Makes a pace of what is called after each batch with the bytes that it wrote.
    #[must_use]
    pub fn new(
        after: impl Fn(u64) -> BoxFuture<'static, CompactStep> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(after))
    }
}

impl fmt::Debug for CompactPace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompactPace").finish_non_exhaustive()
    }
}

/// What becomes of the claim that clusters have kept their places.
///
/// ```
/// assert_eq!(lacuna::qcow2::KeptMapping::default(), lacuna::qcow2::KeptMapping::Refuse);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum KeptMapping {
    /// An image that is to keep places is not compacted.
    #[default]
    Refuse,
    /// It is; the claim goes first, durably. The wish stays.
    Move,
}

/// Where data goes.
///
/// ```
/// assert_eq!(lacuna::qcow2::CompactOrder::default(), lacuna::qcow2::CompactOrder::Any);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CompactOrder {
    /// Whatever lies in the tail of the file goes into holes; all else stays.
    #[default]
    Any,
    /// Data lies as the guest has it, behind the tables, so that reading the disk in order reads the
    /// file in order. A cluster that several guest clusters share has the place of the first; what
    /// only snapshots and bitmaps have comes behind; compressed streams lie as for `Any`. An image that
    /// has no more extents than it must is left alone.
    Guest,
}

/// How an image is compacted.
///
/// ```
/// use lacuna::qcow2::CompactOptions;
/// assert_eq!(CompactOptions::default().memory_bytes, 256 << 20);
/// ```
#[derive(Clone, Debug)]
pub struct CompactOptions {
    /// Memory for what is being moved, in bytes: about 100 for each cluster and 16 for each pointer
    /// to it. With less, the tables are walked more often. The counts of the whole file (2 to 4
    /// bytes for each of its clusters) are not part of it.
    pub memory_bytes: u64,
    /// Where data goes.
    pub order: CompactOrder,
    /// Whether images are compacted that are to keep the places of clusters.
    pub kept_mapping: KeptMapping,
    /// Bytes that are copied before they become durable and their old places are given back: what
    /// the file takes in excess at any time. Nothing: 0.9 % of the file, but at least 64 MiB.
    pub batch_bytes: Option<u64>,
    /// Who is asked after each batch.
    pub pace: Option<CompactPace>,
    /// Set by whoever wants an end; looked at after each batch.
    pub stop: Option<Arc<AtomicBool>>,
}

impl Default for CompactOptions {
    fn default() -> Self {
        Self {
            memory_bytes: MEMORY_BYTES,
            order: CompactOrder::default(),
            kept_mapping: KeptMapping::default(),
            batch_bytes: None,
            pace: None,
            stop: None,
        }
    }
}

impl CompactOptions {
    /// Asks whether to go on after a batch that wrote `bytes`.
    pub(super) async fn after_batch(&self, bytes: u64) -> CompactStep {
        let answer = match &self.pace {
            Some(pace) => (pace.0)(bytes).await,
            None => CompactStep::GoOn,
        };
        match self.is_stopped() {
            true => CompactStep::Stop,
            false => answer,
        }
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stop.as_ref().is_some_and(|stop| stop.load(Ordering::Relaxed))
    }
}

/// The parts of a compaction, in order.
///
/// ```
/// assert_ne!(lacuna::qcow2::CompactPhase::Survey, lacuna::qcow2::CompactPhase::Move);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CompactPhase {
    /// The image is checked; the unit is an L2 table or a refcount block.
    Survey,
    /// Clusters move; the unit is a byte.
    Move,
}

/// How far a compaction is.
///
/// ```
/// use lacuna::qcow2::{CompactPhase, CompactProgress};
/// let progress = CompactProgress { phase: CompactPhase::Move, done: 1, total: 2 };
/// assert!(progress.done < progress.total);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CompactProgress {
    /// The part.
    pub phase: CompactPhase,
    /// How much of it is done, in units of the phase.
    pub done: u64,
    /// How much there is, as far as is known.
    pub total: u64,
}

/// Clusters by what they hold.
///
/// ```
/// assert_eq!(lacuna::qcow2::CompactClusters::default().data, 0);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CompactClusters {
    /// Guest data, VM state, data of bitmaps.
    pub data: u64,
    /// Compressed streams, not clusters of them.
    pub streams: u64,
    /// L2 tables.
    pub l2_tables: u64,
    /// Bitmap tables and directory, L1 tables, snapshot table.
    pub tables: u64,
    /// Refcount blocks and table.
    pub refcounts: u64,
}

/// In how many runs of neighbouring clusters the data of the active disk lies: in one, guest clusters
/// and host clusters both follow each other. Compressed clusters are not counted.
///
/// ```
/// assert_eq!(lacuna::qcow2::CompactExtents::default().before, 0);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CompactExtents {
    /// Runs before.
    pub before: u64,
    /// Runs afterwards. An estimate counts at least one for each guest cluster that shows what an
    /// earlier one shows: it may be fewer.
    pub after: u64,
}

/// What a compaction did.
///
/// ```
/// assert_eq!(lacuna::qcow2::CompactReport::default().moved_bytes, 0);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CompactReport {
    /// Length of the file before, in bytes.
    pub before_bytes: u64,
    /// Length of the file afterwards, in bytes.
    pub after_bytes: u64,
    /// Bytes copied from one place to another.
    pub moved_bytes: u64,
    /// Bytes written beside those: pointers, refcounts.
    pub metadata_bytes: u64,
    /// The most that copies took at a time before the space of their sources was given back.
    pub peak_extra_bytes: u64,
    /// What moved.
    pub moved: CompactClusters,
    /// Runs of data, where it was to be put in order.
    pub extents: Option<CompactExtents>,
    /// Whether somebody asked to stop before the end.
    pub is_stopped: bool,
}

/// What a compaction would do.
///
/// ```
/// assert_eq!(lacuna::qcow2::CompactEstimate::default().goal_bytes, 0);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CompactEstimate {
    /// Length of the file now, in bytes.
    pub before_bytes: u64,
    /// Length that the clusters in use need. Tables of several clusters and compressed streams may
    /// come to need a little more, or less.
    pub goal_bytes: u64,
    /// Bytes to be moved: those beyond the goal, or, where data is to be in order, those that lie
    /// elsewhere than they should. Some of these move twice, to make way.
    pub moved_bytes: u64,
    /// Runs of data, where it is to be put in order.
    pub extents: Option<CompactExtents>,
}
