//! Finding clusters that hold the same bytes.
//!
//! * [`fingerprint`] names content by 64 bits; equal fingerprints are a reason to compare, never to
//!   share.
//! * [`walk`] reads what a disk's own map calls data, in large pieces, in guest order.
//! * [`sample`] remembers fingerprints in bounded memory, and [`estimate`] counts with it: nothing is
//!   written.
//! * [`candidates`] collects which clusters have equal fingerprints, and [`share`] has the image share
//!   those whose bytes are equal as well; [`hosts`] does so for what snapshots have, and for what is shared
//!   already.
//! * [`across`] moves what disks hold at the same places to one that they stand on.
//! * [`writes`] does so as a disk is written, with an [`index`] of what was written before.

mod across;
mod candidates;
mod estimate;
mod fingerprint;
mod hosts;
mod index;
mod sample;
mod share;
#[cfg(test)]
mod tests;
mod walk;
mod writes;

pub use across::{gather_common, write_difference};
pub use estimate::{
    ClusterCounts, DuplicateOptions, DuplicateSource, Duplicates, SizeDuplicates, SourceFacts,
    estimate_duplicates,
};
pub use share::{Dedup, DedupOptions, DedupPhase, DedupProgress, Deduped, Sharing, dedup};
pub use writes::{AtFlush, DedupWrites, DedupWritesOptions, Keepers};
