//! Clearing whole clusters and subclusters: what zeroing, discarding and shrinking share.
//!
//! * Always: others are kept away from the clusters from before the map changes until the host
//!   bytes that were vacated are punched, dropped calls included; a later write finds its place
//!   as it left it.
//! * A long clearing lets other futures of the thread run between tables.
//! * Never: a host byte is punched that a snapshot or another cluster shares.

use super::image::Image;
use super::in_flight::Touch;
use super::meta::Meta;
use super::need::Need;
use super::options::{OnDiscard, ZeroUnmap};
use super::plan_zero::{Cleared, Intent, Subcleared, clear_clusters, clear_subclusters};
use super::quarantine::FreedBy;
use crate::block::step_aside;
use crate::buffer::Hold;
use crate::storage::Storage;
use crate::units::{GuestOffset, GuestRange, HostRange};
use crate::{ErrorKind, Result};

/// A range cut at the borders of a unit: what is before, whole units, what is behind.
pub(super) struct Parts {
    pub(super) head: GuestRange,
    pub(super) middle: GuestRange,
    pub(super) tail: GuestRange,
}

/// Cuts `range` at multiples of `unit`. The end of the disk counts as a border: whole units then
/// reach past it.
pub(super) fn cut(range: GuestRange, unit: u64, disk_bytes: u64) -> Parts {
    let end = match range.end().0 == disk_bytes {
        true => range.end().0.next_multiple_of(unit),
        false => range.end().0,
    };
    let part = |from: u64, to: u64| GuestRange::new(GuestOffset(from), to.saturating_sub(from));
    let first = range.start.0.next_multiple_of(unit);
    if first >= range.end().0 {
        // Inside one unit, be it the last one: the end of the disk completes no unit whose start
        // is left out.
        let nothing = part(range.end().0, range.end().0);
        return Parts { head: range, middle: nothing, tail: nothing };
    }
    let last = (end / unit * unit).max(first);
    Parts {
        head: part(range.start.0, first),
        middle: part(first, last),
        tail: part(last, range.end().0),
    }
}

/// A clearing under way.
pub(super) struct Clearing {
    /// Keeps others away from the clusters.
    pub(super) hold: Hold,
    /// Parts of clusters that have no subclusters, as they are compressed.
    pub(super) refused: Vec<GuestRange>,
    /// Host bytes that nothing uses any more.
    pub(super) freed_bytes: u64,
    vacated: Vacated,
}

impl Clearing {
    pub(super) fn begin(hold: Hold) -> Self {
        Self { hold, refused: Vec::new(), freed_bytes: 0, vacated: Vacated::default() }
    }
}

/// The last host bytes that clearing left and did not punch yet: what follows may lie right behind
/// them, in another slice of the table or another part of a cluster, and goes in the same call
/// (004-12).
#[derive(Default)]
struct Vacated(Option<HostRange>);

impl Vacated {
    /// Adds host bytes. Returns those before, unless both are one run.
    fn push(&mut self, next: HostRange) -> Option<HostRange> {
        match &mut self.0 {
            Some(last) if last.end() == next.start => {
                last.len += next.len;
                None
            }
            last => last.replace(next),
        }
    }

    fn take(&mut self) -> Option<HostRange> {
        self.0.take()
    }
}

impl<S: Storage> Image<S> {
    /// Waits until nothing else changes these clusters, and keeps it so while the hold lives.
    pub(super) async fn exclude_others(&self, range: GuestRange) -> Result<Hold> {
        self.enter(Touch::Map, self.geometry().cover_clusters(range)).await
    }

    /// Enters a request that touches `range` as soon as no other is in the way; the hold ends it.
    pub(super) async fn enter(&self, touch: Touch, range: GuestRange) -> Result<Hold> {
        let begin = |meta: &mut Meta| Ok(meta.in_flight.begin(touch, range).map_err(Need::Turn)?);
        let token = self.plan(begin).await?;
        Ok(self.hold(token))
    }

    /// Clears whole clusters; returns what keeps others away from them.
    pub(super) async fn clear(&self, range: GuestRange, intent: Intent) -> Result<Hold> {
        if range.is_empty() {
            return Ok(Hold::none());
        }
        let hold = self.exclude_others(range).await?;
        let clearing = self.clear_by_rule(range, intent, Clearing::begin(hold)).await?;
        Ok(self.punch_rest(clearing).await?.hold)
    }

    /// Clears whole subclusters (clusters, where there are none) that `hold` keeps others away
    /// from.
    pub(super) async fn clear_units(
        &self,
        range: GuestRange,
        intent: Intent,
        hold: Hold,
    ) -> Result<Clearing> {
        let end_of_units = self.size().next_multiple_of(self.geometry().subcluster_bytes());
        let parts = cut(range, self.geometry().cluster_bytes(), end_of_units);
        let clearing = Clearing::begin(hold);
        let clearing = self.clear_part(parts.head, intent, clearing).await?;
        let clearing = self.clear_by_rule(parts.middle, intent, clearing).await?;
        let clearing = self.clear_part(parts.tail, intent, clearing).await?;
        self.punch_rest(clearing).await
    }

