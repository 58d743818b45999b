//! The search for free clusters, by the image's [`Placement`].
//!
//! * Always: a search that lacks a refcount leaves its cursor behind all that is known to be of
//!   no use, so that it goes on there.
//! * Always: a cluster that is handed out has refcount one already.

use super::{Allocation, Placement, Refcounts};
use crate::qcow2::need::{Need, Planned, Stop};
use crate::qcow2::quarantine::Quarantine;
use crate::units::{HostCluster, HostOffset};
use crate::{Error, ErrorKind};

/// No cluster may lie at or beyond this offset (B.11).
const HOST_LIMIT: u64 = 1 << 56;

impl Refcounts {
    /// Hands out `count` clusters in one run; each has refcount one afterwards.
    pub(in crate::qcow2) fn allocate(
        &mut self,
        count: u64,
        quarantine: &Quarantine,
    ) -> Planned<Allocation> {
        loop {
            let start = self.choose(count, quarantine)?;
            if self.claim(start, count, start + count)? {
                return Ok(self.handed_out(start, count));
            }
        }
    }

    /// Hands out up to `count` clusters from `start` on, as far as they are free (maybe none).
    pub(in crate::qcow2) fn allocate_at(
        &mut self,
        start: HostOffset,
        count: u64,
    ) -> Planned<Allocation> {
        let first = self.geometry.host_cluster(start).0;
        loop {
            let mut free = 0;
            while free < count && self.read(HostCluster(first + free))? == 0 {
                free += 1;
            }
            if free == 0 || self.claim(first, free, self.single_cursor)? {
                return Ok(self.handed_out(first, free));
            }
        }
    }

    /// Hands out `count` clusters in one run that ends at `limit` at the latest, in what blocks count
    /// already; nothing where there is none from `cursor` on, which moves behind what is of no use.
    pub(in crate::qcow2) fn allocate_below(
        &mut self,
        count: u64,
        limit: u64,
        cursor: &mut u64,
    ) -> Planned<Option<HostOffset>> {
        let Some(start) = self.find_below(count, limit, cursor)? else { return Ok(None) };
        (start..start + count).try_for_each(|at| self.write(HostCluster(at), 1))?;
        *cursor = start + count;
        Ok(Some(self.geometry.host_offset(HostCluster(start))))
    }

    /// Finds what [`allocate_below`](Self::allocate_below) hands out, with its refcounts at hand.
    pub(super) fn find_below(
        &mut self,
        count: u64,
        limit: u64,
        cursor: &mut u64,
    ) -> Planned<Option<u64>> {
        while *cursor + count <= limit {
            if self.locate(*cursor)?.is_none() {
                *cursor = (*cursor / self.entries() + 1) * self.entries();
                continue;
            }
            match self.first_used(*cursor, count)? {
                Some(used) => *cursor = used + 1,
                None => return Ok(Some(*cursor)),
            }
        }
        Ok(None)
    }

    /// Returns the first of `count` clusters that is in use, or that nothing counts.
    fn first_used(&mut self, start: u64, count: u64) -> Planned<Option<u64>> {
        self.blocks.make_room_for(count / self.slice_entries() + 2);
        for cluster in start..start + count {
            if self.locate(cluster)?.is_none() || self.read(HostCluster(cluster))? > 0 {
                return Ok(Some(cluster));
            }
        }
        Ok(None)
    }

    fn handed_out(&mut self, start: u64, clusters: u64) -> Allocation {
        self.end = self.end.max(start + clusters);
        Allocation { start: self.geometry.host_offset(HostCluster(start)), clusters }
    }

    /// Chooses where a run of `count` free clusters starts and moves the cursor behind it.
    fn choose(&mut self, count: u64, quarantine: &Quarantine) -> Planned<u64> {
        match self.placement {
            Placement::QemuCompatible => self.choose_like_qemu(count, quarantine),
            Placement::TwoCursors => self.choose_gap(count, quarantine),
        }
    }

    fn choose_like_qemu(&mut self, count: u64, quarantine: &Quarantine) -> Planned<u64> {
        let mut cursor = self.single_cursor;
        let found = self.scan(&mut cursor, count, Some(quarantine));
        self.single_cursor = cursor;
        let start = found?;
        self.single_cursor = start + count;
        Ok(start)
    }

