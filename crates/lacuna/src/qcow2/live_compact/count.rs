//! Counting what is in use: how long the file needs to be, and how much lies behind that.

use super::super::compact::goal;
use super::super::image::Image;
use crate::Result;
use crate::storage::Storage;

/// Slices of refcounts that are looked at in one step.
const SLICES_AT_ONCE: usize = 512;

/// A count under way.
#[derive(Debug, Default)]
pub(super) struct Count {
    /// The next cluster.
    pub(super) at: u64,
    /// How many clusters were in use so far.
    used: u64,
    /// How many were in use at the start of each slice: where it starts, and that.
    marks: Vec<(u64, u64)>,
}

/// What was counted, in clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Counted {
    /// How many clusters all that is in use needs.
    pub(super) goal: u64,
    /// How many in use lie behind that, refcount blocks that will count nothing left out.
    pub(super) beyond: u64,
}

impl<S: Storage> Image<S> {
    /// Counts on for a step. Returns how many bytes of refcounts were looked at, and what was counted
    /// once all is.
    pub(super) async fn count_on(&self, count: &mut Count) -> Result<(u64, Option<Counted>)> {
        let slice_bytes = self.0.meta.lock().refcounts.blocks.slice_bytes();
        for nth in 0..SLICES_AT_ONCE {
            let end = self.end_cluster();
            if count.at >= end {
                return Ok((nth as u64 * slice_bytes, Some(self.counted(count).await?)));
            }
            let (next, used) = self.plan(|meta| meta.refcounts.count_used(count.at, end)).await?;
            count.marks.push((count.at, count.used));
            (count.at, count.used) = (next, count.used + used);
        }
        Ok((SLICES_AT_ONCE as u64 * slice_bytes, None))
    }

    /// Returns the first cluster behind all that was ever in use.
    pub(super) fn end_cluster(&self) -> u64 {
        self.0.meta.lock().refcounts.counted_end().0
    }

    async fn counted(&self, count: &Count) -> Result<Counted> {
        let (goal, doomed) = {
            let meta = self.0.meta.lock();
            let blocks = meta.refcounts.block_indices().len() as u64;
            let per_block = meta.geometry().refcount_block_entries();
            let goal = goal(count.used.saturating_sub(blocks), per_block);
            (goal, meta.refcounts.blocks_behind(goal))
        };
        let at = count.marks.partition_point(|(start, _)| *start <= goal);
        let mut below = count.used;
        if let Some((start, used)) = at.checked_sub(1).map(|at| count.marks[at]) {
            below = used + self.plan(|meta| meta.refcounts.count_used(start, goal)).await?.1;
        }
        let beyond = count.used.saturating_sub(below + doomed);
        Ok(Counted { goal, beyond })
    }
}
