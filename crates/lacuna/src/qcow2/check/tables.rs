//! Which L2 tables there are, how often each is used, and reading them in the order of the file.
//!
//! * Always: a table that many L1 entries point to is read once.
//! * Memory: 4 bytes per active table, and [`References`] pages for those of snapshots.

use std::collections::BTreeMap;
use std::iter::Peekable;

use super::read::read_bytes;
use super::references::{Mark, References};
use crate::Result;
use crate::buffer::Buffer;
use crate::storage::Storage;
use crate::units::HostOffset;

/// Unaligned tables that are looked at; the format has none, so these are damage.
const MAX_UNALIGNED: usize = 1024;
/// Bytes of neighbouring tables that are read at once.
const BATCH_BYTES: u64 = 1 << 20;

/// How many L1 entries point to a table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Uses {
    /// Entries of the active L1 table.
    pub(crate) active: u64,
    /// Entries of any L1 table.
    pub(crate) total: u64,
}

/// The L2 tables of an image.
#[derive(Debug)]
pub(crate) struct Tables {
    /// Clusters with tables of the active L1 table, as often as it names them; sorted when sealed.
    active: Vec<u32>,
    /// Tables of snapshots.
    inactive: References,
    unaligned: BTreeMap<u64, Uses>,
}

impl Tables {
    pub(crate) fn new(clusters: u64) -> Self {
        Self { active: Vec::new(), inactive: References::new(clusters), unaligned: BTreeMap::new() }
    }

    pub(crate) fn add_active(&mut self, cluster: u64) {
        // The file has fewer than 2^31 clusters, or it would not be checked at all.
        self.active.push(u32::try_from(cluster).unwrap_or(u32::MAX));
    }

    pub(crate) fn add_inactive(&mut self, cluster: u64) {
        self.inactive.add(cluster, 1, Mark::None);
    }

    /// Notes a table that does not start with a cluster. Returns whether there was room for it.
    pub(crate) fn add_unaligned(&mut self, at: HostOffset, uses: Uses) -> bool {
        if self.unaligned.len() >= MAX_UNALIGNED && !self.unaligned.contains_key(&at.0) {
            return false;
        }
        let known = self.unaligned.entry(at.0).or_default();
        known.active += uses.active;
        known.total += uses.total;
        true
    }

    /// Ends the collection.
    pub(crate) fn seal(&mut self) {
        self.active.sort_unstable();
    }

    pub(crate) fn unaligned(&self) -> impl Iterator<Item = (HostOffset, Uses)> + '_ {
        self.unaligned.iter().map(|(at, uses)| (HostOffset(*at), *uses))
    }

    /// Returns the aligned tables by cluster.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, Uses)> + '_ {
        Merge {
            active: self.active.iter().map(|cluster| u64::from(*cluster)).peekable(),
            inactive: self.inactive.iter_from(0).peekable(),
        }
    }

    /// Returns the aligned tables that the active L1 table points to.
    pub(crate) fn iter_active(&self) -> impl Iterator<Item = (u64, Uses)> + '_ {
        self.iter().filter(|(_, uses)| uses.active > 0)
    }
}

/// Merges active and inactive tables in the order of the file.
struct Merge<A: Iterator<Item = u64>, I: Iterator<Item = (u64, u64)>> {
    active: Peekable<A>,
    inactive: Peekable<I>,
}

impl<A: Iterator<Item = u64>, I: Iterator<Item = (u64, u64)>> Iterator for Merge<A, I> {
    type Item = (u64, Uses);

    fn next(&mut self) -> Option<Self::Item> {
        let inactive = self.inactive.peek().map_or(u64::MAX, |(cluster, _)| *cluster);
        let cluster = self.active.peek().map_or(inactive, |active| inactive.min(*active));
        let mut uses = Uses::default();
        while self.active.next_if_eq(&cluster).is_some() {
            uses.active += 1;
        }
        uses.total = uses.active;
        if let Some((_, count)) = self.inactive.next_if(|(inactive, _)| *inactive == cluster) {
            uses.total += count;
        }
        (uses.total > 0).then_some((cluster, uses))
    }
}

/// Tables in neighbouring clusters.
#[derive(Clone, Debug)]
pub(crate) struct Batch {
    pub(crate) first: u64,
    pub(crate) uses: Vec<Uses>,
}

/// Joins neighbours into batches.
pub(crate) fn batches(
    tables: impl Iterator<Item = (u64, Uses)>,
    cluster_bytes: u64,
) -> impl Iterator<Item = Batch> {
    let most = (BATCH_BYTES / cluster_bytes).max(1) as usize;
    let mut tables = tables.peekable();
    std::iter::from_fn(move || {
        let (first, uses) = tables.next()?;
        let mut batch = Batch { first, uses: vec![uses] };
        while batch.uses.len() < most {
            let next = first + batch.uses.len() as u64;
            let Some((_, uses)) = tables.next_if(|(cluster, _)| *cluster == next) else { break };
            batch.uses.push(uses);
        }
        Some(batch)
    })
}

/// Reads a batch: each table with its uses, or why it could not be read.
pub(crate) async fn read_batch<S: Storage>(
    storage: &S,
    batch: Batch,
    cluster_bytes: u64,
) -> Vec<(u64, Uses, Result<Buffer>)> {
    let at = |index: usize| HostOffset((batch.first + index as u64) * cluster_bytes);
    let whole = read_bytes(storage, at(0), batch.uses.len() * cluster_bytes as usize).await;
    let mut read = Vec::with_capacity(batch.uses.len());
    let mut rest = whole.ok();
    for (index, uses) in batch.uses.iter().enumerate() {
        let table = match rest.take() {
            Some(mut first) => {
                if first.len() > cluster_bytes as usize {
                    rest = Some(first.split_off(cluster_bytes as usize));
                }
                Ok(first)
            }
            // One bad sector must not hide its neighbours.
            None => read_bytes(storage, at(index), cluster_bytes as usize).await,
        };
        read.push((batch.first + index as u64, *uses, table));
    }
    read
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_come_once_with_all_their_uses() {
        let mut tables = Tables::new(100);
        for cluster in [7, 3, 7] {
            tables.add_active(cluster);
        }
        for cluster in [3, 3, 50] {
            tables.add_inactive(cluster);
        }
        tables.seal();
        let found: Vec<_> =
            tables.iter().map(|(cluster, uses)| (cluster, uses.active, uses.total)).collect();
        assert_eq!(found, [(3, 1, 3), (7, 2, 2), (50, 0, 1)]);
        assert_eq!(tables.iter_active().count(), 2);
    }

    #[test]
    fn neighbours_are_read_together() {
        let uses = Uses { active: 1, total: 1 };
        let tables = [3, 4, 5, 9].map(|cluster| (cluster, uses));
        let found: Vec<_> = batches(tables.into_iter(), 1 << 19)
            .map(|batch| (batch.first, batch.uses.len()))
            .collect();
        assert_eq!(found, [(3, 2), (5, 1), (9, 1)]);
    }
}
