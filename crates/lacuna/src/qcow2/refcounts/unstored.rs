//! What storage does not have yet of where refcounts lie, and what it may still name.
//!
//! * Always: a cluster of a table or a block that storage may name is neither free nor handed out, until
//!   a write-back that names another one is done.
//! * Always: where the count of a block lies in another block, storage names that one no later: sectors of
//!   the table come in any order, and a block that nothing counts would be handed out.

use std::collections::BTreeSet;

use super::Refcounts;
use crate::qcow2::format::RefcountTableLocation;
use crate::qcow2::moved::Moved;
use crate::qcow2::need::{Need, Planned};
use crate::units::{HostCluster, HostOffset, HostRange};

/// Entries of the table in a sector, which is written whole or not at all.
const SECTOR_ENTRIES: usize = 64;

/// What storage does not have of the table.
#[derive(Debug, Default)]
pub(super) struct Unstored {
    /// Entries, by index.
    pub(super) entries: BTreeSet<usize>,
    /// Whether the whole table lies elsewhere, and the header is to point to it.
    pub(super) moved: Moved,
    /// Tables and blocks that memory names no more.
    pub(super) replaced: Vec<HostRange>,
    /// Blocks that counted nothing but themselves: not free, though no block says so.
    pub(super) leaving: BTreeSet<u64>,
}

/// How storage learns of changes of the table.
#[derive(Debug)]
pub(in crate::qcow2) struct TableUpdate {
    /// All of it, at a new place that the header does not name: before its location.
    pub(in crate::qcow2) whole: Option<Vec<u8>>,
    /// What the header is to say.
    pub(in crate::qcow2) location: Option<RefcountTableLocation>,
    /// Otherwise, sectors of it.
    pub(in crate::qcow2) sectors: Vec<(HostOffset, Vec<u8>)>,
}

/// What storage has learnt.
#[derive(Debug, Default)]
pub(in crate::qcow2) struct Stored {
    /// Where the table lies, if that is new.
    pub(in crate::qcow2) location: Option<RefcountTableLocation>,
    /// What it named before.
    pub(in crate::qcow2) replaced: Vec<HostRange>,
}

impl Refcounts {
    /// Hands out what storage does not have; [`stored`](Self::stored) or [`redo`](Self::redo) comes next.
    pub(in crate::qcow2) fn take_unstored(&mut self) -> TableUpdate {
        self.on_its_way = std::mem::take(&mut self.unstored);
        let bytes = |entries: &[u64]| entries.iter().flat_map(|it| it.to_be_bytes()).collect();
        let moved = self.on_its_way.moved;
        let location = (moved != Moved::No).then(|| self.location());
        if moved == Moved::Unwritten {
            return TableUpdate { whole: Some(bytes(&self.table)), location, sectors: Vec::new() };
        }
        let dirty = self.on_its_way.entries.iter();
        let sectors: BTreeSet<usize> = dirty.map(|index| index / SECTOR_ENTRIES).collect();
        let sector = |at: usize| {
            let end = self.table.len().min((at + 1) * SECTOR_ENTRIES);
            let offset = self.table_offset + at as u64 * 512;
            (offset, bytes(&self.table[at * SECTOR_ENTRIES..end]))
        };
        TableUpdate { whole: None, location, sectors: sectors.into_iter().map(sector).collect() }
    }

    /// Storage has the whole table that was handed out, and may name it from now on.
    pub(in crate::qcow2) fn may_be_named(&mut self) {
        self.on_its_way.moved.written();
    }

    /// Storage has what was handed out.
    pub(in crate::qcow2) fn stored(&mut self) -> Stored {
        let done = std::mem::take(&mut self.on_its_way);
        Stored {
            location: (done.moved != Moved::No).then(|| self.location()),
            replaced: done.replaced,
        }
    }

    const fn location(&self) -> RefcountTableLocation {
        let clusters = self.table_clusters as u32;
        RefcountTableLocation { offset: self.table_offset, clusters }
    }

    /// What was handed out may not have reached storage: it is to be handed out again.
    pub(in crate::qcow2) fn redo(&mut self) {
        let Unstored { entries, moved, replaced, leaving } = std::mem::take(&mut self.on_its_way);
        self.unstored.entries.extend(entries);
        self.unstored.moved = self.unstored.moved.max(moved);
        self.unstored.replaced.extend(replaced);
        self.unstored.leaving.extend(leaving);
    }

    /// Says whether storage has all of the table.
    pub(in crate::qcow2) fn is_stored(&self) -> bool {
        let Unstored { entries, moved, replaced, leaving } = &self.unstored;
        *moved == Moved::No && entries.is_empty() && replaced.is_empty() && leaving.is_empty()
    }

    /// Says whether a cluster was a block that storage may still name.
    pub(super) fn is_leaving(&self, cluster: HostCluster) -> bool {
        self.unstored.leaving.contains(&cluster.0) || self.on_its_way.leaving.contains(&cluster.0)
    }

    /// Has storage name the block that counts another one, unless both entries reach it at once.
    pub(super) fn settle_counting(&self, counting: u64, counted: u64) -> Planned<()> {
        let index = counting as usize;
        let is_apart = index / SECTOR_ENTRIES != counted as usize / SECTOR_ENTRIES;
        let may_be_lost = self.unstored.entries.contains(&index)
            || self.on_its_way.entries.contains(&index)
                && self.on_its_way.moved != Moved::Unwritten;
        match is_apart && may_be_lost && self.unstored.moved != Moved::Unwritten {
            true => Err(Need::StoredRefcounts.into()),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::format::{EntryWidth, Geometry, Version};
    use crate::qcow2::need::Stop;
    use crate::qcow2::refcounts::Placement;

    fn refcounts() -> Refcounts {
        let geometry = Geometry::new(Version::V3, 16, 4, EntryWidth::Standard).unwrap();
        let table = vec![0; 8192];
        Refcounts::new(geometry, table, HostOffset(1 << 16), 4 << 16, 0, Placement::default())
    }

    #[test]
    fn what_is_given_up_while_a_write_back_runs_waits_for_the_next_one() {
        let mut refcounts = refcounts();
        refcounts.unstored.leaving.insert(7);
        refcounts.take_unstored();
        refcounts.unstored.leaving.insert(9);
        refcounts.stored();
        let is_leaving = |refcounts: &Refcounts, at| refcounts.is_leaving(HostCluster(at));
        assert!(!is_leaving(&refcounts, 7) && is_leaving(&refcounts, 9));
        refcounts.take_unstored();
        refcounts.redo();
        assert!(is_leaving(&refcounts, 9) && !refcounts.is_stored());
    }

    #[test]
    fn a_block_waits_for_the_one_that_counts_it_unless_a_sector_names_both() {
        let mut refcounts = refcounts();
        let waits = |refcounts: &Refcounts, counting, counted| {
            let stop = refcounts.settle_counting(counting, counted);
            matches!(stop, Err(Stop::Need(Need::StoredRefcounts)))
        };
        assert!(!waits(&refcounts, 70, 3));
        refcounts.unstored.entries.insert(70);
        assert!(waits(&refcounts, 70, 3) && !waits(&refcounts, 70, 65));
        // On its way is not there yet.
        refcounts.take_unstored();
        assert!(waits(&refcounts, 70, 3));
        refcounts.stored();
        assert!(!waits(&refcounts, 70, 3));
        // A table that moves is switched to as a whole.
        refcounts.unstored.entries.insert(70);
        refcounts.unstored.moved = Moved::Unwritten;
        assert!(!waits(&refcounts, 70, 3));
    }
}
