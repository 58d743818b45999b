//! Block status in the engine's words.

use lacuna::storage::{HostExtent, HostStatus};
use lacuna_nbd::wire::AllocationFlags;

use crate::request::StatusRun;

/// Turns runs that start `lead` bytes before what was asked about into extents of `len` bytes at
/// most.
pub(crate) fn extents(runs: &[StatusRun], lead: u64, len: u64) -> Vec<HostExtent> {
    let (mut skip, mut left) = (lead, len);
    let mut extents = Vec::with_capacity(runs.len());
    for run in runs {
        let skipped = run.len.min(skip);
        skip -= skipped;
        let len = (run.len - skipped).min(left);
        left -= len;
        if len > 0 {
            extents.push(HostExtent { len, status: status(run.flags) });
        }
    }
    extents
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
    fn hole_and_zero_are_told_apart_and_cut_to_what_was_asked() {
        let run = |len, bits| StatusRun { len, flags: AllocationFlags::from_bits_retain(bits) };
        let runs = [run(10, 0), run(10, 1), run(10, 2), run(10, 3)];
        let found = extents(&runs, 5, 27);
        let found: Vec<_> = found.iter().map(|extent| (extent.len, extent.status)).collect();
        use HostStatus::{Data, Hole, Unwritten, Vacant};
        assert_eq!(found, [(5, Data), (10, Vacant), (10, Unwritten), (2, Hole)]);
        assert_eq!(extents(&runs, 10, 10)[0].status, Vacant);
        assert!(extents(&runs[..1], 10, 10).is_empty());
    }
}
