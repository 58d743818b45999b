//! Refcounts of the image file's clusters, and the search for free ones.
//!
//! * Always: a cluster is handed out only with its refcount already raised, so that no crash shows
//!   a mapped cluster with refcount zero (the write-back writes refcounts first).
//! * Always: every function either finishes or changes nothing that counts and names its [`Need`].
//! * Placement: [`Placement::QemuCompatible`] has one cursor and so chooses the offsets that QEMU
//!   chooses; [`Placement::TwoCursors`] (004-6) fills the gaps that large requests skip and grows
//!   the file only when no gap fits.

use std::collections::BTreeSet;
use std::ops::Range;

use super::format::{Geometry, RefcountWidth};
use super::need::{Need, Planned, Stop};
use super::overlap::Structure;
use super::quarantine::Quarantine;

use super::table_cache::TableCache;
use crate::units::{HostCluster, HostOffset, HostRange};
use crate::{Error, ErrorKind};

/// No cluster may lie at or beyond this offset (B.11).
const HOST_LIMIT: u64 = 1 << 56;
/// The refcount table may not take more bytes than this (B.11).
const MAX_TABLE_BYTES: u64 = 8 << 20;
const BLOCK_OFFSET_MASK: u64 = !0x1ff;

/// How host clusters are chosen.
///
/// ```
/// use lacuna::qcow2::Placement;
/// assert_eq!(Placement::default(), Placement::TwoCursors);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Placement {
    /// One cursor for single clusters, one for runs: gaps are filled before the file grows.
    #[default]
    TwoCursors,
    /// QEMU's own order, offset by offset.
    QemuCompatible,
}

#[derive(Debug)]
pub(super) struct Refcounts {
    geometry: Geometry,
    width: RefcountWidth,
    placement: Placement,
    /// Offsets of the refcount blocks; 0 where there is none.
    table: Vec<u64>,
    table_offset: HostOffset,
    table_clusters: u64,
    /// Table entries (by index) that storage does not have yet.
    table_dirty: BTreeSet<usize>,
    /// The whole table lies elsewhere now; storage has neither it nor the header that points to it.
    table_moved: bool,
    pub(super) blocks: TableCache,
    /// Where a search for one cluster starts (`free_single_cluster_index` of 004-6).
    single_cursor: u64,
    /// Where a search for a run starts.
    multi_cursor: u64,
    /// No gap of more clusters than this lies between the single cursor and the end.
    largest_gap: Option<u64>,
    /// Where the next compressed cluster may go: behind the last, in the same host cluster.
    compressed_cursor: Option<HostOffset>,
    /// The end of all clusters ever seen in use, in clusters.
    end: u64,
    /// What that was when the image was opened.
    end_at_open: u64,
    /// Old tables to be freed after the write-back that replaces them.
    replaced: Vec<HostRange>,
    /// New metadata clusters since the last look: for the overlap map.
    new_metadata: Vec<(HostRange, Structure)>,
    released_by_search: u64,
}

/// Clusters that were handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Allocation {
    pub(super) start: HostOffset,
    pub(super) clusters: u64,
}

impl Refcounts {
    pub(super) fn new(
        geometry: Geometry,
        table: Vec<u64>,
        table_offset: HostOffset,
        file_bytes: u64,
        cache_bytes: u64,
        placement: Placement,
    ) -> Self {
        Self {
            geometry,
            width: RefcountWidth::of(&geometry),
            placement,
            table_clusters: geometry.clusters_for(table.len() as u64 * 8),
            table,
            table_offset,
            table_dirty: BTreeSet::new(),
            table_moved: false,
            blocks: TableCache::new(geometry.cluster_bytes(), cache_bytes),
            single_cursor: 0,
            multi_cursor: 0,
            largest_gap: None,
            compressed_cursor: None,
            end: geometry.clusters_for(file_bytes),
            end_at_open: geometry.clusters_for(file_bytes),
            replaced: Vec::new(),
            new_metadata: Vec::new(),
            released_by_search: 0,
        }
    }

    pub(super) const fn table_range(&self) -> HostRange {
        HostRange::new(self.table_offset, self.table_clusters << self.geometry.cluster_bits())
    }

    /// Says whether a request goes on behind its last clusters where there is room.
    pub(super) fn follows_the_last(&self) -> bool {
        self.placement == Placement::QemuCompatible
    }

