//! Gives refcount blocks and the table another place.
//!
//! * Always: a block lies where memory says from then on; storage hears of it in the next write-back, before
//!   any pointer relies on a count that only the new place has.

use super::{BLOCK_OFFSET_MASK, Refcounts};
use crate::qcow2::moved::Moved;
use crate::qcow2::need::Planned;
use crate::qcow2::overlap::Structure;
use crate::units::{HostCluster, HostOffset, HostRange};

impl Refcounts {
    /// Returns the indices of blocks that count clusters before the first `goal`, or did, and lie behind it.
    pub(in crate::qcow2) fn blocks_to_move(&self, goal: u64) -> Vec<u64> {
        let end = goal.div_ceil(self.entries()) as usize;
        let is_behind = |entry: u64| {
            self.geometry.host_cluster(HostOffset(entry & BLOCK_OFFSET_MASK)).0 >= goal
        };
        let blocks = (0..).zip(self.table.iter().take(end));
        blocks.filter(|(_, entry)| is_behind(**entry)).map(|(index, _)| index).collect()
    }

    /// Returns where a block lies; nothing where there is none.
    pub(in crate::qcow2) fn block_place(&self, index: u64) -> Planned<Option<HostOffset>> {
        self.block(index)
    }

    /// Moves a block to the lowest hole before cluster `limit`, from `cursor` on; nothing where there is
    /// none. `stored` is what storage has of it, as far as nothing newer is cached.
    pub(in crate::qcow2) fn move_block(
        &mut self,
        index: u64,
        stored: &[u8],
        (limit, cursor): (u64, &mut u64),
    ) -> Planned<Option<HostOffset>> {
        let Some(old) = self.block(index)? else { return Ok(None) };
        let Some(new) = self.find_below(1, limit, cursor)? else { return Ok(None) };
        let counting = new / self.entries();
        if counting != index {
            self.settle_counting(counting, index)?;
        }
        self.write(HostCluster(new), 1)?;
        *cursor = new + 1;
        let to = self.geometry.host_offset(HostCluster(new));
        self.blocks.copy_fresh(old, to, stored);
        self.blocks.forget(old);
        self.table[index as usize] = to.0;
        self.unstored.entries.insert(index as usize);
        let cluster_bytes = self.geometry.cluster_bytes();
        self.unstored.replaced.push(HostRange::new(old, cluster_bytes));
        Ok(Some(to))
    }

    /// Has the table lie at `to`, which was allocated.
    pub(in crate::qcow2) fn move_table(&mut self, to: HostOffset) {
        self.unstored.replaced.push(self.table_range());
        self.table_offset = to;
        self.unstored.moved = Moved::Unwritten;
        self.new_metadata.push((self.table_range(), Structure::RefcountTable));
    }
}
