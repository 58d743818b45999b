//! Work on whole disks: copying one to another, comparing two, telling what one would take, putting
//! one onto another backing file, bringing overlays into what they stand on.
//!
//! * Always driven by extents: what metadata calls zero is neither read nor compared by bytes.
//! * Always bounded: requests in flight times request size, said by each job.
//! * A job is a future. Dropping it stops it at a safe place; what it wrote stays valid. Where copying never
//!   waits it [yields](yield_now) between pieces, so that it can be dropped.

mod bitmaps;
mod commit;
mod compare;
mod compute;
mod convert;
mod dedup;
mod measure;
mod rebase;
mod salvage;
mod sweep;
mod yielding;

pub use bitmaps::copy_bitmaps;
pub use commit::{commit, empty_top};
pub use compare::{CompareOptions, Comparison, Difference, Strictness, compare};
pub use compute::compute;
pub use convert::{
    ConvertOptions, Copied, CopyFailure, CopyStep, Encoding, KnownZeros, Mover, Phase, Progress,
    Target, TargetContent, Threads, WriteOrder, convert,
};
pub use dedup::{
    AtFlush, ClusterCounts, Dedup, DedupOptions, DedupPhase, DedupProgress, DedupWrites,
    DedupWritesOptions, Deduped, DuplicateOptions, DuplicateSource, Duplicates, Keepers, Sharing,
    SizeDuplicates, SourceFacts, dedup, estimate_duplicates, gather_common, write_difference,
};
pub use measure::{Estimate, measure, measure_bitmaps, measure_empty};
pub use rebase::{OldZeros, Onto, RebaseOptions, Rebased, rebase, uncovered_bytes};
pub use salvage::{Lost, LostPart, Salvage};
pub use sweep::{SweepProgress, SweepReport, sweep, sweep_estimate};
pub use yielding::yield_now;
