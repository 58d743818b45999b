//! Which clusters of a new image hold what: a replay of the order in which QEMU allocates.
//!
//! QEMU takes the first gap behind its cursor. Counting what it took may need a refcount block,
//! which is itself taken from behind the cursor; then the search starts over, so that blocks come
//! to lie right behind the first large table. A refcount table that is full moves, with the blocks
//! that count it, to the next group of clusters that no block counts yet; the old table's clusters
//! are free then, and the cursor goes back to them.
//!
//! * Always: in an empty image every count is 0 or 1, so a set of used clusters says it all.

use std::collections::BTreeMap;

use super::super::format::{Geometry, MAX_REFCOUNT_TABLE_BYTES, RefcountTableEntry, RefcountWidth};
use super::super::refcount_space::{RefcountSpace, Room};
use crate::Result;
use crate::units::{HostCluster, HostOffset};

/// Clusters in use: disjoint, not adjacent, start to end (exclusive).
#[derive(Default)]
struct UsedClusters(BTreeMap<u64, u64>);

impl UsedClusters {
    fn insert(&mut self, start: u64, end: u64) {
        let joins_left = self.0.range(..=start).next_back().filter(|(_, left)| **left == start);
        let start = joins_left.map_or(start, |(left, _)| *left);
        let end = self.0.remove(&end).unwrap_or(end);
        self.0.insert(start, end);
    }

    fn remove(&mut self, start: u64, end: u64) {
        let (range_start, range_end) = match self.0.range(..=start).next_back() {
            Some((range_start, range_end)) if *range_end >= end => (*range_start, *range_end),
            _ => unreachable!("only used clusters are given back"),
        };
        self.0.remove(&range_start);
        if range_start < start {
            self.0.insert(range_start, start);
        }
        if end < range_end {
            self.0.insert(end, range_end);
        }
    }

    /// The first gap of `count` clusters from `from` on.
    fn first_gap(&self, from: u64, count: u64) -> u64 {
        let before = self.0.range(..=from).next_back().map_or(0, |(_, end)| *end);
        let mut start = from.max(before);
        for (used, end) in self.0.range(from..) {
            if used.saturating_sub(start) >= count && *used > start {
                break;
            }
            start = start.max(*end);
        }
        start
    }

    /// How many of `count` clusters from `start` on are free before the first in use.
    fn free_from(&self, start: u64, count: u64) -> u64 {
        let end = self.within(start, start + count).next();
        end.unwrap_or(start + count) - start
    }

    fn within(&self, start: u64, end: u64) -> impl Iterator<Item = u64> {
        let before = self.0.range(..start).next_back().map_or(start, |(_, end)| *end);
        let first = start..before.min(end);
        let others = self.0.range(start..end).flat_map(move |(from, to)| *from..(*to).min(end));
        first.chain(others)
    }

    fn end(&self) -> u64 {
        self.0.last_key_value().map_or(0, |(_, end)| *end)
    }
}

/// A refcount table that was given up; its bytes stay where they are.
pub(super) struct OldTable {
    pub(super) at: HostCluster,
    pub(super) entries: Vec<u64>,
}

/// Whether a step is done or what was there before it has moved.
#[derive(Clone, Copy, PartialEq, Eq)]
#[must_use]
enum Step {
    Done,
    /// New metadata may lie where the caller wanted to go: search again.
    StartOver,
}

/// The clusters of an image that is being made.
pub(super) struct Layout {
    geometry: Geometry,
    used: UsedClusters,
    /// Where the search for free clusters starts.
    cursor: u64,
    /// The cluster of each refcount block; 0 without one.
    blocks: Vec<u64>,
    table_at: u64,
    old_tables: Vec<OldTable>,
}

impl Layout {
    /// Starts with header, refcount table and one refcount block in the first three clusters.
    pub(super) fn new(geometry: Geometry) -> Self {
        let mut used = UsedClusters::default();
        used.insert(0, 3);
        let mut blocks = vec![0; (geometry.cluster_bytes() / 8) as usize];
        blocks[0] = 2;
        Self { geometry, used, cursor: 3, blocks, table_at: 1, old_tables: Vec::new() }
    }

    /// Starts with header, refcount table and all refcount blocks that it takes to count a disk of
    /// `data` clusters and what maps it, so that nothing of that comes to lie farther behind.
    pub(super) fn sized_for(geometry: Geometry, data: u64) -> Result<Self> {
        let tables = data.div_ceil(geometry.l2_entries());
        let counted = 1 + geometry.clusters_for(tables * 8) + tables + data;
        let space = RefcountSpace::counting(&geometry, counted, Room::Exact);
        let entries = space.table_clusters * (geometry.cluster_bytes() / 8);
        if entries * 8 > MAX_REFCOUNT_TABLE_BYTES {
            return Err(super::too_large());
        }
        let (first, cursor) = (1 + space.table_clusters, 1 + space.table_clusters + space.blocks);
        let mut blocks: Vec<u64> = (first..cursor).collect();
        blocks.resize(entries as usize, 0);
        let mut used = UsedClusters::default();
        used.insert(0, cursor);
        Ok(Self { geometry, used, cursor, blocks, table_at: 1, old_tables: Vec::new() })
    }

    /// Takes `count` clusters in a row and returns the first.
    pub(super) fn allocate(&mut self, count: u64) -> Result<HostCluster> {
        loop {
            let start = self.claim(count);
            if self.reference(start, count)? == Step::Done {
                return Ok(HostCluster(start));
            }
        }
    }

