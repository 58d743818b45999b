//! Refcounts, in memory and in the file, changed for many clusters at once.

use std::collections::BTreeMap;

use crate::qcow2::check::read::{read_bytes, read_words};
use crate::qcow2::check::refcounts::{Block, RefcountTable};
use crate::qcow2::check::references::{Mark, References};
use crate::qcow2::format::{Geometry, Header};
use crate::qcow2::patch::write_changes;
use crate::storage::Storage;
use crate::{Error, Result};

/// The refcounts of an image that was found clean: references and counts are one.
pub(super) struct Counts {
    geometry: Geometry,
    references: References,
    pub(super) table: RefcountTable,
}

/// New counts by cluster.
pub(super) type Changes = BTreeMap<u64, u64>;

impl Counts {
    pub(super) const fn new(
        geometry: Geometry,
        references: References,
        table: RefcountTable,
    ) -> Self {
        Self { geometry, references, table }
    }

    pub(super) fn count(&self, cluster: u64) -> u64 {
        self.references.count(cluster)
    }

    /// Says whether there is a refcount block for a cluster.
    pub(super) fn has_block(&self, cluster: u64) -> bool {
        matches!(self.table.block(cluster / self.geometry.refcount_block_entries()), Block::At(_))
    }

    /// Makes room to count `clusters`.
    pub(super) fn grow(&mut self, clusters: u64) {
        self.references.grow(clusters);
    }

    /// Returns the clusters that are in use, in order.
    pub(super) fn used(&self) -> impl Iterator<Item = u64> + '_ {
        self.references.iter_from(0).map(|(cluster, _)| cluster)
    }

    /// Returns the clusters from `from` on that are in use, with their counts, in order.
    pub(super) fn iter_from(&self, from: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.references.iter_from(from)
    }

    /// Reads the table again, whose blocks may have moved.
    pub(super) async fn reload<S: Storage>(&mut self, storage: &S) -> Result<()> {
        let header = crate::qcow2::read_header(storage).await?;
        self.table = read_table(storage, &header).await?;
        Ok(())
    }

    /// Writes new counts, block by block. Returns how many bytes that took. Not durable yet.
    pub(super) async fn write<S: Storage>(
        &mut self,
        storage: &S,
        changes: &Changes,
    ) -> Result<u64> {
        let per_block = self.geometry.refcount_block_entries();
        let mut written = 0;
        let mut rest = changes.iter().peekable();
        while let Some((cluster, _)) = rest.peek() {
            let index = *cluster / per_block;
            let Block::At(offset) = self.table.block(index) else {
                return Err(Error::corrupt(format!("Refcount block {index} is missing")));
            };
            let bytes = self.geometry.cluster_bytes() as usize;
            let old = read_bytes(storage, offset, bytes).await?;
            let mut new = old.to_vec();
            let is_here = |(cluster, _): &(&u64, &u64)| **cluster / per_block == index;
            while let Some((cluster, count)) = rest.next_if(is_here) {
                self.table.width.write(&mut new, (cluster % per_block) as usize, *count);
            }
            written += write_changes(storage, offset, &old, &new).await?;
        }
        for (cluster, count) in changes {
            self.note(*cluster, *count);
        }
        Ok(written)
    }

    /// Notes a count that the file has.
    pub(super) fn note(&mut self, cluster: u64, count: u64) {
        let now = self.references.count(cluster);
        match count.checked_sub(now) {
            Some(more) => self.references.add(cluster, more, Mark::None),
            None => (count..now).for_each(|_| self.references.subtract_one(cluster)),
        }
    }
}

/// Reads the refcount table.
pub(super) async fn read_table<S: Storage>(storage: &S, header: &Header) -> Result<RefcountTable> {
    let geometry = header.geometry;
    let words = (u64::from(header.refcount_table.clusters) << geometry.cluster_bits()) / 8;
    let entries = read_words(storage, header.refcount_table.offset, words).await?;
    Ok(RefcountTable::new(geometry, entries, storage.len().await?))
}
