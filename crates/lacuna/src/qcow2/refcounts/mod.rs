//! Refcounts of the image file's clusters, and the search for free ones.
//!
//! * Always: a cluster is handed out only with its refcount already raised, so that no crash shows
//!   a mapped cluster with refcount zero (the write-back writes refcounts first).
//! * Always: every function either finishes or changes nothing that counts and names its [`Need`].
//! * Placement: [`Placement::QemuCompatible`] has one cursor and so chooses the offsets that QEMU
//!   chooses; [`Placement::TwoCursors`] (004-6) fills the gaps that large requests skip and grows
//!   the file only when no gap fits.

mod blocks;
mod packed;
mod relocate;
mod search;
mod unstored;

pub(in crate::qcow2) use blocks::BlockLook;
pub(in crate::qcow2) use unstored::TableUpdate;

use std::collections::BTreeMap;

use self::unstored::Unstored;
use super::format::{Geometry, RefcountTableLocation, RefcountWidth};
use super::need::{Need, Planned, Stop};
use super::overlap::Structure;

use super::table_cache::{LEAST_TO_WRITE, TableCache};
use crate::Error;
use crate::units::{HostCluster, HostOffset, HostRange};

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
pub(in crate::qcow2) struct Refcounts {
    geometry: Geometry,
    width: RefcountWidth,
    placement: Placement,
    /// Offsets of the refcount blocks; 0 where there is none.
    table: Vec<u64>,
    table_offset: HostOffset,
    table_clusters: u64,
    /// What storage does not have yet of the table.
    unstored: Unstored,
    /// The same, as far as the write-back that runs is to store it.
    on_its_way: Unstored,
    pub(in crate::qcow2) blocks: TableCache,
    /// Where a search for one cluster starts (`free_single_cluster_index` of 004-6).
    single_cursor: u64,
    /// Where a search for a run starts.
    multi_cursor: u64,
    /// No gap of more clusters than this lies between the single cursor and the end.
    largest_gap: Option<u64>,
    /// How far searches for so many clusters below the end came that lacked a refcount.
    gap_cursors: BTreeMap<u64, u64>,
    /// Where the next compressed cluster may go: behind the last, in the same host cluster.
    compressed_cursor: Option<HostOffset>,
    /// The end of all clusters ever seen in use, in clusters.
    end: u64,
    /// What that was when the image was opened.
    end_at_open: u64,
    /// New metadata clusters since the last look: for the overlap map.
    new_metadata: Vec<(HostRange, Structure)>,
    released_by_search: u64,
}

/// Clusters that were handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::qcow2) struct Allocation {
    pub(in crate::qcow2) start: HostOffset,
    pub(in crate::qcow2) clusters: u64,
}

