//! Block status in the engine's words.

use lacuna::storage::{HostExtent, HostStatus};
use lacuna_nbd::wire::AllocationFlags;

use crate::request::StatusRun;

/// The context in which numbers count files, not bits.
const ALLOCATION_DEPTH: &str = "qemu:allocation-depth";

/// Tells what a status means for a reader of block status.
///
/// As QEMU has it, the lowest bit of any context stands where `base:allocation` says "hole": what
/// is dirty in a bitmap looks as if no space were reserved. What such a context does not know is
/// whether something reads as zeros, so that is never said.
fn meaning(context: Option<&str>, status: u64) -> AllocationFlags {
    let hole = match context {
        None => return AllocationFlags::from_bits_truncate(status as u32),
        Some(ALLOCATION_DEPTH) => status == 1,
        Some(_) => status & 1 != 0,
    };
    if hole { AllocationFlags::HOLE } else { AllocationFlags::empty() }
}

/// A run of one status in the words of a meta context.
///
/// ```
/// let dirty = lacuna_remote::ContextRun { len: 65536, status: 1 };
/// assert_eq!(dirty.status & 1, 1);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContextRun {
    /// How many bytes.
    pub len: u64,
    /// What the server says of them: 32 bits, or 64 where the context has so many.
    pub status: u64,
}

/// Cuts runs that start `lead` bytes before what was asked about to `len` bytes at most.
pub(crate) fn cut(runs: &[StatusRun], lead: u64, len: u64) -> Vec<ContextRun> {
    let (mut skip, mut left) = (lead, len);
    let mut found = Vec::with_capacity(runs.len());
    for run in runs {
        let skipped = run.len.min(skip);
        skip -= skipped;
        let len = (run.len - skipped).min(left);
        left -= len;
        if len > 0 {
            found.push(ContextRun { len, status: run.status });
        }
    }
    found
}

/// Turns runs of a context into extents.
pub(crate) fn extents(runs: &[ContextRun], context: Option<&str>) -> Vec<HostExtent> {
    let extent = |run: &ContextRun| HostExtent {
        len: run.len,
        status: status(meaning(context, run.status)),
    };
    runs.iter().map(extent).collect()
}

/// The two facts are independent.
const fn status(flags: AllocationFlags) -> HostStatus {
    let is_hole = flags.contains(AllocationFlags::HOLE);
    match (is_hole, flags.contains(AllocationFlags::ZERO)) {
        (false, false) => HostStatus::Data,
        (false, true) => HostStatus::Unwritten,
        (true, false) => HostStatus::Vacant,
        (true, true) => HostStatus::Hole,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_other_context_says_that_something_reads_as_zeros() {
        let (hole, none) = (AllocationFlags::HOLE, AllocationFlags::empty());
        for (context, status, means) in [
            (None, 3, AllocationFlags::HOLE | AllocationFlags::ZERO),
            (None, 2, AllocationFlags::ZERO),
            (Some("qemu:dirty-bitmap:b"), 0, none),
            (Some("qemu:dirty-bitmap:b"), 1, hole),
            (Some("qemu:dirty-bitmap:b"), 3, hole),
            (Some(ALLOCATION_DEPTH), 0, none),
            (Some(ALLOCATION_DEPTH), 1, hole),
            (Some(ALLOCATION_DEPTH), 2, none),
            (Some(ALLOCATION_DEPTH), 3, none),
        ] {
            assert_eq!(meaning(context, status), means, "{context:?} {status}");
        }
    }

    #[test]
    fn hole_and_zero_are_told_apart_and_cut_to_what_was_asked() {
        let run = |len, status| StatusRun { len, status };
        let runs = [run(10, 0), run(10, 1), run(10, 2), run(10, 3)];
        let found = extents(&cut(&runs, 5, 27), None);
        let found: Vec<_> = found.iter().map(|extent| (extent.len, extent.status)).collect();
        use HostStatus::{Data, Hole, Unwritten, Vacant};
        assert_eq!(found, [(5, Data), (10, Vacant), (10, Unwritten), (2, Hole)]);
        assert_eq!(extents(&cut(&runs, 10, 10), None)[0].status, Vacant);
        assert!(cut(&runs[..1], 10, 10).is_empty());
    }
}