    /// Clears some subclusters of one cluster.
    async fn clear_part(
        &self,
        range: GuestRange,
        intent: Intent,
        mut clearing: Clearing,
    ) -> Result<Clearing> {
        if range.is_empty() {
            return Ok(clearing);
        }
        let (_, intent) = self.leading_below(range, intent).await?;
        match self.plan(|meta| clear_subclusters(meta, range, intent)).await? {
            Subcleared::Done(cleared) => self.punch_cleared(cleared, clearing).await,
            Subcleared::NotPossible => {
                clearing.refused.push(range);
                Ok(clearing)
            }
        }
    }

    /// Clears whole clusters, and leaves unallocated what may be and reads as zeros so (001-2).
    async fn clear_by_rule(
        &self,
        range: GuestRange,
        intent: Intent,
        mut clearing: Clearing,
    ) -> Result<Clearing> {
        let mut at = range.start;
        while at < range.end() {
            let rest = GuestRange::new(at, range.end() - at);
            let (len, intent) = self.leading_below(rest, intent).await?;
            clearing = self.clear_run(GuestRange::new(at, len), intent, clearing).await?;
            at = at + len;
            if at < range.end() {
                step_aside().await;
            }
        }
        Ok(clearing)
    }

    /// Returns what to do with how many leading bytes of `range`: whole clusters, or all of it.
    async fn leading_below(&self, range: GuestRange, intent: Intent) -> Result<(u64, Intent)> {
        let may_forget = matches!(intent, Intent::Discard | Intent::ZeroFree)
            && self.0.zero_unmap == ZeroUnmap::Unallocate
            && self.0.meta.lock().on_discard == OnDiscard::Free;
        if !may_forget {
            return Ok((range.len, intent));
        }
        if self.0.backing.is_none() {
            return Ok((range.len, Intent::Forget));
        }
        let unit = self.geometry().cluster_bytes().min(range.len);
        match self.zero_prefix_below(range).await? / unit * unit {
            0 => Ok((unit, intent)),
            zeros => Ok((zeros.min(range.len), Intent::Forget)),
        }
    }

    /// Changes the map of whole clusters that the clearing's hold keeps others away from.
    pub(super) async fn clear_held(
        &self,
        range: GuestRange,
        intent: Intent,
        clearing: Clearing,
    ) -> Result<Clearing> {
        let clearing = self.clear_run(range, intent, clearing).await?;
        self.punch_rest(clearing).await
    }

    async fn clear_run(
        &self,
        range: GuestRange,
        intent: Intent,
        mut clearing: Clearing,
    ) -> Result<Clearing> {
        let mut at = range.start;
        while at < range.end() {
            let rest = GuestRange::new(at, range.end() - at);
            let cleared = self.plan(|meta| clear_clusters(meta, rest, intent)).await?;
            at = at + cleared.len;
            clearing = self.punch_cleared(cleared, clearing).await?;
            if at < range.end() {
                // Another table of a disk that may have thousands.
                step_aside().await;
            }
        }
        Ok(clearing)
    }

    async fn punch_cleared(&self, cleared: Cleared, mut clearing: Clearing) -> Result<Clearing> {
        clearing.freed_bytes += cleared.freed_bytes;
        for next in cleared.vacated {
            let before = clearing.vacated.push(next);
            clearing.hold = self.punch(before, clearing.hold).await?;
        }
        Ok(clearing)
    }

    async fn punch_rest(&self, mut clearing: Clearing) -> Result<Clearing> {
        let rest = clearing.vacated.take();
        clearing.hold = self.punch(rest, clearing.hold).await?;
        Ok(clearing)
    }

    /// Gives the space of host bytes back that keep their place. The map need not be durable
    /// before: a crash shows zeros where the guest wanted them, or wanted nothing.
    async fn punch(&self, range: Option<HostRange>, hold: Hold) -> Result<Hold> {
        let Some(range) = range.filter(|_| self.gives_back(FreedBy::Guest)) else {
            return Ok(hold);
        };
        let (hold, with_driver) = hold.shared();
        match self.0.storage.punch_hole_at(range, with_driver).await {
            Err(error) if error.kind() != ErrorKind::Unsupported => Err(error),
            _ => Ok(hold),
        }
    }

    pub(super) fn size(&self) -> u64 {
        self.0.meta.lock().size_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_cut_at_cluster_borders_and_the_end_of_the_disk_is_one() {
        let parts = cut(GuestRange::new(GuestOffset(100), 2000), 512, 2100);
        assert_eq!((parts.head.len, parts.middle.start.0, parts.middle.len), (412, 512, 2048));
        assert!(parts.tail.is_empty());
        let parts = cut(GuestRange::new(GuestOffset(600), 100), 512, 9999);
        assert_eq!((parts.head.len, parts.middle.len, parts.tail.len), (100, 0, 0));
        let parts = cut(GuestRange::new(GuestOffset(512), 700), 512, 9999);
        assert_eq!((parts.head.len, parts.middle.len, parts.tail.len), (0, 512, 188));
        let parts = cut(GuestRange::new(GuestOffset(600), 100), 512, 700);
        assert_eq!((parts.head.len, parts.middle.len, parts.tail.len), (100, 0, 0));
        let parts = cut(GuestRange::new(GuestOffset(512), 188), 512, 700);
        assert_eq!((parts.head.len, parts.middle.start.0, parts.middle.len), (0, 512, 512));
    }
}