    /// Returns where the last cluster handed out ends, if it is a whole one at the end of a file
    /// that grew: QEMU writes such a cluster to its end, also where the disk ends within it. Not
    /// so with subclusters: it writes whole ones of them and no more.
    pub(super) fn grown_to(&self) -> Option<HostOffset> {
        let last = HostCluster(self.end.saturating_sub(1));
        let is_packed =
            self.compressed_cursor.is_some_and(|at| self.geometry.host_cluster(at) == last);
        let grew = self.end > self.end_at_open;
        let whole = grew && !is_packed && !self.geometry.has_subclusters();
        whole.then(|| self.geometry.host_offset(HostCluster(self.end)))
    }

    /// Returns how often a search had to ask for a write-back to get at freed clusters.
    pub(super) const fn released_by_search(&self) -> u64 {
        self.released_by_search
    }

    /// Returns the end of all clusters that were ever in use.
    pub(super) const fn end(&self) -> HostOffset {
        HostOffset(self.end << self.geometry.cluster_bits())
    }

    /// The file was cut: what lies beyond `end` is unused.
    pub(super) fn cut_at(&mut self, end: HostOffset) {
        self.end = self.geometry.clusters_for(end.0);
    }

    const fn entries(&self) -> u64 {
        self.geometry.refcount_block_entries()
    }

    /// Returns the slice and the index in it of a cluster's refcount, unless there is no block.
    fn locate(&self, cluster: u64) -> Planned<Option<(HostOffset, u64)>> {
        let Some(block) = self.block(cluster / self.entries())? else { return Ok(None) };
        let per_slice = self.slice_entries();
        let index = cluster % self.entries();
        let slice = block + index / per_slice * self.blocks.slice_bytes();
        Ok(Some((slice, index % per_slice)))
    }

    const fn slice_entries(&self) -> u64 {
        (self.blocks.slice_bytes() * 8) >> self.geometry.refcount_order()
    }

    fn block(&self, index: u64) -> Planned<Option<HostOffset>> {
        let entry = usize::try_from(index).ok().and_then(|index| self.table.get(index));
        match entry.copied().unwrap_or(0) & BLOCK_OFFSET_MASK {
            0 => Ok(None),
            offset if !self.geometry.is_aligned(offset) => {
                Err(Stop::Corrupt(Error::corrupt(format!(
                    "Refcount block offset {offset:#x} (table entry {index}) is not a multiple of the cluster size"
                ))))
            }
            offset => Ok(Some(HostOffset(offset))),
        }
    }

    /// Returns the refcount of a cluster.
    pub(super) fn read(&mut self, cluster: HostCluster) -> Planned<u64> {
        let Some((slice, index)) = self.locate(cluster.0)? else { return Ok(0) };
        let width = self.width;
        match self.blocks.read(slice) {
            Some(bytes) => Ok(width.read(bytes, index as usize)),
            None => Err(Need::RefcountSlice(slice).into()),
        }
    }

    /// Changes a refcount whose block exists and whose slice was read by the same plan.
    fn write(&mut self, cluster: HostCluster, value: u64) -> Planned<()> {
        let located = self.locate(cluster.0)?;
        let (slice, index) = located.ok_or_else(|| {
            Stop::Corrupt(Error::corrupt(format!("Cluster {cluster} in use has no refcount block")))
        })?;
        let width = self.width;
        match self.blocks.change(slice) {
            Some(bytes) => {
                width.write(bytes, index as usize, value);
                Ok(())
            }
            None => Err(Need::RefcountSlice(slice).into()),
        }
    }

    /// Takes `count` references off a cluster. Returns what is left.
    pub(super) fn decrease(&mut self, cluster: HostCluster, count: u64) -> Planned<u64> {
        let now = self.read(cluster)?;
        let Some(left) = now.checked_sub(count) else {
            return Err(Stop::Corrupt(Error::corrupt(format!(
                "Cluster {cluster} loses {count} references but has a refcount of {now}"
            ))));
        };
        self.write(cluster, left)?;
        if left == 0 {
            self.lower_cursors(cluster);
        }
        Ok(left)
    }

    /// Makes searches start no later than at a cluster that is, or is about to be, free.
    pub(super) fn lower_cursors(&mut self, cluster: HostCluster) {
        self.single_cursor = self.single_cursor.min(cluster.0);
        self.multi_cursor = self.multi_cursor.min(cluster.0);
        self.largest_gap = None;
        if self.compressed_cursor.is_some_and(|at| self.geometry.host_cluster(at) == cluster) {
            self.compressed_cursor = None;
        }
    }

    // ---- allocation ------------------------------------------------------------------------