    fn choose_gap(&mut self, count: u64, quarantine: &Quarantine) -> Planned<u64> {
        let mut cursor = if count == 1 { self.single_cursor } else { self.multi_cursor };
        let found = self.scan(&mut cursor, count, None);
        self.move_cursor(count, cursor);
        let mut start = found?;
        if start + count > self.end && count > 1 && self.largest_gap.is_none_or(|gap| count <= gap)
        {
            // The cursor for runs passed gaps that were too small for an earlier, larger run.
            let lower = self.scan_passed_gaps(count)?;
            if lower + count > self.end {
                self.largest_gap = Some(count - 1);
            }
            start = lower.min(start);
        }
        if start + count > self.end && quarantine.leaving() >= count {
            self.released_by_search += 1;
            return Err(Need::WriteBack.into());
        }
        self.move_cursor(count, start + count);
        Ok(start)
    }

    /// Finds the first run of `count` free clusters from the single cursor on; an attempt that
    /// lacked a refcount goes on where it was, or a small cache would never hold the whole way.
    fn scan_passed_gaps(&mut self, count: u64) -> Planned<u64> {
        let passed = self.gap_cursors.range(..=count).map(|(_, cursor)| *cursor).max();
        let mut cursor = self.single_cursor.max(passed.unwrap_or(0));
        let found = self.scan(&mut cursor, count, None);
        match &found {
            Ok(_) => self.gap_cursors.remove(&count),
            Err(_) => self.gap_cursors.insert(count, cursor),
        };
        found
    }

    fn move_cursor(&mut self, count: u64, to: u64) {
        match count {
            1 => self.single_cursor = self.single_cursor.max(to),
            _ => self.multi_cursor = self.multi_cursor.max(to),
        }
    }

    /// Finds the first run of `count` free clusters from `cursor` on.
    ///
    /// On a [`Need`] the cursor stands behind everything that is known to be of no use, so that
    /// the next attempt goes on there. With `quarantine`, a cluster in it that would have been
    /// the choice asks for a write-back.
    pub(super) fn scan(
        &mut self,
        cursor: &mut u64,
        count: u64,
        quarantine: Option<&Quarantine>,
    ) -> Planned<u64> {
        let mut at = *cursor;
        while at - *cursor < count {
            self.check_limit(at)?;
            let refcount = self.read(HostCluster(at))?;
            at += 1;
            if refcount == 0 {
                continue;
            }
            let leaving = quarantine.filter(|quarantine| quarantine.leaving() > 0);
            if leaving.is_some_and(|list| list.pending(HostCluster(at - 1)) == refcount) {
                self.released_by_search += 1;
                return Err(Need::WriteBack.into());
            }
            *cursor = at;
        }
        Ok(*cursor)
    }

    pub(super) fn check_limit(&self, cluster: u64) -> Planned<()> {
        if cluster < HOST_LIMIT >> self.geometry.cluster_bits() {
            return Ok(());
        }
        Err(Stop::Fail(Error::new(
            ErrorKind::NoSpace,
            "The image file would pass the 64 PiB that the format can address",
        )))
    }

    /// Raises the refcounts of a free run to one. False where a refcount block had to be made
    /// first (from `blocks_from` on, but not in what of the run the block does not cover), which
    /// may have taken part of the run: then choose again.
    fn claim(&mut self, start: u64, count: u64, blocks_from: u64) -> Planned<bool> {
        self.blocks.make_room_for(count / self.slice_entries() + 2);
        let mut cluster = start;
        while cluster < start + count {
            if self.block(cluster / self.entries())?.is_none() {
                let taken = start..cluster;
                self.make_block(cluster, blocks_from, taken)?;
                // Try the same clusters first (as QEMU does): most are still free.
                self.lower_cursors(HostCluster(start));
                return Ok(false);
            }
            // Have the slice at hand before anything is changed.
            self.read(HostCluster(cluster))?;
            cluster = self.next_slice(cluster);
        }
        for cluster in start..start + count {
            self.write(HostCluster(cluster), 1)?;
        }
        Ok(true)
    }

    /// Returns the first cluster whose refcount lies in the next slice.
    const fn next_slice(&self, cluster: u64) -> u64 {
        (cluster / self.slice_entries() + 1) * self.slice_entries()
    }
}