impl Refcounts {
    pub(in crate::qcow2) fn new(
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
            unstored: Unstored::default(),
            on_its_way: Unstored::default(),
            blocks: TableCache::new(geometry.cluster_bytes(), cache_bytes, LEAST_TO_WRITE),
            single_cursor: 0,
            multi_cursor: 0,
            largest_gap: None,
            gap_cursors: BTreeMap::new(),
            compressed_cursor: None,
            end: geometry.clusters_for(file_bytes),
            end_at_open: geometry.clusters_for(file_bytes),
            new_metadata: Vec::new(),
            released_by_search: 0,
        }
    }

    pub(in crate::qcow2) const fn table_range(&self) -> HostRange {
        HostRange::new(self.table_offset, self.table_clusters << self.geometry.cluster_bits())
    }

    /// Says whether a request goes on behind its last clusters where there is room.
    pub(in crate::qcow2) fn follows_the_last(&self) -> bool {
        self.placement == Placement::QemuCompatible
    }

    /// Returns where the last cluster handed out ends, if it is a whole one at the end of a file
    /// that grew: QEMU writes such a cluster to its end, also where the disk ends within it. Not
    /// so with subclusters: it writes whole ones of them and no more.
    pub(in crate::qcow2) fn grown_to(&self) -> Option<HostOffset> {
        let last = HostCluster(self.end.saturating_sub(1));
        let is_packed =
            self.compressed_cursor.is_some_and(|at| self.geometry.host_cluster(at) == last);
        let grew = self.end > self.end_at_open;
        let whole = grew && !is_packed && !self.geometry.has_subclusters();
        whole.then(|| self.geometry.host_offset(HostCluster(self.end)))
    }

    /// Returns how often a search had to ask for a write-back to get at freed clusters.
    pub(in crate::qcow2) const fn released_by_search(&self) -> u64 {
        self.released_by_search
    }

    /// Returns the end of all clusters that were ever in use.
    pub(in crate::qcow2) const fn end(&self) -> HostOffset {
        HostOffset(self.end << self.geometry.cluster_bits())
    }

    /// Returns where a search for the last used cluster starts.
    pub(in crate::qcow2) fn counted_end(&self) -> HostCluster {
        HostCluster(self.end.min((self.table.len() as u64).saturating_mul(self.entries())))
    }

    /// Moves `end` down to the end of the last cluster below it with a refcount. Passes over what
    /// no block counts, and over slices of zeros, at once: a file may be huge and sparse. Where a
    /// slice is missing, `end` is below all that was seen unused.
    pub(in crate::qcow2) fn lower_to_used(&mut self, end: &mut HostCluster) -> Planned<()> {
        while end.0 > 1 {
            let last = end.0 - 1;
            let Some((slice, index)) = self.locate(last)? else {
                end.0 = last - last % self.entries();
                continue;
            };
            let width = self.width;
            let Some(bytes) = self.blocks.read(slice) else {
                return Err(Need::RefcountSlice(slice).into());
            };
            let is_zero = bytes.iter().all(|byte| *byte == 0);
            let mut used = (0..=index).rev().filter(|index| width.read(bytes, *index as usize) > 0);
            match if is_zero { None } else { used.next() } {
                Some(used) => {
                    end.0 = last - index + used + 1;
                    return Ok(());
                }
                None => end.0 = last - index,
            }
        }
        end.0 = 1;
        Ok(())
    }

    /// Counts the clusters in use from `at` to the end of its slice, but not to `limit`. Returns where that
    /// slice ends, and how many.
    pub(in crate::qcow2) fn count_used(&mut self, at: u64, limit: u64) -> Planned<(u64, u64)> {
        let Some((slice, index)) = self.locate(at)? else {
            return Ok(((at / self.entries() + 1) * self.entries(), 0));
        };
        let (width, per_slice) = (self.width, self.slice_entries());
        let Some(bytes) = self.blocks.read(slice) else {
            return Err(Need::RefcountSlice(slice).into());
        };
        let is_zero = bytes.iter().all(|byte| *byte == 0);
        let stop = if is_zero { index } else { per_slice.min(index + limit - at) };
        let used = (index..stop).filter(|it| width.read(bytes, *it as usize) > 0).count();
        Ok((at - index + per_slice, used as u64))
    }

    /// The file was cut: what lies beyond `end` is unused.
    pub(in crate::qcow2) fn cut_at(&mut self, end: HostOffset) {
        self.end = self.geometry.clusters_for(end.0);
    }

    /// Returns where the blocks lie, 0 where there is none.
    pub(in crate::qcow2) fn block_offsets(&self) -> Vec<u64> {
        self.table.iter().map(|entry| entry & BLOCK_OFFSET_MASK).collect()
    }

    /// Goes by another table, which storage has with all its blocks, of a file of `file_bytes`.
    pub(in crate::qcow2) fn go_by(
        &mut self,
        table: Vec<u64>,
        location: RefcountTableLocation,
        file_bytes: u64,
    ) {
        self.table = table;
        (self.table_offset, self.table_clusters) = (location.offset, location.clusters.into());
        self.blocks.forget_all();
        self.unstored = Unstored::default();
        self.on_its_way = Unstored::default();
        self.end = self.end.max(self.geometry.clusters_for(file_bytes));
        // All that was learnt of what is free is of the old table.
        self.compressed_cursor = None;
        self.lower_cursors(HostCluster(0));
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
            // It would read as zeros, as if all that it counts were free (D.1-46).
            offset if HostOffset(offset) >= self.end() => {
                Err(Stop::Corrupt(Error::corrupt(format!(
                    "Refcount block offset {offset:#x} (table entry {index}) lies beyond the end of the file at {}",
                    self.end()
                ))))
            }
            offset => Ok(Some(HostOffset(offset))),
        }
    }

    /// Returns the refcount of a cluster.
    pub(in crate::qcow2) fn read(&mut self, cluster: HostCluster) -> Planned<u64> {
        // Storage still calls it a refcount block, whatever a new block in memory says.
        if self.is_leaving(cluster) {
            return Ok(1);
        }
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

    /// Adds `count` references to a cluster in use, for which its refcount has room.
    pub(in crate::qcow2) fn increase(&mut self, cluster: HostCluster, count: u64) -> Planned<()> {
        let now = self.read(cluster)?;
        assert!(count <= self.geometry.refcount_max() - now, "a refcount was asked for its room");
        self.write(cluster, now + count)
    }

    /// Takes `count` references off a cluster. Returns what is left.
    pub(in crate::qcow2) fn decrease(&mut self, cluster: HostCluster, count: u64) -> Planned<u64> {
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
    pub(in crate::qcow2) fn lower_cursors(&mut self, cluster: HostCluster) {
        self.single_cursor = self.single_cursor.min(cluster.0);
        self.multi_cursor = self.multi_cursor.min(cluster.0);
        self.largest_gap = None;
        self.gap_cursors.clear();
        if self.compressed_cursor.is_some_and(|at| self.geometry.host_cluster(at) == cluster) {
            self.compressed_cursor = None;
        }
    }

    /// Has searches begin with the lowest clusters again.
    pub(in crate::qcow2) fn search_from_the_start(&mut self) {
        self.lower_cursors(HostCluster(0));
    }

    pub(in crate::qcow2) const fn table_clusters(&self) -> u64 {
        self.table_clusters
    }

    /// Hands out metadata clusters made since the last call.
    pub(in crate::qcow2) fn take_new_metadata(&mut self) -> Vec<(HostRange, Structure)> {
        std::mem::take(&mut self.new_metadata)
    }
}
