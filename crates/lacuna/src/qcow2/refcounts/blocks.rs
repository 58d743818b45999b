//! New refcount blocks, and a larger refcount table when the old one is full.
//!
//! Where they go is QEMU's choice in both placements, so that new images look the same.

use std::ops::Range;

use super::{BLOCK_OFFSET_MASK, Refcounts};
use crate::qcow2::moved::Moved;
use crate::qcow2::need::{Need, Planned, Stop};
use crate::qcow2::overlap::Structure;
use crate::qcow2::refcount_space::{RefcountSpace, Room};
use crate::units::{HostCluster, HostOffset, HostRange};
use crate::{Error, ErrorKind};

/// The refcount table may not take more bytes than this (B.11).
const MAX_TABLE_BYTES: u64 = 8 << 20;

/// How far a look for what a block counts came. Kept from one plan to the next, since a small
/// cache may not hold all slices of a block at once.
#[derive(Debug, Default)]
pub(in crate::qcow2) struct BlockLook {
    seen_bytes: u64,
    used: u64,
}

/// A block that the table names no more.
pub(in crate::qcow2) struct Dropped {
    pub(in crate::qcow2) cluster: HostCluster,
    /// Another block counts it, and will say that it is free once storage names it no more.
    pub(in crate::qcow2) is_counted: bool,
}

impl Refcounts {
    /// Makes the refcount block that covers `cluster`, somewhere from `from` on.
    pub(super) fn make_block(&mut self, cluster: u64, from: u64, taken: Range<u64>) -> Planned<()> {
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
            self.settle_counting(own, index)?;
        }
        self.end = self.end.max(block + 1);
        self.install_block(index, block);
        self.write(HostCluster(block), 1)?;
        self.single_cursor = self.single_cursor.max(block + 1);
        Ok(())
    }

    /// Makes the blocks that count `count` clusters at the end of the file. Returns the first of
    /// those clusters.
    pub(in crate::qcow2) fn cover_behind_end(&mut self, count: u64) -> Planned<HostOffset> {
        let per_block = self.entries();
        let mut index = self.end / per_block;
        while index * per_block < self.end + count {
            self.check_limit(index * per_block)?;
            if self.block(index)?.is_some() {
                index += 1;
                continue;
            }
            self.make_block((index * per_block).max(self.end), self.end, 0..0)?;
            // The block has moved the end; a larger table has moved it past what this block counts.
            index = index.max(self.end / per_block);
        }
        Ok(self.end())
    }

    /// Returns the table's entries that name a block.
    pub(in crate::qcow2) fn block_indices(&self) -> Vec<u64> {
        let there = (0..).zip(&self.table).filter(|(_, entry)| **entry & BLOCK_OFFSET_MASK != 0);
        there.map(|(index, _)| index).collect()
    }

    /// Counts the blocks that lie behind the first `goal` clusters and count none of them.
    pub(in crate::qcow2) fn blocks_behind(&self, goal: u64) -> u64 {
        let first = goal.div_ceil(self.entries()) as usize;
        let offsets = self.table.iter().skip(first).map(|entry| entry & BLOCK_OFFSET_MASK);
        offsets.filter(|offset| *offset >> self.geometry.cluster_bits() >= goal).count() as u64
    }

    /// Drops a block that counts nothing but maybe itself. Only while nothing is allocated: what
    /// `look` saw unused must stay so.
    pub(in crate::qcow2) fn drop_empty_block(
        &mut self,
        index: u64,
        look: &mut BlockLook,
    ) -> Planned<Option<Dropped>> {
        let Some(offset) = self.block(index)? else { return Ok(None) };
        let cluster = self.geometry.host_cluster(offset);
        let counts_itself = cluster.0 / self.entries() == index;
        let own = if counts_itself { 1 } else { 0 };
        if self.read(cluster)? != 1 || self.counts_more_than(own, offset, look)? {
            return Ok(None);
        }
        self.table[index as usize] = 0;
        self.unstored.entries.insert(index as usize);
        self.blocks.forget(offset);
        if counts_itself {
            self.unstored.leaving.insert(cluster.0);
        } else {
            let range = HostRange::new(offset, self.geometry.cluster_bytes());
            self.unstored.replaced.push(range);
        }
        Ok(Some(Dropped { cluster, is_counted: !counts_itself }))
    }

    /// Says whether a block counts more than `own` clusters as used; slices of zeros cost next to
    /// nothing.
    fn counts_more_than(
        &mut self,
        own: u64,
        block: HostOffset,
        look: &mut BlockLook,
    ) -> Planned<bool> {
        let (width, per_slice) = (self.width, self.slice_entries() as usize);
        while look.seen_bytes < self.geometry.cluster_bytes() && look.used <= own {
            let slice = block + look.seen_bytes;
            let Some(bytes) = self.blocks.read(slice) else {
                return Err(Need::RefcountSlice(slice).into());
            };
            if bytes.iter().any(|byte| *byte != 0) {
                let used = (0..per_slice).filter(|index| width.read(bytes, *index) > 0);
                look.used += used.count() as u64;
            }
            look.seen_bytes += self.blocks.slice_bytes();
        }
        Ok(look.used > own)
    }

    fn install_block(&mut self, index: u64, block: u64) {
        let offset = self.geometry.host_offset(HostCluster(block));
        self.blocks.make_fresh(offset);
        self.table[index as usize] = offset.0;
        self.unstored.entries.insert(index as usize);
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
        let blocks_total = RefcountSpace::counting(&self.geometry, start, Room::ToGrow).blocks;
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
        self.unstored.replaced.push(self.table_range());
        self.table.resize(table_entries as usize, 0);
        self.end = self.end.max(start + blocks_new + table_clusters);
        for nth in 0..blocks_new {
            self.install_block(first_index + nth, start + nth);
        }
        self.table_offset = self.geometry.host_offset(HostCluster(start + blocks_new));
        self.table_clusters = table_clusters;
        self.unstored.moved = Moved::Unwritten;
        self.new_metadata.push((self.table_range(), Structure::RefcountTable));
        for cluster in start..start + blocks_new + table_clusters {
            self.write(HostCluster(cluster), 1)?;
        }
        Ok(())
    }
}