    /// Takes up to `count` clusters from `start` on, as far as they are free, and returns how many.
    pub(super) fn allocate_at(&mut self, start: u64, count: u64) -> Result<u64> {
        loop {
            let free = self.used.free_from(start, count);
            if free == 0 || self.reference(start, free)? == Step::Done {
                return Ok(free);
            }
        }
    }

    /// Moves the cursor over the first gap, which stays unused as yet.
    fn claim(&mut self, count: u64) -> u64 {
        let start = self.used.first_gap(self.cursor, count);
        self.cursor = start + count;
        start
    }

    /// Counts clusters as used, once there are blocks to count all of them.
    fn reference(&mut self, start: u64, count: u64) -> Result<Step> {
        let per_block = self.geometry.refcount_block_entries();
        for block in start / per_block..=(start + count - 1) / per_block {
            if self.ensure_block(start.max(block * per_block))? == Step::StartOver {
                self.cursor = self.cursor.min(start);
                return Ok(Step::StartOver);
            }
        }
        self.used.insert(start, start + count);
        Ok(Step::Done)
    }

    /// Makes the refcount block that counts `cluster`, unless it is there.
    fn ensure_block(&mut self, cluster: u64) -> Result<Step> {
        let per_block = self.geometry.refcount_block_entries();
        let index = (cluster / per_block) as usize;
        if self.blocks.get(index).is_some_and(|block| *block != 0) {
            return Ok(Step::Done);
        }
        let block = self.claim(1);
        if block / per_block == index as u64 {
            // It counts itself.
            self.used.insert(block, block + 1);
        } else if self.reference(block, 1)? == Step::StartOver {
            return Ok(Step::StartOver);
        }
        match self.blocks.get_mut(index) {
            Some(place) => *place = block,
            None => {
                let start = (cluster + 1).max(block).div_ceil(per_block) * per_block;
                self.move_table(start, 0, Room::ToGrow, Some((index, block)))?;
            }
        }
        Ok(Step::StartOver)
    }

    /// Moves the refcount table behind all clusters in use, and behind it as many blocks as it
    /// takes to count `more` clusters after it. Returns the first of those.
    pub(super) fn move_table_to_end(&mut self, more: u64) -> Result<u64> {
        self.move_table(self.used.end(), more, Room::Exact, None)
    }

    /// Makes the refcount blocks that are missing from the one on that counts `start`, at
    /// `start`, and a new table behind them that knows `block` as well, by its index. Returns the
    /// cluster behind all that.
    fn move_table(
        &mut self,
        start: u64,
        more: u64,
        room: Room,
        block: Option<(usize, u64)>,
    ) -> Result<u64> {
        let per_table_cluster = self.geometry.cluster_bytes() / 8;
        let total = RefcountSpace::counting(&self.geometry, start + more, room).blocks;
        let spare = if room == Room::ToGrow { total.div_ceil(2) } else { 0 };
        let entries = (total + spare).next_multiple_of(per_table_cluster);
        if entries * 8 > MAX_REFCOUNT_TABLE_BYTES {
            return Err(super::too_large());
        }
        let mut blocks = self.blocks.clone();
        blocks.resize(entries as usize, 0);
        if let Some((index, block)) = block {
            blocks[index] = block;
        }
        let first = start / self.geometry.refcount_block_entries();
        let mut next = start;
        for place in blocks[first as usize..total as usize].iter_mut().filter(|at| **at == 0) {
            *place = next;
            next += 1;
        }
        let end = next + entries / per_table_cluster;
        self.used.insert(start, end);
        self.give_up_table();
        (self.blocks, self.table_at) = (blocks, next);
        Ok(end)
    }

    fn give_up_table(&mut self) {
        let entries = self.table_words().collect();
        self.old_tables.push(OldTable { at: HostCluster(self.table_at), entries });
        self.used.remove(self.table_at, self.table_at + self.table_clusters());
        self.cursor = self.cursor.min(self.table_at);
    }

    pub(super) const fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Where the refcount table lies.
    pub(super) const fn table_at(&self) -> HostCluster {
        HostCluster(self.table_at)
    }

    /// How many clusters the refcount table has.
    pub(super) fn table_clusters(&self) -> u64 {
        self.geometry.clusters_for(self.blocks.len() as u64 * 8)
    }

    /// The refcount table, word by word.
    pub(super) fn table_words(&self) -> impl Iterator<Item = u64> {
        let entry = |block: &u64| self.geometry.host_offset(HostCluster(*block));
        self.blocks.iter().map(move |block| RefcountTableEntry::new(entry(block)).0)
    }

    /// Refcount tables that were given up, oldest first.
    pub(super) fn old_tables(&self) -> &[OldTable] {
        &self.old_tables
    }

    /// The refcount blocks: where and what.
    pub(super) fn refcount_blocks(&self) -> impl Iterator<Item = (HostCluster, Vec<u8>)> {
        let per_block = self.geometry.refcount_block_entries();
        let width = RefcountWidth::of(&self.geometry);
        let there = self.blocks.iter().enumerate().filter(|(_, block)| **block != 0);
        there.map(move |(index, block)| {
            let start = index as u64 * per_block;
            let mut bytes = vec![0; self.geometry.cluster_bytes() as usize];
            for cluster in self.used.within(start, start + per_block) {
                width.write(&mut bytes, (cluster - start) as usize, 1);
            }
            (HostCluster(*block), bytes)
        })
    }

    /// The end of the last cluster in use.
    pub(super) fn end(&self) -> HostOffset {
        self.geometry.host_offset(HostCluster(self.used.end()))
    }
}