    /// Hands out `count` clusters in one run; each has refcount one afterwards.
    pub(super) fn allocate(&mut self, count: u64, quarantine: &Quarantine) -> Planned<Allocation> {
        loop {
            let start = self.choose(count, quarantine)?;
            if self.claim(start, count, start + count)? {
                return Ok(self.handed_out(start, count));
            }
        }
    }

    /// Hands out up to `count` clusters from `start` on, as far as they are free (maybe none).
    pub(super) fn allocate_at(&mut self, start: HostOffset, count: u64) -> Planned<Allocation> {
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
            let mut from = self.single_cursor;
            let lower = self.scan(&mut from, count, None)?;
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
    fn scan(
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

    fn check_limit(&self, cluster: u64) -> Planned<()> {
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

    // ---- refcount blocks -------------------------------------------------------------------

    /// Makes the refcount block that covers `cluster`, somewhere from `from` on.
    fn make_block(&mut self, cluster: u64, from: u64, taken: Range<u64>) -> Planned<()> {
        let index = cluster / self.entries();
        let mut at = from.max(self.single_cursor);
        let mut block = self.scan(&mut at, 1, None)?;
        if taken.contains(&block) {
            at = taken.end;
            block = self.scan(&mut at, 1, None)?;
        }
        let own = block / self.entries();
        if own != index && self.block(own)?.is_none() {
            // Its own refcount has no block either: make that one first, which describes itself.
            // It goes behind, as QEMU's cursor has passed the first choice by then.
            return self.make_block(block, block + 1, taken);
        }
        if index >= self.table.len() as u64 {
            return self.grow_table(cluster.max(block));
        }
        if own != index {
            self.read(HostCluster(block))?;
        }
        self.install_block(index, block);
        self.write(HostCluster(block), 1)?;
        self.single_cursor = self.single_cursor.max(block + 1);
        self.end = self.end.max(block + 1);
        Ok(())
    }

    fn install_block(&mut self, index: u64, block: u64) {
        let offset = self.geometry.host_offset(HostCluster(block));
        self.blocks.make_fresh(offset);
        self.table[index as usize] = offset.0;
        self.table_dirty.insert(index as usize);
        let range = HostRange::new(offset, self.geometry.cluster_bytes());
        self.new_metadata.push((range, Structure::RefcountBlock));
    }

    /// Moves the refcount table to a larger one behind everything, with the blocks for itself.
    ///
    /// The new area starts where the next refcount block's coverage starts, so that it describes
    /// itself; the table grows by half more than needed (as QEMU grows it).
    fn grow_table(&mut self, last_used: u64) -> Planned<()> {
        let per_block = self.entries();
        let start = last_used.div_ceil(per_block).max(last_used / per_block + 1) * per_block;
        self.check_limit(start)?;
        let blocks_total = self.blocks_with_table(start);
        let table_entries = (blocks_total + blocks_total.div_ceil(2))
            .next_multiple_of(self.geometry.cluster_bytes() / 8);
        if table_entries * 8 > MAX_TABLE_BYTES {
            return Err(Stop::Fail(Error::new(
                ErrorKind::NoSpace,
                format!("The refcount table would pass its limit of {MAX_TABLE_BYTES} bytes"),
            )));
        }
        let first_index = start / per_block;
        let blocks_new = blocks_total - first_index;
        let table_clusters = self.geometry.clusters_for(table_entries * 8);
        self.replaced.push(self.table_range());
        self.table.resize(table_entries as usize, 0);
        for nth in 0..blocks_new {
            self.install_block(first_index + nth, start + nth);
        }
        self.table_offset = self.geometry.host_offset(HostCluster(start + blocks_new));
        self.table_clusters = table_clusters;
        self.table_moved = true;
        self.new_metadata.push((self.table_range(), Structure::RefcountTable));
        for cluster in start..start + blocks_new + table_clusters {
            self.write(HostCluster(cluster), 1)?;
        }
        self.end = self.end.max(start + blocks_new + table_clusters);
        Ok(())
    }

    /// Returns how many blocks describe `clusters` clusters plus those blocks and their table.
    fn blocks_with_table(&self, clusters: u64) -> u64 {
        let per_table_cluster = self.geometry.cluster_bytes() / 8;
        let (mut clusters, mut blocks, mut table, mut last) = (clusters, 0, 0_u64, 0);
        let mut generous = true;
        loop {
            blocks = (clusters + table + blocks).div_ceil(self.entries());
            table = blocks.div_ceil(per_table_cluster);
            let now = clusters + blocks + table;
            if now == last && generous {
                clusters += table.div_ceil(2);
                generous = false;
                last = 0;
            } else if now == last {
                return blocks;
            } else {
                last = now;
            }
        }
    }

    // ---- compressed clusters ---------------------------------------------------------------

    /// Hands out `len` bytes for a compressed cluster, packed behind the last one where it fits.
    /// Each host cluster touched has one more reference afterwards.
    pub(super) fn allocate_bytes(
        &mut self,
        len: u64,
        limit: u64,
        quarantine: &Quarantine,
    ) -> Planned<HostOffset> {
        let cluster_bytes = self.geometry.cluster_bytes();
        let packed = match self.compressed_cursor {
            Some(at) => self.room_behind(at)?.then_some(at),
            None => None,
        };
        let start = match packed {
            Some(at) if cluster_bytes - self.geometry.within_cluster(at.0) >= len => {
                self.share(at)?;
                at
            }
            _ => self.extend_packing(packed, len, quarantine)?,
        };
        if start.0 + len > limit {
            return Err(Stop::Fail(Error::new(
                ErrorKind::NoSpace,
                format!("Compressed clusters cannot lie beyond {limit:#x} at this cluster size"),
            )));
        }
        let end = start + len;
        self.compressed_cursor = (!self.geometry.is_aligned(end.0)).then_some(end);
        Ok(start)
    }

    fn room_behind(&mut self, at: HostOffset) -> Planned<bool> {
        let refcount = self.read(self.geometry.host_cluster(at))?;
        Ok(refcount > 0 && refcount < self.geometry.refcount_max())
    }

    fn share(&mut self, at: HostOffset) -> Planned<()> {
        let cluster = self.geometry.host_cluster(at);
        let refcount = self.read(cluster)?;
        self.write(cluster, refcount + 1)
    }

    /// Takes a new cluster; the bytes start in the old one where the new one follows it.
    fn extend_packing(
        &mut self,
        packed: Option<HostOffset>,
        len: u64,
        quarantine: &Quarantine,
    ) -> Planned<HostOffset> {
        if let Some(at) = packed {
            self.read(self.geometry.host_cluster(at))?;
        }
        let new = self.allocate(1, quarantine)?.start;
        match packed {
            Some(at) if at.0.next_multiple_of(self.geometry.cluster_bytes()) == new.0 => {
                debug_assert!(len <= self.geometry.cluster_bytes());
                self.share(at)?;
                Ok(at)
            }
            _ => Ok(new),
        }
    }

    // ---- write-back ------------------------------------------------------------------------

    /// Hands out the table entries to be written: `(offset, bytes)`, whole sectors.
    pub(super) fn take_dirty_table(&mut self) -> Vec<(HostOffset, Vec<u8>)> {
        let dirty = std::mem::take(&mut self.table_dirty);
        let sectors: BTreeSet<usize> = dirty.into_iter().map(|index| index / 64).collect();
        let sector = |at: usize| {
            let entries = &self.table[at * 64..self.table.len().min(at * 64 + 64)];
            let bytes = entries.iter().flat_map(|entry| entry.to_be_bytes()).collect();
            (self.table_offset + at as u64 * 512, bytes)
        };
        sectors.into_iter().map(sector).collect()
    }

    /// Hands out the whole table where it lies at a new place.
    pub(super) fn take_moved_table(&mut self) -> Option<(HostOffset, Vec<u8>)> {
        if !std::mem::take(&mut self.table_moved) {
            return None;
        }
        self.table_dirty.clear();
        let bytes = self.table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        Some((self.table_offset, bytes))
    }

    pub(super) const fn table_clusters(&self) -> u64 {
        self.table_clusters
    }

    /// Hands out tables that the next write-back makes obsolete.
    pub(super) fn take_replaced(&mut self) -> Vec<HostRange> {
        std::mem::take(&mut self.replaced)
    }

    /// Hands out metadata clusters made since the last call.
    pub(super) fn take_new_metadata(&mut self) -> Vec<(HostRange, Structure)> {
        std::mem::take(&mut self.new_metadata)
    }

    /// Returns the table entries and the move that storage does not have, for
    /// [`redo_table`](Self::redo_table).
    pub(super) fn unwritten_table(&self) -> (BTreeSet<usize>, bool) {
        (self.table_dirty.clone(), self.table_moved)
    }

    /// What was handed out may not have reached storage: it is dirty again.
    pub(super) fn redo_table(&mut self, (entries, moved): (BTreeSet<usize>, bool)) {
        self.table_dirty.extend(entries);
        self.table_moved |= moved;
    }
}
